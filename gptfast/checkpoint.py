"""Checkpoints: every file format GPT-1 came in is read, HuggingFace's is written.

Reading goes in steps, and a model's weights are touched only in the last:

    resolve_files     a folder or a Hub name   -> paths
    read_state_dict   paths                    -> tensors under the file's keys
    _match            tensors, a meta model    -> tensors under the model's keys; missing, unexpected, mismatched ones
    load_pretrained   … put into the model

Errors: OSError where a file is not there, ValueError where it is damaged or refused, RuntimeError where sound tensors
do not fit the model. Each names the file.
"""

import copy
import json
import logging
import math
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import CONFIG_NAME
from .convert import from_tensorflow, read_json, read_openai_npy, read_tensorflow_h5
from .linear import check_savable

logger = logging.getLogger(__name__)

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
TENSORFLOW, OPENAI = "tf_model.h5", "params_shapes.json"
INDEX = ".index.json"
WEIGHTS = (SAFETENSORS, SAFETENSORS + INDEX, BIN, BIN + INDEX, TENSORFLOW, OPENAI)  # the first one present is read

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TOKENS, HEAD = "tokens_embed.weight", "lm_head.weight"  # one tensor, unless the config unties them

# Causal masks and position numbers that older releases kept among the weights.
_LEGACY_BUFFER = re.compile(r"(h\.\d+\.attn\.bias|attn\.bias|position_ids)")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}

# What torch's unpickler runs into on bytes that are no pickle.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


# -- finding files ----------------------------------------------------------------------------------------------


