"""A run as one HTML page: a table of every row, and pictures drawn here as SVG. It loads nothing and needs no script.

Pictures: speed against T for each op, the roofline with our points on it, where a forward pass spends its time, memory
against T. Each is left out where the run has nothing to show in it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .harness import Limits, Row, is_ours
from .report import (
    baseline_of,
    cells_of,
    columns,
    heading,
    limits_of,
    significant,
)

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 30, 46
# Told apart with every kind of colour blindness (Okabe and Ito 2008); ours is always the first, and thicker
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#000000")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 24px auto;
  padding: 0 16px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 8px; }
p.what { color: #555; margin: 2px 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 14px 20px; }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: 6px; background: #fff; }
svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #888; padding: 3px 8px; white-space: nowrap; }
td { text-align: right; padding: 2px 8px; border-bottom: 1px solid #eee; white-space: nowrap; }
td:first-child, th:first-child, td:last-child { text-align: left; } td:last-child { white-space: normal; }
tr.cell td { font-weight: 600; background: #f4f6f8; padding-top: 6px; } tr.ours td:first-child { font-weight: 600; }
tr.bad td { color: #a33; }
"""


def html(report: Mapping[str, Any]) -> str:
    """The page. ``report`` is what bench.json holds."""
    e = report["environment"]
    title = f"gptfast on {e['device']}"
    pictures = [
        *speed_pictures(report["rows"]),
        *roofline_pictures(report["rows"], limits_of(report), e["kind"]),
        *parts_pictures(report["rows"]),
        *memory_pictures(report["rows"]),
    ]
    figures = "\n".join(f"<figure>{picture}</figure>" for picture in pictures)
    notes = "\n".join(f'<p class="what">{escape(line)}</p>' for line in heading(report))
    left = "" if report["complete"] else f"<p>Not all was measured: {len(report['left'])} cells are left.</p>"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        f'<p class="what">{escape(report["command"])}, {escape(e["started"])}</p>\n{notes}\n{left}\n'
        f'<h2>Pictures</h2>\n<div class="pictures">{figures}</div>\n<h2>Every row</h2>\n{_table(report)}\n'
        "</body></html>\n"
    )


def _table(report: Mapping[str, Any]) -> str:
    head = ("", "time", "noise", "speed", "of limit", "MFU", "error", "")
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for key, rows in cells_of(report["rows"]).items():
        lines.append(f'<tr class="cell"><td colspan="{len(head)}">{escape(key)}</td></tr>')
        baseline = baseline_of(rows)
        for row in rows:
            kind = "bad" if row["status"] in ("wrong", "failed") else "ours" if is_ours(row["provider"]) else ""
            texts = (row["provider"], *columns(row, baseline, limits_of(report)))
            lines.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>")
    return "\n".join([*lines, "</table>"])


# -- drawing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Points of one provider, in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis over [low, high], drawn from pixel ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; only the powers where there are many of them."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
        return [
            step * 10.0**power
            for power in powers
            for step in steps
            if self.low * 0.999 <= step * 10.0**power <= self.high * 1.001
        ]


def axis(values: Iterable[float], start: float, end: float, room: float = 1.25) -> Axis:
    values = list(values)
    return Axis(min(values) / room, max(values) * room, start, end)


def chart(title: str, x_name: str, y_name: str, lines: Sequence[Line], ticks: Sequence[float] = ()) -> str:
    """Lines over logarithmic axes, the legend under the picture where it can hide no line."""
    lines = sorted(lines, key=lambda line: not is_ours(line.name))
    rows = (len(lines) + 1) // 2
    height = HEIGHT + 17 * rows
    x = axis((x for line in lines for x, _ in line.points), LEFT, WIDTH - RIGHT, 1.12)
    y = axis((y for line in lines for _, y in line.points), HEIGHT - BOTTOM, TOP)
    parts = _frame(title, x_name, y_name, x, y, height, ticks)
    for index, line in reversed(list(enumerate(lines))):  # ours is drawn last, over the others
        color, path = COLORS[index % len(COLORS)], " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        width = 3 if index == 0 else 1.6
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="{width + 1:.1f}" fill="{color}"/>' for a, b in line.points
        ]
    return "".join([*parts, *_legend([line.name for line in lines], HEIGHT), "</svg>"])


