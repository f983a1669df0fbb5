"""HuggingFace's OpenAI GPT beside ours, on the same weights: outputs, losses and all gradients.

Weights are random and wide enough that attention is far from uniform. What transformers 4 had and 5 lacks
(``head_mask``, ``initializer_range`` for Conv1D) is tested without it, in test_model.py.

Shapes: B batch, N choices, T positions, C width, V vocabulary, H heads.
"""

import copy
import inspect
import random
from typing import Any

import pytest
import torch
from support.accuracy import assert_no_worse_than_torch

import gptfast

transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install gptfast-kernels[hf]")
from transformers.initialization import no_init_weights  # noqa: E402
from transformers.models.openai import modeling_openai as hf  # noqa: E402

BODY, LM = "OpenAIGPTModel", "OpenAIGPTLMHeadModel"
DOUBLE, CLASSIFIER = "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification"
KINDS = (BODY, LM, DOUBLE, CLASSIFIER)
SMALL: dict[str, Any] = {"vocab_size": 40, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}

# The largest difference as a part of the largest number; 4e-6 here, over all cases and gradients.
FLOAT32_ROUNDING = 1e-5


def pair(kind, seed=0, std=0.3, **settings):
    """(ours, HuggingFace's), in eval mode, with equal weights."""
    settings = {**SMALL, **settings}
    theirs = getattr(hf, kind)(transformers.OpenAIGPTConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            gain = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            p.copy_(gain + std * torch.randn(p.shape, generator=generator))
    ours = getattr(gptfast, kind)(gptfast.OpenAIGPTConfig(**settings)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def ids(*shape, seed=0, size=SMALL["vocab_size"]):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(model, inputs, rows=None):
    """Every output by name, and the gradient of every weight and of inputs_embeds, of a weighted sum of the outputs.

    ``rows`` [B, T]: the positions that count; the others are set to zero.
    """
    model.zero_grad()
    inputs = dict(inputs)
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].detach().to(model.dtype).requires_grad_()
    output = model(**inputs)
    found = {}
    for name, value in output.items():
        for i, x in enumerate(value if isinstance(value, tuple) else (value,)):
            if rows is not None and x.ndim > 2:
                keep = rows[:, None, :, None] if name == "attentions" else rows[..., None]
                x = x.masked_fill(~keep, 0.0)
            found[f"{name}[{i}]" if isinstance(value, tuple) else name] = x
    weights = {name: numbers(*x.shape, seed=9) if x.ndim else torch.tensor(10.0) for name, x in found.items()}
    sum((x.double() * weights[name]).sum() for name, x in found.items()).backward()
    found = {name: x.detach() for name, x in found.items()}
    for name, p in model.named_parameters():
        found[f"d {name}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    if "inputs_embeds" in inputs:
        found["d inputs_embeds"] = inputs["inputs_embeds"].grad
    return found


def assert_equal(ours, theirs, tolerance=FLOAT32_ROUNDING):
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        got = ours[name]
        assert got.shape == expected.shape, f"{name}: {list(got.shape)}, HuggingFace has {list(expected.shape)}"
        assert got.dtype == expected.dtype, name
        error = (got - expected).abs().max()
        assert error <= tolerance * expected.abs().max().clamp(min=1e-3), f"{name}: error {error:.2e}"


def check(kind, inputs, rows=None, **settings):
    ours, theirs = pair(kind, **settings)
    assert_equal(run(ours, inputs, rows), run(theirs, inputs, rows))
    return ours, theirs


EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


# ---- names, weights, signatures ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_state_dict_has_the_same_keys_and_shapes_and_loads_both_ways(kind, tie):
    ours, theirs = pair(kind, tie_word_embeddings=tie)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in other.items()}
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(0.9)
    theirs.load_state_dict(ours.state_dict())
    x = {"input_ids": ids(1, 9)}
    assert_equal(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_takes_the_same_arguments_in_the_same_order(kind):
    ours = list(inspect.signature(getattr(gptfast, kind).forward).parameters)
    theirs = [n for n in inspect.signature(getattr(hf, kind).forward).parameters if n != "kwargs"]
    assert ours[: len(theirs)] == theirs


def test_config_defaults_are_huggingfaces():
    ours, theirs = gptfast.OpenAIGPTConfig(), transformers.OpenAIGPTConfig()
    names = [n for n in inspect.signature(gptfast.OpenAIGPTConfig).parameters if n != "kwargs"]
    names += ["num_labels", "id2label", "label2id", "problem_type"]
    names += ["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "return_dict"]
    names += ["output_hidden_states", "output_attentions", "model_type"]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_config_of_transformers_is_taken_as_it_is():
    theirs = transformers.OpenAIGPTConfig(**SMALL, afn="relu", num_labels=5, pad_token_id=3, n_special=7)
    ours = gptfast.OpenAIGPTForSequenceClassification(theirs)
    for name in ("vocab_size", "n_positions", "n_embd", "afn", "num_labels", "pad_token_id", "n_special", "id2label"):
        assert getattr(ours.config, name) == getattr(theirs, name), name


# ---- random configurations ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_random_configs(kind, seed):
    draw = random.Random(f"{kind} {seed}")
    heads, head_dim = draw.choice([2, 3, 5]), draw.choice([5, 8, 13])  # a LayerNorm of few channels has no gradient
    settings: dict[str, Any] = {
        "vocab_size": draw.randint(5, 90),
        "n_positions": draw.randint(6, 40),
        "n_layer": draw.randint(1, 4),
        "n_head": heads,
        "n_embd": heads * head_dim,
        "afn": ("gelu", "relu", "silu", "swish")[seed % 4],
        "layer_norm_epsilon": draw.choice([1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.7,
        "num_labels": draw.randint(1, 4),
        "pad_token_id": draw.choice([0, 4]),
    }
    N, T = draw.randint(1, 3), draw.randint(2, settings["n_positions"])
    shape = (draw.randint(1, 3), N, T) if kind == DOUBLE else (draw.randint(1, 4), T)
    x = {"input_ids": ids(*shape, size=settings["vocab_size"]), **EVERYTHING}
    if draw.random() < 0.5:
        x["token_type_ids"] = ids(*shape, seed=1, size=2)
    if kind in (LM, DOUBLE):
        x["labels"] = x["input_ids"].masked_fill(ids(*shape, seed=2, size=3) == 0, -100)
        x["labels"][..., -1] = 0
    if kind == DOUBLE:
        x |= {"mc_token_ids": ids(*shape[:2], seed=3, size=T), "mc_labels": ids(shape[0], seed=4, size=N)}
    if kind == CLASSIFIER and settings["num_labels"] > 1:
        x["labels"] = ids(shape[0], seed=5, size=settings["num_labels"])
    check(kind, x, seed=seed, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_full_size(kind):
    """12 layers, 768 wide, 40,478 tokens, 512 positions, of which the last."""
    config = gptfast.OpenAIGPTConfig(pad_token_id=0)
    ours = getattr(gptfast, kind)(config).eval()
    with torch.no_grad():
        for p in ours.parameters():
            if p.ndim == 1:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    with no_init_weights():
        theirs = getattr(hf, kind)(transformers.OpenAIGPTConfig(pad_token_id=0)).eval()
    theirs.tie_weights()
    theirs.load_state_dict(ours.state_dict())
    x = ids(2, 20, size=config.vocab_size)
    inputs = {"input_ids": x, "position_ids": torch.arange(492, 512)}
    if kind == LM:
        inputs["labels"] = x
    elif kind == DOUBLE:  # one example of two choices
        inputs |= {"input_ids": x[None], "labels": x[None], "mc_labels": torch.tensor([1])}
    elif kind == CLASSIFIER:
        inputs["labels"] = torch.tensor([1, 0])
    assert_equal(run(ours, inputs), run(theirs, inputs))


# ---- the body's arguments ----

B, T = 2, 7
MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]],
    "inside": [[1, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1]],
    "everywhere": [[0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1, 0]],
    "nothing": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
}
MASK_DTYPES = ("int64", "int32", "uint8", "int8", "bool", "float32", "float64", "bfloat16")


def sees_a_key(mask):
    """[B, T]: the queries that see at least one key; the others are the only ones in which we differ."""
    return torch.as_tensor(mask).long().cumsum(-1) > 0


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("kind", [BODY, LM])
def test_padding(kind, where):
    mask = torch.tensor(MASKS[where])
    x = {"input_ids": ids(B, T), "attention_mask": mask}
    check(kind, x, rows=sees_a_key(mask))
    check(kind, x | EVERYTHING, rows=sees_a_key(mask))


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_mask_dtypes(dtype):
    mask = torch.tensor(MASKS["inside"]).to(getattr(torch, dtype))
    check(BODY, {"input_ids": ids(B, T), "attention_mask": mask}, rows=sees_a_key(mask))


def test_fractional_mask_values_mask():
    mask = torch.tensor([[1, 0.5, 1, 0.75, 0.1, 1, 0.9], [1, 1, 0, 0.5, 0.5, -1, 1]])
    check(BODY, {"input_ids": ids(B, T), "attention_mask": mask})


def test_one_mask_row_for_the_whole_batch():
    check(BODY, {"input_ids": ids(B, T), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 1]])})