def resolve_files(
    name_or_path: str | os.PathLike,
    filenames: Sequence[str],
    *,
    first_only: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str = "",
) -> dict[str, Path]:
    """Paths of those of ``filenames`` that a checkpoint has.

    Args:
        name_or_path: a folder, or the name of a repository on the HuggingFace Hub, whose files are downloaded once.
        filenames: names relative to the folder.
        first_only: stop at the first one found.
        revision, cache_dir, local_files_only, token: for the Hub, as huggingface_hub has them.
        subfolder: folder below ``name_or_path`` to look in.

    Raises:
        OSError: there is neither such a folder nor such a repository, or it can't be reached and is not in the cache.
        ImportError: a Hub name, and huggingface_hub is not installed.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        found = {name: folder / subfolder / name for name in filenames if (folder / subfolder / name).is_file()}
        return dict(list(found.items())[:1]) if first_only else found

    name = str(name_or_path)
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise OSError(f"{name} is not a folder; accepted are a folder and a Hub name like openai-community/openai-gpt")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ImportError(f'{name} is not a folder; to look on the Hub: pip install "gptfast-kernels[hf]"') from error

    found, unreachable = {}, None
    for filename in filenames:
        try:
            path = hf_hub_download(
                name,
                filename,
                subfolder=subfolder or None,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                token=token,
                local_files_only=local_files_only or unreachable is not None,  # one time-out is enough
            )
        except LocalEntryNotFoundError as error:
            unreachable = error
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise OSError(
                f"{name} is neither a folder here nor a repository on the HuggingFace Hub that you may read"
                f"{f' at revision {revision}' if revision else ''}; check the name, or pass token="
            ) from error
        except EntryNotFoundError:
            continue
        except HfHubHTTPError as error:
            raise OSError(f"{name}: the HuggingFace Hub answered for {filename}: {error}") from error
        else:
            found[filename] = Path(path)
            if first_only:
                break
    if unreachable is not None and not found:
        raise OSError(
            f"{name} is not a folder here, the HuggingFace Hub is out of reach (no network, or offline mode), and its "
            f"cache has no {' or '.join(filenames)} of {name}; with a network, run once: hf download {name}"
        ) from unreachable
    return found


# -- reading ----------------------------------------------------------------------------------------------------


def read_state_dict(
    name_or_path: str | os.PathLike, weights: Sequence[str] = WEIGHTS, **hub: Any
) -> tuple[dict[str, Tensor], Path]:
    """A checkpoint's tensors under the keys it has them, and the file they came from.

    The tensors of a ``.safetensors`` are views of the mapped file: copy before use.

    Args:
        name_or_path: a folder or a Hub name.
        weights: names out of ``WEIGHTS``; the first that is present is read.
        hub: keywords of ``resolve_files``.
    """
    files = resolve_files(name_or_path, weights, first_only=True, **hub)
    if not files:
        raise OSError(f"{name_or_path} has no weights; looked for {', '.join(weights)}")
    (filename, path), *_ = files.items()
    if filename == OPENAI:
        parts = _resolve_all(name_or_path, [f"params_{n}.npy" for n in range(10)], path, **hub)
        return read_openai_npy(path, list(parts.values())), path
    if filename.endswith(INDEX):
        return _read_shards(name_or_path, path, **hub), path
    return _read_file(path), path


def _read_shards(name_or_path: str | os.PathLike, index: Path, **hub: Any) -> dict[str, Tensor]:
    weight_map = read_json(index, dict).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from keys to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} points at {name!r}, outside its own folder: refused")
    files = _resolve_all(name_or_path, names, index, **hub)
    count = re.search(r"-of-(\d+)\.\w+$", names[0])
    if count and int(count[1]) != len(names):
        raise ValueError(f"{index} lists {len(names)} of {int(count[1])} shards")

    state_dict: dict[str, Tensor] = {}
    for name, path in files.items():
        shard = _read_file(path)
        keys = [key for key, shard_name in weight_map.items() if shard_name == name]
        lost = [key for key in keys if key not in shard]
        if lost:
            raise ValueError(f"{path} lacks {', '.join(lost)}, which {index.name} says it has")
        state_dict.update((key, shard[key]) for key in keys)
    return state_dict


def _resolve_all(
    name_or_path: str | os.PathLike, filenames: Sequence[str], wanted_by: Path, **hub: Any
) -> dict[str, Path]:
    files = resolve_files(name_or_path, filenames, **hub)
    absent = [name for name in filenames if name not in files]
    if absent:
        raise OSError(f"{wanted_by} needs {', '.join(absent)} beside it: not there")
    return files


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return read_tensorflow_h5(path) if path.suffix == ".h5" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            written_by = (file.metadata() or {}).get("format", "pt")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error
    if written_by == "tf":
        return dict(from_tensorflow(name, tensor) for name, tensor in tensors.items())
    return tensors


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU; ValueError where it is damaged or more than tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except _UNPICKLING_ERRORS as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise ValueError(f"{path} is refused: it would run {wanted[1]}, and only tensors are loaded") from error
        raise ValueError(f"{path} is damaged, or not a PyTorch file: {str(error).partition(chr(10))[0]}") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    state_dict = read_pickle(path)
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{path} must hold a state dict, got {type(state_dict).__name__}")
    for key, tensor in state_dict.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not isinstance(key, str) or not dense:
            raise ValueError(f"{path} must hold tensors by name, got {type(tensor).__name__} under {key!r}")
    return dict(state_dict)


# -- matching a model -------------------------------------------------------------------------------------------


@dataclass
class _Match:
    tensors: dict[str, Tensor]  # by the model's keys, of the model's shapes
    missing: set[str]  # the model's keys
    unexpected: set[str]  # the file's keys
    mismatched: set[tuple[str, torch.Size, torch.Size]]  # model's key, shape in the file, shape in the model
    untied: bool  # the file has a head that is not the token table


def _match(model: nn.Module, state_dict: dict[str, Tensor], source: str, tied: bool) -> _Match:
    """Finds each of the model's tensors in a state dict of any head, any release and any wrapper.

    Raises:
        ValueError: two keys of the file mean the same tensor. RuntimeError: a tensor's dtype cannot be the weight's, or
        no tensor is one of the model's.
    """
    prefix = f"{model.base_model_prefix}."
    given: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        name = _plain_key(key).removeprefix(prefix)
        if _LEGACY_BUFFER.fullmatch(name):
            continue
        if name in given:
            raise ValueError(f"{source} has both {given[name][0]} and {key}, which mean the same weight")
        given[name] = key, tensor
    expected = model.state_dict()
    wanted = {key.removeprefix(prefix): key for key in expected}

    untied = False
    if tied and HEAD in given:
        if TOKENS not in given:
            given[TOKENS] = given.pop(HEAD)
        elif HEAD in wanted:
            untied = not _equal(given[TOKENS][1], given[HEAD][1])
            if not untied:
                del given[HEAD]

    match = _Match({}, set(), set(), set(), untied)
    misfits = []
    for name, key in wanted.items():
        if name not in given:
            match.missing.add(key)
            continue
        _, tensor = given.pop(name)
        if tensor.is_floating_point() != expected[key].is_floating_point():
            misfits.append(f"{key} is {tensor.dtype}, the model's {expected[key].dtype}")
        elif tensor.shape != expected[key].shape:
            match.mismatched.add((key, tensor.shape, expected[key].shape))
        else:
            match.tensors[key] = tensor
    if misfits:
        raise RuntimeError(f"{source} does not fit {type(model).__name__}: {'; '.join(misfits)}")
    if not match.tensors and not match.mismatched:
        keys = ", ".join(sorted(state_dict)[:3]) or "nothing"
        raise RuntimeError(f"{source} does not fit {type(model).__name__}: it has none of its weights, but {keys}")
    if tied and wanted.get(TOKENS) not in match.missing:
        match.missing.discard(HEAD)
    match.unexpected = {key for key, _ in given.values()}
    return match


def _check_state_dict(state_dict: Mapping[str, Tensor]) -> None:
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise TypeError(f"state_dict must hold tensors with data, got {type(tensor).__name__} under {key!r}")


def _plain_key(key: str) -> str:
    """A key without what torch.compile, DDP and FSDP put into it, and with today's names for LayerNorm's weights."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join([*parts[:-1], _OLD_LEAVES.get(parts[-1], parts[-1])]) if parts else key


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


