"""The training loop.

The batch and the dropout of step s depend on (seed, s) alone, and on the rank. So a run that is interrupted and resumed
takes the steps, and sees the numbers, of one that was not.
"""

import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .batch import Batch
from .graph import GraphedStep
from .objective import Objective
from .parallel import Parallel, alike, clip_gradients
from .report import LOG_FILE, Report, keep_log_up_to, peak_flops, training_flops
from .settings import Settings, learning_rate
from .state import State, fingerprint


class Data(Protocol):
    """``Windows`` or ``Examples``."""

    def batch(self, step: int, part: int, parts: int) -> Batch: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Options:
    """What does not decide the numbers of a run. ``…_every`` is in steps; None: at the end only."""

    resume: bool = False
    save_every: int = 500
    evaluate_every: int | None = 500
    log_every: int = 50
    progress: bool = True  # show a bar
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: more time, a fraction of the memory
    cuda_graph: bool = False  # record a step's kernels once, replay them

    def __post_init__(self) -> None:
        for name in ("save_every", "evaluate_every", "log_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": params, "weight_decay": decay}
        for some, decay in ((matrices, settings.weight_decay), (others, 0.0))
        for params in alike(some)
        if params
    ]
    return torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), fused=True)


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")


def fit(
    objective: Objective,
    data: Data,
    settings: Settings,
    folder: Path,
    options: Options,
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    parallel: Parallel = Parallel(),  # noqa: B008 - frozen
) -> State:
    """Trains ``objective.model`` in place; returns the state, to be removed when its results are safe.

    A first Ctrl-C (or SIGTERM) finishes the step, saves, and raises KeyboardInterrupt; not in a thread of its own,
    where signals do not arrive.

    Args:
        evaluate: names and values for the log. All ranks call it.

    Raises:
        ValueError: more parts than sequences in a batch, a damaged state, or a resumed run under other settings.
        FloatingPointError: the loss or its gradient is no longer finite; names the batch.
        OSError: a file cannot be written.
    """
    parts = parallel.replicas * settings.accumulate
    if settings.batch_size < parts:
        raise ValueError(f"batch_size must be at least ranks * accumulate = {parts}, got {settings.batch_size}")
    device = objective.model.device
    if options.cuda_graph and (device.type != "cuda" or parts > 1 or parallel.world > 1):
        many = f"{parallel.world} ranks, accumulate = {settings.accumulate}"
        raise ValueError(f"cuda_graph needs one GPU and accumulate = 1, got {device}, {many}")
    run = fingerprint(settings, objective.model.config, data.fingerprint())
    if options.checkpoint_activations:
        objective.model.gradient_checkpointing_enable()
    module = parallel.wrap(objective)
    optimizer = make_optimizer(objective, settings)
    state = State(folder, objective.model, optimizer, run, parallel)
    first, losses = state.load() or (0, list[float]())
    if parallel.is_main:
        (folder / LOG_FILE).touch()
        keep_log_up_to(folder / LOG_FILE, first)

    mine = range(parallel.replica * settings.accumulate, (parallel.replica + 1) * settings.accumulate)

    def batches(step: int) -> list[Batch]:
        return [data.batch(step, part, parts).to(device) for part in mine]

    def gradients(batches: Sequence[Batch]) -> Tensor:
        """Runs forward and backward; returns this rank's share of the loss."""
        total = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            with parallel.accumulating(module, last=i + 1 == len(batches)):
                with autocast(settings, device):
                    loss, _, _ = module(batch)
                (loss * parallel.replicas).backward()  # DDP and FSDP take the mean over ranks of what is a sum
            total += loss.detach()
        return total

    objective.train()
    graphed = GraphedStep(gradients, list(objective.parameters())) if options.cuda_graph else None
    example = data.batch(0, 0, parts)
    lm_head = bool(objective.lm_coef)
    length = example.max_seqlen or example.input_ids.shape[-1]
    peak = peak_flops(device, getattr(torch, settings.dtype))
    report = Report(
        folder,
        steps=settings.steps,
        first=first,
        flops=training_flops(objective.model.config, length, lm_head),
        peak=peak and peak * parallel.world,
        progress=options.progress,
        is_main=parallel.is_main,
    )
    current = torch.cuda.device(device if device.type == "cuda" else -1)  # for events and graphs, which take its stream
    with (
        current,
        _interruptible() as interrupted,
        closing(report),
        _prefetched(batches, first, settings.steps) as ahead,
    ):
        watch = Watch(parallel, device)
        for step, batch in enumerate(ahead, first):
            torch.manual_seed(settings.seed * 1_000_003 + step * parallel.replicas + parallel.replica)  # dropout
            rate = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = graphed(batch) if graphed else gradients(batch)
            norm = clip_gradients(objective.parameters(), settings.clip_norm)
            losses += watch.see(step, loss, norm, interrupted(), batch)
            optimizer.step()
            if graphed is None:
                optimizer.zero_grad()
            report.step(batch[0].tokens)

            done = step + 1
            last = done == settings.steps
            evaluated = evaluate is not None and (
                last or (options.evaluate_every is not None and done % options.evaluate_every == 0)
            )
            if done % options.log_every == 0 or evaluated or last:
                losses += watch.drain()
                row = {"step": done, "loss": sum(losses) / len(losses), "learning_rate": rate}
                report.stop_clock()
                if evaluated:
                    objective.eval()
                    row.update(evaluate())  # type: ignore[misc]
                    objective.train()
                    report.resume_clock()
                report.row(row)
                losses = []
            if (done % options.save_every == 0 or watch.stop) and not last:
                losses += watch.drain()
                report.stop_clock()
                state.save(done, losses)
                report.resume_clock()
            if watch.stop and not last:
                raise KeyboardInterrupt(f"stopped after step {done}; what was learnt is in {folder}")
    objective.eval()
    return state


