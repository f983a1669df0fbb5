"""The language-model head and its loss without holding the logits.

    z[n] = hidden[n] @ weight.T + bias
    loss[n] = logsumexp(z[n]) - z[n, target[n]]              0 where target[n] == ignore_index

    dz[n]   = (softmax(z[n]) - onehot(target[n])) * dloss[n]
    dhidden = dz @ weight      dweight = dz.T @ hidden      dbias = sum_n dz[n]

The logits of GPT-1 at 32k tokens are 32,768 x 40,478: 5.3 GB in float32, and as much again for their gradient. Here
only a chunk of rows lives at a time. "mean" and "sum" need one number of dloss for all rows, so their forward makes the
gradients while the chunk is at hand (three matmuls in all) and their backward scales them; "none" learns dloss only in
backward, which makes the logits again (four).

Shapes: hidden [..., C]; weight [V, C]; bias [V]; target [...]; N rows in all.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _triton
from ._autograd import apart, first_order, wants_grad
from ._triton import tl, triton
from .projection import check_linear, linear_dtype

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """All logits, then cross entropy; in float32 at least. hidden [..., C] and target [...] as after the shift."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, len(weight))
    loss = F.cross_entropy(logits, target.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss


# ---- configs ----


@dataclass(frozen=True)
class Config:
    """One program does a row of logits, ``block`` columns at a time."""

    block: int
    warps: int


# Compiled for four targets, not timed: at most 86 registers and 2 blocks an SM; with 8192 it was 228, and 1.
ROW = Config(block=4096, warps=8)

# Bytes of logits in a chunk, and the fewest rows that keep the matmuls at full speed.
# 16 MiB, 256 rows: the fastest at V = 4096 and within 10 % of it at V = 40,478, of 128 to 2048 rows (2 cores).
# 128 MiB on a GPU: each chunk makes a float32 product of dweight's size (124 MB for GPT-1), so few chunks. Not timed.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
MIN_ROWS = 256
# Rows of logits start at multiples of this many elements: one of 40,478 bfloat16 ends off 16 bytes, and makes for
# narrow accesses.
ALIGN = 64


def rows_per_chunk(V: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of V logits are held at a time."""
    return max(MIN_ROWS, CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"] // (V * dtype.itemsize or 1))


# ---- one chunk of logits: losses, and the logits' gradient ----


def _rows_torch(z: Tensor, target: Tensor, dloss: Tensor | None, ignore_index: int, p: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [n], dz [n, V] in z's dtype) of logits z [n, V], target [n] and dloss [n]; without dloss no dz but z.

    p [n, V], of the dtype of the loss, is overwritten. A target outside [0, V) has loss NaN.
    """
    torch.log_softmax(z, -1, dtype=p.dtype, out=p)
    counts, in_range = target != ignore_index, (target >= 0) & (target < z.shape[1])
    column = torch.where(in_range, target, 0)[:, None]
    loss = p.gather(1, column)[:, 0].neg_()
    loss = loss.masked_fill_(~in_range, torch.nan).masked_fill_(~counts, 0.0)
    if dloss is None:
        return loss, z
    dz = p.exp_().scatter_add_(1, column, p.new_full(column.shape, -1.0))
    return loss, dz.mul_(torch.where(counts, dloss, 0.0)[:, None]).to(z.dtype)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    Z,  # [n, V]: logits, overwritten by their gradient where there is DLoss
    Target,  # [n]
    DLoss,  # [n] or None
    Loss,  # [n] float32
    V,
    stride_z,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride_z
    columns = tl.arange(0, BLOCK)
    target = tl.load(Target + row)
    counts = target != ignore_index
    in_range = (target >= 0) & (target < V)
    # read before the reductions, whose barriers keep other threads from overwriting it
    z_target = tl.load(Z + target, mask=in_range, other=float("nan")).to(tl.float32)

    most = -3.4e38  # finite: a block of logits that are all -inf would make exp(-inf + inf)
    total = 0.0  # sum of exp(z - most)
    for start in range(0, V, BLOCK):
        z = tl.load(Z + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(z, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(z - higher), 0)
        most = higher
    tl.store(Loss + row, tl.where(counts, most - z_target + tl.log(total), 0.0))

    if DLoss is not None:
        dloss = tl.load(DLoss + row).to(tl.float32)
        for start in range(0, V, BLOCK):
            column = start + columns
            z = tl.load(Z + column, mask=column < V, other=0.0).to(tl.float32)
            dz = tl.exp(z - most) / total - tl.where(column == target, 1.0, 0.0)
            tl.store(Z + column, tl.where(counts, dz * dloss, 0.0), mask=column < V)


def _rows_triton(z: Tensor, target: Tensor, dloss: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """As ``_rows_torch``; z becomes dz."""
    n, V = z.shape
    loss = z.new_empty(n, dtype=torch.float32)
    block = min(ROW.block, triton.next_power_of_2(V))
    _dispatch.configured(1, block, warps=ROW.warps)
    with _triton.on(z):
        _cross_entropy_kernel[(n,)](
            z,
            target,
            dloss,
            loss,
            V,
            z.stride(0),
            ignore_index,
            BLOCK=block,
            num_warps=ROW.warps,
        )
    return loss, z


# ---- all rows, a chunk at a time ----


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dloss: Tensor | None,
    needs: list[bool],
    ignore_index: int,
    dtype: torch.dtype,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], dhidden, dweight, dbias) of hidden [N, C], target [N] and dloss [N], with logits in ``dtype``.

    ``needs`` says which gradients are wanted; the others are empty, and so are all without ``dloss``. The loss, dweight
    and dbias are float32, float64 if ``dtype`` is. ``kernel`` chooses the Triton kernel for what is no matmul.
    """
    exact, need_hidden, need_weight, need_bias = _plan(bias, dloss, needs, dtype)
    (N, C), V = hidden.shape, len(weight)
    loss = hidden.new_zeros(N, dtype=exact)
    dhidden = hidden.new_zeros((N, C) if need_hidden else 0)
    dweight = weight.new_zeros((V, C) if need_weight else 0, dtype=exact)
    dbias = weight.new_zeros(V if need_bias else 0, dtype=exact)

    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = torch.arange(N, device=hidden.device)
    if hidden.device.type == "cpu":  # leave out what does not count; on a GPU finding it would cost a synchronisation
        rows = rows[target != ignore_index]
    size = min(len(rows), rows_per_chunk(V, dtype, hidden.device))
    logits = hidden.new_empty((size, -(-V // ALIGN) * ALIGN if kernel else V), dtype=dtype)[:, :V]
    scratch = hidden.new_empty((0 if kernel else size, V), dtype=exact)
    for n in rows.split(size) if size else ():
        h, z = hidden[n].to(dtype), logits[: len(n)]
        if b is None:
            torch.mm(h, w.t(), out=z)
        else:
            torch.addmm(b, h, w.t(), out=z)
        chunk = z, target[n], None if dloss is None else dloss[n], ignore_index
        loss[n], dz = _rows_triton(*chunk) if kernel else _rows_torch(*chunk, scratch[: len(n)])
        if need_hidden:
            dhidden[n] = (dz @ w).to(hidden.dtype)
        if need_weight:
            _accumulate(dweight, dz.t(), h)
        if need_bias:
            dbias += dz.sum(0, dtype=exact)
    return loss, dhidden, dweight, dbias


def _plan(bias, dloss, needs, dtype):
    wanted = [dloss is not None and need for need in needs]
    return torch.promote_types(dtype, torch.float32), *wanted[:2], wanted[2] and bias is not None


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, where total may be float32 and a, b half precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and not torch.version.hip:  # addmm, which could add too, took no float32 total at first
        total += torch.mm(a, b, out_dtype=total.dtype)
    elif total.is_cuda or a.dtype == torch.float16:  # float16: the sum over a chunk's rows may pass its 65504
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total += a @ b


# ---- registration ----


def _chunked_fake(hidden, weight, bias, target, dloss, needs, ignore_index, dtype, kernel):
    exact, need_hidden, need_weight, need_bias = _plan(bias, dloss, needs, dtype)
    return (
        hidden.new_empty(len(hidden), dtype=exact),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0, dtype=exact),
        weight.new_empty(len(weight) if need_bias else 0, dtype=exact),
    )


_lib = torch.library.Library("gptfast", "FRAGMENT")
_lib.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? dloss, bool[] needs, "
    "int ignore_index, ScalarType dtype, bool kernel) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)"
)
_lib.impl("linear_cross_entropy", _chunked, "CompositeExplicitAutograd")
torch.library.register_fake("gptfast::linear_cross_entropy", _chunked_fake, lib=_lib)
_op = torch.ops.gptfast.linear_cross_entropy.default


class _Rows(torch.autograd.Function):
    """Losses [N]; backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, *how):
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.how = how
        return _op(hidden, weight, bias, target, None, [False] * 3, *how)[0]

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx, dloss):
        _, *grads = _op(*ctx.saved_tensors, dloss, list(ctx.needs_input_grad[:3]), *ctx.how)
        dtypes = [None if x is None else x.dtype for x in ctx.saved_tensors[:3]]
        return _for_inputs(grads, dtypes, ctx.needs_input_grad)


