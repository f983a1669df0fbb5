"""Checkpoints: formats, old layouts, damaged files, crashes while saving; files from TensorFlow and transformers."""

import itertools
import json
import logging
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gptfast
from gptfast.checkpoint import WEIGHTS, load_pretrained, read_state_dict, resolve_files

DATA = Path(__file__).parent / "data"  # data/make.py says how these files came about
KINDS = ("OpenAIGPTModel", "OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification")
LM = gptfast.OpenAIGPTLMHeadModel
SIZES = {"vocab_size": 19, "n_positions": 6, "n_embd": 4, "n_layer": 2, "n_head": 2}


def config(**settings):
    return gptfast.OpenAIGPTConfig(**{**SIZES, "num_labels": 3, "pad_token_id": 0, **settings})


def make(kind="OpenAIGPTLMHeadModel", seed=0, package=gptfast, **settings):
    """A model whose every number differs from every other."""
    model = getattr(package, kind)(package.OpenAIGPTConfig(**config(**settings).to_dict())).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.1, 0.5, generator=generator))
    return model


@torch.no_grad()
def outputs(model):
    """Everything a model computes from ids that reach all of its weights."""
    ids = torch.tensor([[[3, 1, 18, 7], [5, 2, 9, 11]], [[0, 4, 17, 6], [8, 10, 12, 13]]])
    double = "DoubleHeads" in type(model).__name__
    output = model(ids, mc_token_ids=torch.tensor([[1, 3], [2, 0]])) if double else model(ids[0])
    return [output[key] for key in ("last_hidden_state", "logits", "mc_logits") if key in output]


def assert_same_weights(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def load(folder, cls=LM, **kwargs):
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    return model, info


def nothing(info):
    return info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="compares with transformers itself")


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py", reason="reads TensorFlow's files")


# -- files that others wrote ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("afn", "computed_by"), [("gelu", "pytorch"), ("gelu_erf", "tensorflow")])
@pytest.mark.usefixtures("h5py")
def test_tensorflow_file(kind, afn, computed_by):
    model, info = load(DATA / "tf" / kind, getattr(gptfast, kind), afn=afn)
    assert nothing(info)
    expected = load_file(DATA / "tf" / "expected.safetensors")
    double = "DoubleHeads" in kind
    ids = expected["input_ids"] if double else expected["input_ids"][:, 0]
    with torch.no_grad():
        output = model(ids, **({"mc_token_ids": expected["mc_token_ids"]} if double else {}))
    keys = [key.rpartition(".")[2] for key in expected if key.startswith(f"{kind}.{computed_by}.")]
    assert keys
    for key in keys:
        # the two GELUs differ by 6e-5 and more here
        torch.testing.assert_close(output[key], expected[f"{kind}.{computed_by}.{key}"], rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("version", "use_safetensors", "stored"),
    [
        ("4.57.6", True, {"transformer.tokens_embed.weight"}),
        ("4.57.6", False, {"transformer.tokens_embed.weight", "lm_head.weight"}),
        ("5.23.0", True, {"lm_head.weight"}),
    ],
)
def test_double_heads_as_each_transformers_writes_them(version, use_safetensors, stored):
    folder = DATA / f"transformers-{version}"
    tensors, _ = read_state_dict(folder, WEIGHTS[:2] if use_safetensors else WEIGHTS[2:])
    assert {key for key in tensors if "tokens_embed" in key or "lm_head" in key} == stored
    model, info = load(folder, gptfast.OpenAIGPTDoubleHeadsModel, use_safetensors=use_safetensors)
    assert nothing(info)
    assert model.lm_head.weight is model.transformer.tokens_embed.weight
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        output = model(expected["input_ids"], mc_token_ids=expected["mc_token_ids"])
    for key in ("logits", "mc_logits"):
        torch.testing.assert_close(output[key], expected[key], rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_token_table_stored_as_lm_head_reaches_every_class(kind):
    folder = DATA / "transformers-5.23.0"
    model = getattr(gptfast, kind).from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    torch.testing.assert_close(model.get_input_embeddings().weight.data, stored["lm_head.weight"], rtol=0, atol=0)


# -- transformers reads ours, and the reverse -------------------------------------------------------------------


@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", 600])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_save(kind, max_shard_size, safe_serialization, tmp_path, transformers):
    ours = make(kind)
    ours.save_pretrained(tmp_path, max_shard_size=max_shard_size, safe_serialization=safe_serialization)
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_transformers_saves(kind, tmp_path, transformers):
    theirs = make(kind, package=transformers)
    theirs.save_pretrained(tmp_path)
    ours, info = load(tmp_path, getattr(gptfast, kind))
    assert nothing(info)
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(KINDS, KINDS)))
def test_keys_reported_across_heads_are_those_of_transformers(saved, loaded, tmp_path, transformers):
    make(saved).save_pretrained(tmp_path)
    model, ours = load(tmp_path, getattr(gptfast, loaded))
    _, theirs = getattr(transformers, loaded).from_pretrained(tmp_path, output_loading_info=True)
    assert ours == {key: theirs[key] for key in ours}
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not model.training


