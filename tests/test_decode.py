"""flash_attention_with_kvcache against attention over each row by itself, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast_kernels import _dispatch, _triton, decode, flash_attention_with_kvcache
from gptfast_kernels.attention import attention_reference
from tests.support import DEVICE
from tests.support.accuracy import assert_no_worse_than_torch
from tests.support.guard import Guard
from tests.support.inputs import DTYPES

B, S, H, D = 3, 20, 4, 16
BACKENDS = ["triton", "torch", "reference"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tensors(T, Hkv=H, dtype=torch.float64, B=B, S=S, H=H, D=D):
    """q, k, v, k_cache, v_cache."""
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, T, H, D), (B, T, Hkv, D), (B, T, Hkv, D), (B, S, Hkv, D), (B, S, Hkv, D)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def poison(lengths, k_cache, v_cache):
    """NaN and infinity in the slots that a row does not use."""
    for row, n in enumerate(lengths):
        k_cache[row, n:] = torch.nan
        v_cache[row, n:] = torch.inf


def each_row_alone(q, k, v, k_cache, v_cache, lengths, **how):
    """O by attention over one row's keys at a time; k and v may be None."""
    outs = []
    for b, n in enumerate(lengths):
        keys, values = k_cache[b, None, :n], v_cache[b, None, :n]
        if k is not None:
            keys, values = torch.cat([keys, k[b, None]], 1), torch.cat([values, v[b, None]], 1)
        outs.append(attention_reference(q[b, None], keys, values, **how)[0])
    return torch.cat(outs)


def many_processors(monkeypatch):
    """So many that every row of more than a tile of keys is split."""
    monkeypatch.setattr(_triton, "multiprocessors", lambda device: 1000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Hkv", [H, 2])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("lengths", [7, 0, [7, 7, 7], [0, 5, 17]])
def test_equals_each_row_alone(lengths, T, Hkv, causal, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k, v, k_cache, v_cache = tensors(T, Hkv, dtype)
    each = [lengths] * B if isinstance(lengths, int) else lengths
    poison(each, k_cache, v_cache)  # what stands behind a row's positions must not matter
    before = k_cache.clone()
    how = {"causal": causal, "softmax_scale": 0.3}
    expected = each_row_alone(*(x.double() for x in (q, k, v, k_cache, v_cache)), each, **how)
    seqlens = lengths if isinstance(lengths, int) else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    out = flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, backend=backend, **how)

    for row, n in enumerate(each):
        assert torch.equal(k_cache[row, n : n + T], k[row])
        assert torch.equal(v_cache[row, n : n + T], v[row])
        assert torch.equal(k_cache[row, :n], before[row, :n])
        assert k_cache[row, n + T :].isnan().all()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [6, 0, [6, 0, 20]])
@pytest.mark.parametrize("T", [1, 3])
def test_without_new_keys_attends_to_what_is_there(lengths, T, backend):
    """The queries are the row's last; one before its first sees nothing and gives zeros."""
    q, _, _, k_cache, v_cache = tensors(T, dtype=torch.float32)
    before = k_cache.clone(), v_cache.clone()
    seqlens = lengths if isinstance(lengths, int) else torch.tensor(lengths, device=DEVICE)
    each = [lengths] * B if isinstance(lengths, int) else lengths
    for causal in (True, False):
        out = flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, causal=causal, backend=backend)
        expected = each_row_alone(q, None, None, k_cache, v_cache, each, causal=causal)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


# ---- the Triton kernels


