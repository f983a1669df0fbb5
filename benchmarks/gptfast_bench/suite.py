"""Which cells a run has, and the process that keeps what another one measures.

The measuring process may crash or hang: that costs the provider whose call was under way its row, which says so, and a
fresh process measures the cell again without it. The report is written anew behind every cell, so a run that is cut off
keeps what it has, and ``--resume`` goes on behind it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import activation, attention, decode, embeddings, loss, matvec, model, normalization, projection
from .harness import Cell, Row, Scale, Settings, state

SCHEMA = 1
REPORT = "bench.json"
OPS = {
    "attention": attention,
    "normalization": normalization,
    "decode": decode,
    "matvec": matvec,
    "projection": projection,
    "loss": loss,
    "activation": activation,
    "embeddings": embeddings,
}
COMPILED_RIVALS = ("hand-made SDPA torch.compile", "gptfast torch.compile")
COMPILED = ("torch.compile",)
SILENCE = {"cpu": 900.0, "cuda": 300.0}  # seconds without a sign of life that end a process: compilation, a slow round


Shapes = dict[str, Sequence[tuple[int, ...]]]  # by mode, what model.cells takes


# -- which cells --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What a run does: cells, most wanted first, and how long each is timed."""

    help: str
    cells: Sequence[Cell]
    rounds: int = 30
    seconds: float = 5.0
    least: int = 5
    budget: float | None = None  # seconds, behind which no cell is started


def profiles(cuda: bool) -> dict[str, Profile]:
    return {"quick": _quick(cuda), "full": _full(cuda), "inference": _inference(cuda), "smoke": _smoke()}


def _quick(cuda: bool) -> Profile:
    dtype, B = ("bfloat16", 64) if cuda else ("float32", 4)

    def ops(T: int, without: Sequence[str] = ()) -> list[Cell]:
        scale = Scale(dtype, B, (T,), ("forward",))
        return [dataclasses.replace(cell, without=without) for op in OPS.values() for cell in op.cells(scale)]

    forward: Shapes = {"forward": [(64, 512) if cuda else (1, 128)]}
    cells = [
        *model.cells(dtype, forward, without=COMPILED if cuda else COMPILED_RIVALS),
        *model.cells(dtype, {"decode": [(1, 1, 256)], "parts": [(1, 512)]}, without=COMPILED),
        *ops(512, without=("max-autotune",)),
        *model.cells(dtype, {"launch": [(1, 1)]}, "thin", without=COMPILED),
        *(cell for cell in ops(128, without=COMPILED) if cell.op != "matvec"),  # which knows no length
        *model.cells(dtype, {"start": [(1, 64)]}, without=COMPILED),
    ]
    return Profile("two minutes: the model at one shape, every op at two", cells, 15, 1.0, 3, budget=105.0)


def _full(cuda: bool) -> Profile:
    dtype, B = ("bfloat16", 64) if cuda else ("float32", 4)
    lengths = (512, 128, 1024, 2048, 4096, 8192, 16384, 256) if cuda else (512, 128, 32, 256, 1024)
    wide: Shapes = {
        "parts": [(64, 512), (1, 128)],
        "forward": [(1, 512), (8, 512), (1, 1), (1, 32), (1, 64), (1, 256)],
        "decode": [(1, 1, 511)],
        "prefill": [(1, 512)],
        "memory": [(64, 128), (64, 256), (64, 512)],
    }
    narrow: Shapes = {
        "forward": [(1, 512), (1, 128), (1, 1), (1, 32), (1, 256)],
        "decode": [(1, 1, 256)],
        "first token": [(1, 128)],
        "prefill": [(1, 512)],
        "parts": [(1, 512), (1, 32)],
        "train": [(1, 128)],
        "memory": [(1, 64), (1, 128), (1, 256), (1, 512)],
        "start": [(1, 64)],
    }
    ops = [Scale(dtype, B, lengths if op is attention or not cuda else lengths[:3], more=cuda) for op in OPS.values()]
    by_op = [list(op.cells(scale)) for op, scale in zip(OPS.values(), ops, strict=True)]
    firsts = [cell for cells in by_op for cell in cells[:2]]
    rest = [cell for cells in by_op for cell in cells[2:]]
    launches = [cell for op in OPS.values() for cell in op.cells(Scale(dtype, 1, (1,), ("launch",)))]
    if cuda:
        train = model.cells(dtype, {"train": [(64, 512), (8, 512)]})
        cells = [*_claims(), *firsts, *train, *model.cells(dtype, wide, without=COMPILED), *launches, *rest]
    else:
        whole = list(model.cells(dtype, narrow))
        cells = [*whole[:2], *firsts, *whole[2:], *model.cells(dtype, {"launch": [(1, 1)]}, "thin"), *launches, *rest]
    return Profile("ten minutes: every op and mode, over lengths", cells, 30, 4.0 if not cuda else 2.0, 5, budget=570.0)


