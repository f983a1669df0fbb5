"""A block on a CPU without autograd: ``model.Block``'s formulas, in place, in buffers that all layers share.

Five things make it faster than a fresh tensor an operation:

- a large fresh output costs its page faults, up to a third of the matmul that fills it;
- a matmul that overwrites its output, with the bias added behind it, is faster than one that starts from the bias;
- a matmul that adds to the residual stream spares a pass over it;
- tanh GELU as x * sigmoid(2 u) takes PyTorch's fast exponential, where ``F.gelu`` takes a slow hyperbolic tangent;
- attention by blocks of 64 queries, each against the keys up to its end, is faster than PyTorch's fused CPU kernel
  from some 128 positions on.

Shapes: B rows, T positions, N = B * T, H heads, D head dim, C = H * D width.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast_kernels import _dispatch, _triton

from .linear import BlockedLinear, Conv1D

if TYPE_CHECKING:
    from .model import Attention, AttentionContext

QUERIES = 64  # a block of scores [H, 64, T] stays in the L2 cache
COPIED_BLOCKS = 4  # of queries; where there are more, keys and values are first gathered from between the others
GELU_ROWS = 64  # so do these rows of the MLP's inner columns
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


class Buffers:
    """What one forward pass writes its intermediate results to, and where its attention finds keys and values."""

    def __init__(self, x: Tensor, context: "AttentionContext", n_head: int, inner_columns: int):
        """For x [B, T, C]."""
        B, T, C = x.shape
        N = B * T
        self.sizes = n_head, (C, 3 * C), (C, inner_columns)  # of a block that fits: heads, features of c_attn and c_fc
        self.qkv = x.new_empty(N, 3 * C)
        self.attention = x.new_empty(N, C)
        self.residual = x.new_empty(N, C)
        self.inner = x.new_empty(N, inner_columns)
        self.gate = x.new_empty(GELU_ROWS if N >= GELU_ROWS else 0, inner_columns)

        self.q, self.k, self.v = self.qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        cache = context.cache
        self.held = cache.seqlens if cache is not None else 0
        if cache is not None and isinstance(self.held, int):
            end = self.held + T
            self.new = tuple(zip(*(c[:, :, self.held : end].transpose(2, 3) for c in (cache.k, cache.v)), strict=True))
            self.kv = tuple(zip(*(c[:, :, :end].transpose(2, 3) for c in (cache.k, cache.v)), strict=True))
        self.visible: Tensor | None = None  # bool [T, S], which keys a query sees
        if isinstance(self.held, int) and self.held and 1 < T < 2 * QUERIES:
            self.visible = x.new_ones(T, self.held + T, dtype=torch.bool).tril(self.held)

    def fit(self, parts: "Parts") -> bool:
        """Whether the block made of ``parts`` has the heads, widths and dtype of these; a config does not bind it."""
        dtypes = {getattr(ln.weight, "dtype", None) for ln in (parts.ln_1, parts.ln_2)}
        sizes = parts.attn.n_head, parts.c_attn.features, parts.c_fc.features
        return sizes == self.sizes and dtypes <= {None, self.qkv.dtype}


def applies(x: Tensor) -> bool:
    """Whether hidden states like ``x`` can be computed here: on a CPU, eagerly, by PyTorch's operators.

    In float32; in half precision one position alone, for attention and GELU by parts would round at every step.
    """
    one = x.shape[0] * x.shape[1] == 1
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and (x.dtype == torch.float32 or (one and x.dtype in (torch.bfloat16, torch.float16)))
        and _dispatch.get_default_backend() in ("auto", "torch")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # vmap takes no ``out=``
    )


class Parts(NamedTuple):
    """What a block computes with: found once a forward pass, for ``nn.Module`` looks each up in three places."""

    attn: "Attention"
    c_attn: Conv1D | BlockedLinear
    c_proj: Conv1D | BlockedLinear
    ln_1: nn.LayerNorm
    c_fc: Conv1D | BlockedLinear
    mlp_c_proj: Conv1D | BlockedLinear
    ln_2: nn.LayerNorm
    approximate: str  # GELU's form


def run_block(parts: Parts, x: Tensor, context: "AttentionContext", layer: int, consume: bool) -> Tensor:
    """What the block made of ``parts`` computes for x [B, T, C], which is overwritten if ``consume``."""
    buffers = context.buffers
    assert buffers is not None
    shape = x.shape
    x = x.reshape(-1, shape[2])
    parts.c_attn.into(x, buffers.qkv)
    a = _attend(parts.attn, buffers, context, layer)
    if _dispatch.is_recording():
        for op in ("layer_norm", "linear_gelu" if isinstance(parts.c_fc, Conv1D) else "gelu", "layer_norm"):
            _dispatch.select(op, "auto", _triton.why_not(x))
    residual = x if consume else buffers.residual.copy_(x)
    n = _normalize(parts.ln_1, parts.c_proj.onto(a, residual))
    h = _gelu_(parts.c_fc.into(n, buffers.inner), parts.approximate, buffers.gate)
    return _normalize(parts.ln_2, parts.mlp_c_proj.onto(h, n)).view(shape)


def _normalize(ln: nn.LayerNorm, x: Tensor) -> Tensor:
    return torch.layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)


def _gelu_(x: Tensor, approximate: str, buffer: Tensor) -> Tensor:
    """GELU of x [N, columns] in place. The tanh form is x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if approximate == "none" or len(x) < GELU_ROWS:
        return torch.ops.aten.gelu_(x, approximate=approximate)
    slope = x.new_tensor(GELU_SLOPE)
    for rows in x.split(GELU_ROWS):
        gate = buffer[: len(rows)]
        torch.addcmul(slope, rows, rows, value=0.044715 * GELU_SLOPE, out=gate).mul_(rows).sigmoid_()
        rows.mul_(gate)
    return x