def check(lengths, *, T=1, Hkv=1, group=1, S=64, D=32, dtype=torch.float32, causal=True, append=True):
    """Between canaries, beside torch's error against float64; the cache holds what it should, and no more."""
    rows = len(lengths)
    q, k, v, k_cache, v_cache = tensors(T, Hkv, dtype, B=rows, S=S, H=Hkv * group, D=D)
    if not append:
        k = v = None
    poison(lengths, k_cache, v_cache)
    seqlens = torch.tensor(lengths, device=DEVICE)
    how = {"cache_seqlens": seqlens, "causal": causal}
    double = [None if x is None else x.double() for x in (q, k, v, k_cache, v_cache)]
    oracle = each_row_alone(*double, lengths, causal=causal)
    caches = k_cache.clone(), v_cache.clone()
    torchs = flash_attention_with_kvcache(q, *caches, k, v, backend="torch", **how)
    with Guard() as guard:
        ours = [guard.empty(x.shape, x.stride(), x.dtype, x.device).copy_(x) for x in (k_cache, v_cache)]
        q, k, v, how["cache_seqlens"] = (None if x is None else guard.copy(x) for x in (q, k, v, seqlens))
        out = flash_attention_with_kvcache(q, *ours, k, v, backend="triton", **how)
        assert torch.equal(out, flash_attention_with_kvcache(q, *ours, k, v, backend="triton", **how))
    assert_no_worse_than_torch("out", out, torchs, oracle)
    for got, expected in zip(ours, caches, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [False, True])
def test_rows_of_different_length(split, dtype, monkeypatch):
    if split:
        many_processors(monkeypatch)
    check([0, 1, 15, 16, 17, 63], Hkv=2, dtype=dtype)


@pytest.mark.parametrize("D", [1, 16, 40, 64, 80, 128, 256])
def test_head_dims(D):
    check([5, 20], D=D, S=24)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "group"), [(1, 4), (5, 1), (3, 3), (16, 1), (17, 1), (7, 5), (20, 2)])
def test_several_queries_and_tiles(T, group, causal, monkeypatch):
    """Up to three tiles of 16 queries, whose new keys reach into other tiles and other splits."""
    many_processors(monkeypatch)
    check([7, 60 - T], T=T, group=group, D=16, causal=causal)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    T=st.integers(1, 20),
    group=st.integers(1, 4),
    Hkv=st.integers(1, 2),
    causal=st.booleans(),
    append=st.booleans(),
    processors=st.sampled_from([1, 4, 1000]),
)
def test_properties(lengths, T, group, Hkv, causal, append, processors):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_triton, "multiprocessors", lambda device: processors)
        check(lengths, T=T, group=group, Hkv=Hkv, causal=causal, append=append, D=16, S=61)


def test_layouts():
    """What a packed projection and a cache with its heads outside give, and an expanded query."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 1, 3, H, D, generator=generator).to(DEVICE)
    held = [torch.randn(2, H, S, D, generator=generator).to(DEVICE).transpose(1, 2) for _ in range(2)]
    seqlens = torch.tensor([3, 9], dtype=torch.int64, device=DEVICE)
    for q in (qkv[:, :, 0], qkv[:1, :, 0, :, :1].expand(2, 1, H, D)):
        k, v = qkv[:, :, 1], qkv[:, :, 2]
        expected = each_row_alone(q, k, v, *held, [3, 9])
        caches = [x.clone(memory_format=torch.preserve_format) for x in held]
        out = flash_attention_with_kvcache(q, *caches, k, v, cache_seqlens=seqlens.expand(2), backend="triton")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(caches[1][1, 9], v[1, 0])
    with pytest.raises(RuntimeError, match="a cache whose head dim is not contiguous"):
        flash_attention_with_kvcache(q, *(x.mT.contiguous().mT for x in held), cache_seqlens=0, backend="triton")


def test_offsets_beyond_32_bits():
    """A cache whose second row starts past 2^31 elements; untouched pages of memory are never made."""
    q, k, v, k_cache, v_cache = tensors(1, 1, torch.float16, B=3, S=4, H=1)
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    far = far.as_strided(k_cache.shape, (stride, 16, 16, 1)).copy_(k_cache)
    seqlens = torch.tensor([1, 2, 3], device=DEVICE)
    how = {"cache_seqlens": seqlens, "backend": "triton"}
    expected = flash_attention_with_kvcache(q, k_cache, v_cache, k, v, **how)
    assert torch.equal(flash_attention_with_kvcache(q, far, v_cache, k, v, **how), expected)
    assert torch.equal(far, k_cache)


def test_a_length_beyond_the_cache_writes_nowhere():
    """A GPU's lengths are not read back, so the kernel itself must stay inside: called past the checks."""
    q, k, v, k_cache, v_cache = tensors(1, dtype=torch.float32, B=2)
    before = k_cache.clone(), v_cache.clone()
    seqlens = torch.tensor([S, S + 2**20], device=DEVICE)
    with Guard() as guard:
        caches = [guard.copy(x) for x in (k_cache, v_cache)]
        decode._launch(q, *caches, k, v, seqlens, 0, 0.25, True)
    assert torch.equal(k_cache, before[0])
    one = flash_attention_with_kvcache(q[:1], *(x[:1] for x in caches), cache_seqlens=0, backend="triton")
    assert one.abs().max() == 0
    below = torch.tensor([-3, -1], device=DEVICE)
    out = decode._launch(q, k_cache, v_cache, k, v, below, 0, 0.25, True)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("shape", [(0, 1), (2, 0)], ids=str)