def _claims() -> list[Cell]:
    """What is claimed of a GPU: first what needs no compilation, three minutes of it, then the rivals that do."""
    cells = functools.partial(model.cells, "bfloat16")
    steps: Shapes = {"decode": [(1, 1, 256), (64, 1, 256)], "first token": [(1, 128)]}
    return [
        *cells({"forward": [(64, 512), (1, 128)], **steps}, without=COMPILED),
        *cells({"launch": [(1, 1)]}, "thin", without=COMPILED),
        *cells({"generate": [(1, 32, 448)]}),
        *cells({"generate": [(64, 32, 448)]}, without=("transformers",)),
        *cells({"start": [(1, 64)]}, without=(*COMPILED, "hand-made")),
        *cells({"autotuned": [(64, 512), (1, 128)]}),
    ]


def _inference(cuda: bool) -> Profile:
    """The README's tables: what the model is for, at full size, with every rival that finishes."""
    if cuda:
        return Profile("ten minutes: the README's table of inference on a GPU", _claims(), 30, 2.0, 3)
    shapes: Shapes = {
        "forward": [(1, 1), (1, 64), (1, 512), (8, 512)],
        "memory": [(8, 512)],
        "generate": [(1, 32, 448)],
    }
    cells = list(model.cells("float32", shapes))
    return Profile("half an hour: the README's table of inference on a CPU", cells, 30, 60.0, 2)


def _smoke() -> Profile:
    scale = Scale("float32", 2, (16,), width=32, heads=2, vocab=96)
    launch = dataclasses.replace(scale, modes=("launch",))
    shapes: Shapes = {
        "forward": [(2, 16)],
        "loss": [(2, 16)],
        "train": [(2, 16)],
        "prefill": [(2, 16)],
        "decode": [(2, 1, 15)],
        "first token": [(1, 8)],
        "generate": [(1, 8, 8)],
        "launch": [(1, 1)],
        "parts": [(2, 16)],
        "memory": [(2, 16)],
        "start": [(2, 16)],
    }
    cells = [*model.cells("float32", shapes, "toy"), *OPS["normalization"].cells(launch)]
    cells += [cell for op in OPS.values() for cell in op.cells(scale)]
    return Profile("every op and mode once, of a toy: its figures mean nothing", cells, 3, 0.2, 2)


def select(cells: Iterable[Cell], ops: Sequence[str], modes: Sequence[str], dtypes: Sequence[str]) -> list[Cell]:
    """The cells of the named ops and modes, all where none is named, in each of ``dtypes`` if any is named.

    Raises:
        ValueError: a name that no cell has.
    """
    cells = list(cells)
    for name, asked, known in (
        ("--op", ops, {cell.op for cell in cells}),
        ("--mode", modes, {cell.mode for cell in cells}),
    ):
        if unknown := sorted(set(asked) - known):
            raise ValueError(f"{name} must be of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    chosen = [cell for cell in cells if cell.op in (ops or [cell.op]) and cell.mode in (modes or [cell.mode])]
    if not chosen:
        raise ValueError(f"--op {' '.join(ops)} has no --mode {' '.join(modes)} here")
    if dtypes:
        chosen = [dataclasses.replace(cell, dtype=dtype) for dtype in dtypes for cell in chosen]
    unique = {cell.key: cell for cell in chosen}
    return list(unique.values())


def provider_names(cells: Iterable[Cell], settings: Settings) -> set[str]:
    """All that the cells' ops know on this device."""
    first = {(cell.op, cell.mode): cell for cell in cells}
    modules = {**OPS, "model": model}
    return {name for cell in first.values() for name in modules[cell.op].task(cell, settings).providers}


def usable_cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


# -- a run --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a run has found so far, and the file that it is kept in."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Report":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"{path} is no report of this suite (schema {SCHEMA})")
        return cls(path, content)

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def write(self) -> None:
        """Whole or not at all, so that no interruption leaves half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def key_of(row: Row) -> str:
    return Cell(row["op"], row["mode"], row["dtype"], row["shape"]).key


def _highest(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The limits of a machine measured twice: what it did once, it can do."""

    def highest(name: str) -> dict[str, float]:
        rates = a.get(name, {}), b.get(name, {})
        return {dtype: max(rate.get(dtype, 0.0) for rate in rates) for dtype in {**rates[0], **rates[1]}}

    both = {name: highest(name) for name in ("matmul_tflop_s", "peak_tflop_s")}
    return both | {name: max(a[name], b[name]) for name in ("copy_gb_s", "read_gb_s")}


# What must be the same for rows to stand in one report
SAME = ("device", "threads", "torch", "triton", "transformers", "gptfast-kernels", "python", "commit")


def run(
    cells: Sequence[Cell],
    settings: Settings,
    output: Path,
    *,
    profile: str,
    command: str = "",
    budget: float | None = None,
    resume: Path | None = None,
    progress: bool = True,
) -> Report:
    """Measures the cells and returns the report, which ``output`` holds as ``bench.json`` from the first cell on.

    Args:
        command: what measures the same, for the report's readers.
        budget: seconds behind which no further cell is started; those left are listed in the report as "left".
        resume: a report whose cells are not measured again; another device, version or commit is a ValueError.
    """
    started = time.monotonic()
    before = Report.read(resume).content if resume is not None else None
    dtypes = {cell.dtype for cell in cells}
    if settings.device == "cpu" and any(cell.op == "model" for cell in cells):
        dtypes.add("bfloat16")  # a row beside float32's there
    measuring = _Worker(settings, sorted(dtypes))
    try:
        head = measuring.ask()
        if before is not None:
            differing = [name for name in SAME if before["environment"].get(name) != head["environment"].get(name)]
            if differing:
                shown = ", ".join(f"{name} was {before['environment'].get(name)}" for name in differing)
                raise ValueError(f"--resume: {resume} was measured elsewhere: {shown}")
        content = {
            "schema": SCHEMA,
            "profile": profile,
            "command": command,
            "settings": dataclasses.asdict(settings),
            "environment": head["environment"],
            "limits": head["limits"] if before is None else _highest(head["limits"], before["limits"]),
            "state": {"before": state(settings.device)},
            "complete": False,
            "left": [],
            "rows": [] if before is None else before["rows"],
        }
        report = Report(output / REPORT, content)
        done = {key_of(row) for row in report.rows}
        todo = [cell for cell in cells if cell.key not in done]
        content["left"] = [cell.key for cell in todo]
        report.write()
        with tqdm(
            total=round(sum(cell.seconds for cell in todo)),
            desc="benchmark",
            disable=not progress,
            bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} gone, {remaining} left  {postfix}",
        ) as bar:
            for cell in todo:
                if budget is not None and time.monotonic() - started > budget:
                    break
                bar.set_postfix_str(cell.key)
                report.rows.extend(measuring.measure(cell))
                content["left"].remove(cell.key)
                content["state"]["after"] = state(settings.device)
                content["seconds"] = round(time.monotonic() - started, 1)
                report.write()
                bar.update(cell.seconds)
        content["complete"] = not content["left"]
        report.write()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{output / REPORT} has what was measured; --resume goes on") from None
    finally:
        measuring.end()
    return report


