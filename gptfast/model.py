"""GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"): a post-norm decoder.

    x = tokens_embed[ids] + positions_embed[0 … T-1]
    n = ln_1(x + dropout(c_proj(attention(c_attn(x)))))
    x = ln_2(n + dropout(c_proj(gelu(c_fc(n)))))               for each block; no LayerNorm behind the last

Names, arguments, outputs and ``state_dict`` keys are HuggingFace's.

Shapes: B batch, T new positions, S all positions with the cached ones, H heads, D head dim, C = H * D width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptfast_kernels import (
    _dispatch,
    embedding,
    flash_attention,
    flash_attention_qkvpacked,
    flash_attention_varlen,
    flash_attention_with_kvcache,
    gelu,
    layer_norm,
    linear_gelu,
)
from gptfast_kernels.attention import attention_probs, attention_reference
from gptfast_kernels.projection import linear_dtype

from . import cpu, step
from .cache import KVCache
from .config import OpenAIGPTConfig
from .inputs import check_cache, check_head_mask, check_position_ids, check_text, key_padding_mask
from .linear import BlockedLinear, Conv1D, is_plain
from .outputs import BaseModelOutput
from .pretrained import OpenAIGPTPreTrainedModel

GELU_FORMS = {"gelu": "tanh", "gelu_new": "tanh", "gelu_erf": "none"}
OTHER_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "swish": F.silu}


@dataclass
class AttentionContext:
    """What every block of one forward pass shares."""

    key_padding_mask: Tensor | None  # bool [B, S], True where the key takes part
    head_mask: Tensor | None  # [n_layer, H], factors
    cache: KVCache | None
    output_attentions: bool
    inference: bool  # no dropout, no gradient
    buffers: cpu.Buffers | None = None  # where a CPU computes blocks in place
    cu_seqlens: Tensor | None = None  # int32 [R + 1]: B is 1, its T positions are R sequences, each sees only itself
    max_seqlen: int = 0  # the longest of them


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
        a, probs = self.attend(self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head), context, layer)
        return self.c_proj(a.reshape(B, T, C)), probs

    def attend(self, qkv: Tensor, context: AttentionContext, layer: int) -> tuple[Tensor, Tensor | None]:
        """qkv [B, T, 3, H, D] -> (attention [B, T, H, D], its weights [B, H, T, S] if asked for)."""
        dropout_p = self.dropout_p if self.training else 0.0
        cache, padding, probs = context.cache, context.key_padding_mask, None
        a: Any

        if context.cu_seqlens is not None:
            q, k, v = qkv.squeeze(0).unbind(1)
            starts, longest = context.cu_seqlens, context.max_seqlen
            a = flash_attention_varlen(q, k, v, starts, starts, longest, longest, dropout_p=dropout_p)[None]
        elif cache is None and not context.output_attentions:
            a = flash_attention_qkvpacked(qkv, key_padding_mask=padding, dropout_p=dropout_p)
        elif cache is not None and padding is None and not context.output_attentions and context.inference:
            q, k, v = qkv.unbind(2)
            a = flash_attention_with_kvcache(q, *cache.layer(layer), k, v, cache_seqlens=cache.seqlens)
        else:
            q, k, v = qkv.unbind(2)
            if cache is not None:
                k, v = _append(cache, layer, k, v)
            if context.output_attentions and context.inference:
                a, lse = flash_attention(q, k, v, key_padding_mask=padding, return_lse=True)
                probs = attention_probs(q, k, lse, key_padding_mask=padding)
            elif context.output_attentions:
                why = "attention weights with gradients or dropout take the formula"
                _dispatch.select("flash_attention", "auto", why)
                a, _, probs = attention_reference(q, k, v, key_padding_mask=padding, dropout_p=dropout_p)
            else:
                a = flash_attention(q, k, v, key_padding_mask=padding, dropout_p=dropout_p)

        if context.head_mask is not None:
            factor = context.head_mask[layer]
            if probs is None:
                a = a * factor[:, None]
            else:  # the weights that are returned must be those that are computed with
                probs = probs * factor[:, None, None]
                v = v if padding is None else v.masked_fill(~padding[:, :, None, None], 0.0)
                a = (probs @ v.transpose(1, 2)).transpose(1, 2)
        return a, probs


def _append(cache: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Writes k and v [B, T, H, D] behind what the cache holds; returns all of the row, [B, S, H, D]."""
    assert isinstance(cache.seqlens, int)
    start, end = cache.seqlens, cache.seqlens + k.shape[1]
    k_cache, v_cache = cache.layer(layer)
    k_cache[:, start:end] = k.detach()
    v_cache[:, start:end] = v.detach()
    if not k.requires_grad:
        return k_cache[:, :end], v_cache[:, :end]
    # a gradient flows to the new positions; it needs a copy, since later layers and steps write to the cache
    return torch.cat([k_cache[:, :start], k], 1), torch.cat([v_cache[:, :start], v], 1)


