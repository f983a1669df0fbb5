"""The tied LM head and its loss against all logits, eager and compiled, and Liger; on a GPU in memory too.

FLOPs: 2 N V C forward, 6 N V C with backward; what is recomputed does not count. Bytes: hidden and the weight once,
their gradients once.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptfast_kernels import linear_cross_entropy

from .harness import DTYPES, Cell, Scale, Settings, Task
from .op import Call, compare, compiled, draw, liger, ours

ROWS = 4096  # of logits that the reference holds in float64


def cells(scale: Scale) -> Iterator[Cell]:
    """Training first: forward and backward together, since most implementations do part of the one in the other."""
    for mode in sorted("both" if mode == "backward" else mode for mode in scale.modes):
        for T in scale.lengths:
            shape = {"B": scale.B, "T": T, "V": scale.vocab, "C": scale.width}
            yield Cell("loss", mode, scale.dtype, shape, seconds=10.0)


def task(cell: Cell, settings: Settings) -> Task:
    N, V, C = cell.shape["B"] * cell.shape["T"], cell.shape["V"], cell.shape["C"]
    target = torch.randint(V, (N,), device=settings.device)
    inputs = [draw(cell, settings, N, C), draw(cell, settings, V, C, std=0.02)]

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, backend=ours(settings))

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, backend="torch")

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), target)

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        def part(rows: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(rows @ weight.t(), labels, reduction="sum")

        parts = zip(hidden.split(ROWS), target.split(ROWS), strict=True)
        return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum() / N

    def ligers() -> Call:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        return lambda hidden, weight: Liger.apply(hidden, weight, target)[0]

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        table: dict[str, Callable[[], Call]] = {
            "torch eager": lambda: eager,
            "torch.compile": compiled(eager),
            "gptfast": lambda: fused,
            "Liger": liger(ligers),
        }
        # on a CPU ours is the torch backend
        return table if ours(settings) == "torch" else table | {"gptfast torch backend": lambda: chunked}

    fold = 1 if cell.mode == "forward" else 3
    moved = (1 if cell.mode == "forward" else 2) * DTYPES[cell.dtype].itemsize * (N * C + V * C)
    return compare(cell, settings, functions, inputs, exact, moved=moved, flops=fold * 2 * N * V * C, tokens=N)
