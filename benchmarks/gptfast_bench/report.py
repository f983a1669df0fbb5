"""A finished run as a table in the terminal, as CSV, and as the README's tables.

The README holds blocks between ``<!-- bench: NAME -->`` and ``<!-- /bench -->``, made from ``benchmarks/results/NAME``
by ``python -m gptfast_bench.report README.md``; a test fails when they disagree.
"""

import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import ROOT, Limits, Row, is_ours
from .suite import REPORT, Report, key_of

RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
# What a cell is measured in: (column, unit, whether less is better)
MEASURES = {"memory": ("peak_mib", "MiB"), "launch": ("host_us", "us")}
LEFT_OUT_OF_CSV = ("samples_ms", "parts", "shape")


def cells_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by cell, in the order they came."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(key_of(row), []).append(row)
    return cells


def value_of(row: Row) -> float | None:
    """What the row is judged by, less is better; None where nothing was measured."""
    name, _ = MEASURES.get(row["mode"], ("ms", "ms"))
    return row.get(name) if row["status"] == "ok" else None


def baseline_of(rows: Sequence[Row]) -> Row | None:
    """Of a cell's rows, the one that the others are held against, if it ran."""
    return next((row for row in rows if row["provider"] == row["baseline"] and value_of(row)), None)


def speedup(row: Row, baseline: Row | None) -> float | None:
    """How many times as good as the baseline."""
    mine, theirs = value_of(row), baseline and value_of(baseline)
    return theirs / mine if mine and theirs else None


def is_noise(row: Row, baseline: Row) -> bool:
    """Whether the two differ by less than they differ from themselves."""
    ratio = speedup(row, baseline)
    return ratio is not None and abs(math.log(ratio)) < math.hypot(row.get("noise") or 0, baseline.get("noise") or 0)


def limits_of(report: Mapping[str, Any]) -> Limits:
    return Limits(**report["limits"])


# -- the terminal -------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Every row of every cell: time, noise, speed against the baseline, share of the limit, error; or why not."""
    head = ("", "time", "noise", "speed", "of limit", "MFU", "error", "")
    lines: list[tuple[str, ...]] = []
    limits = limits_of(report)
    for key, rows in cells_of(report["rows"]).items():
        lines.append((key,))
        baseline = baseline_of(rows)
        lines += [("  " + row["provider"], *columns(row, baseline, limits)) for row in rows]
    body = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    shown = [line[0] if len(line) == 1 else _aligned(line, widths) for line in [head, *lines]]
    return "\n".join([*heading(report), "", *shown])


def heading(report: Mapping[str, Any]) -> list[str]:
    """What the figures were taken with, and how to read them."""
    e, limits = report["environment"], limits_of(report)
    where = f"{e['threads']} threads" if e["kind"] == "cpu" else f"driver {e['driver']}, CUDA {e['cuda']}"
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "transformers") if e.get(name))
    rates = ", ".join(f"{1e3 * rate:,.0f} GFLOP/s in {name}" for name, rate in limits.matmul_tflop_s.items())
    if e["kind"] == "cuda":
        rates = ", ".join(f"{rate:,.0f} TFLOP/s in {name}" for name, rate in limits.matmul_tflop_s.items())
    return [
        f"{'CPU' if e['kind'] == 'cpu' else 'GPU'} figures: {e['device']}, {where}; {versions}; commit {e['commit']}",
        f"limits measured here: {limits.copy_gb_s:.0f} GB/s copied, {limits.read_gb_s:.0f} GB/s read; matmuls {rates}",
        "noise: 19 of 20 random halves of a provider's own rounds differ by less; ~: no further from the baseline",
    ]


def columns(row: Row, baseline: Row | None, limits: Limits) -> tuple[str, ...]:
    if row["status"] != "ok":
        return (
            "",
            "",
            "",
            "",
            "",
            f"{row['error']:.0e}" if "error" in row else "",
            f"{row['status']}: {row['reason']}",
        )
    value, ratio, share, mfu = value_of(row), speedup(row, baseline), limits.share(row), limits.flop_share(row)
    unit = MEASURES.get(row["mode"], ("ms", "ms"))[1]
    about = "~" if baseline is not None and row is not baseline and is_noise(row, baseline) else ""
    return (
        "" if value is None else f"{significant(value)} {unit}",
        "" if row.get("noise") is None else f"{100 * row['noise']:.1f} %",
        "" if ratio is None else f"{about}{ratio:.2f}x",
        "" if share is None else f"{100 * share[0]:.0f} %",
        "" if mfu is None else f"{100 * mfu:.0f} %",
        f"{row['error']:.0e}",
        _notes(row),
    )