class MLP(nn.Module):
    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        if config.afn not in GELU_FORMS and config.afn not in OTHER_ACTIVATIONS:
            raise KeyError(f"afn must be one of {', '.join([*GELU_FORMS, *OTHER_ACTIVATIONS])}, got {config.afn!r}")
        self.afn = config.afn
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, 4 * config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        if self.afn not in GELU_FORMS:
            h = OTHER_ACTIVATIONS[self.afn](self.c_fc(x))
        elif is_plain(self.c_fc):
            h = linear_gelu(x, self.c_fc.weight.t(), self.c_fc.bias, approximate=GELU_FORMS[self.afn])
        else:
            h = gelu(self.c_fc(x), approximate=GELU_FORMS[self.afn])
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
        if not is_plain(ln, nn.LayerNorm):
            return ln(residual + F.dropout(x, dropout_p))
        return layer_norm(x, ln.weight, ln.bias, residual=residual, dropout_p=dropout_p, eps=ln.eps)


def plain_parts(block: Any) -> cpu.Parts | None:
    """A block's parts, if all are what was built here, drop nothing, and nobody sees what is in between."""
    if not is_plain(block, Block) or type(block)._add_and_normalize is not Block._add_and_normalize:
        return None
    attn, mlp = block.attn, block.mlp
    if block.training or attn.training or not (is_plain(attn, Attention) and is_plain(mlp, MLP)):
        return None
    if type(attn).attend is not Attention.attend or mlp.afn not in GELU_FORMS:
        return None
    parts = cpu.Parts(attn, attn.c_attn, attn.c_proj, block.ln_1, mlp.c_fc, mlp.c_proj, block.ln_2, GELU_FORMS[mlp.afn])
    for linear in (parts.c_attn, parts.c_proj, parts.c_fc, parts.mlp_c_proj):
        if not (is_plain(linear) or is_plain(linear, BlockedLinear)):
            return None
    return parts if is_plain(parts.ln_1, nn.LayerNorm) and is_plain(parts.ln_2, nn.LayerNorm) else None


