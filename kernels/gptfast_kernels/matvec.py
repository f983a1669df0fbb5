"""A matrix-vector product with what stands around it in a decoding step, for a few rows (BLAS's GEMV).

    n = LayerNorm(x)        (n = x without a norm)        y = gelu(n @ weight.T + bias) + residual

A step of decoding reads every weight for a row or two: memory bounds it, and between two matrices what costs is the
start of another kernel. A post-norm block is five with this one: QKV behind the last block's norm, attention, the
projection with its residual, GELU's projection behind the norm, and the last projection with its residual.

A program makes some columns of y for one row, and finds the norm's statistics for itself: a row is read from the L2
cache, where the kernel that would have normalized it has to be waited for. What comes from memory is asked for first:
nothing behind the statistics or the sum waits for it, up to one step of k. The programs of all rows of x follow one
another over the same columns: those weights come from memory once. The mean is found in two steps, as in
``layer_norm``. n is rounded to x's dtype, and y once.

Bytes: N K weights. FLOPs: two an element of it and row. No gradient: decoding is inference.

Shapes: x [..., K] of M rows; weight [N, K] with any strides (a Conv1D passes ``weight.t()``); bias [N]; y [..., N].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _triton
from ._autograd import as_rows, contiguous, wants_grad
from ._triton import tl, triton
from .activation import check_gelu, gelu_of, gelu_reference
from .normalization import layer_norm_reference
from .projection import check_linear

Norm = tuple[Tensor | None, Tensor | None, float]  # weight [K], bias [K], eps

# ---- reference ----


def gemv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: Norm | None = None,
    approximate: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, n) by the formula, unfused."""
    n = x if norm is None else layer_norm_reference(x, norm[0], norm[1], eps=norm[2])[0]
    y = F.linear(n, weight, bias)
    y = y if approximate is None else gelu_reference(y, approximate=approximate)
    return (y if residual is None else y + residual), n


# ---- configs ----

MAX_ROWS = 4  # more of them are a matmul
MAX_NORM_WIDTH = 8192  # a normalized row is held by every program
WARPS = 8
# Compiled, not timed. Columns of a program: 16 are a sector of the cache in half precision; fewer where a narrow weight
# would leave multiprocessors without work. A step of k is a row of GPT-1 in half precision; two are held at once.
NARROW = 2048
STEP = 2048  # bytes


def columns(N: int) -> int:
    return 16 if N >= NARROW else 8


# ---- kernel ----


