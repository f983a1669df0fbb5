"""The one place that chooses a backend, and can say why.

    reference   the formula in plain torch, unfused: the oracle
    torch       PyTorch's own fused operators: the default without a GPU
    triton      our kernels

An op calls ``select(name, backend, cannot, slower)`` with the reason its Triton kernel cannot take this call, or None,
and the reason it would not pay, or None. ``"auto"`` takes triton where nothing speaks against it, else torch; a backend
asked for by name is taken or raises. The launcher adds its kernel's config to a choice of triton, by ``configured``.
``record()`` collects the choices made, which is what ``gptfast.explain`` prints.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from . import _triton

BACKENDS = ("auto", "triton", "torch", "reference")


@dataclass(frozen=True)
class Choice:
    """One op call: which backend runs it, why a faster one does not ("" when triton runs), and triton's config."""

    op: str
    backend: str
    reason: str
    config: str = ""


def _check(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_default = _check(os.environ.get("GPTFAST_BACKEND", "auto"), "environment variable GPTFAST_BACKEND")
_log: list[Choice] | None = None


def get_default_backend() -> str:
    """The backend that ``backend="auto"`` stands for in this process; ``"auto"`` unless it was set."""
    return _default


def set_default_backend(backend: str) -> None:
    """Sets what ``backend="auto"`` stands for in this process. ``GPTFAST_BACKEND`` sets it at start-up."""
    global _default
    _default = _check(backend, "backend")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """``set_default_backend`` for the length of a block: for the whole process, so not from several threads at once."""
    before = _default
    set_default_backend(backend)
    try:
        yield
    finally:
        set_default_backend(before)


def asked_for(op: str, backend: str, cannot: str | None) -> str:
    """``backend``, or the default it stands for, once it is sure to run. Arguments and errors are ``select``'s."""
    asked = _default if backend == "auto" else _check(backend, "backend")
    if asked == "triton" and cannot:
        raise RuntimeError(f"{op}: backend='triton' cannot run here: {cannot}")
    return asked


def select(op: str, backend: str, cannot: str | None, slower: str | None = None) -> str:
    """Returns ``"triton"``, ``"torch"`` or ``"reference"`` for one call of ``op``.

    Args:
        op: the public function's name.
        backend: what the caller asked for.
        cannot: why the Triton kernel cannot take this call; None if it can.
        slower: why "auto" should not send this call to it all the same; None if it should.

    Raises:
        ValueError: ``backend`` is not one of ``BACKENDS``.
        RuntimeError: ``backend="triton"`` was asked for, by the caller or as the default, and cannot run.
    """
    asked = asked_for(op, backend, cannot)
    why_not = cannot or slower or ("interpreted kernels are for tests" if _triton.INTERPRETED else None)
    chosen = asked if asked != "auto" else "torch" if why_not else "triton"
    if _log is not None:
        reason = why_not if asked == "auto" else f"backend={asked!r} was asked for"
        _log.append(Choice(op, chosen, "" if chosen == "triton" else reason or ""))
    return chosen


def configured(*tile: int, warps: int, stages: int | None = None) -> None:
    """Notes what a forward kernel is launched with on the choice that led to it: the first launch of each counts."""
    if _log and _log[-1].backend == "triton" and not _log[-1].config:
        config = f"{'x'.join(map(str, tile))}, warps={warps}" + (f", stages={stages}" if stages else "")
        _log[-1] = replace(_log[-1], config=config)


def is_recording() -> bool:
    """Whether someone collects choices: code that has none to make can save itself telling of them."""
    return _log is not None


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collects every choice made inside the block, in order."""
    global _log
    outer, _log = _log, []
    try:
        yield _log
    finally:
        _log = outer


def check_floats(**tensors: Tensor | None) -> None:
    """Raises unless the tensors, by their arguments' names, are floating point and on the first one's device."""
    first = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        first = first or (name, x.device)
        if x.device != first[1]:
            raise ValueError(f"{name} is on {x.device}, but {first[0]} is on {first[1]}")


def check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
