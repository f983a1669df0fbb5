"""A step's forward and backward recorded as one CUDA graph: the CPU launches it once, not once a kernel."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ..graphs import recording
from .batch import Batch

WARM_UP = 3  # passes before recording, in which libraries allocate what they keep


class GraphedStep:
    """Replays ``gradients`` on batches of the first one's shapes and numbers. Gradients stay in the buffers they were
    recorded in, and a replay overwrites them: do not set them to None.

    Dropout draws anew each replay, from the generator's seed at that time: torch registers it with the graph.
    """

    def __init__(self, gradients: Callable[[list[Batch]], Tensor], parameters: list[Tensor]):
        self.gradients, self.parameters = gradients, parameters
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batches: list[Batch]) -> Tensor:
        if self.graph is None:
            self._record(batches)
        for copy in (False, True):  # refuse before anything is overwritten
            for field in fields(Batch):
                static, new = (getattr(b[0], field.name) for b in (self.static, batches))
                if copy and isinstance(static, Tensor):
                    static.copy_(new)
                elif _recorded(static) != _recorded(new) and field.name != "source":
                    was, now = _recorded(static), _recorded(new)
                    raise ValueError(f"cuda_graph needs batches alike, got {field.name} {was} and {now}")
        self.graph.replay()  # type: ignore[union-attr]
        return self.loss

    def _record(self, batches: list[Batch]) -> None:
        self.static = batches
        before = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.gradients(batches)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None  # so that the recorded pass allocates them among what it keeps
        self.graph = torch.cuda.CUDAGraph()
        with recording(self.graph, stream):
            self.loss = self.gradients(batches)
        torch.cuda.set_rng_state(before)


def _recorded(value: object) -> object:
    """What a graph holds of a batch's field: of a tensor its shape, of a number itself, since kernels and the loss's
    divisor were given it."""
    return tuple(value.shape) if isinstance(value, Tensor) else value
