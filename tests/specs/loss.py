"""linear_cross_entropy: what its kernel compiles to, and what its tests must notice."""

import torch

from gptfast_kernels import loss
from tests.support.compile_gate import Case, Expect, Sweep
from tests.support.mutants import Mutant

KERNELS = {"_cross_entropy_kernel": Expect(matrix=False)}


def run(dtype: torch.dtype, *, gradient: bool, n: int = 4) -> None:
    z = torch.empty(n, 40512, dtype=dtype)[:, :40478]
    loss._rows_triton(z, torch.zeros(n, dtype=torch.int64), torch.empty(n) if gradient else None, -100)


CASES = [
    Case("bfloat16 gradient", lambda: run(torch.bfloat16, gradient=True), lambda target: KERNELS),
    Case("bfloat16", lambda: run(torch.bfloat16, gradient=False), lambda target: KERNELS),
    Case("float32 gradient", lambda: run(torch.float32, gradient=True), lambda target: KERNELS),
]
SWEEPS = [
    Sweep(
        "rows 1 to 512",
        lambda n: run(torch.bfloat16, gradient=True, n=n),
        range(1, 513),
        {"_cross_entropy_kernel": 1},
    ),
]
MUTANTS: list[Mutant] = []