# -- loading ----------------------------------------------------------------------------------------------------


def load_pretrained(
    cls: type,
    name_or_path: str | os.PathLike | None,
    *,
    config: Any = None,
    state_dict: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: Any = None,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    use_safetensors: bool | None = None,
    from_tf: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str = "",
    **config_overrides: Any,
) -> Any:
    """A model of class ``cls`` with a checkpoint's weights, in eval mode.

    The first of ``model.safetensors``, its sharded index, ``pytorch_model.bin``, its sharded index, ``tf_model.h5`` and
    OpenAI's ``params_shapes.json`` + ``params_*.npy`` is read. A checkpoint of any head loads into any other: what the
    model lacks is ignored, what the file lacks is newly initialised, and both are logged as a warning.

    Args:
        name_or_path: a folder or a Hub name. None with ``config`` and ``state_dict``.
        config: an OpenAIGPTConfig (copied) or where to read one, in place of the checkpoint's own config.json.
            OpenAI's files have none: they get the default one.
        state_dict: tensors to load (copied) in place of the checkpoint's.
        dtype: float32, bfloat16, float16 or float64, as a torch.dtype or its name. None or "auto": the config's, else
            the file's. ``torch_dtype`` is its older name.
        device: where to put the weights. ``device_map`` is HuggingFace's word: a device, {"": device} or "auto".
        ignore_mismatched_sizes: newly initialise weights whose shape differs from the file's, instead of raising.
        output_loading_info: return (model, {"missing_keys", "unexpected_keys", "mismatched_keys"}), each a set.
        use_safetensors: read only safetensors (True) or anything else (False). from_tf: read ``tf_model.h5``.
        revision, cache_dir, local_files_only, token, subfolder: as ``resolve_files`` has them.
        config_overrides: attributes of the config, such as ``num_labels=5``.

    Raises:
        TypeError: a keyword is neither of these nor a config's attribute. ValueError: an argument's value is not
            accepted, or a file is damaged or refused. OSError: a file is not there. RuntimeError: weights do not fit
            the model.
    """
    if dtype is not None and torch_dtype is not None:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} are one argument; give one")
    target_dtype = _dtype("dtype", torch_dtype if dtype is None else dtype)
    target_device = _device(device, device_map)
    hub = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "token": token,
        "subfolder": subfolder,
    }
    if name_or_path is None and (state_dict is None or config is None):
        raise ValueError("name_or_path may be None only with both config and state_dict")

    config = _config(cls, name_or_path, config, config_overrides, hub)
    if state_dict is None:
        assert name_or_path is not None
        tensors, path = read_state_dict(name_or_path, _formats(use_safetensors, from_tf), **hub)
        source = str(path)
    else:
        _check_state_dict(state_dict)
        tensors, source = dict(state_dict), "state_dict"
    if target_dtype is None:
        saved = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        first = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        target_dtype = _dtype(f"{name_or_path}'s dtype", saved) or _dtype(f"{source}'s dtype", first)

    with torch.device("meta"), _SkipInit():
        model = cls(config)
    if next(model.buffers(), None) is not None:  # a subclass's; their values come from its constructor
        model = cls(config)
    match = _match(model, tensors, source, tied=model.config.tie_word_embeddings)
    del tensors
    if match.mismatched and not ignore_mismatched_sizes:
        shapes = "; ".join(f"{key} is {list(a)}, the model's {list(b)}" for key, a, b in sorted(match.mismatched))
        raise RuntimeError(
            f"{source} does not fit {cls.__name__} with this config: {shapes}. "
            "ignore_mismatched_sizes=True initialises these newly"
        )

    _initialize(model, match.missing | {key for key, *_ in match.mismatched})
    model.to(dtype=target_dtype)
    weights = {}
    while match.tensors:  # one by one, so that no more than one tensor is held twice
        key, tensor = match.tensors.popitem()
        to_dtype = target_dtype if tensor.is_floating_point() else tensor.dtype
        weights[key] = tensor.detach().to(target_device, to_dtype, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(weights, strict=False, assign=True)
    if match.untied:
        model.config.tie_word_embeddings = False
    model.tie_weights()
    model.to(target_device).eval()
    model.name_or_path = "" if name_or_path is None else str(name_or_path)

    _report(cls.__name__, source, match)
    if output_loading_info:
        keys = {"missing_keys": match.missing, "unexpected_keys": match.unexpected, "mismatched_keys": match.mismatched}
        return model, keys
    return model


def _dtype(argument: str, value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or value == "auto":
        return None
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{argument} must be one of {names} or auto, got {value!r}")
    return dtype


def _device(device: Any, device_map: Any) -> torch.device:
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} were both given; give one")
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(f'device_map must put the whole model on one device, {{"": "cuda:0"}}, got {device_map}')
        device_map = device_map[""]
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = device_map if device is None else device
    return torch.get_default_device() if chosen is None else torch.device(chosen)


def _formats(use_safetensors: bool | None, from_tf: bool) -> Sequence[str]:
    if from_tf:
        if use_safetensors:
            raise ValueError(f"from_tf=True reads {TENSORFLOW}; use_safetensors=True contradicts it")
        return (TENSORFLOW,)
    if use_safetensors is None:
        return WEIGHTS
    return [name for name in WEIGHTS if name.startswith(SAFETENSORS) == use_safetensors]


def _config(cls: type, name_or_path: Any, config: Any, overrides: Mapping[str, Any], hub: Mapping[str, Any]) -> Any:
    """A config of the caller's own to build the model from."""
    config_class = cls.config_class  # type: ignore[attr-defined]
    if isinstance(config, str | os.PathLike):
        config = config_class.from_pretrained(config)
    elif config is None:
        if OPENAI in resolve_files(name_or_path, [CONFIG_NAME, OPENAI], first_only=True, **hub):
            config = config_class()
        else:
            config = config_class.from_pretrained(name_or_path, **hub)
    elif not hasattr(config, "to_dict"):
        raise TypeError(f"config must be an {config_class.__name__}, or where to read one, got {type(config).__name__}")
    unknown = set(overrides) - {"num_labels", *config.attribute_map, *config.to_dict()}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise TypeError(f"from_pretrained() got {names}: neither an argument nor an attribute of the config")
    return type(config).from_dict(config.to_dict(), **overrides) if overrides else copy.deepcopy(config)


class _SkipInit(TorchFunctionMode):
    """torch.nn.init does nothing: on meta there is nothing to fill, and torch imports its compiler to find that out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _initialize(model: nn.Module, keys: Iterable[str]) -> None:
    """Draws a meta model's weights under ``keys`` as its constructor would; the others stay on meta."""
    keys = set(keys)
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False) if f"{path}.{name}".lstrip(".") in keys]
        for name in names:
            parameter = module.get_parameter(name)
            blank = torch.full_like(parameter, math.nan, device="cpu")
            setattr(module, name, nn.Parameter(blank, requires_grad=parameter.requires_grad))
        if names:
            model._init_weights(module)  # type: ignore[operator]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left = [key for key in keys & parameters.keys() if parameters[key].isnan().any()]
    if left:  # a subclass's, which only its constructor knows how to fill
        fresh = type(model)(model.config)
        for key in left:
            parameters[key].data.copy_(fresh.get_parameter(key))


