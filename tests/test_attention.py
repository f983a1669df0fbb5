"""The attention kernels, interpreted on a CPU or on a GPU, against a float64 oracle and PyTorch."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptfast_kernels import _dispatch, _philox, _triton, attention
from gptfast_kernels.attention import (
    attention_probs,
    attention_reference,
    flash_attention,
    flash_attention_qkvpacked,
    flash_attention_varlen,
)
from tests.support import DEVICE
from tests.support.accuracy import assert_no_worse_than_torch
from tests.support.guard import Guard

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large, or not emulated by the interpreter")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def qkv(B=1, T=40, S=None, H=2, Hkv=None, D=16, dtype=torch.float32, seed=0) -> list[Tensor]:
    """q [B, T, H, D], k and v [B, S, Hkv, D], and a gradient like q, reproducible on any device."""
    generator = torch.Generator().manual_seed(seed)
    S, Hkv = T if S is None else S, Hkv or H
    shapes = (B, T, H, D), (B, S, Hkv, D), (B, S, Hkv, D), (B, T, H, D)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def run(attend, q, k, v, dout, dlse=None) -> dict[str, Tensor]:
    """Outputs and gradients of ``attend(q, k, v) -> (out, lse)``, copies of the inputs as leaves."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves)
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse).sum()
    dq, dk, dv = torch.autograd.grad(loss, leaves)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def check(q, k, v, dout, dlse=None, kept=None, **how) -> dict[str, Tensor]:
    """Holds our kernels, on guarded tensors, to at most twice PyTorch's error; returns what they gave."""
    with Guard() as guard:
        guarded = [guard.copy(x) for x in (q, k, v)]
        ours = run(
            lambda q, k, v: flash_attention(q, k, v, return_lse=True, backend="triton", **how), *guarded, dout, dlse
        )

    def reference(q, k, v):
        return attention_reference(q, k, v, kept=kept, **how)[:2]

    def torchs(q, k, v):
        out, lse = reference(q, k, v)
        if kept is None:
            out = flash_attention(q, k, v, backend="torch", **how)
        return out, lse.float()

    theirs = run(torchs, q, k, v, dout, dlse)
    oracle = run(reference, q.double(), k.double(), v.double(), dout.double(), dlse)
    for name, x in ours.items():
        # a logsumexp near 0 comes from scores that are not, and the gradient of one key's softmax, 0, from two terms
        magnitude = (1.0 if q.dtype == torch.float32 else 0.01) if name in ("lse", "dq", "dk") else 0.0
        assert_no_worse_than_torch(name, x, theirs[name], oracle[name], magnitude=magnitude)
    return ours


# ---- the reference, the torch backend


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_torchs_formula(causal):
    q, k, v, dout = qkv(B=2, T=9, H=4, Hkv=2, D=5, dtype=torch.float64)
    ours = run(lambda q, k, v: attention_reference(q, k, v, causal=causal)[:2], q, k, v, dout)

    def torchs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return out, ours["lse"]

    for name, x in run(torchs, q, k, v, dout).items():
        torch.testing.assert_close(ours[name], x)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"causal": False},
        {"window_size": (3, None)},
        {"causal": False, "window_size": (2, 4)},
        {"softmax_scale": 0.0},
        {"softmax_scale": -1.0},
        {"softmax_scale": -1.0, "causal": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 7), (3, 7), (7, 3)])
def test_torch_backend_is_the_reference(how, T, S):
    q, k, v, dout = qkv(B=2, T=T, S=S, H=4, Hkv=2, D=5, dtype=torch.float64)
    mask = torch.ones(2, S, dtype=torch.bool, device=DEVICE)
    mask[1, :2] = False
    for padding in (None, mask, mask.sum(1)):
        how["key_padding_mask"] = padding
        ours = run(lambda q, k, v: (flash_attention(q, k, v, backend="torch", **how), v), q, k, v, dout)
        theirs = run(lambda q, k, v: (attention_reference(q, k, v, **how)[0], v), q, k, v, dout)
        for name, x in theirs.items():
            torch.testing.assert_close(ours[name], x)


# ---- accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_several_tiles(dtype, causal):
    check(*qkv(B=2, T=70, H=1, dtype=dtype), causal=causal)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 32, 33, 64, 65])  # around the tile of 16, of 32, and two of them
