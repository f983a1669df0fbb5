"""One new token a row against a key/value cache: ours, which appends in place, against SDPA behind its own append.

Bytes: every cached key and value once. FLOPs: 4 S D a head.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptfast_kernels import flash_attention_with_kvcache
from gptfast_kernels.attention import attention_reference

from .harness import DTYPES, Cell, Scale, Settings, Task, need_gpu
from .op import Call, compare, compiled, ours


def cells(scale: Scale) -> Iterator[Cell]:
    """The longest text first, one row and then the batch; T = 1, and S are the keys with the new one."""
    if set(scale.modes) & {"forward", "launch"}:
        mode = "launch" if "launch" in scale.modes else "forward"
        for S in scale.lengths:
            for B in sorted({1, scale.B}):
                shape = {"B": B, "T": 1, "S": S, "H": scale.heads, "D": scale.width // scale.heads}
                yield Cell("decode", mode, scale.dtype, shape)


def task(cell: Cell, settings: Settings) -> Task:
    B, S, H, D = (cell.shape[name] for name in "BSHD")
    draw = functools.partial(torch.randn, device=settings.device, dtype=DTYPES[cell.dtype])
    cache = draw(2, B, S, H, D)
    k_cache, v_cache = cache
    new = draw(3, B, 1, H, D)  # q, k, v

    def fused(new: Tensor) -> Tensor:
        q, k, v = new
        return flash_attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=S - 1, backend=ours(settings))

    def sdpa(new: Tensor, backend: SDPBackend | None = None) -> Tensor:
        cache[:, :, S - 1 :] = new[1:]
        q, (k, v) = new[0].transpose(1, 2), cache.transpose(2, 3)
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def formula(new: Tensor) -> Tensor:
        k, v = (torch.cat([held[:, : S - 1].to(new.dtype), x], 1) for held, x in zip(cache, new[1:], strict=True))
        return attention_reference(new[0], k, v)[0]

    def cudnn() -> Call:
        need_gpu(settings.device, "cuDNN")
        return functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        return {
            "SDPA": lambda: sdpa,
            "SDPA flash": lambda: functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": cudnn,
            "SDPA math": lambda: functools.partial(sdpa, backend=SDPBackend.MATH),
            "torch.compile": compiled(sdpa),
            "gptfast": lambda: fused,
        }

    moved = DTYPES[cell.dtype].itemsize * 2 * B * S * H * D
    return compare(cell, settings, functions, [new], formula, moved=moved, flops=4 * B * S * H * D, tokens=B)
