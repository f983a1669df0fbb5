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
MUTANTS: list[Mutant] = []
