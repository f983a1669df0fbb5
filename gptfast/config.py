"""OpenAIGPTConfig: HuggingFace's names, defaults and config.json."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CONFIG_NAME = "config.json"

# Other models' words for the same sizes. They work as keywords, as attributes, and in config.json.
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_PROBABILITIES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")


class OpenAIGPTConfig:
    """Shape and settings of a GPT-1.

    Args:
        vocab_size: rows of the token table, 40,478 in GPT-1.
        n_positions: longest sequence. n_embd: width. n_layer: blocks. n_head: attention heads; must divide n_embd.
        afn: the MLP's activation: "gelu" or "gelu_new" (tanh form), "gelu_erf" (exact), "relu", "silu", "swish".
        resid_pdrop, embd_pdrop, attn_pdrop: dropout behind each projection, on the embeddings, on attention weights.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation of new weights.
        summary_type, summary_use_proj, summary_activation, summary_proj_to_labels, summary_first_dropout: how the
            double-heads model pools a sequence.
        num_labels, id2label, label2id, problem_type: the classification head's.
        pad_token_id, bos_token_id, eos_token_id: None in GPT-1.
        tie_word_embeddings: the LM head's weight is the token table.
        output_attentions, output_hidden_states, return_dict: what a forward pass returns unless it is told otherwise.
        kwargs: anything else becomes an attribute and is saved, as published config.json files need.

    Raises:
        TypeError: a setting is of another type. ValueError: a size is not positive, a probability not in [0, 1), or
        layer_norm_epsilon or initializer_range negative.
    """

    model_type = "openai-gpt"
    attribute_map = _ALIASES
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 40478,
        n_positions: int = 512,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        afn: str = "gelu",
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        summary_type: str = "cls_index",
        summary_use_proj: bool = True,
        summary_activation: str | None = None,
        summary_proj_to_labels: bool = True,
        summary_first_dropout: float = 0.1,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.afn = afn
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.summary_type = summary_type
        self.summary_use_proj = summary_use_proj
        self.summary_activation = summary_activation
        self.summary_proj_to_labels = summary_proj_to_labels
        self.summary_first_dropout = summary_first_dropout
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings

        self.return_dict: bool = kwargs.pop("return_dict", True)
        self.output_hidden_states: bool = kwargs.pop("output_hidden_states", False)
        self.output_attentions: bool = kwargs.pop("output_attentions", False)
        self.use_cache: bool = kwargs.pop("use_cache", False)
        self.problem_type: str | None = kwargs.pop("problem_type", None)
        self.architectures: list[str] | None = kwargs.pop("architectures", None)
        id2label, label2id = kwargs.pop("id2label", None), kwargs.pop("label2id", None)
        num_labels = kwargs.pop("num_labels", None)
        if id2label is not None and not isinstance(id2label, Mapping):
            raise TypeError(f"id2label must be a dict from numbers to names, got {id2label!r}")
        if id2label is None or num_labels not in (None, len(id2label)):  # the number wins, and both maps follow it
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            self.id2label = {int(i): label for i, label in id2label.items()}
            self.label2id = label2id or {label: i for i, label in self.id2label.items()}
        for unused in ("model_type", "use_return_dict", "transformers_version", "gptfast_version"):
            kwargs.pop(unused, None)
        for name, value in kwargs.items():
            setattr(self, name, value)
        self._validate()

    def _validate(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in (*_PROBABILITIES, "layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if name in _PROBABILITIES and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, _ALIASES.get(name, name), value)

    def __getattr__(self, name: str) -> Any:  # only called where the attribute is not there
        if name in _ALIASES:
            return getattr(self, _ALIASES[name])
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if getattr(self, "id2label", None) is None or len(self.id2label) != num_labels:
            self.id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    # -- dictionaries and files ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as config.json holds them."""
        settings = {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else copy.deepcopy(value)
            for name, value in self.__dict__.items()
        }
        return {"model_type": self.model_type, **settings}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def copy(self) -> "OpenAIGPTConfig":
        return copy.deepcopy(self)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> "OpenAIGPTConfig":
        """A config from a dictionary; keywords replace its entries."""
        settings = {_ALIASES.get(k, k): v for k, v in config_dict.items()}
        settings.update({_ALIASES.get(k, k): v for k, v in overrides.items()})
        return cls(**settings)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "OpenAIGPTConfig":
        return cls._from_file(Path(json_file))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "OpenAIGPTConfig":
        """Reads config.json from a folder, a file or the Hub; keywords that are not for the Hub replace its entries.

        Raises:
            OSError: there is no config.json. ValueError: it is not a JSON object, not of a GPT-1, or has a setting
            that is not accepted. TypeError: a keyword's value is of another type.
        """
        from .checkpoint import resolve_files

        hub = {
            k: kwargs.pop(k) for k in ("revision", "cache_dir", "local_files_only", "token", "subfolder") if k in kwargs
        }
        path = Path(pretrained_model_name_or_path)
        if not path.is_file():
            files = resolve_files(pretrained_model_name_or_path, [CONFIG_NAME], **hub)
            if CONFIG_NAME not in files:
                raise OSError(f"{pretrained_model_name_or_path} has no {CONFIG_NAME}")
            path = files[CONFIG_NAME]
        config = cls._from_file(path)
        return cls.from_dict(config.to_dict(), **kwargs) if kwargs else config

    @classmethod
    def _from_file(cls, path: Path) -> "OpenAIGPTConfig":
        settings = _read_json(path)
        try:
            return cls.from_dict(settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes config.json into a folder, made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(self.to_json_string(), encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpenAIGPTConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(settings).__name__}")
    kind = settings.get("model_type", OpenAIGPTConfig.model_type)
    if kind != OpenAIGPTConfig.model_type:
        raise ValueError(f"{path} is of model_type {kind!r}, accepted is {OpenAIGPTConfig.model_type!r}")
    return settings
