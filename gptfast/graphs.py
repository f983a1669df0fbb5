"""CUDA graphs: a forward pass or a decoding step recorded once for its shape, then replayed without Python.

At batch 1 the GPU is done with a kernel before Python has launched the next. A graph launches all of them at once, over
the same memory each time: so ids are copied in, outputs copied out, and what a step changes is changed in place.

A graph reads the weights where they were when it was recorded. Changed in place, they are seen; replaced (another
dtype, another device, ``load_state_dict(assign=True)``, a new module), it is recorded anew. So it is where another
backend or autocast dtype is chosen. In training mode, with a gradient wanted, or for a shape that no graph was recorded
for, the model runs as it is, and ``explain`` says so.

Not run on a GPU yet: without one, tests replay steps recorded by PyTorch's dispatcher over the same fixed memory.

Shapes: B rows, T positions.
"""

import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from gptfast_kernels import _dispatch

from .generation import PLAIN, Decoder, Settings
from .heads import OpenAIGPTLMHeadModel
from .inputs import check_ids
from .linear import is_watched
from .model import OpenAIGPTModel

KEPT_DECODERS = 4  # of a model; each holds a cache


# ---- the CUDA calls

_recording = threading.Lock()  # a process may record one graph at a time


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is launched inside becomes ``graph``. stream: on the device of it all, where PyTorch's own need not be.

    cuBLAS's workspace is then among the graph's own memory. Otherwise it is the stream's, and whatever drops that, as
    the end of another graph recorded there or a recording by torch.compile, leaves this one with freed memory.
    """
    # "thread_local": other threads may allocate meanwhile
    with _recording, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        torch._C._cuda_clearCublasWorkspaces()
        yield
    torch._C._cuda_clearCublasWorkspaces()


class Graph:
    """``run`` as a graph. ``warm_up``, or it, runs twice first: kernels are compiled and handles made on first use."""

    def __init__(self, run: Callable[[], Any], device: torch.device, warm_up: Callable[[], Any] | None = None):
        self.graph = torch.cuda.CUDAGraph()
        self.device, self.done = device, torch.cuda.Event()
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    (warm_up or run)()
            torch.cuda.current_stream().wait_stream(aside)
            with recording(self.graph, aside):
                self.result = run()

    def wait(self) -> None:
        """Before its memory is used: for what another stream does with it."""
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()

    def finish(self) -> None:
        """Behind the last use."""
        self.done.record(torch.cuda.current_stream(self.device))


# ---- what a graph depends on besides its inputs


class Baked:
    """All that a recorded pass has fixed: the modules, where the weights lie, what was chosen on the host."""

    def __init__(self, model: nn.Module):
        self.kind = next(model.parameters()).device.type
        self.inner = [*model.modules()][1:]  # without the model, which a decoder must not keep alive
        self.tables = [
            table for module in model.modules() for table in (module._modules, module._parameters, module._buffers)
        ]
        self.parts = self._parts()
        self.tensors = [part for part in self.parts if isinstance(part, Tensor)]
        self.places, self.choices = self._places(), _choices(self.kind)

    def still_holds(self) -> bool:
        parts = self._parts()
        return (
            self.choices == _choices(self.kind)
            and len(parts) == len(self.parts)
            and all(map(operator.is_, parts, self.parts))
            and self._places() == self.places
        )

    def _parts(self) -> list[nn.Module | Tensor | None]:
        return [part for table in self.tables if table for part in table.values()]  # most are empty

    def _places(self) -> tuple[list[int], list[torch.dtype]]:
        return [x.data_ptr() for x in self.tensors], [x.dtype for x in self.tensors]


def _choices(kind: str) -> tuple:
    return (
        _dispatch.get_default_backend(),
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


def _casting_anew(kind: str) -> torch.autocast:
    """Autocast as it is, but without its cache, which ends with the user's block: a graph would read freed memory.

    From torch 2.11 on inference mode does without it by itself.
    """
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False)


def why_not(modules: Sequence[nn.Module]) -> str | None:
    """Why nothing of ``modules``, a model and those within it, is captured now; None if it is."""
    device = next(modules[0].parameters()).device
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, the model is on {device}"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured around it"
    return _why_not_now(modules)


def _why_not_now(modules: Sequence[nn.Module]) -> str | None:
    if any(module.training for module in modules):
        return "the model is in training mode"
    if any(map(is_watched, modules)):
        return "a module has hooks or a forward of its own, which a replay would not call"
    if torch.is_grad_enabled():
        return "a gradient may be wanted: torch.no_grad() or torch.inference_mode() rules it out"
    if torch.compiler.is_compiling():
        return "torch.compile captures for itself"
    return None


# ---- forward passes


@dataclass
class _Recorded:
    ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    graph: Graph
    choices: list[_dispatch.Choice]


class Captured:
    """A model whose forward passes of some shapes are replayed; called like the model. See ``capture``."""

    def __init__(self, model: nn.Module, shapes: Sequence[tuple[int, int]], attention_mask: bool):
        self.model, self.attention_mask = model, attention_mask
        self.shapes = sorted(shapes, key=lambda shape: shape[0] * shape[1])
        self._recorded: dict[tuple[int, int, bool], _Recorded] = {}
        self._baked = Baked(model)
        self._lock = threading.Lock()  # a graph reads and writes the same memory in every replay

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        baked = self._baked if self._baked.still_holds() else Baked(self.model)
        reason = why_not([self.model, *baked.inner]) or self._cannot(input_ids, attention_mask, others)
        if reason is not None:
            _note([_dispatch.Choice("forward pass", "no CUDA graph", reason)])
            return self.model(input_ids, attention_mask, **others)
        check_ids("input_ids", input_ids, len(self.model.get_input_embeddings().weight))  # type: ignore[operator]
        shape = bucket(self.shapes, *input_ids.shape)
        assert shape is not None
        with self._lock:
            recorded = self._at(baked, shape, attention_mask is not None)
            B, T = input_ids.shape
            graph, result = recorded.graph, recorded.graph.result
            with torch.inference_mode():
                graph.wait()
                recorded.ids.zero_()[:B, :T] = input_ids
                if recorded.mask is not None:
                    recorded.mask.zero_()[:B, :T] = attention_mask >= 1  # type: ignore[operator]
                graph.replay()
            # a causal model's outputs do not depend on what stands behind or beside
            output = type(result)(**{name: x[:B, :T].clone() for name, x in result.items()})
            graph.finish()
        _note([_dispatch.Choice("forward pass", "CUDA graph", f"of {shape[0]} x {shape[1]}"), *recorded.choices])
        return output

    def _cannot(self, input_ids: Tensor, attention_mask: Tensor | None, others: dict[str, Any]) -> str | None:
        given = sorted(name for name, value in others.items() if value is not None)
        if given:
            return f"{', '.join(given)} was given, and graphs take input_ids and attention_mask alone"
        config: Any = self.model.config
        if config.output_attentions or config.output_hidden_states or config.use_cache or not config.return_dict:
            return "the config asks for other outputs than graphs have"
        if attention_mask is not None and not self.attention_mask:
            return "attention_mask was given, and capture(…, attention_mask=True) was not asked for"
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            return "input_ids are not [B, T]"
        if input_ids.dtype not in (torch.int32, torch.int64):
            return f"input_ids are {input_ids.dtype}"
        mask = input_ids if attention_mask is None else attention_mask
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            return "attention_mask is not a tensor of the shape of input_ids"
        if not input_ids.device == mask.device == next(self.model.parameters()).device:
            return "input_ids or attention_mask is not where the model is"
        if bucket(self.shapes, *input_ids.shape) is None:
            return f"{input_ids.shape[0]} x {input_ids.shape[1]} fits in no shape that was captured"
        return None

    def _at(self, baked: Baked, shape: tuple[int, int], masked: bool) -> _Recorded:
        if baked is not self._baked:
            self._recorded.clear()
            self._baked = baked
        key = (*shape, masked)
        if key not in self._recorded:
            self._recorded[key] = self._record(shape, masked)
        return self._recorded[key]

    @torch.inference_mode()
    def _record(self, shape: tuple[int, int], masked: bool) -> _Recorded:
        device = next(self.model.parameters()).device
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        mask = torch.ones(shape, dtype=torch.bool, device=device) if masked else None
        with _dispatch.record() as choices:
            self.model(ids, mask, **PLAIN)
        with _dispatch.record(), _casting_anew(device.type):  # the same choices once more, which are nobody's calls
            graph = Graph(lambda: self.model(ids, mask, **PLAIN), device)
        return _Recorded(ids, mask, graph, choices)


def capture(model: nn.Module, shapes: Sequence[tuple[int, int]], *, attention_mask: bool = False) -> Captured:
    """Records ``model``'s forward pass as CUDA graphs.

        fast = gptfast.capture(model, [(1, 128), (8, 512)])
        logits = fast(input_ids).logits

    Args:
        model: an OpenAIGPTModel or OpenAIGPTLMHeadModel, on a GPU and in eval mode when it is to be replayed.
        shapes: (B, T) to record. Ids of fewer rows or positions run in the smallest that they fit in, at its cost.
        attention_mask: record a second graph of each shape, for calls with a mask.

    Returns:
        A callable, (input_ids, attention_mask=None, **anything the model takes) -> what the model returns, as copies. A
        shape is recorded when it is first called for. What cannot be replayed runs uncaptured, and
        ``gptfast.explain(captured, input_ids)`` says why.

    Raises:
        TypeError: another kind of model: its outputs would depend on the padding. ValueError: a shape is not accepted.
    """
    if not isinstance(model, (OpenAIGPTModel, OpenAIGPTLMHeadModel)):
        raise TypeError(f"model must be an OpenAIGPTModel or OpenAIGPTLMHeadModel, got {type(model).__name__}")
    P = model.config.n_positions
    if not shapes:
        raise ValueError("shapes must name at least one (B, T), got none")
    for shape in shapes:
        pair = isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(n, Integral) for n in shape)
        if not pair or shape[0] < 1 or not 1 <= shape[1] <= P:
            raise ValueError(f"shapes must be (B, T) with B from 1 and T from 1 to n_positions = {P}, got {shape!r}")
    return Captured(model, shapes, attention_mask)


def bucket(shapes: Sequence[tuple[int, int]], B: int, T: int) -> tuple[int, int] | None:
    """The first of ``shapes``, smallest first, that [B, T] fits in; None if it fits in none."""
    return next((shape for shape in shapes if 0 < B <= shape[0] and 0 < T <= shape[1]), None)


def _note(choices: list[_dispatch.Choice]) -> None:
    if _dispatch._log is not None:
        _dispatch._log.extend(choices)


# ---- decoding steps


class GraphDecoder(Decoder):
    """A decoder whose step is a replay. It serves one generation after another of its size."""

    def __init__(self, model: Any, B: int, S: int, N: int, how: Settings):
        super().__init__(model, B, S, N, how)
        assert self.cache is not None
        self.taken, self.size, self.baked = True, (B, S, N, how), Baked(model)
        self.seqlens = torch.zeros(B, dtype=torch.int64, device=self.tokens.device)

        step = super().step

        def from_the_start() -> None:
            self.seqlens.zero_()
            self.count.zero_()
            step()

        self.hold(0)
        with torch.inference_mode(), _casting_anew(self.baked.kind):
            self.graph = Graph(step, self.tokens.device, from_the_start)

    def start(self, prompts: Sequence[Tensor], seeds: Sequence[int]) -> None:
        self.graph.wait()
        super().start(prompts, seeds)

    @torch.inference_mode()
    def hold(self, seqlens: int | Tensor) -> None:
        """As ``Decoder.hold``, in the tensor that the graph reads."""
        assert self.cache is not None
        self.seqlens.copy_(seqlens) if isinstance(seqlens, Tensor) else self.seqlens.fill_(seqlens)
        self.cache.seqlens = self.seqlens

    def step(self) -> None:
        self.graph.replay()

    def release(self) -> None:
        self.graph.finish()
        self.taken = False


# a decoder holds parts of its model, never the model itself: they go together
_taking = threading.Lock()
_decoders: "weakref.WeakKeyDictionary[nn.Module, list[GraphDecoder]]" = weakref.WeakKeyDictionary()


def decoder(model: Any, B: int, S: int, N: int, how: Settings) -> Decoder:
    """A decoder for B rows of up to S positions and N new tokens: captured where that can be, until ``release``.

    Sizes are rounded up to powers of two, so that few are recorded; the last ``KEPT_DECODERS`` are kept.
    """
    if why_not([*model.modules()]) is not None or type(model).forward is not OpenAIGPTLMHeadModel.forward:
        return Decoder(model, B, S, N, how)
    size = (B, min(round_up(S), model.config.n_positions), round_up(N), how)
    with _taking:
        kept = _decoders.setdefault(model, [])
        kept[:] = [one for one in kept if one.taken or one.baked.still_holds()]
        for one in kept:
            if one.size == size and not one.taken:
                one.taken = True
                return one
        free = [one for one in kept if not one.taken]
        for one in free[: max(0, len(kept) + 1 - KEPT_DECODERS)]:
            kept.remove(one)
        kept.append(GraphDecoder(model, *size))
        return kept[-1]


def round_up(n: int) -> int:
    """A power of two from 64 on."""
    return max(64, 1 << (n - 1).bit_length())