def test_rows_that_only_padding_sees_differ_and_no_other():
    """HuggingFace adds -1e4 to future scores and finfo.min to masked ones, so a query before the first real token
    attends to the real tokens of its own future. Ours attends to nothing. Real tokens see neither."""
    mask = torch.tensor(MASKS["left"])
    ours, theirs = pair(BODY)
    x = {"input_ids": ids(B, T), "attention_mask": mask, **EVERYTHING}
    mine, other = ours(**x), theirs(**x)
    blind = ~sees_a_key(mask)
    future = other.attentions[0][1, :, :3]  # [H, 3, T]
    assert (future[:, :, 3:].sum(-1) > 0.99).all()
    assert (mine.attentions[0][1, :, :3] == 0).all()
    assert mine.last_hidden_state.isfinite().all()
    difference = (mine.last_hidden_state - other.last_hidden_state).abs().amax(-1)
    assert (difference[blind] > 1e-3).all()
    assert (difference[~blind] < 1e-5).all()


def test_left_padding_leaves_real_rows_as_they_were():
    ours, _ = pair(BODY)
    x = ids(1, 4)
    padded = torch.cat([ids(1, 3, seed=1), x], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    position_ids = torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    with torch.no_grad():
        alone = ours(x).last_hidden_state
        together = ours(padded, attention_mask=mask, position_ids=position_ids).last_hidden_state[:, 3:]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


POSITION_IDS = {
    "BT": ids(B, T, seed=3, size=24),
    "1T": ids(1, T, seed=3, size=24),
    "T": ids(T, seed=3, size=24),
    "int32": ids(B, T, seed=3, size=24).int(),
    "strided": ids(T, B, seed=3, size=24).T,
}


@pytest.mark.parametrize("form", POSITION_IDS)
def test_position_ids(form):
    check(BODY, {"input_ids": ids(B, T), "position_ids": POSITION_IDS[form]})


TOKEN_TYPE_IDS = {
    "BT": ids(B, T, seed=4),
    "zeros": torch.zeros(B, T, dtype=torch.int64),
    "int32": ids(B, T, seed=4).int(),
    "other leading shape": ids(1, B, T, seed=4),
    "one row": ids(1, T, seed=4),
    "1-D": ids(T, seed=4),
}


@pytest.mark.parametrize("form", TOKEN_TYPE_IDS)
def test_token_type_ids(form):
    check(BODY, {"input_ids": ids(B, T), "token_type_ids": TOKEN_TYPE_IDS[form]} | EVERYTHING)


def test_inputs_embeds():
    x = {"inputs_embeds": numbers(B, T, 24), "attention_mask": torch.tensor(MASKS["right"])}
    check(BODY, x | EVERYTHING)
    check(LM, x | {"labels": ids(B, T), "token_type_ids": ids(B, T, seed=4), "position_ids": POSITION_IDS["BT"]})


INPUT_IDS = {"int32": ids(B, T).int(), "1-D": ids(T), "choices": ids(B, 3, T), "strided": ids(T, B).T}


@pytest.mark.parametrize("form", INPUT_IDS)
def test_forms_of_ids(form):
    check(BODY, {"input_ids": INPUT_IDS[form]} | EVERYTHING)


def test_choices_with_masks_types_and_positions():
    mask = torch.tensor(MASKS["right"] * 3)
    x = {"input_ids": ids(B, 3, T), "attention_mask": mask, "position_ids": ids(B * 3, T, size=24)}
    ours, _ = check(DOUBLE, x | {"token_type_ids": ids(B, 3, T, seed=5)} | EVERYTHING)
    with torch.no_grad():  # HuggingFace refuses the ids' own shape; we take it
        flat = ours(**x)
        shaped = ours(x["input_ids"], mask.view(B, 3, T), None, x["position_ids"].view(B, 3, T))
    assert torch.equal(flat.logits, shaped.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_tuples(kind):
    settings = {**SMALL, "pad_token_id": 1}
    ours, theirs = pair(kind, **settings)
    x = {"input_ids": ids(B, T), **EVERYTHING, "return_dict": False}
    if kind in (LM, DOUBLE):
        x["labels"] = ids(B, T, seed=1)
    if kind == DOUBLE:
        x["mc_labels"] = torch.tensor([1])
    if kind == CLASSIFIER:
        x["labels"] = torch.tensor([0, 1])

    def flatten(values):
        return {f"{i}": v for i, v in enumerate(torch.utils._pytree.tree_leaves(values))}

    with torch.no_grad():
        mine, other = ours(**x), theirs(**x)
        assert [type(v) for v in mine] == [type(v) for v in other]
        assert_equal(flatten(mine), flatten(other))
        x["return_dict"] = None
        ours.config.return_dict = False
        assert_equal(flatten(ours(**x)), flatten(other))
        ours.config.return_dict = True
        as_dict = ours(**x)
    assert_equal(flatten(as_dict.to_tuple()), flatten(other))
    for i, name in enumerate(as_dict.keys()):
        assert as_dict[i] is as_dict[name] is getattr(as_dict, name)


def test_settings_of_the_config_hold_where_an_argument_is_none():
    ours, theirs = pair(LM, output_hidden_states=True, output_attentions=True)
    x = {"input_ids": ids(B, T)}
    assert_equal(run(ours, x), run(theirs, x))
    assert list(ours(**x, output_attentions=False).keys()) == ["logits", "hidden_states"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_can_be_retained_on_hidden_states_and_attentions(kind):
    ours, theirs = pair(kind)
    found = []
    for model in (ours, theirs):
        output = model(ids(1, T), **EVERYTHING)
        kept = [*output.hidden_states, *output.attentions]
        for x in kept:
            x.retain_grad()
        (output[0] * numbers(*output[0].shape)).sum().backward()
        found.append({str(i): x.grad for i, x in enumerate(kept)})
    assert_equal(*found)


@pytest.mark.parametrize("afn", ["gelu", "relu", "silu", "swish"])
def test_activations(afn):
    check(BODY, {"input_ids": ids(B, T)}, afn=afn)


# ---- dropout ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_dropout_falls_in_the_same_places(monkeypatch, kind, padded):
    """With one and the same mask drawn for a shape, training equals HuggingFace's training."""
    calls = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        calls.append((p, tuple(x.shape)))
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(len(calls))) >= p
        return x * kept / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    rates: dict[str, Any] = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3, "summary_first_dropout": 0.4}
    ours, theirs = pair(kind, **rates, pad_token_id=0, summary_last_dropout=0.15)
    x = {"input_ids": ids(B, 2, T) if kind == DOUBLE else ids(B, T)}
    if padded:
        x["attention_mask"] = torch.tensor(MASKS["right"]).repeat(2 if kind == DOUBLE else 1, 1)
    found = []
    for model in (ours.train(), theirs.train()):
        calls.clear()
        with gptfast.use_backend("reference"):
            found.append((run(model, x), list(calls)))
    (mine, my_calls), (other, their_calls) = found
    assert my_calls == their_calls
    assert len(my_calls) == 1 + 3 * SMALL["n_layer"] + 2 * (kind == DOUBLE)
    assert_equal(mine, other)


# ---- the language model's head ----


@pytest.mark.parametrize("shape", [(B, T), (1, T), (B, 3, T)], ids=str)
def test_lm_loss(shape):
    x = ids(*shape)
    check(LM, {"input_ids": x, "labels": x.masked_fill(x % 3 == 0, -100)})


def test_lm_loss_settings():
    x = {"input_ids": ids(B, T), "labels": ids(B, T, seed=1)}
    check(LM, x | {"num_items_in_batch": 5})
    check(LM, x | {"num_items_in_batch": torch.tensor(5)})
    check(LM, x | {"shift_labels": ids(B, T, seed=2)})
    check(LM, x | {"ignore_index": 3, "labels": x["labels"].masked_fill(x["labels"] < 15, 3)})


def test_lm_loss_without_a_label_is_nan():
    ours, theirs = pair(LM)
    x = {"input_ids": ids(B, T), "labels": torch.full((B, T), -100)}
    assert ours(**x).loss.isnan()
    assert theirs(**x).loss.isnan()


KEEP = {
    "one": 1,
    "three": 3,
    "more than there are": 30,
    "positions": torch.tensor([4, 0, 4]),
    "positions of each row": torch.tensor([[1, 2], [6, 0]]),
    "mask": torch.tensor(MASKS["inside"]).bool(),
    "mask of positions": torch.tensor([True, False, True, False, False, True, True]),
}


@pytest.mark.parametrize("form", KEEP)
def test_logits_to_keep(form):
    check(LM, {"input_ids": ids(B, T), "logits_to_keep": KEEP[form]})


def test_loss_is_float32_in_half_precision():
    ours, theirs = pair(LM)
    x = {"input_ids": ids(B, T), "labels": ids(B, T, seed=1)}
    assert ours.bfloat16()(**x).loss.dtype == theirs.bfloat16()(**x).loss.dtype == torch.float32


# ---- double heads ----


SUMMARIES: list[dict[str, Any]] = [
    {},
    {"summary_activation": "tanh"},
    {"summary_use_proj": False},
    {"summary_proj_to_labels": False},
    {"summary_use_proj": False, "summary_activation": "gelu"},
]


@pytest.mark.parametrize("settings", SUMMARIES, ids=str)
@pytest.mark.parametrize("chosen", [True, False])
def test_double_heads(settings, chosen):
    x = {"input_ids": ids(B, 3, T), "labels": ids(B, 3, T, seed=1)}
    wide = not (settings.get("summary_use_proj", True) and settings.get("summary_proj_to_labels", True))
    x["mc_labels"] = ids(B * 3, seed=2, size=24) if wide else torch.tensor([2, 0])
    if chosen:
        x["mc_token_ids"] = torch.tensor([[0, 6, 3], [5, 5, 1]])
    ours, _ = check(DOUBLE, x | EVERYTHING, **settings)
    assert ours.config.num_labels == 1


@pytest.mark.parametrize("summary_type", ["last", "first", "mean", "cls_index"])
def test_summary_types(summary_type):
    x = {"input_ids": ids(4, T), "labels": ids(4, T, seed=1), "mc_labels": torch.tensor([3])}
    check(DOUBLE, x, summary_type=summary_type)


def test_summary_type_attn_is_not_implemented():
    for config, module in ((gptfast.OpenAIGPTConfig, gptfast), (transformers.OpenAIGPTConfig, hf)):
        with pytest.raises(NotImplementedError):
            module.OpenAIGPTDoubleHeadsModel(config(**SMALL, summary_type="attn"))


def test_summary_activations_are_transformers():
    from gptfast.heads import SUMMARY_ACTIVATIONS

    x = torch.linspace(-4, 4, 101)
    for name, make in SUMMARY_ACTIVATIONS.items():
        torch.testing.assert_close(make()(x), transformers.activations.ACT2FN[name](x), rtol=0, atol=2e-6, msg=name)


def test_summary_on_two_dimensional_ids():
    x = {"input_ids": ids(4, T), "mc_token_ids": torch.tensor([0, 6, 2, 5]), "mc_labels": torch.tensor([2])}
    check(DOUBLE, x)


def test_choice_labels_may_be_ignored():
    check(DOUBLE, {"input_ids": ids(B, 3, T), "mc_labels": torch.tensor([-100, 1])})


# ---- classification ----


PADDED = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0], [0, 0, 5, 6, 7], [5, 6, 0, 7, 0], [0, 0, 0, 0, 0]])