def test_generation_config_is_one_that_transformers_reads(tmp_path, transformers):
    make(eos_token_id=5).save_pretrained(tmp_path / "lm")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "lm").eos_token_id == 5
    make("OpenAIGPTDoubleHeadsModel").save_pretrained(tmp_path / "double")
    assert not (tmp_path / "double" / "generation_config.json").exists()


# -- our own round trips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({}, {"model.safetensors"}),
        ({"safe_serialization": False}, {"pytorch_model.bin"}),
        (
            {"max_shard_size": "1KB"},
            {"model.safetensors.index.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))},
        ),
        (
            {"max_shard_size": 1000, "safe_serialization": False},
            {"pytorch_model.bin.index.json", *(f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3))},
        ),
    ],
)
def test_round_trip(settings, files, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", *files}
    loaded, info = load(tmp_path)
    assert nothing(info)
    assert_same_weights(loaded, model)
    assert loaded.lm_head.weight is loaded.transformer.tokens_embed.weight
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in loaded.parameters())
    assert not loaded.training
    stored, _ = read_state_dict(tmp_path)
    assert set(stored) == set(model.state_dict()) - {"lm_head.weight"}


def test_saved_files(tmp_path):
    make().to(torch.bfloat16).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["OpenAIGPTLMHeadModel"]
    assert settings["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_shards_hold_no_more_than_asked_for(tmp_path):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / name)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 300


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "5", "GB", "5XB", "0KB", None])
def test_bad_shard_size(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        make().save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_state_dict_to_save_is_checked_and_cleaned(tmp_path):
    model = make()
    with pytest.raises(TypeError, match=r"state_dict must hold tensors with data, got list under 'x'"):
        model.save_pretrained(tmp_path, state_dict={"x": [1]})
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict={f"_orig_mod.{k}": t + 1 for k, t in model.state_dict().items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert_same_weights(load(tmp_path)[0], model)


# OpenAI's names in the order of their files, from finetune-transformer-lm's graph: model/we twice, then each block.
OPENAI_BLOCK = (
    *("attn/c_attn/w", "attn/c_attn/b", "attn/c_proj/w", "attn/c_proj/b", "ln_1/g", "ln_1/b"),
    *("mlp/c_fc/w", "mlp/c_fc/b", "mlp/c_proj/w", "mlp/c_proj/b", "ln_2/g", "ln_2/b"),
)


def write_openai(model, folder, parts=10):
    """A model's weights as OpenAI published theirs."""
    weights = model.state_dict()
    arrays = [weights["transformer.positions_embed.weight"], weights["transformer.tokens_embed.weight"]]
    leaves = {"w": "weight", "g": "weight", "b": "bias"}
    for layer in range(model.config.n_layer):
        for name in OPENAI_BLOCK:
            path, leaf = name.replace("/", ".").rsplit(".", 1)
            tensor = weights[f"transformer.h.{layer}.{path}.{leaves[leaf]}"]
            arrays.append(tensor[None] if leaf == "w" else tensor)
    folder.mkdir(exist_ok=True)
    (folder / "params_shapes.json").write_text(json.dumps([list(array.shape) for array in arrays]))
    flat = torch.cat([array.flatten() for array in arrays]).numpy()
    for n, part in enumerate(np.array_split(flat, parts)):
        np.save(folder / f"params_{n}.npy", part)


def test_openai_files(tmp_path):
    model = make()
    write_openai(model, tmp_path)
    loaded, info = load(tmp_path, **SIZES, num_labels=3, pad_token_id=0)  # OpenAI's files come without a config.json
    assert nothing(info)
    assert_same_weights(loaded, model)
    with pytest.raises(RuntimeError, match=r"params_shapes.json does not fit .* \[19, 4\], the model's \[40478, 768\]"):
        load(tmp_path, n_layer=2)


def test_tensorflow_safetensors(tmp_path):
    """TF classes of late 4.x write safetensors under TensorFlow's names."""
    model = make("OpenAIGPTForSequenceClassification")
    tensors = {}
    for key, tensor in model.state_dict().items():
        name = key.replace(".", "/").replace("/h/", "/h_._")
        if "ln_" in name:
            name = name.replace("weight", "gamma").replace("bias", "beta")
        elif "score" in name:
            name, tensor = "score/kernel", tensor.t().contiguous()
        elif "positions" in name:
            name = name.replace("weight", "embeddings")
        elif "bias" in name:
            tensor = tensor[None]
        tensors[f"{name}:0"] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "tf"})
    model.config.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, type(model))
    assert nothing(info)
    assert_same_weights(loaded, model)
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())


