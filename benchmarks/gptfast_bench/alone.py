"""One provider in a process of its own: how long until it answers, or how much memory it takes.

    python -m gptfast_bench.alone '{"provider": …, "mode": "start" | "memory", "shape": …}'

Prints one JSON object. Imports are timed, so nothing heavy is imported at the top.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

STEADY_CALLS = 5


def main(what: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    provider, started = what["provider"], time.perf_counter()
    import torch

    found["torch_import_ms"] = 1e3 * (time.perf_counter() - started)
    started = time.perf_counter()
    if provider.startswith("transformers"):
        importlib.import_module("transformers.models.openai.modeling_openai")
    elif provider.startswith("gptfast"):
        importlib.import_module("gptfast")
    found["import_ms"] = 1e3 * (time.perf_counter() - started)

    from . import model as models
    from .harness import DTYPES, pin_threads

    if what["device"] == "cpu":
        pin_threads(what["threads"])
    shape = what["shape"]
    ids = models.random_ids(shape, what["device"], shape["T"])
    name = provider.removesuffix(" torch.compile").removesuffix(" SDPA")
    model = models.built(name, shape["size"], DTYPES[what["dtype"]], what["device"])
    loss = model.loss if name == "hand-made" else lambda ids: model(ids, labels=ids).loss
    if provider.endswith("torch.compile"):
        loss = torch.compile(loss, dynamic=False)

    def call() -> float:
        with torch.inference_mode():
            return float(loss(ids))

    if what["mode"] == "memory":
        with torch.inference_mode():
            loss(ids[:1, :8])  # what the first call allocates for good
        before = _resident_kib(reset_peak=True)
        found["loss"] = call()
        peak = _resident_kib("VmHWM")
        return found | {"peak_mib": (peak - before) / 1024, "process_mib": peak / 1024}
    started = time.perf_counter()
    found["loss"] = call()
    found["cold_call_ms"] = 1e3 * (time.perf_counter() - started)
    found["samples_ms"] = []
    for _ in range(STEADY_CALLS):
        started = time.perf_counter()
        call()
        found["samples_ms"].append(1e3 * (time.perf_counter() - started))
    return found


def _resident_kib(field: str = "VmRSS", reset_peak: bool = False) -> int:
    """This process's memory by the kernel's account; the peak so far where there is no /proc to reset it by."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
