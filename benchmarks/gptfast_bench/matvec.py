"""The linear layers of a decoding step, each with what stands around it, against PyTorch eager and compiled.

Bytes: the weight once. FLOPs: 2 M N K.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gptfast_kernels import gemv
from gptfast_kernels.matvec import MAX_ROWS, gemv_reference

from .harness import DTYPES, Cell, Scale, Settings, Task
from .op import Call, compare, compiled, draw, max_autotune, ours


def cells(scale: Scale) -> Iterator[Cell]:
    """GPT-1's four, the widest first, and its head; one row, then as many as the kernel takes."""
    if set(scale.modes) & {"forward", "launch"}:
        mode, C = "launch" if "launch" in scale.modes else "forward", scale.width
        for M in (1, MAX_ROWS) if scale.more else (1,):
            for layer, K, N in (
                ("c_fc", C, 4 * C),
                ("mlp.c_proj", 4 * C, C),
                ("c_attn", C, 3 * C),
                ("c_proj", C, C),
                ("lm_head", C, scale.vocab),
            ):
                yield Cell("matvec", mode, scale.dtype, {"layer": layer, "B": M, "T": 1, "K": K, "N": N})


def task(cell: Cell, settings: Settings) -> Task:
    layer, M, K, N = (cell.shape[name] for name in ("layer", "B", "K", "N"))
    x, residual, n_weight, n_bias, bias = (draw(cell, settings, *s) for s in ((M, K), (M, N), (K,), (K,), (N,)))
    # stored as GPT-1 has them: [in, out], but for the head
    weight = draw(cell, settings, *((N, K) if layer == "lm_head" else (K, N)), std=K**-0.5)
    normalizes, adds, activates = layer in ("c_attn", "c_fc"), layer in ("c_proj", "mlp.c_proj"), layer == "c_fc"

    def around(x: Tensor, residual: Tensor, n_weight: Tensor, n_bias: Tensor, bias: Tensor, weight: Tensor) -> Any:
        how = {
            "norm": (n_weight, n_bias, 1e-5) if normalizes else None,
            "approximate": "tanh" if activates else None,
            "residual": residual if adds else None,
        }
        return x, weight if layer == "lm_head" else weight.t(), None if layer == "lm_head" else bias, how

    def fused(*inputs: Tensor) -> Tensor:
        x, weight, bias, how = around(*inputs)
        return gemv(x, weight, bias, **how, backend=ours(settings))[0]

    def eager(*inputs: Tensor) -> Tensor:
        x, weight, bias, how = around(*inputs)
        y = F.linear(F.layer_norm(x, (K,), *how["norm"]) if normalizes else x, weight, bias)
        y = F.gelu(y, approximate="tanh") if activates else y
        return y + how["residual"] if adds else y

    def formula(*inputs: Tensor) -> Tensor:
        x, weight, bias, how = around(*inputs)
        return gemv_reference(x, weight, bias, **how)[0]

    def functions(p: float) -> dict[str, Callable[[], Call]]:
        return {
            "torch eager": lambda: eager,
            "formula": lambda: formula,
            "torch.compile": compiled(eager),
            "torch.compile max-autotune": max_autotune(settings, eager),
            "gptfast": lambda: fused,
        }

    inputs = [x, residual, n_weight, n_bias, bias, weight]
    moved = DTYPES[cell.dtype].itemsize * N * K
    return compare(cell, settings, functions, inputs, formula, moved=moved, flops=2 * M * N * K, tokens=M)
