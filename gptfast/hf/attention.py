"""``attn_implementation="gptfast"``: our attention in any model that uses transformers' attention interface.

transformers asks an implementation for two functions. ``attention_mask`` turns a mask pattern and a batch's padding
into what the layers are handed; ``attention_forward`` computes one layer with it. Between them goes

    None       causal over as many keys as queries, or one query that sees every key
    KeyMask    a pattern that our kernels know by name (causal, window, packed sequences) and which keys take part
    4-D mask   anything else, as transformers itself makes it for SDPA, and SDPA then computes it

What our kernels would leave out of the result (soft-capping, sinks, biases) raises.

Shapes: B batch, T query length, S key length, H query heads, Hkv key/value heads, D head dim.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_tracing

from gptfast_kernels import flash_attention, flash_attention_varlen

NAME = "gptfast"

Window = tuple[int | None, int | None]

# Keywords by which models ask for more than softmax(scaling * Q K^T) V.
_REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on the scores",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of keys for each query",
    "cache": "a paged cache",
}


def register_attention() -> None:
    """Makes ``attn_implementation="gptfast"`` known to transformers. Importing ``gptfast.hf`` does."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# -- masks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """Which keys a query may see, besides that padding takes no part."""

    window: Window  # as flash_attention has it: (None, 0) is causal, (None, None) is everything
    padded: bool = False
    cu_seqlens: Tensor | None = None  # int32: where each packed sequence starts in [B * T], and the total
    max_seqlen: int = 0


class KeyMask(Tensor):
    """uint8 [B, 1, 1, S'], 1 where a key takes part, with the ``pattern`` that tells the rest.

    S' may be less than the keys there are: the rest are slots of a cache that hold nothing yet. It is four-dimensional
    so that transformers passes it on untouched, and uint8 so that SDPA refuses it should it ever lose its pattern.
    """

    pattern: Pattern

    @classmethod
    def make(cls, keys: Tensor, pattern: Pattern) -> "KeyMask":  # keys: bool [B, S']
        mask = keys.to(torch.uint8)[:, None, None].as_subclass(cls)
        mask.pattern = pattern
        return mask

    def keys(self) -> Tensor | None:
        """bool [B, S'], or None where every key takes part."""
        return self.as_subclass(Tensor)[:, 0, 0].bool() if self.pattern.padded else None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, cls):  # moved, detached, sliced
            out.pattern = next(x.pattern for x in args if isinstance(x, cls))
        return out


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask for queries q_offset … q_offset + q_length - 1 and keys kv_offset … kv_offset + kv_length - 1.

    Args:
        mask_function: (batch, head, query, key) -> whether the query may see the key.
        attention_mask: bool [B, positions], True where a position takes part.
        kwargs: transformers' own mask function's.

    Returns:
        What ``attention_forward`` takes: None, a KeyMask, or bool [B, 1, T, S].
    """

    def stock() -> Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            device=device,
            **kwargs,
        )

    # For one query their mask is [B, 1, 1, S], all that we need. A length that is a tensor is a static cache's: reading
    # it would wait for the GPU. A graph in the making holds neither values nor our subclass.
    if q_length == 1 or isinstance(q_offset, Tensor) or is_tracing(attention_mask):
        return stock()
    plain = allow_is_causal_skip or kwargs.get("allow_is_bidirectional_skip", False)
    pattern = _pattern(mask_function, plain)
    if pattern is None:
        return stock()
    left, right = pattern.window
    length = kv_length
    if right == 0:
        length = q_offset + q_length - kv_offset  # keys up to the last query's own: ours see bottom-right
        if not 0 < length <= kv_length:
            return stock()
    elif left is not None and (q_offset, q_length) != (kv_offset, kv_length):
        return stock()
    if left is not None and left >= length - 1:  # a window that reaches over all
        left, right = None, right if right == 0 else None

    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    keys = None if padding is None else padding[:, kv_offset : kv_offset + length]
    padded = keys is not None and not bool(keys.all())
    if not padded and pattern.cu_seqlens is None and (left, right) == (None, 0) and q_length == kv_length:
        return None
    if keys is None:
        keys = torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, length)
    return KeyMask.make(keys, Pattern((left, right), padded, pattern.cu_seqlens, pattern.max_seqlen))


def _pattern(mask_function: Callable, plain: bool) -> Pattern | None:
    """The pattern that ``mask_function`` computes; None where it is none of transformers' plain ones."""
    if plain:  # not told that there is more to it
        return _window(mask_function)
    packed, remapped = _both(mask_function) or (None, None)
    ids = _made_by(masking_utils.packed_sequence_mask_function, packed).get("packed_sequence_mask")
    inner = _made_by(masking_utils.remap_positions_for_packed_sequence, remapped).get("mask_function")
    pattern = _window(inner)
    if ids is None or pattern is None or pattern.window[1] is None:
        return None
    starts = torch.ones_like(ids, dtype=torch.bool)  # [B, T]; a row starts a sequence
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    total = torch.tensor([ids.numel()], device=ids.device)
    cu_seqlens = torch.cat([starts.flatten().nonzero().squeeze(1), total]).int()
    return Pattern(pattern.window, False, cu_seqlens, int(cu_seqlens.diff().max()))


def _window(mask_function: Callable | None) -> Pattern | None:
    if mask_function is masking_utils.causal_mask_function:
        return Pattern((None, 0))
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern((None, None))
    overlay, base = _both(mask_function) or (None, None)
    if base is masking_utils.causal_mask_function:
        width = _made_by(masking_utils.sliding_window_overlay, overlay).get("sliding_window")
        return None if width is None else Pattern((width - 1, 0))
    if base is masking_utils.bidirectional_mask_function:
        width = _made_by(masking_utils.sliding_window_bidirectional_overlay, overlay).get("sliding_window")
        return None if width is None else Pattern((width, width))
    return None


def _both(mask_function: Callable | None) -> tuple[Callable, Callable] | None:
    """The two mask functions whose conjunction ``mask_function`` is."""
    parts = _made_by(masking_utils.and_masks, mask_function).get("mask_functions", ())
    return parts if len(parts) == 2 else None


def _made_by(factory: Callable, function: Callable | None) -> dict[str, Any]:
    """What ``factory`` was called with when it made ``function``; empty where it did not make it."""
    if getattr(function, "__module__", None) != factory.__module__:
        return {}
    if not function.__qualname__.startswith(f"{factory.__name__}.<locals>."):  # type: ignore[union-attr]
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)  # type: ignore[arg-type]


