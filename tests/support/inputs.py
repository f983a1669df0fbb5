"""Inputs that several ops are tried on."""

import torch
from torch import Tensor

from . import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("plain", "transposed", "sliced", "every other", "expanded", "offset")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Normal numbers, the same at every call."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * std + mean).to(dtype).to(DEVICE)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """x [rows, columns] (its first row, if "expanded") with other strides or another offset."""
    rows, columns = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, :columns]
    if layout == "every other":
        return x.repeat_interleave(2, 1)[:, ::2]
    if layout == "expanded":
        return x[:1].expand(rows, columns)
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(rows, columns)
    return x
