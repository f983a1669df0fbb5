"""The models by themselves: configuration, weights, what they refuse, training, compilation, backends.

Against HuggingFace's: test_model_parity.py. Text and the key/value cache: test_generation.py.

Shapes: B batch, N choices, T positions, C width, V vocabulary, H heads.
"""

import copy
import functools
import io
import json
import math
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree

import gptfast
from gptfast.linear import Conv1D
from gptfast_kernels import _dispatch

BODY, LM = "OpenAIGPTModel", "OpenAIGPTLMHeadModel"
DOUBLE, CLASSIFIER = "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification"
KINDS = (BODY, LM, DOUBLE, CLASSIFIER)
V, P, C, H, L = 29, 16, 24, 3, 2
SMALL: dict[str, Any] = {"vocab_size": V, "n_positions": P, "n_embd": C, "n_layer": L, "n_head": H}
B, N, T = 2, 3, 7


def make(kind=LM, seed=0, **settings):
    """A model in eval mode whose weights are wide enough that attention is far from uniform."""
    model = getattr(gptfast, kind)(gptfast.OpenAIGPTConfig(**{**SMALL, "pad_token_id": 0, **settings})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            p.copy_(gain + 0.3 * torch.randn(p.shape, generator=generator))
    return model


def ids(*shape, seed=0, size=V):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def example(kind, labels=True):
    """Arguments that reach every weight of a model."""
    x: dict[str, Any] = {"input_ids": ids(B, N, T) if kind == DOUBLE else ids(B, T)}
    if kind == DOUBLE:
        x["mc_token_ids"] = torch.tensor([[0, 6, 3], [5, 5, 1]])
    if labels and kind in (LM, DOUBLE):
        x["labels"] = x["input_ids"].masked_fill(x["input_ids"] < 4, -100)
    if labels and kind == DOUBLE:
        x["mc_labels"] = torch.tensor([2, 0])
    if labels and kind == CLASSIFIER:
        x["labels"] = torch.tensor([1, 0])
    return x


def loss_of(output):
    """A number that every output has a part in."""
    leaves = [x for x in _pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in leaves]
    return sum((x * w).sum() for x, w in zip(leaves, weights, strict=True))


def gradients(model, inputs):
    model.zero_grad()
    loss = loss_of(model(**inputs))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, tolerance=1e-5):
    """Within a part of the largest number of each tensor."""
    got, expected = _pytree.tree_leaves(got), _pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=tolerance * max(1.0, float(e.detach().abs().max())))


# ---- configuration ----


def test_config_takes_positional_arguments():
    c = gptfast.OpenAIGPTConfig(
        100, 64, 32, 3, 4, "relu", 0.2, 0.3, 0.4, 1e-6, 0.01, "mean", False, "tanh", False, 0.05
    )
    assert (c.vocab_size, c.n_positions, c.n_embd, c.n_layer, c.n_head, c.afn) == (100, 64, 32, 3, 4, "relu")
    assert (c.resid_pdrop, c.embd_pdrop, c.attn_pdrop) == (0.2, 0.3, 0.4)
    assert (c.layer_norm_epsilon, c.initializer_range) == (1e-6, 0.01)
    assert (c.summary_type, c.summary_use_proj, c.summary_activation) == ("mean", False, "tanh")
    assert (c.summary_proj_to_labels, c.summary_first_dropout) == (False, 0.05)


def test_config_aliases_work_both_ways():
    c = gptfast.OpenAIGPTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=9)
    assert (c.n_embd, c.n_layer, c.n_head, c.n_positions) == (32, 3, 4, 9)
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.max_position_embeddings) == (32, 3, 4, 9)
    c.hidden_size = 64
    assert c.n_embd == 64
    assert "hidden_size" not in c.to_dict()
    assert gptfast.OpenAIGPTConfig.from_dict(c.to_dict(), hidden_size=8).n_embd == 8


def test_config_keeps_what_it_does_not_know():
    published: dict[str, Any] = {"n_ctx": 512, "n_special": 0, "task_specific_params": {"a": {"b": 1}}}
    c = gptfast.OpenAIGPTConfig(**published)
    assert c.task_specific_params == {"a": {"b": 1}}
    assert gptfast.OpenAIGPTConfig.from_dict(c.to_dict()) == c
    with pytest.raises(AttributeError, match="n_inner"):
        _ = c.n_inner


def test_config_round_trips(tmp_path):
    c = gptfast.OpenAIGPTConfig(**SMALL, afn="silu", num_labels=3, problem_type="regression", eos_token_id=[1, 2])
    c.save_pretrained(tmp_path / "new" / "folder")
    read = gptfast.OpenAIGPTConfig.from_pretrained(tmp_path / "new" / "folder")
    assert read == c == pickle.loads(pickle.dumps(c)) == copy.deepcopy(c)
    assert gptfast.OpenAIGPTConfig.from_json_file(tmp_path / "new" / "folder" / "config.json") == c
    assert json.loads((tmp_path / "new" / "folder" / "config.json").read_text())["model_type"] == "openai-gpt"
    changed = gptfast.OpenAIGPTConfig.from_pretrained(tmp_path / "new" / "folder", num_labels=5, n_layer=1)
    assert (changed.num_labels, changed.n_layer, changed.afn) == (5, 1, "silu")
    assert "vocab_size" in repr(c)
    assert c != "a config"


@pytest.mark.parametrize("text", ["", "[1]", '{"model_type": "gpt2"}', "\xff", '{"n_embd": "24"}', '{"id2label": [1]}'])
def test_a_damaged_config_file_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        gptfast.OpenAIGPTConfig.from_pretrained(tmp_path)


