"""Attention by flash-attention's names and conventions: a window bound of -1 is none, and dropout_p 0 outside training.

Shapes: B batch, T query length, S key length, H query heads, Hkv key/value heads, D head dim.
"""

from typing import Any

from torch import Tensor

from .gptfast_kernels import flash_attention, flash_attention_varlen


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **kwargs: Any,
) -> Tensor:
    """O [B, T, H, D] of q [B, T, H, D], k and v [B, S, Hkv, D].

    Raises:
        ValueError: ``softcap``, ``alibi_slopes``, ``return_attn_probs`` or a keyword asks for what is not computed.
    """
    _refuse(softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs, **kwargs)
    return flash_attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        window_size=_bounds(window_size),
        deterministic=deterministic or None,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """O [total_q, H, D] of sequences laid end to end, q [total_q, H, D], k and v [total_k, Hkv, D]. Errors as above."""
    refused = {"softcap": softcap, "alibi_slopes": alibi_slopes, "block_table": block_table}
    _refuse(**refused, return_attn_probs=return_attn_probs, **kwargs)
    return flash_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        int(max_seqlen_q),
        int(max_seqlen_k),
        causal=causal,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        window_size=_bounds(window_size),
        deterministic=deterministic or None,
    )


def _refuse(**asked: Any) -> None:
    for name, value in asked.items():
        if value is not None and (isinstance(value, Tensor) or value):
            raise ValueError(f"{name} is not computed here, got {value!r}")


def _bounds(window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    left, right = window_size
    return None if left is None or left < 0 else left, None if right is None or right < 0 else right
