"""What the models return: attribute, ["key"], [int] and tuple access, absent values left out, as HuggingFace has it."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from gptfast_kernels.projection import linear_dtype

from .cache import KVCache


class DeferredLogits:
    """hidden @ weight.T, computed when it is called: where the loss did without logits, most callers never look.

    Shapes: hidden [..., T, C], weight [V, C].
    """

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.hidden, self.weight = hidden, weight
        self.versions, self.sample = self._versions(), self._sample()
        self.dtype = linear_dtype(hidden)  # as in the forward pass, and so are the modes
        self.inference, self.grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def __call__(self) -> Tensor:
        if self._versions() != self.versions or not _same(self._sample(), self.sample):
            raise RuntimeError(
                "logits were left uncomputed because labels were given, and the LM head's weight or the last hidden "
                "state has changed since: read output.logits before the optimizer's step"
            )
        kind = self.hidden.device.type
        exactly: Any = nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), exactly:
            return F.linear(self.hidden.to(self.dtype), self.weight.to(self.dtype))

    def __repr__(self) -> str:
        return "<computed when read>"

    def _versions(self) -> list[int]:
        """How often each was changed in place; 0 for a tensor made in inference mode, which does not count."""
        return [0 if x.is_inference() else x._version for x in (self.hidden, self.weight)]

    def _sample(self) -> Tensor | None:
        """Some of the weight, for fused optimizers and ``.data`` change it uncounted; None where nobody may look."""
        weight = self.weight.detach()
        without_values = type(weight) is not Tensor or weight.is_meta or torch._C._are_functorch_transforms_active()
        if without_values or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return weight[:: 1 + len(weight) // 512, :: 1 + weight.shape[1] // 64].clone()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return True
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a.nan_to_num(), b.nan_to_num())


class _Logits:
    """A field that holds a tensor, None, or DeferredLogits, whose tensor takes their place when it is first read."""

    def __get__(self, output: Any, owner: type | None = None) -> Any:
        value = None if output is None else output.__dict__["logits"]
        if isinstance(value, DeferredLogits):
            value = output.__dict__["logits"] = value()
        return value

    def __set__(self, output: Any, value: Tensor | DeferredLogits | None) -> None:
        output.__dict__["logits"] = value


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
        return [f.name for f in dataclasses.fields(self) if self.__dict__[f.name] is not None]  # type: ignore[arg-type]

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
        names = self.keys()[key]
        return getattr(self, names) if isinstance(names, str) else tuple(getattr(self, name) for name in names)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in self.keys())})"

    def __getstate__(self) -> dict[str, Any]:  # what is pickled and copied holds tensors alone
        return {name: getattr(self, name) for name in self.__dict__}


Tensors = tuple[Tensor, ...]


@dataclass(repr=False)
class BaseModelOutput(ModelOutput):
    last_hidden_state: Tensor | None = None  # [B, T, C]
    hidden_states: Tensors | None = None  # n_layer + 1 of [B, T, C]: the embeddings, then each block's result
    attentions: Tensors | None = None  # n_layer of [B, H, T, S], after dropout
    past_key_values: KVCache | None = None


@dataclass(repr=False)
class CausalLMOutput(ModelOutput):
    loss: Tensor | None = None  # scalar
    logits: Tensor | None = _Logits()  # type: ignore[assignment]  # [B, T, V]; computed when read, beside a loss
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    past_key_values: KVCache | None = None


@dataclass(repr=False)
class OpenAIGPTDoubleHeadsModelOutput(ModelOutput):
    loss: Tensor | None = None  # language-model loss
    mc_loss: Tensor | None = None  # multiple-choice loss; the two are not summed
    logits: Tensor | None = _Logits()  # type: ignore[assignment]  # [B, C, T, V]; computed when read, beside a loss
    mc_logits: Tensor | None = None  # [B, C]
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(repr=False)
class SequenceClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, num_labels]
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
