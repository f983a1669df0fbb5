"""GPT-1's linear layer, and two forms of it for inference on a CPU: int8 weights, and weights in blocks of columns.

Decoding reads every weight once a token, so a quarter of the bytes is up to four times the speed. Between some 2 and
128 rows a matmul walks down narrow panels of the weight; where each panel is a block of memory by itself it is a sixth
faster.

Shapes: x [..., in]; N rows.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from gptfast_kernels.projection import linear_dtype

INT8_ROWS = 8  # rows of x up to which summing rows of int8 weights is faster than widening them for a matmul
HALF_COLUMNS = 384  # of a half-precision weight that one thread sums at once
CHUNK = 512  # rows of x at once: what they make of a block of columns stays in the cache


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-1's files have it."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    @property
    def features(self) -> tuple[int, int]:  # in, out
        in_features, out_features = self.weight.shape
        return in_features, out_features

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(x, self.weight.t(), self.bias)

    def into(self, x: Tensor, out: Tensor) -> Tensor:  # [N, in] -> out [N, out], without autograd
        weight, bias = self.weight, self.bias
        y = torch.mm(x, weight, out=out) if x.dtype == torch.float32 else out.copy_(_half_row(x, weight))
        return y if bias is None else y.add_(bias)

    def onto(self, x: Tensor, out: Tensor) -> Tensor:  # [N, in], added to out [N, out], without autograd
        weight, bias = self.weight, self.bias
        y = out.addmm_(x, weight) if x.dtype == torch.float32 else out.add_(_half_row(x, weight))
        return y if bias is None else y.add_(bias)


def _half_row(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, in] @ weight [in, out], both bfloat16 or float16, as a weighted sum of rows.

    PyTorch's operator for sums of embeddings reads a weight of this layout at memory speed; its matmul takes twice as
    long for one row. Columns go to threads by blocks.
    """
    in_features, out_features = weight.shape
    blocks = out_features // HALF_COLUMNS if out_features % HALF_COLUMNS == 0 else 1
    rows, starts = _by_blocks(in_features, blocks)
    factors = x.expand(blocks, in_features).reshape(-1)
    table = weight.reshape(in_features * blocks, -1)
    return torch.embedding_bag(table, rows, starts, False, 0, False, factors)[0].view(1, out_features)


@functools.cache
def _by_blocks(in_features: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Of a weight [in, out] seen as [in * blocks, out / blocks]: its rows block by block, and where each begins."""
    rows = torch.arange(in_features * blocks, device="cpu").view(in_features, blocks).t().flatten()
    return rows, torch.arange(0, len(rows), in_features, device="cpu")


def is_watched(module: nn.Module) -> bool:
    """Whether a call of ``module`` does more than its class says: somebody's hooks, or a ``forward`` set on it."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _has_any_global_hook()
    )


def is_plain(module: nn.Module, kind: type[nn.Module] = Conv1D) -> bool:
    """Whether ``module`` computes what a ``kind`` does, and nobody watches it.

    Then its weights can be used without calling it.
    """
    return isinstance(module, kind) and type(module).forward is kind.forward and not is_watched(module)


