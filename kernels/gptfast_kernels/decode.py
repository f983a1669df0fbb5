"""Attention of a few new tokens over a key/value cache that they are appended to, in place.

Row b of the cache holds n_b = ``cache_seqlens[b]`` positions. New keys and values go behind them, to n_b … n_b + T - 1;
query t then sees positions 0 … n_b + t (``causal``). Rows may have different lengths; what stands in a row's unused
slots, NaN included, has no effect. Nothing depends on a length's value on the host, so a CUDA graph can hold a call.

    S = softmax_scale * Q K^T,  masked        O = softmax(S) V

One program attends all queries of one key head, for they read the same keys: T times as many rows as a group has query
heads, 16 to a tile. A new position is read from k and v themselves, by every program, and stored by the one whose tile
has its query: nobody reads what another writes. Where a cache is long and rows are few, several programs share a row's
keys (flash-decoding, Dao et al. 2023), each with a softmax of its own over its part, and a second kernel joins them in
a fixed order,

    LSE = logsumexp_i(LSE_i)        O = sum_i exp(LSE_i - LSE) O_i

so results are the same bits each time. Bytes: K and V of all positions held, 2 sum_b(n_b + T) Hkv D elements; FLOPs are
4 a byte of bfloat16 and query head of a group, so memory bounds it. No gradient: decoding is inference.

Shapes: B rows, T new tokens, S slots of the cache, H query heads, Hkv key/value heads (H a multiple), D head dim.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _triton
from ._autograd import wants_grad
from ._triton import tl, triton
from .attention import flash_attention

# ---- reference


def kvcache_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> Tensor:
    """O [B, T, H, D] by the formula, in the precision of the input, for ``seqlens`` int [B]. Appends k and v."""
    keys, values, visible = _append_and_mask(q, k_cache, v_cache, k, v, seqlens, causal)
    keys, values = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (keys, values))
    scores = q.transpose(1, 2) @ keys.permute(0, 2, 3, 1) * softmax_scale  # [B, H, T, S]
    scores = scores.masked_fill(~visible, -math.inf)
    probs = scores.softmax(-1).masked_fill(~visible, 0.0)  # a query that sees no key: 0, not NaN
    return (probs @ values.transpose(1, 2)).transpose(1, 2)


def _append_and_mask(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Appends k and v; returns copies of the caches with unused slots cleared, and which slot each query sees: bool
    [B, 1, T, S]."""
    B, T = q.shape[:2]
    steps = torch.arange(T, device=q.device)
    end = seqlens.long()[:, None]  # [B, 1]
    if k is not None and v is not None:
        rows, slots = torch.arange(B, device=q.device)[:, None], end + steps  # [B, T]
        k_cache[rows, slots], v_cache[rows, slots] = k, v
        end = end + T
    slot = torch.arange(k_cache.shape[1], device=q.device)
    unused = (slot >= end)[:, :, None, None]  # 0 * NaN is NaN: what they hold must not reach a product
    last = end - T + steps if causal else (end - 1).expand(B, T)  # [B, T], of what a query sees
    visible = slot <= last[:, None, :, None]
    return k_cache.masked_fill(unused, 0.0), v_cache.masked_fill(unused, 0.0), visible


# ---- PyTorch's fused attention


