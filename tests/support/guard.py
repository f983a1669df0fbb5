"""Tensors between regions of NaN, on a CPU or a GPU.

    with Guard() as guard:
        x = guard.copy(x)           # NaN on both sides, and in the gaps of its strides
        y = op(x)                   # what op allocates sits between canaries too, and starts as NaN
    assert not y.isnan().any()      # nothing read from outside, no element left unwritten

Leaving the block asserts that no canary was written over and that every ``copy`` still holds what it held.
"""

from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

ZONE = 4096  # bytes on each side; keeps every alignment that kernels specialise on


class Guard:
    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor, Tensor]] = []  # bytes, which of them must stay, what they held

    def empty(self, shape, stride, dtype: torch.dtype, device) -> Tensor:
        """A tensor of NaN (integers: 0x5A bytes, bool: True) whose surroundings and gaps are watched."""
        tensor, raw = self._allocate(shape, stride, dtype, device)
        self._watch(raw, tensor, payload=False)
        return tensor

    def copy(self, x: Tensor) -> Tensor:
        """``x`` with its strides between canaries; writing to it is an error too."""
        tensor, raw = self._allocate(x.shape, x.stride(), x.dtype, x.device)
        if x.numel():
            tensor.copy_(x) if not _overlaps(x) else _collapse(tensor).copy_(_collapse(x))
        self._watch(raw, tensor, payload=True)
        return tensor.requires_grad_(x.requires_grad)

    def _allocate(self, shape, stride, dtype, device):
        size = dtype.itemsize
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
        raw = _real_empty(ZONE * 2 + -(-extent * size // 16) * 16, dtype=torch.uint8, device=device)
        if dtype.is_floating_point:
            raw.view(dtype).fill_(float("nan"))
        else:
            raw.fill_(1 if dtype == torch.bool else 0x5A)
        return raw.view(dtype).as_strided(tuple(shape), tuple(stride), ZONE // size), raw

    def _watch(self, raw: Tensor, tensor: Tensor, *, payload: bool) -> None:
        fixed = torch.ones(len(raw), dtype=torch.bool, device=raw.device)
        if not payload and tensor.numel():
            size = tensor.element_size()
            bytes_of = (*(s * size for s in tensor.stride()), 1)
            fixed.as_strided((*tensor.shape, size), bytes_of, ZONE).fill_(False)
        self._buffers.append((raw, fixed, raw.clone()))

    def __enter__(self) -> "Guard":
        def empty(*size, dtype=None, device=None, **_):
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return empty_like(_real_empty(shape, dtype=dtype, device="meta"), device=device or "cpu")

        def empty_like(x, *, dtype=None, device=None, **how):
            meta = _real_empty_like(x, dtype=dtype, device="meta", **how)
            return self.empty(meta.shape, meta.stride(), meta.dtype, device or x.device)

        def new_empty(x, *size, dtype=None, device=None, **_):
            return empty(*size, dtype=dtype or x.dtype, device=device or x.device)

        self._patches = ExitStack()
        for owner, replacement in ((torch, empty), (torch, empty_like), (Tensor, new_empty)):
            self._patches.enter_context(mock.patch.object(owner, replacement.__name__, replacement))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._patches.close()
        if error is None:
            self.check()

    def check(self) -> None:
        for raw, fixed, before in self._buffers:
            written = (raw != before) & fixed
            assert not written.any(), (
                f"{int(written.sum())} bytes that must not change were written, the first {int(written.nonzero()[0])} "
                f"of {len(raw)} ({ZONE} are the guard region on each side)"
            )


_real_empty, _real_empty_like = torch.empty, torch.empty_like


def _overlaps(x: Tensor) -> bool:
    return any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))


def _collapse(x: Tensor) -> Tensor:
    """x without the repeats of an expanded dimension."""
    for dim, stride in enumerate(x.stride()):
        x = x.narrow(dim, 0, 1) if stride == 0 else x
    return x