def test_config_labels():
    c = gptfast.OpenAIGPTConfig()
    assert (c.num_labels, c.id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
    c.num_labels = 3
    assert c.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = gptfast.OpenAIGPTConfig(id2label={"0": "no", "1": "yes"})
    assert (named.num_labels, named.id2label[1], named.label2id["yes"]) == (2, "yes", 1)
    named.num_labels = 2
    assert named.id2label[1] == "yes"
    assert gptfast.OpenAIGPTConfig.from_dict(named.to_dict()) == named
    more = gptfast.OpenAIGPTConfig.from_dict(named.to_dict(), num_labels=3)
    assert more.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_config_with_a_dtype_is_saved(tmp_path):
    gptfast.OpenAIGPTConfig(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert gptfast.OpenAIGPTConfig.from_pretrained(tmp_path).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"vocab_size": "x"}, TypeError, "vocab_size must be an int, got 'x'"),
        ({"n_layer": 2.0}, TypeError, "n_layer must be an int, got 2.0"),
        ({"n_head": True}, TypeError, "n_head must be an int, got True"),
        ({"hidden_size": 0}, ValueError, "n_embd must be positive, got 0"),
        ({"n_positions": -1}, ValueError, "n_positions must be positive, got -1"),
        ({"resid_pdrop": 1.5}, ValueError, r"resid_pdrop must be in \[0, 1\), got 1.5"),
        ({"attn_pdrop": float("nan")}, ValueError, r"attn_pdrop must be in \[0, 1\), got nan"),
        ({"embd_pdrop": "0.1"}, TypeError, "embd_pdrop must be a number, got '0.1'"),
        ({"layer_norm_epsilon": None}, TypeError, "layer_norm_epsilon must be a number, got None"),
        ({"initializer_range": -0.1}, ValueError, "initializer_range must be at least 0, got -0.1"),
        ({"id2label": ["no", "yes"]}, TypeError, "id2label must be a dict from numbers to names"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        gptfast.OpenAIGPTConfig(**settings)


def test_settings_that_a_model_refuses():
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head, got 24 and 5"):
        make(n_head=5)
    with pytest.raises(KeyError, match="afn must be one of gelu, gelu_new, gelu_erf, relu, silu, swish, got 'tanh'"):
        make(afn="tanh")
    with pytest.raises(KeyError, match="summary_activation must be one of gelu, "):
        make(DOUBLE, summary_activation="what")
    with pytest.raises(TypeError, match="config must be an OpenAIGPTConfig, got dict"):
        gptfast.OpenAIGPTModel({"n_layer": 1})  # type: ignore[arg-type]


def test_forms_of_gelu():
    x = ids(B, T)
    with torch.no_grad():
        tanh, new, erf = (make(BODY, afn=afn)(x)[0] for afn in ("gelu", "gelu_new", "gelu_erf"))
    assert torch.equal(tanh, new)
    assert 1e-5 < (tanh - erf).abs().max() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_config_is_never_changed(kind):
    config = gptfast.OpenAIGPTConfig(**SMALL, pad_token_id=0)
    before = config.copy()
    model = getattr(gptfast, kind)(config)
    model(**example(kind))
    model.resize_token_embeddings(V + 3)
    model.config.n_special = 1
    assert config == before
    assert model.config.vocab_size == model.base_model.config.vocab_size == V + 3
    assert model.config is model.base_model.config


# ---- weights ----


def expected_shapes(prefix=""):
    shapes: dict[str, tuple[int, ...]] = {"tokens_embed.weight": (V, C), "positions_embed.weight": (P, C)}
    for i in range(L):
        for name, rows, columns in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, 4 * C),
            ("mlp.c_proj", 4 * C, C),
        ):
            shapes |= {f"h.{i}.{name}.weight": (rows, columns), f"h.{i}.{name}.bias": (columns,)}
        shapes |= {f"h.{i}.ln_{k}.{part}": (C,) for k in (1, 2) for part in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


HEADS = {
    BODY: {},
    LM: {"lm_head.weight": (V, C)},
    DOUBLE: {
        "lm_head.weight": (V, C),
        "multiple_choice_head.summary.weight": (1, C),
        "multiple_choice_head.summary.bias": (1,),
    },
    CLASSIFIER: {"score.weight": (4, C)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind):
    model = make(kind, num_labels=4)
    expected = expected_shapes("" if kind == BODY else "transformer.") | HEADS[kind]
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == expected
    assert not list(model.buffers())


def test_number_of_parameters():
    """The published size. On the meta device: nothing is allocated."""
    config = gptfast.OpenAIGPTConfig()
    with torch.device("meta"):
        sizes = [getattr(gptfast, kind)(config).num_parameters() for kind in KINDS]
        untied = gptfast.OpenAIGPTLMHeadModel(gptfast.OpenAIGPTConfig(tie_word_embeddings=False))
        frozen = gptfast.OpenAIGPTLMHeadModel(config)
    assert sizes == [116_534_784, 116_534_784, 116_534_784 + 769, 116_534_784 + 2 * 768]
    assert untied.num_parameters() == 116_534_784 + 40478 * 768
    frozen.transformer.tokens_embed.weight.requires_grad_(False)
    assert frozen.num_parameters(only_trainable=True) == 116_534_784 - 40478 * 768
    assert frozen.num_parameters(exclude_embeddings=True) == 116_534_784 - (40478 + 512) * 768


@pytest.mark.parametrize("std", [0.02, 0.3, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_initialisation(kind, std):
    torch.manual_seed(0)
    model = getattr(gptfast, kind)(gptfast.OpenAIGPTConfig(400, 300, 64, 2, 4, initializer_range=std))
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Linear, Conv1D)):
            seen += 1
            w = module.weight.detach()
            assert abs(float(w.std()) - std) <= 4 * std / math.sqrt(2 * w.numel()), name
            assert abs(float(w.mean())) <= 5 * std / math.sqrt(w.numel()), name
            bias = getattr(module, "bias", None)
            assert bias is None or not bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            assert module.eps == 1e-5
    assert seen == 2 + 2 * 4 + {BODY: 0, LM: 1, DOUBLE: 2, CLASSIFIER: 1}[kind]


def assert_tied(model):
    assert model.lm_head.weight is model.transformer.tokens_embed.weight
    assert model.lm_head.out_features == model.lm_head.weight.shape[0]


@pytest.mark.parametrize("kind", [LM, DOUBLE])
def test_tied_weights_stay_tied(kind):
    model = make(kind)
    assert_tied(model)
    model.load_state_dict(make(kind, seed=1).state_dict())
    assert_tied(model)
    assert_tied(copy.deepcopy(model))
    assert_tied(pickle.loads(pickle.dumps(model)))
    assert_tied(model.to(torch.float64).half().float())
    model.set_input_embeddings(nn.Embedding(V, C))
    assert_tied(model)
    model.resize_token_embeddings(V + 2)
    assert_tied(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (model.transformer.tokens_embed.weight == 0).all()


def test_untied_weights_stay_apart():
    model = make(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.transformer.tokens_embed.weight
    assert not torch.equal(model.lm_head.weight, model.transformer.tokens_embed.weight)
    model.tie_weights()
    model.resize_token_embeddings(V + 1)
    assert model.lm_head.weight is not model.transformer.tokens_embed.weight
    assert model.lm_head.weight.shape == (V + 1, C)


def test_a_whole_model_is_saved_and_loaded_by_torch():
    model, buffer = make(), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert torch.equal(model(ids(B, T)).logits, read(ids(B, T)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_parts(kind):
    model = make(kind)
    assert model.base_model is (model if kind == BODY else model.transformer)
    assert model.get_input_embeddings() is model.base_model.tokens_embed
    assert model.get_output_embeddings() is getattr(model, "lm_head", None)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert model.double().dtype == torch.float64
    if kind in (LM, DOUBLE):
        head = nn.Linear(C, V, bias=False)
        model.set_output_embeddings(head)
        assert model.lm_head is head


# ---- a vocabulary of another size ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", [V - 5, V + 5])
def test_resize(kind, tie, size):
    model = make(kind, tie_word_embeddings=tie)
    before = copy.deepcopy(model)
    table = model.resize_token_embeddings(size)
    assert table is model.get_input_embeddings()
    assert model.config.vocab_size == table.num_embeddings == size
    kept = min(V, size)
    assert torch.equal(table.weight[:kept], before.get_input_embeddings().weight[:kept])
    if kind in (LM, DOUBLE):
        assert torch.equal(model.lm_head.weight[:kept], before.lm_head.weight[:kept])
        assert (model.lm_head.weight is table.weight) == tie
        assert model(ids(B, T, size=kept)).logits.shape == (B, T, size)
    model(torch.full((1, 2), size - 1))
    with pytest.raises(ValueError, match=f"input_ids contains {size}, accepted are 0 to {size - 1}"):
        model(torch.full((1, 2), size))


def test_new_rows():
    torch.manual_seed(0)
    model = make()
    old = model.transformer.tokens_embed.weight.detach().clone()
    model.resize_token_embeddings(V + 500)
    new = model.transformer.tokens_embed.weight.detach()[V:]
    assert (new - old.mean(0)).abs().max() < 1e-3  # the covariance is scaled by 1e-9
    assert new.std(0).max() > 0
    model = make(initializer_range=0.5)
    model.resize_token_embeddings(V + 500, mean_resizing=False)
    new = model.transformer.tokens_embed.weight.detach()[V:]
    assert abs(float(new.std()) - 0.5) < 0.02


def test_sizes_to_resize_to():
    model = make()
    assert model.resize_token_embeddings() is model.transformer.tokens_embed
    assert model.resize_token_embeddings(V) is model.transformer.tokens_embed
    assert model.resize_token_embeddings(pad_to_multiple_of=8).num_embeddings == 32
    assert model.resize_token_embeddings(33, pad_to_multiple_of=8).num_embeddings == 40
    with pytest.raises(ValueError, match="new_num_tokens must be positive, got 0"):
        model.resize_token_embeddings(0)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be positive, got -8"):
        model.resize_token_embeddings(40, pad_to_multiple_of=-8)
    frozen = make()
    frozen.requires_grad_(False)
    assert not frozen.resize_token_embeddings(V + 1).weight.requires_grad


# ---- what is refused, before any work ----

GOOD = ids(B, T)
EMBEDS = torch.zeros(B, T, C)
BAD_TEXT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "You have to specify either input_ids or inputs_embeds"),
    ({"input_ids": GOOD, "inputs_embeds": EMBEDS}, ValueError, "You cannot specify both input_ids and inputs_embeds"),
    ({"input_ids": GOOD.tolist()}, TypeError, "input_ids must be a tensor, got list"),
    ({"input_ids": GOOD.float()}, TypeError, "input_ids must be int32 or int64, got torch.float32"),
    ({"input_ids": GOOD.bool()}, TypeError, "input_ids must be int32 or int64, got torch.bool"),
    ({"input_ids": GOOD + V}, ValueError, f"input_ids contains .*, accepted are 0 to {V - 1}"),
    ({"input_ids": GOOD - V}, ValueError, f"input_ids contains -.*, accepted are 0 to {V - 1}"),
    ({"input_ids": GOOD[:0]}, ValueError, r"input_ids must hold at least one row .* \[0, 7\]"),
    ({"input_ids": GOOD[:, :0]}, ValueError, r"input_ids must hold at least one row .* \[2, 0\]"),
    ({"input_ids": ids(B, P + 1)}, ValueError, "input_ids has 17 positions, accepted are at most n_positions = 16"),
    (
        {"input_ids": ids(1, P + 1), "position_ids": torch.zeros(1, P + 1, dtype=torch.int64)},
        ValueError,
        "input_ids has 17 positions",
    ),
    ({"inputs_embeds": EMBEDS[..., :5]}, ValueError, r"inputs_embeds must be \[B, T, 24\], got shape \[2, 7, 5\]"),
    ({"inputs_embeds": EMBEDS[None]}, ValueError, r"inputs_embeds must be \[B, T, 24\], got shape \[1, 2, 7, 24\]"),
    ({"inputs_embeds": EMBEDS[:, :0]}, ValueError, r"inputs_embeds must hold at least one row .* \[2, 0\]"),
    ({"inputs_embeds": torch.zeros(1, P + 1, C)}, ValueError, "inputs_embeds has 17 positions"),
    ({"inputs_embeds": EMBEDS.long()}, TypeError, "inputs_embeds must be torch.float32 .*, got torch.int64"),
    ({"inputs_embeds": EMBEDS.double()}, TypeError, "inputs_embeds must be torch.float32 .*, got torch.float64"),
    ({"attention_mask": GOOD[:, :-1]}, ValueError, r"attention_mask must be \[2, 7\], got shape \[2, 6\]"),
    ({"attention_mask": GOOD.repeat(2, 1)}, ValueError, r"attention_mask must be \[2, 7\], got shape \[4, 7\]"),
    ({"attention_mask": GOOD[:, None]}, ValueError, r"attention_mask must be \[2, 7\], got shape \[2, 1, 7\]"),
    ({"attention_mask": GOOD[:, None, None]}, ValueError, r"attention_mask must be .*, got shape \[2, 1, 1, 7\]"),
    ({"attention_mask": [[1] * T] * B}, TypeError, "attention_mask must be a tensor, got list"),
    ({"token_type_ids": GOOD[:, 1:]}, ValueError, r"token_type_ids must be \[2, 7\] or \[7\], got shape \[2, 6\]"),
    ({"token_type_ids": GOOD + V}, ValueError, "token_type_ids contains .*, accepted are 0 to"),
    ({"token_type_ids": GOOD.float()}, TypeError, "token_type_ids must be int32 or int64, got torch.float32"),
    ({"position_ids": GOOD[:, 1:]}, ValueError, r"position_ids must be \[2, 7\], \[1, 7\] or \[7\], got .* \[2, 6\]"),
    ({"position_ids": GOOD.T}, ValueError, r"position_ids must be .*, got shape \[7, 2\]"),
    ({"position_ids": torch.arange(T) + P}, ValueError, "position_ids contains 22, accepted are 0 to 15"),
    ({"position_ids": torch.arange(T) - 1}, ValueError, "position_ids contains -1, accepted are 0 to 15"),
    ({"position_ids": torch.arange(T).float()}, TypeError, "position_ids must be int32 or int64, got torch.float32"),
    ({"head_mask": torch.ones(H + 1)}, ValueError, r"head_mask must be \[3\] or \[2, 3\], got shape \[4\]"),
    ({"head_mask": [1.0] * H}, TypeError, "head_mask must be a tensor, got list"),
    ({"head_mask": torch.ones(H, device="meta")}, ValueError, "head_mask must be on cpu as the other inputs are, got"),
    ({"attention_mask": GOOD.to("meta")}, ValueError, "attention_mask must be on cpu as the other inputs are, got"),
    ({"head_masks": None}, TypeError, "unexpected keyword argument 'head_masks'"),
]
BAD_LM: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_ids": torch.tensor(3)}, ValueError, r"input_ids must hold at least one row and one position, got \[\]"),
    ({"labels": GOOD[:, 1:]}, ValueError, r"labels must have shape \[2, 7\], got \[2, 6\]"),
    ({"labels": GOOD.flatten()}, ValueError, r"labels must have shape \[2, 7\], got \[14\]"),
    ({"labels": GOOD.int()}, TypeError, "labels must be int64, got torch.int32"),
    ({"labels": GOOD + V}, ValueError, f"labels contains .*, accepted are 0 to {V - 1} and -100"),
    ({"labels": GOOD - 50}, ValueError, "labels contains -.*, accepted are 0 to"),
    ({"labels": GOOD.tolist()}, TypeError, "labels must be a tensor, got list"),
    ({"shift_labels": GOOD[:1]}, ValueError, r"shift_labels must have shape \[2, 7\], got \[1, 7\]"),
    ({"labels": GOOD, "ignore_index": 3, "shift_labels": GOOD - 90}, ValueError, "accepted are 0 to 28 and 3"),
    ({"labels": GOOD, "logits_to_keep": 2}, ValueError, "logits_to_keep cannot go with labels"),
    ({"labels": GOOD, "logits_to_keep": torch.arange(3)}, ValueError, "logits_to_keep cannot go with labels"),
    ({"logits_to_keep": -1}, ValueError, "logits_to_keep must be at least 0, got -1"),
    ({"logits_to_keep": 2.0}, TypeError, "logits_to_keep must be a tensor, got float"),
    ({"logits_to_keep": torch.tensor(2)}, ValueError, r"logits_to_keep must be int \[K\] .*, got shape \[\]"),
    ({"logits_to_keep": torch.tensor([T])}, ValueError, "logits_to_keep contains 7, accepted are 0 to 6"),
    ({"logits_to_keep": torch.ones(B + 1, 2).long()}, ValueError, r"logits_to_keep .*, got shape \[3, 2\]"),
    ({"logits_to_keep": torch.ones(B, T - 1).bool()}, ValueError, r"logits_to_keep must be bool \[2, 7\] .* \[2, 6\]"),
    ({"logits_to_keep": torch.ones(3)}, TypeError, "logits_to_keep must be int32 or int64, got torch.float32"),
    ({"past_key_values": [1, 2]}, TypeError, "past_key_values must be a gptfast.KVCache, got list"),
]
CHOICES = ids(B, N, T)
BAD_DOUBLE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mc_token_ids": torch.full((B, N), T)}, ValueError, "mc_token_ids contains 7, accepted are 0 to 6"),
    ({"mc_token_ids": torch.full((B, N), -1)}, ValueError, "mc_token_ids contains -1, accepted are 0 to 6"),
    ({"mc_token_ids": torch.zeros(B, 4).long()}, ValueError, r"mc_token_ids must have shape \[2, 3\], got \[2, 4\]"),
    ({"mc_token_ids": torch.zeros(B, N).int()}, TypeError, "mc_token_ids must be int64, got torch.int32"),
    ({"mc_labels": torch.tensor([0, 3])}, ValueError, "mc_labels contains 3, accepted are 0 to 2 and -100"),
    ({"mc_labels": torch.tensor([0, 1, 2])}, ValueError, r"mc_labels must have shape \[2\], got \[3\]"),
    ({"mc_labels": torch.tensor([0.0, 1.0])}, TypeError, "mc_labels must be int64, got torch.float32"),
    ({"mc_labels": [0, 1]}, TypeError, "mc_labels must be a tensor, got list"),
    ({"labels": CHOICES[0]}, ValueError, r"labels must have shape \[2, 3, 7\], got \[3, 7\]"),
    ({"labels": CHOICES + V}, ValueError, "labels contains"),
    ({"attention_mask": GOOD}, ValueError, r"attention_mask must be \[6, 7\], got shape \[2, 7\]"),
    ({"use_cache": True}, TypeError, "unexpected keyword argument 'use_cache'"),
]
BAD_CLASSIFIER: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_ids": CHOICES}, ValueError, r"input_ids must be \[B, T\], got shape \[2, 3, 7\]"),
    ({"input_ids": GOOD[0]}, ValueError, r"input_ids must be \[B, T\], got shape \[7\]"),
    ({"labels": torch.tensor([0, 2])}, ValueError, "labels contains 2, accepted are 0 to 1 and -100"),
    ({"labels": torch.tensor([0, 1, 1])}, ValueError, r"labels must have shape \[2\], got \[3\]"),
    ({"labels": torch.tensor([0, 1]).int()}, TypeError, "labels must be int64, got torch.int32"),
    ({"labels": torch.tensor([0.0, 1.0])}, ValueError, r"labels must be \[2, 2\] for multi_label_classification"),
]


@functools.cache
def refuser(kind):
    return make(kind)


def assert_refused(kind, inputs, error, message):
    with _dispatch.record() as choices, pytest.raises(error, match=message):
        refuser(kind)(**inputs)
    assert choices == [], "work was done"


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_TEXT)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_text(kind, inputs, error, message):
    if "input_ids" not in inputs and "inputs_embeds" not in inputs and inputs:
        inputs = {"input_ids": GOOD, **inputs}
    assert_refused(kind, inputs, error, message)