def test_formats_are_read_in_the_order_of_transformers(tmp_path):
    first, second, third = make(seed=1), make(seed=2), make(seed=3)
    write_openai(third, tmp_path)
    third.config.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path)[0], third)
    second.save_pretrained(tmp_path, safe_serialization=False)
    assert_same_weights(load(tmp_path)[0], second)
    first.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path)[0], first)
    assert_same_weights(load(tmp_path, use_safetensors=False)[0], second)
    with pytest.raises(OSError, match=r"has no weights; looked for tf_model\.h5"):
        load(tmp_path, from_tf=True)
    with pytest.raises(ValueError, match="from_tf"):
        load(tmp_path, from_tf=True, use_safetensors=True)


# -- old and wrapped keys ---------------------------------------------------------------------------------------


def with_legacy_buffers(state):
    mask = torch.ones(1, 1, 6, 6).tril()
    return {
        **state,
        "transformer.h.0.attn.bias": mask,
        "h.1.attn.bias": mask,
        "transformer.position_ids": torch.arange(6),
    }


def prefixed(*prefixes):
    return lambda state: {"".join(prefixes) + key: tensor for key, tensor in state.items()}


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if name not in key}


def compiled_inside(state):
    return {key.replace("transformer.h.", "transformer._orig_mod.h."): tensor for key, tensor in state.items()}


def without_prefix(state):
    return {key.removeprefix("transformer."): tensor for key, tensor in state.items()}


def gamma_beta(state):
    def old(key):
        return key.replace("weight", "gamma").replace("bias", "beta") if ".ln_" in key else key

    return {old(key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "rewrite",
    [
        pytest.param(with_legacy_buffers, id="mask and position buffers"),
        pytest.param(prefixed("_orig_mod."), id="torch.compile"),
        pytest.param(prefixed("module."), id="DDP"),
        pytest.param(prefixed("module.", "_orig_mod."), id="DDP of torch.compile"),
        pytest.param(prefixed("_orig_mod.", "module."), id="torch.compile of DDP"),
        pytest.param(compiled_inside, id="torch.compile of a part"),
        pytest.param(without_prefix, id="no prefix"),
        pytest.param(gamma_beta, id="gamma and beta"),
        pytest.param(without("lm_head"), id="no head"),
        pytest.param(without("tokens_embed"), id="no token table"),
        pytest.param(lambda state: dict(state), id="both"),
    ],
)
@pytest.mark.parametrize("kind", ["OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel"])
def test_old_and_wrapped_keys(kind, rewrite, file_format, tmp_path):
    model = make(kind)
    model.config.save_pretrained(tmp_path)
    state = rewrite(model.state_dict())
    if file_format == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    loaded, info = load(tmp_path, type(model))
    assert nothing(info)
    assert_same_weights(loaded, model)
    assert loaded.lm_head.weight is loaded.transformer.tokens_embed.weight


def test_base_model_takes_prefixed_keys(tmp_path):
    model = make("OpenAIGPTModel")
    torch.save(prefixed("transformer.")(model.state_dict()), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, type(model))
    assert nothing(info)
    assert_same_weights(loaded, model)


def test_a_head_that_differs_from_the_token_table_is_not_tied(tmp_path, caplog):
    model = make()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    loaded, info = load(tmp_path)
    assert nothing(info)
    assert "lm_head.weight differs from the token table" in caplog.text
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    loaded.tie_weights()
    assert loaded.lm_head.weight is not loaded.transformer.tokens_embed.weight
    caplog.clear()
    loaded.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert not caplog.records
    assert_same_weights(again, loaded)


def test_untied_config_keeps_both(tmp_path):
    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path)
    assert nothing(info)
    assert_same_weights(loaded, model)
    assert loaded.lm_head.weight is not loaded.transformer.tokens_embed.weight
    make().save_pretrained(tmp_path)
    _, info = load(tmp_path, tie_word_embeddings=False)
    assert info["missing_keys"] == {"lm_head.weight"}


def test_two_names_for_one_weight(tmp_path):
    state = make().state_dict()
    torch.save({**state, **without_prefix(state)}, tmp_path / "pytorch_model.bin")
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin has both (\S+) and \S+, which mean the same weight"):
        load(tmp_path)


# -- what does not fit ------------------------------------------------------------------------------------------


def test_missing_and_unexpected_are_reported(tmp_path, caplog):
    model = make()
    state = {**model.state_dict(), "transformer.h.9.ln_1.weight": torch.ones(4), "adapter.w": torch.ones(1)}
    del state["transformer.h.0.ln_2.weight"], state["transformer.h.1.mlp.c_fc.bias"], state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="gptfast.checkpoint"):
        loaded, info = load(tmp_path)
    assert info == {
        "missing_keys": {"transformer.h.0.ln_2.weight", "transformer.h.1.mlp.c_fc.bias"},
        "unexpected_keys": {"transformer.h.9.ln_1.weight", "adapter.w"},
        "mismatched_keys": set(),
    }
    for keys in info.values():
        assert all(key in caplog.text for key in keys)
    assert str(tmp_path) in caplog.text
    assert torch.equal(loaded.transformer.h[0].ln_2.weight, torch.ones(4))
    assert torch.equal(loaded.transformer.h[1].mlp.c_fc.bias, torch.zeros(16))
    assert torch.equal(loaded.transformer.h[0].ln_2.bias, model.transformer.h[0].ln_2.bias)
    assert torch.equal(loaded.transformer.h[1].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)


