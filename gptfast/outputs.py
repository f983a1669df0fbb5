"""What the models return: attribute, ["key"], [int] and tuple access, absent values left out, as HuggingFace has it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree

from .cache import KVCache


class ModelOutput:
    """Base of the output dataclasses. A value that is None counts as absent."""

    def __init_subclass__(cls) -> None:  # so that torch.compile and torch.export see through an output
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"gptfast.{cls.__name__}",
        )

    def keys(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


Tensors = tuple[Tensor, ...]


@dataclass
class BaseModelOutput(ModelOutput):
    last_hidden_state: Tensor | None = None  # [B, T, C]
    hidden_states: Tensors | None = None  # n_layer + 1 of [B, T, C]: the embeddings, then each block's result
    attentions: Tensors | None = None  # n_layer of [B, H, T, S], after dropout
    past_key_values: KVCache | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    loss: Tensor | None = None  # scalar
    logits: Tensor | None = None  # [B, T, V]
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    past_key_values: KVCache | None = None


@dataclass
class OpenAIGPTDoubleHeadsModelOutput(ModelOutput):
    loss: Tensor | None = None  # language-model loss
    mc_loss: Tensor | None = None  # multiple-choice loss; the two are not summed
    logits: Tensor | None = None  # [B, C, T, V]
    mc_logits: Tensor | None = None  # [B, C]
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, num_labels]
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
