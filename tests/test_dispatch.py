"""How a backend is chosen, recorded and refused."""

import os
import subprocess
import sys

import pytest
import torch

from gptfast_kernels import (
    _dispatch,
    _triton,
    embedding,
    flash_attention,
    flash_attention_with_kvcache,
    gelu,
    get_default_backend,
    layer_norm,
    linear_cross_entropy,
    linear_gelu,
    use_backend,
)
from tests.support import DEVICE, INTERPRETED


@pytest.mark.parametrize(
    ("asked", "cannot", "slower", "chosen"),
    [
        ("auto", None, None, "triton"),
        ("auto", "no GPU", None, "torch"),
        ("auto", None, "cuBLAS is faster", "torch"),
        ("triton", None, "cuBLAS is faster", "triton"),
        ("torch", None, None, "torch"),
        ("reference", "no GPU", None, "reference"),
    ],
)
def test_select(asked, cannot, slower, chosen, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with _dispatch.record() as choices:
        assert _dispatch.select("op", asked, cannot, slower) == chosen
    (choice,) = choices
    assert (choice.op, choice.backend) == ("op", chosen)
    assert bool(choice.reason) == (chosen != "triton")


def test_auto_never_takes_an_interpreted_kernel(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    assert _dispatch.select("op", "auto", None) == "torch"
    assert _dispatch.select("op", "triton", None) == "triton"


def test_triton_that_cannot_run_raises_and_says_why():
    with pytest.raises(RuntimeError, match="op: backend='triton' cannot run here: no GPU"):
        _dispatch.select("op", "triton", "no GPU")
    with use_backend("triton"), pytest.raises(RuntimeError, match="no GPU"):
        _dispatch.select("op", "auto", "no GPU")


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference, got 'cuda'"):
        _dispatch.select("op", "cuda", None)
    with pytest.raises(ValueError, match="'cuda'"), use_backend("cuda"):
        pass


def test_use_backend_is_undone_by_an_error():
    before = get_default_backend()
    with pytest.raises(ValueError, match="x must have"), use_backend("reference"):
        layer_norm(torch.tensor(1.0), None, None)
    assert get_default_backend() == before


def test_recording_nests():
    with _dispatch.record() as outer:
        _dispatch.select("a", "torch", None)
        with _dispatch.record() as inner:
            _dispatch.select("b", "torch", None)
        _dispatch.select("c", "torch", None)
    assert [c.op for c in outer] == ["a", "c"]
    assert [c.op for c in inner] == ["b"]


X, IDS = torch.zeros(3, 16, device=DEVICE, requires_grad=True), torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("op", "call", "config"),
    [
        ("layer_norm", lambda: layer_norm(X, None, None, backend="triton"), "256x16, warps=4"),
        ("gelu", lambda: gelu(X, backend="triton"), "1x4096, warps=4"),
        ("linear_gelu", lambda: linear_gelu(X, X, backend="triton"), "64x64x32, warps=4, stages=2"),
        ("embedding", lambda: embedding(IDS, X, X, backend="triton"), "4x16, warps=4"),
        ("linear_cross_entropy", lambda: linear_cross_entropy(X, X, IDS[0], backend="triton"), "1x4, warps=8"),
        (
            "flash_attention",
            lambda: flash_attention(*[X[None, :, None]] * 3, backend="triton"),
            "32x16, warps=4, stages=1",
        ),
        (
            "flash_attention_with_kvcache",
            lambda: flash_attention_with_kvcache(*[X.detach()[None, :, None]] * 3, cache_seqlens=3, backend="triton"),
            "16x16, warps=4, stages=1",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" not in x else "",
)
def test_a_choice_holds_the_config_that_was_launched(op, call, config):
    """The forward kernel's: backward, which comes when other choices have been made, notes nothing."""
    with _dispatch.record() as choices:
        out = call()
        _dispatch.select("something else", "triton", None)
        if out.requires_grad:
            out.sum().backward()
    assert [c.op for c in choices] == [op, "something else"]
    assert choices[1].config == ""
    assert "warps=" in choices[0].config
    if INTERPRETED:
        assert choices[0].config == config


def test_a_config_belongs_to_the_choice_of_triton_before_it():
    _dispatch.configured(1, 2, warps=4)  # nobody records
    with _dispatch.record() as choices:
        _dispatch.configured(1, 2, warps=4)
        _dispatch.select("a", "torch", None)
        _dispatch.configured(1, 2, warps=4)
        _dispatch.select("b", "triton", None)
        _dispatch.configured(3, 4, warps=8, stages=2)
        _dispatch.configured(5, 6, warps=4)
    assert [(c.op, c.config) for c in choices] == [("a", ""), ("b", "3x4, warps=8, stages=2")]


@pytest.mark.parametrize(("value", "status"), [("reference", 0), ("cuda", 1)])
def test_environment_variable(value, status):
    code = "import gptfast_kernels; assert gptfast_kernels.get_default_backend() == 'reference'"
    env = {**os.environ, "GPTFAST_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert bool(done.returncode) == bool(status)
    assert status == 0 or "GPTFAST_BACKEND must be one of" in done.stderr