def _attend(attn: "Attention", buffers: Buffers, context: "AttentionContext", layer: int) -> Tensor:
    """Attention [N, C] of what ``buffers.qkv`` holds, which is appended to the cache if there is one."""
    q, k, v = buffers.q, buffers.k, buffers.v
    B, H, T, D = q.shape
    if context.key_padding_mask is not None or isinstance(buffers.held, Tensor):
        return attn.attend(buffers.qkv.view(B, T, 3, H, D), context, layer)[0].reshape(B * T, H * D)
    if _dispatch.is_recording():
        op = "flash_attention_with_kvcache" if buffers.held else "flash_attention"
        _dispatch.select(op, "auto", _triton.why_not(q))
    if context.cache is not None:
        new_k, new_v = buffers.new[layer]
        new_k.copy_(k)
        new_v.copy_(v)
        k, v = buffers.kv[layer]
    if T >= 2 * QUERIES:
        return _causal_attention(q, k, v, buffers.attention)
    a = F.scaled_dot_product_attention(q, k, v, buffers.visible, is_causal=T > 1 and not buffers.held)
    return a.transpose(1, 2).reshape(B * T, H * D)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """Attention of q [B, H, T, D] over k and v [B, H, S, D], of which the last T are its own, in out [B * T, H * D]."""
    B, H, T, D = q.shape
    held = k.shape[2] - T
    o = out.view(B, T, H, D).transpose(1, 2)
    future = q.new_full((QUERIES, QUERIES), -torch.inf).triu(1)
    buffer = q.new_empty(H * QUERIES * (held + T))
    copies = q.new_empty(2, H, held + T, D) if T > COPIED_BLOCKS * QUERIES else None
    for b in range(B):
        row_k, row_v = k[b], v[b]
        if copies is not None:
            row_k, row_v = copies[0].copy_(row_k), copies[1].copy_(row_v)
        for start in range(0, T, QUERIES):
            end = min(start + QUERIES, T)
            n, seen = end - start, held + end
            scores = buffer[: H * n * seen].view(H, n, seen)
            keys = row_k[:, :seen].transpose(1, 2)
            torch.baddbmm(scores, q[b, :, start:end], keys, beta=0, alpha=1 / math.sqrt(D), out=scores)
            scores[:, :, held + start :].add_(future[:n, :n])
            torch.softmax(scores, -1, out=scores)
            o[b, :, start:end] = torch.bmm(scores, row_v[:, :seen])
    return out
