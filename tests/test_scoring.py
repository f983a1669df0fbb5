"""Perplexity over a sliding window, against a token-by-token loop."""

import math

import pytest
import torch

from gptfast import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gptfast.scoring import score_ids


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    return OpenAIGPTLMHeadModel(config).double().eval()


@torch.no_grad()
def nll_token_by_token(model, ids, context, stride):
    """Window w starts at w * stride; a token is counted in the first window that predicts it."""
    total = 0.0
    for target in range(1, len(ids)):
        start = 0
        while target > start + context - 1:
            start += stride
        logits = model(ids[None, start:target]).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[target]])
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("length", "context", "stride"), [(2, 16, 8), (16, 16, 8), (17, 16, 8), (61, 16, 5), (40, 7, 6)]
)
def test_equals_a_loop(model, length, context, stride, batch_size):
    ids = torch.randint(50, (length,), generator=torch.Generator().manual_seed(length))
    counted = []
    score = score_ids(
        model, ids, context=context, stride=stride, batch_size=batch_size, text_bytes=99, progress=counted.append
    )
    assert score.tokens == sum(counted) == length - 1
    expected = nll_token_by_token(model, ids, context, stride)
    assert score.nll == pytest.approx(expected, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(expected / (length - 1)), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / 99, rel=1e-6)


def test_certain_model_has_perplexity_one(model):
    """A model whose logits give all weight to the next token."""
    sure = OpenAIGPTLMHeadModel(model.config).eval()
    for p in sure.parameters():
        p.data.zero_()
    sure.transformer.h[-1].ln_2.bias.data[0] = 1.0
    sure.lm_head.weight.data[7, 0] = 100.0
    score = score_ids(sure, torch.full((40,), 7))
    assert score.perplexity == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 17}, "context must be from 2 to n_positions = 16, got 17"),
        ({"stride": 16}, "stride must be from 1 to context - 1 = 15, got 16"),
        ({"stride": 0}, "stride must be from 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ids": torch.zeros(1, dtype=torch.int64)}, r"ids must be \[N\] with N >= 2, got shape \[1\]"),
        ({"ids": torch.tensor([1, -100, 2])}, "ids contains -100, accepted are 0 to 49"),
        ({"ids": torch.tensor([1, 50])}, "ids contains 50, accepted are 0 to 49"),
        ({"ids": torch.tensor([1.0, 2.0])}, "ids must be int32 or int64, got torch.float32"),
        ({"ids": [1, 2]}, "ids must be a tensor, got list"),
    ],
)
def test_bad_arguments(model, arguments, message):
    arguments = {"ids": torch.zeros(20, dtype=torch.int64), **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        score_ids(model, arguments.pop("ids"), **arguments)
