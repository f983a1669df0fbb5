"""What a person sees of a run: a progress bar, rows in a log, TensorBoard if it is installed, a curve at the end."""

import functools
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

LOG_FILE = "training_log.jsonl"

# Peaks of dense matmuls by the vendors' data sheets, FLOP/s: bfloat16, and float32 without TF32
PEAKS = {
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 80e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "MI300X": (1307e12, 163e12),
}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device can do at most; None for a GPU that is not in ``PEAKS``. A CPU's are measured."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device)
        known = next((peaks for key, peaks in PEAKS.items() if key in name), None)
        return known and known[0 if dtype == torch.bfloat16 else 1]
    n = 1024
    a, out = torch.randn(n, n, dtype=dtype), torch.empty(n, n, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, a, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def training_flops(config: Any, length: int, lm_head: bool) -> float:
    """A token, forward and backward, in matmuls: two FLOP a weight forward and twice that backward, with the causal
    half of attention over ``length`` tokens."""
    C = config.n_embd
    weights = 12 * config.n_layer * C * C + (config.vocab_size * C if lm_head else 0)
    return 6 * weights + 6 * config.n_layer * C * length


def keep_log_up_to(log_file: Path, step: int) -> None:
    """Drops rows of steps that will be taken again, and a row cut off by a crash."""
    rows = [line for line in log_file.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    new = log_file.with_suffix(".new")
    new.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    new.replace(log_file)


class Report:
    """Collects what a run says. Silent where ``is_main`` is False.

    Args:
        flops: of a token, for MFU (Chowdhery et al. 2022, appendix B). peak: FLOP/s of all devices together.
    """

    def __init__(
        self, folder: Path, *, steps: int, first: int, flops: float, peak: float | None, progress: bool, is_main: bool
    ):
        self.flops, self.peak, self.is_main = flops, peak, is_main
        self.bar = tqdm(total=steps, initial=first, desc="training", unit="step", disable=not (progress and is_main))
        self.log = (folder / LOG_FILE).open("a") if is_main else None
        self.board = None
        if is_main and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self.tokens, self.seconds = 0, 0.0
        self.resume_clock()

    def resume_clock(self) -> None:
        """Evaluating and saving are not counted as training: call it behind them."""
        self._started = time.perf_counter()

    def stop_clock(self) -> None:
        self.seconds += time.perf_counter() - self._started
        self._started = time.perf_counter()

    def step(self, tokens: int) -> None:
        self.tokens += tokens
        self.bar.update()

    def row(self, row: dict[str, Any]) -> None:
        """Writes a row of the log, with the speed since the last one."""
        self.stop_clock()
        speed = self.tokens / self.seconds
        row["tokens_per_second"] = speed
        if self.peak:
            row["mfu"] = speed * self.flops / self.peak
        self.tokens, self.seconds = 0, 0.0
        if self.log is None:
            return
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])
        shown = {name: f"{row[name]:.3f}" for name in row if name.endswith(("loss", "accuracy", "correlation"))}
        shown["tokens/s"] = f"{speed:,.0f}"
        if "mfu" in row:
            shown["MFU"] = f"{row['mfu']:.0%}"
        self.bar.set_postfix(shown)

    def close(self) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()
        if self.board is not None:
            self.board.close()


def plot_log(folder: str | os.PathLike) -> Path:
    """Draws the log's losses over the steps, as loss.svg in the same folder. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (Path(folder) / LOG_FILE).read_text().splitlines()]
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture := Path(folder) / "loss.svg", metadata={"Date": None})
    return picture
