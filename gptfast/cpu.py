"""A block on a CPU without autograd: ``model.Block``'s formulas, in place, in buffers that all layers share.

Four things make it faster than a fresh tensor an operation:

- a large fresh output costs its page faults, up to a third of the matmul that fills it;
- a matmul that overwrites its output, with the bias added behind it, is faster than one that starts from the bias;
- tanh GELU as x * sigmoid(2 u) takes PyTorch's fast exponential, where ``F.gelu`` takes a slow hyperbolic tangent;
- attention by blocks of 64 queries, each against the keys up to its end, is faster than PyTorch's fused CPU kernel
  from some 128 positions on.

Shapes: B rows, T positions, N = B * T, H heads, D head dim, C = H * D width.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gptfast_kernels import _dispatch, _triton

from .linear import Conv1D

if TYPE_CHECKING:
    from .model import AttentionContext, Block

QUERIES = 64  # a block of scores [H, 64, T] stays in the L2 cache
GELU_ROWS = 64  # so do these rows of the MLP's inner columns
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


class Buffers:
    """What one forward pass writes its intermediate results to."""

    def __init__(self, x: Tensor, inner_columns: int):
        """For x [B, T, C]."""
        N, C = x.shape[:2].numel(), x.shape[2]
        self.qkv = x.new_empty(N, 3 * C)
        self.attention = x.new_empty(N, C)
        self.projected = x.new_empty(N, C)
        self.inner = x.new_empty(N, inner_columns)


def applies(x: Tensor) -> bool:
    """Whether hidden states like ``x`` can be computed here: float32 on a CPU, eagerly, by PyTorch's operators."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and _dispatch.get_default_backend() in ("auto", "torch")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # vmap takes no ``out=``
    )


def run_block(block: "Block", x: Tensor, context: "AttentionContext", layer: int, approximate: str) -> Tensor:
    """What ``block(x)`` is for x [B, T, C], with GELU ``approximate``."""
    buffers, attn, mlp = context.buffers, block.attn, block.mlp
    assert buffers is not None
    B, T, C = x.shape
    x = x.reshape(B * T, C)

    qkv = _project(attn.c_attn, x, buffers.qkv).view(B, T, 3, attn.n_head, C // attn.n_head)
    if context.cache is None and context.key_padding_mask is None and T >= 2 * QUERIES:
        a = _causal_attention(qkv, buffers.attention)
    else:
        a = attn.attend(qkv, context, layer)[0].reshape(B * T, C)
    if _dispatch.is_recording():
        for op in ("layer_norm", "linear_gelu", "layer_norm"):
            _dispatch.select(op, "auto", _triton.why_not(x))
    n = _normalize(block.ln_1, _project(attn.c_proj, a, buffers.projected).add_(x))
    h = _gelu_(_project(mlp.c_fc, n, buffers.inner), approximate)
    return _normalize(block.ln_2, _project(mlp.c_proj, h, buffers.projected).add_(n)).view(B, T, C)


def _project(layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """layer(x) [N, columns], in ``out`` unless its weight is int8."""
    if not isinstance(layer, Conv1D):
        return layer(x)
    return torch.mm(x, layer.weight, out=out).add_(layer.bias)  # type: ignore[arg-type]


def _normalize(ln: nn.LayerNorm, x: Tensor) -> Tensor:
    return torch.layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)


def _gelu_(x: Tensor, approximate: str) -> Tensor:
    """GELU of x [N, columns] in place. The tanh form is x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if approximate == "none" or len(x) < GELU_ROWS:
        return torch.ops.aten.gelu_(x, approximate=approximate)
    slope, buffer = x.new_tensor(GELU_SLOPE), x.new_empty(GELU_ROWS, x.shape[1])
    for rows in x.split(GELU_ROWS):
        gate = buffer[: len(rows)]
        torch.addcmul(slope, rows, rows, value=0.044715 * GELU_SLOPE, out=gate).mul_(rows).sigmoid_()
        rows.mul_(gate)
    return x


def _causal_attention(qkv: Tensor, out: Tensor) -> Tensor:
    """Attention of qkv [B, T, 3, H, D] in ``out`` [B * T, H * D]."""
    if _dispatch.is_recording():
        _dispatch.select("flash_attention", "auto", _triton.why_not(qkv))
    B, T, _, H, D = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, D]
    o = out.view(B, T, H, D).transpose(1, 2)
    future = qkv.new_full((QUERIES, QUERIES), -torch.inf).triu(1)
    buffer = qkv.new_empty(H * QUERIES * T)
    for b in range(B):
        for start in range(0, T, QUERIES):
            end = min(start + QUERIES, T)
            n = end - start
            scores = buffer[: H * n * end].view(H, n, end)
            torch.bmm(q[b, :, start:end] / math.sqrt(D), k[b, :, :end].transpose(1, 2), out=scores)
            scores[:, :, start:].add_(future[:n, :n])
            torch.softmax(scores, -1, out=scores)
            o[b, :, start:end] = torch.bmm(scores, v[b, :, :end])
    return out
