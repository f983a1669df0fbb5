"""The ops as modules: what torch's own compute, in a model that is not ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptfast_kernels import modules, use_backend
from tests.support.inputs import draw


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield


def test_layer_norm():
    x = draw(4, 24)
    theirs, ours = nn.LayerNorm(24, eps=1e-3), modules.LayerNorm(24, eps=1e-3)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, residual=x), theirs(2 * x))
    y, u = modules.LayerNorm(24, prenorm=True)(x, residual=x)
    torch.testing.assert_close((y, u), (F.layer_norm(2 * x, (24,)), 2 * x))


@pytest.mark.parametrize("how", [{"bias": False}, {"elementwise_affine": False}, {"dtype": torch.float64}])
def test_layer_norm_has_torchs_parameters(how):
    theirs, ours = nn.LayerNorm(8, **how).state_dict(), modules.LayerNorm([8], **how).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


def test_layer_norm_drops_in_training_only():
    norm, x = modules.LayerNorm(64, dropout_p=0.5), draw(8, 64)
    assert not torch.equal(norm(x), norm(x))
    norm.eval()
    torch.testing.assert_close(norm(x), F.layer_norm(x, (64,)))


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"normalized_shape must be one dimension, got \[2, 8\]", lambda: modules.LayerNorm([2, 8])),
        (r"dropout_p must be in \[0, 1\), got 1.5", lambda: modules.LayerNorm(8, dropout_p=1.5)),
        ("approximate must be 'tanh' or 'none', got 'erf'", lambda: modules.LinearGELU(8, 8, approximate="erf")),
        (
            "reduction must be one of mean, sum, none, got 'avg'",
            lambda: modules.LinearCrossEntropy(8, 9, reduction="avg"),
        ),
    ],
)
def test_what_forward_would_refuse_is_refused_when_made(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def test_repr_tells_what_torchs_own_has_not():
    assert repr(modules.LayerNorm(8)) == repr(torch.nn.LayerNorm(8))
    assert repr(modules.LayerNorm(8, dropout_p=0.1, prenorm=True)).endswith("bias=True, dropout_p=0.1, prenorm=True)")
    head = modules.LinearCrossEntropy(8, 9, ignore_index=3, reduction="sum", shift=True)
    assert repr(head).endswith("bias=False, ignore_index=3, reduction='sum', shift=True)")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    x = draw(4, 24)
    torch.testing.assert_close(modules.GELU(approximate)(x), nn.GELU(approximate)(x))
    with pytest.raises(ValueError, match="approximate must be"):
        modules.GELU("erf")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_gelu(approximate, bias):
    layer, x = modules.LinearGELU(24, 40, bias=bias, approximate=approximate), draw(4, 24)
    torch.testing.assert_close(layer(x), F.gelu(F.linear(x, layer.weight, layer.bias), approximate=approximate))
    assert set(layer.state_dict()) == set(nn.Linear(24, 40, bias=bias).state_dict())
    assert repr(layer) == f"LinearGELU(in_features=24, out_features=40, bias={bias}, approximate={approximate!r})"


def test_linear_cross_entropy_tied():
    table = nn.Embedding(50, 24)
    head = modules.LinearCrossEntropy(24, 50, ignore_index=3, shift=True)
    head.weight = table.weight
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    head(table(ids), ids).backward()
    found, table.weight.grad = table.weight.grad, None
    logits = table(ids)[:, :-1] @ table.weight.t()
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=3).backward()
    torch.testing.assert_close(found, table.weight.grad, rtol=1e-4, atol=1e-5)


class Norm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_replace_in_a_stranger():
    """torch's own encoder, whose parameters stay the same objects, and whose subclasses of LayerNorm are left alone."""
    layer = nn.TransformerEncoderLayer(24, 2, 48, activation=nn.GELU(), batch_first=True, norm_first=True, dropout=0.0)
    model = nn.Sequential(layer, Norm(24), nn.LayerNorm([5, 24]))
    x = draw(3, 5, 24)
    before, parameters = model(x), dict(model.named_parameters())
    assert modules.replace_modules(model) == ["0.norm1", "0.norm2", "0.activation"]
    assert type(layer.norm1) is modules.LayerNorm
    assert type(model[1]) is Norm
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(x).sum().backward()
    assert layer.norm1.weight.grad is not None
    assert layer.norm1.weight.grad.abs().sum() > 0
    assert modules.replace_modules(model) == []
