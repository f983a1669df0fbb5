"""Token, position and token-type embeddings, summed, with dropout: the input of a transformer.

    y[b, t] = dropout(token_weight[input_ids[b, t]] + position_weight[position_ids[b, t]]
                      + token_weight[token_type_ids[b, t]])

GPT-1 has no table of token types: they are rows of the token table. Forward reads each row once and writes y.

Backward adds up, for each row of a table, the rows of dropout(dy) that looked it up, in the order of their positions:
deterministic, and without atomics. The ids are sorted, which lays equal ids side by side, in runs:

    gather  a program adds up CHUNK sorted rows. A run that lies inside them is a finished row of the gradient. One that
            began before leaves its sum in head[chunk]; one that begins here and goes on leaves it in tail[chunk].
    join    a run over several chunks is tail[chunk] + head[chunk + 1] + … while the id stays.

Saved: the ids and the dropout's seed.

Shapes: input_ids, token_type_ids [B, T]; position_ids [B, T], [1, T] or [T]; token_weight [V, C];
position_weight [P, C]; y [B, T, C]; M = B * T.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _philox, _triton
from ._autograd import apart, as_rows, first_order, wants_grad
from ._triton import tl, triton


def embedding_reference(
    input_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The formula."""
    if position_ids is None:
        positions = position_weight[: input_ids.shape[-1]]
    else:
        positions = F.embedding(position_ids, position_weight)
    y = F.embedding(input_ids, token_weight) + positions
    if token_type_ids is not None:
        y = y + F.embedding(token_type_ids, token_weight)
    return F.dropout(y, dropout_p) if dropout_p else y


# ---- configs ----


@dataclass(frozen=True)
class Config:
    rows: int  # tokens a program works on
    width: int  # columns a program works on, at most
    warps: int


# Compiled for four targets, not timed.
FORWARD = Config(rows=4, width=1024, warps=4)  # at most 106 registers, 4 blocks an SM
GATHER = Config(rows=32, width=1024, warps=4)  # few partial sums, and at 32k tokens still 8 programs an SM
JOIN = Config(rows=1, width=1024, warps=4)


# ---- kernels ----


@triton.jit
def _load_rows(Weight, ids, column, mask, size, stride, N):
    """Weight[ids] [ROWS, BLOCK] in float32; NaN for an id outside [0, size), which must not be read."""
    inside = (ids >= 0) & (ids < size)
    rows = tl.load(Weight + ids.to(tl.int64) * stride + column, mask=mask & inside, other=0.0).to(tl.float32)
    return tl.where(inside, rows, float("nan"))


