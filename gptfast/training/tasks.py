"""The tasks GPT-1 is fine-tuned for, and how an example becomes token sequences (Radford et al. 2018, section 3.3).

    language-modeling    text
    classification       start text extract
    entailment           start premise delimiter hypothesis extract
    similarity           start first delimiter second extract, and the same with first and second exchanged
    multiple-choice      start context delimiter choice extract, once a choice

A task's head reads the state at ``extract``. The three tokens are new; their names are those of OpenAI's own code.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..heads import OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification, OpenAIGPTLMHeadModel
from ..tokenizer import OpenAIGPTTokenizer
from .batch import Batch, collate, share, shuffled
from .tables import read_rows

START, DELIMITER, EXTRACT = "_start_", "_delimiter_", "_classify_"
TASK_FILE = "task.json"
ROLES = {
    "language-modeling": ("text",),
    "classification": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("first", "second"),
    "multiple-choice": ("context", "choice"),
}
# tokens of a sequence with one of each text
LEAST = {"language-modeling": 2, "classification": 3, "entailment": 5, "similarity": 5, "multiple-choice": 5}
# A CPU runs attention a packed sequence at a time, which pays where a fifth of a batch would be padding; a GPU's kernel
# takes them all at once. On 2 cores, 16 sequences, 6 layers of width 192: lengths 64, 0.85 times as fast; 20 to 80, 1.1
# to 1.2 times; 30 to 400, 1.3 to 1.6 times.
PACK_ABOVE = {"cpu": 0.2, "cuda": 0.0}
MODELS: dict[str, Any] = {
    "language-modeling": OpenAIGPTLMHeadModel,
    "classification": OpenAIGPTForSequenceClassification,
    "entailment": OpenAIGPTForSequenceClassification,
    "similarity": OpenAIGPTForSequenceClassification,
    "multiple-choice": OpenAIGPTDoubleHeadsModel,
}


@dataclass(frozen=True)
class Task:
    """A kind of task and where its parts stand in a file.

    Args:
        kind: a key of ``ROLES``.
        columns: names by role, and ``label``. A role's several columns are read one after the other (a document and a
            question as ``context``), but each ``choice`` is an answer of its own. A role that is not given is a column
            of its own name.
        labels: names of the classes, or what stands for the first, second … choice; ``with_labels_of`` finds them.
        regression: the label is a number, not a class.
    """

    kind: str
    columns: Mapping[str, Sequence[str]]
    labels: tuple[str, ...] = ()
    regression: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ROLES:
            raise ValueError(f"kind must be one of {', '.join(ROLES)}, got {self.kind!r}")
        roles = (*ROLES[self.kind], *(() if self.kind == "language-modeling" else ("label",)))
        for role in self.columns:
            if role not in roles:
                raise ValueError(f"columns of {self.kind} must be of {', '.join(roles)}, got {role!r}")
        columns = {role: tuple(self.columns.get(role, (role,))) for role in roles}
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(columns.get("label", ("",))) != 1:
            raise ValueError(f"label must be one column, got {', '.join(columns['label'])}")
        if self.kind == "multiple-choice" and len(columns["choice"]) < 2:
            raise ValueError(f"choice must be at least two columns, got {', '.join(columns['choice'])}")
        if self.regression and (self.kind in ("language-modeling", "multiple-choice") or self.labels):
            raise ValueError(f"regression goes with a number to predict, not with {self.kind} or labels {self.labels}")
        if self.kind == "multiple-choice" and self.labels and len(self.labels) != len(columns["choice"]):
            raise ValueError(f"labels must name {len(columns['choice'])} choices, got {', '.join(self.labels)}")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise ValueError(f"labels must be at least two that differ, got {', '.join(self.labels)}")

    @property
    def has_head(self) -> bool:
        return self.kind != "language-modeling"

    def with_labels_of(self, *files: str | os.PathLike) -> "Task":
        """This task with the labels that stand in the files, in order; itself if it has labels or needs none.

        The choices of multiple choice go by their column names, or by numbers from 0 or from 1, or in order.
        """
        if self.labels or self.regression or not self.has_head:
            return self
        (column,) = self.columns["label"]
        found = set()
        for file in files:
            for line, row in read_rows(file, [column]):
                if not row[column].strip():
                    raise ValueError(f"{file}:{line}: {column} is empty")
                found.add(row[column])
        where = ", ".join(map(str, files))
        labels = sorted(found, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))
        if self.kind == "multiple-choice":
            choices = self.columns["choice"]
            n = len(choices)
            ways = (choices, [str(i) for i in range(n)], [str(i + 1) for i in range(n)], labels)
            labels = next((list(way) for way in ways if found <= set(way) and len(way) == n), [])
            if not labels:
                raise ValueError(f"{where}: {column} must tell {n} choices apart, got {', '.join(sorted(found))}")
        elif len(labels) < 2:
            raise ValueError(f"{where}: {column} must hold at least two labels, got {', '.join(labels) or 'none'}")
        return replace(self, labels=tuple(labels))

    def save(self, folder: str | os.PathLike) -> None:
        (Path(folder) / TASK_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Task":
        """Raises OSError where the folder holds no fine-tuned model, ValueError where its task is damaged."""
        path = Path(folder) / TASK_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} has no {TASK_FILE}: it is no fine-tuned model") from error
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class Example:
    sequences: tuple[tuple[int, ...], ...]  # one, or one for each order or choice
    label: int | float | None  # class or choice, or the number to predict
    where: str  # file:line
    cut: bool  # too long, so not all of it is there


def add_task_tokens(model: Any, tokenizer: OpenAIGPTTokenizer) -> None:
    """Adds start, delimiter and extract to the vocabulary, with new rows N(0, initializer_range) in the token table."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [START, DELIMITER, EXTRACT]}, replace_additional_special_tokens=False
    )
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # no sequence ends in it, which is all that HuggingFace's classification head asks of padding
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(tokenizer.pad_token or START)
    tokenizer.pad_token = tokenizer.pad_token or START