@pytest.mark.parametrize(
    ("kind", "inputs", "error", "message"),
    [(LM, {"input_ids": GOOD} | x, e, m) for x, e, m in BAD_LM]
    + [(DOUBLE, {"input_ids": CHOICES} | x, e, m) for x, e, m in BAD_DOUBLE]
    + [(CLASSIFIER, {"input_ids": GOOD} | x, e, m) for x, e, m in BAD_CLASSIFIER],
)
def test_bad_arguments_of_the_heads(kind, inputs, error, message):
    assert_refused(kind, inputs, error, message)


@pytest.mark.parametrize(
    ("settings", "labels", "error", "message"),
    [
        ({"num_labels": 1}, torch.zeros(3), ValueError, r"labels must be \[2, 1\] for regression, got shape \[3\]"),
        ({"num_labels": 1}, torch.zeros(B).long(), TypeError, "labels must be floating point for regression"),
        ({"problem_type": "what"}, torch.zeros(B), ValueError, "problem_type must be regression, .*, got 'what'"),
        ({"pad_token_id": None}, None, ValueError, "Cannot handle batch sizes > 1 if no padding token is defined"),
    ],
)
def test_bad_labels_for_the_problem(settings, labels, error, message):
    model = make(CLASSIFIER, **settings)
    with _dispatch.record() as choices, pytest.raises(error, match=message):
        model(GOOD, labels=labels)
    assert choices == []
    assert model.config.problem_type == settings.get("problem_type")


