"""LayerNorm: the interpreted kernels beside torch's, against the formula in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast_kernels import _philox, layer_norm, normalization
from tests.support import DEVICE
from tests.support.compare import assert_triton_no_worse, outputs_and_gradients
from tests.support.inputs import DTYPES, LAYOUTS, draw, with_layout


def op(prenorm: bool = False, **how):
    def run(backend, *, x, weight=None, bias=None, residual=None):
        return layer_norm(x, weight, bias, residual=residual, prenorm=prenorm, backend=backend, **how)

    return run


def inputs(*shape: int, dtype: torch.dtype, residual: bool, **how) -> dict:
    C = shape[-1]
    return {
        "x": draw(*shape, dtype=dtype, **how),
        "weight": draw(C, dtype=dtype, seed=1),
        "bias": draw(C, dtype=dtype, seed=2),
        "residual": draw(*shape, dtype=dtype, seed=3) if residual else None,
    }


# 1: a row of one; 3: less than a vector; 768: GPT-1; 1600: not a power of two; 8193, 2049: walked in blocks, one
# element over, in forward and in backward
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (70, 3), (9, 768), (2, 2, 1600), (2, 8193), (3, 2049), (7,), (2, 1, 3, 40)])
@pytest.mark.parametrize(("residual", "prenorm"), [(False, False), (True, False), (True, True)])
def test_no_worse_than_torch(shape, dtype, residual, prenorm):
    assert_triton_no_worse(op(prenorm), inputs(*shape, dtype=dtype, residual=residual))


@pytest.mark.parametrize("C", [40, 2049])
def test_several_tiles_to_a_program(monkeypatch, C):
    monkeypatch.setattr(normalization, "PROGRAMS_PER_SM", 1)
    assert_triton_no_worse(op(), inputs(70 if C == 40 else 5, C, dtype=torch.float32, residual=True))


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")])
def test_without_parameters(missing):
    tensors = inputs(9, 96, dtype=torch.float32, residual=True) | dict.fromkeys(missing)
    assert_triton_no_worse(op(), tensors)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(residual_dtype):
    """float32 parameters with half inputs, and a residual stream wider than the branch."""
    tensors = inputs(9, 96, dtype=torch.bfloat16, residual=True)
    tensors |= {"weight": tensors["weight"].float(), "residual": tensors["residual"].to(residual_dtype)}
    assert_triton_no_worse(op(), tensors | {"bias": None})
    y, u = layer_norm(tensors["x"], tensors["weight"], None, residual=tensors["residual"], prenorm=True)
    assert y.dtype == u.dtype == residual_dtype


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16])
def test_parameters_of_another_dtype_than_a_half_input(backend, parameters):
    x, weight = draw(4, 16, dtype=torch.bfloat16), draw(16, dtype=parameters)
    expected = layer_norm(x.double(), weight.double(), None, backend="reference")
    y = layer_norm(x, weight, None, backend=backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=8e-3, atol=1e-3)


def test_float64_with_float32_parameters():
    x, weight = draw(4, 16).double(), draw(16)
    y = layer_norm(x, weight, None, backend="torch")
    torch.testing.assert_close(y, layer_norm(x, weight, None, backend="reference"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(layout):
    tensors = inputs(9, 40, dtype=torch.float32, residual=True)
    tensors |= {name: with_layout(tensors[name], layout) for name in ("x", "residual")}
    assert_triton_no_worse(op(), tensors)


@given(
    rows=st.integers(1, 40),
    C=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    residual=st.booleans(),
    prenorm=st.booleans(),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_layout(rows, C, dtype, layout, residual, prenorm):
    tensors = inputs(rows, C, dtype=dtype, residual=residual)
    tensors["x"] = with_layout(tensors["x"], layout)
    assert_triton_no_worse(op(prenorm), tensors)


def test_expanded_gradient_and_unused_outputs():
    tensors = inputs(6, 40, dtype=torch.float32, residual=True)
    for part in (0, 1):
        found = []
        for backend in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in tensors.values()]
            x, weight, bias, residual = leaves
            out = layer_norm(x, weight, bias, residual=residual, prenorm=True, backend=backend)[part]
            found.append(torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True))
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_mean_far_above_the_deviation():
    """mean 1e4, std 1e-3: a float32 mean is off by half a deviation. Ours is held to float64, not to torch."""
    tensors = inputs(9, 768, dtype=torch.float32, residual=False, mean=1e4, std=1e-3)
    ours = outputs_and_gradients(op(), "triton", tensors)
    oracle = outputs_and_gradients(op(), "reference", {k: v if v is None else v.double() for k, v in tensors.items()})
    for name, expected in oracle.items():
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("value", [0.0, 3.5, 65504.0])
def test_zero_variance(value):
    x = torch.full((3, 100), value, dtype=torch.float16, device=DEVICE, requires_grad=True)
    bias = draw(100, dtype=torch.float16)
    y = layer_norm(x, None, bias, backend="triton")
    assert torch.equal(y, bias.expand(3, 100))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()


def test_float16_maximum():
    x = torch.tensor([[65504.0, -65504.0] * 32], dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(layer_norm(x, None, None, backend="triton"), x.sign())


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0, 0)])
def test_nothing(shape):
    C = shape[-1]
    x, weight, bias = (torch.zeros(s, device=DEVICE, requires_grad=True) for s in (shape, C, C))
    y = layer_norm(x, weight, bias, backend="triton")
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("C", [40, 2050])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_the_mask_of_the_seed(monkeypatch, C, prenorm, residual_dtype):
    seed = torch.tensor([-(2**62) + 12345], device=DEVICE)
    monkeypatch.setattr(_philox, "draw_seed", lambda device: seed)
    tensors = inputs(5, C, dtype=torch.float32, residual=True)
    tensors["residual"] = tensors["residual"].to(residual_dtype)
    kept = _philox.keep_block_reference(seed, 5, C, 0.3).to(DEVICE)
    assert 0.5 < kept.float().mean() < 0.9
    ours = outputs_and_gradients(op(prenorm, dropout_p=0.3), "triton", tensors)

    def masked(backend, *, x, weight, bias, residual):
        return layer_norm(x * kept / 0.7, weight, bias, residual=residual, prenorm=prenorm, backend=backend)

    expected = outputs_and_gradients(masked, "reference", tensors)
    for name in expected:
        tolerance = 1e-4 if ours[name].dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_dropout_draws():
    x, weight = draw(64, 64), draw(64, seed=1)
    ones = functools.partial(layer_norm, torch.ones_like(x), None, None, residual=x, dropout_p=0.5, backend="triton")
    torch.manual_seed(1)
    first, second = ones(), ones()
    torch.manual_seed(1)
    assert torch.equal(ones(), first)
    assert not torch.equal(first, second)
    plain = layer_norm(x, weight, None, backend="triton")
    assert torch.equal(layer_norm(x, weight, None, dropout_p=0.0, backend="triton"), plain)


def test_dropout_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = draw(16, 64).requires_grad_()

    def f(x):
        return layer_norm(x, None, None, residual=x, dropout_p=0.5, backend="triton")

    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(f(x).square().sum(), x)
    torch.manual_seed(3)
    (again,) = torch.autograd.grad(checkpoint(f, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def test_deterministic():
    tensors = inputs(50, 100, dtype=torch.float32, residual=True)
    first, second = (outputs_and_gradients(op(), "triton", tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_offset_beyond_two_gigabytes():
    """A stride that fits 32 bits, of rows the last of which begins beyond."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # untouched pages cost nothing
    x = storage.as_strided((3, 8), (2**30 + 8, 1))
    x[0], x[1], x[2] = 0.0, 1.0, torch.arange(8)
    torch.testing.assert_close(layer_norm(x, None, None, backend="triton"), F.layer_norm(x, (8,)))


