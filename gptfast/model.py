"""GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"): a post-norm decoder.

    x = tokens_embed[ids] + positions_embed[0 … T-1]
    n = ln_1(x + dropout(c_proj(attention(c_attn(x)))))
    x = ln_2(n + dropout(c_proj(gelu(c_fc(n)))))               for each block; no LayerNorm behind the last

Names, arguments, outputs and ``state_dict`` keys are HuggingFace's.

Shapes: B batch, T new positions, S all positions with the cached ones, H heads, D head dim, C = H * D width.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptfast_kernels import (
    embedding,
    flash_attention,
    flash_attention_qkvpacked,
    flash_attention_with_kvcache,
    layer_norm,
    linear_gelu,
)
from gptfast_kernels.attention import attention_reference

from .cache import KVCache
from .config import OpenAIGPTConfig
from .outputs import BaseModelOutput
from .pretrained import OpenAIGPTPreTrainedModel

GELU_FORMS = {"gelu": "tanh", "gelu_new": "tanh", "gelu_erf": "none"}
OTHER_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "swish": F.silu}

CHECK_IDS_ON_GPU = os.environ.get("GPTFAST_CHECK_IDS") == "1"  # reads the ids back: a synchronisation a forward pass


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-1's files have it."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(x, self.weight.t(), self.bias)


@dataclass
class AttentionContext:
    """What every block of one forward pass shares."""

    key_padding_mask: Tensor | None  # bool [B, S], True where the key takes part
    head_mask: Tensor | None  # [n_layer, H], factors
    cache: KVCache | None
    output_attentions: bool


class Attention(nn.Module):
    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {config.n_embd} and {config.n_head}")
        self.n_head = config.n_head
        self.dropout_p = config.attn_pdrop
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> tuple[Tensor, Tensor | None]:
        """x [B, T, C] -> (projected attention [B, T, C], attention weights [B, H, T, S] if asked for)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        dropout_p = self.dropout_p if self.training else 0.0
        cache, padding, probs = context.cache, context.key_padding_mask, None

        if cache is None and not context.output_attentions:
            a = flash_attention_qkvpacked(qkv, key_padding_mask=padding, dropout_p=dropout_p)
        elif cache is not None and padding is None and not context.output_attentions:
            q, k, v = qkv.unbind(2)
            a = flash_attention_with_kvcache(q, *cache.layer(layer), k, v, cache_seqlens=cache.seqlens)
        else:
            q, k, v = qkv.unbind(2)
            if cache is not None:
                k, v = _append(cache, layer, k, v)
            if context.output_attentions:
                a, _, probs = attention_reference(q, k, v, key_padding_mask=padding, dropout_p=dropout_p)
            else:
                a = flash_attention(q, k, v, key_padding_mask=padding, dropout_p=dropout_p)

        if context.head_mask is not None:
            factor = context.head_mask[layer]
            a = a * factor[:, None]
            probs = None if probs is None else probs * factor[:, None, None]
        return self.c_proj(a.reshape(B, T, C)), probs


