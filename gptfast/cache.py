"""The key/value cache: what decoding remembers of the positions it has seen. Allocated once, written in place.

Shapes: L layers, B rows, S positions held at most, H heads, D head dim.
"""

import torch
from torch import Tensor

from .config import OpenAIGPTConfig


class KVCache:
    """Keys and values of every layer, with room for ``max_length`` positions a row.

    Args:
        config: the model's. batch_size: B. max_length: S; the model's n_positions if None.
        n_layer: L, of a model that has more or fewer blocks than its config says.
        dtype, device: the model's.

    Attributes:
        k, v: [L, B, S, H, D], views: a head's positions follow one another in memory, for attention reads them so.
        seqlens: positions each row holds: an int while all rows hold as many, else int64 [B], counted up in place, so
            that a CUDA graph that holds it goes on where it stopped.
    """

    def __init__(
        self,
        config: OpenAIGPTConfig,
        batch_size: int,
        max_length: int | None = None,
        *,
        n_layer: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if not hasattr(config, "n_positions"):  # transformers' own config has it too
            raise TypeError(f"config must be an OpenAIGPTConfig, got {type(config).__name__}")
        S = config.n_positions if max_length is None else max_length
        for name, n in (("batch_size", batch_size), ("max_length", S)):
            if not isinstance(n, (int, torch.SymInt)):
                raise TypeError(f"{name} must be an int, got {n!r}")
        if not 0 < S <= config.n_positions:
            raise ValueError(f"max_length must be from 1 to n_positions = {config.n_positions}, got {max_length}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        L = config.n_layer if n_layer is None else n_layer
        shape = (L, batch_size, config.n_head, S, config.n_embd // config.n_head)
        # zeros, not empty: a masked slot is multiplied by 0, and 0 * NaN is NaN
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            self.k = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
            self.v = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
        self.seqlens: int | Tensor = 0

    @property
    def batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_length(self) -> int:
        return self.k.shape[2]

    def get_seq_length(self) -> int:
        """Positions that the longest row holds. Rows of different length on a GPU cost a synchronisation."""
        return int(self.seqlens.max()) if isinstance(self.seqlens, Tensor) else self.seqlens

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(k, v), each [B, S, H, D], views of the cache."""
        return self.k[index], self.v[index]

    def advance(self, positions: int) -> None:
        """Counts ``positions`` new ones in every row, once all layers have written them."""
        self.seqlens += positions

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row ``rows[b]``, int64 [B], was, as beam search needs it."""
        B = self.batch_size
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64) or rows.shape != (B,):
            raise ValueError(f"rows must be an int32 or int64 tensor [{B}], got {rows!r}")
        for x in (self.k, self.v):
            x.copy_(x[:, rows])
        if isinstance(self.seqlens, Tensor):
            self.seqlens.copy_(self.seqlens[rows])

    def reset(self) -> None:
        """Forgets every position; the memory stays."""
        self.seqlens = 0