def test_new_weights_come_from_the_models_own_initialiser(tmp_path):
    settings = {"n_embd": 64, "initializer_range": 0.3, "num_labels": 50}
    make("OpenAIGPTModel", **settings).save_pretrained(tmp_path)
    torch.manual_seed(0)
    first, info = load(tmp_path, gptfast.OpenAIGPTForSequenceClassification)
    assert info["missing_keys"] == {"score.weight"}
    assert first.score.weight.std().item() == pytest.approx(0.3, rel=0.1)
    torch.manual_seed(0)
    second, _ = load(tmp_path, gptfast.OpenAIGPTForSequenceClassification)
    assert torch.equal(first.score.weight, second.score.weight)
    assert first.score.weight.requires_grad


def test_mismatched_shapes(tmp_path, caplog):
    model = make("OpenAIGPTForSequenceClassification")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"model\.safetensors does not fit .*score\.weight is \[3, 4\], the model's \[5, 4\]"
    ):
        load(tmp_path, type(model), num_labels=5)
    loaded, info = load(tmp_path, type(model), num_labels=5, ignore_mismatched_sizes=True)
    assert info == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": {("score.weight", torch.Size([3, 4]), torch.Size([5, 4]))},
    }
    assert "score.weight ([3, 4] in the file, [5, 4] in the model)" in caplog.text
    assert loaded.score.weight.shape == (5, 4)
    assert loaded.config.num_labels == 5
    assert torch.equal(loaded.transformer.tokens_embed.weight, model.transformer.tokens_embed.weight)


def test_tied_table_of_another_size(tmp_path):
    make().save_pretrained(tmp_path)
    loaded, info = load(tmp_path, vocab_size=23, ignore_mismatched_sizes=True)
    key = "transformer.tokens_embed.weight"
    assert info["mismatched_keys"] == {(key, torch.Size([19, 4]), torch.Size([23, 4]))}
    assert info["missing_keys"] == set()
    assert loaded.lm_head.weight is loaded.transformer.tokens_embed.weight


# -- damaged and malicious files --------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a folder: what a malicious checkpoint could do and worse."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def truncated(name, fraction, **settings):
    def damage(folder):
        make().save_pretrained(folder, **settings)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * fraction)])

    return damage


def replaced_by(name, data, **settings):
    def damage(folder):
        make().save_pretrained(folder, **settings)
        (folder / name).write_bytes(data)

    return damage


def pickled(value, **settings):
    def damage(folder):
        config().save_pretrained(folder)
        torch.save(value(folder), folder / "pytorch_model.bin", **settings)

    return damage


def plain_pickle(folder):
    config().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload(folder / "marker")}, protocol=2))


def with_index(change):
    def damage(folder):
        make().save_pretrained(folder, max_shard_size=1000)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(change(folder, json.loads(path.read_text()))))

    return damage


def lost_shard(folder, index):
    (folder / "model-00002-of-00003.safetensors").unlink()
    return index


def unlisted_shard(folder, index):
    index["weight_map"] = {k: name for k, name in index["weight_map"].items() if "00002" not in name}
    return index


def lost_key(folder, index):
    index["weight_map"]["transformer.h.7.ln_1.bias"] = "model-00002-of-00003.safetensors"
    return index


def path_outside(folder, index):
    index["weight_map"]["lm_head.weight"] = "../../etc/passwd"
    return index


def truncated_shard(folder, index):
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    return index


def rewritten(**changes):
    def damage(folder):
        model = make()
        model.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        save_file({**{k: t.clone() for k, t in state.items()}, **changes}, folder / "model.safetensors")

    return damage


def openai(change):
    def damage(folder):
        write_openai(make(), folder)
        config().save_pretrained(folder)
        change(folder)

    return damage


def truncate_npy(folder):
    data = (folder / "params_3.npy").read_bytes()
    (folder / "params_3.npy").write_bytes(data[:-8])


def shorten_npy(folder):
    np.save(folder / "params_3.npy", np.load(folder / "params_3.npy")[:-2])


def reshape_json(folder):
    shapes = json.loads((folder / "params_shapes.json").read_text())
    (folder / "params_shapes.json").write_text(json.dumps([*shapes[:2], [2, 2, 12], *shapes[3:]]))