def _torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens: int | list[int] | Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """By ``F.scaled_dot_product_attention``, over no slot that a row does not use where the lengths are known."""
    if isinstance(seqlens, Tensor):
        keys, values, seen = _append_and_mask(q, k_cache, v_cache, k, v, seqlens, causal)
        return _sdpa(q, keys, values, softmax_scale, seen)
    if isinstance(seqlens, list):  # one row at a time costs less than a mask and the longest row's work for all
        rows: list[Any] = [[None] * len(seqlens) if x is None else x.split(1) for x in (q, k_cache, v_cache, k, v)]
        each = zip(*rows, seqlens, strict=True)
        return torch.cat([_torch(*row, softmax_scale, causal) for row in each])  # type: ignore[call-arg]
    visible: Tensor | None = None
    T, end = q.shape[1], seqlens
    if k is not None and v is not None:
        end = seqlens + T
        k_cache[:, seqlens:end] = k
        v_cache[:, seqlens:end] = v
    keys, values = k_cache[:, :end], v_cache[:, :end]
    if causal and T > 1:
        last = torch.arange(end - T, end, device=q.device)[:, None]
        visible = torch.arange(end, device=q.device) <= last  # [T, end]
    return _sdpa(q, keys, values, softmax_scale, visible)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, visible: Tensor | None) -> Tensor:
    """O [B, T, H, D]. visible: bool, broadcastable to [B, H, T, S]; None: all keys, of which there is one at least."""
    empty = None
    if visible is not None:  # a softmax over no key at all would be NaN: let such a query see all, then clear it
        empty = ~visible.any(-1, keepdim=True)
        visible = visible | empty
    elif k.shape[1] == 0:
        return torch.zeros_like(q)
    gqa = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}  # under torch.compile it takes no symbolic bool
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax_scale, **gqa)
    return (out if empty is None else out.masked_fill(empty, 0.0)).transpose(1, 2)


# ---- configs


@dataclass(frozen=True)
class Config:
    """A tile of ``BLOCK_M`` queries by ``block_n`` keys, and what the compile gate holds its machine code to."""

    block_n: int
    num_warps: int
    num_stages: int
    registers: int = 255  # at most, a thread
    blocks: int = 1  # at least, an SM


BLOCK_M = 16  # the least that a matrix instruction takes
# (dtype, largest head dim) -> row. Compiled for four targets, not timed. At the widths named nothing spills; in float32
# at some between them, as 40, a few registers do. The bounds are CUDA's.
CONFIGS = {
    ("half", 64): Config(64, 4, 3, registers=128, blocks=4),  # sm_90: 96 registers, 5 blocks
    ("half", 128): Config(64, 4, 2, registers=144, blocks=3),  # sm_90: 110 registers, 4 blocks; 144 by triton 3.6
    ("half", 256): Config(32, 4, 2, registers=192, blocks=2),  # sm_90: 168 registers, 3 blocks
    ("float32", 64): Config(32, 4, 2, registers=128, blocks=4),  # sm_90: 122 registers
    ("float32", 128): Config(16, 4, 2, registers=128, blocks=4),  # sm_90: 96 registers, 5 blocks
    ("float32", 256): Config(16, 4, 1, registers=168, blocks=3),  # sm_90: 146 registers
}
INTERPRETER = Config(16, 4, 1)
# A part of fewer keys costs less to read than the second kernel does to start: GPT-1's 512 positions stay whole.
KEYS_A_SPLIT = 512
MAX_SPLITS = 32
MAX_HEAD_DIM = 256

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))  # the kernels work in units of it, for exp2 is the instruction


def config(target: str, dtype: torch.dtype, head_dim: int) -> Config:
    if target == "interpreter":
        return INTERPRETER
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    return CONFIGS["float32" if dtype == torch.float32 else "half", width]