@triton.jit(do_not_specialize=["M", "T"])
def _embedding_forward_kernel(
    InputIds,  # [M]
    PositionIds,  # [T] or None: 0 … T - 1
    TokenTypeIds,  # [M] or None
    TokenWeight,  # [V, N]
    PositionWeight,  # [P, N]
    Seed,  # [1] or None: no dropout
    Y,  # [M, N]
    M,
    T,  # position ids, which repeat
    V,
    P,
    N,
    stride_token,
    stride_position,
    dropout_p,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    row = ((program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    start = (program % across) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (row < M) & (column < N)

    position = row % T
    if PositionIds is not None:
        position = tl.load(PositionIds + position)
    ids = tl.load(InputIds + row, mask=row < M, other=0)
    y = _load_rows(TokenWeight, ids, column, mask, V, stride_token, N)
    y += _load_rows(PositionWeight, position, column, mask, P, stride_position, N)
    if TokenTypeIds is not None:
        types = tl.load(TokenTypeIds + row, mask=row < M, other=0)
        y += _load_rows(TokenWeight, types, column, mask, V, stride_token, N)
    if Seed is not None:
        kept = _philox.keep_block(tl.load(Seed), row, start, dropout_p, BLOCK)
        y = tl.where(kept, y * (1 / (1 - dropout_p)), 0.0)
    tl.store(Y + row * N + column, y, mask=mask)


@triton.jit(do_not_specialize=["R", "M"])
def _embedding_gather_kernel(
    DY,  # [M, N]
    Ids,  # [R], sorted
    Order,  # [R]: which row of DY, modulo M
    Seed,  # [1] or None: no dropout
    DWeight,  # [size, N]: finished runs
    Head,  # [chunks, N] float32: of a run that began before
    Tail,  # [chunks, N] float32: of a run that begins here and goes on
    R,
    M,
    N,
    size,
    stride_dy,
    dropout_p,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    chunk = (program // across).to(tl.int64)
    start = (program % across) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    first = chunk * CHUNK

    before = tl.load(Ids + first - 1, mask=first > 0, other=-1)
    began_here = tl.load(Ids + first) != before
    total = tl.zeros([1, BLOCK], tl.float32)
    for i in range(CHUNK):
        n = first + i
        row = tl.load(Order + n, mask=n < R, other=0) % M
        dy = tl.load(DY + row * stride_dy + column, mask=(column < N) & (n < R), other=0.0).to(tl.float32)
        if Seed is not None:
            kept = _philox.keep_block(tl.load(Seed), row + tl.zeros([1, 1], tl.int64), start, dropout_p, BLOCK)
            dy = tl.where(kept, dy * (1 / (1 - dropout_p)), 0.0)
        total += dy

        token = tl.load(Ids + n, mask=n < R, other=-1)
        goes_on = (n + 1 < R) & (tl.load(Ids + n + 1, mask=n + 1 < R, other=-1) == token)
        ends = (n < R) & ((goes_on == 0) | (i == CHUNK - 1))
        finished = ends & began_here & (goes_on == 0) & (token >= 0) & (token < size)
        tl.store(DWeight + token.to(tl.int64) * N + column, total, mask=finished & (column < N))
        tl.store(Tail + chunk * N + column, total, mask=ends & began_here & goes_on & (column < N))
        tl.store(Head + chunk * N + column, total, mask=ends & (began_here == 0) & (column < N))
        total = tl.where(ends, 0.0, total)
        began_here = began_here | ends


@triton.jit
def _embedding_join_kernel(
    Ids,  # [R], sorted
    Ends,  # [R // CHUNK]: where the run of a chunk's last id ends
    DWeight,  # [size, N]
    Head,  # [chunks, N]
    Tail,  # [chunks, N]
    N,
    size,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The run that begins in a chunk and goes on into the next, if there is one."""
    across = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    chunk = (program // across).to(tl.int64)
    column = (program % across) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    first = chunk * CHUNK

    token = tl.load(Ids + first + CHUNK - 1)
    before = tl.load(Ids + first - 1, mask=first > 0, other=-1)
    end = tl.load(Ends + chunk)
    if (end > first + CHUNK) & (token != before) & (token >= 0) & (token < size):
        total = tl.load(Tail + chunk * N + column, mask=column < N, other=0.0)
        for following in range(chunk + 1, tl.cdiv(end, CHUNK)):
            total += tl.load(Head + following * N + column, mask=column < N, other=0.0)
        tl.store(DWeight + token.to(tl.int64) * N + column, total, mask=column < N)


# ---- launchers ----


def _block(how: Config, N: int) -> int:
    return min(how.width, max(16, triton.next_power_of_2(N)))


def _forward(
    input_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """y [*input_ids.shape, C]. Position ids of fewer elements than ``input_ids`` repeat."""
    y = _forward_fake(input_ids, token_weight, position_weight, position_ids, token_type_ids, seed, dropout_p)
    M, N = input_ids.numel(), token_weight.shape[1]
    if M and N:
        token_weight, position_weight = as_rows(token_weight), as_rows(position_weight)
        block = _block(FORWARD, N)
        _dispatch.configured(FORWARD.rows, block, warps=FORWARD.warps)
        with _triton.on(token_weight):
            _embedding_forward_kernel[(triton.cdiv(M, FORWARD.rows) * triton.cdiv(N, block),)](
                input_ids.contiguous(),
                None if position_ids is None else position_ids.contiguous(),
                None if token_type_ids is None else token_type_ids.contiguous(),
                token_weight,
                position_weight,
                seed,
                y,
                M,
                input_ids.shape[-1] if position_ids is None else position_ids.numel(),
                len(token_weight),
                len(position_weight),
                N,
                token_weight.stride(0),
                position_weight.stride(0),
                dropout_p,
                ROWS=FORWARD.rows,
                BLOCK=block,
                num_warps=FORWARD.warps,
            )
    return y


def _forward_fake(input_ids, token_weight, position_weight, position_ids, token_type_ids, seed, dropout_p):
    dtype = torch.promote_types(token_weight.dtype, position_weight.dtype)
    return token_weight.new_empty((*input_ids.shape, token_weight.shape[1]), dtype=dtype)


def _backward(
    dy: Tensor, ids: Tensor, order: Tensor, seed: Tensor | None, dropout_p: float, size: int, dtype: torch.dtype
) -> Tensor:
    """The gradient [size, C] of a table, from dy [..., C], the sorted ids [R] that looked it up, and the rows [R] of
    dy, modulo their number, in which they stood."""
    N, R = dy.shape[-1], len(ids)
    dweight = dy.new_zeros((size, N), dtype=dtype)
    if N and R:
        dy = as_rows(dy)
        chunks, across = triton.cdiv(R, GATHER.rows), triton.cdiv(N, _block(GATHER, N))
        head, tail = (dy.new_empty((chunks, N), dtype=torch.float32) for _ in range(2))
        with _triton.on(dy):
            _embedding_gather_kernel[(chunks * across,)](
                dy,
                ids,
                order,
                seed,
                dweight,
                head,
                tail,
                R,
                len(dy),
                N,
                size,
                dy.stride(0),
                dropout_p,
                CHUNK=GATHER.rows,
                BLOCK=_block(GATHER, N),
                num_warps=GATHER.warps,
            )
            last = ids[GATHER.rows - 1 :: GATHER.rows].contiguous()
            if len(last):
                _embedding_join_kernel[(len(last) * triton.cdiv(N, _block(JOIN, N)),)](
                    ids,
                    torch.searchsorted(ids, last, right=True),
                    dweight,
                    head,
                    tail,
                    N,
                    size,
                    CHUNK=GATHER.rows,
                    BLOCK=_block(JOIN, N),
                    num_warps=JOIN.warps,
                )
    return dweight


# ---- registration ----


def _backward_fake(dy, ids, order, seed, dropout_p, size, dtype):
    return dy.new_empty((size, dy.shape[-1]), dtype=dtype)


_lib = torch.library.Library("gptfast", "FRAGMENT")
_lib.define(
    "embedding(Tensor input_ids, Tensor token_weight, Tensor position_weight, Tensor? position_ids, "
    "Tensor? token_type_ids, Tensor? seed, float dropout_p) -> Tensor"
)
_lib.define(
    "embedding_backward(Tensor dy, Tensor ids, Tensor order, Tensor? seed, float dropout_p, SymInt size, "
    "ScalarType dtype) -> Tensor"
)
_lib.impl("embedding", _forward, "CompositeExplicitAutograd")
_lib.impl("embedding_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gptfast::embedding", _forward_fake, lib=_lib)
torch.library.register_fake("gptfast::embedding_backward", _backward_fake, lib=_lib)
_forward_op = torch.ops.gptfast.embedding.default
_backward_op = torch.ops.gptfast.embedding_backward.default


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_ids, token_weight, position_weight, position_ids, token_type_ids, seed, dropout_p):
        ctx.save_for_backward(input_ids, position_ids, token_type_ids, seed)
        ctx.tables = [(len(table), table.dtype) for table in (token_weight, position_weight)]
        ctx.dropout_p = dropout_p
        return _forward_op(input_ids, token_weight, position_weight, position_ids, token_type_ids, seed, dropout_p)

    @staticmethod
    @first_order("embedding")
    def backward(ctx, dy):
        input_ids, position_ids, token_type_ids, seed = ctx.saved_tensors
        grads = [None, None]
        if ctx.needs_input_grad[1]:
            ids = input_ids.flatten()
            if token_type_ids is not None:
                ids = torch.cat([ids, token_type_ids.flatten()])
            grads[0] = _backward_op(dy, *ids.sort(stable=True), seed, ctx.dropout_p, *ctx.tables[0])
        if ctx.needs_input_grad[2]:
            if position_ids is None:  # 0 … T - 1 for each sequence: a transposition sorts them
                order = torch.arange(input_ids.numel(), device=dy.device).view(input_ids.shape)
                order = order.movedim(-1, 0).flatten()
                ids = order % input_ids.shape[-1]
            else:
                ids = position_ids.flatten().repeat(input_ids.numel() // max(1, position_ids.numel()))
                ids, order = ids.sort(stable=True)
            grads[1] = _backward_op(dy, ids, order, seed, ctx.dropout_p, *ctx.tables[1])
        return None, *grads, None, None, None, None


# ---- public ----


def embedding(
    input_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Sum of token, position and (optional) token-type embeddings, then dropout.

    Args:
        input_ids: [B, T], int32 or int64, each in [0, V).
        token_weight: [V, C]. position_weight: [P, C].
        position_ids: [B, T], [1, T] or [T], each in [0, P); None for 0 … T-1.
        token_type_ids: [B, T] rows of ``token_weight``, or None.
        dropout_p: in [0, 1). Pass 0 outside training.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [B, T, C] in the weights' dtype.

    Raises:
        ValueError: a shape or a device does not fit, or T > P without ``position_ids``. TypeError: ids are not
        integers, or weights not floating point. IndexError: an id is out of range, on a CPU; on a GPU, where reading
        one back costs a synchronisation, the triton backend gives NaN. RuntimeError: the backend asked for cannot run.
    """
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is not None and ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
        if ids is not None and ids.device != token_weight.device:
            raise ValueError(f"{name} is on {ids.device}, but token_weight is on {token_weight.device}")
    _dispatch.check_floats(token_weight=token_weight, position_weight=position_weight)
    if token_weight.ndim != 2 or position_weight.ndim != 2 or token_weight.shape[1] != position_weight.shape[1]:
        raise ValueError(
            "token_weight [V, C] and position_weight [P, C] must agree in C, "
            f"got {list(token_weight.shape)} and {list(position_weight.shape)}"
        )
    if input_ids.ndim == 0:
        raise ValueError("input_ids must be [B, T], got a scalar")
    T, P = input_ids.shape[-1], position_weight.shape[0]
    if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
        raise ValueError(
            f"token_type_ids must have the shape of input_ids, {list(input_ids.shape)}, "
            f"got {list(token_type_ids.shape)}"
        )
    if position_ids is None:
        if T > P:
            raise ValueError(f"input_ids has {T} positions, position_weight only {P}")
    elif position_ids.shape != input_ids.shape and position_ids.shape not in ((T,), (1, T)):
        raise ValueError(
            f"position_ids must be {list(input_ids.shape)}, [1, {T}] or [{T}] to fit input_ids, "
            f"got {list(position_ids.shape)}"
        )
    _dispatch.check_dropout(dropout_p)
    if input_ids.device.type == "cpu":
        check_ids_in_range("input_ids", input_ids, len(token_weight))
        if position_ids is not None:
            check_ids_in_range("position_ids", position_ids, P)
        if token_type_ids is not None:
            check_ids_in_range("token_type_ids", token_type_ids, len(token_weight))

    cannot = _triton.why_not(token_weight) or _triton.why_not(position_weight)
    if _dispatch.select("embedding", backend, cannot) == "triton":
        seed = _philox.draw_seed(token_weight.device) if dropout_p else None
        args = (input_ids, token_weight, position_weight, position_ids, token_type_ids, seed, dropout_p)
        return _Embedding.apply(*apart(*args)) if wants_grad(token_weight, position_weight) else _forward_op(*args)
    return embedding_reference(
        input_ids,
        token_weight,
        position_weight,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
        dropout_p=dropout_p,
    )


def check_ids_in_range(name: str, ids: Tensor, size: int) -> None:
    """Raises IndexError for the first id outside [0, size). Reads the ids: on a GPU it synchronises."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= size:
        bad = int(low) if low < 0 else int(high)
        raise IndexError(f"{name} contains {bad}; accepted are 0 to {size - 1}")