LN = "transformer.h.0.ln_1.weight"
DAMAGES = {
    "safetensors cut in its tensors": (
        truncated("model.safetensors", 0.7),
        ValueError,
        r"model\.safetensors is damaged",
    ),
    "safetensors cut in its header": (
        truncated("model.safetensors", 0.01),
        ValueError,
        r"model\.safetensors is damaged",
    ),
    "empty safetensors": (replaced_by("model.safetensors", b""), ValueError, r"model\.safetensors is damaged"),
    "a web page": (replaced_by("model.safetensors", b"<!doctype html>"), ValueError, r"model\.safetensors is damaged"),
    "a bin cut short": (
        truncated("pytorch_model.bin", 0.7, safe_serialization=False),
        ValueError,
        r"pytorch_model\.bin is damaged",
    ),
    "an empty bin": (
        replaced_by("pytorch_model.bin", b"", safe_serialization=False),
        ValueError,
        r"pytorch_model\.bin is damaged",
    ),
    "a bin of garbage": (
        replaced_by("pytorch_model.bin", bytes(range(256)), safe_serialization=False),
        ValueError,
        r"pytorch_model\.bin is damaged",
    ),
    "a bin that would run code": (
        pickled(lambda folder: {"x": Payload(folder / "marker")}),
        ValueError,
        r"pytorch_model\.bin is refused: it would run \w+\.mkdir",
    ),
    "an old bin that would run code": (
        pickled(lambda folder: {"x": Payload(folder / "marker")}, _use_new_zipfile_serialization=False),
        ValueError,
        r"pytorch_model\.bin is refused: it would run \w+\.mkdir",
    ),
    "a plain pickle that would run code": (plain_pickle, ValueError, r"is refused: it would run \w+\.mkdir"),
    "a bin of a list": (pickled(lambda _: [1]), ValueError, r"pytorch_model\.bin must hold a state dict, got list"),
    "a bin of numbers": (
        pickled(lambda _: {"x": 3}),
        ValueError,
        r"\.bin must hold tensors by name, got int under 'x'",
    ),
    "a bin of sparse tensors": (
        pickled(lambda _: {"x": torch.eye(2).to_sparse()}),
        ValueError,
        r"\.bin must hold tensors by name, got Tensor under 'x'",
    ),
    "a shard that is not there": (
        with_index(lost_shard),
        OSError,
        r"index\.json needs model-00002-of-00003\.safetensors beside it",
    ),
    "a shard that is not listed": (with_index(unlisted_shard), ValueError, r"index\.json lists 2 of 3 shards"),
    "a shard without its tensor": (with_index(lost_key), ValueError, r"model-00002-of-00003\.safetensors lacks .*h\.7"),
    "a shard outside the folder": (
        with_index(path_outside),
        ValueError,
        r"index\.json points at '\.\./\.\./etc/passwd'",
    ),
    "a shard cut short": (with_index(truncated_shard), ValueError, r"model-00003-of-00003\.safetensors is damaged"),
    "an index without a map": (with_index(lambda *_: {}), ValueError, r"index\.json has no weight_map"),
    "an index of nothing": (with_index(lambda *_: {"weight_map": {}}), ValueError, r"index\.json has no weight_map"),
    "an index of a list": (with_index(lambda *_: []), ValueError, r"index\.json must hold a JSON dict, got list"),
    "an index that is not JSON": (
        replaced_by("model.safetensors.index.json", b"{", max_shard_size=1000),
        ValueError,
        r"model\.safetensors\.index\.json is not JSON",
    ),
    "a config that is not JSON": (replaced_by("config.json", b"{'a"), ValueError, r"config\.json is not JSON"),
    "a config with a bad setting": (
        replaced_by("config.json", b'{"n_embd": -4}'),
        ValueError,
        r"config\.json: n_embd must be positive, got -4",
    ),
    "another model's weights": (
        pickled(lambda _: {"wte.weight": torch.ones(4)}),
        RuntimeError,
        r"pytorch_model\.bin does not fit .*: it has none of its weights, but wte\.weight",
    ),
    "a weight of another shape": (
        rewritten(**{LN: torch.ones(5)}),
        RuntimeError,
        r"model\.safetensors does not fit .*ln_1\.weight is \[5\], the model's \[4\]",
    ),
    "a weight of integers": (
        rewritten(**{LN: torch.ones(4, dtype=torch.int64)}),
        RuntimeError,
        r"model\.safetensors does not fit .*ln_1\.weight is torch\.int64, the model's torch\.float32",
    ),
    "an npy cut short": (openai(truncate_npy), ValueError, r"params_3\.npy is damaged"),
    "an npy too short": (openai(shorten_npy), ValueError, r"params_0\.npy to params_9\.npy hold 586 numbers, .* 588"),
    "an npy that is not there": (
        openai(lambda folder: (folder / "params_4.npy").unlink()),
        OSError,
        r"params_shapes\.json needs params_4\.npy beside it",
    ),
    "an npy of objects": (
        openai(lambda folder: np.save(folder / "params_3.npy", np.array([Payload(folder / "marker")]))),
        ValueError,
        r"params_3\.npy is damaged, or not a \.npy of plain numbers",
    ),
    "an npy of integers": (
        openai(lambda folder: np.save(folder / "params_3.npy", np.arange(58))),
        ValueError,
        r"params_3\.npy must hold an array of floats, got int64",
    ),
    "shapes that are not shapes": (openai(reshape_json), ValueError, r"params_shapes\.json has \[2, 2, 12\]"),
    "shapes of half a block": (
        openai(lambda folder: (folder / "params_shapes.json").write_text("[[6, 4], [19, 4], [1, 4, 12]]")),
        ValueError,
        r"params_shapes\.json lists 3 shapes",
    ),
    "shapes that are not JSON": (
        openai(lambda folder: (folder / "params_shapes.json").write_text("[[6, 4]")),
        ValueError,
        r"params_shapes\.json is not JSON",
    ),
    "no weights": (lambda folder: config().save_pretrained(folder), OSError, r"has no weights; looked for model\.safe"),
    "no config": (lambda folder: torch.save({}, folder / "pytorch_model.bin"), OSError, r"has no config\.json"),
}