def _append(cache: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Writes k and v [B, T, H, D] behind what the cache holds; returns all of the row, [B, S, H, D]."""
    assert isinstance(cache.seqlens, int)
    end = cache.seqlens + k.shape[1]
    k_cache, v_cache = cache.layer(layer)
    k_cache[:, cache.seqlens : end] = k
    v_cache[:, cache.seqlens : end] = v
    return k_cache[:, :end], v_cache[:, :end]


class MLP(nn.Module):
    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        if config.afn not in GELU_FORMS and config.afn not in OTHER_ACTIVATIONS:
            raise KeyError(f"afn must be one of {', '.join([*GELU_FORMS, *OTHER_ACTIVATIONS])}, got {config.afn!r}")
        self.afn = config.afn
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, 4 * config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        if self.afn in GELU_FORMS:
            h = linear_gelu(x, self.c_fc.weight.t(), self.c_fc.bias, approximate=GELU_FORMS[self.afn])
        else:
            h = OTHER_ACTIVATIONS[self.afn](self.c_fc(x))
        return self.c_proj(h)


class Block(nn.Module):
    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        self.dropout_p = config.resid_pdrop
        self.attn = Attention(config)
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> tuple[Tensor, Tensor | None]:
        a, probs = self.attn(x, context, layer)
        n = self._add_and_normalize(a, x, self.ln_1)
        return self._add_and_normalize(self.mlp(n), n, self.ln_2), probs

    def _add_and_normalize(self, x: Tensor, residual: Tensor, ln: nn.LayerNorm) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        return layer_norm(x, ln.weight, ln.bias, residual=residual, dropout_p=dropout_p, eps=ln.eps)


class OpenAIGPTModel(OpenAIGPTPreTrainedModel):
    """The body: ids in, the last hidden state out."""

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        config = self.config
        self.tokens_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions_embed = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.gradient_checkpointing = False
        self.checkpoint_kwargs: dict[str, Any] = {"use_reentrant": False}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens_embed

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.tokens_embed = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
    ) -> tuple | BaseModelOutput:
        """Runs the blocks.

        Args:
            input_ids: int32 or int64 [B, T] (or [T], or [B, choices, T]), each in [0, vocab_size).
            attention_mask: [B, T], 1 for positions to attend to; any dtype. With a cache, [B, cached + T]. It does not
                change positions. A query that sees no key attends to nothing.
            token_type_ids: like ``input_ids``; rows of the token table that are added.
            position_ids: [B, T], [1, T] or [T], each in [0, n_positions); counted from the cached length if None.
            inputs_embeds: [B, T, C] in place of ``input_ids``.
            output_attentions, output_hidden_states, return_dict: the config's if None.
            head_mask: [H] or [n_layer, H], factors on each head's attention weights.
            past_key_values: a cache to read and to append to. No gradient flows into it.
            use_cache: return a cache, made here if none is given; the config's if None.

        Returns:
            BaseModelOutput, or a tuple of what is there with ``return_dict=False``.

        Raises:
            ValueError, TypeError: an argument is not as above. Nothing has been computed then.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        use_cache = (config.use_cache and not self.training) if use_cache is None else use_cache

        shape = self._check_inputs(input_ids, inputs_embeds, token_type_ids, past_key_values)
        T = shape[-1]
        B = shape[:-1].numel()
        cache = past_key_values
        if cache is None and use_cache:
            cache = KVCache(config, B, dtype=self.tokens_embed.weight.dtype, device=self.tokens_embed.weight.device)
        if position_ids is None and cache is not None:
            steps = torch.arange(T, device=cache.k.device)
            position_ids = (
                cache.seqlens[:, None] + steps if isinstance(cache.seqlens, Tensor) else cache.seqlens + steps
            )
        elif position_ids is not None:
            position_ids = self._check_position_ids(position_ids, B, T)
        context = AttentionContext(
            self._key_padding_mask(attention_mask, B, T, cache), self._head_mask(head_mask), cache, output_attentions
        )

        x = self._embed(input_ids, inputs_embeds, token_type_ids, position_ids, B, T)
        hidden_states, attentions = [], []
        for layer, block in enumerate(self.h):
            if output_hidden_states:
                hidden_states.append(x)
            if self.gradient_checkpointing and self.training:
                x, probs = checkpoint(block, x, context, layer, **self.checkpoint_kwargs)
            else:
                x, probs = block(x, context, layer)
            if output_attentions:
                attentions.append(probs)
        if cache is not None:
            cache.advance(T)

        x = x.view(*shape, -1)
        output = BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            past_key_values=cache if use_cache else None,
        )
        return output if return_dict else output.to_tuple()

    def _embed(self, input_ids, inputs_embeds, token_type_ids, position_ids, B, T) -> Tensor:  # [B, T, C]
        dropout_p = self.config.embd_pdrop if self.training else 0.0
        types = None if token_type_ids is None else token_type_ids.reshape(B, T)
        tokens, positions = self.tokens_embed.weight, self.positions_embed.weight
        if inputs_embeds is None:
            return embedding(
                input_ids.reshape(B, T),
                tokens,
                positions,
                position_ids=position_ids,
                token_type_ids=types,
                dropout_p=dropout_p,
            )
        x = inputs_embeds + (positions[:T] if position_ids is None else F.embedding(position_ids, positions))
        x = x if types is None else x + F.embedding(types, tokens)
        return F.dropout(x, dropout_p) if dropout_p else x

    # -- what comes in ------------------------------------------------------------------------------------------

    def _check_inputs(self, input_ids, inputs_embeds, token_type_ids, cache) -> torch.Size:
        """The shape of the ids, [..., T]."""
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("You cannot specify both input_ids and inputs_embeds at the same time")
        if input_ids is not None:
            shape, name = input_ids.shape, "input_ids"
            if not shape:
                raise ValueError("input_ids must have at least one dimension, got a scalar")
        elif inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.n_embd:
                raise ValueError(
                    f"inputs_embeds must be [B, T, {self.config.n_embd}], got shape {list(inputs_embeds.shape)}"
                )
            shape, name = inputs_embeds.shape[:-1], "inputs_embeds"
        else:
            raise ValueError("You have to specify either input_ids or inputs_embeds")
        if 0 in shape:
            raise ValueError(f"{name} must hold at least one row and one position, got shape {list(shape)}")
        B, T, held = shape[:-1].numel(), shape[-1], 0
        if cache is not None:
            if cache.batch_size != B:
                raise ValueError(f"past_key_values holds {cache.batch_size} rows, {name} has {B}")
            if isinstance(cache.seqlens, int) or cache.k.device.type == "cpu":
                held = cache.get_seq_length()
            if held + T > cache.max_length:
                raise ValueError(f"{name} has {T} positions, past_key_values room for {cache.max_length - held}")
        if held + T > self.config.n_positions:
            raise ValueError(f"{name} has {T} positions, accepted are at most n_positions = {self.config.n_positions}")
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
        if token_type_ids is not None:
            if token_type_ids.numel() != B * T or token_type_ids.shape[-1] != T:
                raise ValueError(f"token_type_ids must be {list(shape)}, got shape {list(token_type_ids.shape)}")
            check_ids("token_type_ids", token_type_ids, self.config.vocab_size)
        return shape

    def _check_position_ids(self, position_ids: Tensor, B: int, T: int) -> Tensor:
        if position_ids.shape not in ((T,), (1, T), (B, T)) and position_ids.numel() != B * T:
            raise ValueError(
                f"position_ids must be [{B}, {T}], [1, {T}] or [{T}], got shape {list(position_ids.shape)}"
            )
        check_ids("position_ids", position_ids, self.config.n_positions)
        return position_ids.view(-1, T)

    @staticmethod
    def _key_padding_mask(attention_mask: Tensor | None, B: int, T: int, cache: KVCache | None) -> Tensor | None:
        if attention_mask is None:
            return None
        if cache is not None and isinstance(cache.seqlens, Tensor):
            raise ValueError("attention_mask cannot go with past_key_values whose rows differ in length")
        S = T if cache is None else cache.get_seq_length() + T
        if attention_mask.shape[-1:] != (S,) or attention_mask.numel() != B * S:
            raise ValueError(f"attention_mask must be [{B}, {S}], got shape {list(attention_mask.shape)}")
        mask = attention_mask.reshape(B, S) >= 1
        # all ones is what a tokenizer sends for a batch without padding; looking costs a GPU a synchronisation
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
            return None
        return mask

    def _head_mask(self, head_mask: Tensor | None) -> Tensor | None:
        if head_mask is None:
            return None
        L, H = self.config.n_layer, self.config.n_head
        if head_mask.shape not in ((H,), (L, H)):
            raise ValueError(f"head_mask must be [{H}] or [{L}, {H}], got shape {list(head_mask.shape)}")
        return head_mask.to(self.tokens_embed.weight.dtype).expand(L, H)


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raises unless ``ids`` are integers in [0, size). On a GPU the range is checked only under GPTFAST_CHECK_IDS=1;
    without it an id out of range is a device-side assertion, as in torch.nn.Embedding."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if torch.compiler.is_compiling() or not (ids.device.type == "cpu" or CHECK_IDS_ON_GPU):
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= size:
        raise ValueError(f"{name} contains {int(low if low < 0 else high)}, accepted are 0 to {size - 1}")
