"""LayerNorm, with the residual and dropout around it (Ba et al. 2016, arXiv:1607.06450).

    u = residual + dropout(x)                      (u = x without a residual)
    y = xhat * weight + bias        xhat = (u - mean(u)) * rstd        rstd = 1 / sqrt(var(u) + eps)

with the biased variance, over the last dimension. Post-norm (GPT-1, ``prenorm=False``) returns y; pre-norm models also
need u, the residual stream, and get (y, u). Backward, of dy [M, C] (and of du, what arrives for a returned u):

    g = dy * weight                                dweight = sum_rows dy * xhat          dbias = sum_rows dy
    dresidual = (g - mean(g) - xhat * mean(g * xhat)) * rstd + du                        dx = dropout(dresidual)

Saved: x and residual (u in their place if it is returned), mean and rstd in float32, and the dropout's seed.
Bytes a row: forward reads x and residual and writes y (and u); backward reads dy, x and residual and writes dresidual
and dx. It is memory that bounds both.

The mean is found in two steps, mean(u) = m + mean(u - m): float32 sums of values around 1e4 are off by more than a
standard deviation of 1e-3, while u - m is small and exact. Backward does the same with xhat, because the saved mean
cannot hold it either.

Shapes: x, residual, y, u [..., C]; M rows in all; weight, bias [C].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _philox, _triton
from ._autograd import apart, as_rows, contiguous, first_order, wants_grad
from ._triton import tl, triton


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(y, u) by the formula, in float32 at least, y in u's dtype."""
    u = F.dropout(x, dropout_p) if dropout_p else x
    if residual is not None:
        u = residual + u
    exact = u.to(torch.promote_types(u.dtype, torch.float32))
    y = exact - exact.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(u.dtype), u


# ---- configs ----


@dataclass(frozen=True)
class Config:
    """How rows of up to ``width`` elements are worked on, in tiles of some rows."""

    width: int
    elements: int  # of a tile; a row with more is walked in blocks of so many
    warps: int

    def tile(self, width: int) -> tuple[int, int]:
        """(rows, block): the tile for rows of ``width`` elements."""
        block = min(self.elements, max(16, triton.next_power_of_2(width)))
        return self.elements // block, block


# Compiled for four targets, not timed. Forward: 32 elements a thread put 64 bytes of bfloat16 a thread in flight.
# Backward holds four values an element and sums for two parameters: with more than 8 elements a thread it spills.
FORWARD = (
    Config(width=1024, elements=4096, warps=4),  # sm_90, bfloat16, dropout, 768: 80 registers, 6 blocks an SM
    Config(width=8192, elements=8192, warps=8),  # 4096: 79 registers, 3 blocks
    Config(width=65536, elements=4096, warps=8),  # 16384: 60 registers, 4 blocks
)
BACKWARD = (
    Config(width=1024, elements=1024, warps=4),  # 768: 72 registers, 7 blocks
    Config(width=65536, elements=2048, warps=8),  # 16384: 64 registers, 4 blocks
)
MAX_WIDTH = 65536
PROGRAMS_PER_SM = 6  # backward's, each with one row of partial sums of dweight and dbias


def config(table: tuple[Config, ...], width: int) -> Config:
    return next(row for row in table if width <= row.width)


# ---- kernels ----


@triton.jit
def _drop(x, Seed, row, start, dropout_p, BLOCK: tl.constexpr):
    """dropout(x [ROWS, BLOCK])."""
    return tl.where(_philox.keep_block(tl.load(Seed), row, start, dropout_p, BLOCK), x * (1 / (1 - dropout_p)), 0.0)


