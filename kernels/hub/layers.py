"""Layers by the names that transformers looks for. Each replaces a ``forward`` and has no state of its own."""

from torch import Tensor, nn

from .gptfast_kernels import gelu, layer_norm

__all__ = ["GELU", "FastGELU", "GeLU", "GeluTanh", "LayerNorm", "NewGELU"]


class LayerNorm(nn.Module):
    """For ``nn.LayerNorm`` over one dimension."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # [..., C] -> [..., C]
        return layer_norm(input, self.weight, self.bias, eps=self.eps)  # type: ignore[arg-type]


class GELU(nn.Module):
    """For ``nn.GELU``, of either form."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=self.approximate)  # type: ignore[arg-type]


class GeLU(nn.Module):
    """For transformers' GELUActivation: the exact form."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate="none")


class NewGELU(nn.Module):
    """For transformers' NewGELUActivation, GPT's: the tanh form."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate="tanh")


class FastGELU(NewGELU):
    """For transformers' FastGELUActivation: the tanh form too."""


class GeluTanh(NewGELU):
    """For transformers' GELUTanh: the tanh form too."""
