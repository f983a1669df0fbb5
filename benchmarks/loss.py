"""The tied LM head and its loss against all logits, eager and compiled, and Liger, in time and in memory. Not run yet.

FLOPs: 2 N V C forward, 4 N V C backward; what is recomputed does not count.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.op import LIGER, Call, compare, compiled, draw
from gptfast_kernels import linear_cross_entropy

V, C = 40478, 768


def cells() -> Iterator[dict[str, Any]]:
    for N in (32768, 8192, 2048):
        for direction in ("both", "forward"):
            yield {"N": N, "V": V, "C": C, "direction": direction}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    N = cell["N"]
    target = torch.randint(V, (N,), device="cuda")

    def ours(hidden, weight):
        return linear_cross_entropy(hidden, weight, target, backend="triton")

    def chunked(hidden, weight):
        return linear_cross_entropy(hidden, weight, target, backend="torch")

    def eager(hidden, weight):
        return F.cross_entropy((hidden @ weight.t()).float(), target)

    contenders: dict[str, Call] = {
        "gptfast": ours,
        "eager": eager,
        "gptfast's torch backend": chunked,
        "compile": compiled(eager),
    }
    if LIGER:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        contenders["liger"] = lambda hidden, weight: Liger.apply(hidden, weight, target)[0]
    flops = (2 if cell["direction"] == "forward" else 6) * N * V * C
    return compare(cell, contenders, [draw(N, C), draw(V, C, std=0.02)], flops=flops)
