"""Scaled dot-product attention, causal by default, without storing the scores (Vaswani et al. 2017, arXiv:1706.03762;
Dao 2023, arXiv:2307.08691).

    S = softmax_scale * Q K^T,  masked        P = softmax(S)        O = dropout(P) V        LSE = logsumexp(S)

Masks: causal and ``window_size`` are aligned bottom-right, so the last query sees the last key also when T < S.
A query that sees no key at all gives zeros, LSE = -inf, and zero gradients.

Backward, from dO and dLSE, recomputes P = exp(S - LSE) tile by tile. With Z the dropout mask over (1 - p):

    dV = (Z * P)^T dO      dP = Z * (dO V^T)      delta = rowsum(O * dO) - dLSE      dS = P * (dP - delta)
    dQ = softmax_scale * dS K                     dK = softmax_scale * dS^T Q

Saved: Q, K, V, O, LSE (float32) and the dropout seed: O(T) memory. With n pairs of a query and a key it sees, forward
is 4 n D FLOPs a head and backward 14 n D: S and dP are computed twice, once for dQ and once for dK and dV, so that each
gradient has one writer and no atomics. Forward reads Q, K, V and writes O: 2 B (T H + S Hkv) D elements, and what tiles
of queries read of K and V again comes from cache.

Shapes: B batch, T query length, S key length, H query heads, Hkv key/value heads (H a multiple of Hkv), D head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _philox, _triton
from ._autograd import apart, wants_grad
from ._philox import keep
from ._triton import tl, triton

Window = tuple[int | None, int | None]


# ---- reference


def visible_keys(T: int, S: int, window: Window, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """Which key each query may see: bool, broadcastable to [B, 1, T, S]; None where every query sees every key."""
    left, right = window
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
    if padding is not None:
        visible = padding[:, None, None] if visible is None else visible & padding[:, None, None]
    return visible


def _scores(q: Tensor, k: Tensor, window: Window, softmax_scale: float, padding: Tensor | None) -> Tensor:
    """softmax_scale * Q K^T, -inf where masked: [B, H, T, S]."""
    if padding is not None:  # 0 * NaN is NaN: what padding, or a query that sees no key, holds must not reach a product
        k = k.masked_fill(~padding[:, :, None, None], 0.0)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    visible = visible_keys(q.shape[1], k.shape[1], window, padding, q.device)
    if visible is not None:
        q = q.masked_fill(~visible.any(-1)[:, 0, :, None, None], 0.0)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * softmax_scale
    return scores if visible is None else scores.masked_fill(~visible, -math.inf)


def _probs(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()  # -inf - -inf would be NaN


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    softmax_scale: float,
    dropout_p: float,
    padding: Tensor | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(q, k, window, softmax_scale, padding)
    lse = scores.logsumexp(-1)
    probs = _probs(scores, lse)
    if kept is not None:
        probs = probs.masked_fill(~kept, 0.0) / (1 - dropout_p)
    elif dropout_p:
        probs = F.dropout(probs, dropout_p)
    if padding is not None:
        v = v.masked_fill(~padding[:, :, None, None], 0.0)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return (probs @ v.transpose(1, 2)).transpose(1, 2), lse, probs


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
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(O [B, T, H, D], LSE [B, H, T], dropout(P) [B, H, T, S]) by the formula, in the precision of the input.

    ``kept``, bool [B, H, T, S], is the dropout mask; None draws one. Other arguments as ``flash_attention``.
    """
    padding = _as_mask(key_padding_mask, k)
    scale = _scale_of(q, softmax_scale)
    return _reference(q, k, v, _window_of(causal, window_size), scale, dropout_p, padding, kept)


# ---- PyTorch's fused attention


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, window: Window, softmax_scale: float, dropout_p: float, padding: Tensor | None
) -> Tensor:
    """O [B, T, H, D] by ``F.scaled_dot_product_attention``."""
    T, S = q.shape[1], k.shape[1]
    if padding is not None:
        k = k.masked_fill(~padding[:, :, None, None], 0.0)
        v = v.masked_fill(~padding[:, :, None, None], 0.0)
    # PyTorch's kernel for CPUs gives NaN for is_causal and a scale that is not positive
    if T == S > 1 and padding is None and window == (None, 0) and softmax_scale > 0:
        visible, plain_causal = None, True  # a constant: torch.compile makes no bool of a comparison of sizes
    else:
        visible, plain_causal = visible_keys(T, S, window, padding, q.device), False
    empty = None
    if visible is not None:  # a softmax over no key at all would be NaN: let such a query see all, then clear it
        empty = ~visible.any(-1, keepdim=True)  # [B, 1, T, 1]
        visible = visible | empty
        if torch.is_grad_enabled():  # NaN in such a query would reach dK and dV
            q = q.masked_fill(empty[:, 0, :, :, None], 0.0)
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


# ---- configs