def test_classification_pools_the_last_token_that_is_no_padding():
    check(CLASSIFIER, {"input_ids": PADDED, "labels": torch.tensor([0, 1, 2, 0, -100])}, pad_token_id=0, num_labels=3)


def test_classification_without_a_padding_token():
    check(CLASSIFIER, {"input_ids": ids(1, T), "labels": torch.tensor([1])})
    check(CLASSIFIER, {"inputs_embeds": numbers(1, T, 24), "labels": torch.tensor([1])})
    for model in pair(CLASSIFIER):
        with pytest.raises(ValueError, match="batch sizes > 1 if no padding token"):
            model(ids(B, T))


def test_classification_of_embeddings_takes_the_last_position():
    ours, theirs = pair(CLASSIFIER, pad_token_id=0)
    x = {"inputs_embeds": numbers(B, T, 24), "labels": torch.tensor([1, 0])}
    with pytest.warns(UserWarning, match="do not show which positions are padding"):
        mine = run(ours, x)
    assert_equal(mine, run(theirs, x))


PROBLEMS = {
    "regression": (1, numbers(5, seed=1)),
    "regression, one column": (1, numbers(5, 1, seed=1)),
    "regression of several": (3, numbers(5, 3, seed=1)),
    "single": (3, ids(5, seed=1, size=3)),
    "single, one column": (3, ids(5, 1, seed=1, size=3)),
    "multi": (3, ids(5, 3, seed=1, size=2).float()),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("told", [True, False])
def test_problem_types(problem, told):
    num_labels, labels = PROBLEMS[problem]
    kind = {"r": "regression", "s": "single_label_classification", "m": "multi_label_classification"}[problem[0]]
    if problem == "regression of several" and not told:
        kind = "multi_label_classification"  # what float labels are taken for
    settings = {"num_labels": num_labels, "pad_token_id": 0, "problem_type": kind if told else None}
    ours, theirs = check(CLASSIFIER, {"input_ids": PADDED, "labels": labels}, **settings)
    assert ours.config.problem_type == theirs.config.problem_type == kind


# ---- half precision ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_bfloat16_is_within_twice_huggingfaces_error(kind, padded):
    ours, theirs = pair(kind, n_embd=64, n_head=4, n_layer=4, vocab_size=200, std=0.1, pad_token_id=0)
    for model in (ours, theirs):
        model.bfloat16()
    exact = copy.deepcopy(theirs).double()
    x = ids(3, 20, size=200)
    inputs = {"input_ids": x, "output_hidden_states": True}
    if padded:
        inputs["attention_mask"] = torch.ones(3, 20, dtype=torch.int64).index_fill(1, torch.tensor([15, 17, 19]), 0)
    if kind != BODY:
        inputs["labels"] = torch.tensor([0, 1, 1]) if kind == CLASSIFIER else x
    mine, other, oracle = run(ours, inputs), run(theirs, inputs), run(exact, inputs)
    for name in oracle:
        assert_no_worse_than_torch(name, mine[name], other[name], oracle[name])


# ---- a vocabulary of another size ----


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", [25, 47])
def test_resized_embeddings(tie, size):
    ours, theirs = pair(LM, tie_word_embeddings=tie)
    for model in (ours, theirs):
        table = model.resize_token_embeddings(size, mean_resizing=False)
        assert table is model.get_input_embeddings()
        assert table.num_embeddings == model.config.vocab_size == model.lm_head.out_features == size
        assert (model.lm_head.weight is table.weight) == tie
    kept = min(size, 40)
    for ours_table, theirs_table in (
        (ours.get_input_embeddings(), theirs.get_input_embeddings()),
        (ours.get_output_embeddings(), theirs.get_output_embeddings()),
    ):
        assert torch.equal(ours_table.weight[:kept], theirs_table.weight[:kept])
    theirs.load_state_dict(ours.state_dict())
    x = {"input_ids": ids(B, T, size=kept), "labels": ids(B, T, size=kept)}
    assert_equal(run(ours, x), run(theirs, x))


# ---- generation ----


def pair_that_speaks():
    """Models whose greedy text differs from prompt to prompt and does not repeat one token, so that equality means
    something."""
    ours, theirs = pair(LM, n_positions=64, vocab_size=300, n_layer=3, std=0.15, tie_word_embeddings=False)
    with torch.no_grad():
        for table, gain in ((theirs.transformer.tokens_embed, 7), (theirs.transformer.positions_embed, 2)):
            table.weight.mul_(gain)
        theirs.lm_head.weight.mul_(7)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_huggingfaces(use_cache, repetition_penalty):
    ours, theirs = pair_that_speaks()
    x = ids(3, 8, size=300)
    penalty = {"repetition_penalty": repetition_penalty}
    expected = theirs.generate(x, max_new_tokens=40, do_sample=False, pad_token_id=0, **penalty)
    assert len({tuple(row[8:].tolist()) for row in expected}) == 3
    assert min(len(row.unique()) for row in expected) > 14
    assert torch.equal(ours.generate(x, max_new_tokens=40, use_cache=use_cache, **penalty), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_text_of_a_padded_batch_is_huggingfaces(side):
    """HuggingFace's, padded left; from version 5 its rows come out as they would alone."""
    ours, theirs = pair_that_speaks()
    left = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids(1, 4, size=300)], 1)
    x = torch.cat([ids(2, 8, seed=1, size=300), left])
    mask = torch.ones_like(x)
    mask[2, :4] = 0
    expected = theirs.generate(x, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    if side == "right":
        x[2], mask[2] = x[2].roll(4), mask[2].roll(4)
    got = ours.generate(x, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(got[:, 8:], expected[:, 8:])


def test_stop_tokens_as_huggingface_has_them():
    ours, theirs = pair_that_speaks()
    x = ids(3, 8, size=300)
    plain = theirs.generate(x, max_new_tokens=30, do_sample=False, pad_token_id=0)
    stops = [int(plain[0, 12]), int(plain[1, 20])]
    expected = theirs.generate(x, max_new_tokens=30, do_sample=False, pad_token_id=7, eos_token_id=stops)
    assert torch.equal(ours.generate(x, max_new_tokens=30, pad_token_id=7, eos_token_id=stops), expected)
    assert (expected == 7).any()


def test_lengths_as_huggingface_has_them():
    ours, theirs = pair_that_speaks()
    x = ids(1, 8, size=300)
    assert ours.generate(x, max_length=30).shape == theirs.generate(x, max_length=30, do_sample=False).shape == (1, 30)
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert ours.generate(x).shape == theirs.generate(x, do_sample=False).shape == (1, 28)
    near_the_end = ids(1, 60, size=300)
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert ours.generate(near_the_end).shape == theirs.generate(near_the_end, do_sample=False).shape == (1, 64)


def test_transformers_streamers():
    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(str(int(i)) for i in ids) + " "

    ours, _ = pair_that_speaks()
    x = ids(1, 8, size=300)
    streamer = transformers.TextIteratorStreamer(Tokenizer(), skip_prompt=True)
    new = ours.generate(x, max_new_tokens=12, streamer=streamer)[0, 8:]
    assert "".join(streamer).split() == [str(i) for i in new.tolist()]


def test_samples_are_drawn_from_huggingfaces_distribution():
    """temperature, then top-k, then top-p: the same tokens survive with the same probabilities."""
    from gptfast.generation import distribution

    logits = numbers(4, 50) * 3
    warped = logits
    for warper in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.8),
    ):
        warped = warper(None, warped)
    got, expected = distribution(logits, temperature=0.7, top_k=20, top_p=0.8), warped.softmax(-1)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected)
