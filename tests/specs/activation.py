"""GELU: what its kernels compile to, and what its tests must notice."""

import torch

from gptfast_kernels import activation
from tests.support.compile_gate import Case, Expect, Sweep
from tests.support.mutants import Mutant

KERNELS = {
    "_gelu_forward_kernel": Expect(matrix=False, registers=80, blocks=6),
    "_gelu_backward_kernel": Expect(matrix=False, registers=80, blocks=6),
}


def run(approximate: str, dtype: torch.dtype, *, bias: bool, M: int = 64) -> None:
    x, b = torch.empty(M, 3072, dtype=dtype), torch.empty(3072) if bias else None
    activation._forward(x, b, approximate)
    activation._backward(x, x, b, approximate, bias)


CASES = [
    Case("tanh bfloat16", lambda: run("tanh", torch.bfloat16, bias=False), lambda target: KERNELS),
    Case("tanh bfloat16 bias", lambda: run("tanh", torch.bfloat16, bias=True), lambda target: KERNELS),
    Case("exact float32 bias", lambda: run("none", torch.float32, bias=True), lambda target: KERNELS),
]
SWEEPS = [
    Sweep(
        "rows 1 to 512",
        lambda M: run("tanh", torch.bfloat16, bias=True, M=M),
        range(1, 513),
        {"_gelu_forward_kernel": 2, "_gelu_backward_kernel": 2},  # one row is worked on as no rows
    ),
]


def mutant(name: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, "kernels/gptfast_kernels/activation.py", old, new, f"tests/test_activation.py -k '{tests}'")


MUTANTS = [
    mutant(
        "bias", "        x += tl.load(Bias + column", "        x += 0 * tl.load(Bias + column", "no_worse and shape3"
    ),
    mutant(
        "stride of x",
        "                M,\n                N,\n                x.stride(0),",
        "                M,\n                N,\n                N,",
        "each_layout",
    ),
    mutant("stride of dy", "                dy.stride(0),", "                N,", "each_layout"),
    mutant(
        "64-bit rows",
        "row = ((program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]",
        "row = ((program // across) * ROWS + tl.arange(0, ROWS))[:, None]",
        "beyond_two_gigabytes",
    ),
    mutant("clamp before the cube", "x = tl.minimum(tl.maximum(x, -64.0), 64.0)", "x = x * 1.0", "extremes"),
    mutant("sign of z", "tl.where(z2 >= 0, r, e * r)", "r", "no_worse and shape2"),
    mutant("slope of z", "0.134145", "0.044715", "no_worse and shape2"),
    mutant("normal density", "gauss * 0.3989422804014327", "gauss * 0.5", "no_worse and shape2"),
    mutant("tail", "tl.where(x < 0, tail, 1 - tail)", "1 - tl.where(x < 0, 1 - tail, tail)", "relatively_accurate"),
    mutant(
        "parts' sums kept apart", "DBias + part.to(tl.int64) * N", "DBias + 0 * N", "no_worse and (shape4 or shape6)"
    ),
]