def test_nothing(shape):
    rows, T = shape
    for backend in BACKENDS:
        q, k, v, k_cache, v_cache = tensors(T, dtype=torch.float32, B=rows)
        seqlens = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        for lengths in (seqlens, 0):
            out = flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, backend=backend)
            assert out.shape == q.shape


def test_a_prompt_goes_to_the_kernel_for_many_queries():
    q, k, v, k_cache, v_cache = tensors(18, dtype=torch.float32)
    for held in (0, 2):
        with _dispatch.record() as choices:
            out = flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=held, backend="triton")
        assert [choice.op for choice in choices] == ["flash_attention"]
        expected = each_row_alone(q, k, v, k_cache, v_cache, [held] * B)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(v_cache[:, held : held + 18], v)


def test_how_many_parts():
    """From shapes alone. GPT-1's 512 slots stay whole; long caches of few rows are shared out, never beyond bounds."""
    device = torch.device("cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_triton, "INTERPRETED", False)
        monkeypatch.setattr(_triton, "multiprocessors", lambda device: 132)
        assert {decode.splits(S, 12, device) for S in range(1, 1024)} == {1}
        assert decode.splits(1024, 12, device) == 2
        assert decode.splits(4096, 12, device) == 8
        assert decode.splits(4096, 60, device) == 4
        assert decode.splits(4096, 200, device) == decode.splits(4096, 10**6, device) == 1
        assert decode.splits(2**20, 1, device) == decode.MAX_SPLITS


def test_what_auto_takes(monkeypatch):
    """The kernel for lengths on the device, which PyTorch has no fused attention for."""
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "why_not", lambda x: None)
    q, k, v, k_cache, v_cache = tensors(1, dtype=torch.float32)
    for seqlens, backend in ((3, "torch"), (torch.tensor([3] * B, device=DEVICE), "triton")):
        monkeypatch.setattr(decode, "_op", lambda q, *_: q)
        with _dispatch.record() as choices:
            flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens)
        assert [choice.backend for choice in choices] == [backend]


def test_registered():
    q, k, v, k_cache, v_cache = tensors(2, 2, torch.float32)
    seqlens = torch.tensor([0, 5, 17], device=DEVICE)
    torch.library.opcheck(decode._op, (q, k_cache, v_cache, k, v, seqlens, 0, 0.25, True))
    torch.library.opcheck(decode._op, (q, k_cache, v_cache, None, None, None, 7, 0.25, False))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("on_device", [True, False])
def test_compiled_whole_with_dynamic_shapes(backend, on_device):
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, k, v, seqlens):
        return flash_attention_with_kvcache(
            q.sin(), k_cache, v_cache, k, v, cache_seqlens=seqlens, backend=backend
        ).cos()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, lengths in ((1, [4, 0, 9]), (2, [6, 1, 3])):
        q, k, v, *caches = tensors(T, dtype=torch.float32)
        seqlens = torch.tensor(lengths, device=DEVICE) if on_device else lengths[0]
        expected_caches = [x.clone() for x in caches]
        expected = step(q, *expected_caches, k, v, seqlens)
        torch.testing.assert_close(compiled(q, *caches, k, v, seqlens), expected)
        for got, cache in zip(caches, expected_caches, strict=True):
            assert torch.equal(got, cache)


