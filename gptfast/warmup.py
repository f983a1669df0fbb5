"""What the first call of each kind costs, paid beforehand: kernels compiled, graphs recorded, handles made.

Nothing is tuned on a first call, and a kernel compiles once for all T from 1 to n_positions: tests count that, over
every length. So one length stands for all, and what is left to go through is the kinds of call.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .generation import check_count
from .heads import OpenAIGPTLMHeadModel


@dataclass(frozen=True)
class Row:
    """Seconds that a kind of call took the first and the second time."""

    call: str
    first: float
    again: float


@torch.no_grad()
def warmup(
    model: OpenAIGPTLMHeadModel,
    batch_sizes: Sequence[int] = (1,),
    *,
    new_tokens: int = 3,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Row]:
    """Runs each kind of inference twice: forward passes with and without padding, and generation.

    Args:
        model: in eval mode, on the device and in the dtype that it will be used in. Triton's compiled kernels stay on
            disk: another process starts with them.
        batch_sizes: rows to run, each from 1. Generation on a GPU records a CUDA graph for each.
        new_tokens: to generate.
        progress: wraps the list of calls; tqdm fits.

    Raises:
        ValueError, TypeError: the model is in training mode, or a number is not accepted.
    """
    if model.training:
        raise ValueError("model must be in eval mode: model.eval()")
    check_count("new_tokens", new_tokens)
    if not isinstance(batch_sizes, Iterable):
        raise TypeError(f"batch_sizes must be a sequence of ints, got {batch_sizes!r}")
    for B in batch_sizes:
        check_count("batch_sizes", B)
    T = max(1, model.config.n_positions - new_tokens)
    calls: list[tuple[str, Callable[[], Any]]] = []
    for B in batch_sizes:
        ids = torch.zeros(B, T, dtype=torch.int64, device=model.device)
        whole = torch.ones_like(ids)  # without it, what equals the config's pad_token_id is padding
        mask = whole.clone()
        mask[0, : T // 2] = 0
        generate = partial(_generate, model, ids, new_tokens)
        calls += [
            (f"forward {B} x {T}", partial(model, ids)),
            (f"forward {B} x {T}, padded", partial(model, ids, mask)),
            (f"generate, {B} rows", partial(generate, whole)),
            (f"generate, {B} rows, sampled", partial(generate, whole, do_sample=True, seed=0)),
            (f"generate, {B} rows, padded", partial(generate, mask)),
        ]
    return [Row(name, _seconds(call, model.device), _seconds(call, model.device)) for name, call in progress(calls)]


def _generate(model: Any, ids: Tensor, new_tokens: int, mask: Tensor, **how: Any) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, overflow="slide", **how)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
