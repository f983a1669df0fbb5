"""What every benchmark uses: what the machine is, contenders timed in turn, rows written as they come."""

import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton


def environment() -> dict[str, Any]:
    """What a number depends on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
    }


def time_in_turn(
    contenders: dict[str, Callable[[], Any]], *, rounds: int = 30, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """{name: {"ms", "ms_10", "ms_90"}}: median and quantiles of each, or {"error"} for one that cannot run here.

    One call of each contender after another, so that a drift of clocks hits all alike. Before each call 1 GiB is
    written: that flushes the L2 cache, and takes the GPU longer than Python takes to launch the call, so that what is
    timed is the kernels.
    """
    flush = torch.empty(2**30, dtype=torch.int8, device="cuda")
    results: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[float]] = {}
    for name, call in contenders.items():
        try:
            for _ in range(warmup):
                call()
            torch.cuda.synchronize()
            samples[name] = []
        except RuntimeError as error:  # a backend that refuses the shape, or memory that does not suffice
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    for _ in range(rounds):
        for name, taken in samples.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            contenders[name]()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
    for name, taken in samples.items():
        low, middle, high = torch.tensor(taken).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        results[name] = {"ms": middle, "ms_10": low, "ms_90": high}
    return results


def limits() -> dict[str, float]:
    """What figures are held against: GB/s of a copy of 1 GiB (read + written), TFLOP/s of a bfloat16 matmul of 8192."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    times = time_in_turn({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
    return {
        "copy_gb_s": 2 * 2**30 / times["copy"]["ms"] / 1e6,
        "matmul_tflop_s": 2 * 8192**3 / times["matmul"]["ms"] / 1e9,
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]], append: bool = False) -> None:
    """A JSON line for each row as it comes, so that a run that is cut off keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)
