"""The language-model head and its loss without holding the logits.

    z[n] = hidden[n] @ weight.T + bias
    loss[n] = logsumexp(z[n]) - z[n, target[n]]              0 where target[n] == ignore_index

The logits of GPT-1 at 32k tokens are 32,768 x 40,478: 5.3 GB in float32, and as much again for their gradient. Here a
chunk of rows lives at a time. Forward saves one number a row (the logsumexp); backward makes the chunk's logits again:

    dz[n]   = (softmax(z[n]) - onehot(target[n])) * dloss[n]
    dhidden = dz @ weight      dweight = dz.T @ hidden      dbias = sum_n dz[n]

Shapes: hidden [..., C]; weight [V, C]; bias [V]; target [...]; N rows in all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from .projection import check_linear

REDUCTIONS = ("mean", "sum", "none")
CHUNK_BYTES = 32 << 20  # of float32 logits: large enough for a full-speed matmul, small beside the weight


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """All logits, then cross entropy."""
    logits = F.linear(hidden, weight, bias).float()
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Per-row losses [N] in float32, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, ignore_index):
        N, V = len(hidden), len(weight)
        rows = max(1, CHUNK_BYTES // (4 * V))
        loss = hidden.new_empty(N, dtype=torch.float32)
        lse = hidden.new_empty(N, dtype=torch.float32)
        for i in range(0, N, rows):
            n = slice(i, i + rows)
            z = F.linear(hidden[n], weight, bias).float()  # [rows, V]
            lse[n] = z.logsumexp(-1)
            picked = z.gather(1, target[n].clamp(0, V - 1)[:, None])[:, 0]
            loss[n] = torch.where(target[n] == ignore_index, 0.0, lse[n] - picked)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.ignore_index, ctx.rows = ignore_index, rows
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        hidden, weight, bias, target, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        V = len(weight)
        dloss = dloss.masked_fill(target == ctx.ignore_index, 0.0)
        for i in range(0, len(hidden), ctx.rows):
            n = slice(i, i + ctx.rows)
            z = F.linear(hidden[n], weight, bias).float()
            dz = z.sub_(lse[n, None]).exp_()
            dz.scatter_add_(1, target[n].clamp(0, V - 1)[:, None], torch.full_like(lse[n, None], -1.0))
            dz = dz.mul_(dloss[n, None]).to(hidden.dtype)
            if dhidden is not None:
                dhidden[n] = dz @ weight
            if dweight is not None:
                dweight += dz.t() @ hidden[n]
            if dbias is not None:
                dbias += dz.sum(0, dtype=torch.float32)
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), target)`` in float32, without holding the logits.

    Args:
        hidden: [..., C], floating point.
        weight: [V, C], any strides.
        target: [...], int64, each in [0, V) or ``ignore_index``.
        bias: [V] or None.
        ignore_index: rows with this target count neither in the loss nor in the mean.
        reduction: "mean" (over the rows that count; NaN if none does), "sum" or "none".
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        float32: a scalar, or [...] with ``reduction="none"`` (0 where ignored).

    Raises:
        ValueError: a shape or ``reduction`` is not accepted. TypeError: ``target`` is not int64.
        IndexError: a target is out of range, on a CPU. RuntimeError: the backend asked for cannot run.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_linear(hidden, weight, bias)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have the shape {list(hidden.shape[:-1])} of hidden's rows, got {list(target.shape)}"
        )
    V = len(weight)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = target[(target != ignore_index) & ((target < 0) | (target >= V))]
        if bad.numel():
            raise IndexError(
                f"target contains {int(bad[0])}; accepted are 0 to {V - 1} and ignore_index={ignore_index}"
            )

    if _dispatch.select("linear_cross_entropy", backend, _dispatch.NOT_YET) == "reference":
        return linear_cross_entropy_reference(
            hidden, weight, target, bias=bias, ignore_index=ignore_index, reduction=reduction
        )
    rows = _ChunkedLinearCrossEntropy.apply(hidden.flatten(0, -2), weight, bias, target.flatten(), ignore_index)
    if reduction == "none":
        return rows.view(target.shape)
    total = rows.sum()
    return total / (target != ignore_index).sum() if reduction == "mean" else total