def test_lengths(T):
    check(*qkv(T=T, H=1))


@pytest.mark.parametrize("D", [1, 20, 32, 40, 64, 80, 96, 128, 256])  # padded to a power of two, and at least 16
def test_head_dims(D):
    check(*qkv(T=17, H=1, D=D))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(1, 40), (20, 50), (50, 20), (40, 1)])
def test_causal_is_aligned_bottom_right(T, S, causal):
    got = check(*qkv(T=T, S=S, H=1), causal=causal)
    if causal and T > S:
        assert got["out"][:, : T - S].eq(0).all()
        assert got["lse"][..., : T - S].eq(-torch.inf).all()
        assert got["dq"][:, : T - S].eq(0).all()


@pytest.mark.parametrize(("H", "Hkv"), [(4, 2), (3, 1)])
def test_grouped_query_heads(H, Hkv):
    check(*qkv(B=2, T=20, H=H, Hkv=Hkv))


@pytest.mark.parametrize("window", [(0, None), (20, None), (7, 5), (None, 9), (0, 0), (100, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window, causal):
    check(*qkv(T=50, S=60, H=1), causal=causal, window_size=window)


def test_softmax_scale():
    check(*qkv(H=1), softmax_scale=0.7)


def test_large_scores_stay_finite():
    """Scores of 1e5, whose softmax is 0 and 1: gradients are what rounding leaves, so they need only be finite."""
    q, k, v, dout = qkv(T=33, H=1, dtype=torch.float16)
    got = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q * 200, k * 200, v, dout)
    assert all(x.isfinite().all() for x in got.values())
    oracle = attention_reference(q.double() * 200, k.double() * 200, v.double())[0]
    torch.testing.assert_close(got["out"].double(), oracle, rtol=1e-3, atol=1e-3)


def test_lse_and_its_gradient():
    check(*qkv(B=2, T=33, S=40), dlse=torch.randn(2, 2, 33, device=DEVICE))
    q, k, v, _ = qkv(T=5)
    only = run(lambda q, k, v: flash_attention(q, k, v, return_lse=True, backend="triton"), q, k, v, 0 * q, 1.0)
    assert only["dq"].abs().max() > 0.01  # although out has no gradient


# ---- masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "scattered", "lengths"])
def test_padding(side, dtype):
    q, k, v, dout = qkv(B=3, T=40, H=1, dtype=dtype)
    slots, lengths = torch.arange(40, device=DEVICE), torch.tensor([[40], [23], [0]], device=DEVICE)
    mask = {"left": slots >= 40 - lengths, "scattered": (slots * 7 % 40) < lengths}.get(side, slots < lengths)
    check(q, k, v, dout, key_padding_mask=lengths[:, 0] if side == "lengths" else mask)


def test_padding_holds_anything():
    """NaN and infinity in a padded slot reach nothing; a row that sees no key leaves the other rows bit for bit."""
    q, k, v, dout = qkv(B=2, T=40, H=1)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    mask[0, 25:] = mask[1] = False

    def attend(k, v, mask):
        how = {"key_padding_mask": mask, "return_lse": True, "backend": "triton"}
        return run(lambda q, k, v: flash_attention(q, k, v, **how), q, k, v, dout)

    clean = attend(k, v, mask)
    k, v = k.clone(), v.clone()
    k[0, 25:], v[0, 25:], k[1, ::2], v[1, 1::2] = torch.nan, torch.inf, -torch.inf, torch.nan
    for name, x in attend(k, v, mask).items():
        assert torch.equal(x, clean[name]), name
        assert not x.isnan().any()
    assert clean["out"][1].eq(0).all()
    alone = run(
        lambda q, k, v: flash_attention(q, k, v, key_padding_mask=mask[:1], return_lse=True, backend="triton"),
        *(x[:1] for x in (q, clean_slots(k, mask), clean_slots(v, mask), dout)),
    )
    for name, x in alone.items():
        assert torch.equal(x, clean[name][:1]), name


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_query_that_sees_no_key_holds_anything(backend):
    """Its gradient is 0, and what it holds changes no other bit: by the causal mask, by a window, by padding."""
    q, k, v, dout = qkv(B=2, T=24, S=20, H=1)
    mask = torch.arange(20, device=DEVICE) >= torch.tensor([[7], [20]], device=DEVICE)
    for how, blind in (
        ({}, torch.arange(24) < 4),
        ({"causal": False, "window_size": (3, 2)}, torch.arange(24) < 2),
        ({"key_padding_mask": mask}, torch.arange(24) < torch.tensor([[11], [24]])),
    ):
        blind = blind.expand(2, 24).to(DEVICE)

        def attend(q, k, v, how=how):
            return flash_attention(q, k, v, return_lse=backend != "torch", backend=backend, **how)

        def with_lse(*x):
            return attend(*x) if backend != "torch" else (attend(*x), x[0])

        clean = run(with_lse, q, k, v, dout)
        assert clean["out"][blind].eq(0).all()
        assert clean["dq"][blind].eq(0).all()
        poisoned = q.clone()
        poisoned[blind] = torch.nan
        poisoned[:, 0] = torch.inf
        got = run(with_lse, poisoned, k, v, dout)
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(got[name], clean[name]), (how, name)


def test_layouts_of_the_mask():
    q, k, v, dout = qkv(B=2, T=20, H=1)
    mask = torch.arange(20, device=DEVICE) % 3 > torch.tensor([[0], [1]], device=DEVICE)
    for strided in (mask.t().contiguous().t(), torch.stack([mask, ~mask], -1)[..., 0], mask[:1].expand(2, 20)):
        check(q, k, v, dout, key_padding_mask=strided)


def clean_slots(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask[:, :, None, None], 0.0)


def test_nan_in_an_attended_slot_is_seen():
    q, k, v, _ = qkv(H=1)
    v[0, 20] = torch.nan
    out = flash_attention(q, k, v, backend="triton")
    assert out[0, 20:].isnan().all()


# ---- layouts


def sliced(x):  # every second row and head of something larger
    big = x.new_full((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), torch.nan)
    big[:, ::2, 1::2] = x
    return big[:, ::2, 1::2]


LAYOUTS = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": sliced,
    "last dim strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd offset": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
}


