"""Inference on a CPU: blocks computed in place, int8 weights, logits that wait to be read."""

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gptfast
from gptfast import cpu
from gptfast.linear import CHUNK, INT8_ROWS, Conv1D, Int8Linear, PackedLinear, _by_blocks
from gptfast.model import Attention, Block
from gptfast.outputs import DeferredLogits
from gptfast_kernels import _dispatch, use_backend
from tests.support.accuracy import assert_no_worse_than_torch

V, P, C, H = 53, 320, 48, 3


def make(kind="OpenAIGPTLMHeadModel", dtype=torch.float32, **settings):
    """A model in eval mode whose attention is far from uniform."""
    torch.manual_seed(0)
    config = gptfast.OpenAIGPTConfig(
        vocab_size=V, n_positions=P, n_embd=C, n_layer=2, n_head=H, initializer_range=0.3, **settings
    )
    return with_biases(getattr(gptfast, kind)(config)).to(dtype).eval()


def with_biases(model):
    """They are zeros and ones where nobody trained, and nobody would miss them."""
    for name, p in model.named_parameters():
        if name.endswith("bias") or ".ln_" in name:
            nn.init.uniform_(p, -0.3, 0.3) if name.endswith("bias") else nn.init.uniform_(p, 0.7, 1.3)
    return model


def ids(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0), device="cpu")


@pytest.fixture
def runs(monkeypatch):
    """Counts the blocks that are computed in place."""
    layers = []
    run_block = cpu.run_block
    monkeypatch.setattr(cpu, "run_block", lambda *args, **how: layers.append(args[3]) or run_block(*args, **how))
    return layers


# ---- blocks in place ----


def check_in_place(model, x, runs):
    """Both blocks run in place, and are as exact as the ops; ``model`` is in float64 behind this."""
    with torch.no_grad():
        ours = model(x, output_hidden_states=True).hidden_states
        assert runs == [0, 1]
        with use_backend("reference"):
            theirs = model(x, output_hidden_states=True).hidden_states
            oracle = model.double()(x, output_hidden_states=True).hidden_states
    assert runs == [0, 1]
    for layer, states in enumerate(zip(ours, theirs, oracle, strict=True)):
        assert_no_worse_than_torch(f"hidden state {layer}", *states)


@pytest.mark.parametrize("afn", ["gelu", "gelu_erf"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (1, 127), (2, 128), (1, 300), (2, 320)])
def test_in_place_is_as_exact_as_the_ops(shape, afn, runs):
    check_in_place(make(afn=afn), ids(*shape), runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [48, 384])  # columns in one block, and in several
def test_one_position_in_half_precision_is_as_exact_as_the_ops(dtype, C, runs):
    torch.manual_seed(0)
    config = gptfast.OpenAIGPTConfig(vocab_size=V, n_positions=P, n_embd=C, n_layer=2, n_head=H, initializer_range=0.1)
    check_in_place(with_biases(gptfast.OpenAIGPTModel(config)).eval().to(dtype), ids(1, 1), runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_in_half_precision_goes_on_in_place(dtype, runs):
    model, x = make().to(dtype), ids(1, 40)
    with torch.no_grad():
        whole = model(x).logits
        assert runs == []
        cache = model(x[:, :39], use_cache=True).past_key_values
        last = model(x[:, 39:], past_key_values=cache).logits
        assert runs == [0, 1]
    torch.testing.assert_close(last[:, 0].float(), whole[:, 39].float(), rtol=0, atol=0.02 * whole.abs().max().item())


def test_gelu_in_place_is_exact_far_out():
    x = torch.tensor([-1e30, -40.0, -9.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 9.0, 40.0, 1e30]).repeat(100, 7)
    exact = x.double()  # 1 + tanh(u) would cancel to 0 at -9, in float64 too
    oracle = exact * torch.sigmoid(math.sqrt(8 / math.pi) * (exact + 0.044715 * exact**3))
    ours = cpu._gelu_(x.clone(), "tanh", x.new_empty(cpu.GELU_ROWS, x.shape[1]))
    torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-37)


