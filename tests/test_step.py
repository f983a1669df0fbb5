"""Blocks for a row or two on gemv: the interpreted kernels beside torch's operators, against float64."""

import pytest
import torch
from torch import nn

import gptfast
from gptfast import step
from gptfast_kernels import use_backend
from tests.support import DEVICE
from tests.support.accuracy import assert_no_worse_than_torch

V, P, C, H = 53, 24, 32, 2


def make(dtype=torch.float32, layers=3, **settings):
    """A model in eval mode whose attention is far from uniform, and of which no parameter is 0 or 1."""
    torch.manual_seed(0)
    config = gptfast.OpenAIGPTConfig(
        vocab_size=V, n_positions=P, n_embd=C, n_layer=layers, n_head=H, initializer_range=0.3, **settings
    )
    model = gptfast.OpenAIGPTLMHeadModel(config)
    for name, p in model.named_parameters():
        if name.endswith("bias") or ".ln_" in name:
            nn.init.uniform_(p, -0.3, 0.3) if name.endswith("bias") else nn.init.uniform_(p, 0.7, 1.3)
    return model.to(DEVICE, dtype).eval()


def ids(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture
def runs(monkeypatch):
    """The layers whose blocks were run in steps."""
    layers = []
    run_block = step.run_block
    monkeypatch.setattr(step, "run_block", lambda *args: layers.append(args[4]) or run_block(*args))
    return layers


@torch.no_grad()
def states(model, x, backend, **how):
    """Hidden states of x [B, T] behind four positions in a cache."""
    cache = model.transformer.new_cache(len(x), P)
    with use_backend(backend):
        model.transformer(x.flip(0)[:, :1].expand(-1, 4), past_key_values=cache)
        return model.transformer(x, past_key_values=cache, **how).last_hidden_state


def assert_right(model, x, **how):
    """Errs at most twice as much as torch's operators; ``model`` is in float64 behind this."""
    found, torchs = states(model, x, "triton", **how), states(model, x, "torch", **how)
    assert_no_worse_than_torch("hidden states", found, torchs, states(model.double(), x, "reference", **how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 2)])
def test_no_worse_than_the_ops(shape, dtype, runs):
    assert_right(make(dtype), ids(*shape))
    assert runs[-3:] == [0, 1, 2]


@pytest.mark.parametrize("afn", ["gelu", "gelu_erf"])
def test_each_gelu(afn, runs):
    assert_right(make(afn=afn), ids(1, 1))
    assert runs


def test_without_a_cache(runs):
    model, x = make(), ids(1, 3)
    with torch.no_grad(), use_backend("triton"):
        found = model(x).logits
    assert runs == [0, 1, 2]
    with torch.no_grad():
        torch.testing.assert_close(found, model(x).logits)


def test_rows_of_different_length(runs):
    """A cache whose lengths are a tensor, as in a batch of prompts and in a CUDA graph."""
    model, x = make(), ids(2, 1)
    caches = []
    for _ in range(2):
        caches.append(model.transformer.new_cache(2, P))
        caches[-1].k.normal_(generator=torch.Generator(DEVICE).manual_seed(1))
        caches[-1].v.normal_(generator=torch.Generator(DEVICE).manual_seed(2))
        caches[-1].seqlens = torch.tensor([3, 9], device=DEVICE)
    with torch.no_grad():
        expected = model(x, past_key_values=caches[0]).logits
        with use_backend("triton"):
            found = model(x, past_key_values=caches[1]).logits
    assert runs == [0, 1, 2]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(caches[1].k, caches[0].k)
    assert caches[1].seqlens.tolist() == [4, 10]


def test_generates_what_the_ops_do(runs):
    model, x = make(), ids(2, 5)
    expected = model.generate(x, max_new_tokens=6)
    with use_backend("triton"):
        assert torch.equal(model.generate(x, max_new_tokens=6), expected)
    assert runs == [0, 1, 2] * 5


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_block_that_is_watched_sees_its_input_and_gives_its_output(layer, runs):
    model, x = make(), ids(1, 1)
    seen = []
    model.transformer.h[layer].register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0]) or (2 * output[0], output[1])
    )
    assert_right(model, x)
    assert set(runs) == {0, 1, 2} - {layer}
    calls = len(seen) // 3  # in float32 by triton and by torch, then in float64
    torch.testing.assert_close(seen[calls - 1], seen[2 * calls - 1])


