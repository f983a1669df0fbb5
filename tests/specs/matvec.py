"""gemv: what its kernel compiles to, and what its tests must notice."""

import torch

from gptfast_kernels import matvec
from tests.support.compile_gate import Case, Expect, Sweep
from tests.support.mutants import Mutant

BF16, FP32 = torch.bfloat16, torch.float32


def run(dtype: torch.dtype, K: int, N: int, *, M=1, conv1d=True, norm=False, approximate=None, residual=False) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    weight = empty(K, N).t() if conv1d else empty(N, K)
    around = (empty(K), empty(K), 1e-5) if norm else (None, None, None)
    matvec._launch(
        empty(M, K), weight, empty(N) if conv1d else None, *around, approximate, empty(M, N) if residual else None
    )


def expect(target: str, registers: int = 128, blocks: int = 2):
    return {"_gemv_kernel": Expect(matrix=False, registers=registers, blocks=blocks)}


CASES = [
    Case("qkv", lambda: run(BF16, 768, 2304, norm=True), expect),
    Case("projection", lambda: run(BF16, 768, 768, residual=True), expect),
    Case("gelu", lambda: run(BF16, 768, 3072, norm=True, approximate="tanh"), expect),
    Case("last projection", lambda: run(BF16, 3072, 768, residual=True), expect),
    Case("head", lambda: run(BF16, 768, 40478, conv1d=False), expect),
    Case("wide", lambda: run(BF16, 1600, 6400, norm=True, approximate="tanh"), lambda target: expect(target, 255, 1)),
    Case("gelu float32", lambda: run(FP32, 768, 3072, norm=True, approximate="none"), expect),
    Case("last projection float32", lambda: run(FP32, 3072, 768, residual=True), expect),
]
SWEEPS = [Sweep("rows 1 to 4", lambda M: run(BF16, 768, 2304, M=M), range(1, 5), {"_gemv_kernel": 1})]


def mutant(name: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, "kernels/gptfast_kernels/matvec.py", old, new, f"tests/test_matvec.py -k '{tests}'")


MUTANTS = [
    mutant("strides of weight", "n[None, :] * stride_wn", "n[None, :] * K", "any_layout"),
    mutant("stride of x", "X += row * stride_x", "X += row * K", "any_layout"),
    mutant("stride of residual", "row * stride_residual + n", "row * N + n", "any_layout"),
    mutant("64-bit rows of weight", "tile.to(tl.int64) * BLOCK_N", "tile * BLOCK_N", "two_gigabytes"),
    mutant("64-bit columns of weight", "k.to(tl.int64)[:, None]", "k[:, None]", "two_gigabytes"),
    mutant("steps of k", "NormBias, start + BLOCK_K, n", "NormBias, start, n", "no_worse"),
    mutant("mean in two steps", "x = (x - about - rest) * rstd", "x = (x - about) * rstd", "far_above"),
    mutant("columns of a norm", "tl.where(column < K, u - about, 0.0)", "u - about", "no_worse"),
    mutant("rows of weight", "mask=inside[:, None] & (n < N)[None, :]", "mask=(n < N)[None, :]", "no_worse"),
    mutant("norm's weight", "rstd * scale + shift", "rstd + shift", "no_worse"),
    mutant("eps", "rest * rest + eps", "rest * rest", "no_worse"),
    mutant("n of every row", "tl.store(Normed + row * K", "tl.store(Normed + 0 * K", "no_worse"),
    mutant("n where there is no y", "max(1, triton.cdiv(N, block))", "triton.cdiv(N, block)", "nothing"),
    mutant("GELU before the residual", "y = gelu_of(y, ", "y = gelu_of(y + residual, ", "each_activation"),
    mutant("bias", "tl.sum(products, 0) + bias", "tl.sum(products, 0)", "no_worse"),
]
