"""GELU, with a bias added first (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    exact  gelu(x) = x Phi(x) = x/2 * (1 + erf(x / sqrt(2)))
    tanh   gelu(x) = x/2 * (1 + tanh(z)) = x * sigmoid(2z),   z = sqrt(2/pi) * (x + 0.044715 x^3)          GPT-1's

The kernels use forms that keep their relative accuracy where 1 + erf and 1 + tanh cancel, and that overflow nowhere:

    sigmoid(2z) = r if z >= 0 else e r         e = exp(-2|z|), r = 1 / (1 + e), sigmoid'(2z) = e r^2
    Phi(-|x|) = erfcx(|x| / sqrt(2)) / 2 * exp(-x^2 / 2)

with erfcx(z) = exp(z^2) erfc(z), smooth and free of cancellation, by a polynomial. Backward makes everything again from
x and bias, which are all that is saved:

    exact  gelu'(x) = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
    tanh   gelu'(x) = sigmoid(2z) + x sigmoid'(2z) 2z'
    dx = dy * gelu'(x + bias)                       dbias = sum_rows dx

Forward reads x and writes y, backward reads dy and x and writes dx: memory bounds both.

Shapes: x, y [..., C], any rank; bias [C]; M rows in all.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _triton
from ._autograd import apart, as_rows, contiguous, first_order, wants_grad
from ._triton import tl, triton

APPROXIMATIONS = ("tanh", "none")


def gelu_reference(x: Tensor, *, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """The formula, in float32 at least."""
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    u = x.to(torch.promote_types(dtype, torch.float32))
    if bias is not None:
        u = u + bias
    if approximate == "none":
        y = u * 0.5 * torch.special.erfc(u * -math.sqrt(0.5))
    else:
        y = u * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
    return y.to(dtype)


# ---- configs ----


@dataclass(frozen=True)
class Config:
    elements: int  # of a tile
    width: int  # its columns, at most, where rows are told apart
    warps: int


# Compiled for four targets, not timed: at most 72 registers, 7 blocks an SM; tanh in bfloat16 32 registers, 16 blocks.
FORWARD = Config(elements=4096, width=1024, warps=4)
BACKWARD = Config(elements=2048, width=1024, warps=4)  # two inputs, so half as many
PROGRAMS_PER_SM = 8  # backward's with a bias, each with partial sums of dbias


# ---- kernels ----


@triton.jit
def sigmoid_2z(x):
    """(sigmoid(2z), its derivative by 2z, d2z/dx) of x in float32."""
    x = tl.minimum(tl.maximum(x, -64.0), 64.0)  # beyond them nothing changes, and x^3 stays finite
    z2 = 1.5957691216057308 * x * (1 + 0.044715 * x * x)  # 2 sqrt(2/pi)
    e = tl.exp(-tl.abs(z2))
    r = 1 / (1 + e)
    return tl.where(z2 >= 0, r, e * r), e * r * r, 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def normal_cdf(x):
    """(Phi(x), exp(-x^2 / 2)) of x in float32.

    The polynomial is erfcx(z) (1 + 0.4 z) in t = 1 / (1 + 0.4 z), fitted to a relative error of 1.3e-7.
    """
    t = 1 / (1 + 0.28284271247461906 * tl.abs(x))  # 0.4 / sqrt(2)
    p = 3.518982436e-05 * t + 5.011172316e-02
    p = p * t - 1.826352216e-01
    p = p * t + 1.688330375e-01
    p = p * t - 5.469223082e-03
    p = p * t + 1.413873343e-01
    p = p * t + 1.685497881e-01
    p = p * t + 2.078420147e-01
    p = p * t + 2.256696210e-01
    p = p * t + 2.256758618e-01
    gauss = tl.exp(-0.5 * x * x)
    tail = 0.5 * t * p * gauss
    return tl.where(x < 0, tail, 1 - tail), gauss


@triton.jit
def gelu_of(x, TANH: tl.constexpr):
    """gelu(x) in float32."""
    if TANH:
        s, _, _ = sigmoid_2z(x)
        return x * s
    cdf, _ = normal_cdf(x)
    return x * cdf


@triton.jit
def gelu_slope(x, TANH: tl.constexpr):
    """gelu'(x) in float32."""
    if TANH:
        s, ds, d2z = sigmoid_2z(x)
        return s + x * ds * d2z
    cdf, gauss = normal_cdf(x)
    return cdf + x * gauss * 0.3989422804014327  # 1 / sqrt(2 pi)


