"""LayerNorm: what its kernels compile to, and what its tests must notice."""

import torch

from gptfast_kernels import normalization
from tests.support.compile_gate import Case, Expect, Sweep
from tests.support.mutants import Mutant


def run(width: int, dtype: torch.dtype, *, dropout_p: float = 0.0, prenorm: bool = False, M: int = 64) -> None:
    x, residual, dy = (torch.empty(M, width, dtype=dtype) for _ in range(3))
    weight, bias = torch.empty(2, width)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    _, u, statistics = normalization._forward(x, residual, weight, bias, seed, dropout_p, 1e-5, prenorm, dtype)
    saved = (u, None) if prenorm else (x, residual)
    normalization._backward(
        dy, dy if prenorm else None, *saved, weight, seed, statistics, dropout_p, prenorm,
        dtype, dtype if dropout_p else None, True, True,
    )  # fmt: skip


def case(name: str, width: int, dtype: torch.dtype, forward: Expect, backward: Expect, **how) -> Case:
    kernels = {"_layer_norm_forward_kernel": forward, "_layer_norm_backward_kernel": backward}
    return Case(name, lambda: run(width, dtype, **how), lambda target: kernels)


def memory_bound(registers: int = 255, blocks: int = 1) -> Expect:
    return Expect(matrix=False, registers=registers, blocks=blocks)


CASES = [
    case("768 bfloat16", 768, torch.bfloat16, memory_bound(), memory_bound()),
    case("768 bfloat16 dropout", 768, torch.bfloat16, memory_bound(), memory_bound(), dropout_p=0.1),
    case("768 bfloat16 prenorm", 768, torch.bfloat16, memory_bound(), memory_bound(), prenorm=True),
    case("768 float32 dropout", 768, torch.float32, memory_bound(), memory_bound(), dropout_p=0.1),
    case("1600 bfloat16 dropout", 1600, torch.bfloat16, memory_bound(), memory_bound(), dropout_p=0.1),
    case("16384 bfloat16 dropout", 16384, torch.bfloat16, memory_bound(), memory_bound(), dropout_p=0.1),
    case("16384 float32 dropout", 16384, torch.float32, memory_bound(), memory_bound(), dropout_p=0.1),
]
SWEEPS: list[Sweep] = [
    Sweep(
        "rows 1 to 512",
        lambda M: run(768, torch.bfloat16, M=M),
        range(1, 513),
        {"_layer_norm_forward_kernel": 1, "_layer_norm_backward_kernel": 1},
    )
]
MUTANTS: list[Mutant] = []
