"""linear_cross_entropy: what its kernel compiles to, and what its tests must notice."""

import torch

from gptfast_kernels import loss
from tests.support.compile_gate import Case, Expect, Sweep
from tests.support.mutants import Mutant

KERNELS = {"_cross_entropy_kernel": Expect(matrix=False, registers=96, blocks=2)}


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


def mutant(name: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, "kernels/gptfast_kernels/loss.py", old, new, f"tests/test_loss.py -k '{tests}'")


MUTANTS = [
    mutant(
        "one at the target",
        "tl.where(column == target, 1.0, 0.0)",
        "tl.where(column == target, 0.0, 0.0)",
        "no_worse and triton",
    ),
    mutant("ignored rows", "tl.where(counts, dz * dloss, 0.0)", "dz * dloss", "do_not_count"),
    mutant("ignored rows in torch", "torch.where(counts, dloss, 0.0)[:, None]", "dloss[:, None]", "do_not_count"),
    mutant(
        "largest logit", "higher = tl.maximum(most, tl.max(z, 0))", "higher = tl.maximum(most, 0.0)", "large_logits"
    ),
    mutant("blocks of -inf", "most = -3.4e38", 'most = -float("inf")', "cannot_come"),
    mutant("rescaled sum", "total * tl.exp(most - higher)", "total * 1.0", "no_worse and triton"),
    mutant("padded rows of logits", "Z += row * stride_z", "Z += row * V", "no_worse and triton"),
    mutant(
        "shift",
        "target[..., 1:], (0, min(1, target.shape[-1]))",
        "target[..., :-1], (min(1, target.shape[-1]), 0)",
        "shift_is",
    ),
    mutant("mean of nothing", "torch.where(n > 0, total / n.clamp(min=1), torch.nan)", "total / n", "nothing_counts"),
    mutant("incoming gradient", "[grad * dtotal for grad", "[grad for grad", "scaled"),
    mutant("chunks add up", "        total.addmm_(a, b)", "        total.copy_(a @ b)", "no_worse"),
]
