"""The commands, on the model that ships, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptfast import OpenAIGPTLMHeadModel, OpenAIGPTTokenizer
from gptfast.cli import SHIPPED, main
from gptfast_kernels import use_backend

# without ftfy and spaCy the shipped tokenizer says so, once; what the commands do is the same
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be imported .pip install")
POEMS = Path(__file__).parent / "data" / "poems.txt"


@pytest.fixture
def run(capsys):
    """Runs a command; returns (status, standard output, standard error)."""

    def run(*argv):
        status = main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return run


def test_demo_says_what_runs_checks_itself_and_speaks(run, tmp_path):
    file = tmp_path / "figures.json"
    arguments = ["--max-new-tokens", 8, "--prompt", "The captain of the ship", "--save", file]
    status, out, _ = run("demo", "--rounds", 1, *arguments)
    assert status == 0
    figures = json.loads(file.read_text())
    assert f"{figures['forward_ms']:.1f} ms, unfused reference {figures['reference_ms']:.1f} ms" in out
    assert figures["generation"]["new_tokens"] == 8
    assert "flash_attention" in out
    assert "torch" in out
    error = float(out.split("against the reference in float64: ")[1].split(";")[0])
    assert 0 < error < 1e-3
    assert "times as fast" in out
    assert "the captain of the ship " in out
    assert "[8 tokens" in out


def test_demo_would_show_a_wrong_kernel(run, monkeypatch):
    import gptfast.cpu

    gelu = gptfast.cpu._gelu_
    monkeypatch.setattr(gptfast.cpu, "_gelu_", lambda *args: gelu(*args).mul_(1.01))
    _, out, _ = run("demo", "--rounds", 1, "--max-new-tokens", 1)
    assert float(out.split("against the reference in float64: ")[1].split(";")[0]) > 1e-2


def test_generate_is_repeatable_and_json_tells_what_the_text_shows(run, tmp_path):
    arguments = ["--max-new-tokens", 12, "--seed", 5]
    status, text, speed = run("generate", "--prompt", "In the forests of the night", *arguments)
    assert status == 0
    assert speed.startswith("[12 tokens")
    (tmp_path / "prompt.txt").write_text("In the forests of the night")
    status, out, _ = run("generate", "--prompt-file", tmp_path / "prompt.txt", "--json", *arguments)
    result = json.loads(out)
    assert status == 0
    assert result["new_tokens"] == 12
    assert result["text"].split() == text.split()
    assert result["text"].startswith("in the forests of the night ")


def test_greedy_generate_equals_the_model(run):
    _, out, _ = run("generate", "--prompt", "And what shoulder", "--greedy", "--max-new-tokens", 6, "--json")
    model = OpenAIGPTLMHeadModel.from_pretrained(SHIPPED, dtype=torch.float32)
    tokenizer = OpenAIGPTTokenizer.from_pretrained(SHIPPED)
    ids = tokenizer("And what shoulder", return_tensors="pt")["input_ids"]
    assert json.loads(out)["text"] == tokenizer.decode(model.generate(ids, max_new_tokens=6)[0])


def test_stop_ends_the_text(run):
    _, out, _ = run("generate", "--prompt", "He said", "--stop", ".", "--stop", ",", "--json", "--seed", 1)
    result = json.loads(out)
    assert result["text"].endswith((".", ",")) or result["new_tokens"] == 100
    assert not any(mark in result["text"][:-1] for mark in ".,")
    assert run("generate", "--prompt", "He", "--stop", "two words")[0] == 2


def test_score_predicts_the_language_it_knows(run, tmp_path):
    """English is likelier to the shipped model than the same words shuffled."""
    text = POEMS.read_text()
    shuffled = sorted(text.split())
    (tmp_path / "shuffled.txt").write_text(" ".join(shuffled))
    status, out, _ = run("score", POEMS, "--json")
    assert status == 0
    row = json.loads(out)
    assert row["bytes"] == len(text.encode())
    assert row["perplexity"] < json.loads(run("score", tmp_path / "shuffled.txt", "--json")[1])["perplexity"]
    status, out, _ = run("score", POEMS, "--context", 128, "--stride", 64)
    assert status == 0
    assert f"{row['tokens']:,} tokens" in out


def test_train_then_generate(run, tmp_path):
    folder = tmp_path / "model"
    size = ["--n-embd", 16, "--n-layer", 1, "--n-head", 2, "--n-positions", 32, "--vocab-size", 150]
    status, out, err = run("train", POEMS, "--output", folder, "--steps", 3, "--context", 16, "--batch-size", 2, *size)
    assert status == 0, err
    assert "held-out perplexity" in out
    assert run("generate", "--model", folder, "--prompt", "What the hammer", "--max-new-tokens", 3)[0] == 0


def test_a_finished_model_is_not_trained_over(run, tmp_path):
    for file in SHIPPED.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    status, _, err = run("train", POEMS, "--output", tmp_path, "--steps", 3, "--vocab-size", 150)
    assert status == 2
    assert "finished model" in err
    assert (tmp_path / "vocab.json").read_bytes() == (SHIPPED / "vocab.json").read_bytes()


def test_score_counts_the_bytes_of_the_file(run, tmp_path):
    (tmp_path / "windows.txt").write_bytes("What the hammer?\r\nWhat the café?\r\n".encode())
    assert json.loads(run("score", tmp_path / "windows.txt", "--json")[1])["bytes"] == 35


def test_backend_of_the_environment(run, monkeypatch):
    with use_backend("reference"):
        rows = json.loads(run("explain", "--length", 16, "--json")[1])
    assert {row["backend"] for row in rows} == {"reference"}
    monkeypatch.setattr("gptfast_kernels._triton.INTERPRETED", False)
    if not torch.cuda.is_available():
        with use_backend("triton"):
            status, _, err = run("explain", "--length", 16)
        assert status == 2
        assert "backend='triton' cannot run here" in err


def test_explain_and_env(run):
    status, out, _ = run("explain", "--length", 16, "--json")
    assert status == 0
    rows = {row["op"]: row for row in json.loads(out)}
    assert {"embedding", "layer_norm", "linear_gelu"} < set(rows)
    assert all(row["backend"] == "triton" or row["reason"] for row in rows.values())
    assert "flash_attention" in run("explain", "--length", 16)[1]

    status, out, _ = run("env", "--json")
    assert status == 0
    row = json.loads(out)
    assert row["torch"] == torch.__version__
    assert row["python"] == ".".join(map(str, sys.version_info[:3]))
    assert row["shipped_model"] is True
    assert torch.__version__ in run("env")[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--prompt", ""], "--prompt must hold at least one token"),
        (["generate", "--prompt", "a", "--max-new-tokens", 512], "n_positions = 512"),
        (["generate", "--prompt", "a", "--temperature", 0], "temperature must be positive"),
        (["generate", "--prompt-file", "missing.txt"], "missing.txt"),
        (["generate", "--prompt", "a", "--model", "no/such-folder/at-all"], "no/such-folder/at-all"),
        (["score", "missing.txt"], "missing.txt"),
        (["score", POEMS, "--context", 1024], "context must be from 2 to n_positions = 512, got 1024"),
        (["score", POEMS, "--device", "cuda:7" if not torch.cuda.is_available() else "cuda:99"], "cuda"),
        (["score", POEMS, "--device", "nope"], "--device must be cpu, cuda or cuda:N, got 'nope'"),
        (["generate", "--prompt", "a", "--seed", 2**64], "seed must be from 0 to"),
        (["train", POEMS, "--output", "x", "--steps", 1, "--n-head", 5], "--n-embd must be a multiple of --n-head"),
        (
            ["train", POEMS, "--output", "x", "--steps", 1, "--n-positions", 99],
            "--n-positions must be at least --context",
        ),
        (["train", "missing.txt", "--output", "x", "--steps", 1], "missing.txt"),
        (["train", POEMS, "--output", "x", "--steps", 0], "steps must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*argv)
    assert status == 2
    assert err.startswith("gptfast: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_offline_hub_name_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = run("generate", "--prompt", "a", "--model", "openai-community/openai-gpt")
    assert status == 2
    assert "openai-community/openai-gpt" in err
    assert err.count("\n") == 1


def test_interrupt_is_quiet(run, monkeypatch):
    def interrupt(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(OpenAIGPTLMHeadModel, "from_pretrained", interrupt)
    assert run("generate", "--prompt", "a") == (130, "", "gptfast: interrupted\n")


def test_a_reader_that_has_enough_ends_it_quietly():
    command = [sys.executable, "-m", "gptfast.cli", "generate", "--prompt", "It was", "--max-new-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert b"rror" not in process.stderr.read()
        assert process.wait() == 141
