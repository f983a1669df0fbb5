"""The training-step benchmark: contenders compute the same loss, and a process of its own tells time and memory."""

import pytest
import torch

from gptfast import OpenAIGPTConfig
from gptfast.training.report import Report, peak_flops, training_flops
from gptfast_bench import training_step

CPU = torch.device("cpu")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIG = OpenAIGPTConfig(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2, **NO_DROPOUT)


def test_contenders_take_the_same_steps():
    pytest.importorskip("transformers", reason="the contender")
    size = {"batch_size": 2, "context": 16, "device": CPU, "dtype": "float32"}
    ours, theirs = (training_step.make_step(name, CONFIG, **size) for name in ("gptfast", "transformers"))
    losses = [(ours(), theirs()) for _ in range(4)]
    for a, b in losses:
        assert a == pytest.approx(b, abs=1e-5)
    assert losses[3][0] < losses[0][0]
    with pytest.raises(ValueError, match="contender must be one of gptfast, transformers, compile, got 'jax'"):
        training_step.make_step("jax", CONFIG, **size)


def test_measure():
    rows = training_step.measure(iter([3.0, 2.0, 1.0, 0.5]).__next__, device=CPU, warm_up=1, rounds=3)
    assert rows["loss"] == 3.0
    assert 0 <= rows["fastest_ms"] <= rows["ms"] <= rows["slowest_ms"]
    assert rows["peak_mb"] > 10


def test_flops_of_a_token():
    """Against the matmuls of a forward pass, counted by torch; the backward pass takes twice as many."""
    from torch.utils.flop_counter import FlopCounterMode

    from gptfast import OpenAIGPTLMHeadModel
    from gptfast_kernels import use_backend

    T = CONFIG.n_positions
    model = OpenAIGPTLMHeadModel(CONFIG).train()
    with FlopCounterMode(display=False) as counter, use_backend("reference"):
        model(torch.zeros(1, T, dtype=torch.int64)).logits.sum()
    every_key = training_flops(CONFIG, 2 * T, lm_head=True)  # the reference computes the masked half too
    assert 3 * counter.get_total_flops() == pytest.approx(every_key * T)


def test_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(CPU, torch.float32) < 1e14


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    import importlib.util
    import sys
    from types import SimpleNamespace

    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, *what):
            seen.append(what)

        def close(self):
            seen.append("closed")

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or find(name))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    report = Report(tmp_path, steps=4, first=2, flops=1.0, peak=None, progress=False, is_main=True)
    report.step(10)
    report.row({"step": 3, "loss": 0.5})
    report.close()
    assert seen[:2] == [(str(tmp_path / "tensorboard"), 3), ("loss", 0.5, 3)]
    assert [name for name, _, step in seen[1:-1] if step == 3] == ["loss", "tokens_per_second"]
    assert seen[-1] == "closed"
