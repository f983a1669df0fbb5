"""linear_gelu at GPT-1's 768 -> 3072 against cuBLAS with our GELU, its own epilogue, and torch.compile. Not run yet.

FLOPs: 2 M N K forward, 4 M N K backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.op import Call, compare, compiled, draw
from gptfast_kernels import gelu, linear_gelu


def cells() -> Iterator[dict[str, Any]]:
    """The packed training batch first, then fewer rows, down to one token, and wider models."""
    for M, K, N in ((32768, 768, 3072), (4096, 768, 3072), (512, 768, 3072), (1, 768, 3072), (16384, 1600, 6400)):
        for direction in ("forward", "both"):
            yield {"M": M, "K": K, "N": N, "direction": direction}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    M, K, N = cell["M"], cell["K"], cell["N"]
    inputs = [draw(M, K), draw(N, K, std=K**-0.5), draw(N)]

    def ours(x, weight, bias):
        return linear_gelu(x, weight, bias, backend="triton")

    def eager(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def separate(x, weight, bias):
        return gelu(F.linear(x, weight), bias=bias, backend="triton")

    contenders: dict[str, Call] = {
        "gptfast": ours,
        "eager": eager,
        "matmul, gptfast gelu": separate,
        "compile": compiled(eager),
    }
    if cell["direction"] == "forward":  # it has no gradient
        contenders["cublas epilogue"] = lambda x, w, b: torch._addmm_activation(b, x, w.t(), use_gelu=True)
    return compare(cell, contenders, inputs, flops=(2 if cell["direction"] == "forward" else 6) * M * N * K)
