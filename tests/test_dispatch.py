"""How a backend is chosen, recorded and refused."""

import os
import subprocess
import sys

import pytest
import torch

from gptfast_kernels import _dispatch, _triton, get_default_backend, layer_norm, use_backend


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


@pytest.mark.parametrize(("value", "status"), [("reference", 0), ("cuda", 1)])
def test_environment_variable(value, status):
    code = "import gptfast_kernels; assert gptfast_kernels.get_default_backend() == 'reference'"
    env = {**os.environ, "GPTFAST_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert bool(done.returncode) == bool(status)
    assert status == 0 or "GPTFAST_BACKEND must be one of" in done.stderr