@pytest.mark.parametrize("layout", [*LAYOUTS][1:])
def test_layouts(layout):
    q, k, v, dout = qkv(B=2, T=20)
    expected = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q, k, v, dout)
    change = LAYOUTS[layout]
    got = check(*(change(x) for x in (q, k, v, dout)))
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


def test_expanded_keys_and_gradients():
    q, k, v, _ = qkv(B=2, T=20, H=2)
    k, v = (x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v))
    check(q, k, v, torch.ones((), device=DEVICE).expand(q.shape))  # the gradient that .sum() sends
    leaf = q.detach().requires_grad_()
    flash_attention(leaf, k, v, backend="triton").sum().backward()
    assert leaf.grad.abs().max() > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qkvpacked_is_read_in_place(dtype):
    q, k, v, dout = qkv(B=2, T=20, H=2, D=20, dtype=dtype)
    expected = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q, k, v, dout)
    with Guard() as guard:
        packed = guard.copy(torch.stack([q, k, v], 2)).requires_grad_()
        out, lse = flash_attention_qkvpacked(packed, return_lse=True, backend="triton")
        (gradient,) = torch.autograd.grad(out, packed, dout)
    assert out.is_contiguous()
    assert gradient.is_contiguous()
    got = dict(zip(expected, (out, lse, *gradient.unbind(2)), strict=True))
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name
    plain = flash_attention_qkvpacked(packed.detach(), backend="torch")
    torch.testing.assert_close(plain, out.detach(), rtol=0.02, atol=0.02)


def test_offsets_beyond_32_bits():
    """A stride that takes the last row's offset past 2^31 elements; untouched pages of memory are never made."""
    q, k, v, dout = qkv(T=3, H=1, dtype=torch.float16)
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE).as_strided(q.shape, (0, stride, 16, 1))
    expected = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q, k, v, dout)
    for index, name in enumerate(("q", "k", "v", "dout")):
        arguments = [q, k, v, dout]
        arguments[index] = far.copy_(arguments[index])
        got = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), *arguments)
        for result, x in got.items():
            assert torch.equal(x, expected[result]), (name, result)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=str)
