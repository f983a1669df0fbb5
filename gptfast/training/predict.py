"""A fine-tuned model's answers, from its folder alone."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import OpenAIGPTConfig
from ..tokenizer import OpenAIGPTTokenizer
from .objective import Objective
from .state import SUMMARY_FILE
from .tasks import MODELS, PACK_ABOVE, Example, Examples, Task, add_task_tokens, read_examples


def load_for_task(
    model_name: str | os.PathLike, task: Task, *, dropout: float = 0.1, attention_dropout: float = 0.1
) -> tuple[Any, OpenAIGPTTokenizer]:
    """A pretrained model with the task's head, in float32, and its tokenizer with the task's tokens.

    What is new is drawn from torch's generator: seed it.

    Args:
        dropout: on embeddings and behind each projection, 0.1 in the paper. attention_dropout: on attention weights.

    Raises:
        ValueError: a dropout is not in [0, 1).
    """
    for name, p in (("dropout", dropout), ("attention_dropout", attention_dropout)):
        if not 0 <= p < 1:
            raise ValueError(f"{name} must be in [0, 1), got {p}")
    config = OpenAIGPTConfig.from_pretrained(model_name)
    config.resid_pdrop = config.embd_pdrop = dropout
    config.attn_pdrop = attention_dropout
    config.summary_type = "cls_index"
    if MODELS[task.kind].__name__ == "OpenAIGPTForSequenceClassification":
        config.num_labels = 1 if task.regression else len(task.labels)
        config.problem_type = "regression" if task.regression else "single_label_classification"
        if task.labels:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
    tokenizer = OpenAIGPTTokenizer.from_pretrained(model_name)
    model = MODELS[task.kind].from_pretrained(model_name, config=config, dtype=torch.float32)
    if task.has_head:
        add_task_tokens(model, tokenizer)
    return model, tokenizer


def load_fine_tuned(folder: str | os.PathLike) -> tuple[Any, OpenAIGPTTokenizer, Task]:
    """What ``fine_tune`` left in a folder. OSError, ValueError: it is not there, or damaged."""
    task = Task.load(folder)
    model = MODELS[task.kind].from_pretrained(folder, dtype=torch.float32)
    return model, OpenAIGPTTokenizer.from_pretrained(folder), task


def predict(model: Any, task: Task, examples: Sequence[Example], *, batch_size: int = 32) -> Iterator[dict[str, Any]]:
    """Yields a row for each example: ``label`` and ``probabilities`` by label; of regression ``value``.

    Args:
        model, task: what ``load_fine_tuned`` gives, the model on any device.

    Raises:
        ValueError: the task has no labels, or ``batch_size`` is below 1. At once, not with the first row.
    """
    if not task.has_head:
        raise ValueError("a language model has no labels to predict: use gptfast score or gptfast generate")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return _rows(model, task, examples, batch_size)


@torch.inference_mode()
def _rows(model: Any, task: Task, examples: Sequence[Example], batch_size: int) -> Iterator[dict[str, Any]]:
    objective = Objective(model, lm_coef=0.0, regression=task.regression).eval()
    pack_above = PACK_ABOVE[model.device.type]
    for batch in Examples(examples, batch_size=batch_size, pack_above=pack_above).in_order():
        _, _, logits = objective(batch.to(model.device))
        if task.regression:
            yield from ({"value": value} for value in logits.squeeze(-1).tolist())
            continue
        for probabilities in logits.double().softmax(-1).tolist():
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            yield {"label": task.labels[best], "probabilities": dict(zip(task.labels, probabilities, strict=True))}


def predict_file(
    folder: str | os.PathLike, file: str | os.PathLike, *, device: torch.device, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """``predict`` for the lines of a TSV, CSV or JSON-lines file, whose label column is not needed.

    Long texts are cut as training cut them. The file is read before this returns.
    """
    model, tokenizer, task = load_fine_tuned(folder)
    summary = Path(folder) / SUMMARY_FILE
    try:
        context = json.loads(summary.read_text(encoding="utf-8"))["settings"]["context"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{summary} is damaged: {error}") from error
    examples = read_examples(file, task, tokenizer, context, labelled=False)
    return predict(model.to(device), task, examples, batch_size=batch_size)