@triton.jit
def _load(X, Bias, row, column, mask, N, stride_x):
    x = tl.load(X + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if Bias is not None:
        x += tl.load(Bias + column, mask=column < N, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["M"])
def _gelu_forward_kernel(
    X,  # [M, N]
    Bias,  # [N] or None
    Y,  # [M, N]
    M,
    N,
    stride_x,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    row = ((program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    column = ((program % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
    mask = (row < M) & (column < N)
    x = _load(X, Bias, row, column, mask, N, stride_x)
    tl.store(Y + row * N + column, gelu_of(x, TANH), mask=mask)


@triton.jit(do_not_specialize=["M", "parts"])
def _gelu_backward_kernel(
    DY,  # [M, N]
    X,  # [M, N]
    Bias,  # [N] or None
    DX,  # [M, N]
    DBias,  # [parts, N] float32, or None: not wanted
    M,
    N,
    parts,
    stride_dy,
    stride_x,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of columns of every parts-th tile of rows, and dbias's sums over them."""
    across = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    part = program // across
    column = ((program % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
    dbias = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(part, tl.cdiv(M, ROWS), parts):
        row = (tile * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]  # [ROWS, 1]
        mask = (row < M) & (column < N)
        x = _load(X, Bias, row, column, mask, N, stride_x)
        dy = tl.load(DY + row * stride_dy + column, mask=mask, other=0.0).to(tl.float32)
        dx = dy * gelu_slope(x, TANH)
        tl.store(DX + row * N + column, dx, mask=mask)
        dbias += tl.sum(dx, 0, keep_dims=True)
    if DBias is not None:
        tl.store(DBias + part.to(tl.int64) * N + column, dbias, mask=column < N)


# ---- launchers ----


def _tile(how: Config, N: int, rows: bool) -> tuple[int, int]:
    block = min(how.width, max(16, triton.next_power_of_2(N))) if rows else how.elements
    return how.elements // block, block


def _views(columns: bool, *tensors: Tensor) -> list[Tensor]:
    """The tensors as [M, C]; as one row where the columns do not matter, and their strides allow it."""
    if not columns and all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


def _forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    y = _forward_fake(x, bias, approximate)
    (x,) = _views(bias is not None, x)
    M, N = x.shape
    if M and N:
        rows, block = _tile(FORWARD, N, M > 1)
        _dispatch.configured(rows, block, warps=FORWARD.warps)
        with _triton.on(x):
            _gelu_forward_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, block),)](
                x,
                contiguous(bias),
                y,
                M,
                N,
                x.stride(0),
                TANH=approximate == "tanh",
                ROWS=rows,
                BLOCK=block,
                num_warps=FORWARD.warps,
            )
    return y


def _forward_fake(x, bias, approximate):
    return x.new_empty(x.shape, dtype=x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype))


def _backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_dbias: bool) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dbias in float32, empty if not needed)."""
    dx = x.new_empty(x.shape)
    dy, x = _views(bias is not None or need_dbias, dy, x)
    M, N = x.shape
    partial = None
    if M and N:
        rows, block = _tile(BACKWARD, N, M > 1)
        across, parts = triton.cdiv(N, block), triton.cdiv(M, rows)
        if need_dbias:
            parts = min(parts, triton.cdiv(PROGRAMS_PER_SM * _triton.multiprocessors(x.device), across))
            partial = x.new_empty((parts, N), dtype=torch.float32)
        with _triton.on(x):
            _gelu_backward_kernel[(parts * across,)](
                dy,
                x,
                contiguous(bias),
                dx,
                partial,
                M,
                N,
                parts,
                dy.stride(0),
                x.stride(0),
                TANH=approximate == "tanh",
                ROWS=rows,
                BLOCK=block,
                num_warps=BACKWARD.warps,
            )
    if partial is not None:
        return dx, partial.sum(0)
    return dx, x.new_zeros(N if need_dbias else 0, dtype=torch.float32)


# ---- registration ----


def _backward_fake(dy, x, bias, approximate, need_dbias):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_dbias else 0, dtype=torch.float32)


_lib = torch.library.Library("gptfast", "FRAGMENT")
_lib.define("gelu(Tensor x, Tensor? bias, str approximate) -> Tensor")
_lib.define(
    "gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate, bool need_dbias) -> (Tensor dx, Tensor dbias)"
)
_lib.impl("gelu", _forward, "CompositeExplicitAutograd")
_lib.impl("gelu_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gptfast::gelu", _forward_fake, lib=_lib)
torch.library.register_fake("gptfast::gelu_backward", _backward_fake, lib=_lib)
_forward_op = torch.ops.gptfast.gelu.default
_backward_op = torch.ops.gptfast.gelu_backward.default


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate):
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return _forward_op(x, bias, approximate)

    @staticmethod
    @first_order("gelu")
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        need_dx, need_dbias, _ = ctx.needs_input_grad
        dx, dbias = _backward_op(dy, x, bias, ctx.approximate, need_dbias)
        return dx if need_dx else None, dbias.to(bias.dtype) if need_dbias else None, None


# ---- public ----


def gelu(x: Tensor, *, bias: Tensor | None = None, approximate: str = "tanh", backend: str = "auto") -> Tensor:
    """GELU of ``x + bias``.

    Args:
        x: [..., C], floating point, any shape.
        bias: [C] or None, of any floating dtype.
        approximate: "tanh" (GPT-1, GPT-2) or "none" (exact, by erf).
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [..., C] in the dtype that x and bias promote to.

    Raises:
        ValueError: ``approximate``, or the shape or device of ``bias``, is not accepted. TypeError: x or bias is not
        floating point. RuntimeError: the backend asked for cannot run.
    """
    check_gelu(approximate)
    if bias is not None and x.ndim == 0:
        raise ValueError("x must have at least one dimension to take a bias, got a scalar")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must have shape {list(x.shape[-1:])}, the last dimension of x, got {list(bias.shape)}")
    _dispatch.check_floats(x=x, bias=bias)

    cannot = _triton.why_not(x) or (None if bias is None else _triton.why_not(bias))
    backend = _dispatch.select("gelu", backend, cannot)
    if backend == "triton":
        return _Gelu.apply(*apart(x, bias, approximate)) if wants_grad(x, bias) else _forward_op(x, bias, approximate)
    if backend == "reference":
        return gelu_reference(x, bias=bias, approximate=approximate)
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def check_gelu(approximate: str) -> None:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