def splits(S: int, programs: int, device: torch.device) -> int:
    """Parts, a power of two, that S slots are read in, where ``programs`` read all of their slots otherwise.

    From shapes alone: the lengths are on the device.
    """
    keys = INTERPRETER.block_n if _triton.INTERPRETED else KEYS_A_SPLIT
    most = min(S // keys, 2 * _triton.multiprocessors(device) // max(1, programs), MAX_SPLITS)
    return 1 << max(1, most).bit_length() - 1


# ---- kernels


@triton.jit
def _attend(
    acc, row_max, row_sum, queries, last,  # [BLOCK_M, BLOCK_D]; [BLOCK_M] twice; [BLOCK_M, BLOCK_D]; [BLOCK_M]
    k, v, first, stride_k, stride_v,  # of the key at position ``first``
    lo, hi, scale_log2,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys at positions lo … hi - 1, of which a query sees those up to ``last``."""
    d = tl.arange(0, BLOCK_D)[None, :]
    for n0 in range(lo, hi, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        row = (n - first).to(tl.int64)[:, None]
        inside = (n < hi)[:, None] & (d < D)
        keys = tl.load(k + row * stride_k + d, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        visible = (n < hi)[None, :] & (n[None, :] <= last[:, None])
        scores = tl.where(visible, scores * scale_log2, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # no key yet: -inf - -inf would be NaN
        probs = tl.exp2(scores - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(probs, 1)
        values = tl.load(v + row * stride_v + d, mask=inside, other=0.0)
        acc = tl.dot(probs.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["T", "S", "Hkv", "seqlen"])
def _decode_kernel(
    q, k_cache, v_cache, k, v,  # [B, T, H, D], [B, S, Hkv, D] twice, [B, T, Hkv, D] twice or None
    seqlens,  # int [B], or None: seqlen holds for all
    out,  # [B, T, H, D], or float32 [SPLITS, B, T, H, D]
    lse2,  # log2(e) * LSE, float32 [SPLITS, B, T, H], or None
    T, S, Hkv, seqlen,
    stride_qb, stride_qt, stride_qh,
    stride_kcb, stride_kcs, stride_kch,
    stride_vcb, stride_vcs, stride_vch,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    scale_log2,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,  # query heads to a key head
    PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T * GROUP, BLOCK_M)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles // Hkv).to(tl.int64)
    h = (tl.program_id(0) // tiles % Hkv).to(tl.int64)
    k_cache += b * stride_kcb + h * stride_kch
    v_cache += b * stride_vcb + h * stride_vch

    held = seqlen
    if seqlens is not None:
        held = tl.minimum(tl.maximum(tl.load(seqlens + b), 0), S).to(tl.int32)  # on a GPU nobody has checked them
    total = held
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, g = (m // GROUP).to(tl.int64), m % GROUP
    d = tl.arange(0, BLOCK_D)
    if k is not None:
        total += T
        k += b * stride_kb + h * stride_kh
        v += b * stride_vb + h * stride_vh
        if tl.program_id(1) == 0:
            mine = ((g == 0) & (t < T) & (held + t < S))[:, None] & (d < D)[None, :]
            new = tl.load(k + t[:, None] * stride_kt + d[None, :], mask=mine, other=0.0)
            tl.store(k_cache + (held + t)[:, None] * stride_kcs + d[None, :], new, mask=mine)
            new = tl.load(v + t[:, None] * stride_vt + d[None, :], mask=mine, other=0.0)
            tl.store(v_cache + (held + t)[:, None] * stride_vcs + d[None, :], new, mask=mine)

    heads = h * GROUP + g
    query = ((b * stride_qb + t * stride_qt) + heads * stride_qh)[:, None] + d[None, :]
    queries = tl.load(q + query, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    part = tl.cdiv(tl.cdiv(total, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    lo = tl.program_id(1) * part
    hi = tl.minimum(total, lo + part)
    last = tl.full((BLOCK_M,), total - 1, tl.int32)
    if CAUSAL:
        last = total - T + m // GROUP
        hi = tl.minimum(hi, total - T + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, queries, last, k_cache, v_cache, 0, stride_kcs, stride_vcs,
        lo, tl.minimum(hi, held), scale_log2, PRECISION, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if k is not None:  # few, so in small tiles
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, queries, last, k, v, held, stride_kt, stride_vt,
            tl.maximum(lo, held), hi, scale_log2, PRECISION, D, BLOCK_D, 16,
        )  # fmt: skip

    acc *= (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    row = (b * T + t) * (Hkv * GROUP) + heads
    if lse2 is not None:
        rows = tl.num_programs(0) // tiles * GROUP * T  # B T H
        row += tl.program_id(1).to(tl.int64) * rows
        tl.store(lse2 + row, row_max + tl.log2(row_sum), mask=t < T)  # -inf where there was no key
    tl.store(out + row[:, None] * D + d[None, :], acc, mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _join_kernel(
    parts,  # float32 [SPLITS, rows, D]
    lse2,  # float32 [SPLITS, rows]
    out,  # [rows, D]
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One row, of B T H."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS).to(tl.int64) * rows + row
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse2 + part)
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    each = tl.load(parts + part[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)  # [SPLITS, BLOCK_D]
    total = tl.sum(weight, 0)
    joined = tl.sum(each * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + d, joined, mask=d < D)


# ---- launcher and registration


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens: Tensor | None,
    seqlen: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """O [B, T, H, D]; ``seqlens``, or ``seqlen`` for all rows."""
    (B, T, H, D), S, Hkv = q.shape, k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = _rows_contiguous(q)
    k, v = (None if x is None else _rows_contiguous(x) for x in (k, v))
    row = config(_triton.target(q.device), q.dtype, D)
    programs = B * Hkv * triton.cdiv(T * H // Hkv, BLOCK_M)
    n = splits(S, programs, q.device)
    parts, lse2 = out, None
    if n > 1:
        parts = torch.empty((n, *q.shape), dtype=torch.float32, device=q.device)
        lse2 = torch.empty((n, B, T, H), dtype=torch.float32, device=q.device)
    strides = [s for x in (q, k_cache, v_cache, k, v) for s in (x.stride()[:3] if x is not None else (0, 0, 0))]
    block_d = max(16, triton.next_power_of_2(D))
    _dispatch.configured(BLOCK_M, row.block_n, warps=row.num_warps, stages=row.num_stages)
    with _triton.on(q):
        _decode_kernel[(programs, n)](
            q, k_cache, v_cache, k, v, None if seqlens is None else seqlens.contiguous(), parts, lse2,
            T, S, Hkv, seqlen, *strides, softmax_scale * LOG2E.value,
            CAUSAL=causal, GROUP=H // Hkv, PRECISION=_triton.dot_precision(),
            D=D, BLOCK_D=block_d, BLOCK_M=BLOCK_M, BLOCK_N=row.block_n,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
        if n > 1:
            _join_kernel[(B * T * H,)](parts, lse2, out, B * T * H, D=D, BLOCK_D=block_d, SPLITS=n, num_warps=1)
    return out


_library = torch.library.Library("gptfast", "FRAGMENT")
_library.define(
    "attention_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? seqlens, "
    "SymInt seqlen, float softmax_scale, bool causal) -> Tensor"
)
for _device in ("CPU", "CUDA"):  # CPU: under the interpreter
    _library.impl("attention_kvcache", _launch, _device)


@torch.library.register_fake("gptfast::attention_kvcache", lib=_library)
def _(q, *_):
    return q.new_empty(q.shape)


_op = torch.ops.gptfast.attention_kvcache.default


# ---- public function


def _cannot(q: Tensor, k_cache: Tensor, v_cache: Tensor, softmax_scale: float) -> str | None:
    """Why our kernel cannot take a call; None if it can."""
    if reason := _triton.why_not(q):
        return reason
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is above {MAX_HEAD_DIM}"
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "a cache whose head dim is not contiguous"
    if not softmax_scale > 0:
        return f"softmax_scale must be above 0, got {softmax_scale}"
    return None


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
        q: [B, T, H, D], floating point.
        k_cache, v_cache: [B, S, Hkv, D], of any strides, written to at positions cache_seqlens … cache_seqlens + T - 1.
        k, v: [B, T, Hkv, D] to append, or both None to attend over what is there.
        cache_seqlens: positions already held, one number for all rows or int32 or int64 [B] on q's device.
        softmax_scale: 1 / sqrt(D) if None.
        causal: query t sees keys up to its own position; False: all that the row holds.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [B, T, H, D] in q's dtype. A query that sees no key gives zeros.

    Raises:
        ValueError: shapes or devices do not fit, or (``cache_seqlens`` an int, or on a CPU) the cache is too short or
            ``cache_seqlens`` negative. TypeError: dtypes differ. The caches are untouched then. RuntimeError: the
            backend asked for cannot run. On a GPU, lengths in a tensor are not read back: a position beyond the
            Triton kernel's cache is not stored, and one beyond torch's is a device-side assertion.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return flash_attention_with_kvcache(
                q, k_cache, v_cache, k, v,
                cache_seqlens=cache_seqlens, softmax_scale=softmax_scale, causal=causal, backend=backend,
            )  # fmt: skip
    S = _check(q, k_cache, v_cache, k, v)
    B, T, H, D = q.shape
    new = 0 if k is None else T
    known: int | list[int] | Tensor = cache_seqlens  # on the host, where that takes no synchronisation
    if isinstance(cache_seqlens, Tensor):
        if cache_seqlens.shape != (B,):
            raise ValueError(f"cache_seqlens must be an int or [{B}], got shape {list(cache_seqlens.shape)}")
        if cache_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cache_seqlens must be int32 or int64, got {cache_seqlens.dtype}")
        if cache_seqlens.device != q.device:
            raise ValueError(f"cache_seqlens is on {cache_seqlens.device}, but q is on {q.device}")
        if B and cache_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            lengths: list[int] = cache_seqlens.tolist()
            least, most = min(lengths), max(lengths)
            _check_room(least, most, new, S)
            known = least if least == most else lengths
    else:
        _check_room(cache_seqlens, cache_seqlens, new, S)

    scale = 1 / math.sqrt(D) if softmax_scale is None else softmax_scale
    cannot = _cannot(q, k_cache, v_cache, scale)
    rows = T * H // k_cache.shape[2]
    if rows > BLOCK_M and causal and k is not None and v is not None and not isinstance(cache_seqlens, Tensor):
        # a prompt, not a step: the kernel for many queries, over equal rows
        _dispatch.asked_for("flash_attention_with_kvcache", backend, cannot)
        end = cache_seqlens + T
        k_cache[:, cache_seqlens:end] = k
        v_cache[:, cache_seqlens:end] = v
        keys, values = (k_cache[:, :end], v_cache[:, :end]) if cache_seqlens else (k, v)
        return flash_attention(q, keys, values, softmax_scale=scale, backend=backend)
    slower = None
    if not isinstance(cache_seqlens, Tensor):
        slower = "not timed yet against PyTorch's fused attention, which takes rows of one length"
    chosen = _dispatch.select("flash_attention_with_kvcache", backend, cannot, slower)
    if chosen == "torch":
        return _torch(q, k_cache, v_cache, k, v, known, scale, causal)
    if chosen == "triton":
        wants_grad()  # raises under a transform that would take the result for a constant
        each, all_rows = (cache_seqlens, 0) if isinstance(cache_seqlens, Tensor) else (None, cache_seqlens)
        return _op(q, k_cache, v_cache, k, v, each, all_rows, scale, causal)
    seqlens = torch.as_tensor(cache_seqlens, device=q.device).expand(B)
    return kvcache_attention_reference(q, k_cache, v_cache, k, v, seqlens, softmax_scale=scale, causal=causal)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> int:
    """S, once the tensors fit one another. A decoding step passes here for every layer: it is kept short."""
    if q.ndim != 4 or k_cache.ndim != 4:
        raise ValueError(f"q and k_cache must have 4 dimensions, got shapes {list(q.shape)} and {list(k_cache.shape)}")
    B, T, H, D = q.shape
    rows, S, Hkv, width = k_cache.shape
    if rows != B or width != D or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"k_cache and v_cache must both be [{B}, S, Hkv, {D}], got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if Hkv == 0 or H % Hkv or D == 0:
        raise ValueError(f"q's heads must be a multiple of k_cache's, got {H} and {Hkv}, with a head dim, got {D}")
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given or both be None")
    if k is not None and v is not None and not k.shape == v.shape == (B, T, Hkv, D):
        raise ValueError(f"k and v must be {[B, T, Hkv, D]}, got shapes {list(k.shape)} and {list(v.shape)}")
    dtype, device = q.dtype, q.device
    if not dtype.is_floating_point:
        raise TypeError(f"q must be floating point, got {dtype}")
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x is not None and x.dtype != dtype:
            raise TypeError(f"{name} is {x.dtype}, but q is {dtype}")
        if x is not None and x.device != device:
            raise ValueError(f"{name} is on {x.device}, but q is on {device}")
    return S


def _check_room(least: int, most: int, new: int, S: int) -> None:
    if least < 0:
        raise ValueError(f"cache_seqlens must be at least 0, got {least}")
    if most + new > S:
        raise ValueError(f"cache_seqlens + new positions is {most + new}, but k_cache holds {S} positions")
