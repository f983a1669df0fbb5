"""A linear layer with GELU behind it: gelu(x @ weight.T + bias), the first half of a transformer's MLP.

Shapes: x [..., K]; weight [N, K] with any strides (a Conv1D passes ``weight.t()``); bias [N]; result [..., N].
"""

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
        [..., N] in x's dtype.

    Raises:
        ValueError: a shape or ``approximate`` is not accepted. RuntimeError: the backend asked for cannot run.
    """
    check_gelu(approximate)
    check_linear(x, weight, bias)
    if _dispatch.select("linear_gelu", backend, _dispatch.NOT_YET) == "reference":
        return linear_gelu_reference(x, weight, bias, approximate=approximate)
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] to fit weight {[N, K]}, got shape {list(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must have shape [{N}] to fit weight {[N, K]}, got {list(bias.shape)}")
