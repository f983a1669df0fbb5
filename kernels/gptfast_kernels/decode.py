"""Attention of new tokens over a key/value cache that they are appended to, in place.

Row b of the cache holds ``cache_seqlens[b]`` positions. New keys and values go behind them; query t of row b then sees
positions 0 … cache_seqlens[b] + t (``causal``). Rows may have different lengths; what stands in a row's unused slots,
NaN included, has no effect. The attention itself is ``flash_attention``, on any of its backends.

Shapes: q [B, T, H, D]; k, v [B, T, Hkv, D]; k_cache, v_cache [B, S, Hkv, D]; cache_seqlens int or int32/int64 [B].
No gradient: decoding is inference.
"""

import math
from functools import partial

import torch
from torch import Tensor

from . import _dispatch
from .attention import _cannot as why_not_triton
from .attention import flash_attention


@torch.no_grad()
def flash_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Appends k and v to the caches, then attends.

    Args:
        q: [B, T, H, D].
        k_cache, v_cache: [B, S, Hkv, D], written to at positions cache_seqlens … cache_seqlens + T - 1.
        k, v: [B, T, Hkv, D] to append, or both None to attend over what is there.
        cache_seqlens: positions already held, one number for all rows or [B]. An int costs no synchronisation.
        softmax_scale: 1 / sqrt(D) if None.
        causal: query t sees keys up to its own position; False: all that the row holds.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [B, T, H, D] in q's dtype.

    Raises:
        ValueError: shapes do not fit, or (``cache_seqlens`` an int, or on a CPU) the cache is too short or
            ``cache_seqlens`` negative. TypeError: dtypes differ. The caches are untouched then.
    """
    B, T = q.shape[:2]
    S = k_cache.shape[1]
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given or both be None")
    if k_cache.shape != v_cache.shape or k_cache.shape[0] != B:
        raise ValueError(
            f"k_cache and v_cache must both be [{B}, S, Hkv, D], got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if k is not None and v is not None and not k.shape == v.shape == (B, T, *k_cache.shape[2:]):
        raise ValueError(
            f"k and v must be {[B, T, *k_cache.shape[2:]]}, got shapes {list(k.shape)} and {list(v.shape)}"
        )
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x is not None and x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, but q is {q.dtype}")
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    _dispatch.asked_for("flash_attention_with_kvcache", backend, why_not_triton(q, scale))
    new = 0 if k is None else T
    if isinstance(cache_seqlens, Tensor) and cache_seqlens.shape != (B,):
        raise ValueError(f"cache_seqlens must be an int or [{B}], got shape {list(cache_seqlens.shape)}")
    if not isinstance(cache_seqlens, Tensor) or cache_seqlens.device.type == "cpu":
        lengths = cache_seqlens.tolist() if isinstance(cache_seqlens, Tensor) else [cache_seqlens]
        longest = max(lengths, default=0)
        if min(lengths, default=0) < 0:
            raise ValueError(f"cache_seqlens must be at least 0, got {min(lengths)}")
        if longest + new > S:
            raise ValueError(f"cache_seqlens + new positions is {longest + new}, but k_cache holds {S} positions")

    attend = partial(flash_attention, softmax_scale=softmax_scale, backend=backend)

    if not isinstance(cache_seqlens, Tensor):
        end = cache_seqlens + new
        if k is not None and v is not None:
            k_cache[:, cache_seqlens:end] = k
            v_cache[:, cache_seqlens:end] = v
        return attend(q, k_cache[:, :end], v_cache[:, :end], causal=causal)

    start = cache_seqlens.long()[:, None]  # [B, 1]
    if k is not None and v is not None:
        rows = torch.arange(B, device=q.device)[:, None]
        slots = start + torch.arange(T, device=q.device)  # [B, T]
        k_cache[rows, slots] = k
        v_cache[rows, slots] = v
    slot = torch.arange(S, device=q.device)
    if not causal:
        return attend(q, k_cache, v_cache, causal=False, key_padding_mask=slot < start + new)
    # the rows' diagonals differ, which no mask of keys alone can say: one query position at a time
    return torch.cat(
        [
            attend(q[:, t : t + 1], k_cache, v_cache, causal=False, key_padding_mask=slot < start + new - (T - 1 - t))
            for t in range(T)
        ],
        1,
    )