@dataclass
class _Worker:
    """The measuring process, started anew where it has ended."""

    settings: Settings
    dtypes: Sequence[str]  # whose limits to measure, the first time
    process: subprocess.Popen | None = field(default=None, init=False)
    events: "queue.Queue[str | None]" = field(default_factory=queue.Queue, init=False)

    def ask(self) -> dict[str, Any]:
        """{"environment", "limits"}, from a first process."""
        self._start(self.dtypes)
        for event in self._listen():
            if "limits" in event:
                return event
        raise RuntimeError(f"the measuring process could not start: {self._last_words()}")

    def measure(self, cell: Cell) -> list[Row]:
        """The cell's rows. A provider that ends the process, or keeps silent for too long, gets a row that says so."""
        lost: dict[str, Row] = {}
        while True:
            if self.process is None:
                self._start([])
            self._say({"cell": dataclasses.asdict(cell), "skip": list(lost)})
            under_way: str | None = None
            for event in self._listen():
                if "rows" in event:
                    return [*event["rows"], *lost.values()]
                under_way = event["provider"]
            reason = self._last_words()
            row = {"op": cell.op, "mode": cell.mode, "dtype": cell.dtype, "shape": dict(cell.shape)}
            if under_way is None or under_way in lost:  # before the first one's call
                name = under_way or "all"
                return [
                    *lost.values(),
                    row | {"provider": name, "baseline": name, "status": "failed", "reason": reason},
                ]
            lost[under_way] = row | {"provider": under_way, "baseline": under_way, "status": "failed", "reason": reason}

    def end(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.kill()
            self.process.wait()
            self.reader.join()  # which finds the end of the pipe
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.words.close()
            self.process = None

    def _start(self, limits: Sequence[str]) -> None:
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        environ = {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"}
        if self.settings.device == "cpu":
            environ |= {"OMP_NUM_THREADS": str(self.settings.threads)}
        self.words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed with self
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
            env=environ,
            cwd=Path(__file__).parents[1],  # "python -m" finds modules there, and the caller's folder may hold any
        )
        self.events = queue.Queue()
        self.reader = threading.Thread(target=_forward, args=(self.process.stdout, self.events), daemon=True)
        self.reader.start()
        self._say({"settings": dataclasses.asdict(self.settings), "limits": list(limits)})

    def _say(self, what: dict[str, Any]) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which listening will find
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def _listen(self) -> Iterator[dict[str, Any]]:
        """Its events, until it ends or keeps silent."""
        self.silent = False
        while True:
            try:
                line = self.events.get(timeout=self._patience())
            except queue.Empty:
                self.silent = True
                return
            if line is None:
                return
            yield json.loads(line)

    def _patience(self) -> float:
        return SILENCE[self.settings.device.split(":")[0]]

    def _last_words(self) -> str:
        """How the process ended, and the last line it wrote; it is gone then."""
        assert self.process is not None
        if self.silent:
            self.end()
            return f"no sign of life for {self._patience():.0f} s"
        code = self.process.wait()
        self.words.seek(0)
        lines = [line.strip() for line in self.words.read().splitlines() if line.strip()]
        self.end()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1]}" if lines else how


def _forward(lines: Iterable[str], events: "queue.Queue[str | None]") -> None:
    for line in lines:
        events.put(line)
    events.put(None)
