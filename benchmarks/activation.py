"""GELU, with and without a bias, against PyTorch eager and compiled, and Liger. Not run yet.

Bytes: forward reads x and writes y; backward reads dy and x and writes dx.
"""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F

from benchmarks.op import LIGER, Call, compare, compiled, draw
from gptfast_kernels import gelu

ROWS, WIDTH = 32768, 3072


def cells() -> Iterator[dict[str, Any]]:
    for approximate in ("tanh", "none"):
        for bias in (False, True):
            for direction in ("forward", "backward"):
                yield {"M": ROWS, "C": WIDTH, "approximate": approximate, "bias": bias, "direction": direction}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    M, C, approximate = cell["M"], cell["C"], cell["approximate"]
    inputs = [draw(M, C), *([draw(C)] if cell["bias"] else [])]

    def ours(x, bias=None):
        return gelu(x, bias=bias, approximate=approximate, backend="triton")

    def eager(x, bias=None):
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    contenders: dict[str, Call] = {"gptfast": ours, "eager": eager, "compile": compiled(eager)}
    if LIGER and approximate == "tanh" and not cell["bias"]:
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        contenders["liger (times one)"] = lambda x: LigerGELUMulFunction.apply(x, x.new_ones(()).expand_as(x))
    return compare(cell, contenders, inputs, moved=(2 if cell["direction"] == "forward" else 3) * 2 * M * C)
