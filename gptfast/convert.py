"""Weights from before PyTorch, read as PyTorch state dicts: TensorFlow's ``tf_model.h5`` and OpenAI's ``params_*.npy``.
TensorFlow's are written too, by ``save_tensorflow``.

Both readers give CPU tensors under HuggingFace's keys, checked for completeness; a damaged file is a ValueError that
names it. Whether the tensors fit a model is ``checkpoint``'s business.

HuggingFace's TensorFlow classes computed the exact (erf) GELU whatever ``config.afn`` said, its PyTorch classes the
tanh form. Their files load with what the config says, as in HuggingFace's own conversion; ``afn="gelu_erf"`` gives the
numbers TensorFlow gave.
"""

import json
import math
import os
import tempfile
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .linear import check_savable

# What Keras calls an instance of HuggingFace's TF class, by the name of ours.
_TENSORFLOW_MODELS = {
    "OpenAIGPTModel": "tf_open_aigpt_model",
    "OpenAIGPTLMHeadModel": "tf_open_aigptlm_head_model",
    "OpenAIGPTDoubleHeadsModel": "tf_open_aigpt_double_heads_model",
    "OpenAIGPTForSequenceClassification": "tf_open_aigpt_for_sequence_classification",
}
_TENSORFLOW_LEAVES = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias"}

# A block's tensors in the order of OpenAI's files.
_OPENAI_BLOCK = [
    f"{module}.{leaf}"
    for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    for leaf in ("weight", "bias")
]


def read_json(path: Path, kind: type) -> Any:
    """The JSON value of a file, which must be of the given type."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, got {type(value).__name__}")
    return value


# -- TensorFlow -------------------------------------------------------------------------------------------------


def read_tensorflow_h5(path: Path) -> dict[str, Tensor]:
    """Weights of any of HuggingFace's TF classes.

    Keras lists its layers in the file's attribute ``layer_names``, a layer's variables in the group's ``weight_names``;
    a variable is the dataset ``<layer>/<model>/<layer>/…``. Links and storage that lead out of the file are refused.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{path} needs h5py: pip install "gptfast-kernels[convert]"') from error
    try:
        with h5py.File(path, "r") as file:
            items: dict[str, Any] = {}
            file.visititems(items.__setitem__)  # follows no link
            state_dict = {}
            for layer in _names(file, "layer_names"):
                for variable in _names(items[layer], "weight_names"):
                    dataset = items[f"{layer}/{variable}"]
                    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
                        raise ValueError(f"{dataset.name} is not an array stored in this file")
                    key, tensor = from_tensorflow(variable.partition("/")[2], torch.from_numpy(dataset[()]))
                    state_dict[key] = tensor
    except KeyError as error:
        raise ValueError(f"{path} is damaged, or not a Keras weights file: it has no {error.args[0]}") from error
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not a Keras weights file: {error}") from error
    return state_dict


def _names(group: Any, attribute: str) -> list[str]:
    if attribute not in group.attrs:
        raise KeyError(f"{attribute} on {group.name}")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs[attribute]]


def from_tensorflow(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """PyTorch's key and tensor for a TF variable without its model's name: ``transformer/h_._0/ln_1/gamma:0``."""
    *path, leaf = name.removesuffix(":0").replace("_._", "/").split("/")
    if leaf == "kernel":
        tensor = tensor.t()  # Keras's Dense is [in, out]; Conv1D is so in PyTorch too
    elif leaf == "bias":
        tensor = tensor.reshape(-1)  # Conv1D's is [1, out]
    return ".".join([*path, _TENSORFLOW_LEAVES.get(leaf, leaf)]), tensor


def save_tensorflow(model: Any, folder: str | os.PathLike) -> None:
    """Writes config.json and tf_model.h5 as HuggingFace's TF class of the model's name has them, in float32.

    That class computes the exact (erf) GELU whatever ``config.afn`` says: its numbers are those of ``afn="gelu_erf"``.

    Args:
        model: one of gptfast's or transformers' OpenAI GPT models.
        folder: made if need be.

    Raises:
        TypeError: ``model`` is of no class that TensorFlow had. ValueError: its LM head is not tied, as TensorFlow's
        always is; or it holds adapters or int8 weights. ImportError: h5py is not installed.
    """
    kind = type(model).__name__
    if kind not in _TENSORFLOW_MODELS:
        raise TypeError(f"model must be one of {', '.join(_TENSORFLOW_MODELS)}, got {kind}")
    try:
        import h5py
    except ImportError as error:
        raise ImportError('tf_model.h5 needs h5py: pip install "gptfast-kernels[convert]"') from error
    check_savable(model)
    state_dict = model.state_dict()
    head = state_dict.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state_dict["transformer.tokens_embed.weight"]):
        raise ValueError("model has an LM head of its own: TensorFlow's classes have none but the token table")

    for key in state_dict:
        if key.rpartition(".")[2] not in ("weight", "bias") or "base_layer" in key or "lora" in key:
            raise ValueError(f"model has {key}, which TensorFlow's class has not: merge adapters first")

    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in state_dict.items():
        if "transformer." not in key and kind == "OpenAIGPTModel":
            key = f"transformer.{key}"
        name, array = _to_tensorflow(key, tensor)
        layers.setdefault(key.partition(".")[0], {})[f"{_TENSORFLOW_MODELS[kind]}/{name}"] = array

    path = Path(folder) / "tf_model.h5"
    model.config.save_pretrained(folder)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
        with h5py.File(Path(aside) / path.name, "w") as file:
            file.attrs["backend"], file.attrs["layer_names"] = "tensorflow", list(layers)
            file.create_group("top_level_model_weights").attrs["weight_names"] = []
            for layer, variables in layers.items():
                group = file.create_group(layer)
                group.attrs["weight_names"] = list(variables)
                for name, array in variables.items():
                    group[name] = array
        (Path(aside) / path.name).replace(path)


