"""What the benchmarks of the small ops share: contenders checked against each other, then timed in turn."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import time_in_turn

Call = Callable[..., Tensor]
LIGER = importlib.util.find_spec("liger_kernel") is not None


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * std).to(dtype).requires_grad_()


def compare(
    cell: dict[str, Any],
    contenders: dict[str, Call],
    inputs: Sequence[Tensor],
    *,
    moved: int = 0,
    flops: int = 0,
    tolerance: float = 0.03,
) -> dict[str, Any]:
    """The cell with times of every contender: forward, backward alone, or both, as cell["direction"] says.

    Args:
        contenders: calls of ``inputs``; the second is the baseline that the first, ours, must agree with, to
            ``tolerance`` of its largest value, in the output and in every gradient.
        moved: bytes that the op must read and write, for GB/s.
        flops: floating-point operations that it must do, for TFLOP/s.
    """
    ours, theirs, *_ = contenders.values()
    dout = torch.randn_like(ours(*inputs))
    if not cell.get("dropout_p"):
        _assert_same(ours, theirs, inputs, dout, tolerance)
    calls = {name: _call(call, inputs, dout, cell["direction"]) for name, call in contenders.items()}
    times = time_in_turn(calls)
    for name, row in times.items():
        if "ms" in row:
            row["gb_s"], row["tflop_s"] = moved / row["ms"] / 1e6, flops / row["ms"] / 1e9
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[name]()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return cell | {"times": times}


def compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def _call(call: Call, inputs: Sequence[Tensor], dout: Tensor, direction: str) -> Callable[[], Any]:
    if direction == "forward":
        return lambda: call(*(x.detach() for x in inputs))
    leaves = [x for x in inputs if x.requires_grad]
    if direction == "both":
        return lambda: torch.autograd.grad(call(*inputs), leaves, dout)
    out = functools.cache(lambda: call(*inputs))
    return lambda: torch.autograd.grad(out(), leaves, dout, retain_graph=True)


def _assert_same(ours: Call, theirs: Call, inputs: Sequence[Tensor], dout: Tensor, tolerance: float) -> None:
    leaves = [x for x in inputs if x.requires_grad]
    results = []
    for call in (ours, theirs):
        out = call(*inputs)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for got, expected in zip(*results, strict=True):
        error, largest = (got - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * largest, f"error {error} where the largest value is {largest}"
