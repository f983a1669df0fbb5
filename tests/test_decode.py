"""flash_attention_with_kvcache against attention over each row by itself, in float64."""

import pytest
import torch

from gptfast_kernels import flash_attention_with_kvcache
from gptfast_kernels.attention import attention_reference

B, S, H, D = 3, 20, 4, 16


def tensors(T, Hkv=H, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, T, H, D), (B, T, Hkv, D), (B, T, Hkv, D), (B, S, Hkv, D), (B, S, Hkv, D)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Hkv", [H, 2])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("lengths", [7, 0, [7, 7, 7], [0, 5, 17]])
def test_equals_each_row_alone(lengths, T, Hkv, causal, backend):
    q, k, v, k_cache, v_cache = tensors(T, Hkv)
    each = [lengths] * B if isinstance(lengths, int) else lengths
    for row, n in enumerate(each):  # what stands behind a row's positions must not matter
        k_cache[row, n:] = torch.nan
        v_cache[row, n:] = torch.inf
    before = k_cache.clone()
    seqlens = lengths if isinstance(lengths, int) else torch.tensor(lengths, dtype=torch.int32)

    out = flash_attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=causal, softmax_scale=0.3, backend=backend
    )

    for row, n in enumerate(each):
        assert torch.equal(k_cache[row, n : n + T], k[row])
        assert torch.equal(v_cache[row, n : n + T], v[row])
        assert torch.equal(k_cache[row, :n], before[row, :n])
        assert k_cache[row, n + T :].isnan().all()
        held_k, held_v = k_cache[row : row + 1, : n + T], v_cache[row : row + 1, : n + T]
        expected, _, _ = attention_reference(q[row : row + 1], held_k, held_v, causal=causal, softmax_scale=0.3)
        torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seqlens", [6, torch.tensor([6, 2, 20])])
def test_without_new_keys_attends_to_what_is_there(seqlens):
    q, _, _, k_cache, v_cache = tensors(1)
    before = k_cache.clone(), v_cache.clone()
    out = flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens)
    for row, n in enumerate([6] * B if isinstance(seqlens, int) else seqlens.tolist()):
        expected, _, _ = attention_reference(q[row, None], k_cache[row, None, :n], v_cache[row, None, :n])
        torch.testing.assert_close(out[row, None], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


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
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be at least 0, got -1"),
        ({"k": torch.zeros(B, 1, H, D).double()}, ValueError, "k and v must be"),
        ({"k_cache": torch.zeros(B, S, H, D)}, TypeError, "k_cache is torch.float32, but q is torch.float64"),
        ({"k_cache": torch.zeros(B, S + 1, H, D).double()}, ValueError, "k_cache and v_cache must both be"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_leave_the_cache_alone(change, error, message):
    q, k, v, k_cache, v_cache = tensors(2)
    before = v_cache.clone()
    arguments = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": 0, **change}
    with pytest.raises(error, match=message):
        flash_attention_with_kvcache(**arguments)
    assert torch.equal(v_cache, before)
