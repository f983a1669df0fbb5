"""LayerNorm, alone and behind a residual and dropout, against PyTorch eager and compiled, and Liger. Not run yet.

Bytes: forward reads x (and residual) and writes y; backward reads dy and x (and residual) and writes dx (and dresidual,
where dropout makes it another).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.op import LIGER, Call, compare, compiled, draw
from gptfast_kernels import layer_norm

ROWS, WIDTHS = 32768, (768, 256, 1024, 1600, 4096, 8192)


def cells() -> Iterator[dict[str, Any]]:
    """GPT-1's width first: LayerNorm alone, then its post-norm block with and without dropout; then other widths."""
    for C in WIDTHS:
        for residual, dropout_p in ((False, 0.0), (True, 0.0), (True, 0.1)):
            for direction in ("forward", "backward"):
                yield {"M": ROWS, "C": C, "residual": residual, "dropout_p": dropout_p, "direction": direction}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    M, C, p = cell["M"], cell["C"], cell["dropout_p"]
    inputs = [draw(M, C), draw(C, dtype=torch.bfloat16), draw(C, dtype=torch.bfloat16)]
    if cell["residual"]:
        inputs.append(draw(M, C))

    def ours(x, weight, bias, residual=None):
        return layer_norm(x, weight, bias, residual=residual, dropout_p=p, backend="triton")

    def eager(x, weight, bias, residual=None):
        u = F.dropout(x, p) if p else x
        return F.layer_norm(u if residual is None else residual + u, (C,), weight, bias)

    contenders: dict[str, Call] = {"gptfast": ours, "eager": eager, "compile": compiled(eager)}
    if LIGER and not cell["residual"]:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        contenders["liger"] = lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
    passes = 2 + cell["residual"]
    if cell["direction"] == "backward":
        passes = 3 + cell["residual"] + (p > 0)
    return compare(cell, contenders, inputs, moved=passes * 2 * M * C)