def test_padding_runs_in_place_too(runs):
    model, x = make(), ids(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    with torch.no_grad():
        ours = model(x, attention_mask=mask).logits
        with use_backend("reference"):
            theirs = model(x, attention_mask=mask).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert runs == [0, 1]


@pytest.mark.parametrize("lengths", [(5, 1, 3), (1, 1), (130, 1), (3, 127), (3, 128), (100, 200), (130, 150, 20)])
def test_a_text_in_parts_is_the_text_at_once(lengths, runs):
    model, x = make(), ids(2, sum(lengths))
    with torch.no_grad():
        cache, ragged = model.transformer.new_cache(2), model.transformer.new_cache(2)
        ragged.seqlens = torch.zeros(2, dtype=torch.int64)
        for part in x.split(lengths, 1):
            ours = model.transformer(part, past_key_values=cache).last_hidden_state
            theirs = model.transformer(part, past_key_values=ragged).last_hidden_state
            assert cache.seqlens == ragged.seqlens[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours, model.transformer(x).last_hidden_state[:, -lengths[-1] :], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(cache.k, ragged.k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache.v, ragged.v, rtol=1e-4, atol=1e-4)
    assert runs == [0, 1] * (2 * len(lengths) + 1)


@pytest.mark.parametrize(
    "leave",
    [
        lambda model, x: model(x),  # autograd
        lambda model, x: torch.no_grad()(model.train())(x),
        lambda model, x: torch.no_grad()(model.double())(x),
        lambda model, x: torch.no_grad()(model)(x, output_attentions=True),
        lambda model, x: torch.no_grad()(model)(x, head_mask=torch.ones(H)),
        lambda model, x: torch.no_grad()(use_backend("reference")(model))(x),
        lambda model, x: torch.no_grad()(torch.autocast("cpu", torch.bfloat16)(model))(x),
    ],
)
def test_what_in_place_cannot_do_takes_the_ops(leave, runs):
    leave(make(), ids(1, 5))
    assert runs == []


@pytest.mark.parametrize(
    "name",
    ["attn", "attn.c_attn", "attn.c_proj", "mlp", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"],
)
@pytest.mark.parametrize("inference", [True, False])
def test_a_hook_on_any_part_sees_its_output_and_can_change_it(name, inference):
    model, x = make("OpenAIGPTModel"), ids(1, 5)
    part, seen = model.h[1].get_submodule(name), []
    before = model(x).last_hidden_state.detach()

    def hook(_, __, output):
        seen.append(1)
        return (output[0] * 1.5, output[1]) if isinstance(output, tuple) else output * 1.5

    part.register_forward_hook(hook)
    with torch.set_grad_enabled(not inference):
        after = model(x).last_hidden_state
    assert seen == [1]
    assert (after - before).abs().max() > 1e-2


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("inference", [True, False])
def test_a_layer_put_in_anothers_place_is_called(name, inference):
    model, x = make("OpenAIGPTModel"), ids(1, 5)
    layer = model.h[0].get_submodule(name)
    stand_in = Doubled(*layer.weight.shape[::-1])
    stand_in.load_state_dict(layer.state_dict())
    parent, _, child = name.rpartition(".")
    setattr(model.h[0].get_submodule(parent), child, stand_in)
    with torch.set_grad_enabled(not inference):
        swapped = model(x).last_hidden_state
    setattr(model.h[0].get_submodule(parent), child, layer)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(swapped, model(x).last_hidden_state, rtol=1e-4, atol=1e-4)


class LouderAttention(Attention):
    def attend(self, *args):
        a, probs = super().attend(*args)
        return 2 * a, probs


class LouderBlock(Block):
    def _add_and_normalize(self, *args):
        return 2 * super()._add_and_normalize(*args)


def give(**classes):
    """Makes parts of block 0 instances of other classes."""

    def change(model):
        for part, kind in classes.items():
            (model.h[0] if part == "block" else model.h[0].get_submodule(part)).__class__ = kind

    return change


def of_another_width(columns):
    def change(model):
        mlp = model.h[0].mlp
        mlp.c_fc, mlp.c_proj = Conv1D(columns, C), Conv1D(C, columns)
        for layer in (mlp.c_fc, mlp.c_proj):
            nn.init.normal_(layer.weight, std=0.3)

    return change


def without_biases(model):
    for layer in (model.h[0].attn.c_attn, model.h[0].mlp.c_fc, model.h[0].mlp.c_proj):
        layer.bias = None


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.h[0].attn, "n_head", 2),
        lambda model: setattr(model.h[0].mlp, "afn", "gelu_erf"),
        lambda model: setattr(model.h[0].mlp, "afn", "relu"),
        lambda model: setattr(model.config, "afn", "gelu_erf"),  # too late: the layers were made of the first
        lambda model: model.h[0].ln_1.double(),
        lambda model: setattr(model.h[0], "ln_2", nn.LayerNorm(C, elementwise_affine=False)),
        give(attn=LouderAttention),
        give(block=LouderBlock),
        of_another_width(3 * C),
        of_another_width(5 * C),
        without_biases,
    ],
)
@pytest.mark.parametrize("T", [5, 70])
def test_a_block_unlike_the_config_computes_without_autograd_what_it_does_with_it(change, T):
    model, x = make("OpenAIGPTModel"), ids(2, T)
    change(model)
    expected = model(x).last_hidden_state.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