class _Sum(torch.autograd.Function):
    """Sum of the losses, a scalar; forward makes the gradients too."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, *how):
        dloss = target.new_ones(target.shape, dtype=torch.float32)
        loss, *grads = _op(hidden, weight, bias, target, dloss, list(ctx.needs_input_grad[:3]), *how)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.sum()

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx, dtotal):
        return _for_inputs([grad * dtotal for grad in ctx.saved_tensors], ctx.dtypes, ctx.needs_input_grad)


def _for_inputs(grads, dtypes, needed):
    """What backward returns for forward's inputs: gradients in their inputs' dtypes, None where none is needed."""
    hidden, weight, bias = (g.to(t) if need else None for g, t, need in zip(grads, dtypes, needed, strict=False))
    return hidden, weight, bias, *(None,) * 4


# ---- public ----


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: bool = False,
    return_logprobs: bool = False,
    backend: str = "auto",
) -> Tensor | Any:
    """``F.cross_entropy(F.linear(hidden, weight, bias), target)`` in float32, without holding the logits.

    Args:
        hidden: [..., C], floating point.
        weight: [V, C], any strides.
        target: [...], int64, each in [0, V) or ``ignore_index``.
        bias: [V] or None.
        ignore_index: rows with this target count neither in the loss nor in the mean. Any integer.
        reduction: "mean" (over the rows that count; NaN if none does), "sum" or "none".
        shift: position t of hidden [..., T, C] predicts target[..., t + 1], and the last one nothing. hidden is not
            copied for it.
        return_logprobs: also return the log-probability of each row's target, 0 where none counts.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        float32 (float64 for float64): a scalar, or [...] with ``reduction="none"``, 0 where ignored. With
        ``return_logprobs=True`` (loss, log-probabilities [...]).

    Raises:
        ValueError: a shape or ``reduction`` is not accepted. TypeError: ``target`` is not int64, or hidden, weight and
        bias differ in dtype, without autocast. IndexError: a target is out of range, on a CPU; on a GPU, where reading
        one back costs a synchronisation, its loss is NaN. RuntimeError: the backend asked for cannot run.
    """
    check_reduction(reduction)
    check_linear("hidden", hidden, weight, bias)
    if len(weight) == 0:
        raise ValueError(f"weight must have at least one row, got shape {list(weight.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have the shape {list(hidden.shape[:-1])} of hidden's rows, got {list(target.shape)}"
        )
    if target.device != hidden.device:
        raise ValueError(f"target is on {target.device}, but hidden is on {hidden.device}")
    if shift:
        if target.ndim == 0:
            raise ValueError("shift=True needs hidden [..., T, C] and target [..., T], got a single row")
        target = F.pad(target[..., 1:], (0, min(1, target.shape[-1])), value=ignore_index)
    V = len(weight)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = target[(target != ignore_index) & ((target < 0) | (target >= V))]
        if bad.numel():
            raise IndexError(
                f"target contains {int(bad[0])}; accepted are 0 to {V - 1} and ignore_index={ignore_index}"
            )

    dtype = linear_dtype(hidden)
    cannot = _triton.why_not(hidden.new_empty(0, dtype=dtype))
    backend = _dispatch.select("linear_cross_entropy", backend, cannot)
    if backend == "reference":
        rows = linear_cross_entropy_reference(
            hidden, weight, target, bias=bias, ignore_index=ignore_index, reduction="none"
        )
        total = rows.sum()
    else:
        inputs = (hidden.reshape(target.numel(), hidden.shape[-1]), weight, bias, target.flatten())
        how = (ignore_index, dtype, backend == "triton")
        train = wants_grad(*inputs[:3])
        if train and reduction != "none" and not return_logprobs:
            total = rows = _Sum.apply(*apart(*inputs, *how))
        else:
            rows = _Rows.apply(*apart(*inputs, *how)) if train else _op(*inputs, None, [False] * 3, *how)[0]
            rows = rows.view(target.shape)
            total = rows.sum()

    loss = rows if reduction == "none" else total if reduction == "sum" else _mean(total, target != ignore_index)
    return (loss, -rows) if return_logprobs else loss


def _mean(total: Tensor, counts: Tensor) -> Tensor:
    """NaN where nothing counts, as ``F.cross_entropy``, with gradients of zero, as there."""
    n = counts.sum()
    return torch.where(n > 0, total / n.clamp(min=1), torch.nan)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