@gpu
@pytest.mark.parametrize("T", [1, 4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sweep(T, dtype):
    for D in (16, 40, 64, 128, 256):
        check([0, 1, 100, 511, 512, 3000], T=T, Hkv=3, group=2, S=4096, D=D, dtype=dtype)


@gpu
def test_a_graph_replays_at_other_lengths():
    q, k, v, k_cache, v_cache = tensors(1, dtype=torch.float32)
    seqlens = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    how = {"cache_seqlens": seqlens, "backend": "triton"}
    flash_attention_with_kvcache(q, k_cache, v_cache, k, v, **how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention_with_kvcache(q, k_cache, v_cache, k, v, **how)
    for lengths in ([1, 5, 9], [19, 0, 3]):
        seqlens.copy_(torch.tensor(lengths))
        expected = each_row_alone(q, k, v, k_cache, v_cache, lengths)
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": None}, ValueError, "k and v must both be given"),
        ({"cache_seqlens": 19}, ValueError, "cache_seqlens \\+ new positions is 21, but k_cache holds 20"),
        ({"cache_seqlens": torch.tensor([0, 19, 0])}, ValueError, "is 21, but k_cache holds 20"),
        (
            {"cache_seqlens": torch.tensor([0, 1])},
            ValueError,
            r"cache_seqlens must be an int or \[3\], got shape \[2\]",
        ),
        ({"cache_seqlens": torch.tensor([0.0, 1, 2])}, TypeError, "cache_seqlens must be int32 or int64, got"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be at least 0, got -1"),
        ({"cache_seqlens": torch.tensor([3, -2, 0])}, ValueError, "cache_seqlens must be at least 0, got -2"),
        ({"k": torch.zeros(B, 1, H, D).double()}, ValueError, "k and v must be"),
        ({"q": torch.zeros(B, 2, H, D + 1).double()}, ValueError, "k_cache and v_cache must both be"),
        ({"q": torch.zeros(B, 2, H + 1, D).double()}, ValueError, "q's heads must be a multiple of k_cache's, got 5"),
        ({"q": torch.zeros(B, H, D).double()}, ValueError, "q and k_cache must have 4 dimensions"),
        ({"q": torch.zeros(B, 2, H, D).long()}, TypeError, "q must be floating point, got torch.int64"),
        ({"k_cache": torch.zeros(B, S, H, D)}, TypeError, "k_cache is torch.float32, but q is torch.float64"),
        ({"k_cache": torch.zeros(B, S + 1, H, D).double()}, ValueError, "k_cache and v_cache must both be"),
        ({"v": torch.zeros(B, 2, H, D, device="meta").double()}, ValueError, "v is on meta, but q is on cpu"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, RuntimeError, "torch.float64 is not one of"),
    ],
)
def test_bad_arguments_leave_the_cache_alone(change, error, message):
    q, k, v, k_cache, v_cache = (x.cpu() for x in tensors(2))
    before = v_cache.clone()
    arguments = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": 0, **change}
    with pytest.raises(error, match=message):
        flash_attention_with_kvcache(**arguments)
    assert torch.equal(v_cache, before)


def test_one_token_on_a_cpu_is_one_call_of_torchs_attention(monkeypatch):
    """No mask and no copy of the cache: its valid prefix goes to PyTorch as it lies."""
    seen = []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, **how):
        seen.append((k, how["attn_mask"]))
        return real(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v, k_cache, v_cache = (x.cpu() for x in tensors(1))
    flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=7)
    flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor([7, 7, 7]))
    flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor([7, 9, 1]))
    assert [tuple(keys.shape) for keys, _ in seen] == [(B, H, 8, D)] * 2 + [(1, H, n, D) for n in (8, 10, 2)]
    assert all(mask is None for _, mask in seen)
    assert all(keys.untyped_storage().data_ptr() == k_cache.untyped_storage().data_ptr() for keys, _ in seen)


def test_transforms_are_refused():
    """Silence would be a gradient of zero."""
    q, k, v, k_cache, v_cache = tensors(1, dtype=torch.float32)

    def f(q):
        return flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3, backend="triton").sum()

    before = k_cache.clone()
    for transform in (lambda: torch.func.grad(f)(q), lambda: torch.func.jvp(f, (q,), (q,))):
        with pytest.raises(RuntimeError, match="cannot pass this backend"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation"):
        f(torch.autograd.forward_ad.make_dual(q, q))
    assert torch.equal(k_cache, before)
