"""Fine-tunes the shipped model on pages of four books: who wrote a page, and which line comes next.

    python examples/fine_tune_on_books.py ../shared/data/books --output FOLDER [--save FIGURES.json]

Makes the data, trains by ``gptfast train --task``, and judges on pages from the end of each book, which neither this
training nor the model's own has seen. Minutes on one core of a CPU.
"""

import argparse
import json
import platform
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from gptfast.cli import main as gptfast
from gptfast.training import SUMMARY_FILE, read_texts, split_held_out

HELD_OUT = 0.05  # of each book: what the shipped model's training held out
HELD_OUT_EXAMPLES = 600
PAGE = 60  # words
CONTEXT = 2  # lines before the one to choose
BOOKS = ("moby-dick", "pride_and_prejudice", "tinyshakespeare", "war_and_peace")


def write_rows(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def authorship(texts: Sequence[str], n: int, seed: int, words: int = PAGE) -> list[dict[str, str]]:
    """n pages, as many of each book, as {"text", "label"}; no two overlap. Names in capitals would give plays away."""
    random_ = random.Random(seed)
    rows = []
    for book, text in zip(BOOKS, texts, strict=True):
        tokens = text.lower().split()
        starts = range(0, len(tokens) - words, words)
        for start in random_.sample(starts, min(n // len(BOOKS), len(starts))):
            rows.append({"text": " ".join(tokens[start : start + words]), "label": book})
    random_.shuffle(rows)
    return rows


def next_line(texts: Sequence[str], n: int, seed: int, choices: int = 2) -> list[dict[str, str]]:
    """n places, as {"context", "choice_0", …, "label"}: the line that follows, and lines from anywhere in the books."""
    random_ = random.Random(seed)
    books = [[line.strip().lower() for line in text.splitlines() if len(line.split()) >= 5] for text in texts]
    rows = []
    for lines in books:
        for at in random_.sample(range(CONTEXT, len(lines)), n // len(books)):
            others = [random_.choice(random_.choice(books)) for _ in range(choices - 1)]
            order = random_.sample([lines[at], *others], choices)
            row = {"context": " ".join(lines[at - CONTEXT : at]), "label": str(order.index(lines[at]))}
            rows.append(row | {f"choice_{k}": line for k, line in enumerate(order)})
    random_.shuffle(rows)
    return rows


def fine_tune(
    task: str, rows: Sequence[dict], held_out: Sequence[dict], folder: Path, arguments: Sequence[str]
) -> dict:
    """What ``gptfast train`` leaves about a run: settings, held-out accuracy, chance."""
    folder.mkdir(parents=True, exist_ok=True)
    train, valid = (write_rows(folder / name, r) for name, r in (("train.jsonl", rows), ("valid.jsonl", held_out)))
    columns = [f"choice={name}" for name in sorted(rows[0]) if name.startswith("choice")]
    command = ["train", str(train), "--task", task, "--valid", str(valid), "--output", str(folder / "model")]
    command += ["--columns", *columns] if columns else []
    if gptfast([*command, *arguments]) != 0:
        raise SystemExit(f"gptfast {' '.join(command)} failed")
    summary = json.loads((folder / "model" / SUMMARY_FILE).read_text())
    found = Counter(row["label"] for row in held_out)
    return {
        **summary,
        "chance": max(found.values()) / len(held_out),  # of whoever always says the most frequent
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("books", help="the folder of the four books")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--save", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--examples", type=int, default=2400, help="of the next line; half as many pages")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    parts = [split_held_out(text, HELD_OUT) for text in read_texts([Path(args.books) / f"{b}.txt" for b in BOOKS])]
    seen, unseen = ([part[i] for part in parts] for i in (0, 1))
    # a model of 3.6 million weights moves little at the paper's rate for 117 million
    settings = ["--learning-rate", "6e-4", "--seed", str(args.seed), "--attention-dropout", "0", "--log-every", "10"]
    figures = {"device": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for task, name, make, n in (
        ("classification", "authorship", authorship, args.examples // 2),
        ("multiple-choice", "next_line", next_line, args.examples),
    ):
        rows, held_out = make(seen, n, args.seed), make(unseen, HELD_OUT_EXAMPLES, args.seed + 1)
        figures[name] = fine_tune(task, rows, held_out, Path(args.output) / name, settings)
        accuracy, chance = figures[name]["held_out_accuracy"], figures[name]["chance"]
        print(f"{name}: {accuracy:.1%} of {len(held_out)} held-out examples, chance {chance:.0%}")
    if args.save:
        Path(args.save).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
