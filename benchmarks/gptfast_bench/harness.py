"""Cells and providers; the gate, the clock, the limits, the environment.

A *cell* is one measurement: an op, a mode, a dtype, a shape. A *provider* is one way to compute it. All providers of a
cell are held against a float64 reference first, and those that pass are timed in turn, one call of each a round, so
that a drift of the machine's clocks hits all alike.
"""

import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from gptfast.training.report import peak_flops

ROOT = Path(__file__).parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a provider may be off from float64, a few times what PyTorch's own ops are: see `error_of`
TOLERANCE = {"float32": 2e-4, "bfloat16": 4e-2, "float16": 5e-3}
FLUSH_BYTES = 2**30  # more than any L2 cache
FLUSHES = 4  # a millisecond or more: longer than Python takes to launch an op and its backward pass
Row = dict[str, Any]
T = TypeVar("T")


# -- cells and providers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One measurement, of all providers side by side. Survives JSON, as which it reaches its process."""

    op: str
    mode: str
    dtype: str
    shape: Mapping[str, Any]
    seconds: float = 4.0  # about what it takes, for the progress bar
    without: Sequence[str] = ()  # providers, by a part of their name, that a profile has no time for

    @property
    def key(self) -> str:
        return " ".join([self.op, self.mode, self.dtype, *(f"{k}={v}" for k, v in self.shape.items())])


@dataclass(frozen=True)
class Scale:
    """How large an op's cells are; each op's ``cells`` makes its own of it, most wanted first.

    ``lengths`` are T, the most wanted first. Widths are GPT-1's unless a test wants toys.
    """

    dtype: str
    B: int
    lengths: tuple[int, ...]
    modes: tuple[str, ...] = ("forward", "backward")
    width: int = 768
    heads: int = 12
    vocab: int = 40478
    more: bool = False  # what lies beside GPT-1 too: other widths, forms and tiles


@dataclass(frozen=True)
class Settings:
    """What a run has decided for all of its cells."""

    device: str = "cpu"
    threads: int = 1  # on a CPU
    rounds: int = 30  # at most
    seconds: float = 10.0  # of timing a cell, once each provider has its `least` rounds
    least: int = 5
    baselines: tuple[str, ...] = ()  # providers to run beside ours, the first to hold the others against; () for all


class Unavailable(Exception):
    """Why a provider cannot run a cell. It is what the row says."""


@dataclass
class Contender:
    """One provider, made ready for one cell.

    Attributes:
        run: what is timed.
        results: what the gate runs; None where that is ``run`` too.
        judge: what of its results the gate compares with the reference.
        tolerance: what its results may be off; the dtype's if None. Coarser weights state their own.
        moved: bytes that it must move, where its weights are coarser than the cell's; the task's if None.
        computes_in: its dtype, where that is not the cell's.
        metrics: what is measured in place of a time: called once, returns columns of the row.
    """

    run: Callable[[], Any]
    results: Callable[[], Any] | None = None
    judge: Callable[[Any], Sequence[Tensor]] = lambda out: out if isinstance(out, Sequence) else [out]
    tolerance: float | None = None
    moved: float | None = None
    computes_in: str | None = None
    metrics: Callable[[], Row] | None = None


@dataclass
class Task:
    """What a cell comes to on a device.

    Attributes:
        providers: by name, the baseline first; a factory raises ``Unavailable`` where it cannot serve the cell.
        expected: the float64 results, computed once, when the first provider has run.
        moved: bytes that any implementation must read and write.
        flops: operations that any implementation must do.
        tokens: what a call makes or reads, for tokens a second.
        wait_every: calls that a GPU is given before one waits for it, which is timed then; 0: its kernels are, alone.
    """

    providers: dict[str, Callable[[], Contender]]
    expected: Callable[[], Sequence[Tensor]]
    moved: float = 0
    flops: float = 0
    tokens: int = 0
    wait_every: int = 0


def is_ours(provider: str) -> bool:
    return provider.startswith("gptfast")


