"""gemv: the interpreted kernel beside torch's operators, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast_kernels import gemv, matvec
from gptfast_kernels._dispatch import record
from tests.support import DEVICE
from tests.support.accuracy import assert_no_worse_than_torch
from tests.support.compare import cast
from tests.support.guard import Guard
from tests.support.inputs import DTYPES, LAYOUTS, draw, with_layout

AROUND = ("norm_weight", "norm_bias", "bias", "residual")


def inputs(M: int, K: int, N: int, dtype: torch.dtype, without: tuple[str, ...] = ()) -> dict:
    tensors = {
        "x": draw(M, K, dtype=dtype),
        "weight": draw(K, N, dtype=dtype, std=K**-0.5).t(),
        "bias": draw(N, dtype=dtype, seed=1),
        "norm_weight": draw(K, dtype=dtype, seed=2),
        "norm_bias": draw(K, dtype=dtype, seed=3),
        "residual": draw(M, N, dtype=dtype, seed=4),
    }
    return tensors | dict.fromkeys(without)


def run(backend, *, x, weight, bias, norm_weight, norm_bias, residual, norm=True, approximate=None):
    norm = (norm_weight, norm_bias, 1e-5) if norm else None
    how = {"norm": norm, "approximate": approximate, "residual": residual}
    return gemv(x, weight, bias, **how, backend=backend)


def assert_no_worse(tensors: dict, **how) -> None:
    """y and n on Triton err at most twice as much as torch's, between canaries."""
    oracle = run("reference", **cast(tensors, torch.float64), **how)
    torchs = run("torch", **tensors, **how)
    with Guard() as guard:
        copies = {name: None if x is None else guard.copy(x) for name, x in tensors.items()}
        ours = run("triton", **copies, **how)
    # the interpreter sums float32 one after another, a GPU in a tree: one unit of all that is summed, where the rule
    # takes four of the result
    terms = oracle[1].abs() @ tensors["weight"].double().abs().t()
    magnitude = float(terms.max()) / 4 if tensors["x"].dtype == torch.float32 else 0.0
    assert_no_worse_than_torch("y", ours[0], torchs[0], oracle[0], magnitude=magnitude)
    assert_no_worse_than_torch("n", ours[1], torchs[1], oracle[1])


# K below, at and above a step, odd, and of several; N below, at and above a tile, of both kinds of tile
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 7, 3), (2, 768, 70), (1, 1601, 17), (4, 512, 64), (3, 40, 8)])
@pytest.mark.parametrize("norm", [True, False])
def test_no_worse_than_torch(M, K, N, norm, dtype, monkeypatch):
    monkeypatch.setattr(matvec, "NARROW", 64)
    assert_no_worse(inputs(M, K, N, dtype), norm=norm, approximate="tanh")


@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
def test_each_activation(approximate):
    assert_no_worse(inputs(2, 40, 24, torch.bfloat16), approximate=approximate)


@pytest.mark.parametrize("without", [(name,) for name in AROUND] + [AROUND])
def test_without_what_may_be_missing(without):
    assert_no_worse(inputs(2, 600, 24, torch.float32, without))


def test_norm_of_a_mean_far_above_the_deviation():
    """mean 1e4, std 1e-3: a float32 mean is off by half a deviation. Ours is held to float64, not to torch."""
    tensors = inputs(2, 768, 24, torch.float32) | {"x": draw(2, 768, mean=1e4, std=1e-3)}
    ours, oracle = run("triton", **tensors), run("reference", **cast(tensors, torch.float64))
    torch.testing.assert_close([one.double() for one in ours], list(oracle), rtol=1e-5, atol=5e-5)


