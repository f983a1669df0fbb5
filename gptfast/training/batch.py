"""A step's worth of sequences, padded to a rectangle or laid end to end.

Shapes: R sequences, T positions, E examples, S sequences an example (choices, or orders of a pair).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a target that is not counted


@dataclass
class Batch:
    """What one forward and backward pass takes."""

    input_ids: Tensor  # int64 [R, T], or [1, total] where packed
    targets: Tensor  # int64, input_ids' shape: the token behind each, IGNORE where none is predicted
    tokens: int  # targets counted in the whole step, of which this may be a part
    source: str  # where it comes from, for error messages
    cu_seqlens: Tensor | None = None  # int32 [R + 1], where each packed sequence starts, and the total
    position_ids: Tensor | None = None  # int64 [1, total], packed only
    max_seqlen: int = 0  # packed only
    extract: Tensor | None = None  # int64 [E, S], where in the flattened positions the task's tokens stand
    labels: Tensor | None = None  # int64 [E] classes or right choices, or float32 [E] values
    examples: int = 0  # in the whole step

    def to(self, device: torch.device) -> "Batch":
        """On ``device``; to a GPU by way of pinned memory, so that the copy overlaps what runs there."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            f.name: value.pin_memory().to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def collate(sequences: Sequence[Sequence[int]], *, packed: bool) -> tuple[dict, Tensor]:
    """Token ids as the fields of a Batch, and the flat position of each sequence's last token, int64 [R].

    Padded on the right, where a causal model looks at no padding, so that no mask is needed.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    if packed:
        ids = torch.tensor(list(itertools.chain.from_iterable(sequences)))
        ends = lengths.cumsum(0)
        targets = ids.roll(-1)
        targets[ends - 1] = IGNORE
        return {
            "input_ids": ids[None],
            "targets": targets[None],
            "cu_seqlens": torch.cat([ends.new_zeros(1), ends]).int(),
            "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            "max_seqlen": int(lengths.max()),
        }, ends - 1
    R, T = len(sequences), int(lengths.max())
    ids, targets = torch.zeros(R, T, dtype=torch.int64), torch.full((R, T), IGNORE)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        targets[row, : len(sequence) - 1] = ids[row, 1 : len(sequence)]
    return {"input_ids": ids, "targets": targets}, torch.arange(R) * T + lengths - 1


def shuffled(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """int64 [batch_size]: which of n examples step ``step`` takes, in a new order each epoch."""
    epoch, batch = divmod(step, n // batch_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[batch * batch_size : (batch + 1) * batch_size]


def share(indices: Tensor, part: int, parts: int) -> Tensor:
    """The part-th of ``parts`` nearly equal runs of ``indices``."""
    return indices.tensor_split(parts)[part]