class BlockedLinear(nn.Module):
    """x @ weight + bias, the weight in blocks of ``width`` columns that lie one behind the other; not trained."""

    COLUMNS: int  # of a block, at most
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """For a weight [in, out] of any strides."""
        super().__init__()
        self.features = tuple(weight.shape)
        self.in_features, self.out_features = in_features, out_features = self.features
        self.blocks = math.ceil(out_features / self.COLUMNS)
        self.width = math.ceil(out_features / self.blocks)
        padded = F.pad(weight.detach(), (0, self.blocks * self.width - out_features))
        blocks = padded.reshape(in_features, self.blocks, self.width).transpose(0, 1).contiguous()
        self.weight = nn.Parameter(self._stored(blocks), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _stored(self, blocks: Tensor) -> Tensor:
        """What is kept of a weight [blocks, in, width]."""
        return blocks

    def _multiply(self, x: Tensor) -> Tensor:
        """x [N, in] -> [blocks, N, width], before the bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = self._product(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        y = y.to(linear_dtype(x))  # autocast does not know every operator below
        return y.contiguous() if self.bias is None else y + self.bias.to(y.dtype)

    def into(self, x: Tensor, out: Tensor) -> Tensor:  # [N, in] -> out [N, out], without autograd
        if x.shape[0] > CHUNK:
            for rows, target in zip(x.split(CHUNK), out.split(CHUNK), strict=True):
                self.into(rows, target)
            return out
        y, bias = self._product(x), self.bias
        target = out.view(y.shape)
        if bias is None:
            target.copy_(y)
        else:
            torch.add(y, bias.view(y.shape[1:]), out=target)
        return out

    def onto(self, x: Tensor, out: Tensor) -> Tensor:  # [N, in], added to out [N, out], without autograd
        if x.shape[0] > CHUNK:
            for rows, target in zip(x.split(CHUNK), out.split(CHUNK), strict=True):
                self.onto(rows, target)
            return out
        y = self._product(x)
        out.view(y.shape).add_(y)
        return out if self.bias is None else out.add_(self.bias)

    def _product(self, x: Tensor) -> Tensor:
        """x [N, in] before the bias, as [N, blocks, width] or [N, 1, out]."""
        y, N, columns = self._multiply(x), x.shape[0], self.blocks * self.width
        if N == 1:
            y = y.view(1, 1, columns)
        elif columns != self.out_features:
            y = y.transpose(0, 1).reshape(N, 1, columns)
        else:
            return y.transpose(0, 1)
        return y if columns == self.out_features else y[:, :, : self.out_features]


class PackedLinear(BlockedLinear):
    """A ``Conv1D`` for inference; its ``state_dict`` is a ``Conv1D``'s."""

    COLUMNS = 384  # 1.2 MB of a float32 weight with 768 rows

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(self.blocks, *x.shape), self.weight)

    def unpacked(self) -> Tensor:
        """The weight [in, out]."""
        return self.weight.transpose(0, 1).reshape(self.in_features, -1)[:, : self.out_features].contiguous()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.unpacked()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and tuple(weight.shape) == self.features:
            state_dict[prefix + "weight"] = PackedLinear(weight, None).weight
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Int8Linear(BlockedLinear):
    """A linear layer whose weights are 8 bits each: uint8 * scale + offset, both of a block's row of ``COLUMNS``.

    Activations are not rounded. Up to ``INT8_ROWS`` rows on a CPU are multiplied by PyTorch's operator for sums of
    embeddings (Khudia et al. 2021, "FBGEMM"): y = sum of x[k] * weight[k] is one, weighted. More are multiplied with
    the weights widened to x's dtype.
    """

    COLUMNS = 192

    def _stored(self, blocks: Tensor) -> Tensor:  # uint8 [blocks * in, width + 8], scale and offset in the last 8 bytes
        return torch.ops.quantized.embedding_bag_byte_prepack(blocks.float().flatten(0, 1))

    def _multiply(self, x: Tensor) -> Tensor:
        N = x.shape[0]
        few = 0 < N <= INT8_ROWS and x.device.type == "cpu" and x.dtype != torch.float64
        if not few or (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0:
            return torch.bmm(x.expand(self.blocks, *x.shape), self._widened().to(x.dtype))
        traced = type(x) is not Tensor or torch.compiler.is_compiling()  # what is made then is no tensor to keep
        rows, starts = (_by_bags if traced else _kept_by_bags)(self.blocks, self.in_features, N)
        factors = x.float().expand(self.blocks, *x.shape).reshape(-1)
        y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.weight, rows, starts, per_sample_weights=factors
        )
        return y.view(self.blocks, N, self.width).to(x.dtype)

    def _widened(self) -> Tensor:  # float32 [blocks, in, width]
        wide = torch.ops.quantized.embedding_bag_byte_unpack(self.weight)
        return wide.view(self.blocks, self.in_features, self.width)

    def dequantized(self) -> Tensor:
        """The weight [out, in] that the int8 stand for, in float32."""
        return self._widened().transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]


