"""One of two ranks that train a tiny model each way there is; tests/test_distributed.py starts both.

``python -m tests.support.two_ranks FOLDER`` with torchrun's environment. What runs leave stands in FOLDER.
"""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast.tokenizer import train_tokenizer
from gptfast.training import Options, Settings, Task, fine_tune, fine_tuning_settings, load_for_task, loop, train
from gptfast.training.objective import Objective
from gptfast.training.parallel import Parallel, start
from gptfast.training.tasks import read_examples

POEMS = Path(__file__).parent.parent / "data" / "poems.txt"
SETTINGS = Settings(steps=8, batch_size=5, context=16, warmup_steps=2, held_out=0.1, learning_rate=3e-3)
OPTIONS = Options(save_every=3, evaluate_every=4, log_every=1, progress=False)
TASK = Task("multiple-choice", {"choice": ["a", "b"]}, ("a", "b"))
SHAPE = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def on_text(
    folder: Path, parallel: Parallel, settings: Settings = SETTINGS, resume: bool = False, dropout: float = 0.0
) -> None:
    tokenizer = train_tokenizer([POEMS.read_text()], 160, tokenization="basic")
    torch.manual_seed(0)
    model = OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=len(tokenizer), **SHAPE, **dict.fromkeys(DROPOUTS, dropout))
    )
    options = replace(OPTIONS, resume=resume)
    train(model, tokenizer, [POEMS.read_text()], settings, folder, options=options, parallel=parallel)


def on_choices(folder: Path, parallel: Parallel, base: Path) -> None:
    """Sequences of many lengths, so that ranks differ in their number of tokens."""
    words = POEMS.read_text().split()
    lines = ["context\ta\tb\tlabel"]
    for i in range(12):
        right, wrong = " ".join(words[i + 3 : i + 5 + i % 4]), words[(7 * i) % 50]
        choices = (right, wrong) if i % 2 else (wrong, right)
        lines.append("\t".join([" ".join(words[i : i + 3]), *choices, "ba"[i % 2]]))
    file = folder.with_suffix(".tsv")
    if parallel.is_main:
        file.write_text("\n".join(lines) + "\n")
    parallel.barrier()
    torch.manual_seed(0)
    model, tokenizer = load_for_task(base, TASK, dropout=0.0, attention_dropout=0.0)
    examples = read_examples(file, TASK, tokenizer, 32)
    settings = fine_tuning_settings(
        12, batch_size=6, context=32, learning_rate=3e-3, accumulate=2, classifier_dropout=0.0
    )
    fine_tune(model, tokenizer, TASK, examples, settings, folder, held_out=examples, options=OPTIONS, parallel=parallel)


def interrupted(folder: Path, parallel: Parallel) -> str:
    """Ctrl-C reaches rank 1 alone, in its fifth step; both stop, then go on."""
    rate = loop.learning_rate

    def interrupt(step: int, settings: Settings) -> float:
        if step == 4 and parallel.rank == 1:
            signal.raise_signal(signal.SIGINT)
        return rate(step, settings)

    loop.learning_rate = interrupt
    try:
        on_text(folder, parallel)
    except KeyboardInterrupt as stopped:
        message = str(stopped)
    loop.learning_rate = rate
    if parallel.is_main:  # of a run that died while it saved
        half = folder / "training_state-000000006.new"
        half.mkdir()
        (half / "__0_0.distcp").write_bytes(b"half")
    parallel.barrier()
    on_text(folder, parallel, resume=True)
    return message


def parts_of_an_mlp(parallel: Parallel) -> dict[str, list[int]]:
    """Shapes of what this rank holds."""
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=160, **SHAPE))
    parallel.wrap(Objective(model))
    return {name: list(p.to_local().shape) for name, p in model.transformer.h[0].mlp.named_parameters()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    messages = {}
    for kind in ("ddp", "fsdp", "tensor"):
        parallel, _ = start(kind)
        on_text(folder / f"text-{kind}", parallel)
        on_text(folder / f"parts-{kind}", parallel, replace(SETTINGS, accumulate=2))
        on_choices(folder / f"choices-{kind}", parallel, folder / "base")
        messages[kind] = interrupted(folder / f"interrupted-{kind}", parallel)
    messages["mlp"] = parts_of_an_mlp(parallel)
    on_text(folder / "dropout-tensor", parallel, dropout=0.1)
    parallel, _ = start("ddp")
    try:
        on_text(folder / "many", parallel, replace(SETTINGS, accumulate=3))
    except ValueError as refused:
        messages["many"] = str(refused)
    if parallel.is_main:
        (folder / "messages.json").write_text(json.dumps(messages))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