PARTS = ["tokens_embed", "positions_embed"] + [
    f"h.0.{name}" for name in ("attn", "attn.c_attn", "attn.c_proj", "mlp", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
]


def test_what_a_hook_keeps_stays_as_it_was():
    """The same tensors, in the same shapes, with and without autograd: nothing behind writes to them."""
    model, x, kept = make("OpenAIGPTModel"), ids(2, 5), []

    def keep(_, inputs, output):
        kept.append((inputs[0].detach(), (output[0] if isinstance(output, tuple) else output).detach()))

    for name in PARTS:
        model.get_submodule(name).register_forward_hook(keep)
    model(x)
    with torch.no_grad():
        model(x)
    assert len(kept) == 2 * len(PARTS)
    for ours, theirs in zip(kept[len(PARTS) :], kept, strict=False):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("inference", [True, False])
def test_a_forward_that_is_set_on_a_part_is_called(name, inference):
    """As accelerate does it."""
    model, x, calls = make("OpenAIGPTModel"), ids(1, 5), []
    part = model.get_submodule(name)
    forward = part.forward
    part.forward = lambda *args: calls.append(1) or forward(*args)
    with torch.set_grad_enabled(not inference):
        model(x)
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # ids have no gradient
@pytest.mark.parametrize("name", [*PARTS, "lm_head"])
def test_a_backward_hook_on_any_part_is_called(name):
    model, x, calls = make(), ids(1, 5), []
    part = model.lm_head if name == "lm_head" else model.transformer.get_submodule(name)
    part.register_full_backward_hook(lambda *_: calls.append(1))
    model(x, labels=x).loss.backward()
    assert calls == [1]


@pytest.mark.parametrize("inference", [True, False])
def test_a_hook_on_every_module_is_called_for_every_module(inference):
    model, x, called = make("OpenAIGPTModel"), ids(1, 5), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        with torch.set_grad_enabled(not inference):
            model(x)
    finally:
        handle.remove()
    assert set(called) == {module for module in model.modules() if module is not model.h}


def test_hooks_on_the_tables_change_the_embeddings():
    model, x = make("OpenAIGPTModel"), ids(2, 5)
    types = x.flip(0)
    embeds = 3 * (model.tokens_embed(x) + model.tokens_embed(types)) + 2 * model.positions_embed.weight[:5]
    expected = model(inputs_embeds=embeds - model.positions_embed.weight[:5]).last_hidden_state
    model.tokens_embed.register_forward_hook(lambda _, __, output: 3 * output)
    model.positions_embed.register_forward_hook(lambda _, __, output: 2 * output)
    torch.testing.assert_close(model(x, token_type_ids=types).last_hidden_state, expected)


def test_what_a_table_does_with_its_rows_is_done():
    model, x = make("OpenAIGPTModel"), ids(2, 5)
    table = nn.Embedding(V, C, max_norm=0.1, padding_idx=int(x[0, 0]))
    model.set_input_embeddings(table)
    output = model(x).last_hidden_state
    assert table.weight[x].norm(dim=-1).max() < 0.11
    torch.testing.assert_close(output, model(inputs_embeds=table(x)).last_hidden_state)
    output.sum().backward()
    assert not table.weight.grad[x[0, 0]].any()


def test_embeddings_of_any_strides():
    model = make("OpenAIGPTModel")
    embeds = torch.randn(5, 2, C).transpose(0, 1)
    with torch.no_grad():
        ours, expected = model(inputs_embeds=embeds), model(inputs_embeds=embeds.contiguous())
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's attention, under vmap
def test_an_ensemble_under_vmap():
    models, x = [make("OpenAIGPTModel"), make("OpenAIGPTModel")], ids(2, 5)
    with torch.no_grad():
        models[1].h[0].mlp.c_fc.weight.mul_(1.1)
        stacked = torch.func.stack_module_state(models)

        def run(parameters, buffers):
            return torch.func.functional_call(models[0], (parameters, buffers), (x,)).last_hidden_state

        both = torch.func.vmap(run)(*stacked)
        for ours, model in zip(both, models, strict=True):
            torch.testing.assert_close(ours, model(x).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("part", "rate"), [("h.0", "resid_pdrop"), ("h.1.attn", "attn_pdrop")])
def test_a_part_in_training_mode_drops(part, rate):
    model, x = make("OpenAIGPTModel", **{"resid_pdrop": 0.0, "attn_pdrop": 0.0, rate: 0.5}), ids(1, 5)
    model.get_submodule(part).train()
    with torch.no_grad():
        assert not torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)