def test_longest_text_is_accepted():
    assert make()(ids(1, P)).logits.shape == (1, P, V)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_not_read_back_where_that_would_wait_for_a_gpu(kind, monkeypatch):
    """The meta device stands for a GPU: it holds no values, so that reading one is an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # torch has no autocast for meta
    model, x = make(kind).to("meta"), {name: value.to("meta") for name, value in example(kind).items()}
    with pytest.raises(RuntimeError, match="meta"):
        bool(x["input_ids"].any())
    rows = x["input_ids"].view(-1, T)
    x |= {"attention_mask": rows > 3, "position_ids": rows, "token_type_ids": rows}
    assert model(**x)[0].is_meta


# ---- outputs ----


def test_outputs_are_read_by_name_by_number_and_as_a_tuple():
    output = make()(GOOD, labels=GOOD, output_hidden_states=True)
    assert list(output.keys()) == list(output) == ["loss", "logits", "hidden_states"]
    assert output["loss"] is output[0] is output.loss is output.to_tuple()[0] is output.get("loss")
    assert output[1:] == output.to_tuple()[1:]
    assert output[-1] is output.hidden_states
    assert len(output) == 3
    assert "attentions" not in output
    assert output.attentions is None
    assert output.get("attentions", 5) == 5
    assert {**output}.keys() == dict(output.items()).keys() == {"loss", "logits", "hidden_states"}
    with pytest.raises(KeyError, match="attentions"):
        output["attentions"]
    with pytest.raises(IndexError):
        output[3]


def test_printing_an_output_computes_nothing():
    output = make()(GOOD, labels=GOOD)
    assert repr(output) == f"CausalLMOutput(loss={output.loss!r}, logits=<computed when read>)"
    output = make()(GOOD)
    assert repr(output) == f"CausalLMOutput(logits={output.logits!r})"


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_copy_pickle_and_flatten(kind):
    with torch.no_grad():
        output = make(kind)(**example(kind), output_hidden_states=True)
    leaves, spec = _pytree.tree_flatten(output)
    for again in (copy.deepcopy(output), pickle.loads(pickle.dumps(output)), _pytree.tree_unflatten(leaves, spec)):
        assert type(again) is type(output)
        assert list(again) == list(output)
        assert_close(again, output, 0)
    doubled = _pytree.tree_map(lambda x: x * 2, output)
    assert torch.equal(doubled[0], output[0] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_attentions(kind):
    model = make(kind)
    x = example(kind)
    rows, shape = x["input_ids"].shape[:-1].numel(), x["input_ids"].shape
    output = model(**x, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(rows, T, C)] * L + [(*shape, C)]
    assert [tuple(a.shape) for a in output.attentions] == [(rows, H, T, T)] * L
    for a in output.attentions:
        torch.testing.assert_close(a.sum(-1), torch.ones(rows, H, T))
        assert (a.triu(1) == 0).all()
    assert_close(model(**x).to_tuple(), output.to_tuple()[:-2])
    embedded = model.base_model.tokens_embed(x["input_ids"]) + model.base_model.positions_embed.weight[:T]
    assert_close(output.hidden_states[0], embedded.view(rows, T, C))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_kept_on_hidden_states_and_attentions(kind):
    model = make(kind)
    for settings in ({}, {"head_mask": torch.tensor([0.5, 1.0, 2.0])}):
        output = model(**example(kind, labels=False), output_hidden_states=True, output_attentions=True, **settings)
        kept = [*output.hidden_states, *output.attentions]
        for x in kept:
            x.retain_grad()
        loss_of(output[0]).backward()
        assert all(x.grad is not None and x.grad.abs().max() > 0 for x in kept)


# ---- what transformers checks of every model ----


@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_deterministic_and_training_is_not(kind):
    model, x = make(kind), example(kind)
    assert_close(model(**x), model(**x), 0)
    assert_close(model.train().eval()(**x), model(**x), 0)
    model.train()
    torch.manual_seed(0)
    first, second = model(**x)[0], model(**x)[0]
    torch.manual_seed(0)
    again = model(**x)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_in_place_of_ids(kind):
    if kind == DOUBLE:
        x = {"input_ids": ids(B, T), "mc_token_ids": torch.tensor([2, 4])}
    else:
        x = {"input_ids": ids(1, T, seed=1) if kind == CLASSIFIER else ids(B, T)}
    model = make(kind, pad_token_id=None)
    embedded = model.get_input_embeddings()(x["input_ids"])
    by_embeds = {"inputs_embeds": embedded} | {k: v for k, v in x.items() if k != "input_ids"}
    for more in ({}, {"token_type_ids": ids(*x["input_ids"].shape, seed=2)}, {"position_ids": torch.arange(T) + 3}):
        assert_close(model(**x, **more), model(**by_embeds, **more))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_comes_out_as_it_would_alone(kind):
    model, x = make(kind), example(kind, labels=False)
    together = model(**x)
    for b in range(B):
        alone = model(**{k: v[b : b + 1] for k, v in x.items()})
        assert_close(alone[0], together[0][b : b + 1])


@pytest.mark.parametrize("kind", [LM, DOUBLE, CLASSIFIER])
def test_training_learns(kind):
    torch.manual_seed(0)
    model, x = getattr(gptfast, kind)(gptfast.OpenAIGPTConfig(**SMALL, pad_token_id=0)).train(), example(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        output = model(**x)
        loss = output.loss + output.mc_loss if kind == DOUBLE else output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


# ---- masks ----


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("weights", [False, True])
def test_what_padding_holds_never_reaches_real_rows(backend, weights):
    model = make(BODY)
    x, mask = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0)), torch.ones(B, T).long()
    mask[0, :3] = mask[1, 4:] = mask[1, 1] = 0
    poisoned = x.masked_fill(mask[..., None] == 0, float("nan"))
    settings = {"attention_mask": mask, "output_attentions": weights, "head_mask": torch.rand(H)}
    with gptfast.use_backend(backend), torch.no_grad():
        clean = model(inputs_embeds=x, **settings).last_hidden_state
        got = model(inputs_embeds=poisoned, **settings).last_hidden_state
    assert clean.isfinite().all()
    assert_close(got[mask == 1], clean[mask == 1])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("weights", [False, True])
def test_rows_that_see_nothing_are_finite_with_finite_gradients(backend, weights):
    model = make(BODY)
    mask = torch.ones(B, T).long()
    mask[0, :3] = 0
    mask[1] = 0
    with gptfast.use_backend(backend):
        output = model(GOOD, attention_mask=mask, output_attentions=weights)
        loss_of(output).backward()
        if weights:
            for a in output.attentions:
                assert (a[0, :, :3] == 0).all()
                assert (a[1] == 0).all()
    assert output.last_hidden_state.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_query_that_sees_nothing_attends_to_nothing():
    """Its row is what the block makes of an attention of zeros."""
    model = make(BODY, n_layer=1)
    block = model.h[0]
    x = model.tokens_embed(GOOD) + model.positions_embed.weight[:T]
    n = block.ln_1(x + block.attn.c_proj.bias)
    expected = block.ln_2(n + block.mlp(n))
    assert_close(model(GOOD, attention_mask=torch.zeros(B, T)).last_hidden_state, expected)


HEAD_MASKS = {
    "one row": torch.tensor([1.0, 0.0, 0.5]),
    "a row a layer": torch.tensor([[1.0, 0.0, 0.5], [2.0, 1.0, 0.0]]),
    "int": torch.tensor([1, 0, 1]),
}


@pytest.mark.parametrize("form", HEAD_MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_head_mask(kind, form):
    """Equals scaling each head's rows of c_proj.weight; and the weights returned are scaled."""
    head_mask = HEAD_MASKS[form]
    model, x = make(kind), example(kind, labels=False)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for layer, block in enumerate(scaled.base_model.h):
            factors = head_mask.expand(L, H)[layer]
            block.attn.c_proj.weight.mul_(factors.repeat_interleave(C // H)[:, None])
    expected = scaled(**x, output_attentions=True)
    assert_close(model(**x, head_mask=head_mask)[0], expected[0])
    output = model(**x, head_mask=head_mask, output_attentions=True)
    assert_close(output[0], expected[0])
    factors = head_mask.expand(L, H)[..., None, None]
    assert_close(output.attentions[0], expected.attentions[0] * factors[0])
    assert_close(
        gradients(model, x | {"head_mask": torch.ones(H)})[1], gradients(model, x)[1]
    )  # the unscaled sum is as without


# ---- dropout ----


def test_dropout_falls_on_embeddings_attention_weights_and_projections(monkeypatch):
    calls = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p:
            calls.append((p, tuple(x.shape)))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    rates: dict[str, Any] = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3, "summary_first_dropout": 0.4}
    block = [(0.2, (B * N, H, T, T)), (0.3, (B * N, T, C)), (0.3, (B * N, T, C))]
    with gptfast.use_backend("reference"):
        for inputs in ({"input_ids": ids(B, N, T)}, {"input_ids": ids(B, N, T), "output_attentions": True}):
            calls.clear()
            make(DOUBLE, **rates, summary_last_dropout=0.6).train()(**inputs)
            assert calls == [(0.1, (B * N, T, C)), *block * L, (0.4, (B, N, C)), (0.6, (B, N, 1))]
        calls.clear()
        make(BODY, **rates).train()(inputs_embeds=EMBEDS)
        assert calls[0] == (0.1, (B, T, C))
        assert len(calls) == 1 + 3 * L
        calls.clear()
        make(DOUBLE, **rates).eval()(ids(B, N, T))
        assert calls == []


@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_acts_on_the_torch_backend_and_keeps_the_mean(rate):
    """Averaged over many draws, the last layer's input to LayerNorm would be the undropped one; so nearly are rows."""
    settings = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = make(BODY, n_layer=1, **{**settings, rate: 0.1})
    x = ids(1, T).expand(4000, T)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(x[:1]).last_hidden_state[0]
        drawn = model.train()(x).last_hidden_state
    assert drawn.std(0).max() > 0.05
    assert (drawn.mean(0) - expected).abs().mean() < 0.1


# ---- gradient checkpointing ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [None, True])
def test_gradient_checkpointing_changes_nothing_but_the_work(kind, reentrant):
    model, x = make(kind).train(), example(kind)
    runs = []
    model.base_model.h[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(3)
    expected = gradients(model, x)
    assert len(runs) == 1
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    torch.manual_seed(3)
    assert_close(gradients(model, x), expected)
    assert len(runs) == 3
    model.eval()(**x)
    assert len(runs) == 4
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_with_everything_asked_for():
    model, x = make().train(), {"input_ids": GOOD, "output_hidden_states": True, "output_attentions": True}
    torch.manual_seed(3)
    expected = gradients(model, x)
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    assert_close(gradients(model, x), expected)
    with pytest.raises(ValueError, match="use_cache=True and past_key_values cannot go with gradient checkpointing"):
        model(GOOD, use_cache=True)


# ---- mixed precision ----


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model, x = make(kind), example(kind)
    exact = model(**x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**x, output_attentions=True, head_mask=torch.ones(H))
        plain = model(**x)
    loss_of(plain).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    for low in (plain, output):
        assert (low[0].float() - exact[0]).abs().max() < 0.2 * exact[0].abs().max().clamp(min=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = make().to(dtype)
    output = model(GOOD, attention_mask=(GOOD > 3), labels=GOOD, output_attentions=True, output_hidden_states=True)
    assert {x.dtype for x in (output.logits, *output.attentions, *output.hidden_states)} == {dtype}
    assert output.loss.dtype == torch.float32
    assert output.logits.isfinite().all()


# ---- compilation and export ----


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind):
    model, x = make(kind), example(kind)
    mask = torch.ones(x["input_ids"].shape[:-1].numel(), T)
    mask[0, -2:] = 0
    x |= {"attention_mask": mask, "output_hidden_states": True}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, mine = gradients(compiled, x)
    expected, other = gradients(model, x)
    assert_close([loss, *mine.values()], [expected, *other.values()])
    assert type(compiled(**x)) is type(model(**x))


def test_compiles_with_attentions_types_and_checkpointing():
    model = make().train()
    model.gradient_checkpointing_enable()
    x = {"input_ids": GOOD, "token_type_ids": GOOD, "output_attentions": True, "head_mask": torch.ones(H)}
    no_dropout(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, x)[0], gradients(model, x)[0])


def no_dropout(model):
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        setattr(model.config, name, 0.0)
    for module in model.modules():
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind):
    model, x = make(kind), example(kind, labels=False)
    program = torch.export.export(model, (), x)
    assert_close(program.module()(**x), model(**x))