def _is_table(module: Any) -> bool:
    """Whether an embedding does no more than look up rows: it renormalizes none, and all have plain gradients."""
    if not is_plain(module, nn.Embedding):
        return False
    special = module.scale_grad_by_freq or module.sparse
    return module.max_norm is None and module.padding_idx is None and not special


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
            attention_mask: [B, T], 1 for positions to attend to; bool, int or float. With a cache, [B, cached + T]. It
                does not change positions. A query that sees no key attends to nothing.
            token_type_ids: like ``input_ids``, or one row for all; rows of the token table that are added.
            position_ids: [B, T], [1, T] or [T], each in [0, n_positions); counted from the cached length if None. With
                ``input_ids`` [B, choices, T], B counts every choice here and in ``attention_mask``, or the shape is
                theirs.
            inputs_embeds: [B, T, C] in place of ``input_ids``.
            output_attentions, output_hidden_states, return_dict: the config's if None.
            head_mask: [H] or [blocks, H], factors on each head's attention weights.
            past_key_values: a cache to read and to append to. No gradient flows to what it holds already.
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

        tokens = self.tokens_embed.weight
        shape = check_text(input_ids, inputs_embeds, token_type_ids, tokens, config.n_positions)  # [..., T]
        position_ids = check_position_ids(position_ids, shape, config.n_positions)
        device = (input_ids if inputs_embeds is None else inputs_embeds).device  # type: ignore[union-attr]
        context = self._context(shape, device, attention_mask, head_mask, past_key_values, use_cache, output_attentions)
        T, B, cache = shape[-1], math.prod(shape[:-1]), context.cache
        if position_ids is None and cache is not None:
            held: Any = cache.seqlens[:, None] if isinstance(cache.seqlens, Tensor) else cache.seqlens
            one_each = T == 1 and isinstance(held, Tensor)  # a step of decoding, of which each kernel counts
            position_ids = held if one_each else held + torch.arange(T, device=cache.k.device)

        recompute = self._recomputes()
        x = self._embed(input_ids, inputs_embeds, token_type_ids, position_ids, B, T)
        weights_wanted = output_attentions or head_mask is not None
        whole = context.inference and not weights_wanted and config.afn in GELU_FORMS  # a block can be run in one
        if whole and cpu.applies(x):
            context.buffers = cpu.Buffers(x, context, config.n_head, 4 * config.n_embd)
        in_steps = whole and not output_hidden_states and step.applies(x)
        norm: Any = None  # the last block's, if it left that to the next one's first kernel
        nobody_keeps_x = False
        hidden_states, attentions = [], []
        for layer, block in enumerate(self.h):
            if output_hidden_states:
                hidden_states.append(x)
            parts = plain_parts(block) if in_steps or context.buffers is not None else None
            if in_steps and parts is not None and step.fit(parts, x):
                x, norm = step.run_block(parts, x, norm, context, layer), parts.ln_2
                continue
            if norm is not None:
                x, norm = step.normalize(norm, x), None
            if parts is not None and context.buffers is not None and context.buffers.fit(parts):
                x, nobody_keeps_x = cpu.run_block(parts, x, context, layer, nobody_keeps_x), not output_hidden_states
                continue
            nobody_keeps_x = False
            if recompute:
                x, probs = checkpoint(block, x, context, layer, **self.checkpoint_kwargs)
            else:
                x, probs = block(x, context, layer)
            if output_attentions:
                attentions.append(probs)
        if norm is not None:
            x = step.normalize(norm, x)
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

    def _context(
        self,
        shape: torch.Size,
        device: torch.device,
        attention_mask: Tensor | None,
        head_mask: Tensor | None,
        cache: KVCache | None,
        use_cache: bool,
        output_attentions: bool,
    ) -> AttentionContext:
        """What the blocks share, made of checked arguments."""
        weight, blocks, held = self.tokens_embed.weight, len(self.h), 0
        training = self.training or any(block.training for block in self.h)
        inference = not (training or torch.is_grad_enabled())
        if self._recomputes() and (cache is not None or use_cache):
            raise ValueError("use_cache=True and past_key_values cannot go with gradient checkpointing")
        head_mask = check_head_mask(head_mask, blocks, self.config.n_head, weight.dtype, device)
        if cache is not None:
            may_be_ragged = inference and attention_mask is None and not output_attentions
            held = check_cache(cache, blocks, self.config, shape, linear_dtype(weight), weight.device, may_be_ragged)
        padding = key_padding_mask(attention_mask, shape, held, device)
        if cache is None and use_cache:
            cache = self.new_cache(math.prod(shape[:-1]))
        return AttentionContext(padding, head_mask, cache, output_attentions, inference)

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for this model, in the dtype that its keys have: autocast's where that is on."""
        weight = self.tokens_embed.weight
        return KVCache(
            self.config,
            batch_size,
            max_length,
            n_layer=len(self.h),
            dtype=linear_dtype(weight),
            device=weight.device,
        )

    def _embed(self, input_ids, inputs_embeds, token_type_ids, position_ids, B, T) -> Tensor:  # [B, T, C]
        dropout_p = self.config.embd_pdrop if self.training else 0.0
        types = None if token_type_ids is None else token_type_ids.reshape(-1, T).expand(B, T)
        tokens, positions = self.tokens_embed, self.positions_embed
        if inputs_embeds is None and _is_table(tokens) and _is_table(positions):
            return embedding(
                input_ids.reshape(B, T),
                tokens.weight,
                positions.weight,
                position_ids=position_ids,
                token_type_ids=types,
                dropout_p=dropout_p,
            )
        x = tokens(input_ids.reshape(B, T)) if inputs_embeds is None else inputs_embeds
        x = x + positions(torch.arange(T, device=x.device) if position_ids is None else position_ids)
        x = x if types is None else x + tokens(types)
        return F.dropout(x, dropout_p) if dropout_p else x