def installed(package: str, distribution: str | None = None) -> None:
    """Raises ``Unavailable`` unless ``package`` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{distribution or package} is not installed")


def need_gpu(device: str, what: str) -> None:
    if torch.device(device).type != "cuda":
        raise Unavailable(f"{what} needs a GPU")


# -- the gate -----------------------------------------------------------------------------------------------------


def error_of(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst row's distance from float64, over its length or the rows' root mean square, whichever is longer.

    A row is the last dimension. So one row that was not written counts for 1, however many there are; and one that
    happens to be near 0 is not held to a precision that its sums never had.
    """
    if len(results) != len(expected):
        raise ValueError(f"results must be {len(expected)} tensors, as expected has, got {len(results)}")
    worst = 0.0
    for result, exact in zip(results, expected, strict=True):
        if result.shape != exact.shape:
            raise ValueError(f"results must have the shape {list(exact.shape)}, got {list(result.shape)}")
        exact = exact.detach().double()
        distance = (result.detach().to(exact.device).double() - exact).reshape(-1, exact.shape[-1] if exact.ndim else 1)
        lengths = exact.reshape(distance.shape).norm(dim=-1)
        typical = lengths.square().mean().sqrt()
        error = (distance.norm(dim=-1) / lengths.clamp_min(typical).clamp_min(torch.finfo(exact.dtype).tiny)).max()
        worst = max(worst, math.inf if error.isnan() else error.item())
    return worst


# -- the clock ----------------------------------------------------------------------------------------------------


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    device: str = "cpu",
    *,
    rounds: int = 30,
    seconds: float = math.inf,
    least: int = 5,
    wait_every: int = 0,
    turn_of: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """{name: milliseconds of a call, one a round}: one after another, each round starting with another one.

    Stops after ``rounds``, or after ``least`` once ``seconds`` are over. ``turn_of`` hears each name before its turn.

    On a GPU 1 GiB is written first, which flushes the L2 cache. With ``wait_every`` the host's clock then runs over so
    many calls until the GPU is done: launches and all. Without, it is written ``FLUSHES`` times, and events stand about
    one call, launched before the GPU is done writing: the kernels alone.

    On a CPU a call that takes less than a millisecond is repeated until it does not.
    """
    clock = _host_ms
    if torch.device(device).type == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        clock = functools.partial(_device_ms, flush=flush)
        if wait_every:
            clock = functools.partial(_waited_ms, flush=flush, calls=wait_every)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, started = list(calls), time.perf_counter()
    for index in range(rounds):
        if index >= least and time.perf_counter() - started > seconds:
            break
        turn = index % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            turn_of(name)
            samples[name].append(clock(calls[name]))
    return samples


def _host_ms(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    once = time.perf_counter() - started
    if once > 1e-3:
        return 1e3 * once
    repeats = math.ceil(1e-3 / once)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - started) / repeats


