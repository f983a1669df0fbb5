"""Attention against every backend of PyTorch's SDPA by name, FlexAttention, torch.compile and the formula.

FLOPs: 4 T S D a head forward, 10 T S D backward (the five products that there must be; ours does seven), half of it
causal. Bytes: q, k, v and out once; backward reads those and dout and writes three gradients.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from gptfast_kernels import attention

from .harness import DTYPES, Cell, Scale, Settings, Task, Unavailable, need_gpu
from .op import Call, compare, compiled, draw, max_autotune, ours

GPU_TOKENS = 32768
MATH_LENGTH = 2048  # the longest T whose T x T scores are worth holding
Tile = tuple[int, int, int, int]  # queries, keys, warps, stages
# To time beside the table's own at GPT-1's shape
TILES: dict[str, list[Tile]] = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "backward_dq": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
    "backward_dkv": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (32, 64, 4, 2)],
}


def cells(scale: Scale) -> Iterator[Cell]:
    """GPT-1's causal attention; then, on a GPU, our tiles side by side, dropout, wider heads, and all keys visible."""

    def cell(mode: str, T: int, D: int, causal: bool = True, dropout_p: float = 0.0, **what: Any) -> Cell:
        shape = {"B": scale.B, "T": T, "H": scale.heads, "D": D, "causal": causal, "dropout_p": dropout_p, **what}
        if scale.more:
            shape["B"] = GPU_TOKENS // T
        return Cell("attention", mode, scale.dtype, shape, seconds=10.0 if scale.more else 4.0)

    first, D = scale.lengths[0], scale.width // scale.heads
    for mode in scale.modes:
        yield cell(mode, first, D)
    if scale.more:
        for mode in scale.modes:
            yield cell(mode, first, D, tiles=True)
        for mode in scale.modes:
            yield cell(mode, first, D, dropout_p=0.1)
    for mode in scale.modes:
        for T in scale.lengths[1:]:
            yield cell(mode, T, D)
    if scale.more:
        for mode in scale.modes:
            for T in scale.lengths:
                for wide, causal in ((D, False), (2 * D, True), (2 * D, False)):
                    yield cell(mode, T, wide, causal)


def task(cell: Cell, settings: Settings) -> Task:
    B, T, H, D, causal = (cell.shape[name] for name in ("B", "T", "H", "D", "causal"))
    qkv = draw(cell, settings, B, T, 3, H, D)
    split: Callable[[Tensor], Any] = lambda qkv: qkv.permute(2, 0, 3, 1, 4)  # noqa: E731  [B,T,3,H,D] -> [3,B,H,T,D]

    def formula(qkv: Tensor) -> Tensor:
        return attention.attention_reference(*qkv.unbind(2), causal=causal)[0]

    def exact(qkv: Tensor) -> Tensor:
        """The formula, one row and head at a time, since float64 scores of them all may not fit."""

        def head(qkv: Tensor) -> Tensor:
            return formula(qkv[None, :, :, None])[0, :, 0]

        heads = [checkpoint(head, qkv[b, :, :, h], use_reentrant=False) for b in range(B) for h in range(H)]
        return torch.stack(heads).view(B, H, T, D).transpose(1, 2)

    def fused(qkv: Tensor, p: float) -> Tensor:
        out = attention.flash_attention_qkvpacked(qkv, causal=causal, dropout_p=p, backend=ours(settings))
        assert isinstance(out, Tensor)
        return out

    def sdpa(qkv: Tensor, p: float, backend: SDPBackend | None = None) -> Tensor:
        q, k, v = split(qkv)
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=p).transpose(1, 2)
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=p).transpose(1, 2)

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        table: dict[str, Callable[[], Call]] = {"SDPA": lambda: functools.partial(sdpa, p=p)}
        if cell.shape.get("tiles"):
            chosen = [(kernel, tile) for kernel in TILES if kernel.startswith(cell.mode) for tile in TILES[kernel]]
            return table | {
                "gptfast {} {} x {}, {} warps, {} stages".format(kernel, *tile): functools.partial(
                    _tiled, settings, kernel, tile, functools.partial(fused, p=p)
                )
                for kernel, tile in chosen
            }

        def named(backend: SDPBackend) -> Callable[[], Call]:
            def make() -> Call:
                if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                    need_gpu(settings.device, "this backend of SDPA")
                if backend == SDPBackend.MATH and T > MATH_LENGTH:
                    raise Unavailable(f"its scores of {T} x {T} a head are not worth the memory")
                return functools.partial(sdpa, p=p, backend=backend)

            return make

        def plain() -> Call:
            if p:
                raise Unavailable("the formula draws another dropout mask")
            if T > MATH_LENGTH:
                raise Unavailable(f"its scores of {T} x {T} a head are not worth the memory")
            return formula

        return table | {
            "SDPA flash": named(SDPBackend.FLASH_ATTENTION),
            "SDPA efficient": named(SDPBackend.EFFICIENT_ATTENTION),
            "SDPA cuDNN": named(SDPBackend.CUDNN_ATTENTION),
            "SDPA math": named(SDPBackend.MATH),
            "formula": plain,
            "torch.compile": lambda: compiled(plain())(),
            "torch.compile max-autotune": lambda: max_autotune(settings, plain())(),
            "FlexAttention": lambda: _flex(settings, T, causal, p),
            "gptfast": lambda: functools.partial(fused, p=p),
        }

    size = B * T * H * D
    products = 10 if cell.mode == "backward" else 4
    moved = (8 if cell.mode == "backward" else 4) * DTYPES[cell.dtype].itemsize * size
    flops = products * size * T * (0.5 if causal else 1)
    return compare(cell, settings, functions, [qkv], exact, moved=moved, flops=flops, tokens=B * T)


def _flex(settings: Settings, T: int, causal: bool, dropout_p: float) -> Call:
    need_gpu(settings.device, "FlexAttention's backward pass")
    if dropout_p:
        raise Unavailable("it has no dropout")
    device = settings.device
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=device) if causal else None
    attend = torch.compile(flex_attention, dynamic=False)

    def call(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return call


def _tiled(settings: Settings, kernel: str, tile: Tile, call: Call) -> Call:
    need_gpu(settings.device, "a tile")

    def run(qkv: Tensor) -> Tensor:
        with tiles(kernel, tile):
            return call(qkv)

    return run


@contextmanager
def tiles(kernel: str, tile: Tile) -> Iterator[None]:
    """Runs one kernel with another tile than the table's."""
    table = attention.config

    def config(name: str, *what: Any) -> attention.Config:
        return attention.Config(*tile) if name == kernel else table(name, *what)

    with mock.patch.object(attention, "config", config):
        yield
