"""``train`` and ``fine_tune``: data, objective and loop put together, and what they leave in a folder."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..heads import OpenAIGPTDoubleHeadsModel, OpenAIGPTLMHeadModel
from ..scoring import Score, score_ids
from ..tokenizer import OpenAIGPTTokenizer
from .batch import Batch
from .loop import Options, autocast, fit
from .objective import Objective
from .parallel import Parallel
from .settings import Settings
from .state import SUMMARY_FILE, State, check_output
from .tasks import MODELS, PACK_ABOVE, Example, Examples, Task
from .text import Windows, split_held_out, windows_in_order

ALONE = Parallel()


def train(
    model: OpenAIGPTLMHeadModel,
    tokenizer: OpenAIGPTTokenizer,
    texts: Sequence[str],
    settings: Settings,
    output: str | os.PathLike,
    *,
    options: Options = Options(),  # noqa: B008 - frozen
    parallel: Parallel = ALONE,
) -> tuple[OpenAIGPTLMHeadModel, Score | None]:
    """Trains ``model`` in place on plain text; leaves it in ``output``, in float16, with tokenizer, log and summary.

    Args:
        model: a new or a pretrained one, on the device to train on.
        texts: one string a document; the end of each is held out.

    Returns:
        The model and its score on the held-out text (None if nothing is held out), over windows as long as it trained
        on: positions behind them know nothing. Of a sharded run, a whole copy on rank 0, and (None, None) elsewhere.

    Raises:
        ValueError: a number is not accepted, too little text, a damaged state, or ``resume`` under other settings.
        FileExistsError: ``output`` has a finished model, or an unfinished run and ``resume`` is False.
        FloatingPointError: the loss is no longer finite. OSError: a file cannot be written.
    """
    folder = _prepare(model, settings, output, options)
    window = min(settings.context + 1, model.config.n_positions)

    parts = [split_held_out(text, settings.held_out) for text in texts]
    shown = options.progress and parallel.is_main
    ids = _encode(tokenizer, [a for a, _ in parts], shown, "tokenizing")
    held_out = _encode(tokenizer, [b for _, b in parts if b], shown, "tokenizing held-out text")
    held_out_bytes = sum(len(b.encode()) for _, b in parts)
    data = Windows(ids, batch_size=settings.batch_size, context=settings.context, seed=settings.seed)
    objective = Objective(model)
    windows = windows_in_order(held_out, batch_size=settings.batch_size, context=settings.context)
    state = fit(
        objective,
        data,
        settings,
        folder,
        options,
        evaluate=(lambda: evaluate(objective, windows, settings)) if windows else None,
        parallel=parallel,
    )

    model = parallel.whole(model)
    score = None
    if parallel.is_main:
        if len(held_out) > 1:
            score = score_ids(model, held_out, context=window, text_bytes=held_out_bytes)
        weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
        results = {
            "training_tokens": len(ids),
            "held_out_context": window,
            "held_out_tokens": score and score.tokens,
            "held_out_bytes": score and score.bytes,
            "held_out_perplexity": score and score.perplexity,
            "held_out_bits_per_byte": score and score.bits_per_byte,
        }
        _finish(folder, model, tokenizer, settings, results, state, weights)
    parallel.barrier()
    return model, score


def fine_tune(
    model: Any,
    tokenizer: OpenAIGPTTokenizer,
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    output: str | os.PathLike,
    *,
    held_out: Sequence[Example] = (),
    packed: bool = True,
    options: Options = Options(),  # noqa: B008 - frozen
    parallel: Parallel = ALONE,
) -> tuple[Any, dict[str, float]]:
    """Trains ``model`` in place for a task and leaves it, in float32, with tokenizer, task, log and summary, in
    ``output``, from which ``predict`` works.

    Args:
        model: what ``load_for_task`` gives.
        examples, held_out: what ``read_examples`` gives.
        packed: sequences laid end to end, without padding, where that is faster; False always pads.

    Returns:
        The model and, of the held-out examples, loss and accuracy (or correlation), by their names in the log. Of a
        sharded run, a whole copy on rank 0, and None elsewhere.

    Raises:
        TypeError: the model is not of the task's class. Otherwise as ``train``.
    """
    if not isinstance(model, MODELS[task.kind]):
        raise TypeError(f"model must be {MODELS[task.kind].__name__} for {task.kind}, got {type(model).__name__}")
    if len(examples) < settings.batch_size:
        raise ValueError(
            f"batch_size must be at most {len(examples)}, the examples there are, got {settings.batch_size}"
        )
    for example in (*examples, *held_out):
        longest = max(map(len, example.sequences))
        if longest > settings.context:
            raise ValueError(f"{example.where} has {longest} tokens, context is {settings.context}")
    folder = _prepare(model, settings, output, options)
    pack_above = PACK_ABOVE[model.device.type] if packed else 1.0
    data, judge = (
        Examples(them, batch_size=settings.batch_size, seed=settings.seed, pack_above=pack_above)
        for them in (examples, held_out)
    )
    objective = objective_for(model, task, settings)
    judged = judge.in_order() if held_out else []
    results: dict[str, float] = {}

    def judge_now() -> dict[str, float]:
        results.update(evaluate(objective, judged, settings))
        return results

    state = fit(
        objective,
        data,
        settings,
        folder,
        options,
        evaluate=judge_now if judged else None,
        parallel=parallel,
    )
    model = parallel.whole(model)
    if parallel.is_main:
        task.save(folder)
        counts = {"task": task.kind, "examples": len(examples), "held_out_examples": len(held_out)}
        _finish(folder, model, tokenizer, settings, {**counts, **results}, state, model.state_dict())
    parallel.barrier()
    return model, results


def objective_for(model: Any, task: Task, settings: Settings) -> Objective:
    if isinstance(model, OpenAIGPTDoubleHeadsModel):
        model.multiple_choice_head.first_dropout.p = settings.classifier_dropout
        model.config.summary_first_dropout = settings.classifier_dropout
    return Objective(
        model,
        lm_coef=settings.lm_coef,
        classifier_dropout=settings.classifier_dropout,
        regression=task.regression,
    )


@torch.no_grad()
def evaluate(objective: Objective, batches: Sequence[Batch], settings: Settings) -> dict[str, float]:
    """Mean loss over the batches and, where they have labels, accuracy or the correlation (Pearson's) of what is
    predicted. Every rank judges all batches."""
    device = objective.model.device
    was_training = objective.training
    objective.eval()
    losses, weights, predicted, labels = [], [], [], []
    for batch in batches:
        with autocast(settings, device):
            loss, _, logits = objective(batch.to(device))
        losses.append(float(loss))
        weights.append(batch.examples or batch.tokens)
        if logits is not None and batch.labels is not None:
            predicted.append(logits.squeeze(-1).float().cpu() if objective.regression else logits.argmax(-1).cpu())
            labels.append(batch.labels.cpu())
    objective.train(was_training)
    row = {"held_out_loss": sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)}
    if not predicted:
        return row
    ours, right = torch.cat(predicted), torch.cat(labels)
    if objective.regression:
        return {**row, "held_out_correlation": float(torch.corrcoef(torch.stack([ours, right]))[0, 1])}
    return {**row, "held_out_accuracy": float((ours == right).float().mean())}


def _prepare(model: Any, settings: Settings, output: str | os.PathLike, options: Options) -> Path:
    """The output folder, made if need be. Raises where the run cannot be."""
    check_output(output, options.resume)
    n_positions = model.config.n_positions
    if settings.context > n_positions:
        raise ValueError(f"context must be at most n_positions = {n_positions}, got {settings.context}")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _encode(tokenizer: OpenAIGPTTokenizer, texts: Sequence[str], progress: bool, title: str) -> Tensor:  # int64 [N]
    ids: list[int] = []
    for text in tqdm(texts, desc=title, unit="text", disable=not progress, leave=False):
        ids += tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    return torch.tensor(ids, dtype=torch.int64)


def _finish(
    folder: Path,
    model: Any,
    tokenizer: OpenAIGPTTokenizer,
    settings: Settings,
    results: dict[str, Any],
    state: State,
    weights: dict[str, Tensor],
) -> None:
    """Writes all that belongs to the model, then the model, by which a folder is known to be finished; only then the
    state may go."""
    with tempfile.TemporaryDirectory(dir=folder) as aside:  # a resumed run reads it from here: never half of a file
        tokenizer.save_pretrained(aside)
        for path in Path(aside).iterdir():
            path.replace(folder / path.name)
    summary = {
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        **results,
        "torch": torch.__version__,
        "device": model.device.type,
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    model.save_pretrained(folder, state_dict=weights)
    state.remove()