@triton.jit
def _load_step(
    X, Weight, NormWeight, NormBias, start, n, N, stride_wn, stride_wk, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """For BLOCK_K values of k from start on: weights [BLOCK_K, BLOCK_N] of columns n, x, the norm's weight and bias."""
    k = start + tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(X + k, mask=inside, other=0.0)
    at = k.to(tl.int64)[:, None] * stride_wk + n[None, :] * stride_wn
    weights = tl.load(Weight + at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
    scale = 1.0 if NormWeight is None else tl.load(NormWeight + k, mask=inside, other=0.0).to(tl.float32)
    shift = 0.0 if NormBias is None else tl.load(NormBias + k, mask=inside, other=0.0).to(tl.float32)
    return weights, x, scale, shift


@triton.jit(do_not_specialize=["M"])
def _gemv_kernel(
    X,  # [M, K]
    Weight,  # [N, K]
    Bias,  # [N] or None
    NormWeight,  # [K] or None
    NormBias,  # [K] or None
    Residual,  # [M, N] or None
    Y,  # [M, N]
    Normed,  # [M, K] or None: there is no norm
    M,
    N,
    eps,
    stride_x,
    stride_wn,
    stride_wk,
    stride_residual,
    APPROXIMATE: tl.constexpr,  # "tanh", "none", or None: no GELU
    K: tl.constexpr,
    ROW: tl.constexpr,  # a power of two from K on
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0) // M
    row = (tl.program_id(0) % M).to(tl.int64)
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    X += row * stride_x
    following = _load_step(X, Weight, NormWeight, NormBias, 0, n, N, stride_wn, stride_wk, K, BLOCK_K)
    bias = 0.0 if Bias is None else tl.load(Bias + n, mask=n < N, other=0.0).to(tl.float32)
    residual = 0.0
    if Residual is not None:
        residual = tl.load(Residual + row * stride_residual + n, mask=n < N, other=0.0).to(tl.float32)

    if Normed is not None:
        tl.debug_barrier()  # without it the compiler moves the loads above behind the first sum
        column = tl.arange(0, ROW)
        u = tl.load(X + column, mask=column < K, other=0.0).to(tl.float32)
        about = tl.sum(u, 0) / K
        d = tl.where(column < K, u - about, 0.0)
        rest = tl.sum(d, 0) / K
        rstd = 1 / tl.sqrt_rn(tl.sum(d * d, 0) / K - rest * rest + eps)

    products = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        weights, x, scale, shift = following
        following = _load_step(X, Weight, NormWeight, NormBias, start + BLOCK_K, n, N, stride_wn, stride_wk, K, BLOCK_K)
        x = x.to(tl.float32)
        if Normed is not None:
            k = start + tl.arange(0, BLOCK_K)
            x = (x - about - rest) * rstd * scale + shift
            x = tl.where(k < K, x, 0.0).to(Normed.dtype.element_ty)
            tl.store(Normed + row * K + k, x, mask=(k < K) & (tile == 0))
            x = x.to(tl.float32)
        products += weights.to(tl.float32) * x[:, None]

    y = tl.sum(products, 0) + bias
    if APPROXIMATE is not None:
        y = gelu_of(y, APPROXIMATE == "tanh")
    tl.store(Y + row * N + n, y + residual, mask=n < N)


# ---- launcher and registration ----


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    approximate: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, n), n empty without an ``eps``: no norm."""
    y, normed = _launch_fake(x, weight, bias, norm_weight, norm_bias, eps, approximate, residual)
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    (M, K), N = x.shape, len(weight)
    if M:
        block = columns(N)
        step = min(STEP // x.element_size(), max(16, triton.next_power_of_2(K)))
        _dispatch.configured(1, block, step, warps=WARPS)
        with _triton.on(x):
            _gemv_kernel[(M * max(1, triton.cdiv(N, block)),)](
                x,
                weight,
                contiguous(bias),
                contiguous(norm_weight),
                contiguous(norm_bias),
                residual,
                y,
                None if eps is None else normed,
                M,
                N,
                eps or 0.0,
                x.stride(0),
                weight.stride(0),
                weight.stride(1),
                0 if residual is None else residual.stride(0),
                APPROXIMATE=approximate,
                K=K,
                ROW=triton.next_power_of_2(max(1, K)),
                BLOCK_N=block,
                BLOCK_K=step,
                num_warps=WARPS,
            )
    return y, normed


def _launch_fake(x, weight, bias, norm_weight, norm_bias, eps, approximate, residual):
    return x.new_empty((*x.shape[:-1], len(weight))), x.new_empty(0 if eps is None else x.shape)


_lib = torch.library.Library("gptfast", "FRAGMENT")
_lib.define(
    "gemv(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float? eps, "
    "str? approximate, Tensor? residual) -> (Tensor y, Tensor n)"
)
_lib.impl("gemv", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("gptfast::gemv", _launch_fake, lib=_lib)
_op = torch.ops.gptfast.gemv.default


# ---- public ----


def why_not(x: Tensor, normalize: bool) -> str | None:
    """Why our kernel cannot take x [..., K], to be normalized or not; None if it can."""
    rows, K = math.prod(x.shape[:-1]), x.shape[-1]
    if rows > MAX_ROWS:
        return f"{rows} rows are above {MAX_ROWS}"
    if normalize and K > MAX_NORM_WIDTH:
        return f"a norm of {K} columns is above {MAX_NORM_WIDTH}"
    if _triton.is_autocast_on(x.device):
        return "autocast is on, and would cast the weights in every call"
    return _triton.why_not(x)


def _parts(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Weight, bias and eps; no eps, no norm."""
    if norm is None:
        return None, None, None
    if not isinstance(norm, tuple) or len(norm) != 3 or not isinstance(norm[2], (int, float)):
        raise ValueError(f"norm must be (weight, bias, eps) or None, got {norm!r}")
    return norm


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    approximate: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``gelu(F.linear(n, weight, bias)) + residual`` of n = LayerNorm(x), for a few rows, without gradients.

    Args:
        x: [..., K], floating point; of up to ``MAX_ROWS`` rows in Triton.
        weight: [N, K], any strides. bias: [N] or None.
        norm: LayerNorm's weight [K] or None, bias [K] or None, and eps; None: n is x.
        approximate: GELU's form, "tanh" or "none" (exact); None: no GELU.
        residual: [..., N], or None.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (y [..., N], n [..., K]), in x's dtype; under autocast in those that torch's operators give.

    Raises:
        ValueError: a shape, a device or ``approximate`` is not accepted. TypeError: the tensors differ in dtype.
        RuntimeError: the backend asked for cannot run.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return gemv(x, weight, bias, norm=norm, approximate=approximate, residual=residual, backend=backend)
    if approximate is not None:
        check_gelu(approximate)
    check_linear("x", x, weight, bias)
    norm_weight, norm_bias, eps = _parts(norm)
    y_shape = (*x.shape[:-1], len(weight))
    _dispatch.check_floats(x=x, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    for name, other, shape in (
        ("norm's weight", norm_weight, x.shape[-1:]),
        ("norm's bias", norm_bias, x.shape[-1:]),
        ("residual", residual, y_shape),
    ):
        if other is not None and other.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(other.shape)}")
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"{name} is {other.dtype}, but x is {x.dtype}")

    chosen = _dispatch.select("gemv", backend, why_not(x, norm is not None), "not measured yet against cuBLAS")
    if chosen == "triton":
        wants_grad()  # raises under a transform that would take y for a constant
        y, n = _op(x, weight, bias, norm_weight, norm_bias, eps, approximate, residual)
        return y, x if norm is None else n
    if chosen == "reference":
        return gemv_reference(x, weight, bias, norm=norm, approximate=approximate, residual=residual)
    n = x if norm is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm[2])
    y = F.linear(n, weight, bias)
    y = y if approximate is None else F.gelu(y, approximate=approximate)
    return (y if residual is None else y + residual), n
