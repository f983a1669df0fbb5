"""LayerNorm, alone and behind a residual and dropout, against PyTorch eager and compiled, and Liger.

Bytes: forward reads x (and residual) and writes y; backward reads dy and x (and residual) and writes dx (and dresidual,
where dropout makes it another).
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from gptfast_kernels import layer_norm
from gptfast_kernels.normalization import layer_norm_reference

from .harness import DTYPES, Cell, Scale, Settings, Task
from .op import Call, compare, compiled, draw, liger, ours

OTHER_WIDTHS = (256, 1024, 1600, 4096, 8192)


def cells(scale: Scale) -> Iterator[Cell]:
    """GPT-1's post-norm block first; then LayerNorm alone, dropout and other widths."""
    for mode in scale.modes:
        for index, T in enumerate(scale.lengths):
            forms = [(scale.width, True, 0.0)]
            if scale.more and not index:
                forms += [(scale.width, False, 0.0), (scale.width, True, 0.1), *((C, True, 0.0) for C in OTHER_WIDTHS)]
            for C, residual, dropout_p in forms:
                shape = {"B": scale.B, "T": T, "C": C, "residual": residual, "dropout_p": dropout_p}
                yield Cell("normalization", mode, scale.dtype, shape)


def task(cell: Cell, settings: Settings) -> Task:
    B, T, C, has_residual = (cell.shape[name] for name in ("B", "T", "C", "residual"))
    inputs = [draw(cell, settings, B * T, C), draw(cell, settings, C), draw(cell, settings, C)]
    inputs += [draw(cell, settings, B * T, C)] if has_residual else []

    def formula(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return layer_norm_reference(x, weight, bias, residual=residual)[0]

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
            out = layer_norm(x, weight, bias, residual=residual, dropout_p=p, backend=ours(settings))
            assert isinstance(out, Tensor)
            return out

        def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
            u = F.dropout(x, p) if p else x
            return F.layer_norm(u if residual is None else residual + u, (C,), weight, bias)

        def ligers() -> Call:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)

        table: dict[str, Callable[[], Call]] = {
            "torch eager": lambda: eager,
            "formula": lambda: formula,
            "torch.compile": compiled(eager),
            "gptfast": lambda: fused,
        }
        return table if has_residual else table | {"Liger": liger(ligers)}

    passes = 2 + has_residual
    if cell.mode == "backward":
        passes = 3 + has_residual + (cell.shape["dropout_p"] > 0)
    moved = passes * DTYPES[cell.dtype].itemsize * B * T * C
    return compare(cell, settings, functions, inputs, formula, moved=moved, tokens=B * T)