def read_examples(
    file: str | os.PathLike, task: Task, tokenizer: OpenAIGPTTokenizer, max_length: int, *, labelled: bool = True
) -> list[Example]:
    """The examples of a file. ``labelled=False`` reads no labels.

    Raises:
        OSError: the file cannot be read. ValueError: ``max_length`` leaves no room for text, or a line is not as
        ``task`` says; then the message starts with ``file:line``.
    """
    least = LEAST[task.kind]
    if max_length < least:
        raise ValueError(
            f"max_length must be at least {least}: a sequence of {task.kind} has at least {least} tokens, "
            f"got {max_length}"
        )
    labelled = labelled and task.has_head
    roles = ROLES[task.kind]
    columns = [name for role in roles for name in task.columns[role]]
    examples = []
    for line, row in read_rows(file, [*columns, *(task.columns["label"] if labelled else ())]):
        where = f"{file}:{line}"
        parts: dict[str, list[list[int]]] = {}
        for role in roles:
            names = task.columns[role]
            texts = [row[name] for name in names] if role == "choice" else [" ".join(row[name] for name in names)]
            parts[role] = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]
            if not all(parts[role]):
                raise ValueError(f"{where}: {' and '.join(names)} must hold some text, got {texts}")
        if not task.has_head and len(parts["text"][0]) < least:  # one token: none is predicted
            raise ValueError(f"{where}: {' and '.join(names)} must hold at least two tokens, got {texts}")
        sequences, cut = _sequences(task.kind, parts, tokenizer, max_length)
        label = _label(task, row[task.columns["label"][0]], where) if labelled else None
        examples.append(Example(sequences, label, where, cut))
    if not examples:
        raise ValueError(f"{file} holds no examples")
    return examples


