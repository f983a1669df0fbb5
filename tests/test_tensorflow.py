"""tf_model.h5, written as TensorFlow wrote the files in tests/data/tf."""

from pathlib import Path

import pytest
import torch

import gptfast
from gptfast.convert import save_tensorflow
from gptfast.linear import quantize

h5py = pytest.importorskip("h5py", reason="writes TensorFlow's files")

DATA = Path(__file__).parent / "data" / "tf"
KINDS = ["OpenAIGPTModel", "OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification"]


def contents(path):
    """(datasets by path, names that Keras looks up), all that a file says."""
    arrays, names = {}, {}
    with h5py.File(path) as file:
        file.visititems(lambda name, x: arrays.update({name: x[()]}) if isinstance(x, h5py.Dataset) else None)
        for name in ["/", *file]:
            attribute = "layer_names" if name == "/" else "weight_names"
            names[name] = sorted(n.decode() if isinstance(n, bytes) else str(n) for n in file[name].attrs[attribute])
    return arrays, names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_of_tensorflows_is_written_again(kind, dtype, tmp_path):
    model = getattr(gptfast, kind).from_pretrained(DATA / kind, dtype=dtype)
    save_tensorflow(model, tmp_path)
    arrays, names = contents(tmp_path / "tf_model.h5")
    expected, expected_names = contents(DATA / kind / "tf_model.h5")
    assert names == expected_names
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert (array == expected[name]).all(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tf_model.h5"]
    again = getattr(gptfast, kind).from_pretrained(tmp_path)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key].float()), key


@pytest.mark.parametrize("package", ["gptfast.hf", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_models(package, kind, tmp_path):
    pytest.importorskip("transformers", minversion="5", reason="saves transformers' models")
    module = pytest.importorskip(package)
    ours = getattr(gptfast, kind).from_pretrained(DATA / kind)
    ours.save_pretrained(tmp_path / "a")
    save_tensorflow(getattr(module, kind).from_pretrained(tmp_path / "a"), tmp_path / "b")
    again = getattr(gptfast, kind).from_pretrained(tmp_path / "b")
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_what_tensorflow_has_no_class_for(tmp_path):
    config = gptfast.OpenAIGPTConfig(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(TypeError, match="got Linear"):
        save_tensorflow(torch.nn.Linear(2, 2), tmp_path)
    for kind in KINDS[:2]:
        with pytest.raises(ValueError, match="model has int8 weights"):
            save_tensorflow(quantize(getattr(gptfast, kind)(config).eval()), tmp_path)
    adapted = gptfast.OpenAIGPTModel(config)
    adapted.h[0].attn.c_attn = torch.nn.ModuleDict({"base_layer": adapted.h[0].attn.c_attn})
    with pytest.raises(ValueError, match="merge adapters"):
        save_tensorflow(adapted, tmp_path)
    config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="LM head of its own"):
        save_tensorflow(gptfast.OpenAIGPTLMHeadModel(config), tmp_path)
    assert not list(tmp_path.iterdir())
