"""Training a GPT-1 language model on plain text: AdamW, linear warm-up and cosine decay, gradient clipping.

The batch and the dropout of step s depend on (seed, s) alone. So a run that is interrupted and resumed takes the
steps, and sees the numbers, of one that was not.
"""

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gptfast_kernels import linear_cross_entropy

from .checkpoint import SAFETENSORS, read_pickle
from .config import OpenAIGPTConfig
from .heads import OpenAIGPTLMHeadModel
from .scoring import Score, score_ids
from .tokenizer import OpenAIGPTTokenizer

STATE_FILE = "training_state.pt"
LOG_FILE = "training_log.jsonl"
SUMMARY_FILE = "training.json"


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run; resuming under others is refused."""

    steps: int
    batch_size: int = 4
    context: int = 512  # tokens a sequence
    learning_rate: float = 1e-3  # at its highest
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices; gains and biases are left alone
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    held_out: float = 0.05  # of each file, its end
    seed: int = 0
    dtype: str = "float32"  # of the matmuls; weights and optimiser stay float32

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("held_out", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


def learning_rate(step: int, settings: Settings) -> float:
    """Of step 0 … steps - 1: linear warm-up, then a half cosine to 0 (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Batches:
    """Windows of a token stream, in a new order each epoch: none is seen twice in an epoch.

    Args:
        ids: int64 [N]. context: tokens that are predicted a window; it holds one more. seed: of the order.
    """

    def __init__(self, ids: Tensor, *, batch_size: int, context: int, seed: int):
        self.ids, self.batch_size, self.context, self.seed = ids, batch_size, context, seed
        self.per_epoch = (len(ids) - context - 1) // context // batch_size
        if self.per_epoch < 1:
            raise ValueError(
                f"the text has {len(ids)} tokens, a batch of {batch_size} sequences of {context} needs "
                f"{batch_size * context + context + 1}"
            )
        self._epoch = -1

    def __getitem__(self, step: int) -> Tensor:
        """int64 [batch_size, context + 1], the same for the same step."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._shift = int(torch.randint(self.context, (1,), generator=generator))
            windows = (len(self.ids) - self._shift - 1) // self.context
            self._order, self._epoch = torch.randperm(windows, generator=generator), epoch
        chosen = self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return self.ids[self._shift + chosen[:, None] * self.context + torch.arange(self.context + 1)]


def read_texts(files: Sequence[str | os.PathLike]) -> list[str]:
    """The files' contents. OSError: one is missing. ValueError: one is not UTF-8, or empty."""
    texts = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
        if not text.strip():
            raise ValueError(f"{file} holds no text")
        texts.append(text)
    return texts


def split_held_out(text: str, fraction: float) -> tuple[str, str]:
    """(training, held-out): the end of the text is held out, cut at a line, else at a space, where one is near."""
    if not fraction:
        return text, ""
    cut = int(len(text) * (1 - fraction))
    near = max(0, 2 * cut - len(text))  # so that no more than twice the fraction is held out
    cut = next((at + 1 for at in (text.rfind(mark, near, cut) for mark in "\n ") if at >= 0), cut)
    return text[:cut], text[cut:]


def check_output(folder: str | os.PathLike, resume: bool) -> None:
    """Raises FileExistsError where a run would overwrite another, or repeat what is done."""
    unfinished, finished = (Path(folder) / STATE_FILE).exists(), (Path(folder) / SAFETENSORS).exists()
    if unfinished and not resume:
        raise FileExistsError(f"{folder} holds an unfinished run: resume it, or choose another folder")
    if finished and not unfinished:
        raise FileExistsError(f"{folder} holds a finished model: choose another folder")


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), fused=True)