@pytest.fixture
def no_model_is_touched(monkeypatch):
    def touched(self, *args, **kwargs):
        pytest.fail("weights were put into a model")

    monkeypatch.setattr(nn.Module, "load_state_dict", touched)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("no_model_is_touched")
def test_damaged_file(damage, tmp_path):
    write, error, message = DAMAGES[damage]
    write(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "marker").exists()


def without_group(file):
    del file["transformer/tf_open_aigptlm_head_model/transformer/h_._0/mlp"]


def without_layer(file):
    del file["transformer"]


def without_names(file):
    del file["transformer"].attrs["weight_names"]


def without_layers(file):
    del file.attrs["layer_names"]


def linked_out(file):
    h5py = sys.modules["h5py"]
    name = "transformer/tf_open_aigptlm_head_model/transformer/tokens_embed/weight:0"
    del file[name]
    file[name] = h5py.ExternalLink("other.h5", "/secret")


def stored_out(file):
    name = "transformer/tf_open_aigptlm_head_model/transformer/tokens_embed/weight:0"
    del file[name]
    file.create_dataset(name, (19, 4), "f4", external=[("secret.raw", 0, 304)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_group, "it has no .*/mlp/c_fc/weight:0"),
        (without_layer, "it has no transformer"),
        (without_names, "it has no weight_names on /transformer"),
        (without_layers, "it has no layer_names on /"),
        (linked_out, "it has no .*/tokens_embed/weight:0"),
        (stored_out, "tokens_embed/weight:0 is not an array stored in this file"),
    ],
)
@pytest.mark.usefixtures("no_model_is_touched")
def test_damaged_tensorflow_file(damage, message, tmp_path, h5py):
    shutil.copytree(DATA / "tf" / "OpenAIGPTLMHeadModel", tmp_path, dirs_exist_ok=True)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.ones((19, 4), np.float32)
    with h5py.File(tmp_path / "tf_model.h5", "r+") as file:
        damage(file)
    with pytest.raises(ValueError, match=rf"tf_model\.h5 is damaged, or not a Keras weights file: .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("fraction", [0, 0.3, 0.99])
@pytest.mark.usefixtures("h5py", "no_model_is_touched")
def test_truncated_tensorflow_file(fraction, tmp_path):
    shutil.copytree(DATA / "tf" / "OpenAIGPTLMHeadModel", tmp_path, dirs_exist_ok=True)
    data = (tmp_path / "tf_model.h5").read_bytes()
    (tmp_path / "tf_model.h5").write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match=r"tf_model\.h5 is damaged"):
        load(tmp_path)


# -- arguments --------------------------------------------------------------------------------------------------


