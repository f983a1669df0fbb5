"""The ops as modules: a model takes one by changing one line, and its ``state_dict`` stays what it was.

    model.norm = LayerNorm(768)              # for nn.LayerNorm(768); also norm(x, residual=h)
    model.act = GELU("tanh")                 # for nn.GELU("tanh")
    model.fc = LinearGELU(768, 3072)         # for nn.Linear(768, 3072) with nn.GELU("tanh") behind it
    replace_modules(model)                   # every nn.LayerNorm and nn.GELU inside, in place

Each calls its op with ``backend="auto"``: see ``_dispatch.py``. Errors are those of the ops and of torch's modules.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ._dispatch import check_dropout
from .activation import check_gelu, gelu
from .loss import check_reduction, linear_cross_entropy
from .normalization import layer_norm
from .projection import linear_gelu


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, which can take the residual and the dropout before it.

    Args:
        normalized_shape: C, or a list that holds only C.
        dropout_p: applied to ``forward``'s x while training.
        prenorm: ``forward`` returns (y, residual + dropout(x)).
        eps, elementwise_affine, bias, device, dtype: as ``nn.LayerNorm``.

    Raises:
        ValueError: ``normalized_shape`` has more than one dimension, or ``dropout_p`` is not in [0, 1).
    """

    dropout_p: float = 0.0
    prenorm: bool = False

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        dropout_p: float = 0.0,
        prenorm: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape must be one dimension, got {list(self.normalized_shape)}")
        check_dropout(dropout_p)
        self.dropout_p = dropout_p
        self.prenorm = prenorm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | Any:
        """y [..., C] of x [..., C] and a residual like it, or (y, residual + dropout(x)) with ``prenorm``."""
        return layer_norm(
            x,
            self.weight,
            self.bias,
            residual=residual,
            dropout_p=self.dropout_p if self.training else 0.0,
            eps=self.eps,
            prenorm=self.prenorm,
        )

    def extra_repr(self) -> str:
        more = f", dropout_p={self.dropout_p}" * (self.dropout_p > 0) + ", prenorm=True" * self.prenorm
        return super().extra_repr() + more


class GELU(nn.GELU):
    """``nn.GELU``: exact by default, as there; ``GELU("tanh")`` is GPT's."""

    def __init__(self, approximate: str = "none") -> None:
        check_gelu(approximate)
        super().__init__(approximate)

    def forward(self, x: Tensor) -> Tensor:
        """gelu(x), of any shape."""
        return gelu(x, approximate=self.approximate)


class LinearGELU(nn.Linear):
    """``nn.Linear`` with GELU behind it: [..., in_features] to [..., out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        approximate: str = "tanh",
    ) -> None:
        check_gelu(approximate)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """gelu(x @ weight.T + bias)."""
        return linear_gelu(x, self.weight, self.bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


class LinearCrossEntropy(nn.Linear):
    """``nn.Linear`` to the vocabulary and ``nn.CrossEntropyLoss`` behind it, without the logits.

    Tie it by assigning the embedding's weight: ``head.weight = model.embedding.weight``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device=None,
        dtype=None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        shift: bool = False,
    ) -> None:
        check_reduction(reduction)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.ignore_index, self.reduction, self.shift = ignore_index, reduction, shift

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """The loss of hidden [..., in_features] and target [...]."""
        return linear_cross_entropy(
            hidden,
            self.weight,
            target,
            bias=self.bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            shift=self.shift,
        )

    def extra_repr(self) -> str:
        how = f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, shift={self.shift}"
        return f"{super().extra_repr()}, {how}"


def replace_modules(model: nn.Module) -> list[str]:
    """Makes every ``nn.LayerNorm`` over one dimension and every ``nn.GELU`` in ``model`` one of ours, in place.

    Parameters, buffers, hooks and the training flag stay the objects they were. Subclasses are left alone, since their
    forward may be another. Returns the names of what was replaced.
    """
    replaced = []
    for name, module in model.named_modules():
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            module.__class__ = LayerNorm
        elif type(module) is nn.GELU:
            module.__class__ = GELU
        else:
            continue
        replaced.append(name)
    return replaced
