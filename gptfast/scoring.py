"""How well a language model predicts a text: perplexity over a sliding window, and bits per byte.

A token's probability is taken with at least ``context - stride`` tokens before it, except near the text's start.
Perplexity is exp(nll / tokens) and depends on the vocabulary; bits per byte, nll / ln(2) / bytes, does not. It counts
the bytes of the text as written, but GPT-1's tokens have neither its capitals nor its spacing, and what is not in the
vocabulary is one token: compare bits per byte only among models that read so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast_kernels import linear_cross_entropy

from .heads import OpenAIGPTLMHeadModel
from .inputs import check_ids, check_tensor
from .linear import Int8Linear


@dataclass(frozen=True)
class Score:
    nll: float  # negative log-likelihood of all counted tokens, in nats
    tokens: int  # counted: all but the first
    bytes: int | None  # of the text in UTF-8

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        return None if not self.bytes else self.nll / math.log(2) / self.bytes


@torch.inference_mode()
def score_ids(
    model: OpenAIGPTLMHeadModel,
    ids: Tensor,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    text_bytes: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Scores one long sequence.

    Args:
        model: in eval mode, or dropout counts.
        ids: int32 or int64 [N], N >= 2, on any device.
        context: window length, at most n_positions (the default). stride: step between windows, half of it by default.
        batch_size: windows a forward pass.
        text_bytes: length of the text, for ``bits_per_byte``.
        progress: called with the number of tokens each pass has counted.

    Raises:
        ValueError: a number, an id or the shape of ``ids`` is not accepted. TypeError: ``ids`` is no tensor of ints.
    """
    n_positions = model.config.n_positions
    context = n_positions if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if not 2 <= context <= n_positions:
        raise ValueError(f"context must be from 2 to n_positions = {n_positions}, got {context}")
    if not 1 <= stride < context:
        raise ValueError(f"stride must be from 1 to context - 1 = {context - 1}, got {stride}")
    check_tensor("ids", ids)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids must be [N] with N >= 2, got shape {list(ids.shape)}")
    check_ids("ids", ids, model.config.vocab_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    # window w predicts ids[w * stride + 1 … w * stride + context - 1]; past the first, only the last `stride` are new
    starts = range(0, max(1, len(ids) - (context - stride)), stride)
    nll, counted = 0.0, 0
    head = model.lm_head.weight
    if isinstance(model.lm_head, Int8Linear):
        head = model.lm_head.dequantized().to(model.dtype)
    for first in range(0, len(starts), batch_size):
        batch = starts[first : first + batch_size]
        windows = torch.full((len(batch), context), -100, dtype=torch.int64)
        for row, start in enumerate(batch):
            window = ids[start : start + context]
            windows[row, : len(window)] = window
        windows = windows.to(model.device)
        targets = windows[:, 1:].clone()
        for row, start in enumerate(batch):
            if start:
                targets[row, : context - stride - 1] = -100
        hidden = model.transformer(windows[:, :-1].clamp(min=0), return_dict=True).last_hidden_state
        losses = linear_cross_entropy(hidden, head, targets, reduction="sum")
        new = int((targets != -100).sum())
        nll, counted = nll + float(losses), counted + new
        progress(new)
    return Score(nll, counted, text_bytes)
