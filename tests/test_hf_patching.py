"""transformers' own models with our ops patched in: the same numbers, and back again bit for bit."""

import copy
import json
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers >= 5")

import hf_patching  # noqa: E402

import gptfast  # noqa: E402
from gptfast import hf  # noqa: E402
from gptfast.hf import apply_gptfast, apply_gptfast_to_gpt2, apply_gptfast_to_openai_gpt  # noqa: E402
from gptfast_kernels.modules import GELU, LayerNorm  # noqa: E402

V = 61
SMALL = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def openai_gpt(kind="OpenAIGPTLMHeadModel", **settings):
    return build(getattr(transformers, kind), transformers.OpenAIGPTConfig(**SMALL, **settings))


def gpt2(kind="GPT2LMHeadModel", **settings):
    return build(getattr(transformers, kind), transformers.GPT2Config(**SMALL, **settings))


def build(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


MODELS = {
    "openai-gpt": (openai_gpt, apply_gptfast_to_openai_gpt),
    "gpt2": (gpt2, apply_gptfast_to_gpt2),
    "openai-gpt, generic": (openai_gpt, apply_gptfast),
    "gpt2, generic": (gpt2, apply_gptfast),
}


def ids(*shape, seed=0):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def state(model):
    """Everything about a model that a patch could leave behind."""
    modules = [(name, type(m), id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    return modules, [(k, id(p)) for k, p in model.named_parameters()], model.config._attn_implementation


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_same_numbers_and_back_bit_for_bit(name, padded):
    make, apply = MODELS[name]
    model = make()
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[1, slice(0, 4) if padded == "left" else slice(5, None)] = 0
    before, text = state(model), model(x, attention_mask=mask).logits
    patch = apply(model)
    with torch.no_grad():
        patched = model(x, attention_mask=mask).logits
    torch.testing.assert_close(patched[mask.bool()], text[mask.bool()], rtol=1e-4, atol=1e-4)
    assert type(model.transformer.h[0].ln_1) is LayerNorm
    assert patch.changed
    patch.revert()
    assert state(model) == before
    assert torch.equal(model(x, attention_mask=mask).logits, text)
    patch.revert()  # nothing is left to undo
    assert state(model) == before


def test_what_is_patched_is_told():
    patch = apply_gptfast_to_openai_gpt(openai_gpt())
    block = {"h.0.attn": "Attention", "h.0.mlp": "OpenAIGPTMLP", "h.0.ln_1": "LayerNorm", "h.0.mlp.act": "GELU"}
    for name, now in block.items():
        assert patch.changed[f"transformer.{name}"].endswith(f"-> {now}")
    assert not patch.left
    assert "transformer.h.1.ln_2: LayerNorm -> LayerNorm" in str(patch)


@pytest.mark.parametrize("part", ["attention", "layer_norm", "gelu"])
@pytest.mark.parametrize("name", ["openai-gpt", "gpt2"])
def test_parts(name, part):
    make, apply = MODELS[name]
    model = make()
    with torch.no_grad():
        expected = model(ids(2, 7)).logits
        patch = apply(model, **{p: p == part for p in ("attention", "layer_norm", "gelu")})
        torch.testing.assert_close(model(ids(2, 7)).logits, expected, rtol=1e-4, atol=1e-4)
    words = {
        "attention": ("Attention", "attn_implementation"),
        "layer_norm": ("LayerNorm", "Block"),
        "gelu": ("GELU", "MLP"),
    }
    assert patch.changed
    assert all(any(word in what for word in words[part]) for what in patch.changed.values())


@pytest.mark.parametrize("name", ["openai-gpt", "gpt2"])
def test_no_other_instance_is_touched(name):
    """Not even one with the same config object, nor by the activation that all OpenAI GPTs share."""
    make, apply = MODELS[name]
    model = make()
    other = type(model)(model.config).eval()
    before, text = state(other), other(ids(1, 5)).logits
    apply(model)
    assert state(other) == before
    assert torch.equal(other(ids(1, 5)).logits, text)
    assert state(make())[0][1:] != state(model)[0][1:]


@pytest.mark.parametrize("kind", ["OpenAIGPTModel", "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification"])
def test_other_heads(kind):
    model = openai_gpt(kind, pad_token_id=0)
    x = ids(2, 3, 7) if "Double" in kind else ids(2, 7)
    with torch.no_grad():
        expected = model(x)
        apply_gptfast_to_openai_gpt(model)
        for a, b in zip(model(x).to_tuple(), expected.to_tuple(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["openai-gpt", "gpt2"])
def test_generate_gradients_and_files(name, tmp_path):
    make, apply = MODELS[name]
    theirs, ours = make(), make()
    keys = list(ours.state_dict())
    apply(ours)
    assert list(ours.state_dict()) == keys
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    assert torch.equal(ours.generate(ids(2, 5), **how), theirs.generate(ids(2, 5), **how))
    for model in (ours, theirs):
        model(ids(2, 9), labels=ids(2, 9)).loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    ours.save_pretrained(tmp_path)
    assert "gptfast" not in (tmp_path / "config.json").read_text()
    again = type(ours).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids(1, 5)).logits, theirs(ids(1, 5)).logits)


def test_attention_weights_are_still_returned():
    theirs, ours = openai_gpt(), openai_gpt()
    apply_gptfast_to_openai_gpt(ours)
    a, b = (model(ids(2, 5), output_attentions=True).attentions for model in (ours, theirs))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_alone():
    model = openai_gpt(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    apply_gptfast_to_openai_gpt(model)
    assert torch.equal(model(ids(1, 8)).logits, model(ids(1, 8)).logits)
    model.train()
    assert not torch.equal(model(ids(1, 8)).logits, model(ids(1, 8)).logits)


@pytest.mark.parametrize("name", ["openai-gpt", "gpt2"])
def test_adapters_and_hooks_on_a_fused_projection_are_called(name):
    """What wraps c_fc must not be passed by, though c_fc's weight is read where nothing wraps it."""
    make, apply = MODELS[name]
    model = make()
    patch = apply(model)
    c_fc, x = model.transformer.h[0].mlp.c_fc, ids(1, 5)
    expected = model(x).logits
    calls = []
    handle = c_fc.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)
    assert calls
    handle.remove()

    class Doubled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 2 * self.base(x)

    model.transformer.h[0].mlp.c_fc = Doubled(c_fc)
    doubled = model(x).logits
    assert not torch.allclose(doubled, expected)
    patch.revert()
    torch.testing.assert_close(model(x).logits, doubled, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles(tmp_path):
    model = openai_gpt()
    apply_gptfast_to_openai_gpt(model)
    expected = model(ids(1, 5)).logits
    assert torch.equal(copy.deepcopy(model)(ids(1, 5)).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(ids(1, 5)).logits, expected)


def test_settings_made_while_patched_stay():
    model = gpt2()
    patch = apply_gptfast_to_gpt2(model)
    model.resize_token_embeddings(V + 3)
    patch.revert()
    assert model.config.vocab_size == V + 3 == len(model.transformer.wte.weight)
    assert model.config._attn_implementation == "sdpa"


# -- any model --------------------------------------------------------------------------------------------------


def check_generic(model, x):
    model.eval()
    with torch.no_grad():
        expected = model(x)[0]
        patch = apply_gptfast(model)
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-4)
        patched = copy.copy(patch)
        patch.revert()
        assert torch.equal(model(x)[0], expected)
    return patched


def test_bert():
    model = build(transformers.BertModel, transformers.BertConfig(**BERT))
    patch = check_generic(model, ids(2, 7))
    assert patch.changed["attention"] == "attn_implementation sdpa -> gptfast"
    assert patch.changed["encoder.layer.0.intermediate.intermediate_act_fn"] == "GELUActivation -> GELU"
    assert patch.changed["encoder.layer.1.output.LayerNorm"] == "LayerNorm -> LayerNorm"
    assert patch.left["pooler.activation"] == "Tanh is no GELU that is computed here"


def test_llama():
    config = transformers.LlamaConfig(**{**BERT, "num_key_value_heads": 2})
    patch = check_generic(build(transformers.LlamaForCausalLM, config), ids(2, 7))
    assert list(patch.changed) == ["attention"]
    assert patch.left["model.norm"] == "LlamaRMSNorm is no LayerNorm"
    assert "SiLU" in patch.left["model.layers.0.mlp.act_fn"]


def test_t5_attention_is_left():
    config = transformers.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    patch = apply_gptfast(transformers.T5EncoderModel(config))
    assert "attention" in patch.left


def test_gemma2_attention_is_left():
    config = transformers.Gemma2Config(**BERT, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=50.0)
    patch = check_generic(build(transformers.Gemma2ForCausalLM, config), ids(1, 5))
    assert patch.left["attention"] == "its scores are soft-capped"


def test_plain_torch():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, activation=torch.nn.GELU(), batch_first=True)
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm((4, 16)))
    patch = check_generic(model, torch.randn(2, 4, 16))
    assert set(patch.changed) == {"0.norm1", "0.norm2", "0.activation"}
    assert set(patch.left) == {"0.self_attn", "1", "attention"}