def test_dtype(tmp_path):
    make().half().save_pretrained(tmp_path)
    assert load(tmp_path)[0].dtype == torch.float16
    assert load(tmp_path, dtype="auto")[0].dtype == torch.float16
    for dtype in (torch.float32, "float32", "torch.float32"):
        model, _ = load(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert load(tmp_path, torch_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load(tmp_path, gptfast.OpenAIGPTForSequenceClassification)[0].score.weight.dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .* got 'float33'"):
        load(tmp_path, dtype="float33")
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        load(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="are one argument; give one"):
        load(tmp_path, dtype="float32", torch_dtype="float16")


def test_dtype_of_older_configs_and_of_none(tmp_path):
    make().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path)[0].dtype == torch.float32
    (tmp_path / "config.json").write_text(json.dumps({**settings, "torch_dtype": "bfloat16"}))
    model, _ = load(tmp_path)
    assert model.dtype == torch.bfloat16
    model.float().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["dtype"] == "float32"
    assert "torch_dtype" not in saved


def test_config_overrides(tmp_path):
    make("OpenAIGPTModel").save_pretrained(tmp_path)
    model, _ = load(tmp_path, gptfast.OpenAIGPTForSequenceClassification, num_labels=5, resid_pdrop=0.3)
    assert model.score.weight.shape == (5, 4)
    assert model.config.resid_pdrop == 0.3
    with pytest.raises(TypeError, match=r"from_pretrained\(\) got low_memory, n_lables: neither"):
        load(tmp_path, n_lables=5, low_memory=True)
    with pytest.raises(ValueError, match="resid_pdrop must be in"):
        load(tmp_path, resid_pdrop=7)


def test_config_given(tmp_path):
    make().save_pretrained(tmp_path / "model")
    given = config(resid_pdrop=0.25)
    before = given.to_dict()
    model, _ = load(tmp_path / "model", config=given, embd_pdrop=0.5)
    assert given.to_dict() == before
    assert (model.config.resid_pdrop, model.config.embd_pdrop) == (0.25, 0.5)
    with pytest.raises(TypeError, match="config must be an OpenAIGPTConfig, or where to read one, got int"):
        load(tmp_path / "model", config=5)
    given.save_pretrained(tmp_path / "config")
    assert load(tmp_path / "model", config=tmp_path / "config")[0].config.resid_pdrop == 0.25


def test_state_dict_given_is_copied(tmp_path):
    source = make()
    state = source.state_dict()
    model, info = load(None, config=source.config, state_dict=state)
    assert nothing(info)
    assert_same_weights(model, source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(tensor.any() for tensor in state.values())
    with pytest.raises(TypeError, match="state_dict must hold tensors with data, got int under 'x'"):
        load(None, config=source.config, state_dict={"x": 1})
    with pytest.raises(ValueError, match="name_or_path may be None only with both config and state_dict"):
        load(None, state_dict=state)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_device(device_map, tmp_path):
    make().save_pretrained(tmp_path)
    with torch.device("meta"):
        assert load(tmp_path)[0].device.type == "meta"
        assert load(tmp_path, device_map=device_map)[0].device.type == "cpu"
        assert load(tmp_path, device="cpu")[0].device.type == "cpu"


def test_bad_device(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map must put the whole model on one device"):
        load(tmp_path, device_map={"transformer": 0, "lm_head": 1})
    with pytest.raises(ValueError, match="give one"):
        load(tmp_path, device="cpu", device_map="cpu")


def test_loaded_weights_are_not_views_of_the_file(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\x11" * size)
    assert_same_weights(loaded, model)


class WithBuffer(LM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]), persistent=False)
        self.register_buffer("steps", torch.tensor(7))


def test_buffers_of_a_subclass_survive(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, WithBuffer)
    assert info["missing_keys"] == {"steps"}
    assert torch.equal(loaded.scale, torch.tensor([1.0, 2.0]))
    assert loaded.steps == 7
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


class WithParameter(LM):
    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor([2.0, 3.0]))


def test_a_parameter_of_a_subclass_gets_its_constructors_value(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, WithParameter)
    assert info["missing_keys"] == {"temperature"}
    assert torch.equal(loaded.temperature, torch.tensor([2.0, 3.0]))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_no_weight_is_drawn_that_the_file_has():
    """Filling a meta tensor at random makes torch import torch._dynamo: 2 s on a first load."""

    class Recorder(TorchDispatchMode):
        filled = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.filled += func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        make()
    assert recorder.filled
    with Recorder() as recorder:
        load(DATA / "transformers-4.57.6", gptfast.OpenAIGPTDoubleHeadsModel)
    assert not recorder.filled


# -- a crash while saving ---------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


SAVES = {
    "safetensors": {},
    "shards": {"max_shard_size": 1000},
    "bin": {"safe_serialization": False},
    "bin shards": {"max_shard_size": 1000, "safe_serialization": False},
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SAVES, SAVES)))
def test_a_crash_leaves_the_old_weights_or_the_new(before, after, tmp_path, monkeypatch):
    old, new = make(seed=1), make(seed=2)
    older = {"safe_serialization": False}  # stays beside safetensors, and must not come back to light
    survivors = set()
    for crash_at in itertools.count():
        folder = tmp_path / str(crash_at)
        make(seed=3).save_pretrained(folder, **older)
        old.save_pretrained(folder, **SAVES[before])
        steps = itertools.count()
        with monkeypatch.context() as patch:
            for step in ("replace", "unlink"):
                original = getattr(Path, step)

                def crashing(self, *args, original=original, crash_at=crash_at, steps=steps, **kwargs):
                    if next(steps) == crash_at:
                        raise Crash
                    return original(self, *args, **kwargs)

                patch.setattr(Path, step, crashing)
            try:
                new.save_pretrained(folder, **SAVES[after])
            except Crash:
                finished = False
            else:
                finished = True
        loaded, info = load(folder)
        assert nothing(info)
        is_new = torch.equal(loaded.lm_head.weight, new.lm_head.weight)
        assert_same_weights(loaded, new if is_new else old)
        survivors.add("new" if is_new else "old")
        if finished:
            assert is_new
            break
    assert survivors == {"old", "new"}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SAVES, SAVES)))