# ---- backends ----


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_torch(kind):
    model, x = make(kind), example(kind)
    mask = torch.ones(x["input_ids"].shape[:-1].numel(), T)
    mask[0, :2] = mask[-1, -3:] = 0
    for more in ({}, {"attention_mask": mask}, {"head_mask": torch.tensor([0.5, 0.0, 1.0])}):
        with gptfast.use_backend("reference"):
            expected = gradients(model, x | more)
        with gptfast.use_backend("torch"):
            assert_close(gradients(model, x | more), expected)


def test_explain_names_every_op_once():
    model = make()
    rows = gptfast.explain(model, GOOD)
    ops = [row.op.removesuffix("_qkvpacked") for row in rows]
    assert ops == ["embedding", "flash_attention", "layer_norm", "linear_gelu"]
    assert [row.calls for row in rows] == [1, L, 2 * L, L]
    assert all(row.backend == "torch" and row.reason for row in rows)
    assert [row.op in str(rows) for row in rows] == [True] * 4
    assert len(str(rows).splitlines()) == 5
    with gptfast.use_backend("reference"):
        rows = gptfast.explain(model, {"input_ids": GOOD, "attention_mask": GOOD > 3})
    assert {row.backend for row in rows} == {"reference"}
    assert all("backend='reference' was asked for" in row.reason for row in rows)
    rows = gptfast.explain(model.double(), GOOD)
    assert all(row.backend == "torch" and row.reason for row in rows)


