"""Which backend ran each op of a forward pass, with which config, and why a faster one did not."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptfast_kernels import _dispatch


@dataclass(frozen=True)
class Row:
    op: str
    calls: int
    backend: str
    config: str  # of the Triton kernel: its tile, warps and pipeline stages; empty on other backends
    reason: str  # why not triton; empty where it ran


class Explanation(list[Row]):
    """Rows that print as a table, without the column of configs where no kernel of ours ran."""

    def __str__(self) -> str:
        cells = [["op", "calls", "backend", "why not triton"]]
        cells += [[row.op, str(row.calls), row.backend, row.reason] for row in self]
        if any(row.config for row in self):
            for line, config in zip(cells, ["config", *(row.config for row in self)], strict=True):
                line.insert(3, config)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


@torch.no_grad()
def explain(model: nn.Module, inputs: Any, *, strict: bool = False) -> Explanation:
    """Runs ``model`` once on ``inputs`` and lists, op by op, what ran.

    Args:
        model: any module whose layers call ``gptfast_kernels``.
        inputs: a tensor of ids, or a mapping of keyword arguments.
        strict: raise if an op ran on another backend than triton, or a captured forward pass uncaptured.

    Raises:
        RuntimeError: ``strict`` and an op fell back; all that did are named with their reasons.
    """
    with _dispatch.record() as choices:
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(inputs)
    calls = Counter(choices)
    rows = Explanation(Row(c.op, n, c.backend, c.config, c.reason) for c, n in calls.items())
    fallen = [row for row in rows if row.backend not in ("triton", "CUDA graph")]
    if strict and fallen:
        reasons = "; ".join(f"{row.op} on {row.backend}: {row.reason}" for row in fallen)
        raise RuntimeError(f"strict=True, but not all ops ran on triton: {reasons}")
    return rows
