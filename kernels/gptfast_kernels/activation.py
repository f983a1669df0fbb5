"""GELU, with a bias added first (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    exact  gelu(x) = x/2 * (1 + erf(x / sqrt(2)))
    tanh   gelu(x) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))          GPT-1's

Shapes: x [..., C], any rank; bias [C].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch

APPROXIMATIONS = ("tanh", "none")


def gelu_reference(x: Tensor, *, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """The formula, in the precision of the input."""
    if bias is not None:
        x = x + bias
    if approximate == "none":
        return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Tensor, *, bias: Tensor | None = None, approximate: str = "tanh", backend: str = "auto") -> Tensor:
    """GELU of ``x + bias``.

    Args:
        x: [..., C], floating point, any shape.
        bias: [C] or None.
        approximate: "tanh" (GPT-1, GPT-2) or "none" (exact, by erf).
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [..., C] in x's dtype.

    Raises:
        ValueError: ``approximate`` or the shape of ``bias`` is not accepted. RuntimeError: the backend cannot run.
    """
    check_gelu(approximate)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must have shape {list(x.shape[-1:])}, the last dimension of x, got {list(bias.shape)}")

    if _dispatch.select("gelu", backend, _dispatch.NOT_YET) == "reference":
        return gelu_reference(x, bias=bias, approximate=approximate)
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def check_gelu(approximate: str) -> None:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