def test_results_outlive_the_next_forward_pass():
    model = make()
    with torch.no_grad():
        first = model(ids(2, 130), output_hidden_states=True)
        kept = [x.clone() for x in (first.logits, *first.hidden_states)]
        model(ids(2, 130).flip(0))
    assert all(torch.equal(a, b) for a, b in zip(kept, (first.logits, *first.hidden_states), strict=True))


# ---- int8 weights ----


COLUMNS = (32, 384, 503)  # of a weight: one block, blocks that fill up, a last one that does not


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [0, 1, INT8_ROWS, INT8_ROWS + 1, 40])
def test_int8_linear_is_within_its_rounding(rows, columns):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(64, columns), torch.randn(columns), torch.randn(rows, 64)
    weight[3] = 0
    layer = Int8Linear(weight, bias)
    spread = (weight.amax(1) - weight.amin(1)).max()
    assert 0 < (layer.dequantized().t() - weight).abs().max() <= spread / 255 * 0.51
    exact = nn.functional.linear(x.double(), layer.dequantized().double(), bias.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_row_of_an_int8_batch_is_that_row_alone(columns):
    layer, x = Int8Linear(torch.randn(64, columns), torch.randn(columns)), torch.randn(INT8_ROWS, 64)
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


def test_an_int8_linear_that_was_traced_computes_the_same_afterwards():
    layer, x = Int8Linear(torch.randn(67, 500), None), torch.randn(3, 67)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
    traced = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert torch.equal(layer(x), traced)


@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 40, CHUNK + 3])
def test_blocked_linear_into_and_onto(kind, columns, has_bias, rows):
    torch.manual_seed(0)
    bias, x = torch.randn(columns) if has_bias else None, torch.randn(rows, 64)
    layer, held = kind(torch.randn(64, columns), bias), torch.randn(rows, columns)
    weight = layer.dequantized().t() if kind is Int8Linear else layer.unpacked()
    exact = x.double() @ weight.double() + (bias.double() if has_bias else 0)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)
    with torch.no_grad():
        close(layer(x.view(1, rows, 64))[0].double(), exact)
        assert layer(x).is_contiguous()
        out = torch.full_like(held, torch.nan)
        assert layer.into(x, out) is out
        close(out.double(), exact)
        out = held.clone()
        assert layer.onto(x, out) is out
        close(out.double(), exact + held)