def _sequences(
    kind: str, parts: dict[str, list[list[int]]], tokenizer: OpenAIGPTTokenizer, max_length: int
) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """The token sequences of one example, and whether they were cut to ``max_length``."""
    roles = ROLES[kind]
    if kind == "language-modeling":
        (text,) = parts["text"]
        return (tuple(text[:max_length]),), len(text) > max_length
    start, delimiter, extract = tokenizer.convert_tokens_to_ids([START, DELIMITER, EXTRACT])
    if kind == "classification":
        (text,) = parts["text"]
        kept = text[: max_length - 2]
        return ((start, *kept, extract),), len(kept) < len(text)
    pairs = [(a, b) for a in parts[roles[0]] for b in parts[roles[1]]]
    pairs += [(b, a) for a, b in pairs] if kind == "similarity" else []
    cuts = [_cut(a, b, max_length - 3) for a, b in pairs]
    sequences = tuple((start, *a, delimiter, *b, extract) for a, b in cuts)
    return sequences, cuts != pairs


def _cut(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both without the end of the longer, or of both, so that they fit."""
    if len(a) + len(b) <= room:
        return a, b
    kept_b = min(len(b), max(room - len(a), room // 2))
    return a[: room - kept_b], b[:kept_b]


def _label(task: Task, text: str, where: str) -> int | float:
    if task.regression:
        try:
            value = float(text)
        except ValueError as error:
            raise ValueError(f"{where}: {task.columns['label'][0]} must be a number, got {text!r}") from error
        if not math.isfinite(value):
            raise ValueError(f"{where}: {task.columns['label'][0]} must be a finite number, got {text!r}")
        return value
    if text not in task.labels:
        raise ValueError(f"{where}: {task.columns['label'][0]} must be one of {', '.join(task.labels)}, got {text!r}")
    return task.labels.index(text)


class Examples:
    """Batches of examples, in a new order each epoch, all full: the last few of an order wait for the next epoch.

    Args:
        pack_above: a batch is packed where more than this fraction of its rectangle would be padding; 1 never packs.
    """

    def __init__(self, examples: Sequence[Example], *, batch_size: int, seed: int = 0, pack_above: float = 0.0):
        self.examples, self.batch_size, self.seed, self.pack_above = examples, batch_size, seed, pack_above
        self.per_epoch = len(examples) // batch_size

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """One of ``parts`` of a step."""
        indices = shuffled(len(self.examples), self.batch_size, step, self.seed)
        return self._of(share(indices, part, parts).tolist(), indices.tolist())

    def in_order(self) -> list[Batch]:
        """Every example once, to evaluate on or to predict."""
        groups = torch.arange(len(self.examples)).split(self.batch_size)
        return [self._of(group.tolist(), group.tolist()) for group in groups]

    def _of(self, mine: list[int], step: list[int]) -> Batch:
        chosen = [self.examples[i] for i in mine]
        sequences = [s for example in chosen for s in example.sequences]
        filled = sum(map(len, sequences)) / (len(sequences) * max(map(len, sequences)))
        fields, last = collate(sequences, packed=1 - filled > self.pack_above)
        labels = [example.label for example in chosen if example.label is not None]
        return Batch(
            **fields,
            tokens=sum(len(s) - 1 for i in step for s in self.examples[i].sequences),
            source=", ".join(example.where for example in chosen),
            extract=last.view(len(chosen), -1),
            labels=torch.tensor(labels) if labels else None,
            examples=len(step),
        )

    def fingerprint(self) -> dict[str, float]:
        """Tells whether a run is resumed on the same examples, batched the same way."""
        ids = torch.tensor([i for example in self.examples for s in example.sequences for i in s])
        weights = torch.arange(1, len(ids) + 1) % 65_521
        labels = torch.tensor([example.label or 0.0 for example in self.examples], dtype=torch.float64)
        places = torch.arange(1, len(labels) + 1, dtype=torch.float64)
        return {
            "tokens": len(ids),
            "text": int((ids * weights).sum()),
            "labels": float((labels * places).sum()),
            "pack_above": self.pack_above,  # dropout draws otherwise for a packed batch
        }
