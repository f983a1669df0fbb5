"""A block for a row or two on a GPU: ``model.Block``'s formulas in five kernels.

    qkv, n = c_attn(ln(x))        a = attention(qkv)        u = c_proj(a) + n
    h, n = gelu(c_fc(ln_1(u)))    x = mlp.c_proj(h) + n

ln is the norm of the block before, which has left it to this one: the kernel that reads x's row for c_attn normalizes
it on the way. The model computes the last block's norm behind all of them.

Shapes: B rows, T positions, C width; B * T is at most ``matvec.MAX_ROWS``.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from gptfast_kernels import _dispatch, gemv, layer_norm
from gptfast_kernels.matvec import why_not

from .cpu import Parts
from .linear import Conv1D

if TYPE_CHECKING:
    from .model import AttentionContext


def applies(x: Tensor) -> bool:
    """Whether hidden states x [B, T, C] are computed here: on Triton, where that was asked for, until it is timed."""
    return _dispatch.get_default_backend() == "triton" and why_not(x, normalize=True) is None


def fit(parts: Parts, x: Tensor) -> bool:
    """Whether gemv can take the place of every linear layer of a block made of ``parts``, in x's dtype."""
    linears, norms = (parts.c_attn, parts.c_proj, parts.c_fc, parts.mlp_c_proj), (parts.ln_1, parts.ln_2)
    dtypes = {p.dtype for layer in (*linears, *norms) for p in (layer.weight, layer.bias) if p is not None}
    return dtypes == {x.dtype} and all(isinstance(linear, Conv1D) for linear in linears)


def run_block(parts: Parts, x: Tensor, norm: nn.LayerNorm | None, context: "AttentionContext", layer: int) -> Tensor:
    """What the block made of ``parts`` computes for norm(x), x [B, T, C], up to its own last norm."""
    B, T, C = x.shape
    qkv, n = _linear(parts.c_attn, x, norm=norm)
    a, _ = parts.attn.attend(qkv.view(B, T, 3, parts.attn.n_head, -1), context, layer)
    u, _ = _linear(parts.c_proj, a.reshape(B, T, C), residual=n)
    h, n = _linear(parts.c_fc, u, norm=parts.ln_1, approximate=parts.approximate)
    return _linear(parts.mlp_c_proj, h, residual=n)[0]


def _linear(linear, x: Tensor, *, norm: nn.LayerNorm | None = None, **how) -> tuple[Tensor, Tensor]:
    before = None if norm is None else (norm.weight, norm.bias, norm.eps)
    return gemv(x, linear.weight.t(), linear.bias, norm=before, **how)


def normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