def test_what_an_earlier_save_left_is_removed(before, after, tmp_path):
    make(seed=1).save_pretrained(tmp_path, **SAVES[before])
    first = {path.name for path in tmp_path.iterdir()}
    make(seed=2).save_pretrained(tmp_path, **SAVES[after])
    _, path = read_state_dict(tmp_path)
    shards = json.loads(path.read_text())["weight_map"].values() if path.suffix == ".json" else ()
    kept = first if "bin" in before and "bin" not in after else set()  # read after the new ones: not in the way
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", path.name, *shards, *kept}


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = make(seed=1)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("gptfast.checkpoint.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        make(seed=2, n_layer=1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_files_in_the_folder_stay(tmp_path):
    kept = {"vocab.json", "model-00001.txt", "tf_model.h5", "model.onnx", "README.md"}
    for name in kept:
        (tmp_path / name).write_text(name)
    make(seed=1).save_pretrained(tmp_path, max_shard_size=1000)
    make(seed=2).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == kept | {"model.safetensors", "config.json", "generation_config.json"}


# -- finding files ----------------------------------------------------------------------------------------------


def test_resolve_files_in_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "sub" / "b.json").write_text("{}")
    assert resolve_files(tmp_path, ["b.json", "a.json"]) == {"a.json": tmp_path / "a.json"}
    assert resolve_files(str(tmp_path), ["a.json", "b.json"], subfolder="sub") == {
        "b.json": tmp_path / "sub" / "b.json"
    }
    assert resolve_files(tmp_path, ["c.json"]) == {}


@pytest.mark.parametrize("name", ["./x", "/nowhere/at/all", "a/b/c", "../up", "..."])
def test_neither_folder_nor_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"is not a folder; accepted are"):
        resolve_files(name, ["config.json"], local_files_only=True)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(OSError, match=r"model\.bin is not a folder"):
        resolve_files(tmp_path / "model.bin", ["config.json"])


def test_hub_cache_offline(tmp_path):
    pytest.importorskip("huggingface_hub", reason="reads the Hub's cache")
    repository = tmp_path / "models--someone--tiny-gpt"
    snapshot = repository / "snapshots" / ("0" * 40)
    model = make()
    model.save_pretrained(snapshot, max_shard_size=1000, safe_serialization=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded, info = load("someone/tiny-gpt", cache_dir=tmp_path, local_files_only=True)
    assert nothing(info)
    assert_same_weights(loaded, model)
    assert loaded.name_or_path == "someone/tiny-gpt"
    with pytest.raises(
        OSError, match=r"someone/other is not a folder here, .* out of reach .* hf download someone/other"
    ):
        load("someone/other", cache_dir=tmp_path, local_files_only=True)


def test_hub_answers(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="stands in for the Hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    asked = []

    def raised(kind, **attributes):
        error = kind.__new__(kind)  # their constructors want an HTTP response
        error.args = ("from the Hub",)
        return error

    def download(name, filename, **kwargs):
        asked.append((filename, kwargs["local_files_only"]))
        if name == "no/repository":
            raise raised(errors.RepositoryNotFoundError)
        if name == "no/network":
            raise errors.LocalEntryNotFoundError("offline")
        if name == "not/allowed":
            raise raised(errors.GatedRepoError)
        if filename == "absent":
            raise raised(errors.RemoteEntryNotFoundError)
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    found = resolve_files("a/b", ["absent", "x", "y"], token="t", revision="r")
    assert found == {"x": tmp_path / "x", "y": tmp_path / "y"}
    assert resolve_files("a/b", ["absent", "x", "y"], first_only=True) == {"x": tmp_path / "x"}
    for name in ("no/repository", "not/allowed"):
        with pytest.raises(OSError, match=f"{name} is neither a folder here nor a repository .* that you may read"):
            resolve_files(name, ["x"])
    asked.clear()
    with pytest.raises(OSError, match=r"no/network .*cache has no x or y of no/network") as caught:
        resolve_files("no/network", ["x", "y"])
    assert "\n" not in str(caught.value)
    assert asked == [("x", False), ("y", True)]  # a second time-out is not waited for


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'openai-community/openai-gpt .*pip install "gptfast-kernels\[hf\]"'):
        resolve_files("openai-community/openai-gpt", ["config.json"])


def test_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'tf_model\.h5 needs h5py: pip install "gptfast-kernels\[convert\]"'):
        load_pretrained(LM, DATA / "tf" / "OpenAIGPTLMHeadModel")