@given(
    M=st.integers(1, matvec.MAX_ROWS),
    N=st.integers(1, 70),
    K=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(LAYOUTS),
    without=st.sets(st.sampled_from(AROUND)),
    norm=st.booleans(),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_layout(M, N, K, dtype, layout, weight_layout, without, norm):
    tensors = inputs(M, K, N, dtype, tuple(without))
    tensors |= {"x": with_layout(tensors["x"], layout), "weight": with_layout(tensors["weight"], weight_layout)}
    if tensors["residual"] is not None:
        tensors["residual"] = with_layout(tensors["residual"], layout)
    assert_no_worse(tensors, norm=norm)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_leading_dimensions(backend):
    x, weight, residual = draw(2, 1, 2, 16), draw(8, 16), draw(2, 1, 2, 8)
    y, n = gemv(x, weight, norm=(None, None, 1e-5), residual=residual, backend=backend)
    assert y.shape == (2, 1, 2, 8)
    torch.testing.assert_close(n, F.layer_norm(x, (16,)))
    torch.testing.assert_close(y, n @ weight.t() + residual)
    assert gemv(x, weight, backend=backend)[1] is x


@pytest.mark.parametrize("norm", [None, (None, None, 1e-5)])
@pytest.mark.parametrize(("M", "N", "K"), [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_nothing(M, N, K, norm):
    if K == 0 and norm:
        pytest.skip("torch refuses a LayerNorm of no columns")
    x, weight, bias = draw(M, K), draw(N, K), draw(N)
    expected = gemv(x, weight, bias, norm=norm, backend="torch")
    with Guard():  # what is not written is NaN
        found = gemv(x, weight, bias, norm=norm, backend="triton")
    torch.testing.assert_close(found, expected)


def test_a_row_of_a_batch_is_that_row_alone():
    x, weight = draw(4, 600, dtype=torch.bfloat16), draw(24, 600, dtype=torch.bfloat16)
    how = {"norm": (None, None, 1e-5), "approximate": "tanh", "backend": "triton"}
    y, n = gemv(x, weight, **how)
    for row in range(4):
        alone = gemv(x[row], weight, **how)
        assert torch.equal(alone[0], y[row])
        assert torch.equal(alone[1], n[row])


def test_nan_stays_in_its_row():
    x, weight = draw(3, 40), draw(24, 40)
    expected, _ = gemv(x, weight, norm=(None, None, 1e-5), backend="triton")
    x[1, 5] = torch.nan
    y, n = gemv(x, weight, norm=(None, None, 1e-5), backend="triton")
    assert y[1].isnan().all()
    assert n[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("transposed", [True, False])
def test_offset_beyond_two_gigabytes(transposed):
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # untouched pages cost nothing
    weight = storage.as_strided((3, 16), (2**30 + 8, 1)) if transposed else storage.as_strided((16, 3), (1, 2**30 + 8))
    weight.copy_(draw(*weight.shape, dtype=torch.float16))
    x = draw(2, weight.shape[1], dtype=torch.float16)
    expected, found = (gemv(x, weight, backend=backend)[0] for backend in ("torch", "triton"))
    torch.testing.assert_close(found, expected)


def test_registered():
    tensors = inputs(2, 40, 24, torch.float32)
    x, weight, bias, norm_weight, norm_bias, residual = tensors.values()
    torch.library.opcheck(matvec._op, (x, weight, bias, norm_weight, norm_bias, 1e-5, "tanh", residual))
    torch.library.opcheck(matvec._op, (x, weight, None, None, None, None, None, None))


def test_compiled_whole():
    def f(x, weight, residual):
        y, n = gemv(x, weight, norm=(None, None, 1e-5), residual=residual, backend="triton")
        return y.square().sum() + n.square().sum()

    x, weight, residual = draw(2, 24), draw(16, 24), draw(2, 16)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, residual), f(x, weight, residual))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_no_gradient(backend):
    y, n = gemv(draw(2, 8).requires_grad_(), draw(3, 8).requires_grad_(), norm=(None, None, 1e-5), backend=backend)
    assert not y.requires_grad
    assert not n.requires_grad


def test_transforms_are_refused():
    """Silence would be a gradient of zero."""
    x, weight = draw(2, 8), draw(3, 8)

    def f(x):
        return gemv(x, weight, backend="triton")[0].sum()

    for transform in (lambda: torch.func.grad(f)(x), lambda: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(RuntimeError, match="cannot pass this backend"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation"):
        f(torch.autograd.forward_ad.make_dual(x, x))


def test_what_the_kernel_cannot_take():
    cases = {
        "5 rows are above 4": lambda: gemv(draw(5, 8), draw(3, 8), backend="triton"),
        "a norm of 8193 columns is above 8192": lambda: gemv(
            draw(1, 8193), draw(3, 8193), norm=(None, None, 1e-5), backend="triton"
        ),
    }
    for reason, call in cases.items():
        with pytest.raises(RuntimeError, match=reason):
            call()
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(RuntimeError, match="autocast is on"):
        gemv(draw(1, 8), draw(3, 8), backend="triton")


def test_auto_waits_for_a_measurement(monkeypatch):
    monkeypatch.setattr(matvec._triton, "why_not", lambda x: None)
    with record() as choices:
        gemv(draw(2, 8), draw(3, 8))
    assert [(c.op, c.backend, c.reason) for c in choices] == [("gemv", "torch", "not measured yet against cuBLAS")]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"weight must be \[N, K\], got shape \[8\]", {"weight": torch.ones(8)}),
        (ValueError, r"x must be \[..., 8\] to fit weight \[3, 8\], got shape \[2, 7\]", {"x": torch.ones(2, 7)}),
        (ValueError, "approximate must be 'tanh' or 'none', got 'erf'", {"approximate": "erf"}),
        (ValueError, r"residual must have shape \[2, 3\], got \[3\]", {"residual": torch.ones(3)}),
        (ValueError, r"norm's weight must have shape \[8\], got \[1\]", {"norm": (torch.ones(1), None, 1e-5)}),
        (ValueError, r"norm's bias must have shape \[8\], got \[2, 8\]", {"norm": (None, torch.ones(2, 8), 1e-5)}),
        (TypeError, r"residual is torch.float16, but x is torch.float32", {"residual": torch.ones(2, 3).half()}),
        (TypeError, "weight is torch.float16, but x is torch.float32: cast one", {"weight": torch.ones(3, 8).half()}),
        (TypeError, "x must be floating point, got torch.int64", {"x": torch.ones(2, 8).long()}),
        (ValueError, "residual is on meta, but x is on", {"residual": torch.ones(2, 3, device="meta")}),
        (ValueError, r"norm must be \(weight, bias, eps\) or None, got \(None, None\)", {"norm": (None, None)}),
        (ValueError, "norm must be .*, got .*None, None, None", {"norm": (None, None, None)}),
    ],
)
def test_bad_arguments(error, message, change):
    with pytest.raises(error, match=message):
        gemv(**{"x": torch.ones(2, 8), "weight": torch.ones(3, 8)} | change)
