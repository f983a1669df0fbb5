"""``gptfast warmup``: every kind of call is made, and only what the user will make."""

import json

import pytest

import gptfast
from gptfast.cli import main
from gptfast.warmup import warmup
from gptfast_kernels import _dispatch
from tests.support import DEVICE


def make(**settings):
    config = gptfast.OpenAIGPTConfig(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3, **settings)
    return gptfast.OpenAIGPTLMHeadModel(config).eval().to(DEVICE)


def test_every_kind_of_call_is_made():
    model, seen = make(), []
    with _dispatch.record() as choices:
        rows = warmup(model, (1, 3), progress=lambda calls: (seen.append(call) or call for call in calls))
    assert len(rows) == len(seen) == 10
    assert all(row.first > 0 and row.again > 0 for row in rows)
    assert len({row.call for row in rows}) == 10
    assert "flash_attention_with_kvcache" in {choice.op for choice in choices}


def test_a_model_of_one_position():
    config = gptfast.OpenAIGPTConfig(vocab_size=5, n_positions=1, n_embd=8, n_layer=1, n_head=1)
    assert len(warmup(gptfast.OpenAIGPTLMHeadModel(config).eval())) == 5


def test_a_model_that_pads_with_the_warm_up_tokens():
    assert len(warmup(make(pad_token_id=0))) == 5


def test_refusals():
    with pytest.raises(ValueError, match="model must be in eval mode"):
        warmup(make().train())
    with pytest.raises(ValueError, match="batch_sizes must be at least 1, got 0"):
        warmup(make(), (1, 0))
    with pytest.raises(TypeError, match="batch_sizes must be a sequence of ints, got 2"):
        warmup(make(), 2)
    with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
        warmup(make(), new_tokens=0)


def test_command(capsys, monkeypatch):
    monkeypatch.setattr("gptfast.cli._load", lambda args: (make(), None))
    assert main(["warmup", "--batch-size", "1", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["call"] for row in rows][:2] == ["forward 1 x 21", "forward 1 x 21, padded"]
    assert len(rows) == 10
    assert main(["warmup"]) == 0
    assert "generate, 1 rows, sampled" in capsys.readouterr().out
    assert main(["warmup", "--batch-size", "0"]) == 2
