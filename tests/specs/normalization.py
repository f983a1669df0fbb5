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
    saved, after = (u, None) if prenorm else (x, residual)
    du, apart = dy if prenorm else None, dtype if dropout_p else None
    normalization._backward(
        dy, du, saved, after, weight, seed, statistics, dropout_p, prenorm, dtype, apart, True, True
    )


KERNELS = {
    "_layer_norm_forward_kernel": Expect(matrix=False, registers=128, blocks=2),
    "_layer_norm_backward_kernel": Expect(matrix=False, registers=104, blocks=2),
}


def case(name: str, width: int, dtype: torch.dtype, **how) -> Case:
    return Case(name, lambda: run(width, dtype, **how), lambda target: KERNELS)


CASES = [
    case("768 bfloat16", 768, torch.bfloat16),
    case("768 bfloat16 dropout", 768, torch.bfloat16, dropout_p=0.1),
    case("768 bfloat16 prenorm", 768, torch.bfloat16, prenorm=True),
    case("768 float32 dropout", 768, torch.float32, dropout_p=0.1),
    case("1600 bfloat16 dropout", 1600, torch.bfloat16, dropout_p=0.1),
    case("16384 bfloat16 dropout", 16384, torch.bfloat16, dropout_p=0.1),
    case("16384 float32 dropout", 16384, torch.float32, dropout_p=0.1),
]
SWEEPS: list[Sweep] = [
    Sweep(
        "rows 1 to 512",
        lambda M: run(768, torch.bfloat16, M=M),
        range(1, 513),
        {"_layer_norm_forward_kernel": 1, "_layer_norm_backward_kernel": 1},
    )
]


def mutant(name: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(
        name, "kernels/gptfast_kernels/normalization.py", old, new, f"tests/test_normalization.py -k '{tests}'"
    )


MUTANTS = [
    mutant(
        "stride of x",
        "                M,\n                x.stride(0),",
        "                M,\n                N,",
        "each_layout",
    ),
    mutant("stride of dy", "                dy.stride(0),", "                N,", "each_layout"),
    mutant("64-bit rows", "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", "beyond_two_gigabytes"),
    mutant("second step of the mean", "y = (u - about - rest) * rstd", "y = (u - about) * rstd", "far_above"),
    mutant("second step in backward", "xhat = (u - mean) * rstd - shift", "xhat = (u - mean) * rstd", "far_above"),
    mutant(
        "columns beyond the row", "d = tl.where(column < N, u - about, 0.0)", "d = u - about", "no_worse and shape3"
    ),
    mutant("eps", "rest * rest + eps)", "rest * rest)", "zero_variance"),
    mutant(
        "dropout drawn twice for a saved u",
        "read_seed = None if SAVED_U else Seed",
        "read_seed = Seed",
        "mask_of_the_seed",
    ),
    mutant(
        "dropout of dx",
        "                du = _drop(du, Seed, row, start, dropout_p, BLOCK)",
        "                du = du * 1.0",
        "mask_of_the_seed",
    ),
    mutant("gradient of u", "du += tl.load(DU", "du += 0 * tl.load(DU", "no_worse and shape3"),
    mutant(
        "programs' sums kept apart",
        "partial = program.to(tl.int64) * N + columns",
        "partial = 0 * N + columns",
        "no_worse and shape1",
    ),
    mutant(
        "sums of wide rows added up",
        "tl.load(DWeight + partial, mask=column < N, other=0.0) + tl.sum",
        "0 * tl.load(DWeight + partial, mask=column < N, other=0.0) + tl.sum",
        "several_tiles",
    ),
]