def test_subclasses_and_hooked_activations_are_left():
    class Odd(torch.nn.LayerNorm):
        pass

    act = torch.nn.GELU()
    act.register_forward_hook(lambda *_: None)
    patch = apply_gptfast(torch.nn.Sequential(Odd(8), act, torch.nn.GELU("tanh")))
    assert set(patch.changed) == {"2"}
    assert "subclass" in patch.left["0"]
    assert "hooks" in patch.left["1"]


def test_an_activation_in_two_places():
    act = torch.nn.GELU()
    model = torch.nn.Sequential(torch.nn.Sequential(act), torch.nn.Sequential(act))
    patch = apply_gptfast(model)
    assert type(model[0][0]) is type(model[1][0]) is GELU
    assert type(act) is torch.nn.GELU
    patch.revert()
    assert model[0][0] is model[1][0] is act


# -- errors -----------------------------------------------------------------------------------------------------


def test_the_wrong_model():
    with pytest.raises(TypeError, match="OpenAI GPT models, got GPT2LMHeadModel"):
        apply_gptfast_to_openai_gpt(gpt2())
    with pytest.raises(TypeError, match="GPT-2 models, got OpenAIGPTLMHeadModel"):
        apply_gptfast_to_gpt2(openai_gpt())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        apply_gptfast({})


