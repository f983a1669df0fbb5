"""Plain text to pre-train on: files, what is held out of them, and windows of their tokens."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .batch import Batch, share


def read_texts(files: Sequence[str | os.PathLike]) -> list[str]:
    """The files' contents. OSError: one is missing. ValueError: one is not UTF-8, or empty."""
    texts = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
        if not text.strip():
            raise ValueError(f"{file} holds no text")
        texts.append(text)
    return texts


def split_held_out(text: str, fraction: float) -> tuple[str, str]:
    """(training, held-out): the end of the text is held out, cut at a line, else at a space, where one is near."""
    if not fraction:
        return text, ""
    cut = int(len(text) * (1 - fraction))
    near = max(0, 2 * cut - len(text))  # so that no more than twice the fraction is held out
    cut = next((at + 1 for at in (text.rfind(mark, near, cut) for mark in "\n ") if at >= 0), cut)
    return text[:cut], text[cut:]


class Windows:
    """Windows of a token stream, in a new order each epoch: none is seen twice in an epoch.

    Args:
        ids: int64 [N]. context: tokens that are predicted a window; it holds one more. seed: of the order.
    """

    def __init__(self, ids: Tensor, *, batch_size: int, context: int, seed: int):
        self.ids, self.batch_size, self.context, self.seed = ids, batch_size, context, seed
        self.per_epoch = (len(ids) - context - 1) // context // batch_size
        if self.per_epoch < 1:
            raise ValueError(
                f"the text has {len(ids)} tokens, a batch of {batch_size} sequences of {context} needs "
                f"{batch_size * context + context + 1}"
            )
        self._epoch = -1

    def __getitem__(self, step: int) -> Tensor:
        """int64 [batch_size], where the windows of a step start; the same for the same step."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._shift = int(torch.randint(self.context, (1,), generator=generator))
            windows = (len(self.ids) - self._shift - 1) // self.context
            self._order, self._epoch = torch.randperm(windows, generator=generator), epoch
        chosen = self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return self._shift + chosen * self.context

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """One of ``parts`` of a step."""
        starts = self[step]
        return windows_at(self.ids, share(starts, part, parts), self.context, len(starts) * self.context)

    def fingerprint(self) -> dict[str, int]:
        """Tells whether a run is resumed on the same text."""
        weights = torch.arange(1, len(self.ids) + 1) % 65_521
        return {"tokens": len(self.ids), "text": int((self.ids * weights).sum())}


def windows_at(ids: Tensor, starts: Tensor, context: int, tokens: int) -> Batch:
    """The windows of ``ids`` that start at ``starts``, of a step that counts ``tokens``."""
    rows = ids[starts[:, None] + torch.arange(context + 1)]
    return Batch(rows[:, :-1], rows[:, 1:], tokens, f"the text's windows at tokens {starts.tolist()}")


def windows_in_order(ids: Tensor, *, batch_size: int, context: int) -> list[Batch]:
    """Every whole window once, to evaluate on; one shorter window where there is none."""
    context = min(context, len(ids) - 1)
    if context < 1:
        return []
    starts = torch.arange(0, len(ids) - context, context)
    return [windows_at(ids, group, context, len(group) * context) for group in starts.split(batch_size)]
