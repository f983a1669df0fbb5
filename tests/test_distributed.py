"""Two ranks, by DDP, FSDP or tensor parallelism, train as one process does: losses and weights agree, to rounding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast.tokenizer import train_tokenizer
from gptfast.training import LOG_FILE, Parallel, load_fine_tuned
from gptfast.training.parallel import start
from tests.support import two_ranks

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with every run: by two ranks, and alone."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = train_tokenizer([two_ranks.POEMS.read_text()], 160, tokenization="basic")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(tokenizer), **two_ranks.SHAPE)).save_pretrained(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.support.two_ranks", str(folder)]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    two_ranks.on_text(folder / "text-none", Parallel())
    two_ranks.on_text(folder / "dropout-none", Parallel(), dropout=0.1)
    two_ranks.on_choices(folder / "choices-none", Parallel(), folder / "base")
    errors = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder


def losses(folder):
    log = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return torch.tensor([[row["loss"], row.get("held_out_loss", 0.0)] for row in log])


def weights(model):
    """By name; without the biases of keys and of choices, which softmax cancels, so that rounding alone moves them."""
    named, C = dict(model.named_parameters()), model.config.n_embd
    named.pop("multiple_choice_head.summary.bias", None)
    return {name: torch.cat([p[:C], p[2 * C :]]) if name.endswith("c_attn.bias") else p for name, p in named.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor"])
@pytest.mark.parametrize("run", ["text", "parts", "interrupted"])
def test_language_model(runs, run, kind):
    """``parts`` accumulates gradients over two parts a rank; ``interrupted`` was stopped and resumed."""
    alone, together = runs / "text-none", runs / f"{run}-{kind}"
    assert len(losses(together)) == two_ranks.SETTINGS.steps
    torch.testing.assert_close(losses(together), losses(alone), rtol=0, atol=1e-5)
    ours, wanted = (weights(OpenAIGPTLMHeadModel.from_pretrained(folder)) for folder in (together, alone))
    torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=1e-4)  # float16 files
    assert not list(together.glob("training_state*[!w]"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor"])
def test_multiple_choice(runs, kind):
    alone, together = runs / "choices-none", runs / f"choices-{kind}"
    torch.testing.assert_close(losses(together), losses(alone), rtol=0, atol=2e-5)
    ours, wanted = (weights(load_fine_tuned(folder)[0]) for folder in (together, alone))
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


def test_tensor_parallel_ranks_hold_half_an_mlp_and_drop_the_same(runs):
    mlp = json.loads((runs / "messages.json").read_text())["mlp"]
    assert mlp == {"c_fc.weight": [32, 64], "c_fc.bias": [64], "c_proj.weight": [64, 32], "c_proj.bias": [32]}
    torch.testing.assert_close(losses(runs / "dropout-tensor"), losses(runs / "dropout-none"), rtol=0, atol=1e-5)


def test_ctrl_c_on_one_rank_stops_all_and_too_many_parts_are_refused(runs):
    messages = json.loads((runs / "messages.json").read_text())
    for kind in ("ddp", "fsdp", "tensor"):
        assert messages[kind].startswith("stopped after step 5")
    assert messages["many"] == "batch_size must be at least ranks * accumulate = 6, got 5"


def test_sharded_state_of_a_step(runs):
    """A resumed FSDP run gives the very losses of one that was not interrupted."""
    assert torch.equal(losses(runs / "interrupted-fsdp"), losses(runs / "text-fsdp"))
    assert torch.equal(losses(runs / "interrupted-ddp"), losses(runs / "text-ddp"))
    assert torch.equal(losses(runs / "interrupted-tensor"), losses(runs / "text-tensor"))


@pytest.mark.parametrize(
    ("kind", "environment", "message"),
    [
        ("fsdp", {}, "parallel='fsdp' needs torchrun"),
        ("pipeline", {}, "parallel must be one of none, ddp, fsdp, tensor, got 'pipeline'"),
        ("none", {"RANK": "0", "WORLD_SIZE": "2"}, "parallel must be ddp, fsdp or tensor for 2 processes, got 'none'"),
    ],
)
def test_what_cannot_start(kind, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start(kind)
