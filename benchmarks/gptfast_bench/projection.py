"""linear_gelu, a block's first projection, against PyTorch eager and compiled, and a fused epilogue where there is one.

FLOPs: 2 M N K forward, 6 M N K with backward. Bytes: x, the weight and y once each; backward twice as much again.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast_kernels import gelu, linear_gelu
from gptfast_kernels.projection import linear_gelu_reference

from .harness import DTYPES, Cell, Scale, Settings, Task, need_gpu
from .op import Call, compare, compiled, draw, max_autotune, ours


def cells(scale: Scale) -> Iterator[Cell]:
    """GPT-1's width; then one token, and a wider model."""
    for mode in ("both" if mode == "backward" else mode for mode in scale.modes):
        for T in scale.lengths:
            yield Cell("projection", mode, scale.dtype, {"B": scale.B, "T": T, "K": scale.width, "N": 4 * scale.width})
        if scale.more:
            for B, T, K in ((1, 1, scale.width), (32, 512, 1600)):
                yield Cell("projection", mode, scale.dtype, {"B": B, "T": T, "K": K, "N": 4 * K})


def task(cell: Cell, settings: Settings) -> Task:
    K, N = cell.shape["K"], cell.shape["N"]
    M = cell.shape["B"] * cell.shape["T"]
    inputs = [draw(cell, settings, M, K), draw(cell, settings, N, K, std=K**-0.5), draw(cell, settings, N)]

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gelu(x, weight, bias, backend=ours(settings))

    def separate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gelu(F.linear(x, weight), bias=bias, backend=ours(settings))

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def epilogue() -> Call:
        need_gpu(settings.device, "cuBLAS")
        return lambda x, weight, bias: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        table: dict[str, Callable[[], Call]] = {
            "torch eager": lambda: eager,
            "formula": lambda: linear_gelu_reference,
            "torch.compile": compiled(eager),
            "torch.compile max-autotune": max_autotune(settings, eager),
            "gptfast": lambda: fused,
            "matmul, gptfast gelu": lambda: separate,
        }
        return table | {"cuBLAS epilogue": epilogue} if cell.mode == "forward" else table  # it has no gradient

    fold = 1 if cell.mode == "forward" else 3
    moved = fold * DTYPES[cell.dtype].itemsize * (M * K + N * K + M * N)
    return compare(
        cell,
        settings,
        functions,
        inputs,
        linear_gelu_reference,
        moved=moved,
        flops=fold * 2 * M * N * K,
        tokens=M,
    )