@dataclass(frozen=True)
class Config:
    """A tile of ``block_m`` queries by ``block_n`` keys, and what the compile gate holds its machine code to."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int = 255  # at most, a thread
    blocks: int = 1  # at least, an SM
    matrix: str | None = None  # the matrix instruction, where it is not the target's own
    chunk: int | None = None  # of dQ: columns of a head worked on at a time; None: all of them


# (kernel, dtype, largest head dim) -> target -> row. "" is every target without a row of its own. Before both comes a
# "dropout" row, where there is dropout or what else takes registers, then a "padding" row. The numbers are of a packed
# projection, causal; with any masks nothing here spills on sm_80, sm_90, sm_100 and gfx942. No row has been timed. What
# speaks for one is that it keeps two blocks an SM where it can: inside a block nothing overlaps the softmax with the
# products.
CONFIGS: dict[tuple[str, str, int], dict[str, Config]] = {
    ("forward", "half", 64): {
        "": Config(64, 64, 4, 2, blocks=2),  # 176 registers on sm_80, 163 on sm_100
        "sm_90": Config(64, 64, 4, 3, registers=128, blocks=4),  # with two stages 139 registers, 3 blocks
        "sm_90 padding": Config(64, 64, 4, 2, blocks=3),  # triton 3.6 serialises three stages' wgmma
    },
    ("forward", "half", 128): {
        "": Config(64, 64, 4, 2, blocks=2),  # 255 registers on sm_80, 174 on sm_90, 226 on sm_100
        "sm_86": Config(64, 32, 4, 2, registers=176, blocks=2),  # 64 keys spill
        "gfx942": Config(64, 64, 4, 2, registers=256),
        "dropout": Config(64, 32, 4, 2, registers=512),
    },
    ("forward", "half", 256): {
        "": Config(64, 32, 8, 2),  # 4 warps spill on sm_80
        "sm_90": Config(64, 32, 4, 2, blocks=2),
        "sm_100": Config(64, 32, 4, 2, blocks=2),
        "gfx942": Config(32, 32, 4, 1, registers=512),
        "dropout": Config(64, 32, 8, 2),
        "gfx942 dropout": Config(32, 32, 4, 1, registers=512),
    },
    ("backward_dq", "half", 64): {
        "": Config(64, 64, 4, 2, blocks=2),  # 247 registers on sm_80
        "sm_90": Config(64, 64, 4, 2, registers=168, blocks=3),
        "dropout": Config(64, 32, 4, 2, blocks=2),  # 64 keys spill on sm_80 with a window, and on sm_100
        "sm_90 dropout": Config(64, 64, 4, 2, blocks=2),
    },
    ("backward_dq", "half", 128): {
        "": Config(64, 32, 4, 2, blocks=2),  # 220 registers on sm_80
        "sm_90": Config(64, 32, 4, 2, registers=168, blocks=3),  # 64 keys: 184 registers, 2 blocks
        "gfx942": Config(64, 32, 4, 2, registers=256, blocks=2),
    },
    ("backward_dq", "half", 256): {
        "": Config(64, 32, 8, 1),  # 4 warps spill
        "sm_90": Config(32, 64, 8, 1, matrix="HMMA"),  # wgmma needs 64 queries, and spills
        "gfx942": Config(32, 32, 4, 1, registers=512),
        "dropout": Config(32, 64, 8, 1, matrix="HMMA"),
        "gfx942 dropout": Config(32, 32, 4, 1, registers=512),
    },
    ("backward_dkv", "half", 64): {
        "": Config(32, 64, 4, 2, blocks=2),  # 64 queries spill on sm_80
        "sm_90": Config(64, 64, 4, 2, blocks=2),  # 231 registers
        "dropout": Config(16, 64, 4, 2, blocks=2),  # 32 queries spill on sm_80 with grouped heads
        "sm_90 dropout": Config(32, 64, 4, 2, blocks=2),  # 64 queries spill on triton 3.6
        "sm_90 dropout grouped": Config(16, 64, 4, 2, blocks=2),  # 32 queries too
    },
    ("backward_dkv", "half", 128): {
        "": Config(32, 64, 4, 2, blocks=2),  # 64 queries spill
        "sm_90": Config(16, 64, 4, 2, blocks=2),  # 32 queries spill on triton 3.6
        "sm_86": Config(16, 64, 4, 2, blocks=1),  # 32 queries spill
        "gfx942": Config(32, 64, 4, 2, registers=512),
        "dropout": Config(16, 64, 8, 2),  # 32 queries spill with grouped heads
        "sm_90 dropout": Config(16, 64, 8, 1),  # two stages spill with grouped heads
        "gfx942 dropout": Config(32, 64, 4, 2, registers=512),
    },
    ("backward_dkv", "half", 256): {
        "": Config(32, 32, 8, 1, matrix="HMMA"),  # fits 99 KB of shared memory; 64 keys, which wgmma needs, spill
        "sm_100": Config(32, 64, 8, 1),
        "gfx942": Config(32, 32, 4, 1, registers=512),
        "dropout": Config(32, 32, 8, 1, matrix="HMMA"),
        "gfx942 dropout": Config(32, 32, 4, 1, registers=512),
    },
    # NVIDIA multiplies IEEE float32 without matrix instructions, and a thread holds whole rows: tiles are small.
    ("forward", "float32", 64): {"": Config(16, 32, 4, 1, blocks=2)},
    ("backward_dq", "float32", 64): {"": Config(16, 32, 4, 1, blocks=2)},
    ("backward_dkv", "float32", 64): {
        "": Config(16, 32, 4, 1, blocks=2),
        "dropout": Config(16, 16, 4, 1, blocks=2),  # 32 keys spill with a window
    },
    ("forward", "float32", 128): {"": Config(16, 16, 4, 1, blocks=2)},
    ("backward_dq", "float32", 128): {"": Config(16, 16, 4, 1, blocks=2, chunk=32)},
    ("backward_dkv", "float32", 128): {"": Config(16, 16, 8, 1)},
    ("forward", "float32", 256): {"": Config(16, 16, 4, 1, blocks=2)},
    ("backward_dq", "float32", 256): {"": Config(16, 16, 4, 1, blocks=2, chunk=32)},
    ("backward_dkv", "float32", 256): {"": Config(16, 16, 16, 1), "gfx942": Config(16, 16, 4, 1, registers=512)},
}
INTERPRETER = {  # small and oblong: few elements make several tiles, and a mix-up of M and N shows
    "forward": Config(32, 16, 4, 1),
    "backward_dq": Config(16, 32, 4, 1),
    "backward_dkv": Config(16, 32, 4, 1),
}
FAMILIES = {
    **dict.fromkeys(("cuda:86", "cuda:89", "cuda:120", "cuda:121"), "sm_86"),
    **dict.fromkeys(("cuda:100", "cuda:103"), "sm_100"),
    "cuda:90": "sm_90",
    "hip:gfx942": "gfx942",
}


MAX_HEAD_DIM = 256


def config(
    kernel: str, target: str, dtype: torch.dtype, head_dim: int, group: int, dropout: bool, padding: bool = False
) -> Config:
    """The row for one of ``KERNELS``. target: as ``_triton.target`` names it. group: query heads to a key head."""
    if target == "interpreter":
        row = INTERPRETER[kernel]
        return replace(row, chunk=32) if dtype == torch.float32 and head_dim > 64 else row
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    rows = CONFIGS[kernel, "float32" if dtype == torch.float32 else "half", width]
    family = FAMILIES.get(target, "")
    # a loop over heads, or masks within rows, take registers as dropout does
    tight = dropout or (kernel == "backward_dkv" and (group > 1 or head_dim < width))
    names = [f"{family} dropout grouped"] * (dropout and group > 1)
    names += [f"{family} dropout", "dropout"] * tight + [f"{family} padding"] * padding + [family, ""]
    return next(rows[name] for name in names if name in rows)


# ---- parts that forward and backward share

# The kernels work in units of log2(e), for exp2 is the instruction that there is: lse2 is log2(e) * LSE.
LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2 = math.log(2)

# Integers that vary from call to call: specialising on what divides them would compile a kernel twice for nothing.
VARYING = ["T", "S", "rows", "H", "left", "right", "stride_pb"]


@triton.jit
def _sequence(cu_seqlens, b, length):
    """(index in the batch, first row, rows) of sequence b: (b, 0, length), or its part of all laid end to end."""
    first = 0
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + b).to(tl.int64)
        length = (tl.load(cu_seqlens + b + 1) - first).to(tl.int32)
        b = 0
    return b, first, length


@triton.jit
def _query_tile(cu_seqlens_q, cu_seqlens_k, T, S, H, BLOCK_M: tl.constexpr):
    """A program's share of the queries: (b, h, m0, rows of the dropout mask, first_q, T, first_k, S)."""
    tiles = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // tiles
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # heaviest first: the last queries see most keys
    row = head.to(tl.int64) * T + m0 + tl.arange(0, BLOCK_M)
    b = (head // H).to(tl.int64)
    _, first_q, T = _sequence(cu_seqlens_q, b, T)
    b, first_k, S = _sequence(cu_seqlens_k, b, S)
    return b, (head % H).to(tl.int64), m0, row, first_q, T, first_k, S


@triton.jit
def _head(base, b, first, h, strides):
    """The first row of a head of a sequence. strides: of the batch, of rows and of heads."""
    return base + b * strides[0] + first * strides[1] + h * strides[2]


@triton.jit
def _load_rows(base, rows, stride, inside, D, BLOCK_D: tl.constexpr):
    """[len(rows), BLOCK_D] of a [*, D] matrix: zeros beyond D and where ``inside`` is False; None: all are inside."""
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + d
    if inside is not None:
        tile = tl.load(pointers, mask=inside[:, None] & (d < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(pointers, mask=d < D, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store_rows(tile, base, rows, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + d
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside[:, None] & (d < D))


@triton.jit
def _keys_inside(padding, n, S, MASKED: tl.constexpr):
    """Which keys exist and are no padding; None where all are."""
    inside = None
    if padding is not None:
        inside = tl.load(padding + n, mask=n < S, other=0) != 0
    elif MASKED:
        inside = n < S
    return inside


@triton.jit
def _mask(scores, inside, distance, left, right, MASKED: tl.constexpr):
    """Scores, -inf where a key is not ``inside`` or its ``distance`` from the query's own not in [-left, right]."""
    if inside is not None:
        scores = tl.where(inside, scores, -float("inf"))
    if MASKED and left is not None:
        scores = tl.where(distance >= -left, scores, -float("inf"))
    if MASKED and right is not None:
        scores = tl.where(distance <= right, scores, -float("inf"))
    return scores


@triton.jit
def _key_range(m0, T, S, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, clear, hi): a tile's queries see keys in [lo, hi), and each of them sees all of [lo, clear)."""
    lo = 0
    clear = S
    hi = S
    if right is not None:
        clear = tl.minimum(S, tl.maximum(0, m0 + S - T + right + 1))
        hi = tl.minimum(S, tl.maximum(0, m0 + BLOCK_M + S - T + right))
    clear = clear // BLOCK_N * BLOCK_N
    if left is not None:  # both edges cross: all of it is masked
        lo = tl.maximum(0, m0 + S - T - left) // BLOCK_N * BLOCK_N
        clear = lo
    return lo, clear, hi


@triton.jit
def _query_range(n0, T, S, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, clear, hi): a tile's keys are seen by queries in [lo, hi), and each of them by all of [clear, hi)."""
    lo = 0
    clear = 0
    hi = T
    if right is not None:
        lo = tl.maximum(0, n0 - (S - T) - right) // BLOCK_M * BLOCK_M
        clear = tl.cdiv(tl.maximum(0, n0 + BLOCK_N - 1 - (S - T) - right), BLOCK_M) * BLOCK_M
    if left is not None:
        hi = tl.minimum(T, tl.maximum(0, n0 + BLOCK_N - (S - T) + left))
        clear = tl.cdiv(hi, BLOCK_M) * BLOCK_M
    return lo, tl.minimum(clear, hi), hi


# ---- forward: one program for a tile of queries of one head


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k, v, padding, seed, stride_ks, stride_vs,
    m, row, lo, hi, offset, S, left, right, scale_log2, dropout_p,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys lo … hi - 1. MASKED: some of them are not there, or not visible to some query."""
    for n0 in range(lo, hi, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = _keys_inside(padding, n, S, MASKED)
        keys = _load_rows(k, n, stride_ks, inside, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        across = None if inside is None else inside[None, :]
        scores = _mask(scores, across, n[None, :] - m[:, None] - offset, left, right, MASKED)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        probs = tl.exp2(scores * scale_log2 - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(probs, 1)
        if seed is not None:
            probs = tl.where(keep(seed, row[:, None], n[None, :], dropout_p), probs, 0.0)
        values = _load_rows(v, n, stride_vs, inside, D, BLOCK_D)
        acc = tl.dot(probs.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=VARYING)
def _attention_forward(
    q, k, v, out, lse2,  # [B, T, H, D], [B, S, Hkv, D] twice, [B, T, H, D], float32 [B, H, rows]
    cu_seqlens_q, cu_seqlens_k, padding, seed,  # int32 [B + 1] twice, bool [B, S], int64 [1]; each may be None
    strides_q, strides_k, strides_v, strides_out, stride_pb,  # three each: of the batch, of rows, of heads
    T, S, rows, H,  # lengths (the longest of several sequences), length of q's second dimension, query heads
    scale, dropout_p, left, right,
    GROUP: tl.constexpr,  # query heads to a key head
    PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, m0, row, first_q, T, first_k, S = _query_tile(cu_seqlens_q, cu_seqlens_k, T, S, H, BLOCK_M)
    if m0 >= T:
        return
    q = _head(q, b, first_q, h, strides_q)
    k = _head(k, b, first_k, h // GROUP, strides_k)
    v = _head(v, b, first_k, h // GROUP, strides_v)
    out = _head(out, b, first_q, h, strides_out)
    lse2 += (b * H + h) * rows + first_q
    if padding is not None:
        padding += b * stride_pb
    if seed is not None:
        seed = tl.load(seed)

    m = m0 + tl.arange(0, BLOCK_M)
    queries = _load_rows(q, m, strides_q[1], m < T, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), -3.4e38, tl.float32)  # not -inf: before the first key, -inf - -inf would be NaN
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    lo, clear, hi = _key_range(m0, T, S, left, right, BLOCK_M, BLOCK_N)
    for edge in tl.static_range(2):  # the keys that every query sees, then those that need a mask
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, queries, k, v, padding, seed, strides_k[1], strides_v[1],
            m, row, clear if edge else lo, hi if edge else clear, S - T, S, left, right, scale * LOG2E, dropout_p,
            edge == 1, PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    empty = row_sum == 0.0  # such a query sees no key
    acc *= (1.0 / tl.where(empty, 1.0, row_sum * (1.0 - dropout_p)))[:, None]
    _store_rows(acc, out, m, strides_out[1], m < T, D, BLOCK_D)
    tl.store(lse2 + m, tl.where(empty, -float("inf"), row_max + tl.log2(row_sum)), mask=m < T)


# ---- backward, first dQ: one program for a tile of queries of one head


@triton.jit
def _load_lse2(lse2, m, inside):
    """log2(e) * LSE, but inf for a query that sees no key or is not there, so that its P is 0."""
    value = tl.load(lse2 + m, mask=inside, other=float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value)


@triton.jit
def _multiply_rows(
    x, x_rows, x_stride, x_inside, y, y_rows, y_stride, y_inside,
    PRECISION: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """X Y^T [BLOCK_M, BLOCK_N] of rows of two [*, D] matrices, CHUNK columns at a time."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d0 in range(0, D, CHUNK):
        x_part = _load_rows(x + d0, x_rows, x_stride, x_inside, D - d0, CHUNK)
        y_part = _load_rows(y + d0, y_rows, y_stride, y_inside, D - d0, CHUNK)
        product = tl.dot(x_part, tl.trans(y_part), product, input_precision=PRECISION)
    return product


@triton.jit
def _accumulate_dq(
    acc, queries, do, lse2, delta, q, dout, k, v, padding, seed, stride_qt, stride_dot, stride_ks, stride_vs,
    m, row, lo, hi, T, S, left, right, scale_log2, dropout_p,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for n0 in range(lo, hi, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = _keys_inside(padding, n, S, MASKED or CHUNK is not None)
        keys = _load_rows(k, n, stride_ks, inside, D, BLOCK_D)
        if CHUNK is None:
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        else:
            scores = _multiply_rows(
                q, m, stride_qt, m < T, k, n, stride_ks, inside, PRECISION, D, CHUNK, BLOCK_M, BLOCK_N
            )
        across = None if inside is None else inside[None, :]
        scores = _mask(scores, across, n[None, :] - m[:, None] - (S - T), left, right, MASKED)
        probs = tl.exp2(scores * scale_log2 - lse2[:, None])
        if CHUNK is None:
            values = _load_rows(v, n, stride_vs, inside, D, BLOCK_D)
            dprobs = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        else:
            dprobs = _multiply_rows(
                dout, m, stride_dot, m < T, v, n, stride_vs, inside, PRECISION, D, CHUNK, BLOCK_M, BLOCK_N
            )
        if seed is not None:
            kept = keep(seed, row[:, None], n[None, :], dropout_p)
            dprobs = tl.where(kept, dprobs * (1.0 / (1.0 - dropout_p)), 0.0)
        dscores = probs * (dprobs - delta[:, None])
        acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=VARYING)
def _attention_backward_dq(
    q, k, v, out, dout, lse2, dlse2, dq, delta,  # as in forward; delta float32 [B, H, rows], written here for dK and dV
    cu_seqlens_q, cu_seqlens_k, padding, seed,
    strides_q, strides_k, strides_v, strides_out, strides_dout, strides_dq, stride_pb,
    T, S, rows, H,
    scale, dropout_p, left, right,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of a head that S and dP are summed over at a time; None: all, held throughout
):  # fmt: skip
    b, h, m0, row, first_q, T, first_k, S = _query_tile(cu_seqlens_q, cu_seqlens_k, T, S, H, BLOCK_M)
    if m0 >= T:
        return
    q = _head(q, b, first_q, h, strides_q)
    k = _head(k, b, first_k, h // GROUP, strides_k)
    v = _head(v, b, first_k, h // GROUP, strides_v)
    out = _head(out, b, first_q, h, strides_out)
    dout = _head(dout, b, first_q, h, strides_dout)
    dq = _head(dq, b, first_q, h, strides_dq)
    lse_row = (b * H + h) * rows + first_q
    if padding is not None:
        padding += b * stride_pb
    if seed is not None:
        seed = tl.load(seed)

    m = m0 + tl.arange(0, BLOCK_M)
    queries = _load_rows(q, m, strides_q[1], m < T, D, BLOCK_D)
    do = _load_rows(dout, m, strides_dout[1], m < T, D, BLOCK_D)
    row_lse2 = _load_lse2(lse2 + lse_row, m, m < T)
    row_delta = tl.sum(_load_rows(out, m, strides_out[1], m < T, D, BLOCK_D).to(tl.float32) * do.to(tl.float32), 1)
    if dlse2 is not None:
        row_delta -= tl.load(dlse2 + lse_row + m, mask=m < T, other=0.0) * LOG2E
    tl.store(delta + lse_row + m, row_delta, mask=m < T)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lo, clear, hi = _key_range(m0, T, S, left, right, BLOCK_M, BLOCK_N)
    for edge in tl.static_range(2):
        acc = _accumulate_dq(
            acc, queries, do, row_lse2, row_delta, q, dout, k, v, padding, seed,
            strides_q[1], strides_dout[1], strides_k[1], strides_v[1],
            m, row, clear if edge else lo, hi if edge else clear, T, S, left, right, scale * LOG2E, dropout_p,
            edge == 1, PRECISION, D, CHUNK, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    _store_rows(acc * scale, dq, m, strides_dq[1], m < T, D, BLOCK_D)


# ---- backward, then dK and dV: one program for a tile of keys of one key head, over its group of query heads


@triton.jit
def _accumulate_dkv(
    acc_k, acc_v, keys, values, q, dout, lse2, delta, seed, stride_qt, stride_dot,
    n, row0, lo, hi, offset, T, left, right, scale_log2, dropout_p,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Everything is transposed, so that the keys are the rows of each product."""
    for m0 in range(lo, hi, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row_lse2 = _load_lse2(lse2, m, m < T)
        seen = m < T
        if MASKED:  # 0 * NaN is NaN: what a query that sees no key holds must not reach a product
            seen = row_lse2 < float("inf")
        queries = _load_rows(q, m, stride_qt, seen, D, BLOCK_D)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        scores = _mask(scores, None, n[:, None] - m[None, :] - offset, left, right, MASKED)
        probs = tl.exp2(scores * scale_log2 - row_lse2[None, :])
        do = _load_rows(dout, m, stride_dot, seen, D, BLOCK_D)
        dropped = probs
        if seed is not None:
            kept = keep(seed, row0 + m[None, :], n[:, None], dropout_p)
            dropped = tl.where(kept, probs * (1.0 / (1.0 - dropout_p)), 0.0)
        acc_v = tl.dot(dropped.to(do.dtype), do, acc_v, input_precision=PRECISION)
        dprobs = tl.dot(values, tl.trans(do), input_precision=PRECISION)
        if seed is not None:
            dprobs = tl.where(kept, dprobs * (1.0 / (1.0 - dropout_p)), 0.0)
        dscores = probs * (dprobs - tl.load(delta + m, mask=seen, other=0.0)[None, :])
        acc_k = tl.dot(dscores.to(queries.dtype), queries, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=VARYING)
def _attention_backward_dkv(
    q, k, v, dout, lse2, delta, dk, dv,
    cu_seqlens_q, cu_seqlens_k, padding, seed,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv, stride_pb,
    T, S, rows, H,
    scale, dropout_p, left, right,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_N)
    head = tl.program_id(0) // tiles
    n0 = tl.program_id(0) % tiles * BLOCK_N  # heaviest first: most queries see the first keys
    b, h_kv = (head // (H // GROUP)).to(tl.int64), (head % (H // GROUP)).to(tl.int64)
    first_row = (b * H + h_kv * GROUP) * T  # of the dropout mask
    longest = T
    _, first_q, T = _sequence(cu_seqlens_q, b, T)
    b, first_k, S = _sequence(cu_seqlens_k, b, S)
    if n0 >= S:
        return
    if padding is not None:
        padding += b * stride_pb
    if seed is not None:
        seed = tl.load(seed)

    n = n0 + tl.arange(0, BLOCK_N)
    inside = _keys_inside(padding, n, S, True)
    keys = _load_rows(_head(k, b, first_k, h_kv, strides_k), n, strides_k[1], inside, D, BLOCK_D)
    values = _load_rows(_head(v, b, first_k, h_kv, strides_v), n, strides_v[1], inside, D, BLOCK_D)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    lo, clear, hi = _query_range(n0, T, S, left, right, BLOCK_M, BLOCK_N)
    for g in range(GROUP):
        h = h_kv * GROUP + g
        lse_row = (b * H + h) * rows + first_q
        for clear_of_edges in tl.static_range(2):
            acc_k, acc_v = _accumulate_dkv(
                acc_k, acc_v, keys, values,
                _head(q, b, first_q, h, strides_q), _head(dout, b, first_q, h, strides_dout),
                lse2 + lse_row, delta + lse_row, seed, strides_q[1], strides_dout[1],
                n, first_row + g * longest, clear if clear_of_edges else lo, hi if clear_of_edges else clear,
                S - T, T, left, right, scale * LOG2E, dropout_p,
                clear_of_edges == 0, PRECISION, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    # K of a padded slot was read as 0, so its P is not 0: its gradients are
    acc_k = tl.where(inside[:, None], acc_k * scale, 0.0)
    acc_v = tl.where(inside[:, None], acc_v, 0.0)
    _store_rows(acc_k, _head(dk, b, first_k, h_kv, strides_dk), n, strides_dk[1], n < S, D, BLOCK_D)
    _store_rows(acc_v, _head(dv, b, first_k, h_kv, strides_dv), n, strides_dv[1], n < S, D, BLOCK_D)


# ---- launchers


def _rows_contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: str, q: Tensor, k: Tensor, tensors: tuple, strided: tuple[Tensor, ...], how: tuple) -> None:
    """Runs one of ``KERNELS``. tensors: its first arguments; strided: those of them whose strides it takes."""
    cu_seqlens_q, cu_seqlens_k, T, S, scale, left, right, dropout_p, seed, padding = how
    cu_seqlens_q, cu_seqlens_k, padding = (_rows_contiguous(x) for x in (cu_seqlens_q, cu_seqlens_k, padding))
    B, rows, H, D = q.shape
    Hkv = k.shape[2]
    row = config(kernel, _triton.target(q.device), q.dtype, D, H // Hkv, seed is not None, padding is not None)
    tiles = triton.cdiv(S, row.block_n) * Hkv if kernel == "backward_dkv" else triton.cdiv(T, row.block_m) * H
    sequences = B if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    if kernel == "forward":
        _dispatch.configured(row.block_m, row.block_n, warps=row.num_warps, stages=row.num_stages)
    with _triton.on(q):
        KERNELS[kernel][(tiles * sequences,)](
            *tensors, cu_seqlens_q, cu_seqlens_k, padding, seed,
            *(x.stride()[:3] for x in strided), 0 if padding is None else padding.stride(0),
            T, S, rows, H, scale, dropout_p, left, right,
            GROUP=H // Hkv, PRECISION=_triton.dot_precision(),
            D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_M=row.block_m, BLOCK_N=row.block_n,
            **({"CHUNK": row.chunk} if kernel == "backward_dq" else {}),
            num_warps=row.num_warps, num_stages=row.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def _forward(q, k, v, *how):
    """(O [B, T, H, D], log2(e) * LSE float32 [B, H, T]). With cu_seqlens, B is 1 and T, S are the totals."""
    B, rows, H = q.shape[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse2 = torch.empty((B, H, rows), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse2.fill_(-math.inf)
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    _launch("forward", q, k, (q, k, v, out, lse2), (q, k, v, out), how)
    return out, lse2


def _backward(dout, dlse2, q, k, v, out, lse2, dq, dk, dv, how):
    """Writes dq, dk, dv, which are shaped like q, k, v and have rows of stride 1."""
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    q, k, v, dout = (_rows_contiguous(x) for x in (q, k, v, dout))
    dlse2 = None if dlse2 is None else dlse2.contiguous()
    delta = torch.empty(lse2.shape, dtype=torch.float32, device=q.device)
    tensors = (q, k, v, out, dout, lse2, dlse2, dq, delta)
    _launch("backward_dq", q, k, tensors, (q, k, v, out, dout, dq), how)
    _launch("backward_dkv", q, k, (q, k, v, dout, lse2, delta, dk, dv), (q, k, v, dout, dk, dv), how)


KERNELS = {
    "forward": _attention_forward,
    "backward_dq": _attention_backward_dq,
    "backward_dkv": _attention_backward_dkv,
}


# ---- registration: three operators without autograd of their own, and two autograd functions over them

HOW = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "
    "SymInt? left, SymInt? right, float dropout_p, Tensor? seed, Tensor? key_padding_mask"
)
SAVED = "Tensor dout, Tensor? dlse2, Tensor out, Tensor lse2"
_library = torch.library.Library("gptfast", "FRAGMENT")
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {HOW}) -> (Tensor, Tensor)")
_library.define(f"attention_backward({SAVED}, Tensor q, Tensor k, Tensor v, {HOW}) -> (Tensor, Tensor, Tensor)")
_library.define(f"attention_backward_qkvpacked({SAVED}, Tensor qkv, {HOW}) -> Tensor")


def _backward_separate(dout, dlse2, out, lse2, q, k, v, *how):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(dout, dlse2, q, k, v, out, lse2, dq, dk, dv, how)
    return dq, dk, dv


def _backward_packed(dout, dlse2, out, lse2, qkv, *how):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    _backward(dout, dlse2, q, k, v, out, lse2, dq, dk, dv, how)
    return dqkv


for _device in ("CPU", "CUDA"):  # CPU: under the interpreter
    _library.impl("attention_forward", _forward, _device)
    _library.impl("attention_backward", _backward_separate, _device)
    _library.impl("attention_backward_qkvpacked", _backward_packed, _device)


@torch.library.register_fake("gptfast::attention_forward", lib=_library)
def _(q, k, v, *how):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.register_fake("gptfast::attention_backward", lib=_library)
def _(dout, dlse2, out, lse2, q, k, v, *how):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@torch.library.register_fake("gptfast::attention_backward_qkvpacked", lib=_library)
def _(dout, dlse2, out, lse2, qkv, *how):
    return qkv.new_empty(qkv.shape)


class _Attention(torch.autograd.Function):
    """(q, k, v, *how) -> (out, lse2), how as in ``HOW``. Saves q, k, v, out, lse2 and the tensors among how."""

    @staticmethod
    def forward(q, k, v, *how):
        return torch.ops.gptfast.attention_forward.default(q, k, v, *how)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs[:3], inputs[3:], output)

    @staticmethod
    def backward(ctx, dout, dlse2):
        saved = _saved(ctx, dout, dlse2)
        gradients = torch.ops.gptfast.attention_backward.default(*saved)
        return *_once_differentiable(gradients, saved), *[None] * N_HOW


class _AttentionQKVPacked(torch.autograd.Function):
    """As ``_Attention``, of qkv [B, T, 3, H, D] and into one gradient of that shape."""

    @staticmethod
    def forward(qkv, *how):
        return torch.ops.gptfast.attention_forward.default(*qkv.unbind(2), *how)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs[:1], inputs[1:], output)

    @staticmethod
    def backward(ctx, dout, dlse2):
        saved = _saved(ctx, dout, dlse2)
        gradient = torch.ops.gptfast.attention_backward_qkvpacked.default(*saved)
        return *_once_differentiable((gradient,), saved), *[None] * N_HOW


class _RefuseSecondOrder(torch.autograd.Function):
    """(n, *gradients, *what they depend on) -> the n gradients, in a graph whose backward is an error."""

    @staticmethod
    def forward(n, *tensors):
        return tuple(x.view_as(x) for x in tensors[:n])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the Triton attention kernels have no second derivative; backend='reference' has")


N_HOW = HOW.count(",") + 1


def _once_differentiable(gradients: tuple[Tensor, ...], arguments: tuple) -> tuple[Tensor, ...]:
    """The gradients, so that to differentiate them again is an error also where no incoming gradient needs one.

    torch's once_differentiable sees the incoming gradients alone: out.sum() would pass in silence.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # not create_graph=True; compiled graphs refuse it
        return gradients
    return _RefuseSecondOrder.apply(len(gradients), *gradients, *(x for x in arguments if isinstance(x, Tensor)))


def _save(ctx, tensors, how, output):
    cu_seqlens_q, cu_seqlens_k, *numbers, seed, padding = how
    ctx.save_for_backward(*output, *tensors, cu_seqlens_q, cu_seqlens_k, seed, padding)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _saved(ctx, dout, dlse2):
    """The arguments of the backward operator."""
    out, lse2, *tensors, cu_seqlens_q, cu_seqlens_k, seed, padding = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return dout, dlse2, out, lse2, *tensors, cu_seqlens_q, cu_seqlens_k, *ctx.numbers, seed, padding


# ---- public functions


def _cannot(q: Tensor, softmax_scale: float) -> str | None:
    """Why our kernels cannot take a call; None if they can."""
    if reason := _triton.why_not(q):
        return reason
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is above {MAX_HEAD_DIM}"
    if softmax_scale <= 0:
        return f"softmax_scale must be above 0, got {softmax_scale}"
    return None


def _slower(q: Tensor, plain: bool) -> str | None:
    """Why "auto" leaves a call that our kernels can take to PyTorch; None if it does not.

    Nothing has been timed on a GPU yet. So "auto" takes our kernels only for half precision calls that PyTorch has no
    fused attention for: with a mask, a window or T != S it reads a mask of T x S from memory, to return the LSE it runs
    unfused, and several sequences it runs one after the other.
    """
    if plain:
        return "not timed yet against PyTorch's fused attention, which takes this call"
    if q.dtype == torch.float32:
        return "not timed yet in float32"
    return None


def _choose(op: str, q: Tensor, softmax_scale: float, plain: bool, deterministic: bool | None, backend: str) -> str:
    slower = None if deterministic else _slower(q, plain)
    chosen = _dispatch.select(op, backend, _cannot(q, softmax_scale), slower)
    if deterministic and chosen == "torch" and q.is_cuda and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: deterministic=True, which backend 'torch' does not promise on a GPU")
    return chosen


def _how(q, T, S, window, softmax_scale, dropout_p, padding=None, cu_seqlens_q=None, cu_seqlens_k=None) -> tuple:
    """The operators' arguments that ``HOW`` names."""
    left, right = window
    left = None if left is None or left >= S else left  # a bound that nothing is beyond
    right = None if right is None or right >= T else right
    seed = _philox.draw_seed(q.device) if dropout_p else None
    return cu_seqlens_q, cu_seqlens_k, T, S, softmax_scale, left, right, dropout_p, seed, padding


def _flash(q: Tensor, k: Tensor, v: Tensor, how: Sequence) -> tuple[Tensor, Tensor]:
    """(O, log2(e) * LSE) by our kernels, with what backward needs only where a gradient is wanted."""
    if wants_grad(q, k, v, transforms=("Grad",)):
        return _Attention.apply(*apart(q, k, v, *how))
    return torch.ops.gptfast.attention_forward.default(q, k, v, *how)


def _flash_qkvpacked(qkv: Tensor, how: tuple) -> tuple[Tensor, Tensor]:
    if wants_grad(qkv, transforms=("Grad",)):
        return _AttentionQKVPacked.apply(*apart(qkv, *how))
    return torch.ops.gptfast.attention_forward.default(*qkv.unbind(2), *how)


def _attention(
    qkv: Tensor | None,  # what q, k and v are views of, if they are
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    dropout_p: float,
    key_padding_mask: Tensor | None,
    window_size: Window,
    return_lse: bool,
    deterministic: bool | None,
    backend: str,
) -> Tensor | Any:
    _check(q, k, v, window_size, dropout_p)
    T, S = q.shape[1], k.shape[1]
    padding = _as_mask(key_padding_mask, k)
    window = _window_of(causal, window_size)
    scale = _scale_of(q, softmax_scale)
    plain = padding is None and window in ((None, None), (None, 0)) and (T == S or not causal) and not return_lse
    chosen = _choose("flash_attention", q, scale, plain, deterministic, backend)
    if chosen == "torch" and not return_lse:
        return _sdpa(q, k, v, window, scale, dropout_p, padding)
    if chosen == "triton":
        how = _how(q, T, S, window, scale, dropout_p, padding)
        out, lse2 = _flash(q, k, v, how) if qkv is None else _flash_qkvpacked(qkv, how)
        return (out, lse2 * LN2) if return_lse else out
    out, lse, _ = _reference(q, k, v, window, scale, dropout_p, padding)
    return (out, lse.float()) if return_lse else out


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
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | Any:
    """Attention of queries ``q`` over keys ``k`` and values ``v``.

    Args:
        q: [B, T, H, D], floating point. Under autocast q, k and v are cast to its dtype.
        k, v: [B, S, Hkv, D], q's dtype. H must be a multiple of Hkv.
        causal: query t sees keys up to t + S - T.
        softmax_scale: any finite number; 1 / sqrt(D) if None.
        dropout_p: probability of zeroing an attention weight, in [0, 1). Pass 0 outside training.
        key_padding_mask: bool [B, S], True where the key takes part; or int32 or int64 [B], how many of the first keys
            do: 0 to S, which is checked on a CPU. What the other slots hold, NaN included, has no effect.
        window_size: (left, right): query t sees keys from t + S - T - left to t + S - T + right; None is unbounded.
        return_lse: also return the logsumexp of the scores.
        deterministic: True: gradients are the same bits in each run, or an error says that the backend cannot promise
            it. None and False allow a backward without that promise; the Triton kernels have none.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        O [B, T, H, D] in q's dtype, or (O, LSE [B, H, T] float32) with ``return_lse=True``. Both are differentiable, by
        the Triton kernels once: to differentiate their gradients is an error.

    Raises:
        ValueError: a shape, a device, ``softmax_scale``, ``dropout_p`` or ``window_size`` is not accepted. TypeError: a
        dtype is not, or dtypes differ. RuntimeError: the backend asked for cannot run, or not deterministically.
    """
    q, k, v = _triton.autocast(q, k, v)
    return _attention(
        None, q, k, v, causal, softmax_scale, dropout_p, key_padding_mask, window_size,
        return_lse, deterministic, backend,
    )  # fmt: skip


def flash_attention_qkvpacked(
    qkv: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    window_size: Window = (None, None),
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | Any:
    """``flash_attention`` of a packed projection qkv [B, T, 3, H, D], read in place; its gradient is one tensor too."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, T, 3, H, D], got shape {list(qkv.shape)}")
    (qkv,) = _triton.autocast(qkv)
    q, k, v = qkv.unbind(2)
    return _attention(
        qkv, q, k, v, causal, softmax_scale, dropout_p, key_padding_mask, window_size,
        return_lse, deterministic, backend,
    )  # fmt: skip


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
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | Any:
    """Attention over sequences laid end to end, each seeing only itself.

    Args:
        q: [total_q, H, D]. k, v: [total_k, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1], where each sequence starts, and the total at the end.
        max_seqlen_q, max_seqlen_k: the longest sequence. What the Triton kernels read on a GPU is not checked against
            it, which would be a synchronisation: the rest of a longer sequence stays uninitialised.
        causal, softmax_scale, dropout_p, window_size, return_lse, deterministic, backend: as ``flash_attention``.

    Returns:
        [total_q, H, D] in q's dtype, or (it, LSE [H, total_q] float32) with ``return_lse=True``.

    Raises:
        ValueError: the lengths do not fit the tensors. Otherwise as ``flash_attention``.
    """
    q, k, v = _triton.autocast(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [total, heads, head dim], got shape {list(x.shape)}")
    _check(q[None], k[None], v[None], window_size, dropout_p)
    window = _window_of(causal, window_size)
    scale = _scale_of(q, softmax_scale)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.ndim != 1 or len(cu) == 0 or len(cu) != len(cu_seqlens_q):
            raise ValueError(f"{name} must be [B + 1], the same for q and k, got shape {list(cu.shape)}")
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {cu.dtype}")
        if cu.device != q.device:
            raise ValueError(f"{name} is on {cu.device}, but q is on {q.device}")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an integer, got {longest!r}")
        if longest < 0:
            raise ValueError(f"{name} must be at least 0, got {longest}")
    chosen = _choose("flash_attention_varlen", q, scale, False, deterministic, backend)
    if chosen == "triton" and (q.is_cuda or torch.compiler.is_compiling()):
        starts_q = starts_k = []
    else:
        starts_q = _starts("q", cu_seqlens_q, len(q), max_seqlen_q)
        starts_k = _starts("k", cu_seqlens_k, len(k), max_seqlen_k)
    if chosen == "triton":
        how = _how(q, max_seqlen_q, max_seqlen_k, window, scale, dropout_p, None, cu_seqlens_q, cu_seqlens_k)
        out, lse2 = (x[0] for x in _flash(q[None], k[None], v[None], how))
        return (out, lse2 * LN2) if return_lse else out
    outs, lses = [q[:0]], [q.new_empty(q.shape[1], 0)]
    for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        one = q[None, a:b], k[None, c:d], v[None, c:d]
        if chosen == "torch" and not return_lse:
            outs.append(_sdpa(*one, window, scale, dropout_p, None)[0])
        else:
            out, lse, _ = _reference(*one, window, scale, dropout_p, None)
            outs.append(out[0])
            lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, 1).float()) if return_lse else torch.cat(outs)


def attention_probs(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    window_size: Window = (None, None),
) -> Tensor:
    """The attention weights that ``flash_attention(..., return_lse=True)`` did not store: exp(S - LSE), before dropout.

    Args:
        q: [B, T, H, D]. k: [B, S, Hkv, D]. lse: [B, H, T], as flash_attention returned it for the same arguments.
        causal, softmax_scale, key_padding_mask, window_size: as there.

    Returns:
        [B, H, T, S] in q's dtype, computed in float32. Differentiable in q, k and lse, and so exactly in q and k.

    Raises:
        ValueError, TypeError: as ``flash_attention``, or ``lse`` does not fit.
    """
    q, k = _triton.autocast(q, k)
    _check(q, k, k, window_size, 0.0)
    if lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(f"lse must be [B, H, T] = {[q.shape[0], q.shape[2], q.shape[1]]}, got {list(lse.shape)}")
    padding = _as_mask(key_padding_mask, k)
    scale = _scale_of(q, softmax_scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q.to(wide), k.to(wide), _window_of(causal, window_size), scale, padding)
    return _probs(scores, lse).to(q.dtype)


def _starts(name: str, cu_seqlens: Tensor, total: int, longest: int) -> list[int]:
    """``cu_seqlens`` as a list, checked."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to the total, {total}, got {starts}")
    actual = max((b - a for a, b in pairwise(starts)), default=0)
    if actual > longest:
        raise ValueError(f"max_seqlen_{name} is {longest}, but a sequence has {actual} positions")
    return starts


def _window_of(causal: bool, window_size: Window) -> Window:
    return (window_size[0], 0) if causal else window_size


def _scale_of(q: Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is None:
        return 1 / math.sqrt(q.shape[-1])
    if not -math.inf < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return softmax_scale


def _as_mask(key_padding_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """bool [B, S], of a mask or of lengths; None of None."""
    if key_padding_mask is None:
        return None
    B, S = k.shape[:2]
    if key_padding_mask.device != k.device:
        raise ValueError(f"key_padding_mask is on {key_padding_mask.device}, but k is on {k.device}")
    if key_padding_mask.dtype == torch.bool:
        if key_padding_mask.shape != (B, S):
            raise ValueError(f"key_padding_mask must be [B, S] = {[B, S]}, got shape {list(key_padding_mask.shape)}")
        return key_padding_mask
    if key_padding_mask.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_padding_mask must be bool, or int32 or int64 lengths, got {key_padding_mask.dtype}")
    if key_padding_mask.shape != (B,):
        raise ValueError(f"key_padding_mask of lengths must be [B] = [{B}], got shape {list(key_padding_mask.shape)}")
    if B and k.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = map(int, key_padding_mask.aminmax())
        if least < 0 or most > S:
            wrong = least if least < 0 else most
            raise ValueError(f"key_padding_mask of lengths must be from 0 to S = {S}, got {wrong}")
    return torch.arange(S, device=k.device) < key_padding_mask[:, None]


def _check(q: Tensor, k: Tensor, v: Tensor, window_size: Window, dropout_p: float) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, length, heads, head dim], got shape {list(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, but q is {q.dtype}")
    _dispatch.check_floats(q=q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head dim, got {list(q.shape)} and {list(k.shape)}")
    if q.shape[3] == 0:
        raise ValueError("q must have a head dim of at least 1, got 0")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q's heads must be a multiple of k's, got {q.shape[2]} and {k.shape[2]}")
    bounds = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(bounds) != 2 or any(w is not None and (not isinstance(w, int) or w < 0) for w in bounds):
        raise ValueError(f"window_size must be two integers >= 0 or None, got {window_size}")
    _dispatch.check_dropout(dropout_p)
