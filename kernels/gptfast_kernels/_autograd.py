"""What the launchers and the autograd functions of the ops share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [M, C] with the last stride 1; a copy where its strides need one."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def wants_grad(*tensors: Tensor | None, transforms: tuple[str, ...] = ()) -> bool:
    """Whether a gradient may flow to any of the tensors. Without one, an op skips its autograd function.

    Raises where a transform of ``torch.func`` not among ``transforms``, or forward-mode differentiation, is under way:
    the operators below an autograd function would pass for constants there, silently.
    """
    if not torch.compiler.is_compiling():
        level = torch._C._functorch.peek_interpreter_stack()
        if level is not None and level.key().name not in transforms:
            raise RuntimeError(
                f"torch.func's {level.key().name} cannot pass this backend; backend='reference' takes it"
            )
        if torch.autograd.forward_ad._current_level >= 0:
            raise RuntimeError("forward-mode differentiation cannot pass this backend; backend='reference' takes it")
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def apart(*arguments: Any) -> tuple:
    """The arguments of an autograd function, as ``torch.compile`` takes them: no tensor in two places."""
    if not torch.compiler.is_compiling():
        return arguments
    return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in arguments)


def first_order(op: str) -> Callable[[Callable], Callable]:
    """Makes ``create_graph=True`` an error in the backward it decorates. ``once_differentiable`` does so only where the
    incoming gradient requires one itself: elsewhere the first gradient would pass for a constant, silently."""

    def decorate(backward):
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(f"{op}: this backend has no second derivatives; backend='reference' has")
            return backward(ctx, *grads)

        return checked

    return decorate
