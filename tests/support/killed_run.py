"""Trains a tiny model twice: once undisturbed, once killed at the worst moments and resumed each time.

Prints, as JSON, how many processes were killed. The parent forks each run before it computes anything itself, so that
one import serves all of them: ``python -m tests.support.killed_run TEXT FOLDER``.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast.tokenizer import train_tokenizer
from gptfast.training import Options, Settings, loop, train
from gptfast.training.state import State

SETTINGS = Settings(steps=24, batch_size=4, context=16, warmup_steps=4, held_out=0.1, accumulate=2)
OPTIONS = Options(resume=True, save_every=3, evaluate_every=6, log_every=1, progress=False)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step():
    rate, calls = loop.learning_rate, iter(range(5))
    loop.learning_rate = lambda *args: rate(*args) if next(calls, None) is not None else die()


def half_way_through_a_state():
    def save(state, handle):
        handle.write(b"PK\x03\x04 half a state")
        handle.flush()
        if state["step"] == 9:
            die()
        handle.seek(0)
        handle.truncate()
        torch_save(state, handle)

    torch_save, torch.save = torch.save, save


def behind_a_state():
    save = State.save
    State.save = lambda self, step, losses: (save(self, step, losses), step == 12 and die())


def half_way_through_a_row():
    row = loop.Report.row

    def write(self, values):
        if values["step"] == 17:
            self.log.write('{"step": 17, "lo')
            self.log.flush()
            die()
        row(self, values)

    loop.Report.row = write


def before_the_model_is_written():
    OpenAIGPTLMHeadModel.save_pretrained = die


def behind_the_model():
    State.remove = die


def nowhere():
    pass


MOMENTS = [
    in_a_step,
    half_way_through_a_state,
    behind_a_state,
    half_way_through_a_row,
    before_the_model_is_written,
    behind_the_model,
    nowhere,
]


def run(text: str, folder: Path, moment) -> int:
    """The exit status of a forked run; negative is the signal that ended it."""
    child = os.fork()
    if not child:
        moment()
        tokenizer = train_tokenizer([text], 160, tokenization="basic")
        torch.manual_seed(0)
        shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(tokenizer), **shape))
        train(model, tokenizer, [text], SETTINGS, folder, options=OPTIONS)
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(text_file: str, folder: str) -> None:
    torch.set_num_threads(1)
    text = Path(text_file).read_text()
    whole = run(text, Path(folder) / "whole", nowhere)
    statuses = [run(text, Path(folder) / "parts", moment) for moment in MOMENTS]
    print(json.dumps({"whole": whole, "parts": dict(zip((m.__name__ for m in MOMENTS), statuses, strict=True))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