def _to_tensorflow(key: str, tensor: Tensor) -> tuple[str, np.ndarray]:
    """``from_tensorflow``'s inverse: ``transformer.h.0.ln_1.weight`` -> ``transformer/h_._0/ln_1/gamma:0``."""
    *path, leaf = key.split(".")
    if path[-1] in ("ln_1", "ln_2"):
        leaf = {"weight": "gamma", "bias": "beta"}[leaf]
    elif path[-1] == "positions_embed":
        leaf = "embeddings"
    elif path[0] != "transformer" and leaf == "weight":
        leaf, tensor = "kernel", tensor.t()
    elif path[0] == "transformer" and leaf == "bias":
        tensor = tensor[None]
    name = "/".join([*path, leaf]).replace("/h/", "/h_._")
    return f"{name}:0", tensor.detach().float().cpu().contiguous().numpy()


# -- OpenAI -----------------------------------------------------------------------------------------------------


def read_openai_npy(shapes_file: Path, parts: Sequence[Path]) -> dict[str, Tensor]:
    """Weights of OpenAI's finetune-transformer-lm: one flat array cut into files without regard to tensors.

    Args:
        shapes_file: params_shapes.json, a list of shapes: positions, tokens, then 12 a block.
        parts: params_0.npy to params_9.npy.
    """
    shapes = read_json(shapes_file, list)
    if len(shapes) < 2 or (len(shapes) - 2) % len(_OPENAI_BLOCK):
        raise ValueError(f"{shapes_file} lists {len(shapes)} shapes, expected 2 and then {len(_OPENAI_BLOCK)} a block")
    for shape in shapes:
        sizes_given = isinstance(shape, list) and shape and all(isinstance(n, int) and n > 0 for n in shape)
        if not sizes_given or math.prod(shape[:-2]) != 1:
            raise ValueError(f"{shapes_file} has {shape!r} where a shape is expected: [n], [n, m] or [1, n, m]")
    blocks = range((len(shapes) - 2) // len(_OPENAI_BLOCK))
    keys = [
        "positions_embed.weight",
        "tokens_embed.weight",
        *(f"h.{n}.{leaf}" for n in blocks for leaf in _OPENAI_BLOCK),
    ]

    arrays = [_read_npy(part) for part in parts]
    sizes = [math.prod(shape) for shape in shapes]
    held = sum(array.size for array in arrays)
    if held != sum(sizes):
        files = f"{parts[0]} to {parts[-1].name}"
        raise ValueError(f"{files} hold {held:,} numbers, {shapes_file.name} describes {sum(sizes):,}")
    tensors = torch.from_numpy(np.concatenate(arrays, dtype=np.float32)).split(sizes)
    # the leading 1 of a convolution's weight, [1, in, out], goes
    return {key: t.view(shape[-2:]) for key, t, shape in zip(keys, tensors, shapes, strict=True)}


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, PermissionError):
        raise
    except (EOFError, OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
        raise ValueError(f"{path} is damaged, or not a .npy of plain numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"{path} must hold an array of floats, got {getattr(array, 'dtype', type(array).__name__)}")
    return array.reshape(-1)