def _legend(names: Sequence[str], top: float) -> list[str]:
    parts = []
    for index, name in enumerate(names):
        left, y = LEFT + (index % 2) * (WIDTH - LEFT) / 2, top + 17 * (index // 2) + 6
        color = COLORS[index % len(COLORS)]
        parts.append(f'<rect x="{left:.0f}" y="{y - 7:.0f}" width="16" height="5" fill="{color}"/>')
        weight = ' font-weight="600"' if is_ours(name) else ""
        parts.append(f'<text x="{left + 22:.0f}" y="{y:.0f}" font-size="12.5"{weight}>{escape(name)}</text>')
    return parts


def _open(title: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
        f'<text x="{WIDTH / 2}" y="18" font-size="14" font-weight="600" text-anchor="middle">{escape(title)}</text>',
    ]


def _frame(
    title: str, x_name: str, y_name: str, x: Axis, y: Axis, height: float, ticks: Sequence[float] = ()
) -> list[str]:
    parts, bottom = _open(title, height), HEIGHT - BOTTOM
    for value in ticks or x.ticks():
        parts.append(f'<path d="M{x(value):.1f} {TOP}V{bottom}" stroke="#e6e6e6"/>')
        parts.append(_label(x(value), bottom + 16, _short(value), "middle"))
    for value in y.ticks():
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#e6e6e6"/>')
        parts.append(_label(LEFT - 6, y(value) + 4, _short(value), "end"))
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>')
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, bottom + 33, x_name, "middle"))
    middle = (TOP + bottom) / 2
    return [
        *parts,
        f'<text x="14" y="{middle}" font-size="12" fill="#444" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y_name)}</text>',
    ]