def leave_training(model):
    model.transformer.h[1].attn.dropout_p = 0.0
    model.transformer.h[1].attn.train()


def leave_dtype(model):
    model.transformer.h[1].ln_1.bfloat16()


def leave_layer(model):
    model.transformer.h[1].mlp.c_fc = nn.Sequential(model.transformer.h[1].mlp.c_fc)


def leave_layout(model):
    model.transformer.h[1] = gptfast.pack(model.transformer.h[1].cpu()).to(DEVICE)


@pytest.mark.parametrize("change", [leave_training, leave_layer, leave_layout])
def test_a_block_that_is_not_plain_takes_the_ops(change, runs):
    model = make()
    change(model)
    assert_right(model, ids(1, 1))
    assert set(runs) == {0, 2}


def test_weights_of_several_dtypes_take_the_ops(runs):
    model, x = make(), ids(1, 1)
    leave_dtype(model)
    torch.testing.assert_close(states(model, x, "triton"), states(model, x, "torch"))
    assert set(runs) == {0, 2}


def test_a_block_unlike_the_config(runs):
    model = make()
    other = gptfast.OpenAIGPTConfig(n_embd=C, n_head=4, n_layer=1, initializer_range=0.3)
    block = gptfast.model.Block(other)
    block.apply(model._init_weights)
    model.transformer.h[1] = block.to(DEVICE).eval()
    with torch.no_grad():
        expected = model(ids(1, 2)).logits
        with use_backend("triton"):
            torch.testing.assert_close(model(ids(1, 2)).logits, expected)
    assert runs == [0, 1, 2]


def test_layers_without_parameters(runs):
    model = make()
    first, second, _ = model.transformer.h
    first.attn.c_attn.bias = second.mlp.c_fc.bias = first.ln_1.bias = None
    first.ln_2 = nn.LayerNorm(C, elementwise_affine=False)
    assert_right(model, ids(1, 1))
    assert set(runs) == {0, 1, 2}


def test_padded_rows(runs):
    model, x = make(), ids(2, 2)
    mask = torch.tensor([[0, 1], [1, 1]], device=DEVICE)
    with torch.inference_mode():
        expected = model(x, mask).logits
        with use_backend("triton"):
            found = model(x, mask).logits
    assert runs == [0, 1, 2]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "how",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"head_mask": torch.ones(H, device=DEVICE)},
    ],
    ids=lambda how: next(iter(how)),
)
def test_what_is_asked_for_in_between_takes_the_ops(how, runs):
    model, x = make(), ids(1, 2)
    with torch.no_grad():
        expected = model(x, **how)
        with use_backend("triton"):
            found = model(x, **how)
    assert not runs
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5)])
def test_more_rows_take_the_ops(shape, runs):
    with torch.no_grad(), use_backend("triton"):
        assert make().transformer(ids(*shape)).last_hidden_state.shape == (*shape, C)
    assert not runs


def test_auto_takes_the_ops_until_it_is_timed(runs):
    states(make(), ids(1, 1), "auto")
    assert not runs


def test_gradients_and_autocast_take_the_ops(runs):
    model, x = make(), ids(1, 1)
    with use_backend("triton"):
        model(x).logits.sum().backward()
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            model(x)
    assert not runs


def test_explain_names_gemv():
    with use_backend("triton"):
        rows = gptfast.explain(make(), ids(1, 1), strict=True)
    calls = [(row.op, row.calls) for row in rows]
    assert sum(n for op, n in calls if op == "gemv") == 4 * 3
    assert sum(n for op, n in calls if op == "layer_norm") == 1


def test_compiled_whole(runs):
    model, x = make(), ids(2, 1)
    with torch.no_grad(), use_backend("triton"):
        expected = model(x).logits
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x).logits, expected)