class Watch:
    """Reads losses and gradient norms, of all ranks together: on a CPU at once, on a GPU a step later, so that reading
    never waits for the step that runs."""

    def __init__(self, parallel: Parallel, device: torch.device):
        self.parallel, self.lag = parallel, int(device.type == "cuda")
        self.stop = False
        self._pending: deque[tuple[int, Tensor, Any, str]] = deque()

    def see(self, step: int, loss: Tensor, norm: Tensor, stop: bool, batches: Sequence[Batch]) -> list[float]:
        """Takes a step's numbers; returns the losses that are known by now."""
        record = self.parallel.sum(torch.stack([loss.float(), loss.new_tensor(float(stop))]))
        record, event = torch.cat([record, norm.float()[None]]).to("cpu", non_blocking=True), None
        if self.lag:
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, record, event, "; ".join(batch.source for batch in batches)))
        return self._read(self.lag)

    def drain(self) -> list[float]:
        return self._read(0)

    def _read(self, leave: int) -> list[float]:
        losses = []
        while len(self._pending) > leave:
            step, record, event, source = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, stop, norm = record.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}, on {source}")
            losses.append(loss)
            self.stop = self.stop or stop > 0
        return losses


@contextmanager
def _prefetched(make: Callable[[int], list[Batch]], first: int, steps: int) -> Iterator[Iterator[list[Batch]]]:
    """Batches ``first`` … ``steps - 1``, each made in another thread while the one before it is computed on."""
    with ThreadPoolExecutor(1, "batches") as pool:

        def batches() -> Iterator[list[Batch]]:
            coming: Future[list[Batch]] = pool.submit(make, first)
            for step in range(first, steps):
                batch = coming.result()
                coming = pool.submit(make, min(step + 1, steps - 1))
                yield batch

        yield batches()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT or SIGTERM only sets a flag; the second ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield lambda: False
        return
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        restore()