def _notes(row: Row) -> str:
    notes = []
    if row["mode"] in ("decode", "generate"):
        notes.append(f"{row['tokens_s']:,.0f} tokens/s")
    if row["mode"] == "start":
        notes.append(
            f"import {row['import_ms'] + row['torch_import_ms']:,.0f} ms, of it torch {row['torch_import_ms']:,.0f}"
        )
        notes.append(f"first call {row['cold_call_ms']:,.0f} ms")
    elif row["first_call_ms"] > 10 * row.get("ms", math.inf) and row["first_call_ms"] > 1000:
        notes.append(f"first call {row['first_call_ms'] / 1e3:.1f} s")
    if row["mode"] == "memory":
        notes.append(f"whole process {row['process_mib']:,.0f} MiB" if "process_mib" in row else "")
    elif row.get("peak_mib"):
        notes.append(f"{row['peak_mib']:,.0f} MiB")
    if "parts" in row:
        notes += [f"{part} {significant(ms, 2)} ms" for part, ms in row["parts"].items()]
    return ", ".join(filter(None, notes))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    middle = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
    return "  ".join([line[0].ljust(widths[0]), *middle, line[-1]]).rstrip()


def significant(value: float, digits: int = 3) -> str:
    """1234.5 -> 1,230; 12.345 -> 12.3; 0.012345 -> 0.0123."""
    if not value:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


# -- CSV ----------------------------------------------------------------------------------------------------------


def to_csv(report: Mapping[str, Any]) -> str:
    """A line a row; columns in the order they first appear, shapes as ``shape.T``."""
    flat = [
        {name: value for name, value in row.items() if name not in LEFT_OUT_OF_CSV}
        | {f"shape.{name}": value for name, value in row["shape"].items()}
        for row in report["rows"]
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


# -- the README ---------------------------------------------------------------------------------------------------


def readme_block(report: Mapping[str, Any]) -> str:
    """Every cell with every provider that ran one, ours last; the best of a row in bold, whoever it is."""
    cells = cells_of(report["rows"])
    ran = dict.fromkeys(row["provider"] for row in report["rows"] if value_of(row))
    providers = sorted(ran, key=is_ours)  # stable
    lines = ["| | " + " | ".join(providers) + " |", "|---|" + "---:|" * len(providers)]
    for rows in cells.values():
        by_name = {row["provider"]: row for row in rows}
        measured = {name: value for name, row in by_name.items() if (value := value_of(row))}
        best, baseline = min(measured, key=lambda name: measured[name], default=None), baseline_of(rows)
        entries = []
        for name in providers:
            if name not in measured:
                entries.append("–" if by_name.get(name, {}).get("status") != "wrong" else "wrong")
                continue
            ratio = speedup(by_name[name], baseline)
            shown = _quantity(by_name[name]) + (
                f", {ratio:.2f}×" if ratio and name != by_name[name]["baseline"] else ""
            )
            entries.append(f"**{shown}**" if name == best else shown)
        lines.append(f"| {_describe(rows[0])} | " + " | ".join(entries) + " |")
    e = report["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "transformers") if e.get(name))
    where = f"{e['threads']} threads of {e['device']}" if e["kind"] == "cpu" else e["device"]
    return "\n".join([*lines, "", f"{where}; {versions}; commit {e['commit']}; `{report['command']}`.", ""])


def _quantity(row: Row) -> str:
    value = value_of(row)
    assert value is not None
    unit = MEASURES.get(row["mode"], ("ms", "ms"))[1]
    if unit == "ms" and value >= 1e4:
        value, unit = value / 1e3, "s"
    return f"{significant(value)} {unit}"


def _describe(row: Row) -> str:
    shape = row["shape"]
    size = f"{shape['B']} × {shape['T']}"
    if row["mode"] == "generate":
        return f"generate {shape['new']} tokens from {shape['T']}" + (f", {shape['B']} rows" if shape["B"] > 1 else "")
    if row["mode"] == "decode":
        return f"decode a token behind {shape['S']}, batch {shape['B']}"
    names = {"memory": "peak memory, with labels,", "forward": "forward"}
    op = "" if row["op"] == "model" else row["op"] + " "
    return f"{op}{names.get(row['mode'], row['mode'])} {size}"


def with_blocks(page: str, results: Path = RESULTS) -> str:
    """``page`` with every block made anew.

    Raises:
        FileNotFoundError: a block names results that are not there.
    """

    def block(match: re.Match) -> str:
        return match[1] + readme_block(Report.read(results / match[2] / REPORT).content) + match[3]

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(with_blocks(file.read_text(encoding="utf-8")), encoding="utf-8")
