"""The embeddings of 64 texts of 512 tokens against PyTorch eager and compiled. Not run yet.

Bytes: forward reads a row of the token table a token and writes y; backward reads dy twice (tokens, positions) and
writes both tables' gradients. Ids are drawn as words are: the n-th most frequent with a probability of about 1/n.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.op import compare, compiled, draw
from gptfast_kernels import embedding

B, T, V, C = 64, 512, 40478, 768


def cells() -> Iterator[dict[str, Any]]:
    for dropout_p in (0.0, 0.1):
        for direction in ("forward", "backward"):
            yield {"B": B, "T": T, "V": V, "C": C, "dropout_p": dropout_p, "direction": direction}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    p = cell["dropout_p"]
    ids = torch.multinomial(1 / torch.arange(1, V + 1, device="cuda"), B * T, replacement=True).view(B, T)

    def ours(tokens, positions):
        return embedding(ids, tokens, positions, dropout_p=p, backend="triton")

    def eager(tokens, positions):
        return F.dropout(F.embedding(ids, tokens) + positions[:T], p)

    moved = 2 * C * (2 * B * T if cell["direction"] == "forward" else 2 * B * T + V + T)
    contenders = {"gptfast": ours, "eager": eager, "compile": compiled(eager)}
    return compare(cell, contenders, [draw(V, C), draw(T, C)], moved=moved)
