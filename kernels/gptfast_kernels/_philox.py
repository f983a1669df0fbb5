"""Dropout masks that can be drawn again: Philox 4x32-10 (Salmon et al. 2011) of a seed and an element's position.

The seed is a tensor on the device, drawn from torch's own generator. So ``torch.manual_seed`` fixes the masks,
activation checkpointing, which restores the generator, draws the same ones, and each replay of a CUDA graph draws anew.
Forward saves the seed, and backward draws the mask from it instead of reading a stored one.
"""

import torch
from torch import Tensor

from ._triton import tl, triton


def draw_seed(device: torch.device) -> Tensor:
    """int64 [1]: the seed of one dropout."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


@triton.jit
def keep(seed, row, column, dropout_p):
    """True where the element at (row, column) is kept, with probability 1 - dropout_p.

    seed: int64 scalar. row: int64, column: int32, broadcastable to the block of elements.
    """
    # row and column stay a column and a row of the block: their first two rounds cost one draw a row, not an element
    bits, _, _, _ = tl.philox(seed, column.to(tl.uint32), row.to(tl.uint32), (row >> 32).to(tl.uint32), 0)
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-8 >= dropout_p  # 2^-24: exact in float32


@triton.jit
def keep_block(seed, row, start, dropout_p, BLOCK: tl.constexpr):
    """As ``keep`` for columns start … start + BLOCK - 1, start and BLOCK multiples of 4, with four columns to a draw:
    another mask, at a quarter of the work, which is what a kernel bound by memory can afford.

    row: int64 [ROWS, 1]. Returns [ROWS, BLOCK].
    """
    group = start // 4 + tl.arange(0, BLOCK // 4)[None, :]
    zero = (row * 0 + group * 0).to(tl.uint32)
    row_low = zero + row.to(tl.uint32)
    row_high = zero + (row >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, zero + group.to(tl.uint32), row_low, row_high, zero)
    bits = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS, BLOCK // 4, 2, 2], in the order a, b, c, d
    bits = tl.reshape(bits, [bits.shape[0], BLOCK])
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-8 >= dropout_p


def keep_reference(seed: Tensor, row: Tensor, column: Tensor, dropout_p: float) -> Tensor:
    """``keep`` in plain torch, on int64 tensors."""
    return _uniform(_draw(seed, row, column)[0]) >= torch.tensor(dropout_p, dtype=torch.float32)


def keep_block_reference(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """``keep_block`` of rows 0 … rows - 1 and columns 0 … columns - 1, in plain torch: bool [rows, columns]."""
    row, group = torch.arange(rows)[:, None], torch.arange(-(-columns // 4))
    draws = torch.stack(_draw(seed, row, group), -1).flatten(1)[:, :columns]
    return _uniform(draws) >= torch.tensor(dropout_p, dtype=torch.float32)


def _draw(seed: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low = 0xFFFFFFFF
    row, column = torch.broadcast_tensors(row.long(), column.long())
    c0, c1, c2, c3 = column & low, row & low, (row >> 32) & low, torch.zeros_like(row)
    k0, k1 = int(seed) & low, (int(seed) >> 32) & low
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high2, low2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _uniform(bits: Tensor) -> Tensor:
    return (bits >> 8).float() * 2.0**-24


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of the product of 32-bit numbers, in int64 without overflow."""
    high_part, low_part = a * (b >> 16), a * (b & 0xFFFF)  # < 2^48 each
    total = ((high_part & 0xFFFF) << 16) + low_part  # < 2^49
    return (high_part >> 16) + (total >> 32), total & 0xFFFFFFFF