@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_gradient_flows_through_a_blocked_linear(kind, rows):
    layer, x = kind(torch.randn(64, 500), torch.randn(500)), torch.randn(rows, 64, requires_grad=True)
    layer(x).sum().backward()
    weight = layer.dequantized().t() if kind is Int8Linear else layer.unpacked()
    torch.testing.assert_close(x.grad, weight.sum(1).expand(rows, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_tangent_flows_through_an_int8_linear(rows):
    layer, x = Int8Linear(torch.randn(64, 500), torch.randn(500)), torch.randn(rows, 64)
    tangent = torch.func.jvp(layer, (x,), (x.flip(1),))[1]
    torch.testing.assert_close(tangent, x.flip(1) @ layer.dequantized().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [gptfast.pack, gptfast.quantize])
@pytest.mark.parametrize("inference", [True, False])
def test_blocked_weights_under_autocast(change, inference):
    model, x = change(make()), ids(2, 12)
    with torch.set_grad_enabled(not inference), torch.autocast("cpu", torch.bfloat16):
        whole = model(x).logits
        cache = model(x[:, :11], use_cache=True).past_key_values
        last = model(x[:, 11:], past_key_values=cache).logits
    assert whole.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(last[:, 0].float(), whole[:, 11].float(), rtol=0, atol=0.05 * whole.abs().max().item())


@pytest.mark.parametrize("change", [lambda model: model.bfloat16(), gptfast.pack, gptfast.quantize])
def test_a_default_device_does_not_say_where_a_cpu_computes(change):
    model, other = make(), change(make())
    _by_blocks.cache_clear()
    with torch.no_grad(), torch.device("meta"):
        change(model)
        for shape in ((1, 1), (2, 1), (2, 40)):
            x = ids(*shape)
            ours = model(x).logits
            with torch.device("cpu"):
                assert torch.equal(ours, other(x).logits)


def test_a_quantized_model_has_a_loss():
    model, x = gptfast.quantize(make()), ids(2, 7)
    output = model(x, labels=x)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="labels contains 53"):
        model(x, labels=torch.full_like(x, V))


# ---- packed weights ----


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 40), (2, 130)])
def test_packed_model_computes_the_same(shape):
    model, x = make(), ids(*shape)
    with torch.no_grad():
        before = model(x, output_hidden_states=True)
        steps = model.generate(x[:, :4], max_new_tokens=12, do_sample=False)
        assert gptfast.pack(model) is model
        assert not any(isinstance(m, Conv1D) for m in model.modules())
        after = model(x, output_hidden_states=True)
        for a, b in zip((after.logits, *after.hidden_states), (before.logits, *before.hidden_states), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(model.generate(x[:, :4], max_new_tokens=12, do_sample=False), steps)
    model.train()  # the path with autograd
    model(x).logits.square().sum().backward()
    assert model.transformer.tokens_embed.weight.grad.abs().sum() > 0


def test_packed_model_saves_and_loads_what_a_plain_one_does(tmp_path):
    model, other = make(), make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gptfast.pack(model).save_pretrained(tmp_path)
    packed = model.state_dict()
    assert list(packed) == list(state)
    assert all(torch.equal(packed[name], state[name]) for name in state)
    loaded = gptfast.OpenAIGPTLMHeadModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), state.values(), strict=True))
    for value in state.values():
        value.mul_(0.5)
    model.load_state_dict(state)
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(ids(1, 9)).logits, other(ids(1, 9)).logits)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(3, 5)})


@pytest.mark.parametrize("columns", [1, 383, 385, 510, 769, 2304])
def test_blocks_hold_little_but_the_weight(columns):
    packed, int8 = (kind(torch.randn(8, columns), None).weight for kind in (PackedLinear, Int8Linear))
    assert packed.numel() <= 1.01 * 8 * columns
    assert int8.numel() <= 1.02 * 8 * (columns + 8 * math.ceil(columns / Int8Linear.COLUMNS))


@pytest.mark.parametrize("change", [gptfast.pack, gptfast.quantize])
def test_what_is_no_model_is_refused_by_name(change):
    with pytest.raises(TypeError, match="model must be one of gptfast's GPT-1 classes, got NoneType"):
        change(None)
    with pytest.raises(ValueError, match="model must be one of gptfast's GPT-1 classes, got Linear"):
        change(nn.Linear(3, 3).eval())


def test_pack_refuses_and_then_changes_nothing():
    with pytest.raises(ValueError, match="eval mode"):
        gptfast.pack(make().train())
    with pytest.raises(ValueError, match=r"torch\.float32, got torch\.bfloat16"):
        gptfast.pack(make().bfloat16())
    with pytest.raises(ValueError, match="on cpu, got meta"):
        gptfast.pack(make().to("meta"))
    for first, adjective in ((gptfast.pack, "packed"), (gptfast.quantize, "int8")):
        for second in (gptfast.pack, gptfast.quantize):
            with pytest.raises(ValueError, match=f"model has {adjective} weights already"):
                second(first(make()))