def test_registered():
    x, weight, bias, residual = inputs(6, 40, dtype=torch.float32, residual=True).values()
    seed = torch.tensor([7], device=DEVICE)
    forward = (x, residual, weight, bias, seed, 0.1, 1e-5, True, torch.float32)
    torch.library.opcheck(normalization._forward_op, forward)
    _, u, statistics = normalization._forward_op(*forward)
    backward = (x, x, u, None, weight, seed, statistics, 0.1, True, torch.float32, torch.float16, True, True)
    torch.library.opcheck(normalization._backward_op, backward)


def test_compiled_whole_with_dynamic_shapes():
    def f(x, weight, residual):
        return layer_norm(x, weight, None, residual=residual, backend="triton").square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        x, weight, residual = (t.requires_grad_() for t in (draw(rows, 24), draw(24), draw(rows, 24, seed=5)))
        for a, b in zip(
            torch.autograd.grad(compiled(x, weight, residual), (x, weight, residual)),
            torch.autograd.grad(f(x, weight, residual), (x, weight, residual)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_has_the_dtype_of_torch(dtype):
    x, weight = draw(4, 16, dtype=dtype), draw(16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = F.layer_norm(x, (16,), weight).dtype
        assert {layer_norm(x, weight, None, backend=b).dtype for b in ("triton", "torch")} == {expected}


def test_second_derivatives_are_refused():
    x = draw(4, 16).requires_grad_()
    y = layer_norm(x, None, None, backend="triton")
    with pytest.raises(RuntimeError, match="layer_norm: this backend has no second derivatives"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_reference_is_torch():
    x, weight, bias = draw(5, 33).double(), draw(33).double(), draw(33, seed=1).double()
    y, u = layer_norm(x, weight, bias, residual=x, prenorm=True, backend="reference")
    torch.testing.assert_close(y, F.layer_norm(x + x, (33,), weight, bias))
    assert torch.equal(u, x + x)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"weight must have shape \[8\], the last dimension of x, got \[7\]", {"weight": torch.ones(7)}),
        (ValueError, r"bias must have shape \[8\]", {"bias": torch.ones(1, 8)}),
        (ValueError, r"residual must have the shape of x, \[2, 8\], got \[8\]", {"residual": torch.ones(8)}),
        (ValueError, "at least one dimension, got a scalar", {"x": torch.tensor(1.0)}),
        (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
        (TypeError, "x must be floating point, got torch.int64", {"x": torch.ones(2, 8, dtype=torch.int64)}),
        (ValueError, "weight is on meta, but x is on", {"weight": torch.ones(8, device="meta")}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
    ],
)
def test_bad_arguments(error, message, change):
    arguments = {"x": torch.ones(2, 8), "weight": None, "bias": None} | change
    with pytest.raises(error, match=message):
        layer_norm(**arguments)


def test_what_triton_cannot_do_is_named():
    with pytest.raises(RuntimeError, match=r"layer_norm: .*torch.float64 is not one of float32, float16, bfloat16"):
        layer_norm(torch.ones(2, 8, dtype=torch.float64), None, None, backend="triton")
    with pytest.raises(RuntimeError, match="C = 65537 is above 65536"):
        layer_norm(torch.ones(1, 65537), None, None, backend="triton")
