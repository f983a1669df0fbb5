"""Embeddings: the interpreted kernels beside torch's, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast_kernels import _philox, embedding, embeddings
from tests.support import DEVICE
from tests.support.compare import assert_triton_no_worse, outputs_and_gradients
from tests.support.inputs import DTYPES, LAYOUTS, draw, with_layout

CHUNK = embeddings.GATHER.rows


def op(dropout_p: float = 0.0):
    def run(backend, *, input_ids, token_weight, position_weight, position_ids=None, token_type_ids=None):
        return embedding(
            input_ids,
            token_weight,
            position_weight,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            dropout_p=dropout_p,
            backend=backend,
        )

    return run


def integers(high: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def inputs(B: int, T: int, V: int, P: int, C: int, dtype: torch.dtype = torch.float32) -> dict:
    return {
        "input_ids": integers(V, B, T),
        "token_weight": draw(V, C, dtype=dtype),
        "position_weight": draw(P, C, dtype=dtype, seed=1),
    }


# V = 1: one run over all chunks; V = 3: runs of several chunks; V large: most runs of one; C beyond a block of columns
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "V", "P", "C"),
    [(1, 1, 1, 1, 1), (1, 100, 1, 128, 16), (3, 40, 3, 80, 20), (3, 33, 200, 40, 768), (2, 9, 5, 9, 1030)],
)
def test_no_worse_than_torch(B, T, V, P, C, dtype):
    assert_triton_no_worse(op(), inputs(B, T, V, P, C, dtype))


@pytest.mark.parametrize("positions", [(9,), (1, 9), (4, 9)])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_positions_and_types(positions, ids):
    tensors = inputs(4, 9, 30, 12, 40)
    tensors |= {
        "input_ids": tensors["input_ids"].to(ids),
        "position_ids": integers(12, *positions, dtype=ids),
        "token_type_ids": integers(30, 4, 9, seed=2, dtype=ids),
    }
    assert_triton_no_worse(op(), tensors)


@given(
    lengths=st.lists(st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1]), min_size=1, max_size=4),
    C=st.integers(1, 40),
    layout=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_runs_of_any_length(lengths, C, layout, seed):
    """Each id as often as its run is to be long, in any order: runs end inside chunks, at their ends and far on."""
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))][None].to(DEVICE)
    tensors = {
        "input_ids": ids,
        "token_weight": with_layout(draw(len(lengths), C), layout),
        "position_weight": with_layout(draw(ids.shape[1], C, seed=1), layout),
    }
    assert_triton_no_worse(op(), tensors)


@pytest.mark.parametrize(("B", "T", "C"), [(0, 5, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing(B, T, C):
    tensors = inputs(B, T, 3, 8, C)
    ours, expected = (outputs_and_gradients(op(), backend, tensors) for backend in ("triton", "reference"))
    assert ours["output 0"].shape == (B, T, C)
    torch.testing.assert_close(ours, expected)


def test_dropout_is_the_mask_of_the_seed(monkeypatch):
    seed = torch.tensor([2**62 - 99], device=DEVICE)
    monkeypatch.setattr(_philox, "draw_seed", lambda device: seed)
    tensors = inputs(2, 40, 7, 64, 50)
    kept = _philox.keep_block_reference(seed, 80, 50, 0.3).view(2, 40, 50).to(DEVICE)
    ours = outputs_and_gradients(op(0.3), "triton", tensors)

    def masked(backend, *, input_ids, token_weight, position_weight):
        return embedding(input_ids, token_weight, position_weight, backend=backend) * kept / 0.7

    torch.testing.assert_close(ours, outputs_and_gradients(masked, "reference", tensors), rtol=1e-5, atol=1e-5)


def test_dropout_draws():
    tensors = inputs(2, 40, 7, 64, 50)
    torch.manual_seed(1)
    first, second = (op(0.5)("triton", **tensors) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(op(0.5)("triton", **tensors), first)
    assert not torch.equal(first, second)


def test_deterministic_under_torchs_switch():
    tensors = inputs(2, 64, 5, 64, 24)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (outputs_and_gradients(op(), "triton", tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_id_out_of_range_is_not_read():
    """Where ids cannot be checked, a wrong one makes NaN, and no gradient, and touches nothing else."""
    weight, positions = draw(5, 8), draw(4, 8)
    ids = torch.tensor([[1, 5, -1]], device=DEVICE)
    y = embeddings._forward_op(ids, weight, positions, None, None, None, 0.0)
    assert y.isnan().all(-1).tolist() == [[False, True, True]]
    dy, (sorted_ids, order) = torch.ones_like(y), ids.flatten().sort()
    dweight = embeddings._backward_op(dy, sorted_ids, order, None, 0.0, 5, torch.float32)
    assert dweight.sum(-1).tolist() == [0, 8, 0, 0, 0]


def test_registered():
    tensors = inputs(2, 40, 7, 64, 24)
    seed = torch.tensor([3], device=DEVICE)
    torch.library.opcheck(embeddings._forward_op, (*tensors.values(), None, tensors["input_ids"], seed, 0.1))
    ids, order = tensors["input_ids"].flatten().sort()
    torch.library.opcheck(embeddings._backward_op, (draw(2, 40, 24), ids, order, seed, 0.1, 7, torch.float16))


def test_compiled_whole_with_dynamic_shapes():
    def f(ids, tokens, positions):
        return embedding(ids, tokens, positions, backend="triton").square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens, positions = draw(7, 24).requires_grad_(), draw(64, 24).requires_grad_()
    for T in (5, 40):
        ids = integers(7, 2, T)
        found, expected = (torch.autograd.grad(g(ids, tokens, positions), (tokens, positions)) for g in (compiled, f))
        torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused():
    tensors = inputs(1, 4, 7, 64, 8)
    tensors["token_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="embedding: this backend has no second derivatives"):
        torch.autograd.grad(op()("triton", **tensors).sum(), tensors["token_weight"], create_graph=True)


def test_reference_is_torch():
    tensors = inputs(2, 6, 7, 8, 5)
    types = integers(7, 2, 6, seed=3)
    y = embedding(**tensors, token_type_ids=types, backend="reference")
    tokens = F.embedding(tensors["input_ids"], tensors["token_weight"]) + F.embedding(types, tensors["token_weight"])
    torch.testing.assert_close(y, tokens + tensors["position_weight"][:6])


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "input_ids must be int32 or int64, got torch.float32", {"input_ids": torch.zeros(2, 3)}),
        (ValueError, "input_ids has 9 positions, position_weight only 8", {"input_ids": torch.zeros(2, 9).long()}),
        (IndexError, "input_ids contains 7; accepted are 0 to 6", {"input_ids": torch.tensor([[0, 7, 1]])}),
        (IndexError, "position_ids contains -1; accepted are 0 to 7", {"position_ids": torch.tensor([0, -1, 1])}),
        (IndexError, "token_type_ids contains 9", {"token_type_ids": torch.tensor([[0, 9, 1], [0, 0, 0]])}),
        (ValueError, r"position_ids must be \[2, 3\], \[1, 3\] or \[3\]", {"position_ids": torch.zeros(2).long()}),
        (ValueError, "token_type_ids must have the shape of input_ids", {"token_type_ids": torch.zeros(3).long()}),
        (ValueError, "must agree in C", {"token_weight": torch.zeros(7, 4)}),
        (
            ValueError,
            "position_weight is on meta, but token_weight",
            {"position_weight": torch.zeros(8, 5, device="meta")},
        ),
        (ValueError, r"dropout_p must be in \[0, 1\), got -0.1", {"dropout_p": -0.1}),
    ],
)
def test_bad_arguments(error, message, change):
    arguments = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "token_weight": torch.zeros(7, 5),
        "position_weight": torch.zeros(8, 5),
    }
    with pytest.raises(error, match=message):
        embedding(**arguments | change)