@triton.jit
def _load_u(X, Residual, Seed, row, start, mask, stride_x, stride_residual, dropout_p, BLOCK: tl.constexpr):
    """residual + dropout(x) [ROWS, BLOCK] in float32; Residual and Seed may be None."""
    column = start + tl.arange(0, BLOCK)[None, :]
    u = tl.load(X + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if Seed is not None:
        u = _drop(u, Seed, row, start, dropout_p, BLOCK)
    if Residual is not None:
        u += tl.load(Residual + row * stride_residual + column, mask=mask, other=0.0).to(tl.float32)
    return u


@triton.jit(do_not_specialize=["M"])
def _layer_norm_forward_kernel(
    X,  # [M, N]
    Residual,  # [M, N] or None
    Weight,  # [N] or None
    Bias,  # [N] or None
    Seed,  # [1] or None: no dropout
    Y,  # [M, N]
    U,  # [M, N] or None: not wanted
    Statistics,  # [2, M] float32: mean, rstd
    M,
    stride_x,
    stride_residual,
    dropout_p,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y, u, mean and rstd of ROWS rows. Where N <= BLOCK the three loops are one pass over registers."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]

    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, N, BLOCK):
        column = start + columns
        mask = (row < M) & (column < N)
        u = _load_u(X, Residual, Seed, row, start, mask, stride_x, stride_residual, dropout_p, BLOCK)
        if U is not None:
            u = u.to(U.dtype.element_ty).to(tl.float32)
        total += tl.sum(u, 1, keep_dims=True)
    about = total / N

    rest = tl.zeros([ROWS, 1], tl.float32)
    squares = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, N, BLOCK):
        column = start + columns
        mask = (row < M) & (column < N)
        u = _load_u(X, Residual, Seed, row, start, mask, stride_x, stride_residual, dropout_p, BLOCK)
        if U is not None:
            u = u.to(U.dtype.element_ty).to(tl.float32)
        d = tl.where(column < N, u - about, 0.0)
        rest += tl.sum(d, 1, keep_dims=True)
        squares += tl.sum(d * d, 1, keep_dims=True)
    rest = rest / N
    rstd = 1 / tl.sqrt_rn(squares / N - rest * rest + eps)
    tl.store(Statistics + row, about + rest, mask=row < M)
    tl.store(Statistics + M + row, rstd, mask=row < M)

    for start in range(0, N, BLOCK):
        column = start + columns
        mask = (row < M) & (column < N)
        u = _load_u(X, Residual, Seed, row, start, mask, stride_x, stride_residual, dropout_p, BLOCK)
        if U is not None:
            u = u.to(U.dtype.element_ty).to(tl.float32)
            tl.store(U + row * N + column, u, mask=mask)
        y = (u - about - rest) * rstd
        if Weight is not None:
            y *= tl.load(Weight + column, mask=column < N, other=0.0).to(tl.float32)
        if Bias is not None:
            y += tl.load(Bias + column, mask=column < N, other=0.0).to(tl.float32)
        tl.store(Y + row * N + column, y, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_backward_kernel(
    DY,  # [M, N]
    DU,  # [M, N] or None: u was not returned
    X,  # [M, N]: x, or u if that was saved
    Residual,  # [M, N] or None
    Weight,  # [N] or None
    Seed,  # [1] or None: no dropout
    Statistics,  # [2, M]
    DX,  # [M, N]
    DResidual,  # [M, N] or None: the same as DX, or not wanted
    DWeight,  # [programs, N] float32 or None: not wanted
    DBias,  # [programs, N] float32 or None
    M,
    stride_dy,
    stride_du,
    stride_x,
    stride_residual,
    dropout_p,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SAVED_U: tl.constexpr,  # X is u: dropout is behind it already
):
    """Every programs-th tile of rows, and the sums over those rows for dweight and dbias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    dweight = tl.zeros([1, BLOCK], tl.float32)
    dbias = tl.zeros([1, BLOCK], tl.float32)
    read_seed = None if SAVED_U else Seed

    # hoisted out of the loop, the weight takes registers that the compiler then spills
    for tile in tl.range(program, tl.cdiv(M, ROWS), programs, disable_licm=True):
        row = (tile * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]  # [ROWS, 1]
        mean = tl.load(Statistics + row, mask=row < M, other=0.0)
        rstd = tl.load(Statistics + M + row, mask=row < M, other=0.0)

        g_sum = tl.zeros([ROWS, 1], tl.float32)
        gx_sum = tl.zeros([ROWS, 1], tl.float32)
        x_sum = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, N, BLOCK):
            column = start + columns
            mask = (row < M) & (column < N)
            u = _load_u(X, Residual, read_seed, row, start, mask, stride_x, stride_residual, dropout_p, BLOCK)
            xhat = tl.where(column < N, (u - mean) * rstd, 0.0)
            g = tl.load(DY + row * stride_dy + column, mask=mask, other=0.0).to(tl.float32)
            if Weight is not None:
                g *= tl.load(Weight + column, mask=column < N, other=0.0).to(tl.float32)
            g_sum += tl.sum(g, 1, keep_dims=True)
            gx_sum += tl.sum(g * xhat, 1, keep_dims=True)
            x_sum += tl.sum(xhat, 1, keep_dims=True)
        shift = x_sum / N  # what the float32 mean left over
        g_mean = g_sum / N
        gx_mean = gx_sum / N - g_mean * shift

        for start in range(0, N, BLOCK):
            column = start + columns
            mask = (row < M) & (column < N)
            u = _load_u(X, Residual, read_seed, row, start, mask, stride_x, stride_residual, dropout_p, BLOCK)
            xhat = (u - mean) * rstd - shift
            dy = tl.load(DY + row * stride_dy + column, mask=mask, other=0.0).to(tl.float32)
            g = dy
            if Weight is not None:
                g = dy * tl.load(Weight + column, mask=column < N, other=0.0).to(tl.float32)
            du = (g - g_mean - xhat * gx_mean) * rstd
            if DU is not None:
                du += tl.load(DU + row * stride_du + column, mask=mask, other=0.0).to(tl.float32)
            if DResidual is not None:
                tl.store(DResidual + row * N + column, du, mask=mask)
            if Seed is not None:
                du = _drop(du, Seed, row, start, dropout_p, BLOCK)
            tl.store(DX + row * N + column, du, mask=mask)
            if N <= BLOCK:
                dweight += tl.sum(dy * xhat, 0, keep_dims=True)
                dbias += tl.sum(dy, 0, keep_dims=True)
            else:  # too wide for registers: the program's row of DWeight and DBias, which start as zeros
                partial = program.to(tl.int64) * N + column
                if DWeight is not None:
                    sums = tl.load(DWeight + partial, mask=column < N, other=0.0) + tl.sum(dy * xhat, 0, keep_dims=True)
                    tl.store(DWeight + partial, sums, mask=column < N)
                if DBias is not None:
                    sums = tl.load(DBias + partial, mask=column < N, other=0.0) + tl.sum(dy, 0, keep_dims=True)
                    tl.store(DBias + partial, sums, mask=column < N)

    if N <= BLOCK:
        partial = program.to(tl.int64) * N + columns
        if DWeight is not None:
            tl.store(DWeight + partial, dweight, mask=columns < N)
        if DBias is not None:
            tl.store(DBias + partial, dbias, mask=columns < N)


# ---- launchers ----


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    prenorm: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in ``dtype``, u (empty unless ``prenorm``), mean and rstd [2, M])."""
    y, u, statistics = _forward_fake(x, residual, weight, bias, seed, dropout_p, eps, prenorm, dtype)
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    M, N = x.shape
    if M and N:
        how = config(FORWARD, N)
        rows, block = how.tile(N)
        _dispatch.configured(rows, block, warps=how.warps)
        with _triton.on(x):
            _layer_norm_forward_kernel[(triton.cdiv(M, rows),)](
                x,
                residual,
                contiguous(weight),
                contiguous(bias),
                seed,
                y,
                u if prenorm else None,
                statistics,
                M,
                x.stride(0),
                0 if residual is None else residual.stride(0),
                dropout_p,
                eps,
                N=N,
                ROWS=rows,
                BLOCK=block,
                num_warps=how.warps,
            )
    return y, u, statistics


def _forward_fake(x, residual, weight, bias, seed, dropout_p, eps, prenorm, dtype):
    u_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    u = x.new_empty(x.shape if prenorm else 0, dtype=u_dtype)
    return y, u, x.new_empty((2, math.prod(x.shape[:-1])), dtype=torch.float32)


def _backward(
    dy: Tensor,
    du: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    dropout_p: float,
    saved_u: bool,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias); the parameters' in float32. What is not needed is empty, and so is dresidual
    without a ``dresidual_dtype``. ``x`` is u where ``saved_u``."""
    shape = x.shape
    dy, x = as_rows(dy), as_rows(x)
    du, residual = None if du is None else as_rows(du), None if residual is None else as_rows(residual)
    M, N = x.shape
    how = config(BACKWARD, N)
    rows, block = how.tile(N)
    programs = min(triton.cdiv(M, rows), PROGRAMS_PER_SM * _triton.multiprocessors(x.device)) if N else 0
    dx = x.new_empty(shape, dtype=dx_dtype)
    dresidual = None if dresidual_dtype is None else x.new_empty(shape, dtype=dresidual_dtype)
    partial = x.new_zeros if block < N else x.new_empty
    dweight = partial((programs, N), dtype=torch.float32) if need_dweight else None
    dbias = partial((programs, N), dtype=torch.float32) if need_dbias else None
    if programs:
        with _triton.on(x):
            _layer_norm_backward_kernel[(programs,)](
                dy,
                du,
                x,
                residual,
                contiguous(weight),
                seed,
                statistics,
                dx,
                dresidual,
                dweight,
                dbias,
                M,
                dy.stride(0),
                0 if du is None else du.stride(0),
                x.stride(0),
                0 if residual is None else residual.stride(0),
                dropout_p,
                N=N,
                ROWS=rows,
                BLOCK=block,
                SAVED_U=saved_u,
                num_warps=how.warps,
            )
    none = x.new_empty(0, dtype=torch.float32)
    return (
        dx,
        none if dresidual is None else dresidual,
        none if dweight is None else dweight.sum(0),
        none if dbias is None else dbias.sum(0),
    )


# ---- registration ----


def _backward_fake(
    dy, du, x, residual, weight, seed, statistics, p, saved_u, dx_dtype, dresidual_dtype, need_dweight, need_dbias
):
    C = x.shape[-1]
    return (
        x.new_empty(x.shape, dtype=dx_dtype),
        x.new_empty(0, dtype=torch.float32) if dresidual_dtype is None else x.new_empty(x.shape, dtype=dresidual_dtype),
        x.new_empty(C if need_dweight else 0, dtype=torch.float32),
        x.new_empty(C if need_dbias else 0, dtype=torch.float32),
    )


_lib = torch.library.Library("gptfast", "FRAGMENT")
_lib.define(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float dropout_p, float eps, "
    "bool prenorm, ScalarType dtype) -> (Tensor y, Tensor u, Tensor statistics)"
)
_lib.define(
    "layer_norm_backward(Tensor dy, Tensor? du, Tensor x, Tensor? residual, Tensor? weight, Tensor? seed, "
    "Tensor statistics, float dropout_p, bool saved_u, ScalarType dx_dtype, ScalarType? dresidual_dtype, "
    "bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
_lib.impl("layer_norm", _forward, "CompositeExplicitAutograd")
_lib.impl("layer_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gptfast::layer_norm", _forward_fake, lib=_lib)
torch.library.register_fake("gptfast::layer_norm_backward", _backward_fake, lib=_lib)
_forward_op = torch.ops.gptfast.layer_norm.default
_backward_op = torch.ops.gptfast.layer_norm_backward.default


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, dropout_p, eps, prenorm, dtype):
        y, u, statistics = _forward_op(x, residual, weight, bias, seed, dropout_p, eps, prenorm, dtype)
        saved = (u, None) if prenorm else (x, residual)
        ctx.save_for_backward(*saved, weight, seed, statistics)
        ctx.dropout_p, ctx.prenorm, ctx.y_dtype = dropout_p, prenorm, dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
        ctx.set_materialize_grads(False)
        return (y, u) if prenorm else y

    @staticmethod
    @first_order("layer_norm")
    def backward(ctx, dy, du=None):
        x, residual, weight, seed, statistics = ctx.saved_tensors
        x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if dy is None:  # only u was used
            dy = torch.zeros_like(x, dtype=ctx.y_dtype)
        need = ctx.needs_input_grad
        apart = need[1] and (seed is not None or residual_dtype != x_dtype)  # else dresidual is dx
        dx, dresidual, dweight, dbias = _backward_op(
            dy, du, x, residual, weight, seed, statistics, ctx.dropout_p, ctx.prenorm,
            x_dtype, residual_dtype if apart else None, need[2], need[3],
        )  # fmt: skip
        return (
            dx if need[0] else None,
            (dresidual if apart else dx) if need[1] else None,
            dweight.to(weight_dtype) if need[2] else None,
            dbias.to(bias_dtype) if need[3] else None,
            *(None,) * 5,
        )


# ---- public ----


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    backend: str = "auto",
) -> Tensor | Any:
    """LayerNorm of ``residual + dropout(x)`` over the last dimension.

    Args:
        x: [..., C], floating point.
        weight, bias: [C] or None, of any floating dtype.
        residual: of x's shape, or None.
        dropout_p: probability of zeroing an element of ``x``, in [0, 1). Pass 0 outside training.
        eps: added to the variance.
        prenorm: also return ``residual + dropout(x)``.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y [..., C], or (y, residual + dropout(x)) with ``prenorm=True``, in the dtype that x and residual promote to. As
        ``F.layer_norm``, y is float32 under autocast on a GPU.

    Raises:
        ValueError: a shape, a device or ``dropout_p`` does not fit. TypeError: x is not floating point.
        RuntimeError: the backend asked for cannot run.
    """
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    C = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (C,):
            raise ValueError(f"{name} must have shape [{C}], the last dimension of x, got {list(parameter.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    _dispatch.check_dropout(dropout_p)
    _dispatch.check_floats(x=x, weight=weight, bias=bias, residual=residual)

    cannot = None
    for tensor in (x, weight, bias, residual):
        cannot = cannot or (None if tensor is None else _triton.why_not(tensor))
    if C > MAX_WIDTH:
        cannot = f"C = {C} is above {MAX_WIDTH}"
    backend = _dispatch.select("layer_norm", backend, cannot)
    if backend == "triton":
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.float32
        seed = _philox.draw_seed(x.device) if dropout_p else None
        args = (x, residual, weight, bias, seed, dropout_p, eps, prenorm, dtype)
        if wants_grad(x, residual, weight, bias):
            return _LayerNorm.apply(*apart(*args))
        y, u, _ = _forward_op(*args)
    elif backend == "reference":
        y, u = layer_norm_reference(x, weight, bias, residual=residual, dropout_p=dropout_p, eps=eps)
    else:
        u = F.dropout(x, dropout_p) if dropout_p else x
        u = u if residual is None else residual + u
        y = _layer_norm_torch(u, weight, bias, eps)
    return (y, u) if prenorm else y


def _layer_norm_torch(u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.layer_norm``, in float32 at least for the mixed dtypes that it refuses."""
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    exact = torch.promote_types(u.dtype, torch.float32)
    if dtypes <= {u.dtype} or (u.device.type == "cpu" and dtypes == {torch.float32} == {exact}):
        return F.layer_norm(u, u.shape[-1:], weight, bias, eps)
    weight, bias = (None if p is None else p.to(exact) for p in (weight, bias))
    y = F.layer_norm(u.to(exact), u.shape[-1:], weight, bias, eps)
    return y if u.is_cuda and torch.is_autocast_enabled("cuda") else y.to(u.dtype)