def train(
    model: OpenAIGPTLMHeadModel,
    tokenizer: OpenAIGPTTokenizer,
    texts: Sequence[str],
    settings: Settings,
    output: str | os.PathLike,
    *,
    resume: bool = False,
    save_every: int = 500,
    evaluate_every: int = 500,
    log_every: int = 50,
    progress: bool = True,
) -> tuple[OpenAIGPTLMHeadModel, Score | None]:
    """Trains ``model`` in place and leaves it, in float16, with tokenizer, log and summary, in the folder ``output``.

    A first Ctrl-C (or SIGTERM) finishes the step, saves, and raises KeyboardInterrupt; not in a thread of its own,
    where signals do not arrive.

    Args:
        model: a new or a pretrained one, on the device to train on.
        texts: one string a document; the end of each is held out.
        resume: go on from ``output``'s saved state.
        save_every, evaluate_every, log_every: in steps. The log has a row for each.
        progress: show a progress bar.

    Returns:
        The model and its score on the held-out text (None if nothing is held out), over windows as long as it trained
        on: positions behind them know nothing.

    Raises:
        ValueError: a number is not accepted, too little text, a damaged state, or ``resume`` under other settings.
        FileExistsError: ``output`` has a finished model, or an unfinished run and ``resume`` is False.
        FloatingPointError: the loss is no longer finite.
    """
    folder = Path(output)
    check_output(folder, resume)
    every = {"save_every": save_every, "evaluate_every": evaluate_every, "log_every": log_every}
    for name, steps in every.items():
        if steps < 1:
            raise ValueError(f"{name} must be at least 1, got {steps}")
    n_positions = model.config.n_positions
    if settings.context > n_positions:
        raise ValueError(f"context must be at most n_positions = {n_positions}, got {settings.context}")
    window = min(settings.context + 1, n_positions)
    folder.mkdir(parents=True, exist_ok=True)
    state_file, log_file = folder / STATE_FILE, folder / LOG_FILE

    parts = [split_held_out(text, settings.held_out) for text in texts]
    ids = _encode(tokenizer, [a for a, _ in parts], progress, "tokenizing")
    held_out = _encode(tokenizer, [b for _, b in parts if b], progress, "tokenizing held-out text")
    held_out_bytes = sum(len(b.encode()) for _, b in parts)
    batches = Batches(ids, batch_size=settings.batch_size, context=settings.context, seed=settings.seed)
    optimizer = make_optimizer(model, settings)
    first, losses = 0, list[Tensor]()  # of the steps since the last row of the log
    if state_file.exists():
        first, losses = _load_state(state_file, model, optimizer, settings, ids)
        _keep_log_up_to(log_file, first)
    else:
        log_file.write_text("")

    device = model.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")
    model.train()
    bar = tqdm(total=settings.steps, initial=first, desc="training", unit="step", disable=not progress)
    started = time.perf_counter()
    with _interruptible() as interrupted, bar, log_file.open("a") as log:
        for step in range(first, settings.steps):
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout
            rate = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = batches[step].to(device)
            with autocast:
                hidden = model.transformer(batch[:, :-1], return_dict=True).last_hidden_state
                loss = linear_cross_entropy(hidden, model.lm_head.weight, batch[:, 1:])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            if not math.isfinite(float(norm)):
                raise FloatingPointError(f"step {step}: loss {float(loss.detach())}, gradient norm {float(norm)}")
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            bar.update()

            done = step + 1
            last = done == settings.steps
            evaluated = len(held_out) > 1 and (done % evaluate_every == 0 or last)
            if done % log_every == 0 or evaluated or last:
                row = {
                    "step": done,
                    "loss": float(torch.stack(losses).mean()),
                    "learning_rate": rate,
                    "tokens_per_second": (done - first) * batch[:, 1:].numel() / (time.perf_counter() - started),
                }
                if evaluated:
                    model.eval()
                    quick = score_ids(model, held_out, context=window, stride=window - 1)  # windows do not overlap
                    model.train()
                    row["held_out_loss"] = quick.nll / quick.tokens
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "held_out_loss") if name in row})
                losses = []
            if (done % save_every == 0 or interrupted()) and not last:
                _save_state(state_file, model, optimizer, settings, ids, done, losses)
            if interrupted() and not last:
                raise KeyboardInterrupt(f"stopped after step {done}; what was learnt is in {folder}")

    model.eval()
    score = score_ids(model, held_out, context=window, text_bytes=held_out_bytes) if len(held_out) > 1 else None
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    summary = {
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "training_tokens": len(ids),
        "held_out_context": window,
        "held_out_tokens": score and score.tokens,
        "held_out_bytes": score and score.bytes,
        "held_out_perplexity": score and score.perplexity,
        "held_out_bits_per_byte": score and score.bits_per_byte,
        "torch": torch.__version__,
        "device": device.type,
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    return model, score


def plot_log(folder: str | os.PathLike) -> Path:
    """Draws the log's losses over the steps, as loss.svg in the same folder. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (Path(folder) / LOG_FILE).read_text().splitlines()]
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture := Path(folder) / "loss.svg", metadata={"Date": None})
    return picture


def _encode(tokenizer: OpenAIGPTTokenizer, texts: Sequence[str], progress: bool, title: str) -> Tensor:  # int64 [N]
    ids: list[int] = []
    for text in tqdm(texts, desc=title, unit="text", disable=not progress, leave=False):
        ids += tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    return torch.tensor(ids, dtype=torch.int64)


def _fingerprint(settings: Settings, config: OpenAIGPTConfig, ids: Tensor) -> dict[str, Any]:
    weights = torch.arange(1, len(ids) + 1) % 65_521
    return {**asdict(settings), "config": config.to_dict(), "tokens": len(ids), "text": int((ids * weights).sum())}


def _save_state(file: Path, model, optimizer, settings: Settings, ids: Tensor, step: int, losses: list[Tensor]) -> None:
    """Written beside the last state and moved over it, so that one good state is there at any moment."""
    state = {
        "step": step,
        "losses": losses,
        "run": _fingerprint(settings, model.config, ids),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    new = file.with_suffix(".new")
    torch.save(state, new)
    with new.open("rb") as handle:
        os.fsync(handle.fileno())
    new.replace(file)


def _load_state(file: Path, model, optimizer, settings: Settings, ids: Tensor) -> tuple[int, list[Tensor]]:
    state = read_pickle(file)
    if not isinstance(state, dict) or not state.keys() >= {"step", "losses", "run", "model", "optimizer"}:
        raise ValueError(f"{file} is damaged, or not of a training run")
    run = _fingerprint(settings, model.config, ids)
    differing = [name for name in run if state["run"].get(name) != run[name]]
    if differing:
        was, now = ({name: r.get(name) for name in differing} for r in (state["run"], run))
        raise ValueError(f"{file} was made under other settings: {was}, now {now}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], [loss.to(model.device) for loss in state["losses"]]


def _keep_log_up_to(log_file: Path, step: int) -> None:
    """Drops rows of steps that will be taken again, and a row cut off by a crash."""
    rows = [line for line in log_file.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    log_file.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))


@contextmanager
def _interruptible():
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
