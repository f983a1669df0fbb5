"""linear_gelu: what its kernel compiles to, and what its tests must notice."""

import torch

from gptfast_kernels import projection
from tests.support.compile_gate import Case, Expect, Sweep
from tests.support.mutants import Mutant


def run(dtype: torch.dtype, *, approximate: str = "tanh", conv1d: bool = False, want_z: bool = True, M: int = 256):
    x = torch.empty(M, 768, dtype=dtype)
    weight = torch.empty(768, 3072, dtype=dtype).t() if conv1d else torch.empty(3072, 768, dtype=dtype)
    projection._forward(x, weight, torch.empty(3072, dtype=dtype), approximate, want_z)


def half(target: str):
    return {"_linear_gelu_kernel": Expect(matrix=True)}


def single(target: str):  # IEEE float32 has no matrix instruction on CUDA
    return {"_linear_gelu_kernel": Expect(matrix=False, registers=176, blocks=2)}


CASES = [
    Case("bfloat16", lambda: run(torch.bfloat16), half),
    Case("bfloat16 conv1d exact", lambda: run(torch.bfloat16, approximate="none", conv1d=True), half),
    Case("float32", lambda: run(torch.float32), single),
]
SWEEPS = [
    Sweep("rows 1 to 512", lambda M: run(torch.bfloat16, M=M), range(1, 513), {"_linear_gelu_kernel": 1}),
]


def mutant(name: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, "kernels/gptfast_kernels/projection.py", old, new, f"tests/test_projection.py -k '{tests}'")


MUTANTS = [
    mutant("strides of weight", "n[None, :] * stride_wn", "n[None, :] * K", "each_layout"),
    mutant("stride of x", "m[:, None] * stride_x", "m[:, None] * K", "each_layout"),
    mutant("last step of k", "(k[None, :] < K - start)", "(k[None, :] < K)", "no_worse"),
    mutant("64-bit rows", "tl.arange(0, BLOCK_M).to(tl.int64)", "tl.arange(0, BLOCK_M)", "beyond_two_gigabytes"),
    mutant("64-bit steps", "tl.full([], BLOCK_K, tl.int64) * stride_wk", "BLOCK_K * stride_wk", "beyond_two_gigabytes"),
    mutant("IEEE float32", "PRECISION=_triton.dot_precision()", 'PRECISION="tf32"', "tf32"),
    mutant(
        "ragged group of rows",
        "% (GROUP * across) // group_rows",
        "% (GROUP * across) // GROUP",
        "no_worse or each_layout",
    ),
    mutant("bias", "z += tl.load(Bias + n", "z += 0 * tl.load(Bias + n", "no_worse"),
    mutant(
        "what backward reads", "tl.store(Z + out, z, mask=mask)", "tl.store(Z + out, z * 0.5, mask=mask)", "no_worse"
    ),
]
