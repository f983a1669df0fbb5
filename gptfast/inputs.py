"""What a forward pass checks before any work. An error names the argument, its value and what is accepted.

Shapes are checked everywhere. Values are checked on a CPU; reading them back from a GPU costs a synchronisation, so
there an id out of range is a device-side assertion, as in torch.nn.Embedding, unless GPTFAST_CHECK_IDS=1. Sizes are
multiplied by math.prod: torch.Size.numel would fix them where torch.export leaves them open.

Shapes: B rows (every choice counts), T new positions, S all positions with the cached ones, H heads, C width.
"""

import math
import os

import torch
from torch import Tensor

from gptfast_kernels import _triton

from .cache import KVCache
from .config import OpenAIGPTConfig

CHECK_IDS_ON_GPU = os.environ.get("GPTFAST_CHECK_IDS") == "1"


def check_tensor(name: str, x: Tensor, device: torch.device | None = None) -> None:
    """Raises unless ``x`` is a tensor, and where the model's other inputs are, on ``device``, if that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} as the other inputs are, got {x.device}")


def _may_read(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or (CHECK_IDS_ON_GPU and not (x.is_meta or torch.cuda.is_current_stream_capturing()))


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raises unless ``ids`` are int32 or int64 in [0, size)."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if _may_read(ids):
        low, high = torch.aminmax(ids)
        if low < 0 or high >= size:
            raise ValueError(f"{name} contains {int(low if low < 0 else high)}, accepted are 0 to {size - 1}")


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], size: int, ignore_index: int | None = -100) -> None:
    """Raises unless ``labels`` are int64 of ``shape``, in [0, size) or ``ignore_index``."""
    check_tensor(name, labels)
    if labels.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if _may_read(labels):
        bad = (labels < 0) | (labels >= size)
        if ignore_index is not None:
            bad &= labels != ignore_index
        if bad.any():
            also = "" if ignore_index is None else f" and {ignore_index}"
            raise ValueError(f"{name} contains {int(labels[bad][0])}, accepted are 0 to {size - 1}{also}")


def check_text(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    table: Tensor,
    n_positions: int,
) -> torch.Size:
    """The shape of the ids, [..., T]. ``table`` is the token table [V, C]."""
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("You cannot specify both input_ids and inputs_embeds at the same time")
    shape = text_shape(input_ids, inputs_embeds)
    if shape is None:
        raise ValueError("You have to specify either input_ids or inputs_embeds")
    name = "inputs_embeds" if input_ids is None else "input_ids"
    if inputs_embeds is not None:
        _check_embeds(inputs_embeds, table)
    if not shape or 0 in shape:
        raise ValueError(f"{name} must hold at least one row and one position, got {list(shape)}")
    T = shape[-1]
    if n_positions < T:
        raise ValueError(f"{name} has {T} positions, accepted are at most n_positions = {n_positions}")
    if input_ids is not None:
        check_ids("input_ids", input_ids, len(table))
    if token_type_ids is not None:
        check_tensor("token_type_ids", token_type_ids)
        if token_type_ids.shape[-1:] != (T,) or math.prod(token_type_ids.shape) not in (T, math.prod(shape)):
            raise ValueError(f"token_type_ids must be {list(shape)} or [{T}], got shape {list(token_type_ids.shape)}")
        check_ids("token_type_ids", token_type_ids, len(table))
    return shape


def text_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size | None:
    """The shape of the ids, [..., T], whichever way they come; None where they do not."""
    if input_ids is not None:
        check_tensor("input_ids", input_ids)
        return input_ids.shape
    if inputs_embeds is not None:
        check_tensor("inputs_embeds", inputs_embeds)
        return inputs_embeds.shape[:-1]
    return None


def _check_embeds(inputs_embeds: Tensor, table: Tensor) -> None:
    C, dtype = table.shape[1], inputs_embeds.dtype
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != C:
        raise ValueError(f"inputs_embeds must be [B, T, {C}], got shape {list(inputs_embeds.shape)}")
    fits = torch.promote_types(dtype, table.dtype) == table.dtype or _triton.is_autocast_on(table.device)
    if not dtype.is_floating_point or not fits:
        raise TypeError(f"inputs_embeds must be {table.dtype} as the weights are, got {dtype}")


def check_position_ids(position_ids: Tensor | None, shape: torch.Size, n_positions: int) -> Tensor | None:
    """``position_ids`` as [B, T] or [1, T], for ids of ``shape`` [..., T]."""
    if position_ids is None:
        return None
    check_tensor("position_ids", position_ids)
    B, T = math.prod(shape[:-1]), shape[-1]
    if position_ids.shape not in ((T,), (1, T), (B, T), shape):
        raise ValueError(f"position_ids must be [{B}, {T}], [1, {T}] or [{T}], got shape {list(position_ids.shape)}")
    check_ids("position_ids", position_ids, n_positions)
    return position_ids.reshape(-1, T)


def key_padding_mask(
    attention_mask: Tensor | None, shape: torch.Size, held: int, device: torch.device
) -> Tensor | None:
    """``attention_mask`` as bool [B, S], for ids of ``shape`` [..., T] behind ``held`` positions in a cache.

    Returns None where nothing is masked: all ones is what a tokenizer sends for a batch without padding.
    """
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask, device)
    B, S = math.prod(shape[:-1]), held + shape[-1]
    if attention_mask.shape not in ((B, S), (1, S), (*shape[:-1], S)):
        raise ValueError(f"attention_mask must be [{B}, {S}], got shape {list(attention_mask.shape)}")
    mask = attention_mask.reshape(-1, S).expand(B, S) >= 1
    return None if mask.device.type == "cpu" and _may_read(mask) and bool(mask.all()) else mask


def check_head_mask(
    head_mask: Tensor | None, L: int, H: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """``head_mask`` as [L, H] of ``dtype``, for L blocks."""
    if head_mask is None:
        return None
    check_tensor("head_mask", head_mask, device)
    if head_mask.shape not in ((H,), (L, H)):
        raise ValueError(f"head_mask must be [{H}] or [{L}, {H}], got shape {list(head_mask.shape)}")
    return head_mask.to(dtype).expand(L, H)


def check_cache(
    cache: KVCache,
    blocks: int,
    config: OpenAIGPTConfig,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    may_be_ragged: bool,
) -> int:
    """The positions that ``cache`` holds, 0 where each row's number is its own.

    Raises unless the cache is of this model, for its number of ``blocks``, of ``dtype``, on ``device``, with room for
    ids of ``shape`` [..., T].
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"past_key_values must be a gptfast.KVCache, got {type(cache).__name__}")
    B, T = math.prod(shape[:-1]), shape[-1]
    L, rows, S, *heads = cache.k.shape
    ours = [blocks, config.n_head, config.n_embd // config.n_head]
    if [L, *heads] != ours:
        raise ValueError(f"past_key_values must have [layers, heads, head dim] = {ours}, got {[L, *heads]}")
    if rows != B:
        raise ValueError(f"past_key_values holds {rows} rows, the input has {B}")
    if cache.k.dtype != dtype:
        raise TypeError(f"past_key_values must be {dtype} as the model's keys are, got {cache.k.dtype}")
    if cache.k.device != device:
        raise ValueError(f"past_key_values must be on {device} as the model is, got {cache.k.device}")
    _check_seqlens(cache.seqlens, B, device)
    if isinstance(cache.seqlens, Tensor) and not may_be_ragged:
        raise ValueError(
            "past_key_values whose rows differ in length go without attention_mask and output_attentions, "
            "in eval mode and under torch.no_grad()"
        )
    if isinstance(cache.seqlens, Tensor) and not _may_read(cache.seqlens):
        return 0
    held = cache.get_seq_length()
    if held + T > S:
        raise ValueError(f"past_key_values has room for {S - held} of {S} positions, the input has {T}")
    return held


def _check_seqlens(seqlens: int | Tensor, B: int, device: torch.device) -> None:
    """Raises unless ``seqlens`` are what a KVCache of B rows may hold, as far as one may look."""
    if isinstance(seqlens, Tensor):
        if seqlens.shape != (B,):
            raise ValueError(f"past_key_values.seqlens must be an int or [{B}], got shape {list(seqlens.shape)}")
        if seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"past_key_values.seqlens must be int32 or int64, got {seqlens.dtype}")
        if seqlens.device != device:
            raise ValueError(f"past_key_values.seqlens must be on {device} as the cache is, got {seqlens.device}")
        least = int(seqlens.min()) if _may_read(seqlens) else 0
    elif isinstance(seqlens, (int, torch.SymInt)):
        least = seqlens
    else:
        raise TypeError(f"past_key_values.seqlens must be an int or a tensor, got {type(seqlens).__name__}")
    if least < 0:
        raise ValueError(f"past_key_values.seqlens must be at least 0, got {least}")


def check_logits_to_keep(logits_to_keep: int | Tensor, shape: torch.Size) -> None:
    """Raises unless ``logits_to_keep`` selects positions of ids of ``shape`` [..., T]."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {logits_to_keep}")
        return
    check_tensor("logits_to_keep", logits_to_keep)
    T, got = shape[-1], list(logits_to_keep.shape)
    if logits_to_keep.dtype == torch.bool:
        if logits_to_keep.shape not in ((T,), shape):
            raise ValueError(f"logits_to_keep must be bool {list(shape)} or [{T}], got shape {got}")
        return
    if logits_to_keep.ndim != 1 and not (logits_to_keep.ndim == len(shape) == 2 and got[0] in (1, shape[0])):
        raise ValueError(f"logits_to_keep must be int [K] or, for ids [B, T], [{shape[0]}, K], got shape {got}")
    if logits_to_keep.numel():
        check_ids("logits_to_keep", logits_to_keep, T)
