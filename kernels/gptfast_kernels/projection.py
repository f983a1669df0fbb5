"""A linear layer with GELU behind it: gelu(x @ weight.T + bias), the first half of a transformer's MLP.

Shapes: x [..., K]; weight [N, K] with any strides (a Conv1D passes ``weight.t()``); bias [N]; result [..., N].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from .activation import check_gelu, gelu_reference


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: str = "tanh") -> Tensor:
    """The formula, unfused."""
    return gelu_reference(x @ weight.t(), bias=bias, approximate=approximate)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh", backend: str = "auto"
) -> Tensor:
    """``gelu(F.linear(x, weight, bias))``.

    Args:
        x: [..., K], floating point.
        weight: [N, K], any strides.
        bias: [N] or None.
        approximate: "tanh" or "none" (exact).
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [..., N] in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: a shape or ``approximate`` is not accepted. TypeError: x, weight and bias differ in dtype, without
        autocast. RuntimeError: the backend asked for cannot run.
    """
    check_gelu(approximate)
    check_linear("x", x, weight, bias)
    if _dispatch.select("linear_gelu", backend, _dispatch.NOT_YET) == "reference":
        return linear_gelu_reference(x, weight, bias, approximate=approximate)
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``F.linear(x, ...)`` computes in: x's, or autocast's where it is on (float64 is left alone)."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless ``F.linear(x, weight, bias)`` is defined; ``name`` is what the caller calls x."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"{name} must be [..., {K}] to fit weight {[N, K]}, got shape {list(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must have shape [{N}] to fit weight {[N, K]}, got {list(bias.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if torch.is_autocast_enabled(x.device.type):
        return
    for other, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype:
            raise TypeError(f"{other} is {parameter.dtype}, but {name} is {x.dtype}: cast one, or use torch.autocast")