def _label(x: float, y: float, text: str, anchor: str = "start", size: float = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="#444" text-anchor="{anchor}">{escape(text)}</text>'


def _short(value: float) -> str:
    """1500 -> 1.5k; 0.02 -> 0.02."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


# -- pictures -----------------------------------------------------------------------------------------------------


def _series(rows: Sequence[Row], y: Callable[[Row], float | None]) -> dict[tuple, list[Line]]:
    """Lines over T by what else the cells have in common; only where some provider has two points."""
    points: dict[tuple, dict[str, dict[float, float]]] = {}
    for row in rows:
        value = y(row)
        if row["status"] != "ok" or not value:
            continue
        others = tuple((name, value) for name, value in row["shape"].items() if name not in ("T", "size"))
        if row["op"] == "attention":  # which keeps the tokens, not the batch
            others = tuple((name, value) for name, value in others if name != "B")
        group = points.setdefault((row["op"], row["mode"], row["dtype"], others), {})
        group.setdefault(row["provider"], {})[row["shape"]["T"]] = value
    return {
        key: [Line(name, sorted(line.items())) for name, line in group.items()]
        for key, group in points.items()
        if max(map(len, group.values())) > 1
    }


def speed_pictures(rows: Sequence[Row]) -> list[str]:
    """Tokens a second against T, one picture an op, mode and form."""
    timed = [row for row in rows if row["mode"] in ("forward", "backward", "both", "train", "loss", "prefill")]
    pictures = []
    for (op, mode, dtype, others), lines in _series(timed, lambda row: row.get("tokens_s")).items():
        what = ", ".join(f"{name} {value}" for name, value in others)
        title = f"{'GPT-1' if op == 'model' else op} {mode}, {dtype}, {what}"
        ticks = sorted({x for line in lines for x, _ in line.points})
        pictures.append(chart(title, "T", "tokens a second", lines, ticks))
    return pictures


def memory_pictures(rows: Sequence[Row]) -> list[str]:
    """MiB above what was held, against T."""
    taken = [row for row in rows if row["mode"] in ("memory", "loss")]
    return [
        chart(
            f"Memory of a forward pass with labels, {dtype}, {', '.join(f'{n} {v}' for n, v in others)}",
            "T",
            "MiB",
            lines,
            sorted({x for line in lines for x, _ in line.points}),
        )
        for (_, _, dtype, others), lines in _series(taken, lambda row: row.get("peak_mib")).items()
    ]


def roofline_pictures(rows: Sequence[Row], limits: Limits, kind: str) -> list[str]:
    """Operations a second against operations a byte, with what the machine can do as the roof; our own points."""
    pictures = []
    for dtype, tera in limits.matmul_tflop_s.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            ours = row["status"] == "ok" and row["provider"] == "gptfast" and row["dtype"] == dtype
            if ours and row.get("flops") and row.get("bytes"):
                where = (row["flops"] / row["bytes"], 1e12 * row["tflop_s"])
                points.setdefault(row["op"], []).append(where)
        if not points:
            continue
        places = [place for group in points.values() for place in group]
        ridge = 1e3 * tera / limits.gb_s
        x = axis([*(a for a, _ in places), ridge], LEFT, WIDTH - RIGHT, 2.0)
        y = axis([*(b for _, b in places), 1e12 * tera], HEIGHT - BOTTOM, TOP, 1.6)
        height = HEIGHT + 17 * ((len(points) + 1) // 2)
        title = f"Roofline, {dtype}, ours: {1e3 * tera:,.0f} GFLOP/s, {limits.gb_s:.0f} GB/s measured"
        parts = _frame(title, "operations a byte", "operations a second", x, y, height)
        clip = f"roof-{dtype}"
        roof = [(a, min(1e12 * tera, 1e9 * limits.gb_s * a)) for a in (x.low, ridge, x.high)]
        path = " ".join(f"{x(a):.1f},{y(max(b, y.low)):.1f}" for a, b in roof if b >= y.low or a != x.low)
        if roof[0][1] < y.low:  # where the slope enters the picture
            a = y.low / (1e9 * limits.gb_s)
            path = f"{x(a):.1f},{y(y.low):.1f} " + path
        parts.append(f'<polyline id="{clip}" points="{path}" fill="none" stroke="#444" stroke-width="2"/>')
        for index, group in enumerate(points.values()):
            color = COLORS[index % len(COLORS)]
            parts += [
                f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5" fill="{color}" fill-opacity="0.8"/>' for a, b in group
            ]
        pictures.append("".join([*parts, *_legend(list(points), HEIGHT), "</svg>"]))
    return pictures


def parts_pictures(rows: Sequence[Row]) -> list[str]:
    """Where a forward pass spends its time: one bar a provider, a picture a cell."""
    pictures = []
    for cell in cells_of(row for row in rows if row.get("parts")).values():
        names = [name for name in cell[0]["parts"] if any(row["parts"][name] > 0 for row in cell)]
        longest = max(sum(row["parts"].values()) for row in cell)
        height = 40 + 44 * len(cell) + 26 + 17 * ((len(names) + 1) // 2)
        B, T = (cell[0]["shape"][name] for name in ("B", "T"))
        parts = _open(f"Where a forward pass of {B} x {T} tokens spends its time, {cell[0]['dtype']}", height)
        left, room = 132, WIDTH - 132 - 70
        for index, row in enumerate(cell):
            top, at = 38 + 44 * index, float(left)
            parts.append(_label(left - 8, top + 19, row["provider"], "end"))
            for part, name in enumerate(names):
                width = room * row["parts"][name] / longest
                color = COLORS[part % len(COLORS)]
                parts.append(f'<rect x="{at:.1f}" y="{top}" width="{width:.1f}" height="28" fill="{color}"/>')
                if width > 46:
                    share = f"{100 * row['parts'][name] / sum(row['parts'].values()):.0f} %"
                    parts.append(
                        f'<text x="{at + width / 2:.1f}" y="{top + 18}" font-size="12" fill="#fff" '
                        f'text-anchor="middle">{share}</text>'
                    )
                at += width
            parts.append(_label(at + 6, top + 19, f"{significant(sum(row['parts'].values()))} ms"))
        pictures.append("".join([*parts, *_legend(names, 38 + 44 * len(cell) + 18), "</svg>"]))
    return pictures