def _report(model: str, source: str, match: _Match) -> None:
    lines = []
    if match.missing:
        lines.append(f"not in the file, newly initialised, train before use: {', '.join(sorted(match.missing))}")
    if match.mismatched:
        keys = (f"{key} ({list(a)} in the file, {list(b)} in the model)" for key, a, b in sorted(match.mismatched))
        lines.append(f"of another shape, newly initialised, train before use: {', '.join(keys)}")
    if match.unexpected:
        lines.append(f"in the file, not used: {', '.join(sorted(match.unexpected))}")
    if match.untied:
        lines.append("lm_head.weight differs from the token table: not tied, config.tie_word_embeddings is now False")
    if lines:
        logger.warning("%s from %s:\n  %s", model, source, "\n  ".join(lines))


# -- saving -----------------------------------------------------------------------------------------------------


def save_pretrained(
    model: Any,
    folder: str | os.PathLike,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    safe_serialization: bool = True,
    max_shard_size: int | str = "5GB",
    is_main_process: bool = True,
) -> None:
    """Writes config.json and the weights as transformers 4.x and 5.x read them.

    Files are written aside and renamed when all are complete, so that whoever loads sees the old weights or the new.
    The tied weight is stored once, as the token table. What an earlier save left and would be read instead is removed
    last.

    Args:
        model: an OpenAIGPTPreTrainedModel.
        folder: made if need be.
        state_dict: tensors to write in place of ``model.state_dict()``.
        safe_serialization: ``model.safetensors``; False for ``pytorch_model.bin``.
        max_shard_size: bytes, or a text like "500MB" (decimal) or "2GiB". A larger checkpoint is written as several
            files and an index; a tensor is never split.
        is_main_process: False writes nothing, so that all ranks may call this.
    """
    limit = _parse_size(max_shard_size)
    if state_dict is None:
        check_savable(model)
    if not is_main_process:
        return
    tensors = {_plain_key(k): t for k, t in (model.state_dict() if state_dict is None else state_dict).items()}
    _check_state_dict(tensors)
    tokens = f"{model.base_model_prefix}.{TOKENS}"
    if HEAD in tensors and tokens in tensors and _equal(tensors[HEAD], tensors[tokens]):
        del tensors[HEAD]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = SAFETENSORS if safe_serialization else BIN
    shards = _shards(tensors, limit, weights, folder)
    texts = {}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {key: name for name, keys in shards.items() for key in keys},
        }
        texts[weights + INDEX] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    texts[CONFIG_NAME] = _saved_config(model, tensors).to_json_string()
    if hasattr(model, "generate"):
        texts["generation_config.json"] = _generation_config(model.config)

    written = [*shards, *texts]  # the index behind its shards
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        aside = Path(temporary)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for name, keys in shards.items():
            _write_tensors({key: tensors[key] for key in keys}, aside / name)
            (aside / name).chmod((aside / CONFIG_NAME).stat().st_mode)  # safetensors makes its files private
        for name in written:
            _flush(aside / name)
        for name in written:
            (aside / name).replace(folder / name)
    for path in _stale(folder, weights, written):
        path.unlink()


