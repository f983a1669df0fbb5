"""LayerNorm, with the residual and dropout around it (Ba et al. 2016, arXiv:1607.06450).

    u = residual + dropout(x)                      (u = x without a residual)
    y = (u - mean(u)) / sqrt(var(u) + eps) * weight + bias        biased variance, over the last dimension

Post-norm (GPT-1, ``prenorm=False``) returns y; pre-norm models also need u, the residual stream, and get (y, u).

Shapes: x, residual, y, u [..., C]; weight, bias [C].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(y, u) by the formula, in the precision of the input."""
    u = F.dropout(x, dropout_p)
    if residual is not None:
        u = residual + u
    y = (u - u.mean(-1, keepdim=True)) * torch.rsqrt(u.var(-1, keepdim=True, correction=0) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y, u


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of ``residual + dropout(x)`` over the last dimension.

    Args:
        x: [..., C], floating point.
        weight, bias: [C] or None.
        residual: like ``x``, or None.
        dropout_p: probability of zeroing an element of ``x``, in [0, 1). Pass 0 outside training.
        eps: added to the variance.
        prenorm: also return ``residual + dropout(x)``.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y [..., C] in x's dtype, or (y, residual + dropout(x)) with ``prenorm=True``.

    Raises:
        ValueError: a shape or ``dropout_p`` does not fit. RuntimeError: the backend asked for cannot run.
    """
    C = x.shape[-1] if x.ndim else 0
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (C,):
            raise ValueError(f"{name} must have shape [{C}], the last dimension of x, got {list(parameter.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    _dispatch.check_dropout(dropout_p)

    if _dispatch.select("layer_norm", backend, _dispatch.NOT_YET) == "reference":
        y, u = layer_norm_reference(x, weight, bias, residual=residual, dropout_p=dropout_p, eps=eps)
    else:
        u = F.dropout(x, dropout_p) if dropout_p else x
        if residual is not None:
            u = residual + u
        y = F.layer_norm(u, (C,), weight, bias, eps)
    return (y, u) if prenorm else y