def _device_ms(call: Callable[[], Any], flush: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _waited_ms(call: Callable[[], Any], flush: Tensor, calls: int) -> float:
    flush.zero_()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / calls


def noise_of(samples: Sequence[float]) -> float | None:
    """The same provider against itself: 19 of 20 random halvings of its rounds differ by no more than this fraction.

    Medians of the two halves, which are noisier than the median of all. None for one round, which shows nothing.
    """
    if len(samples) < 4:
        return max(samples) / min(samples) - 1 if len(samples) > 1 else None
    draw, differences = random.Random(0), []
    for _ in range(200):
        order = draw.sample(samples, len(samples))
        one, other = (statistics.median(half) for half in (order[::2], order[1::2]))
        differences.append(max(one, other) / min(one, other) - 1)
    return sorted(differences)[189]


def quantile(samples: Sequence[float], q: float) -> float:
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = ordered[math.floor(place)]
    return low + (ordered[math.ceil(place)] - low) * (place % 1)


# -- a cell -------------------------------------------------------------------------------------------------------


def run_cell(
    cell: Cell,
    settings: Settings,
    skip: Iterable[str] = (),
    tell: Callable[[Row], None] = lambda event: None,
) -> list[Row]:
    """One row a provider: checked, and timed if it is right.

    Args:
        skip: providers to leave out, which have ended the process before.
        tell: hears {"provider"} before every call of one, which may end the process.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it keeps few variants of a function, and other cells have compiled theirs
    # a backward pass alone is timed on a graph that is kept, which a compiled one allows only so
    with functorch_config.patch(donated_buffer=cell.mode != "backward"):
        return _run_cell(cell, settings, skip, tell)


def _run_cell(cell: Cell, settings: Settings, skip: Iterable[str], tell: Callable[[Row], None]) -> list[Row]:
    module = cell.op if "." in cell.op else f"{__package__}.{cell.op}"  # with a dot: an op from outside the suite
    task: Task = importlib.import_module(module).task(cell, settings)
    baseline, names = choose(list(task.providers), settings.baselines)
    rows: dict[str, Row] = {}
    contenders: dict[str, Contender] = {}
    expected: list[Tensor] = []
    for name in names:
        if name in skip:
            continue
        tell({"provider": name})
        row: Row = {
            "op": cell.op,
            "mode": cell.mode,
            "dtype": cell.dtype,
            "shape": dict(cell.shape),
            "provider": name,
            "baseline": baseline,
        }
        rows[name] = row

        def first_call(name: str = name, row: Row = row) -> tuple[Contender, Sequence[Tensor]]:
            if any(part in name for part in cell.without):
                raise Unavailable("left out: it takes this profile too long")
            contender = task.providers[name]()
            started = time.perf_counter()
            out = (contender.results or contender.run)()
            _synchronize(settings.device)
            row["first_call_ms"] = 1e3 * (time.perf_counter() - started)
            return contender, contender.judge(out)

        ready = _attempt(first_call, row, settings)
        if ready is None:
            continue
        contender, results = ready
        expected = expected or list(task.expected())
        row["tolerance"] = contender.tolerance or TOLERANCE[cell.dtype]
        row["error"] = error_of(results, expected)
        del ready, results
        if row["error"] > row["tolerance"]:
            row |= {"status": "wrong", "reason": f"off by {row['error']:.1e}, {row['tolerance']:.0e} is accepted"}
            continue
        row["status"] = "ok"
        if contender.results is not None and contender.metrics is None:
            _attempt(contender.run, row, settings)  # its own first call, which may compile again
        if row["status"] == "ok":
            contenders[name] = contender
    expected.clear()

    for name, contender in list(contenders.items()):
        tell({"provider": name})
        if contender.metrics is not None:
            rows[name] |= contender.metrics()
            del contenders[name]
        else:
            rows[name]["peak_mib"] = _peak_mib(contender.run, settings.device)
    samples = time_in_turn(
        {name: contender.run for name, contender in contenders.items()},
        settings.device,
        rounds=settings.rounds,
        seconds=settings.seconds,
        least=settings.least,
        wait_every=task.wait_every,
        turn_of=lambda name: tell({"provider": name}),
    )
    for name, taken in samples.items():
        contender = contenders[name]
        moved = task.moved if contender.moved is None else contender.moved
        rows[name] |= times(taken, moved, task.flops, task.tokens) | {
            "computes_in": contender.computes_in or cell.dtype
        }
    return list(rows.values())


def _attempt(call: Callable[[], T], row: Row, settings: Settings) -> T | None:
    """What ``call`` returns; None where it cannot run, which the row says then."""
    try:
        return call()
    except Unavailable as why:
        row |= {"status": "unavailable", "reason": str(why)}
    except RuntimeError as error:  # a backend that refuses the shape, or memory that does not suffice
        first, *_ = str(error).strip().split("\n")
        row |= {"status": "unavailable", "reason": f"{type(error).__name__}: {first}"}
        _synchronize(settings.device)  # raises where the device is lost, so that another process goes on
    return None


def choose(names: Sequence[str], baselines: Sequence[str]) -> tuple[str, list[str]]:
    """(the provider to hold others against, all to run): those asked for that the cell has, and ours; or all."""
    if not baselines:
        return names[0], list(names)
    asked = [name for name in baselines if name in names]
    mine = ["gptfast"] if "gptfast" in names else [name for name in names if is_ours(name)]
    return (asked or mine)[0], [name for name in names if name in {*asked, *mine}]


def times(samples: Sequence[float], moved: float = 0, flops: float = 0, tokens: int = 0) -> Row:
    """Columns of a row that was timed: samples in ms a call."""
    ms = statistics.median(samples)
    row: Row = {
        "ms": ms,
        "ms_10": quantile(samples, 0.1),
        "ms_90": quantile(samples, 0.9),
        "noise": noise_of(samples),
        "rounds": len(samples),
        "samples_ms": [float(f"{sample:.4g}") for sample in samples],
    }
    if moved:
        row |= {"bytes": moved, "gb_s": moved / ms / 1e6}
    if flops:
        row |= {"flops": flops, "tflop_s": flops / ms / 1e9}
    if tokens:
        row["tokens_s"] = 1e3 * tokens / ms
    return row


def _peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """Memory that a call takes above what was held before it; on a CPU a process of its own must be asked."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# -- the limits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What this machine can do at most: GB/s of memory and TFLOP/s of matmuls by dtype, measured.

    ``peak_tflop_s`` is what the vendor's data sheet says of a GPU's, where it is known.
    """

    copy_gb_s: float
    read_gb_s: float
    matmul_tflop_s: dict[str, float] = field(default_factory=dict)
    peak_tflop_s: dict[str, float] = field(default_factory=dict)

    @property
    def gb_s(self) -> float:
        return max(self.copy_gb_s, self.read_gb_s)

    def share(self, row: Row) -> tuple[float, str] | None:
        """(the least time that the row's bytes and operations take here, over its time; which of them is the limit)."""
        if "ms" not in row or not (row.get("bytes") or row.get("flops")):
            return None
        # int8 weights are widened for their products
        rate = self.matmul_tflop_s.get(row["dtype"] if row["computes_in"] == "int8" else row["computes_in"])
        if row.get("flops") and not rate:
            return None
        floors = {"memory": row.get("bytes", 0) / self.gb_s / 1e6}
        if rate:
            floors["arithmetic"] = row.get("flops", 0) / rate / 1e9
        bound = max(floors, key=lambda name: floors[name])
        return floors[bound] / row["ms"], bound

    def flop_share(self, row: Row) -> float | None:
        """Model FLOPs utilization: the operations that must be done over the time, as a share of the data sheet's rate.

        Of the measured rate on a CPU, which has none.
        """
        rate = (self.peak_tflop_s or self.matmul_tflop_s).get(row.get("computes_in", ""))
        return row["tflop_s"] / rate if rate and row.get("tflop_s") else None


def measure_limits(device: str, dtypes: Iterable[str], seconds: float = 1.0) -> Limits:
    """Copies (read + written) and reads of 1 GiB on a GPU, 256 MiB on a CPU; square matmuls, the best of two sizes."""
    cuda = torch.device(device).type == "cuda"
    size, sides = (2**30, (4096, 8192)) if cuda else (2**28, (1024, 2048))
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    clock = functools.partial(time_in_turn, device=device, rounds=10, least=3, seconds=seconds)
    memory = clock({"copy": lambda: target.copy_(source), "read": source.sum})
    rates = {}
    for name in dtypes:
        calls = {}
        for side in sides:
            a, b = torch.randn(2, side, side, device=device).to(DTYPES[name])
            calls[str(side)] = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        for call in calls.values():
            call()
        taken = clock(calls)
        rates[name] = max(2 * int(side) ** 3 / statistics.median(ms) / 1e9 for side, ms in taken.items())
    peaks = {name: peak_flops(torch.device(device), DTYPES[name]) for name in rates if cuda and name != "float16"}
    return Limits(
        copy_gb_s=2 * size / statistics.median(memory["copy"]) / 1e6,
        read_gb_s=size / statistics.median(memory["read"]) / 1e6,
        matmul_tflop_s=rates,
        peak_tflop_s={name: peak / 1e12 for name, peak in peaks.items() if peak},
    )


# -- the environment ----------------------------------------------------------------------------------------------


def pin_threads(threads: int) -> None:
    """Keeps this process on ``threads`` of the CPUs it may use, and torch at as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def environment(device: str, threads: int) -> Row:
    """What a number depends on."""
    row: Row = {"device": device_name(device), "kind": torch.device(device).type}
    if row["kind"] == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
            **_nvidia_smi(device, driver="driver_version"),
        }
    else:
        row |= {"threads": threads, "cores": os.cpu_count(), "simd": torch.backends.cpu.get_cpu_capability()}
    row |= {"python": platform.python_version(), "system": platform.system()}
    for package in ("gptfast-kernels", "torch", "triton", "transformers", "numpy", "liger-kernel"):
        row[package] = _version(package)
    now = datetime.datetime.now(datetime.timezone.utc)
    return row | {"commit": _commit(), "started": now.isoformat(timespec="seconds")}


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _read("/proc/cpuinfo").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def state(device: str) -> Row:
    """What drifts: clocks, temperature, load. Taken before and after."""
    if torch.device(device).type == "cuda":
        fields = {"sm_clock": "clocks.sm", "memory_clock": "clocks.mem"}
        return _nvidia_smi(device, **fields, temperature="temperature.gpu", power="power.draw")
    clocks = [float(line.split(":")[1]) for line in _read("/proc/cpuinfo").splitlines() if line.startswith("cpu MHz")]
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu_mhz": round(statistics.fmean(clocks)) if clocks else None, "load_1_min": load}


def _nvidia_smi(device: str, **fields: str) -> Row:
    """Each field by the name it is given; None where nvidia-smi is not there or does not answer."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*query, f"--id={torch.device(device).index or 0}"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(fields)
    return dict(zip(fields, map(str.strip, done.stdout.split(",")), strict=True))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, "+" behind it where files that are timed differ; $GPTFAST_COMMIT says a copy's."""
    if "GPTFAST_COMMIT" in os.environ:
        return os.environ["GPTFAST_COMMIT"]
    try:
        git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        if Path(git(["git", "rev-parse", "--show-toplevel"]).stdout.strip()).resolve() != ROOT.resolve():
            return None
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--", "gptfast", "kernels", "benchmarks/gptfast_bench"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
