"""linear_cross_entropy: chunked in torch and with the interpreted kernel, against all logits in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gptfast_kernels import linear_cross_entropy, loss
from tests.support import DEVICE
from tests.support.accuracy import assert_no_worse_than_torch
from tests.support.compare import cast, outputs_and_gradients
from tests.support.guard import Guard
from tests.support.inputs import DTYPES, LAYOUTS, draw, with_layout


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of seven rows and blocks of 64 columns, so that small inputs have several."""
    monkeypatch.setattr(loss, "MIN_ROWS", 7)
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(loss, "ROW", loss.Config(block=64, warps=4))


def inputs(*shape: int, V: int, dtype: torch.dtype = torch.float32, bias: bool = False, ignored: float = 0.2) -> dict:
    *rows, C = shape
    generator = torch.Generator().manual_seed(V)
    target = torch.randint(V, rows, generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = -100
    return {
        "hidden": draw(*shape, dtype=dtype),
        "weight": draw(V, C, dtype=dtype, seed=1),
        "target": target.to(DEVICE),
        "bias": draw(V, dtype=dtype, seed=2) if bias else None,
    }


def op(**how):
    """``linear_cross_entropy``; as the backend "torch" F.cross_entropy of all logits, which it is measured against."""

    def run(backend, *, hidden, weight, target, bias=None):
        if backend != "all logits":
            return linear_cross_entropy(hidden, weight, target, bias=bias, backend=backend, **how)
        logits = F.linear(hidden, weight, bias).float().flatten(0, -2)
        found = F.cross_entropy(logits, target.flatten(), reduction=how.get("reduction", "mean"))
        return found.view(target.shape) if found.ndim else found

    return run


def assert_no_worse(backend: str, tensors: dict, **how) -> None:
    oracle = outputs_and_gradients(op(**how), "reference", cast(tensors, torch.float64))
    torchs = outputs_and_gradients(op(**how), "all logits", tensors)
    with Guard() as guard:
        copies = {name: None if x is None else guard.copy(x) for name, x in tensors.items()}
        ours = outputs_and_gradients(op(**how), backend, copies)
    for name, expected in oracle.items():
        assert_no_worse_than_torch(name, ours[name], torchs[name], expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_no_worse_than_all_logits(backend, dtype, reduction, bias):
    assert_no_worse(backend, inputs(2, 15, 32, V=150, dtype=dtype, bias=bias), reduction=reduction)


# not an expanded weight: with all logits of a row equal, the rounding of their gradients adds up instead of averaging
@given(
    N=st.integers(1, 20),
    C=st.integers(16, 40),
    V=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    hidden=st.sampled_from(LAYOUTS),
    weight=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
    backend=st.sampled_from(["torch", "triton"]),
    reduction=st.sampled_from(["sum", "none"]),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout(N, C, V, dtype, hidden, weight, backend, reduction):
    tensors = inputs(N, C, V=V, dtype=dtype)
    tensors |= {"hidden": with_layout(tensors["hidden"], hidden), "weight": with_layout(tensors["weight"], weight)}
    assert_no_worse(backend, tensors, reduction=reduction)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift_is_the_next_token(backend, reduction):
    tensors = inputs(2, 9, 24, V=50)
    hidden, target = tensors["hidden"], tensors["target"]

    def sliced(backend, *, hidden, weight, target, bias):
        rows = linear_cross_entropy(hidden[:, :-1], weight, target[:, 1:], reduction=reduction, backend="reference")
        return F.pad(rows, (0, 1)) if reduction == "none" else rows

    expected = outputs_and_gradients(sliced, backend, tensors)
    found = outputs_and_gradients(op(shift=True, reduction=reduction), backend, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    alone = linear_cross_entropy(hidden[:, :1], tensors["weight"], target[:, :1], shift=True, backend=backend)
    assert alone.isnan()  # one position predicts nothing


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("shift", [False, True])
def test_log_probabilities(backend, shift):
    tensors = inputs(2, 9, 24, V=50)
    hidden, weight, target = tensors["hidden"].requires_grad_(), tensors["weight"], tensors["target"]
    plain = linear_cross_entropy(hidden, weight, target, shift=shift, backend=backend)
    total, logprobs = linear_cross_entropy(hidden, weight, target, shift=shift, return_logprobs=True, backend=backend)
    torch.testing.assert_close(total, plain)
    if shift:
        target = F.pad(target[:, 1:], (0, 1), value=-100)
    every = torch.log_softmax(hidden.detach() @ weight.t(), -1)
    expected = every.gather(-1, target.clamp(min=0)[..., None])[..., 0].masked_fill(target == -100, 0.0)
    torch.testing.assert_close(logprobs.detach(), expected, rtol=1e-5, atol=1e-5)
    both = torch.autograd.grad(total + logprobs.sum(), hidden)[0]
    parts = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, tensors["target"], shift=shift, reduction="mean", backend="reference")
        - linear_cross_entropy(hidden, weight, tensors["target"], shift=shift, reduction="sum", backend="reference"),
        hidden,
    )[0]
    torch.testing.assert_close(both, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ignore_index", [-1, 0, 7, 10**12, -(2**62)])
def test_any_ignore_index(backend, ignore_index):
    tensors = inputs(20, 24, V=50, ignored=0.0)
    tensors["target"][3:6] = ignore_index
    found = linear_cross_entropy(**tensors, ignore_index=ignore_index, backend=backend)
    logits = tensors["hidden"] @ tensors["weight"].t()
    torch.testing.assert_close(found, F.cross_entropy(logits, tensors["target"], ignore_index=ignore_index))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("N", [0, 5])
def test_nothing_counts(backend, N):
    """As F.cross_entropy: the mean is NaN, every gradient zero."""
    tensors = inputs(N, 24, V=50, ignored=1.1)
    for reduction in ("mean", "sum", "none"):
        found = outputs_and_gradients(op(reduction=reduction), backend, tensors)
        value = found.pop("output 0")
        assert value.isnan() if reduction == "mean" else not value.any()
        assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_large_logits(backend):
    """exp(300) is no float32; a target 600 below the best has that loss, not infinity."""
    hidden, weight = torch.tensor([[300.0], [-300.0]], device=DEVICE), torch.tensor([[1.0], [-1.0]], device=DEVICE)
    weight = weight * torch.ones(1, 16, device=DEVICE)
    hidden = hidden * torch.eye(16, device=DEVICE)[:1]
    rows = linear_cross_entropy(hidden, weight, torch.zeros(2).long(), reduction="none", backend=backend)
    assert rows.tolist() == [0.0, 600.0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_words_that_cannot_come(backend):
    """A bias of -inf, over a whole block of columns too."""
    tensors = inputs(20, 24, V=150, bias=True)
    tensors["bias"][:64] = -float("inf")
    tensors["target"] = tensors["target"].clamp(min=64)
    found = outputs_and_gradients(op(), backend, tensors)
    torch.testing.assert_close(found, outputs_and_gradients(op(), "reference", tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_whose_sum_is_no_float16(monkeypatch, backend):
    """512 rows in one chunk, whose gradients add up to 92,160; their mean is 180."""
    monkeypatch.setattr(loss, "MIN_ROWS", 512)
    hidden = torch.full((512, 16), 200.0, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(10, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    target = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    (dweight,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, backend=backend), weight)
    torch.testing.assert_close(dweight[0], torch.full_like(dweight[0], -180.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hidden_without_columns(backend):
    hidden, weight = (torch.zeros(*shape, 0, device=DEVICE, requires_grad=True) for shape in ((2, 3), (5,)))
    total = linear_cross_entropy(hidden, weight, torch.zeros(2, 3, device=DEVICE).long(), backend=backend)
    torch.testing.assert_close(total, torch.tensor(5.0, device=DEVICE).log())
    assert [g.shape for g in torch.autograd.grad(total, (hidden, weight))] == [hidden.shape, weight.shape]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_autocast_with_float32_weights(backend, hidden_dtype):
    tensors = inputs(20, 24, V=50, bias=True)
    tensors["hidden"] = tensors["hidden"].to(hidden_dtype)
    half = cast(tensors, torch.bfloat16)
    expected = outputs_and_gradients(op(), "reference", cast(half, torch.float64))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = outputs_and_gradients(op(), backend, tensors)
    assert found["output 0"].dtype == torch.float32
    for name in ("hidden", "weight", "bias"):
        assert found[f"gradient of {name}"].dtype == tensors[name].dtype
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_scaled_and_backward_twice(backend):
    tensors = inputs(20, 24, V=50)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    total = linear_cross_entropy(hidden, weight, tensors["target"], backend=backend)
    once = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(total * 3, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(thrice, tuple(g * 3 for g in once))
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(total, (hidden, weight)), strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradients_asked_for(frozen):
    tensors = inputs(20, 24, V=50)
    asked = "weight" if frozen == "hidden" else "hidden"
    tensors[asked].requires_grad_()
    for reduction in ("mean", "none"):
        found = [
            torch.autograd.grad(op(reduction=reduction)(b, **tensors).sum(), tensors[asked])[0]
            for b in ("torch", "triton", "reference")
        ]
        torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-5)


def test_target_out_of_range_where_it_cannot_be_checked():
    tensors = inputs(4, 24, V=50, ignored=0.0)
    tensors["target"] = torch.tensor([3, 50, -7, 4], device=DEVICE)
    hidden, weight, target, _ = tensors.values()
    for kernel in (False, True):
        rows, *_ = loss._op(hidden, weight, None, target, None, [False] * 3, -100, torch.float32, kernel)
        assert rows.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_with_rows_that_do_not_count(dtype):
    """On a GPU a chunk holds them: finding them would cost a synchronisation."""
    z, dloss = draw(6, 150, dtype=dtype), draw(6)
    target = torch.tensor([0, 149, -100, -100, 63, 64], device=DEVICE)
    scratch = torch.empty(6, 150, device=DEVICE)
    exact = z[target >= 0].double().requires_grad_()
    expected = F.cross_entropy(exact, target[target >= 0], reduction="none")
    (dz,) = torch.autograd.grad(expected, exact, dloss[target >= 0].double())
    for ours in (
        loss._rows_torch(z.clone(), target, dloss, -100, scratch),
        loss._rows_triton(z.clone(), target, dloss, -100),
    ):
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours[0][target >= 0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1][target >= 0].double(), dz, rtol=tolerance, atol=tolerance)
        assert not ours[0][target < 0].any()
        assert not ours[1][target < 0].any()


@pytest.mark.parametrize("kernel", [False, True])
def test_registered(kernel):
    tensors = inputs(20, 24, V=50, bias=True)
    hidden, weight, target, bias = tensors.values()
    for dloss in (None, torch.ones(20, device=DEVICE)):
        torch.library.opcheck(loss._op, (hidden, weight, bias, target, dloss, [True] * 3, -100, torch.float32, kernel))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_whole_with_dynamic_shapes(backend, reduction):
    def f(hidden, weight, target):
        return linear_cross_entropy(hidden, weight, target, reduction=reduction, shift=True, backend=backend).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9):
        hidden, weight, target, _ = inputs(2, T, 24, V=50).values()
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        found, expected = (torch.autograd.grad(g(*leaves, target), leaves) for g in (compiled, f))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    tensors = inputs(4, 24, V=50)
    tensors["weight"].requires_grad_()
    for backend in ("torch", "triton"):
        with pytest.raises(RuntimeError, match="linear_cross_entropy: this backend has no second derivatives"):
            torch.autograd.grad(op(reduction=reduction)(backend, **tensors).sum(), tensors["weight"], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_chunks_on_a_gpu_are_products_that_torch_takes(dtype):
    """On tensors that are none, for which torch checks what it would on a GPU; addmm with out_dtype is refused here."""
    with FakeTensorMode():
        a, b = (torch.empty(7, n, dtype=dtype, device="cuda") for n in (50, 24))
        total = torch.empty(50, 24, device="cuda")
        loss._accumulate(total, a.t(), b)
        assert total.is_cuda
        assert total.dtype == torch.float32


MEMORY = """
import re, sys, torch
from gptfast_kernels import linear_cross_entropy
torch.set_num_threads(1)
N, V, C = 16384, 4096, 64
hidden, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
target = torch.randint(V, (N,))
def step(n):
    if sys.argv[1] == "ours":
        loss = linear_cross_entropy(hidden[:n], weight, target[:n], backend="torch", reduction=sys.argv[2])
    else:
        loss = torch.nn.functional.cross_entropy(hidden[:n] @ weight.t(), target[:n], reduction=sys.argv[2])
    loss.sum().backward()
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
step(256)  # what torch allocates once
before = peak()
step(N)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from /proc")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_a_tenth(reduction):
    """Forward and backward of 16,384 rows and 4,096 words, in processes of their own."""

    def peak(who: str) -> int:
        command = [sys.executable, "-c", MEMORY, who, reduction]
        environment = {"PYTHONPATH": str(Path(loss.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    all_logits = peak("all logits")
    assert all_logits > 2 * 16384 * 4096 * 4 // 1024  # the logits and their gradient, in KiB
    assert peak("ours") < all_logits / 10


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "reduction must be one of mean, sum, none, got 'avg'", {"reduction": "avg"}),
        (TypeError, "target must be int64, got torch.int32", {"target": torch.zeros(2, 3, dtype=torch.int32)}),
        (
            ValueError,
            r"target must have the shape \[2, 3\] of hidden's rows, got \[6\]",
            {"target": torch.zeros(6).long()},
        ),
        (ValueError, "target is on meta, but hidden is on cpu", {"target": torch.zeros(2, 3, device="meta").long()}),
        (IndexError, "target contains 7; accepted are 0 to 6 and ignore_index=-100", {"target": torch.full((2, 3), 7)}),
        (ValueError, r"hidden must be \[..., 5\] to fit weight \[7, 5\]", {"hidden": torch.zeros(2, 3, 4)}),
        (ValueError, r"bias must have shape \[7\]", {"bias": torch.zeros(5)}),
        (ValueError, r"weight must have at least one row, got shape \[0, 5\]", {"weight": torch.zeros(0, 5)}),
        (TypeError, "weight is torch.bfloat16, but hidden is torch.float32", {"weight": torch.zeros(7, 5).bfloat16()}),
        (ValueError, "shift=True needs", {"hidden": torch.zeros(5), "target": torch.tensor(0), "shift": True}),
        (
            RuntimeError,
            "torch.float64 is not one of",
            {"hidden": torch.zeros(2, 3, 5).double(), "weight": torch.zeros(7, 5).double(), "backend": "triton"},
        ),
    ],
)
def test_bad_arguments(error, message, change):
    arguments = {"hidden": torch.zeros(2, 3, 5), "weight": torch.zeros(7, 5), "target": torch.zeros(2, 3).long()}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments | change)
