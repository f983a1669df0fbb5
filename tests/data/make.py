"""Made the files beside it: checkpoints written by TensorFlow and transformers themselves, and what those compute.

    python make.py tf       with transformers 4.57.6, tf-keras, TensorFlow 2.21: tf/<class>/, tf/expected.safetensors
    python make.py 4.57.6   with transformers 4.57.6: transformers-4.57.6/, an OpenAIGPTDoubleHeadsModel in both formats
    python make.py 5.23.0   with transformers 5.23.0: the same from 5.x

Weights are random; their scale is such that a wrong, transposed or swapped one shows.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
rng = np.random.default_rng(0)
input_ids = rng.integers(0, 19, (2, 3, 5))  # [B, choices, T]
mc_token_ids = np.array([[4, 2, 3], [1, 4, 0]])


def config(n_layer: int) -> transformers.OpenAIGPTConfig:
    return transformers.OpenAIGPTConfig(
        vocab_size=19, n_positions=6, n_embd=4, n_layer=n_layer, n_head=2, num_labels=3, pad_token_id=0
    )


def outputs(model, name: str, tensor, **kwargs) -> dict[str, np.ndarray]:
    """What a model computes, by attribute of its output."""
    ids = input_ids if "DoubleHeads" in name else input_ids[:, 0]
    if "DoubleHeads" in name:
        kwargs["mc_token_ids"] = tensor(mc_token_ids)
    output = model(tensor(ids), **kwargs)
    return {key: output[key].numpy() for key in ("last_hidden_state", "logits", "mc_logits") if key in output}


def make_tf() -> None:
    sys.modules["triton"] = None  # its LLVM and TensorFlow's do not share a process
    import tensorflow as tf
    from transformers.modeling_tf_pytorch_utils import load_tf2_checkpoint_in_pytorch_model

    expected = {"input_ids": input_ids, "mc_token_ids": mc_token_ids}
    for kind in ("Model", "LMHeadModel", "DoubleHeadsModel", "ForSequenceClassification"):
        name = f"OpenAIGPT{kind}"
        settings = config(2 if kind == "Model" else 1)
        model = getattr(transformers, f"TF{name}")(settings)
        outputs(model, name, tf.constant)  # builds the weights
        for weight in model.weights:
            weight.assign(rng.normal(0.1, 0.5, weight.shape).astype(np.float32))
        model.save_pretrained(HERE / "tf" / name)
        converted = getattr(transformers, name)(settings).eval()
        # from_pretrained(from_tf=True) of 4.57.6 leaves every weight on the meta device
        h5 = str(HERE / "tf" / name / "tf_model.h5")
        load_tf2_checkpoint_in_pytorch_model(converted, h5, allow_missing_keys=True)
        for key, array in outputs(model, name, tf.constant, training=False).items():
            expected[f"{name}.tensorflow.{key}"] = array
        with torch.no_grad():
            for key, array in outputs(converted, name, torch.tensor).items():
                expected[f"{name}.pytorch.{key}"] = array
    save_file(expected, HERE / "tf" / "expected.safetensors")


def make_transformers(version: str) -> None:
    assert transformers.__version__ == version
    folder = HERE / f"transformers-{version}"
    name = "OpenAIGPTDoubleHeadsModel"
    model = getattr(transformers, name)(config(2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0.1, 0.5, tuple(parameter.shape))))
        expected = outputs(model, name, torch.tensor)
    model.save_pretrained(folder)
    if version.startswith("4."):
        model.save_pretrained(folder, safe_serialization=False)
    save_file({"input_ids": input_ids, "mc_token_ids": mc_token_ids, **expected}, folder / "expected.safetensors")


if __name__ == "__main__":
    make_tf() if sys.argv[1] == "tf" else make_transformers(sys.argv[1])
