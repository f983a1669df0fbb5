"""GPT-1's linear layer, and its int8 form for decoding on a CPU.

Decoding reads every weight once a token, so a quarter of the bytes is up to four times the speed. Weights are rounded
to int8 by rows of the output, symmetrically: weight ~ int8 * scale, scale = max |weight| / 127. Activations are not
quantized.

Shapes: x [..., in].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

INT8_ROWS = 8  # rows of x up to which PyTorch's int8 matmul is faster than widening the weight for its float one


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-1's files have it."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(x, self.weight.t(), self.bias)

    def into(self, x: Tensor, out: Tensor) -> Tensor:  # [N, in] -> out [N, out], without autograd
        y, bias = torch.mm(x, self.weight, out=out), self.bias
        return y if bias is None else y.add_(bias)


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


class Int8Linear(nn.Module):
    """x @ (weight * scale).T + bias, weight int8 [out, in]; made of float weights and not trained.

    Up to ``INT8_ROWS`` rows on a CPU go through ``torch._weight_int8pack_mm``, which takes x and gives its result in
    bfloat16 and sums in float32; more rows are multiplied in x's dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """For a weight [out, in] of any strides."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        largest = weight.detach().float().abs().amax(1)
        scale = (largest / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()  # as the int8 matmul reads it
        rounded = (weight.detach().float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(rounded.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def dequantized(self) -> Tensor:
        """The weight [out, in] that the int8 stand for, in float32."""
        return self.weight.float() * self.scale.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        y = self._multiply(rows).to(x.dtype)
        if self.bias is not None:
            y += self.bias
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)

    def into(self, x: Tensor, out: Tensor) -> Tensor:  # [N, in] -> out [N, out], without autograd
        y = self._multiply(x)
        return out.copy_(y) if self.bias is None else torch.add(y, self.bias, out=out)

    def _multiply(self, x: Tensor) -> Tensor:  # [N, in] -> [N, out], before the bias
        weight, scale = self.weight, self.scale
        packed = len(x) <= INT8_ROWS and x.device.type == "cpu" and scale.dtype != torch.float64
        if packed and not (torch.is_grad_enabled() and x.requires_grad):
            return torch._weight_int8pack_mm(x.to(scale.dtype), weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


def quantize(model: nn.Module) -> nn.Module:
    """Rounds the weights of every ``Conv1D`` and of the LM head to int8, in place, for decoding on a CPU.

    The embeddings stay as they are, and so do classification and multiple-choice heads. Save and train before: an int8
    model does neither. Up to ``INT8_ROWS`` rows at once are multiplied in bfloat16, more in the model's dtype, so a row
    of a larger batch is not bit for bit the row alone.

    Args:
        model: any of the GPT-1 classes, in eval mode, on a CPU.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is in training mode, not on a CPU, quantized already, without a layer to quantize, or with
            one that has hooks or a forward pass of its own, which would be lost. It is unchanged then.
    """
    devices = sorted({str(p.device) for p in model.parameters()})
    if devices != ["cpu"]:
        raise ValueError(f"model must be on cpu, got {', '.join(devices)}")
    if model.training:
        raise ValueError("model must be in eval mode, got training mode: call model.eval() first")
    if is_quantized(model):
        raise ValueError("model has int8 weights already")
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Conv1D) or (name == "lm_head" and isinstance(child, nn.Linear))
    ]
    if not any(isinstance(child, Conv1D) for _, _, child in layers):
        raise ValueError(f"model must be one of gptfast's GPT-1 classes, got {type(model).__name__}")
    for parent, name, child in layers:
        if not (is_plain(child) or is_plain(child, nn.Linear)):
            raise ValueError(
                f"{name} of a {type(parent).__name__} must be as it was built, got a {type(child).__name__} that has "
                "hooks or a forward pass of its own"
            )
    for parent, name, child in layers:
        weight = child.weight.t() if isinstance(child, Conv1D) else child.weight
        setattr(parent, name, Int8Linear(weight, child.bias))  # type: ignore[arg-type]
    return model


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())