def test_explain_shows_the_configs_of_kernels():
    assert "config" not in str(gptfast.explain(make(), GOOD))
    with gptfast.use_backend("triton"):
        rows = gptfast.explain(make(), GOOD)
    assert all(row.backend == "triton" and "warps=" in row.config and not row.reason for row in rows)
    header, *lines = str(rows).splitlines()
    assert header.split() == ["op", "calls", "backend", "config", "why", "not", "triton"]
    assert [row.config in line for row, line in zip(rows, lines, strict=True)] == [True] * 4


def test_explain_strict_takes_a_replay_for_no_fallback():
    def captured(ids):
        _dispatch._log.append(_dispatch.Choice("forward pass", how, "why"))
        return model(ids)

    model = make()
    with gptfast.use_backend("triton"):
        how = "CUDA graph"
        assert gptfast.explain(captured, GOOD, strict=True)[0].backend == "CUDA graph"
        how = "no CUDA graph"
        with pytest.raises(RuntimeError, match=r"strict=True.* on triton: forward pass on no CUDA graph: why$"):
            gptfast.explain(captured, GOOD, strict=True)


def test_attention_weights_with_gradients_are_the_formula_and_triton_asked_for_raises():
    model, x = make().train(), {"input_ids": GOOD, "output_attentions": True}
    reasons = {row.op: row.reason for row in gptfast.explain(model, x)}
    assert reasons["flash_attention"].startswith("attention weights with gradients or dropout")
    with gptfast.use_backend("triton"):
        with pytest.raises(RuntimeError, match="flash_attention: backend='triton' cannot run here: attention weights"):
            model(**x)
        with torch.no_grad():
            assert model.eval()(**x).attentions[0].shape[-2:] == (T, T)


