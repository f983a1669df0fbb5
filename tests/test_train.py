"""Training: it learns, it can be stopped at any moment, and what it took for granted is checked."""

import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel, OpenAIGPTTokenizer
from gptfast.cli import main
from gptfast.scoring import score_ids
from gptfast.tokenizer import train_tokenizer
from gptfast.training import LOG_FILE, STATE_FILE, SUMMARY_FILE, Options, Settings, api, loop, read_texts, train
from gptfast.training.batch import Batch
from gptfast.training.graph import GraphedStep
from gptfast.training.loop import make_optimizer
from gptfast.training.report import keep_log_up_to
from gptfast.training.settings import learning_rate
from gptfast.training.text import Windows, split_held_out

POEMS = Path(__file__).parent / "data" / "poems.txt"
SETTINGS = Settings(steps=12, batch_size=2, context=16, warmup_steps=2, held_out=0.2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([POEMS.read_text()], 160, tokenization="basic")


def new_model(tokenizer, **settings):
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2, **settings)
    return OpenAIGPTLMHeadModel(config)


def run(tokenizer, folder, settings=SETTINGS, model=None, **options):
    model = new_model(tokenizer) if model is None else model
    options = Options(**{"save_every": 4, "evaluate_every": 6, "log_every": 2, "progress": False, **options})
    return train(model, tokenizer, [POEMS.read_text()], settings, folder, options=options)


def rows(folder):
    """The log, but for the speed."""
    speed = ("tokens_per_second", "mfu")
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in speed} for line in lines]


def test_learns_and_leaves_a_model(tokenizer, tmp_path):
    settings = Settings(steps=80, batch_size=4, context=16, learning_rate=1e-2, warmup_steps=5, held_out=0.1)
    model, score = run(tokenizer, tmp_path, settings, log_every=10)
    log = rows(tmp_path)
    assert log[-1]["step"] == 80
    assert log[-1]["loss"] < log[0]["loss"] - 1
    loaded = OpenAIGPTLMHeadModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert model.dtype == torch.float32
    assert not model.training
    assert len(OpenAIGPTTokenizer.from_pretrained(tmp_path)) == len(tokenizer)
    assert not (tmp_path / STATE_FILE).exists()
    held_out = split_held_out(POEMS.read_text(), 0.1)[1]
    ids = torch.tensor(tokenizer(held_out)["input_ids"])
    assert score == score_ids(model, ids, context=17, text_bytes=len(held_out.encode()))
    assert json.loads((tmp_path / SUMMARY_FILE).read_text())["held_out_perplexity"] == score.perplexity


