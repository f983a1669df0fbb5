"""What the small ops' files share: a table of functions of the same inputs becomes a task."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast import graphs

from .harness import DTYPES, Cell, Contender, Settings, Task, Unavailable, installed, need_gpu, noise_of

Call = Callable[..., Tensor]


def draw(cell: Cell, settings: Settings, *shape: int, std: float = 1.0) -> Tensor:
    """Random data, in the cell's dtype, that wants a gradient. Never zeros: they run faster than data does."""
    return (torch.randn(shape, device=settings.device) * std).to(DTYPES[cell.dtype]).requires_grad_()


def ours(settings: Settings) -> str:
    """The backend to time as ours, asked for by name so that nothing falls back unseen."""
    return "triton" if torch.device(settings.device).type == "cuda" else "torch"


def compare(
    cell: Cell,
    settings: Settings,
    functions: Callable[[float], dict[str, Callable[[], Call]]],
    inputs: Sequence[Tensor],
    reference: Call,
    *,
    moved: float = 0,
    flops: float = 0,
    tokens: int = 0,
) -> Task:
    """A task of functions of ``inputs``: the forward pass, the backward pass alone, or both, as the cell's mode says.

    Args:
        functions: of a dropout probability, by name, the baseline first: each makes a function of the inputs, or raises
            ``Unavailable``. The gate sees them without dropout, the clock with the cell's.
        reference: the formula, called with the inputs in float64.
        moved, flops, tokens: as in ``Task``.
    """
    gradients = cell.mode in ("backward", "both")
    checked, timed = functions(0.0), functions(cell.shape.get("dropout_p", 0.0))

    @functools.cache
    def dout() -> Tensor:
        with torch.no_grad():
            shape = reference(*(x.detach().double() for x in inputs)).shape
        return torch.randn(shape, device=settings.device).to(inputs[0].dtype)

    def results(call: Call, values: Sequence[Tensor]) -> list[Tensor]:
        if not gradients:
            with torch.no_grad():
                return [call(*values)]
        out = call(*values)
        return [out, *torch.autograd.grad(out, [x for x in values if x.requires_grad], dout().to(out.dtype))]

    def expected() -> list[Tensor]:
        return results(reference, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])

    def contender(name: str) -> Contender:
        check = checked[name]()
        call = timed[name]() if cell.shape.get("dropout_p") else check
        run = _timed(cell, call, inputs, dout)
        host = functools.partial(host_us, run) if cell.mode == "launch" else None
        return Contender(run, lambda: results(check, inputs), metrics=host)

    return Task({name: functools.partial(contender, name) for name in checked}, expected, moved, flops, tokens)


def _timed(cell: Cell, call: Call, inputs: Sequence[Tensor], dout: Callable[[], Tensor]) -> Callable[[], Any]:
    leaves = [x for x in inputs if x.requires_grad]
    if cell.mode in ("forward", "launch"):
        values = [x.detach() for x in inputs]
        return lambda: call(*values)
    if cell.mode == "both":
        return lambda: torch.autograd.grad(call(*inputs), leaves, dout())
    out = functools.cache(lambda: call(*inputs))
    return lambda: torch.autograd.grad(out(), leaves, dout(), retain_graph=True)


def capture(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """``call`` as a CUDA graph: the replay, which returns what the recorded call did."""
    graph = graphs.Graph(call, torch.device(device))

    def replay() -> Any:
        graph.replay()
        return graph.result

    return replay


def host_us(run: Callable[[], Any], rounds: int = 20, calls: int = 20) -> dict[str, Any]:
    """Microseconds of Python and launch a call: a GPU's queue, empty before each round, is not waited for."""
    samples = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append(1e6 * (time.perf_counter() - started) / calls)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    return {"host_us": statistics.median(samples[1:]), "noise": noise_of(samples[1:])}


def compiled(call: Call) -> Callable[[], Call]:
    return lambda: torch.compile(call, dynamic=False)


def max_autotune(settings: Settings, call: Call) -> Callable[[], Call]:
    def make() -> Call:
        need_gpu(settings.device, "max-autotune")
        # with CUDA graphs each call overwrites the last one's output, which the backward pass reads
        return torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs")

    return make


def liger(load: Callable[[], Call]) -> Callable[[], Call]:
    """A function of Liger's, where it is installed and there is a GPU."""

    def make() -> Call:
        installed("liger_kernel", "liger-kernel")
        if not torch.cuda.is_available():
            raise Unavailable("Liger's kernels have no CPU path")
        return load()

    return make
