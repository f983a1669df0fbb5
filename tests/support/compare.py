"""An op on the backends, its outputs and every gradient held to the accuracy rule."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .accuracy import assert_no_worse_than_torch
from .guard import Guard

Op = Callable[..., Tensor | tuple[Tensor, ...]]  # op(backend, **tensors)


def outputs_and_gradients(op: Op, backend: str, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What ``op`` returns and the gradients of the floating-point tensors, for random incoming gradients."""
    leaves = {
        name: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in tensors.items()
    }
    out = op(backend, **leaves)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(0)
    incoming = [_incoming(y, generator) for y in out]
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    before = [gradient.clone() for gradient in incoming]
    gradients = torch.autograd.grad(out, list(wanted.values()), incoming)
    assert all(torch.equal(a, b) for a, b in zip(incoming, before, strict=True)), "an incoming gradient was written to"
    named = {f"output {i}": y.detach() for i, y in enumerate(out)}
    return named | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


def _incoming(y: Tensor, generator: torch.Generator) -> Tensor:
    """What might arrive for y: rows of a wider tensor, as behind a concatenation; numbers that every dtype holds."""
    *rows, columns = y.shape or (1,)
    wide = torch.randn((*rows, columns + 8), generator=generator).to(torch.bfloat16).to(y)
    return wide[..., :columns].view(y.shape) if y.ndim == 0 else wide[..., :columns]


def cast(tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The floating-point tensors in ``dtype``, their strides kept."""
    return {name: x if x is None or not x.is_floating_point() else x.to(dtype) for name, x in tensors.items()}


def assert_triton_no_worse(op: Op, tensors: Mapping[str, Tensor | None], *, guarded: bool = True) -> None:
    """Asserts that the Triton backend errs at most twice as much as torch's, beside the reference in float64.

    ``guarded``: its inputs and all it allocates lie between canaries, and what it allocates starts as NaN.
    """
    oracle = outputs_and_gradients(op, "reference", cast(tensors, torch.float64))
    torchs = outputs_and_gradients(op, "torch", tensors)
    if guarded:
        with Guard() as guard:
            copies = {name: None if x is None else guard.copy(x) for name, x in tensors.items()}
            ours = outputs_and_gradients(op, "triton", copies)
    else:
        ours = outputs_and_gradients(op, "triton", tensors)
    for name, expected in oracle.items():
        assert_no_worse_than_torch(name, ours[name], torchs[name], expected)
