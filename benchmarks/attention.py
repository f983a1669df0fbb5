"""Attention against cuDNN, PyTorch's choice, FlexAttention and the formula. Not run on a GPU yet.

32k tokens, 12 heads. FLOPs: 4 T S D a head forward, 10 T S D backward (the five products that there must be; ours does
seven), half of it causal.
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

from benchmarks.harness import time_in_turn
from gptfast_kernels import attention

TOKENS, H = 32768, 12
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Tiles to time beside the table's own at GPT-1's shape: queries, keys, warps, stages
TILES = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "backward_dq": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
    "backward_dkv": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (32, 64, 4, 2)],
}
Attend = Callable[[Tensor], Tensor]  # qkv [B, T, 3, H, D] -> [B, T, H, D]


def cells() -> Iterator[dict[str, Any]]:
    """What to time: first what GPT-1 needs, then its tiles, then the sweep."""
    gpt1 = {"T": 512, "D": 64, "causal": True, "dropout_p": 0.0}
    for direction in ("forward", "backward"):
        yield gpt1 | {"direction": direction}
    for kernel, tiles in TILES.items():
        for tile in tiles:
            yield gpt1 | {"direction": "forward" if kernel == "forward" else "backward", "tile": [kernel, *tile]}
    for direction in ("forward", "backward"):
        yield gpt1 | {"direction": direction, "dropout_p": 0.1}
    for D in (64, 128):
        for T in LENGTHS:
            for causal in (True, False):
                for direction in ("forward", "backward"):
                    yield {"T": T, "D": D, "causal": causal, "dropout_p": 0.0, "direction": direction}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Times one cell, once our output and gradient are found to be PyTorch's."""
    T, D, causal, dropout_p = cell["T"], cell["D"], cell["causal"], cell["dropout_p"]
    backward = cell["direction"] == "backward"
    qkv = torch.randn(TOKENS // T, T, 3, H, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dout = torch.randn(TOKENS // T, T, H, D, dtype=torch.bfloat16, device="cuda")

    def ours(qkv: Tensor) -> Tensor:
        return attention.flash_attention_qkvpacked(qkv, causal=causal, dropout_p=dropout_p, backend="triton")

    def sdpa(qkv: Tensor, backends: list[SDPBackend]) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout_p).transpose(1, 2)

    any_backend = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    contenders: dict[str, Attend] = {"gptfast": ours, "sdpa": functools.partial(sdpa, backends=any_backend)}
    if "tile" not in cell:
        contenders["cudnn"] = functools.partial(sdpa, backends=[SDPBackend.CUDNN_ATTENTION])
        if T <= 2048:  # it holds T x T scores
            contenders["math"] = functools.partial(sdpa, backends=[SDPBackend.MATH])
        if not dropout_p:  # it has none
            contenders["flex"] = _flex(T, causal)
    with _tile(cell.get("tile")):
        if not dropout_p:
            _assert_same(contenders["gptfast"], contenders["sdpa"], qkv, dout)
        times = time_in_turn({name: _call(attend, qkv, dout, backward) for name, attend in contenders.items()})
    flops = (10 if backward else 4) * TOKENS * T * H * D * (0.5 if causal else 1)
    for row in times.values():
        if "ms" in row:
            row["tflop_s"] = flops / row["ms"] / 1e9
    return cell | {"times": times}


def _call(attend: Attend, qkv: Tensor, dout: Tensor, backward: bool) -> Callable[[], Any]:
    """What to time: forward, or backward alone of a forward that its first call runs."""
    if not backward:
        return lambda: attend(qkv.detach())
    out = functools.cache(lambda: attend(qkv))
    return lambda: torch.autograd.grad(out(), qkv, dout, retain_graph=True)


def _flex(T: int, causal: bool) -> Attend:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda") if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = compiled(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend


@contextmanager
def _tile(tile: list[Any] | None) -> Iterator[None]:
    """Runs one kernel with another tile than the table's; None leaves the table."""
    table = attention.config

    def config(kernel: str, *what) -> attention.Config:
        return attention.Config(*tile[1:]) if tile and kernel == tile[0] else table(kernel, *what)

    with mock.patch.object(attention, "config", config):
        yield


def _assert_same(ours: Attend, theirs: Attend, qkv: Tensor, dout: Tensor) -> None:
    """Output and gradient, to a few roundings of a bfloat16 of their largest value."""
    results = []
    for attend in (ours, theirs):
        out = attend(qkv)
        results.append((out, *torch.autograd.grad(out, qkv, dout)))
    for got, expected in zip(*results, strict=True):
        error = (got - expected).abs().max()
        assert error <= 0.03 * expected.abs().max(), f"error {error} where the largest value is {expected.abs().max()}"