def test_quantized_model_predicts_nearly_as_before_and_decodes():
    model, x = make(), ids(2, 40)
    with torch.no_grad():
        before = model(x).logits.log_softmax(-1)
        size = sum(p.numel() * p.element_size() for p in model.transformer.h.parameters())
        assert gptfast.quantize(model) is model
        assert sum(p.numel() * p.element_size() for p in model.transformer.h.parameters()) < 0.35 * size
        after = model(x).logits.log_softmax(-1)
        assert 0 < (before.exp() * (before - after)).sum(-1).mean() < 0.02  # nats
        steps = model.generate(x[:, :4], max_new_tokens=12)
    assert steps.shape == (2, 16)
    assert not any(isinstance(m, Conv1D) for m in model.modules())


@pytest.mark.parametrize("change", [gptfast.pack, gptfast.quantize])
def test_parameters_are_counted_as_before(change):
    model = make(tie_word_embeddings=False)
    count = model.num_parameters()
    assert change(model).num_parameters() == count


def test_quantize_refuses_and_then_changes_nothing(tmp_path):
    broken = make()
    broken.transformer.h[1].mlp.c_fc.weight.data[3, 5] = torch.inf
    with pytest.raises(ValueError, match="weight of c_fc of a MLP must be finite, got inf or NaN"):
        gptfast.quantize(broken)
    assert isinstance(broken.transformer.h[0].mlp.c_fc, Conv1D)
    model = make().train()
    with pytest.raises(ValueError, match="eval mode"):
        gptfast.quantize(model)
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    gptfast.quantize(model.eval())
    with pytest.raises(ValueError, match="already"):
        gptfast.quantize(model)
    with pytest.raises(ValueError, match="save it before"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="on cpu, got meta"):
        gptfast.quantize(make().to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_quantized_model_in_another_dtype(dtype):
    model, x = gptfast.quantize(make()), ids(1, 5)
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(
            model.to(dtype)(x).logits.float(), expected, rtol=0, atol=0.02 * expected.abs().max()
        )


def test_quantize_drops_nobodys_layer_or_hook():
    model = make()
    model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="c_fc of a MLP must be as it was built, got a Conv1D that has hooks"):
        gptfast.quantize(model)
    model = make()
    model.transformer.h[1].mlp.c_fc = Doubled(4 * C, C)
    with pytest.raises(ValueError, match="got a Doubled"):
        gptfast.quantize(model)
    assert not any(isinstance(m, Int8Linear) for m in model.modules())
    with pytest.raises(ValueError, match="must be one of gptfast's GPT-1 classes, got Linear"):
        gptfast.quantize(nn.Linear(3, 3).eval())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.tie_weights(),
        lambda model: model.resize_token_embeddings(V + 1),
        lambda model: model.set_input_embeddings(nn.Embedding(V, C)),
    ],
)
def test_the_token_table_of_a_quantized_model_stays(change):
    model, x = gptfast.quantize(make()), ids(1, 5)
    with torch.no_grad():
        before = model(x).logits
        with pytest.raises(ValueError, match="the LM head has int8 weights"):
            change(model)
        assert torch.equal(model(x).logits, before)


# ---- logits beside a loss ----


@pytest.mark.parametrize("kind", ["OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel"])
def test_logits_beside_a_loss_are_computed_when_read(kind):
    model, x = make(kind), ids(2, 3, 7) if "Double" in kind else ids(2, 7)
    output = model(x, labels=x)
    loss = output[0] if "Double" not in kind else output["loss"]
    assert list(output.keys())[:2] == ["loss", "logits"]
    assert len(output) == len(list(output))
    assert isinstance(output.__dict__["logits"], DeferredLogits)  # nothing above read them
    expected = model(x).logits
    torch.testing.assert_close(output.logits, expected)
    assert output.logits is output["logits"] is output.logits
    assert output.logits.requires_grad
    torch.testing.assert_close(
        loss, nn.functional.cross_entropy(expected[..., :-1, :].flatten(0, -2), x[..., 1:].flatten())
    )


def test_gradients_flow_through_deferred_logits():
    model, x = make(), ids(2, 7)
    output = model(x, labels=x)
    (output.loss + output.logits.square().mean()).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(x).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    (loss + logits.square().mean()).backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_deferred_logits_are_read_as_they_would_have_been_made(mode):
    model, x = make(), ids(2, 7)
    with mode():
        output = model(x, labels=x)
    assert not output.logits.requires_grad
    assert output.logits.is_inference() == (mode is torch.inference_mode)


