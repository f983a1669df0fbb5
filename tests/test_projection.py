"""linear_gelu: the interpreted kernel beside torch's matmul and GELU, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast_kernels import linear_gelu, projection
from gptfast_kernels._dispatch import record
from tests.support import DEVICE
from tests.support.compare import assert_triton_no_worse
from tests.support.inputs import DTYPES, LAYOUTS, draw, with_layout


def op(approximate: str = "tanh"):
    def run(backend, *, x, weight, bias=None):
        return linear_gelu(x, weight, bias, approximate=approximate, backend=backend)

    return run


def inputs(*shape: int, N: int, dtype: torch.dtype, conv1d: bool = False, bias: bool = True) -> dict:
    K = shape[-1]
    weight = draw(K, N, dtype=dtype, std=K**-0.5).t() if conv1d else draw(N, K, dtype=dtype, std=K**-0.5)
    return {"x": draw(*shape, dtype=dtype), "weight": weight, "bias": draw(N, dtype=dtype) if bias else None}


# rows and columns below, at and above a tile, in numbers that leave several tiles to a program; K that ends in a step
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "N", "conv1d", "bias"),
    [
        ((1, 7), 3, False, True),
        ((130, 96), 300, True, True),
        ((3, 50, 40), 70, False, False),
        ((2, 3, 4, 256), 64, True, False),
    ],
)
def test_no_worse_than_torch(shape, N, conv1d, bias, dtype):
    assert_triton_no_worse(op(), inputs(*shape, N=N, dtype=dtype, conv1d=conv1d, bias=bias))


def test_exact():
    assert_triton_no_worse(op("none"), inputs(20, 64, N=40, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(layout):
    tensors = inputs(9, 40, N=20, dtype=torch.float32)
    assert_triton_no_worse(op(), tensors | {"x": with_layout(tensors["x"], layout)})
    assert_triton_no_worse(op(), tensors | {"weight": with_layout(tensors["weight"], layout)})


@given(
    M=st.integers(1, 140),
    N=st.integers(1, 140),
    K=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_layout(M, N, K, dtype, layout, weight_layout):
    tensors = inputs(M, K, N=N, dtype=dtype)
    tensors |= {"x": with_layout(tensors["x"], layout), "weight": with_layout(tensors["weight"], weight_layout)}
    assert_triton_no_worse(op(), tensors)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_nothing(M, N, K):
    tensors = {"x": torch.zeros(M, K), "weight": torch.zeros(N, K), "bias": torch.ones(N)}
    x, weight, bias = (t.to(DEVICE).requires_grad_() for t in tensors.values())
    y = linear_gelu(x, weight, bias, backend="triton")
    torch.testing.assert_close(y, F.gelu(bias, approximate="tanh").expand(M, N))
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    expected = torch.autograd.grad(linear_gelu(x, weight, bias, backend="reference").sum(), (x, weight, bias))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    "allow",
    [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    ],
    ids=["torch's older switch", "and its newer one"],
)
def test_tf32_only_where_the_user_allows_it(allow):
    """1 + 2^-12 is 1 in TF32."""
    x, weight = torch.full((1, 16), 1 + 2**-12, device=DEVICE), torch.eye(16, device=DEVICE)
    exact = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(linear_gelu(x, weight, backend="triton"), exact, rtol=1e-6, atol=0)
    allow()
    try:
        assert (linear_gelu(x, weight, backend="triton") - exact).abs().max() > 1e-4
    finally:
        torch.set_float32_matmul_precision("highest")


def test_offset_beyond_two_gigabytes():
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # untouched pages cost nothing
    x = storage.as_strided((3, 16), (2**30 + 8, 1))
    x[0], x[1], x[2] = 0.0, 1.0, torch.arange(16)
    weight = torch.eye(16, dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(linear_gelu(x, weight, backend="triton"), F.gelu(x, approximate="tanh"))


def test_step_along_k_beyond_two_gigabytes():
    """A stride of weight that fits 32 bits, 32 of which do not."""
    weight = torch.empty(2**31 + 2, dtype=torch.float16, device=DEVICE).as_strided((2, 33), (1, 2**26))
    weight.copy_(draw(2, 33, dtype=torch.float16))
    x = draw(3, 33, dtype=torch.float16)
    torch.testing.assert_close(linear_gelu(x, weight, backend="triton"), linear_gelu(x, weight, backend="torch"))


def test_deterministic():
    x, weight = draw(150, 20).requires_grad_(), draw(30, 20).requires_grad_()
    runs = [torch.autograd.grad(linear_gelu(x, weight, backend="triton").sum(), (x, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_registered():
    tensors = inputs(6, 40, N=24, dtype=torch.float32)
    torch.library.opcheck(projection._op, (*tensors.values(), "tanh", True))


def test_compiled_whole_with_dynamic_shapes():
    def f(x, weight, bias):
        return linear_gelu(x, weight, bias, backend="triton").square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        leaves = [t.requires_grad_() for t in inputs(rows, 24, N=16, dtype=torch.float32).values()]
        found, expected = (torch.autograd.grad(g(*leaves), leaves) for g in (compiled, f))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_autocast(bias):
    """float32 parameters and inputs: computed and returned in autocast's dtype, gradients in the parameters'."""
    tensors = inputs(9, 32, N=16, dtype=torch.float32, bias=bias)
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = {b: op()(b, **tensors) for b in ("triton", "torch")}
    assert y["triton"].dtype == y["torch"].dtype == torch.bfloat16
    torch.testing.assert_close(y["triton"], y["torch"], rtol=2e-2, atol=2e-2)
    assert {g.dtype for g in torch.autograd.grad(y["triton"].float().sum(), leaves)} == {torch.float32}


def test_autocast_leaves_float64_alone():
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(TypeError, match=r"weight is torch\.float64"):
        linear_gelu(draw(2, 16), draw(16, 16).double())


def test_second_derivatives_are_refused():
    x, weight = draw(4, 8).requires_grad_(), draw(3, 8)
    with pytest.raises(RuntimeError, match="linear_gelu: this backend has no second derivatives"):
        torch.autograd.grad(linear_gelu(x, weight, backend="triton").sum(), x, create_graph=True)


def test_auto_waits_for_a_measurement(monkeypatch):
    monkeypatch.setattr(projection._triton, "why_not", lambda x: None)
    with record() as choices:
        linear_gelu(draw(2, 8), draw(3, 8))
    assert [(c.backend, c.reason) for c in choices] == [("torch", "not measured yet against cuBLAS's epilogue")]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"weight must be \[N, K\], got shape \[8\]", {"weight": torch.ones(8)}),
        (ValueError, r"x must be \[..., 8\] to fit weight \[3, 8\], got shape \[2, 7\]", {"x": torch.ones(2, 7)}),
        (ValueError, r"bias must have shape \[3\] to fit weight \[3, 8\], got \[8\]", {"bias": torch.ones(8)}),
        (ValueError, "approximate must be", {"approximate": "erf"}),
        (TypeError, "weight is torch.float16, but x is torch.float32: cast one", {"weight": torch.ones(3, 8).half()}),
        (TypeError, "bias must be floating point, got torch.int64", {"bias": torch.ones(3, dtype=torch.int64)}),
        (ValueError, "weight is on meta, but x is on", {"weight": torch.ones(3, 8, device="meta")}),
    ],
)
def test_bad_arguments(error, message, change):
    with pytest.raises(error, match=message):
        linear_gelu(**{"x": torch.ones(2, 8), "weight": torch.ones(3, 8)} | change)