# -- one layer --------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        module: the layer; ``is_causal`` is its attribute where the argument is None.
        query: [B, H, T, D]. key, value: [B, Hkv, S, D].
        attention_mask: as the module's docstring has it. It alone says what a query sees; ``sliding_window``, which
            some models pass besides, says nothing new.
        scaling: of the scores; 1 / sqrt(D) if None.

    Returns:
        ([B, T, H, D], None): attention weights are not stored.

    Raises:
        ValueError: the model asks for something that is not computed here.
    """
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="gptfast" has no {meaning}, which {type(module).__name__} asks for')
    if kwargs.get("output_attentions"):
        raise ValueError('output_attentions=True needs attn_implementation="eager": "gptfast" stores no weights')
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    B, T, S = len(q), q.shape[1], k.shape[1]
    how: Any = {"softmax_scale": scaling, "dropout_p": dropout}

    if isinstance(attention_mask, KeyMask):
        pattern, length = attention_mask.pattern, attention_mask.shape[-1]
        window = pattern.window
        if pattern.cu_seqlens is not None:
            return _packed(q, k, v, pattern, how).unflatten(0, (B, T)), None
        keys = attention_mask.keys()
        k, v = k[:, :length], v[:, :length]
        return flash_attention(q, k, v, causal=False, window_size=window, key_padding_mask=keys, **how), None

    if attention_mask is None:
        causal = T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if not causal:
            return flash_attention(q, k, v, causal=False, **how), None
        if T <= S:  # the first key belongs to the first query: a static cache is empty behind the last
            return flash_attention(q, k[:, :T], v[:, :T], causal=True, **how), None
    elif attention_mask.dtype == torch.bool and attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1):
        keys = attention_mask[:, 0, 0].expand(B, -1)
        return flash_attention(q, k, v, causal=False, key_padding_mask=keys, **how), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _packed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, how: Any) -> Tensor:
    """[B * T, H, D] of rows that hold several sequences each, every sequence seeing itself alone."""
    assert pattern.cu_seqlens is not None
    cu_seqlens = pattern.cu_seqlens.to(q.device)
    return flash_attention_varlen(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens,
        cu_seqlens,
        pattern.max_seqlen,
        pattern.max_seqlen,
        causal=False,
        window_size=pattern.window,
        **how,
    )