def test_triton_where_it_cannot_run_raises_and_says_why():
    """No kernel takes float64, here or on any GPU."""
    model = make().double()
    with gptfast.use_backend("triton"), pytest.raises(RuntimeError, match="backend='triton' cannot run here: "):
        model(GOOD)


def test_environment_variable_sets_the_backend():
    code = (
        "import torch, gptfast;"
        "m = gptfast.OpenAIGPTModel(gptfast.OpenAIGPTConfig(9, 8, 8, 1, 2));"
        "print({row.backend for row in gptfast.explain(m, torch.zeros(1, 3, dtype=torch.int64))})"
    )
    env = {**os.environ, "GPTFAST_BACKEND": "reference", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'reference'}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_without_data(kind, training):
    """On the meta device, where tools count FLOPs and plan memory."""
    model = make(kind).train(training)
    real = model(**example(kind)).to_tuple()
    inputs = {name: x.to("meta") for name, x in example(kind).items()}
    assert [x.shape for x in model.to("meta")(**inputs).to_tuple()] == [x.shape for x in real]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_labels_may_stay_on_the_cpu():
    """HuggingFace's loss moves them to the logits."""
    model, x = make().cuda(), GOOD.cuda()
    assert torch.equal(model(x, labels=GOOD.cpu()).loss, model(x, labels=x).loss)