def _by_bags(blocks: int, in_features: int, N: int) -> tuple[Tensor, Tensor]:
    """Which rows of an int8 weight [blocks * in, width] each of blocks * N sums takes, and where each begins: int32.

    All N rows of x meet a block before the next block is read.
    """
    rows = torch.arange(blocks * in_features, dtype=torch.int32, device="cpu")
    rows = rows.view(blocks, 1, in_features).expand(-1, N, -1).reshape(-1)
    return rows, torch.arange(0, len(rows), in_features, dtype=torch.int32, device="cpu")


_kept_by_bags = functools.cache(_by_bags)


def quantize(model: nn.Module) -> nn.Module:
    """Rounds the weights of every ``Conv1D`` and of the LM head to 8 bits, in place, for decoding on a CPU.

    The embeddings stay as they are, and so do classification and multiple-choice heads. Save and train before: an int8
    model does neither. More than ``INT8_ROWS`` rows at once take another product than fewer, so a row of a larger batch
    is not bit for bit the row alone.

    Args:
        model: any of the GPT-1 classes, in eval mode, on a CPU.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is in training mode, not on a CPU, quantized or packed already, without a layer to
            quantize, or with one that has inf or NaN among its weights, or hooks or a forward pass of its own, which
            would be lost. TypeError: it is no module. It is unchanged then.
    """
    _check(model)
    return _replace(model, Int8Linear, head=True)


def pack(model: nn.Module) -> nn.Module:
    """Lays the weights of every ``Conv1D`` out in blocks of columns, in place, for inference on a CPU.

    The forward pass over some 2 to 128 positions at once is faster then, and over 512 as fast. Over thousands, and
    where tokens are decoded one at a time, it is up to a sixth slower. Memory and ``state_dict`` stay the same,
    outputs differ by rounding. Packed weights are not trained.

    Args:
        model: any of the GPT-1 classes, float32, in eval mode, on a CPU.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is in training mode, not on a CPU, not in float32, quantized or packed already, without a
            layer to pack, or with one that has hooks or a forward pass of its own, which would be lost. TypeError: it
            is no module. It is unchanged then.
    """
    _check(model)
    dtypes = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"})
    if dtypes:
        raise ValueError(f"model must be in torch.float32, got {', '.join(dtypes)}")
    return _replace(model, PackedLinear, head=False)


def _check(model: nn.Module) -> None:
    """Raises unless the weights of ``model`` can be laid out otherwise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be one of gptfast's GPT-1 classes, got {type(model).__name__}")
    devices = sorted({str(p.device) for p in model.parameters()})
    if devices != ["cpu"]:
        raise ValueError(f"model must be on cpu, got {', '.join(devices)}")
    if model.training:
        raise ValueError("model must be in eval mode, got training mode: call model.eval() first")
    for kind, adjective in ((Int8Linear, "int8"), (PackedLinear, "packed")):
        if any(isinstance(module, kind) for module in model.modules()):
            raise ValueError(f"model has {adjective} weights already")


def _replace(model: nn.Module, make: type[BlockedLinear], head: bool) -> nn.Module:
    """Puts what ``make`` makes of it in the place of every ``Conv1D``, and of the LM head if ``head``."""
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Conv1D) or (head and name == "lm_head" and isinstance(child, nn.Linear))
    ]
    if not any(isinstance(child, Conv1D) for _, _, child in layers):
        raise ValueError(f"model must be one of gptfast's GPT-1 classes, got {type(model).__name__}")
    for parent, name, child in layers:
        if not (is_plain(child) or is_plain(child, nn.Linear)):
            raise ValueError(
                f"{name} of a {type(parent).__name__} must be as it was built, got a {type(child).__name__} that has "
                "hooks or a forward pass of its own"
            )
        if make is Int8Linear and not child.weight.isfinite().all():  # type: ignore[operator]
            raise ValueError(f"weight of {name} of a {type(parent).__name__} must be finite, got inf or NaN")
    for parent, name, child in layers:
        weight = child.weight if isinstance(child, Conv1D) else child.weight.t()
        setattr(parent, name, make(weight, child.bias).eval())  # type: ignore[arg-type]
    return model


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())


def check_savable(model: nn.Module) -> None:
    if is_quantized(model):
        raise ValueError("model has int8 weights, which no file format here holds: save it before quantize()")