def test_interrupted_and_resumed_equals_uninterrupted(tokenizer, tmp_path, monkeypatch):
    whole, _ = run(tokenizer, tmp_path / "whole")

    rate = loop.learning_rate

    def interrupt_at_step_5(step, settings):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return rate(step, settings)

    monkeypatch.setattr(loop, "learning_rate", interrupt_at_step_5)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 6"):
        run(tokenizer, tmp_path / "parts")
    monkeypatch.undo()
    assert (tmp_path / "parts" / STATE_FILE).exists()
    resumed, _ = run(tokenizer, tmp_path / "parts", resume=True)

    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL in a step, half-way through a state, between its files, behind the model: the same bits in the end."""
    command = [sys.executable, "-m", "tests.support.killed_run", str(POEMS), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    assert statuses["whole"] == 0
    *killed, last = statuses["parts"].values()
    assert len(killed) == 6
    assert set(killed) == {-signal.SIGKILL}
    assert last == 0
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    log = rows(tmp_path / "whole")
    assert [row["step"] for row in log] == list(range(1, 25))
    assert log == rows(tmp_path / "parts")


def test_unfinished_run_is_not_overwritten(tokenizer, tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="unfinished run"):
        run(tokenizer, tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == b"precious"


def test_finished_run_is_neither_repeated_nor_overwritten(tokenizer, tmp_path):
    run(tokenizer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds a finished model"):
            run(tokenizer, tmp_path, resume=resume)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("damage", [b"precious", b"", b"PK\x03\x04", None])
def test_damaged_state_is_named(tokenizer, tmp_path, damage):
    if damage is None:
        torch.save({"step": 3}, tmp_path / STATE_FILE)
    else:
        (tmp_path / STATE_FILE).write_bytes(damage)
    with pytest.raises(ValueError, match=r"training_state\.pt is damaged"):
        run(tokenizer, tmp_path, resume=True)


def test_trains_in_a_thread_of_its_own(tokenizer, tmp_path):
    with ThreadPoolExecutor() as pool:
        _, score = pool.submit(run, tokenizer, tmp_path).result()
    assert score.tokens > 0


def test_held_out_text_is_judged_at_trained_positions_only(tokenizer, tmp_path, monkeypatch):
    contexts = []

    def score(*args, context, **how):
        contexts.append(context)
        return score_ids(*args, context=context, **how)

    monkeypatch.setattr(api, "score_ids", score)
    run(tokenizer, tmp_path / "short")
    assert set(contexts) == {SETTINGS.context + 1}
    contexts.clear()
    run(tokenizer, tmp_path / "whole", Settings(steps=1, batch_size=1, context=32, held_out=0.2))
    assert set(contexts) == {32}


@pytest.mark.parametrize(
    ("text", "training_text"),
    [
        ("one\ntwo\nthree\nfour\n", "one\ntwo\n"),
        ("title\n" + "word " * 100, "title\n" + "word " * 69),  # the only line break is far off
        ("x" * 100, "x" * 70),
    ],
)
def test_held_out_is_the_end_of_the_text(text, training_text):
    a, b = split_held_out(text, 0.3)
    assert (a, a + b) == (training_text, text)
    assert split_held_out(text, 0.0) == (text, "")


def test_resume_under_other_settings_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda step, settings: signal.raise_signal(signal.SIGINT) or 1e-3)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, tmp_path)
    monkeypatch.undo()
    other = Settings(**{**SETTINGS.__dict__, "batch_size": 3})
    with pytest.raises(ValueError, match=r"other settings: \{'batch_size': 2\}, now \{'batch_size': 3\}"):
        run(tokenizer, tmp_path, other, resume=True)


def test_loss_that_is_not_finite_stops(tokenizer, tmp_path):
    model = new_model(tokenizer)
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="step 0: loss nan"):
        run(tokenizer, tmp_path, model=model)


def test_disk_full_keeps_the_last_state(tokenizer, tmp_path, monkeypatch):
    """The file system refuses a write half-way through the second state."""
    rate, limits = loop.learning_rate, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk_at_step_5(step, settings):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return rate(step, settings)

    monkeypatch.setattr(loop, "learning_rate", fill_disk_at_step_5)
    try:
        with pytest.raises(
            OSError, match="cannot write the state of step 8, the last good one is kept: File too large"
        ):
            run(tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.new"))
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 4
    run(tokenizer, tmp_path, resume=True)


def test_log_outlives_a_failure_while_it_is_cut(tokenizer, tmp_path, monkeypatch):
    rows = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (2, 4, 6)]
    log = tmp_path / LOG_FILE
    log.write_text("".join(rows))

    def half(path, text, *how):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        keep_log_up_to(log, 4)
    assert log.read_text() == "".join(rows)
    monkeypatch.undo()
    keep_log_up_to(log, 4)
    assert log.read_text() == "".join(rows[:2])


def test_killed_while_the_vocabulary_is_written(tmp_path, capsys):
    command = ["train", str(POEMS), "--output", str(tmp_path), "--vocab-size", "160", "--n-embd", "32", "--n-head", "2"]
    command += ["--n-layer", "1", "--context", "16", "--steps", "2", "--json", "--resume"]
    (tmp_path / "vocab.json").write_text('{"a"')
    assert main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "model.safetensors").exists()


def test_tokenizer_outlives_a_failure_while_it_is_written_again(tokenizer, tmp_path, monkeypatch):
    """A resumed run reads it from its own folder."""
    tokenizer.save_pretrained(tmp_path)
    before = (tmp_path / "vocab.json").read_bytes()

    def half(self, folder):
        (Path(folder) / "vocab.json").write_text('{"a"')
        raise OSError("no space left")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", half)
    with pytest.raises(OSError, match="no space left"):
        run(tokenizer, tmp_path, Settings(steps=1, batch_size=1, context=16))
    assert (tmp_path / "vocab.json").read_bytes() == before


def test_recorded_step_takes_no_other_number_of_tokens():
    """A CUDA graph holds the divisor of the loss that it was recorded with."""
    ids = torch.zeros(2, 4, dtype=torch.int64)
    batch = Batch(ids, ids, 8, "a")
    step = GraphedStep(lambda batches: torch.zeros(()), [])
    step.graph, step.static, step.loss = SimpleNamespace(replay=lambda: None), [batch], torch.ones(())
    assert step([Batch(ids + 1, ids, 8, "b")]) == 1
    assert (batch.input_ids == 1).all()
    with pytest.raises(ValueError, match="cuda_graph needs batches alike, got tokens 8 and 7"):
        step([Batch(ids, ids, 7, "c")])
    with pytest.raises(ValueError, match=r"cuda_graph needs batches alike, got input_ids \(2, 4\) and \(1, 4\)"):
        step([Batch(ids[:1], ids[:1], 8, "d")])


def test_learning_rate():
    settings = Settings(steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, settings) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3


def test_batches_repeat_nothing_in_an_epoch_and_depend_on_the_step_alone():
    ids = torch.arange(1000)
    windows = Windows(ids, batch_size=3, context=7, seed=1)
    epoch = [windows.batch(step) for step in range(windows.per_epoch)]
    predicted = torch.cat([batch.targets.flatten() for batch in epoch])
    assert len(predicted.unique()) == len(predicted) > 900
    assert all((batch.input_ids.diff(dim=1) == 1).all() for batch in epoch)
    assert all((batch.targets == batch.input_ids + 1).all() for batch in epoch)
    again = Windows(ids, batch_size=3, context=7, seed=1)
    later = windows.per_epoch + 2
    assert torch.equal(again[later], windows[later])
    assert torch.equal(again.batch(1).input_ids, epoch[1].input_ids)
    assert not torch.equal(Windows(ids, batch_size=3, context=7, seed=2)[1], again[1])
    shares = [windows.batch(1, part, 2) for part in range(2)]
    assert torch.equal(torch.cat([s.input_ids for s in shares]), epoch[1].input_ids)
    assert {s.tokens for s in shares} == {21}  # of the whole step


def test_weight_decay_is_for_matrices(tokenizer):
    decayed, others = make_optimizer(new_model(tokenizer), SETTINGS).param_groups
    assert decayed["weight_decay"] == 0.1
    assert all(p.ndim == 2 for p in decayed["params"])
    assert others["weight_decay"] == 0
    assert all(p.ndim == 1 for p in others["params"])
    assert len(others["params"]) == 2 * 8  # biases and gains of two blocks


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*32 - 1, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"steps": 1, **setting})


def test_bad_text(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, a batch of 4096 sequences of 16 needs"):
        run(tokenizer, tmp_path, Settings(steps=1, batch_size=4096, context=16))
    with pytest.raises(ValueError, match="context must be at most n_positions = 32, got 33"):
        run(tokenizer, tmp_path, Settings(steps=1, batch_size=1, context=33))
    for name in ("save_every", "evaluate_every", "log_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            run(tokenizer, tmp_path, **{name: 0})
    with pytest.raises(FileNotFoundError):
        read_texts([tmp_path / "missing.txt"])
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_texts([tmp_path / "latin1.txt"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts([tmp_path / "empty.txt"])