def _saved_config(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    config.dtype = str(dtype).removeprefix("torch.")
    config.__dict__.pop("torch_dtype", None)  # its older name
    return config


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(I?))?B", str(size).upper())
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ValueError(f'max_shard_size must be a number of bytes or a text like "500MB" or "2GiB", got {size!r}')
    return size


def _shards(tensors: Mapping[str, Tensor], limit: int, weights: str, folder: Path) -> dict[str, list[str]]:
    """Keys by file name: one file where everything fits, else as many tensors a file as fit."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += tensor.nbytes
    if len(groups) == 1:
        return {weights: groups[0]}
    # Shards never replace shards: until the new index is in place, the folder's own must still be whole.
    stem, suffix = weights.split(".")
    series = 0
    while any(folder.glob(f"{stem}{f'-{series}' if series else ''}-?????-of-?????.{suffix}")):
        series += 1
    stem = f"{stem}-{series}" if series else stem
    return {f"{stem}-{n:05d}-of-{len(groups):05d}.{suffix}": keys for n, keys in enumerate(groups, 1)}


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    on_cpu = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(on_cpu, path, metadata={"format": "pt"})
    else:
        torch.save(on_cpu, path)


def _generation_config(config: Any) -> str:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return json.dumps({"_from_model_config": True, **given}, indent=2, sort_keys=True) + "\n"


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _stale(folder: Path, weights: str, written: Sequence[str]) -> list[Path]:
    """What earlier saves left that would be read before ``weights``, or belongs to it, in the order to remove it: what
    would be read last first, and shards behind their index."""
    earlier = WEIGHTS[: WEIGHTS.index(weights + INDEX) + 1]
    stems = "|".join(name.replace(".", r"(-\d+)?-\d{5}-of-\d{5}\.") for name in earlier if not name.endswith(INDEX))
    shards = [path for path in folder.iterdir() if re.fullmatch(stems, path.name)]
    ordered = [*(folder / name for name in reversed(earlier)), *shards]
    return [path for path in ordered if path.name not in written and path.exists()]
