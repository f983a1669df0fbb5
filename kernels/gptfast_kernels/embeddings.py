"""Token, position and token-type embeddings, summed, with dropout: the input of a transformer.

    y[b, t] = dropout(token_weight[input_ids[b, t]] + position_weight[position_ids[b, t]]
                      + token_weight[token_type_ids[b, t]])

GPT-1 has no table of token types: they are rows of the token table.

Shapes: input_ids, token_type_ids [B, T]; position_ids [B, T], [1, T] or [T]; token_weight [V, C];
position_weight [P, C]; y [B, T, C].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch


def embedding_reference(
    input_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    position_ids: Tensor,
    token_type_ids: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The formula."""
    y = F.embedding(input_ids, token_weight) + F.embedding(position_ids, position_weight)
    if token_type_ids is not None:
        y = y + F.embedding(token_type_ids, token_weight)
    return F.dropout(y, dropout_p) if dropout_p else y


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
        ValueError: a shape does not fit, or T > P without ``position_ids``. TypeError: ids are not integers.
        IndexError: an id is out of range, on a CPU; on a GPU that is not checked here, since reading an id back costs
        a synchronisation.
    """
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is not None and ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if token_weight.ndim != 2 or position_weight.ndim != 2 or token_weight.shape[1] != position_weight.shape[1]:
        raise ValueError(
            "token_weight [V, C] and position_weight [P, C] must agree in C, "
            f"got {list(token_weight.shape)} and {list(position_weight.shape)}"
        )
    T, P = input_ids.shape[-1], position_weight.shape[0]
    if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
        raise ValueError(
            f"token_type_ids must have the shape of input_ids, {list(input_ids.shape)}, got {list(token_type_ids.shape)}"
        )
    if position_ids is None:
        if T > P:
            raise ValueError(f"input_ids has {T} positions, position_weight only {P}")
        position_ids = torch.arange(T, device=input_ids.device)
    elif position_ids.shape[-1] != T:
        raise ValueError(f"position_ids must end in T = {T}, got shape {list(position_ids.shape)}")
    _dispatch.check_dropout(dropout_p)
    if input_ids.device.type == "cpu":
        check_ids_in_range("input_ids", input_ids, len(token_weight))
        check_ids_in_range("position_ids", position_ids, P)
        if token_type_ids is not None:
            check_ids_in_range("token_type_ids", token_type_ids, len(token_weight))

    _dispatch.select("embedding", backend, _dispatch.NOT_YET)
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
