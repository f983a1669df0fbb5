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
OURS = ("gptfast", "gptfast CUDA graph")  # the README's: on a GPU both are what a user gets, by one call or none
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
        rates += "".join(f" (data sheet, for MFU: {rate:,.0f} in {name})" for name, rate in limits.peak_tflop_s.items())
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
        warm = f", {row['warm_call_ms']:,.0f} with warm caches" if "warm_call_ms" in row else ""
        notes.append(f"first call {row['cold_call_ms']:,.0f} ms{warm}")
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
    """A line a cell: each provider's figure, ours last; ours against the strongest peer, and its share of the limit.

    The best of those that compute in the cell's own dtype is in bold, whoever it is; a cell that we lose says "lost".
    """
    no_line = ("parts", "start")  # a picture, and figures of several kinds
    cells = [rows for rows in cells_of(report["rows"]).values() if rows[0]["mode"] not in no_line]
    ran = dict.fromkeys(row["provider"] for rows in cells for row in rows if value_of(row))
    providers = sorted(ran, key=is_ours)  # stable
    dtypes = dict.fromkeys(rows[0]["dtype"] for rows in cells)
    limits = limits_of(report)
    lines = ["| | " + " | ".join([*providers, "gptfast to the strongest peer", "of limit"]) + " |"]
    lines.append("|---|" + "---:|" * (len(providers) + 2))
    for rows in cells:
        by_name = {row["provider"]: row for row in rows}
        best = min(filter(_same_dtype, rows), key=_value_or_inf, default=None)
        entries = [_entry(by_name.get(name), best) for name in providers]
        mine = min((by_name[name] for name in OURS if name in by_name), key=_value_or_inf, default=None)
        share = limits.share(mine) if mine and value_of(mine) else None
        entries += [_against_peers(mine, rows), f"{100 * share[0]:.0f} %" if share else "–"]
        dtype = f", {rows[0]['dtype']}" if len(dtypes) > 1 else ""
        lines.append(f"| {_describe(rows[0])}{dtype} | " + " | ".join(entries) + " |")
    e = report["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "transformers") if e.get(name))
    where = f"{e['threads']} threads of {e['device']}" if e["kind"] == "cpu" else e["device"]
    legend = (
        "Less is better; bold: the best in the cell's own dtype. Strongest peer: the best there that is not ours; "
        "~: a difference within the noise. Of limit: the least time that gptfast's bytes and operations take at the "
        "bandwidth and matmul rate measured beside it, over its time."
    )
    left = "" if report["complete"] else f" Not all was measured: {len(report['left'])} cells are left."
    what = f"{', '.join(dtypes)} on {where}; {versions}; commit {e['commit']}; `{report['command']}`.{left}"
    return "\n".join([*lines, "", legend, what, ""])


def _value_or_inf(row: Row) -> float:
    return value_of(row) or math.inf


def _same_dtype(row: Row) -> bool:
    """Whether the row was measured, and computes in its cell's dtype; memory and launches do not say, and do."""
    return bool(value_of(row)) and row.get("computes_in", row["dtype"]) == row["dtype"]


def _entry(row: Row | None, best: Row | None) -> str:
    if row is None or not value_of(row):
        return row["status"] if row and row["status"] in ("wrong", "failed") else "–"
    return f"**{_quantity(row)}**" if row is best else _quantity(row)


def _against_peers(mine: Row | None, rows: Sequence[Row]) -> str:
    """How many times as good as the strongest peer ours is, and who that is."""
    peers = [row for row in rows if _same_dtype(row) and not is_ours(row["provider"])]
    peer = min(peers, key=_value_or_inf, default=None)
    if mine is None or peer is None or not (ratio := speedup(mine, peer)):
        return "–"
    noise = is_noise(mine, peer)
    lost = "lost, " if ratio < 1 and not noise else ""
    return f"{lost}{'~' if noise else ''}{ratio:.2f}× {peer['provider']}"


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
    names = {
        "memory": "peak memory, with labels,",
        "autotuned": "forward, rivals autotuned,",
        "launch": "host time of a forward,",
    }
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


def main(names: Sequence[str]) -> None:
    for name in names:
        file = Path(name)
        page = file.read_text(encoding="utf-8")
        if not (blocks := [match[2] for match in BLOCK.finditer(page)]):
            sys.exit(f"{name} has no block between <!-- bench: NAME --> and <!-- /bench -->")
        file.write_text(with_blocks(page), encoding="utf-8")
        print(f"{name}: {', '.join(blocks)}")


if __name__ == "__main__":
    main(sys.argv[1:])