def test_empty(shape):
    B, T, S = shape
    q, k, v, dout = qkv(B=B, T=T, S=S)
    got = run(lambda *x: flash_attention(*x, causal=False, return_lse=True, backend="triton"), q, k, v, dout)
    assert got["out"].shape == q.shape
    assert got["lse"].shape == (B, 2, T)
    assert got["out"].eq(0).all()
    assert got["lse"].eq(-torch.inf).all()
    assert all(got[name].eq(0).all() for name in ("dq", "dk", "dv"))


# ---- dropout


def dropout_mask(seed: int, B: int, H: int, T: int, S: int, p: float) -> Tensor:
    """bool [B, H, T, S]: what the kernels keep under ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    rows = torch.arange(B * H * T, device=DEVICE).view(B, H, T, 1)
    return _philox.keep_reference(_philox.draw_seed(torch.device(DEVICE)), rows, torch.arange(S, device=DEVICE), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    kept = dropout_mask(3, 2, 2, 33, 40, 0.3)
    assert 0.66 < kept.float().mean() < 0.74
    torch.manual_seed(3)
    check(*qkv(B=2, T=33, S=40, dtype=dtype), kept=kept, dropout_p=0.3)


def test_dropout_draws():
    q, k, v, _ = qkv()

    def attend(seed, p):
        torch.manual_seed(seed)
        return flash_attention(q, k, v, dropout_p=p, backend="triton")

    assert torch.equal(attend(1, 0.5), attend(1, 0.5))
    assert not torch.equal(attend(1, 0.5), attend(2, 0.5))
    torch.manual_seed(1)
    first, second = (flash_attention(q, k, v, dropout_p=0.5, backend="triton") for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(attend(1, 0.0), flash_attention(q, k, v, backend="triton"))


def test_dropout_under_checkpointing():
    q, k, v, dout = qkv(T=20)

    def attend(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.4, return_lse=True, backend="triton")

    torch.manual_seed(5)
    expected = run(attend, q, k, v, dout)
    torch.manual_seed(5)
    got = run(lambda *x: checkpoint(attend, *x, use_reentrant=False), q, k, v, dout)
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


def test_philox_is_uniform():
    rows, columns = torch.arange(300)[:, None], torch.arange(300)
    for seed in (0, 1, -1, 2**62 + 12345):
        kept = _philox.keep_reference(torch.tensor([seed]), rows, columns, 0.25).double()
        assert abs(kept.mean() - 0.75) < 0.006  # 4 standard deviations
        assert (kept.mean(0) - 0.75).abs().max() < 0.13
        assert (kept.mean(1) - 0.75).abs().max() < 0.13


# ---- several sequences end to end


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_varlen(causal, dropout_p):
    lengths_q, lengths_k = [20, 0, 33, 1, 5], [20, 3, 40, 1, 0]
    cu_q, cu_k = (
        torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in (lengths_q, lengths_k)
    )  # an empty sequence, one that sees nothing, T != S
    q, k, v, dout = (x[0] for x in qkv(T=sum(lengths_q), S=sum(lengths_k), H=4, Hkv=2))
    if dropout_p:
        mask = dropout_mask(7, len(lengths_q), 4, max(lengths_q), max(lengths_k), dropout_p)

    def ours(q, k, v):
        torch.manual_seed(7)
        how = {"causal": causal, "dropout_p": dropout_p, "return_lse": True, "backend": "triton"}
        return flash_attention_varlen(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), **how)

    def reference(q, k, v):
        outs, lses, a, c = [], [], 0, 0
        for b, (T, S) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            kept = mask[b : b + 1, :, :T, :S] if dropout_p else None
            one = q[None, a : a + T], k[None, c : c + S], v[None, c : c + S]
            out, lse, _ = attention_reference(*one, causal=causal, dropout_p=dropout_p, kept=kept)
            outs.append(out[0])
            lses.append(lse[0])
            a, c = a + T, c + S
        return torch.cat(outs), torch.cat(lses, 1)

    with Guard() as guard:
        got = run(ours, *(guard.copy(x) for x in (q, k, v)), dout)
    theirs = run(reference, q, k, v, dout)
    oracle = run(reference, *(x.double() for x in (q, k, v, dout)))
    for name, x in got.items():
        assert_no_worse_than_torch(name, x, theirs[name], oracle[name])
    if not dropout_p:
        how = {"causal": causal, "return_lse": True}
        for backend in ("torch", "reference"):
            out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, 33, 40, backend=backend, **how)
            torch.testing.assert_close(out, oracle["out"].float())
            torch.testing.assert_close(lse, oracle["lse"].float())


def test_layouts_of_the_starts():
    q, k, v, dout = (x[0] for x in qkv(T=20, H=1))
    cu = torch.tensor([0, 7, 20], dtype=torch.int32, device=DEVICE)

    def attend(cu):
        how = {"return_lse": True, "backend": "triton"}
        return run(lambda q, k, v: flash_attention_varlen(q, k, v, cu, cu, 13, 13, **how), q, k, v, dout)

    expected = attend(cu)
    for strided in (torch.stack([cu, cu + 1], 1)[:, 0], cu.long()):
        for name, x in attend(strided).items():
            assert torch.equal(x, expected[name]), name


# ---- probabilities


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probs_from_the_lse(dtype):
    q, k, v, _ = qkv(B=2, T=12, S=20, H=4, Hkv=2, dtype=dtype)
    mask = torch.arange(20, device=DEVICE) < torch.tensor([[20], [5]], device=DEVICE)
    for how in ({}, {"causal": False, "softmax_scale": 0.3}, {"key_padding_mask": mask}, {"window_size": (3, None)}):
        _, lse = flash_attention(q, k, v, return_lse=True, backend="triton", **how)
        _, _, theirs = attention_reference(q, k, v, **how)
        _, _, oracle = attention_reference(q.double(), k.double(), v.double(), **how)
        assert_no_worse_than_torch("probs", attention_probs(q, k, lse, **how), theirs, oracle)


def test_probs_are_differentiable():
    q, k, v, _ = qkv(T=12)
    weight = torch.randn(1, 2, 12, 12, device=DEVICE)

    def gradients(probs_of):
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        return torch.autograd.grad((probs_of(*leaves) * weight).sum(), leaves)

    ours = gradients(lambda q, k: attention_probs(q, k, flash_attention(q, k, v, return_lse=True, backend="triton")[1]))
    for got, expected in zip(ours, gradients(lambda q, k: attention_reference(q, k, v)[2]), strict=True):
        torch.testing.assert_close(got, expected)


# ---- properties


@st.composite
def problems(draw):
    """Shape, layout, dtype, mask and grouping; small, so that an example takes well under a second."""
    T, S = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    B, Hkv, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1)]))
    how = {"causal": draw(st.booleans())}
    bound = st.none() | st.integers(0, 45)
    how["window_size"] = draw(st.just((None, None)) | st.tuples(bound, bound))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        how["key_padding_mask"] = (torch.rand(B, S, generator=generator) < 0.7).to(DEVICE)
    layouts = [draw(st.sampled_from([*LAYOUTS])) for _ in range(4)]
    shape = {"B": B, "T": T, "S": S, "H": Hkv * group, "Hkv": Hkv, "D": draw(st.sampled_from([3, 16, 24]))}
    return shape, layouts, draw(st.sampled_from(DTYPES)), how


@settings(
    max_examples=15,
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_properties(problem, seed):
    shape, layouts, dtype, how = problem
    tensors = qkv(**shape, dtype=dtype, seed=seed)
    check(*(LAYOUTS[name](x) if x.numel() else x for name, x in zip(layouts, tensors, strict=True)), **how)


# ---- autograd, torch.compile, autocast


def test_backward_leaves_saved_tensors_and_is_repeatable():
    q, k, v, dout = (x.requires_grad_() for x in qkv(T=33))
    out = flash_attention(q, k, v, backend="triton")
    before = [x.detach().clone() for x in (q, k, v, out, dout)]
    first = torch.autograd.grad(out, (q, k, v), dout.detach(), retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), dout.detach())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, (q, k, v, out, dout), strict=True))


def test_second_order_is_refused():
    q, k, v, _ = (x.requires_grad_() for x in qkv(T=5))
    (gradient,) = torch.autograd.grad(flash_attention(q, k, v, backend="triton").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    packed = torch.stack([q, k, v], 2)
    (gradient,) = torch.autograd.grad(flash_attention_qkvpacked(packed, backend="triton").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_torch_func():
    q, k, v, _ = qkv(T=5)
    got = torch.func.grad(lambda q: flash_attention(q, k, v, backend="triton").square().sum())(q)
    expected = torch.func.grad(lambda q: attention_reference(q, k, v)[0].square().sum())(q)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("what", ["dense", "padding, window, dropout", "varlen"])
def test_opcheck(what):
    q, k, v, dout = qkv(B=2, T=20, H=2, Hkv=1)
    window, p, seed, padding, cu = (None, 0), 0.0, None, None, None
    if what == "varlen":
        cu = torch.tensor([0, 5, 20], dtype=torch.int32, device=DEVICE)
        q, k, v, dout = (x[:1] for x in (q, k, v, dout))
    elif what != "dense":
        window, p, seed = (5, 3), 0.2, torch.tensor([5], device=DEVICE)
        padding = torch.arange(20, device=DEVICE) < torch.tensor([[20], [4]], device=DEVICE)
    how = (cu, cu, 20, 20, 0.25, *window, p, seed, padding)
    ops = torch.ops.gptfast
    out, lse = ops.attention_forward(q, k, v, *how)
    tests = ("test_schema", "test_faketensor")  # autograd is in the functions over the operators
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, *how), test_utils=tests)
    torch.library.opcheck(
        ops.attention_backward.default, (dout, torch.ones_like(lse), out, lse, q, k, v, *how), test_utils=tests
    )
    packed = torch.stack([q, k.expand_as(q), v.expand_as(q)], 2)
    torch.library.opcheck(
        ops.attention_backward_qkvpacked.default, (dout, None, out, lse, packed, *how), test_utils=tests
    )


def test_fullgraph_with_dynamic_shapes():
    torch._dynamo.reset()

    def step(x, mask):
        return flash_attention_qkvpacked(x.sin(), key_padding_mask=mask, dropout_p=0.2, backend="triton").cos()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (18, 20):
        x = torch.randn(1, T, 3, 1, 16, device=DEVICE, requires_grad=True)
        mask = torch.ones(1, T, dtype=torch.bool, device=DEVICE)
        results = []
        for run_step in (step, compiled):
            torch.manual_seed(0)
            out = run_step(x, mask)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_fullgraph_of_several_sequences():
    torch._dynamo.reset()
    q, k, v, dout = (x[0] for x in qkv(T=20, H=1))
    cu = torch.tensor([0, 7, 20], dtype=torch.int32, device=DEVICE)

    def step(q, k, v):
        return flash_attention_varlen(q, k, v, cu, cu, 13, 13, return_lse=True, backend="triton")

    expected = run(step, q, k, v, dout)
    got = run(torch.compile(step, fullgraph=True, backend="aot_eager"), q, k, v, dout)
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name])


def test_fullgraph_of_one_tensor_for_all():
    torch._dynamo.reset()

    def step(x):
        return flash_attention(x, x, x, backend="triton").square().sum()

    x = torch.randn(1, 5, 1, 16, device=DEVICE, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,), (expected,) = (torch.autograd.grad(run_step(x), x) for run_step in (compiled, step))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_autocast(backend):
    q, k, v, _ = (x.requires_grad_() for x in qkv(T=5))
    with torch.autocast(DEVICE, torch.bfloat16):
        out, lse = flash_attention(q, k.bfloat16(), v, return_lse=True, backend=backend)
        packed = flash_attention_qkvpacked(torch.stack([q, k, v], 2), backend=backend)
    assert out.dtype == packed.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


# ---- choice of backend, refusals


def test_auto_on_a_cpu_is_torch():
    q, k, v, _ = (x.cpu() for x in qkv(T=5))
    with _dispatch.record() as choices:
        flash_attention(q, k, v)
    assert [(c.op, c.backend) for c in choices] == [("flash_attention", "torch")]
    assert choices[0].reason


def test_what_auto_sends_to_triton(monkeypatch):
    """Until cells are timed: half precision calls that PyTorch has no fused attention for."""
    q, k, v, _ = qkv(T=5, dtype=torch.bfloat16)
    _triton.target(q.device)  # remembered, so that what follows still runs interpreted
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "why_not", lambda x: None)
    mask = torch.ones(1, 5, dtype=torch.bool, device=DEVICE)
    cases = [
        ("torch", q, {}),
        ("torch", q, {"causal": False}),
        ("triton", q, {"key_padding_mask": mask}),
        ("triton", q, {"window_size": (2, None)}),
        ("triton", q, {"return_lse": True}),
        ("triton", q[:, :3], {}),
        ("torch", q[:, :3], {"causal": False}),
        ("triton", q, {"deterministic": True}),
    ]
    for expected, queries, how in cases:
        with _dispatch.record() as choices:
            flash_attention(queries, k, v, **how)
        assert choices[0].backend == expected, (how, choices)
    with _dispatch.record() as choices:
        flash_attention(q.float(), k.float(), v.float(), key_padding_mask=mask)
    assert choices[0].backend == "torch"


def test_triton_refuses_by_name(monkeypatch):
    q, k, v, _ = qkv(T=3)
    wide = [x.new_zeros(1, 3, 1, 257) for x in (q, k, v)]
    for message, tensors, how in [
        ("head dim 257", wide, {}),
        ("float64", [x.double() for x in (q, k, v)], {}),
        ("softmax_scale must be above 0, got -1", (q, k, v), {"softmax_scale": -1.0}),
    ]:
        with pytest.raises(RuntimeError, match=message):
            flash_attention(*tensors, backend="triton", **how)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        flash_attention(*(x.cpu() for x in (q, k, v)), backend="triton")
    monkeypatch.setattr(_triton, "INSTALLED", False)
    with pytest.raises(RuntimeError, match="not installed"):
        flash_attention(q, k, v, backend="triton")


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"q must be \[batch, length, heads, head dim\]", {"q": lambda x: x[0]}),
        (TypeError, "k is torch.float16, but q is torch.float32", {"k": lambda x: x.half()}),
        (TypeError, "q must be floating point", dict.fromkeys("qkv", Tensor.long)),
        (ValueError, "k and v must have one shape", {"v": lambda x: x[:, :2]}),
        (ValueError, "must agree in batch and head dim", {"q": lambda x: x[..., :8]}),
        (ValueError, "heads must be a multiple", {"q": lambda x: x[:, :, :1]}),
        (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
        (ValueError, "softmax_scale must be finite, got nan", {"softmax_scale": torch.nan}),
        (ValueError, "softmax_scale must be finite, got -inf", {"softmax_scale": -torch.inf}),
        (ValueError, r"window_size must be two integers >= 0 or None, got \(-1, 0\)", {"window_size": (-1, 0)}),
        (ValueError, "window_size must be two integers >= 0 or None, got 3", {"window_size": 3}),
        (ValueError, "window_size must be two integers >= 0 or None", {"window_size": (1.5, None)}),
        (TypeError, "key_padding_mask must be bool", {"key_padding_mask": torch.ones(1, 3)}),
        (ValueError, r"key_padding_mask must be \[B, S\] = \[1, 3\]", {"key_padding_mask": torch.ones(3).bool()}),
        (ValueError, r"key_padding_mask of lengths must be \[B\]", {"key_padding_mask": torch.ones(2).int()}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
    ],
)
def test_errors(error, message, change):
    q, k, v, _ = qkv(T=3, H=2)
    arguments = {"q": q, "k": k, "v": v}
    how = {}
    for name, value in change.items():
        if callable(value):
            arguments[name] = value(arguments[name])
        else:
            how[name] = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises(error, match=message):
        flash_attention(**arguments, **how)


def test_errors_of_other_arguments():
    q, k, v, _ = (x[0] for x in qkv(T=6))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
    for error, message, arguments in [
        (ValueError, "q must be \\[total, heads, head dim\\]", (q[None], k, v, cu, cu, 4, 4)),
        (ValueError, "max_seqlen_q is 3, but a sequence has 4 positions", (q, k, v, cu, cu, 3, 4)),
        (ValueError, "cu_seqlens_k must rise from 0 to the total, 6", (q, k, v, cu, cu + 1, 4, 4)),
        (ValueError, "cu_seqlens_k must be \\[B \\+ 1\\], the same for q and k", (q, k, v, cu, cu[:2], 4, 4)),
        (TypeError, "cu_seqlens_q must be int32 or int64", (q, k, v, cu.float(), cu, 4, 4)),
        (ValueError, "cu_seqlens_k is on meta, but q is on", (q, k, v, cu, cu.to("meta"), 4, 4)),
        (TypeError, "max_seqlen_q must be an integer, got 4.0", (q, k, v, cu, cu, 4.0, 4)),
        (ValueError, "max_seqlen_k must be at least 0, got -1", (q, k, v, cu, cu, 4, -1)),
    ]:
        with pytest.raises(error, match=message):
            flash_attention_varlen(*arguments, backend="torch")
    with pytest.raises(ValueError, match="qkv must be"):
        flash_attention_qkvpacked(q)
    with pytest.raises(ValueError, match="key_padding_mask is on meta, but k is on"):
        flash_attention(q[None], k[None], v[None], key_padding_mask=torch.ones(1, 6, device="meta"))


@pytest.mark.parametrize("length", [-1, 4])
def test_lengths_that_do_not_fit_are_refused_on_a_cpu(length):
    """On a GPU, where reading them costs a synchronisation, they mean no key, and every key."""
    q = torch.zeros(2, 3, 1, 16)
    lengths = torch.tensor([2, length])
    for backend in ("triton", "torch", "reference"):
        with pytest.raises(ValueError, match=f"key_padding_mask of lengths must be from 0 to S = 3, got {length}"):
            flash_attention(q, q, q, key_padding_mask=lengths, backend=backend)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim_that_is_accepted_has_a_config(target, dtype):
    for head_dim in range(1, attention.MAX_HEAD_DIM + 1):
        for kernel in attention.KERNELS:
            for dropout in (False, True):
                assert attention.config(kernel, target, dtype, head_dim, 1, dropout).block_m >= 16


# ---- what only a GPU shows


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 32, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192, 511, 512, 1000])
def test_sweep(T, D, dtype):
    check(*qkv(B=2, T=T, H=3, D=D, dtype=dtype))
    check(*qkv(B=1, T=T, S=333, H=4, Hkv=2, D=D, dtype=dtype), causal=False)


@gpu
def test_gradients_are_the_same_bits_in_100_runs():
    q, k, v, dout = qkv(B=2, T=1000, H=4, Hkv=2, D=64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q, k, v, dout)
        for _ in range(99):
            again = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q, k, v, dout)
            assert all(torch.equal(x, first[name]) for name, x in again.items())
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
def test_more_than_65535_heads():
    check(*qkv(B=35000, T=2, H=2, dtype=torch.float16))


@gpu
def test_more_than_2_31_elements():
    B, T, H, D = 17, 2**15, 64, 64  # 2.3e9 elements
    q = torch.randn(1, T, 1, D, device=DEVICE, dtype=torch.float16)
    big = q.expand(B, T, H, D).contiguous()
    out = flash_attention(big, q.expand(B, T, 1, D), q.expand(B, T, 1, D), backend="triton")
    assert torch.equal(out[-1, :, -1:], out[0, :, :1])


@gpu
def test_the_other_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v, dout = (x.to("cuda:1") for x in qkv())
    got = run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q, k, v, dout)
    expected = run(lambda *x: attention_reference(*x)[:2], q, k, v, dout)
    for name, x in got.items():
        assert x.device == q.device
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-4)


@gpu
def test_each_graph_replay_draws_anew():
    q, k, v, _ = qkv(dtype=torch.bfloat16)
    for _ in range(3):
        flash_attention(q, k, v, dropout_p=0.5, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, k, v, dropout_p=0.5, backend="triton")
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@gpu
def test_memory_is_linear_and_does_not_grow():
    def peak(T):
        tensors = qkv(T=T, H=12, D=64, dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), *tensors)
        return torch.cuda.max_memory_allocated() - held

    assert peak(8192) < 2.2 * peak(4096)
    q, k, v, dout = qkv(T=64, dtype=torch.bfloat16)
    held = None
    for step in range(1000):
        run(lambda *x: flash_attention(*x, return_lse=True, backend="triton"), q, k, v, dout)
        if step == 10:
            held = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == held


@gpu
def test_float32_is_ieee_unless_tf32_is_allowed():
    tensors = qkv(T=128, H=1, D=64)

    def out():
        return flash_attention(*tensors[:3], backend="triton")

    switch = torch.backends.cuda.matmul
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
        switch.fp32_precision = "ieee"
        exact = out()
        switch.fp32_precision = "tf32"
        assert not torch.equal(out(), exact)
