"""Two runs: what got slower, beyond noise.

Each provider is held against the baseline that ran beside it, in turn, in the same process: a machine that is slower
today slows both. What counts as noise is what the four measurements differ from themselves, and at least ``FLOOR``:
another process lays out its memory otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .report import baseline_of, cells_of, value_of
from .suite import SAME

FLOOR = 0.05


@dataclass(frozen=True)
class Difference:
    """One provider in one cell. ``change`` and ``noise`` are fractions: 0.2 is a fifth slower."""

    cell: str
    provider: str
    verdict: str  # "slower", "faster", "same"; "control" for the baseline; "lost" and "new" for a row only one run has
    change: float | None = None
    noise: float | None = None
    raw: float | None = None  # change without the baseline

    def __str__(self) -> str:
        line = f"{self.verdict:8} {self.cell}: {self.provider}"
        if self.change is None:
            return line
        noise = "" if self.noise is None else f", noise {100 * self.noise:.0f} %"
        raw = "" if self.raw is None else f" ({100 * self.raw:+.1f} % without the baseline beside it)"
        return f"{line}: {100 * self.change:+.1f} %{noise}{raw}"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """What each row that either run measured has become, in the order of ``after``.

    A row that was measured before and is wrong or cannot run now is "lost".
    """
    then, now = cells_of(before["rows"]), cells_of(after["rows"])
    differences = []
    for cell in dict.fromkeys([*now, *then]):
        old = {row["provider"]: row for row in then.get(cell, []) if value_of(row) is not None}
        new = {row["provider"]: row for row in now.get(cell, []) if value_of(row) is not None}
        bases = [baseline_of(rows.get(cell, [])) for rows in (then, now)]
        for provider in dict.fromkeys([*new, *old]):
            if provider not in old or provider not in new:
                differences.append(Difference(cell, provider, "lost" if provider in old else "new"))
                continue
            differences.append(_difference(cell, old[provider], new[provider], *bases))
    return differences


def _difference(cell: str, old: dict, new: dict, old_base: dict | None, new_base: dict | None) -> Difference:
    raw = value_of(new) / value_of(old)  # type: ignore[operator]
    measured, ratio = [old, new], raw
    paired = old_base is not None and new_base is not None and old_base["provider"] == new_base["provider"]
    if paired and new["provider"] == new_base["provider"]:  # type: ignore[index]
        return Difference(cell, new["provider"], "control", raw - 1)
    if paired:
        ratio = raw / (value_of(new_base) / value_of(old_base))  # type: ignore[operator,arg-type]
        measured += [old_base, new_base]  # type: ignore[list-item]
    own = [row["noise"] for row in measured if row.get("noise") is not None]
    noise = max(FLOOR, math.hypot(*own))
    verdict = "same" if abs(math.log(ratio)) <= math.log1p(noise) else "slower" if ratio > 1 else "faster"
    return Difference(cell, new["provider"], verdict, ratio - 1, noise, raw - 1 if paired else None)


def text(before: Mapping[str, Any], after: Mapping[str, Any], differences: list[Difference]) -> str:
    """What differs between the runs' surroundings, what got slower, faster or lost, and how many rows did not."""
    lines = []
    for name in SAME:
        a, b = before["environment"].get(name), after["environment"].get(name)
        if a != b:
            lines.append(f"{name}: {a} before, {b} after")
    kinds = ("slower", "lost", "faster", "new")
    lines += [str(difference) for kind in kinds for difference in differences if difference.verdict == kind]
    count = {kind: sum(difference.verdict == kind for difference in differences) for kind in (*kinds, "same")}
    lines.append(", ".join(f"{count[kind]} {kind}" for kind in (*kinds, "same")))
    return "\n".join(lines)