def test_deferred_logits_after_the_weights_changed_are_an_error():
    model, x = make(), ids(2, 7)
    read, unread = model(x, labels=x), model(x, labels=x)
    logits = read.logits
    torch.optim.SGD(model.parameters(), 0.1).step()
    (read.loss + unread.loss).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert read.logits is logits
    with pytest.raises(RuntimeError, match=r"read output\.logits before"):
        unread.logits  # noqa: B018


def by_fused_adam(model, output):
    output.loss.backward()
    torch.optim.AdamW(model.parameters(), 1e-3, fused=True).step()


def by_data(model, output):
    model.lm_head.weight.data.mul_(1.01)


def by_another_dtype(model, output):
    model.bfloat16()


@pytest.mark.parametrize("change", [by_fused_adam, by_data, by_another_dtype])
def test_a_change_of_the_weights_that_pytorch_does_not_count_is_an_error_too(change):
    model, x = make(), ids(2, 7)
    output = model(x, labels=x)
    version = model.lm_head.weight._version
    change(model, output)
    assert model.lm_head.weight._version == version
    with pytest.raises(RuntimeError, match=r"read output\.logits before"):
        output.logits  # noqa: B018


def test_deferred_logits_after_the_hidden_state_changed_are_an_error():
    model, x = make(), ids(2, 7)
    with torch.no_grad():
        output = model(x, labels=x, output_hidden_states=True)
        output.hidden_states[-1].mul_(2)
        with pytest.raises(RuntimeError, match="last hidden state has changed"):
            output.logits  # noqa: B018


def test_deferred_logits_do_not_take_the_autocast_they_are_read_under():
    model, x = make(), ids(2, 7)
    output, expected = model(x, labels=x), model(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(output.logits, expected)


def test_deferred_logits_of_weights_that_are_nan_are_nan():
    model, x = make(), ids(2, 7)
    model.lm_head.weight.data.fill_(torch.nan)
    assert model(x, labels=x).logits.isnan().all()


def test_deferred_logits_under_torch_func():
    model, x = make(), ids(2, 7)

    def loss_and_logits(parameters):
        output = torch.func.functional_call(model, parameters, (x,), {"labels": x})
        return output.loss, output.logits

    with use_backend("reference"):
        _, logits = torch.func.grad(loss_and_logits, has_aux=True)(dict(model.named_parameters()))
    torch.testing.assert_close(logits, model(x).logits)


def test_copies_of_an_output_hold_tensors():
    model, x = make(), ids(2, 7)
    with torch.no_grad():
        output = model(x, labels=x)
        expected = model(x).logits
        for other in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
            assert torch.equal(other.logits, expected)
        _, logits = model(x, labels=x, return_dict=False)
    assert torch.equal(logits, expected)


def test_loss_holds_no_logits():
    """The largest tensor made in a forward pass with labels is smaller than the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.elements = max([self.elements, *(x.numel() for x in made)])
            return out

    config = gptfast.OpenAIGPTConfig(vocab_size=60_000, n_positions=P, n_embd=8, n_layer=1, n_head=1)
    model, x = gptfast.OpenAIGPTLMHeadModel(config).eval(), ids(8, P)
    with torch.no_grad(), Largest() as made:
        model(x, labels=x)
    assert made.elements < x.numel() * config.vocab_size / 4


# ---- explain ----


@pytest.mark.parametrize("change", [lambda model: model, gptfast.pack, gptfast.quantize])
@pytest.mark.parametrize("grad", [False, True])  # in place, and by the ops
def test_explain_names_the_ops_that_run(change, grad):
    model = change(make())
    with torch.set_grad_enabled(grad):
        ops = [row.op for row in gptfast.explain(model, ids(1, 5))]
    own = isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    assert ("linear_gelu" in ops, "gelu" in ops) == (own, not own)


def test_explain_strict_names_what_fell_back():
    model = make()
    with pytest.raises(RuntimeError, match=r"strict=True.*embedding on torch: .*; layer_norm on torch: "):
        gptfast.explain(model, ids(1, 5), strict=True)


def test_explain_tells_that_weights_with_gradients_take_the_formula():
    model = make().train()
    with _dispatch.record() as choices:
        model(ids(1, 5), output_attentions=True)
    assert "take the formula" in {c.op: c.reason for c in choices}["flash_attention"]
