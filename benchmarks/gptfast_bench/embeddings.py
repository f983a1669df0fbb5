"""Token and position embeddings against PyTorch eager and compiled.

Bytes: forward reads a row of the token table a token and writes y; backward reads dy twice (tokens, positions) and
writes both tables' gradients. Ids are drawn as words are: the n-th most frequent with a probability of about 1/n.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast_kernels import embedding
from gptfast_kernels.embeddings import embedding_reference

from .harness import DTYPES, Cell, Scale, Settings, Task
from .op import Call, compare, compiled, draw, ours


def cells(scale: Scale) -> Iterator[Cell]:
    """Without dropout, then with GPT-1's."""
    for mode in scale.modes:
        for index, T in enumerate(scale.lengths):
            for dropout_p in (0.0, 0.1) if scale.more and not index else (0.0,):
                shape = {"B": scale.B, "T": T, "V": scale.vocab, "C": scale.width, "dropout_p": dropout_p}
                yield Cell("embeddings", mode, scale.dtype, shape)


def task(cell: Cell, settings: Settings) -> Task:
    B, T, V, C = (cell.shape[name] for name in "BTVC")
    frequency = 1 / torch.arange(1, V + 1, device=settings.device)
    ids = torch.multinomial(frequency, B * T, replacement=True).view(B, T)

    def formula(tokens: Tensor, positions: Tensor) -> Tensor:
        return embedding_reference(ids, tokens, positions)

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        def fused(tokens: Tensor, positions: Tensor) -> Tensor:
            return embedding(ids, tokens, positions, dropout_p=p, backend=ours(settings))

        def eager(tokens: Tensor, positions: Tensor) -> Tensor:
            return F.dropout(F.embedding(ids, tokens) + positions[:T], p, training=p > 0)

        return {"torch eager": lambda: eager, "torch.compile": compiled(eager), "gptfast": lambda: fused}

    elements = 2 * B * T * C if cell.mode == "forward" else (2 * B * T + V + T) * C
    inputs = [draw(cell, settings, V, C), draw(cell, settings, T, C)]
    moved = DTYPES[cell.dtype].itemsize * elements
    return compare(cell, settings, functions, inputs, formula, moved=moved, tokens=B * T)
