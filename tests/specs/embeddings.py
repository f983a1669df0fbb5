"""Embeddings: what the kernels compile to, and what the tests must notice."""

import torch

from gptfast_kernels import embeddings
from tests.support.compile_gate import Case, Expect, Sweep
from tests.support.mutants import Mutant

KERNELS = {
    "_embedding_forward_kernel": Expect(matrix=False, registers=112, blocks=4),
    "_embedding_gather_kernel": Expect(matrix=False, registers=72, blocks=7),
    "_embedding_join_kernel": Expect(matrix=False, registers=40, blocks=8),
}


def run(dtype: torch.dtype, *, dropout_p: float = 0.0, T: int = 64) -> None:
    ids = torch.zeros(2, T, dtype=torch.int64)
    token_weight, position_weight = torch.empty(100, 768, dtype=dtype), torch.empty(512, 768, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    y = embeddings._forward(ids, token_weight, position_weight, None, ids, seed, dropout_p)
    embeddings._backward(y, ids.flatten(), ids.flatten(), seed, dropout_p, 100, dtype)


CASES = [
    Case("bfloat16 dropout", lambda: run(torch.bfloat16, dropout_p=0.1), lambda target: KERNELS),
    Case("float32", lambda: run(torch.float32), lambda target: KERNELS),
]
SWEEPS = [
    Sweep("T 1 to 512", lambda T: run(torch.bfloat16, T=T), range(1, 513), dict.fromkeys(KERNELS, 1)),
]


def mutant(name: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, "kernels/gptfast_kernels/embeddings.py", old, new, f"tests/test_embeddings.py -k '{tests}'")


MUTANTS = [
    mutant("positions repeat", "position = row % T", "position = row * 0", "no_worse"),
    mutant("ids out of range", "mask=mask & inside", "mask=mask", "not_read"),
    mutant(
        "sum that ends a chunk",
        "ends = (n < R) & ((goes_on == 0) | (i == CHUNK - 1))",
        "ends = (n < R) & (goes_on == 0)",
        "runs_of",
    ),
    mutant(
        "second chunk of a run",
        "range(chunk + 1, tl.cdiv(end, CHUNK))",
        "range(chunk + 2, tl.cdiv(end, CHUNK))",
        "no_worse",
    ),
    mutant("tail of a run", "total = tl.load(Tail + chunk * N", "total = 0 * tl.load(Tail + chunk * N", "no_worse"),
    mutant(
        "dropout of the row looked up",
        "row + tl.zeros([1, 1], tl.int64)",
        "n + tl.zeros([1, 1], tl.int64)",
        "mask_of_the_seed",
    ),
    mutant(
        "token types",
        "y += _load_rows(TokenWeight, types,",
        "y += 0 * _load_rows(TokenWeight, types,",
        "positions_and_types",
    ),
    mutant("order of positions", "order.movedim(-1, 0).flatten()", "order.flatten()", "no_worse"),
    mutant("order of dy", "row = tl.load(Order + n, mask=n < R, other=0) % M", "row = n % M", "no_worse"),
]
