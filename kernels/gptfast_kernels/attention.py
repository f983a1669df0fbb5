"""Scaled dot-product attention, causal by default, without storing the scores where the backend is fused
(Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691).

    S = softmax_scale * Q K^T,  masked        P = softmax(S)        O = dropout(P) V        LSE = logsumexp(S)

Masks: causal and ``window_size`` are aligned bottom-right, so the last query sees the last key also when T < S.
A query that sees no key at all gives zeros, LSE = -inf, and zero gradients.

Shapes: B batch, T query length, S key length, H query heads, Hkv key/value heads (H a multiple of Hkv), D head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch

Window = tuple[int | None, int | None]


def visible_keys(
    T: int, S: int, *, causal: bool, window_size: Window, key_padding_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which key each query may see: bool, broadcastable to [B, 1, T, S]; None where every query sees every key."""
    left, right = window_size
    if causal:
        right = 0
    visible = None
    if (right is not None and T > 1) or left is not None:
        # distance of key s from query t, bottom-right aligned: 0 on the diagonal, positive in the future
        distance = torch.arange(S, device=device) - torch.arange(S - T, S, device=device)[:, None]  # [T, S]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if right is not None:
            visible &= distance <= right
        if left is not None:
            visible &= distance >= -left
        visible = visible[None, None]
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        visible = padding if visible is None else visible & padding
    return visible


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    window_size: Window = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """(O [B, T, H, D], LSE [B, H, T], dropout(P) [B, H, T, S]) by the formula, in the precision of the input."""
    T, H, D = q.shape[1:]
    S, Hkv = k.shape[1:3]
    if key_padding_mask is not None:  # 0 * NaN is NaN: what padding holds must not reach the product with P
        k = k.masked_fill(~key_padding_mask[:, :, None, None], 0.0)
        v = v.masked_fill(~key_padding_mask[:, :, None, None], 0.0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if Hkv != H:
        k, v = (x.repeat_interleave(H // Hkv, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(D) if softmax_scale is None else softmax_scale)  # [B, H, T, S]
    visible = visible_keys(
        T, S, causal=causal, window_size=window_size, key_padding_mask=key_padding_mask, device=q.device
    )
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    probs = F.dropout(probs, dropout_p) if dropout_p else probs
    return (probs @ v).transpose(1, 2), lse, probs


def _attention_sdpa(q, k, v, *, causal, softmax_scale, dropout_p, key_padding_mask, window_size):
    """O [B, T, H, D] by PyTorch's fused attention."""
    T, S = q.shape[1], k.shape[1]
    if key_padding_mask is not None:
        k = k.masked_fill(~key_padding_mask[:, :, None, None], 0.0)
        v = v.masked_fill(~key_padding_mask[:, :, None, None], 0.0)
    plain_causal = causal and T == S > 1 and key_padding_mask is None and window_size == (None, None)
    visible = empty = None
    if not plain_causal:
        visible = visible_keys(
            T, S, causal=causal, window_size=window_size, key_padding_mask=key_padding_mask, device=q.device
        )
        if visible is not None:  # a softmax over no key at all would be NaN: let such a query see all, then clear it
            empty = ~visible.any(-1, keepdim=True)  # [B, 1, T, 1]
            visible = visible | empty
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        dropout_p=dropout_p,
        is_causal=plain_causal,
        scale=softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
    return out.transpose(1, 2)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    window_size: Window = (None, None),
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries ``q`` over keys ``k`` and values ``v``.

    Args:
        q: [B, T, H, D], floating point.
        k, v: [B, S, Hkv, D], q's dtype. H must be a multiple of Hkv.
        causal: query t sees keys up to t + S - T.
        softmax_scale: 1 / sqrt(D) if None.
        dropout_p: probability of zeroing an attention weight, in [0, 1). Pass 0 outside training.
        key_padding_mask: bool [B, S], True where the key takes part. What the other slots hold, NaN included, has no
            effect.
        window_size: (left, right): query t sees keys from t + S - T - left to t + S - T + right; None is unbounded.
        return_lse: also return the logsumexp of the scores.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        O [B, T, H, D] in q's dtype, or (O, LSE [B, H, T] float32) with ``return_lse=True``.

    Raises:
        ValueError: a shape, ``dropout_p`` or ``window_size`` is not accepted. TypeError: dtypes differ, or the mask is
        not bool. RuntimeError: the backend asked for cannot run.
    """
    _check(q, k, v, key_padding_mask, window_size, dropout_p)
    how = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "dropout_p": dropout_p,
        "key_padding_mask": key_padding_mask,
        "window_size": window_size,
    }
    if _dispatch.select("flash_attention", backend, _dispatch.NOT_YET) == "reference" or return_lse:
        out, lse, _ = attention_reference(q, k, v, **how)
        return (out, lse.float()) if return_lse else out
    return _attention_sdpa(q, k, v, **how)


def flash_attention_qkvpacked(qkv: Tensor, **how) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attention`` of a packed projection qkv [B, T, 3, H, D], read in place. Keywords as ``flash_attention``."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, T, 3, H, D], got shape {list(qkv.shape)}")
    return flash_attention(*qkv.unbind(2), **how)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    window_size: Window = (None, None),
    backend: str = "auto",
) -> Tensor:
    """Attention over sequences laid end to end, each seeing only itself.

    Args:
        q: [total_q, H, D]. k, v: [total_k, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence starts, and the total at the end.
        max_seqlen_q, max_seqlen_k: the longest sequence.
        causal, softmax_scale, dropout_p, window_size, backend: as ``flash_attention``.

    Returns:
        [total_q, H, D] in q's dtype.

    Raises:
        ValueError: the lengths do not fit the tensors. Otherwise as ``flash_attention``.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, starts, total in (("cu_seqlens_q", starts_q, len(q)), ("cu_seqlens_k", starts_k, len(k))):
        if not starts or starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
            raise ValueError(f"{name} must rise from 0 to the total, {total}, got {starts}")
    if len(starts_q) != len(starts_k):
        raise ValueError(f"cu_seqlens_q has {len(starts_q)} entries, cu_seqlens_k has {len(starts_k)}")
    for name, starts, longest in (("q", starts_q, max_seqlen_q), ("k", starts_k, max_seqlen_k)):
        actual = max((b - a for a, b in zip(starts, starts[1:], strict=False)), default=0)
        if actual > longest:
            raise ValueError(f"max_seqlen_{name} is {longest}, but a sequence has {actual} positions")
    out = [
        flash_attention(
            q[None, a:b],
            k[None, c:d],
            v[None, c:d],
            causal=causal,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
            window_size=window_size,
            backend=backend,
        )[0]
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    ]
    return torch.cat(out) if out else torch.zeros_like(q)


def _check(q, k, v, key_padding_mask, window_size, dropout_p):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, length, heads, head dim], got shape {list(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, but q is {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head dim, got {list(q.shape)} and {list(k.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q's heads must be a multiple of k's, got {q.shape[2]} and {k.shape[2]}")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if key_padding_mask.shape != k.shape[:2]:
            raise ValueError(
                f"key_padding_mask must be [B, S] = {list(k.shape[:2])}, got shape {list(key_padding_mask.shape)}"
            )
    if len(window_size) != 2 or any(w is not None and w < 0 for w in window_size):
        raise ValueError(f"window_size must be two numbers >= 0 or None, got {window_size}")
    _dispatch.check_dropout(dropout_p)
