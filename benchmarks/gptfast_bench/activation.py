"""GELU, with and without a bias, against PyTorch eager and compiled, and Liger.

Bytes: forward reads x and writes y; backward reads dy and x and writes dx.
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from gptfast_kernels import gelu
from gptfast_kernels.activation import gelu_reference

from .harness import DTYPES, Cell, Scale, Settings, Task
from .op import Call, compare, compiled, draw, liger, ours


def cells(scale: Scale) -> Iterator[Cell]:
    """GPT-1's form first, then with its bias, then the exact one."""
    for mode in scale.modes:
        for index, T in enumerate(scale.lengths):
            others = (("tanh", True), ("none", False)) if scale.more and not index else ()
            for form, bias in (("tanh", False), *others):
                shape = {"B": scale.B, "T": T, "C": 4 * scale.width, "gelu": form, "bias": bias}
                yield Cell("activation", mode, scale.dtype, shape)


def task(cell: Cell, settings: Settings) -> Task:
    B, T, C, form = (cell.shape[name] for name in ("B", "T", "C", "gelu"))
    inputs = [draw(cell, settings, B * T, C), *([draw(cell, settings, C)] if cell.shape["bias"] else [])]

    def fused(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return gelu(x, bias=bias, approximate=form, backend=ours(settings))

    def eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate=form)

    def formula(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return gelu_reference(x, bias=bias, approximate=form)

    def geglu() -> Call:
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return lambda x: LigerGELUMulFunction.apply(x, x.new_ones(()).expand_as(x))

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        table = {
            "torch eager": lambda: eager,
            "formula": lambda: formula,
            "torch.compile": compiled(eager),
            "gptfast": lambda: fused,
        }
        if form == "tanh" and not cell.shape["bias"]:
            table["Liger, times one"] = liger(geglu)
        return table

    passes = 3 if cell.mode == "backward" else 2
    moved = passes * DTYPES[cell.dtype].itemsize * B * T * C
    return compare(cell, settings, functions, inputs, formula, moved=moved, tokens=B * T)
