"""A linear layer with GELU behind it: gelu(x @ weight.T + bias), the first half of a transformer's MLP.

    z = x @ weight.T + bias        y = gelu(z)
    dz = dy * gelu'(z)             dx = dz @ weight        dweight = dz.T @ x        dbias = sum_rows dz

One kernel makes y from x: it is a matmul whose programs, one for each multiprocessor, walk over the tiles of y, and add
the bias and apply GELU while a tile is still in registers. For backward it writes z as well, which saves reading y's
tile again. Backward is ``gelu``'s kernel for dz and dbias, and two of torch's matmuls.

FLOPs: 2 M N K in forward, twice that in backward. Bytes: forward reads x and weight and writes y (and z).

Shapes: x [..., K]; weight [N, K] with any strides (a Conv1D passes ``weight.t()``); bias [N]; y, z [..., N]; M rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _triton
from ._autograd import apart, as_rows, contiguous, first_order, wants_grad
from ._triton import tl, triton
from .activation import check_gelu, gelu_of, gelu_reference


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: str = "tanh") -> Tensor:
    """The formula, unfused; the product in x's dtype, GELU in float32 at least."""
    return gelu_reference(F.linear(x, weight, bias), approximate=approximate)


# ---- configs ----


@dataclass(frozen=True)
class Config:
    """A tile of y is [block_m, block_n], made in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8  # tiles of rows that share a pass over the columns, so that x and weight stay in the L2 cache


# By the start of target and dtype, the first that fits. Compiled, not timed. 128 x 256 spills in the epilogue.
CONFIGS = (
    ("", torch.float32, Config(64, 64, 32, warps=4, stages=2)),
    ("hip", None, Config(128, 128, 64, warps=8, stages=2)),
    ("cuda:80", None, Config(128, 128, 64, warps=8, stages=3)),
    ("cuda:90", None, Config(128, 128, 64, warps=8, stages=3)),
    ("cuda:100", None, Config(128, 128, 64, warps=8, stages=3)),
    ("", None, Config(128, 128, 32, warps=8, stages=3)),
)


def config(target: str, dtype: torch.dtype) -> Config:
    return next(how for start, of, how in CONFIGS if target.startswith(start) and of in (dtype, None))


# ---- kernel ----


@triton.jit(do_not_specialize=["M"])
def _linear_gelu_kernel(
    X,  # [M, K]
    Weight,  # [N, K]
    Bias,  # [N] or None
    Y,  # [M, N]
    Z,  # [M, N] or None: not wanted
    M,
    N,
    K,
    stride_x,
    stride_wn,
    stride_wk,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    w_step = tl.full([], BLOCK_K, tl.int64) * stride_wk
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        group = tile // (GROUP * across)
        group_rows = min(down - group * GROUP, GROUP)
        tile_m = group * GROUP + tile % group_rows
        tile_n = tile % (GROUP * across) // group_rows

        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
        k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x = X + m[:, None] * stride_x + k[None, :]  # [BLOCK_M, BLOCK_K]
        w = Weight + n[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk  # [BLOCK_K, BLOCK_N]
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            x_tile = tl.load(x, mask=(m[:, None] < M) & (k[None, :] < K - start), other=0.0)
            w_tile = tl.load(w, mask=(n[None, :] < N) & (k[:, None] < K - start), other=0.0)
            z = tl.dot(x_tile, w_tile, z, input_precision=PRECISION)
            x += BLOCK_K
            w += w_step

        if Bias is not None:
            z += tl.load(Bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        out = m[:, None] * N + n[None, :]
        mask = (m[:, None] < M) & (n[None, :] < N)
        if Z is not None:
            tl.store(Z + out, z, mask=mask)
        tl.store(Y + out, gelu_of(z, TANH), mask=mask)


# ---- launcher ----


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, want_z: bool) -> tuple[Tensor, Tensor]:
    """(y, z), z empty unless wanted, of x, weight and bias of one dtype."""
    y, z = _forward_fake(x, weight, bias, approximate, want_z)
    x = as_rows(x)
    (M, K), N = x.shape, len(weight)
    if M and N:
        how = config(_triton.target(x.device), x.dtype)
        tiles = triton.cdiv(M, how.block_m) * triton.cdiv(N, how.block_n)
        _dispatch.configured(how.block_m, how.block_n, how.block_k, warps=how.warps, stages=how.stages)
        with _triton.on(x):
            _linear_gelu_kernel[(min(tiles, _triton.multiprocessors(x.device)),)](
                x,
                weight,
                contiguous(bias),
                y,
                z if want_z else None,
                M,
                N,
                K,
                x.stride(0),
                weight.stride(0),
                weight.stride(1),
                TANH=approximate == "tanh",
                PRECISION=_triton.dot_precision(),
                BLOCK_M=how.block_m,
                BLOCK_N=how.block_n,
                BLOCK_K=how.block_k,
                GROUP=how.group,
                num_warps=how.warps,
                num_stages=how.stages,
            )
    return y, z


def _forward_fake(x, weight, bias, approximate, want_z):
    shape = (*x.shape[:-1], len(weight))
    return x.new_empty(shape), x.new_empty(shape if want_z else 0)


# ---- registration ----


_lib = torch.library.Library("gptfast", "FRAGMENT")
_lib.define("linear_gelu(Tensor x, Tensor weight, Tensor? bias, str approximate, bool want_z) -> (Tensor y, Tensor z)")
_lib.impl("linear_gelu", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gptfast::linear_gelu", _forward_fake, lib=_lib)
_op = torch.ops.gptfast.linear_gelu.default


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, approximate):
        y, z = _op(x, weight, bias, approximate, True)
        ctx.save_for_backward(x, weight, z)
        ctx.approximate = approximate
        return y

    @staticmethod
    @first_order("linear_gelu")
    def backward(ctx, dy):
        x, weight, z = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        dz, dbias = torch.ops.gptfast.gelu_backward.default(dy, z, None, ctx.approximate, need_dbias)
        return (
            dz @ weight if need_dx else None,
            as_rows(dz).t() @ as_rows(x) if need_dweight else None,
            dbias.to(dz.dtype) if need_dbias else None,
            None,
        )


# ---- public ----


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh", backend: str = "auto"
) -> Tensor:
    """``gelu(F.linear(x, weight, bias))``.

    Args:
        x: [..., K], floating point.
        weight: [N, K], any strides.
        bias: [N] or None.
        approximate: "tanh" or "none" (exact).
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [..., N] in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: a shape, a device or ``approximate`` is not accepted. TypeError: x, weight and bias differ in dtype,
        without autocast. RuntimeError: the backend asked for cannot run.
    """
    check_gelu(approximate)
    check_linear("x", x, weight, bias)
    cannot = _triton.why_not(x.new_empty(0, dtype=linear_dtype(x)))
    backend = _dispatch.select("linear_gelu", backend, cannot, "not measured yet against cuBLAS's epilogue")
    if backend == "triton":
        x, weight, *rest = _triton.autocast(x, weight, *(() if bias is None else (bias,)))
        args = (x, weight, rest[0] if rest else None, approximate)
        return _LinearGelu.apply(*apart(*args)) if wants_grad(*args[:3]) else _op(*args, False)[0]
    if backend == "reference":
        return linear_gelu_reference(x, weight, bias, approximate=approximate)
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``F.linear(x, ...)`` computes in: x's, or autocast's where it is on (float64 is left alone)."""
    if _triton.is_autocast_on(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless ``F.linear(x, weight, bias)`` is defined; ``name`` is what the caller calls x."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"{name} must be [..., {K}] to fit weight {[N, K]}, got shape {list(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must have shape [{N}] to fit weight {[N, K]}, got {list(bias.shape)}")
    _dispatch.check_floats(**{name: x, "weight": weight, "bias": bias})
    for other, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and linear_dtype(parameter) != linear_dtype(x):
            raise TypeError(f"{other} is {parameter.dtype}, but {name} is {x.dtype}: cast one, or use torch.autocast")
