"""GELU: the interpreted kernels beside torch's, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast_kernels import activation, gelu
from tests.support import DEVICE
from tests.support.compare import assert_triton_no_worse, outputs_and_gradients
from tests.support.inputs import DTYPES, LAYOUTS, draw, with_layout

FORMS = ("tanh", "none")


def op(approximate: str):
    def run(backend, *, x, bias=None):
        return gelu(x, bias=bias, approximate=approximate, backend=backend)

    return run


# a scalar; a vector shorter and longer than a tile; columns that end inside a tile, fill it, and fill several
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (5000,), (2, 3, 33), (3, 1024), (2, 2500), (130, 1)])
def test_no_worse_than_torch(shape, dtype, approximate):
    tensors = {"x": draw(*shape, dtype=dtype, std=3.0)}
    assert_triton_no_worse(op(approximate), tensors)
    if shape:
        assert_triton_no_worse(op(approximate), tensors | {"bias": draw(shape[-1], dtype=dtype, seed=1)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(layout):
    assert_triton_no_worse(op("tanh"), {"x": with_layout(draw(9, 40), layout), "bias": draw(40)})


@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    approximate=st.sampled_from(FORMS),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_layout(rows, columns, dtype, layout, bias, approximate):
    x = with_layout(draw(rows, columns, dtype=dtype), layout)
    tensors = {"x": x, "bias": draw(columns, dtype=dtype, seed=1) if bias else None}
    assert_triton_no_worse(op(approximate), tensors)


def test_half_input_with_float32_bias():
    assert_triton_no_worse(op("tanh"), {"x": draw(4, 40, dtype=torch.bfloat16), "bias": draw(40)})


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extremes_are_finite(approximate, dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([65504.0, -65504.0, most, -most], dtype=dtype, device=DEVICE, requires_grad=True)
    y = gelu(x, approximate=approximate, backend="triton")
    assert torch.equal(y, F.relu(x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, (x > 0).to(dtype))


@pytest.mark.parametrize("approximate", FORMS)
def test_negative_tail_is_relatively_accurate(approximate):
    """torch's own gelu is 0 below -6, where the true value is still a float32."""
    x = torch.linspace(-12, -1, 2000, device=DEVICE)
    tensors = {"x": x[gelu(x.double(), approximate=approximate, backend="reference").abs() > 1e-36]}
    ours = outputs_and_gradients(op(approximate), "triton", tensors)["output 0"]
    expected = gelu(tensors["x"].double(), approximate=approximate, backend="reference")
    assert len(expected) > 500
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=0)


def test_not_a_number_stays_one():
    x = torch.tensor([float("nan"), float("inf"), 1.0], device=DEVICE)
    y = gelu(x, backend="triton")
    assert y.isnan().tolist() == [True, False, False]
    assert y[1] == float("inf")


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_nothing(shape):
    x, bias = (torch.zeros(s, device=DEVICE, requires_grad=True) for s in (shape, shape[-1]))
    y = gelu(x, bias=bias, backend="triton")
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert y.shape == dx.shape == shape
    assert torch.equal(dbias, torch.zeros_like(bias))


def test_offset_beyond_two_gigabytes():
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # untouched pages cost nothing
    x = storage.as_strided((3, 8), (2**30 + 8, 1))
    x[0], x[1], x[2] = 0.0, 1.0, torch.arange(8)
    torch.testing.assert_close(gelu(x, backend="triton"), F.gelu(x, approximate="tanh"))


def test_registered():
    x, bias = draw(6, 40), draw(40, seed=1)
    torch.library.opcheck(activation._forward_op, (x, bias, "tanh"))
    torch.library.opcheck(activation._backward_op, (x, x, bias, "none", True))


def test_compiled_whole_with_dynamic_shapes():
    def f(x, bias):
        return gelu(x, bias=bias, backend="triton").square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        x, bias = draw(rows, 24).requires_grad_(), draw(24).requires_grad_()
        found, expected = (torch.autograd.grad(g(x, bias), (x, bias)) for g in (compiled, f))
        torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused():
    x = draw(4).requires_grad_()
    with pytest.raises(RuntimeError, match="gelu: this backend has no second derivatives"):
        torch.autograd.grad(gelu(x, backend="triton").sum(), x, create_graph=True)


@pytest.mark.parametrize("approximate", FORMS)
def test_reference_is_torch(approximate):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(
        gelu(x, approximate=approximate, backend="reference"), F.gelu(x, approximate=approximate)
    )


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "approximate must be 'tanh' or 'none', got 'erf'", {"approximate": "erf"}),
        (ValueError, r"bias must have shape \[8\], the last dimension of x, got \[7\]", {"bias": torch.ones(7)}),
        (ValueError, "x must have at least one dimension to take", {"x": torch.ones(()), "bias": torch.ones(())}),
        (TypeError, "x must be floating point, got torch.int64", {"x": torch.ones(2, 8, dtype=torch.int64)}),
        (ValueError, "bias is on meta, but x is on", {"bias": torch.ones(8, device="meta")}),
        (RuntimeError, "torch.float64 is not one of", {"x": torch.ones(8, dtype=torch.float64), "backend": "triton"}),
    ],
)
def test_bad_arguments(error, message, change):
    with pytest.raises(error, match=message):
        gelu(**{"x": torch.ones(2, 8)} | change)