@pytest.mark.parametrize("name", ["openai-gpt", "gpt2"])
def test_twice(name):
    make, apply = MODELS[name]
    model = make()
    apply(model)
    with pytest.raises(ValueError, match="patched already"):
        apply(model)


@pytest.mark.parametrize("package", [gptfast, hf])
def test_gptfasts_own_models_are_refused(package):
    """Another LayerNorm would only keep their blocks from fusing it."""
    model = package.OpenAIGPTLMHeadModel((gptfast if package is gptfast else transformers).OpenAIGPTConfig(**SMALL))
    with pytest.raises(ValueError, match="has gptfast's ops already"):
        apply_gptfast(torch.nn.Sequential(model))
    assert type(model.transformer.h[0].ln_1) is torch.nn.LayerNorm


def test_revert_refuses_where_something_else_came_after():
    model = openai_gpt()
    patch = apply_gptfast_to_openai_gpt(model)
    before = state(model)
    mlp = model.transformer.h[1].mlp
    ours = mlp.act
    mlp.act = torch.nn.ReLU()
    with pytest.raises(RuntimeError, match=r"transformer\.h\.1\.mlp\.act was replaced"):
        patch.revert()
    mlp.act = ours
    assert state(model) == before
    patch.revert()
    assert type(model.transformer.h[0]).__module__.startswith("transformers.")


# -- the benchmark ----------------------------------------------------------------------------------------------


def test_benchmark(monkeypatch, tmp_path):
    config = {**SMALL, "n_positions": 512, "n_layer": 1}
    kind = transformers.OpenAIGPTLMHeadModel
    monkeypatch.setattr(hf_patching, "models", lambda: [("tiny", kind, transformers.OpenAIGPTConfig(**config))])
    monkeypatch.setattr(hf_patching, "pin_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["hf_patching.py", "--rounds", "4", "--json", str(tmp_path / "report.json")])
    hf_patching.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert len({row["cell"] for row in report["rows"]}) == 5
    for row in report["rows"]:
        assert row["speedup"]["patched"] == row["median_ms"]["transformers"] / row["median_ms"]["patched"]
        slower = row["speedup"]["patched"] < 1 / hf_patching.SLOWER
        assert (f"tiny, {row['cell']}" in report["slower"]) == slower

    def wrong(model):
        model.transformer.h[0].ln_1.weight.data *= 1.1

    monkeypatch.setattr(hf_patching, "apply_gptfast", wrong)
    with pytest.raises(SystemExit, match="tiny, forward 1 x 32: patched is wrong"):
        hf_patching.main()
