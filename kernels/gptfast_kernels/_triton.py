"""What the kernels need around Triton: whether it is there, whether it can run a call, and for which target.

A kernel file takes ``triton`` and ``tl`` from here. Without triton they are stand-ins that let the file be imported; no
kernel runs then, because ``why_not`` gives a reason.
"""

import functools
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None

triton: Any
tl: Any
if INSTALLED:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
else:

    def _no_jit(fn=None, **_):
        return fn if fn is not None else _no_jit

    triton = SimpleNamespace(jit=_no_jit)
    tl = SimpleNamespace(constexpr=lambda value: value)

INTERPRETED: bool = INSTALLED and triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIP_ARCHITECTURES = ("gfx942",)  # those the kernels were compiled for


def why_not(x: Tensor) -> str | None:
    """Why no Triton kernel can take a tensor of x's device and dtype; None if one can."""
    if not INSTALLED:
        return "triton is not installed"
    if x.dtype not in DTYPES:
        return f"{x.dtype} is not one of float32, float16, bfloat16"
    if x.device.type == "cpu":
        return None if INTERPRETED else "CPU tensors run in Triton only under TRITON_INTERPRET=1"
    if x.device.type != "cuda":
        return f"device {x.device} has no Triton kernels here"
    return _why_not_device(x.device)


@functools.lru_cache
def _why_not_device(device: torch.device) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
        if architecture in HIP_ARCHITECTURES:
            return None
        return f"{architecture} is not one of {', '.join(HIP_ARCHITECTURES)}"
    if properties.major >= 8:
        return None
    return f"compute capability {properties.major}.{properties.minor} is below 8.0"


@functools.lru_cache
def target(device: torch.device) -> str:
    """What kernels on ``device`` are compiled for: "cuda:90", "hip:gfx942", …, or "interpreter"."""
    if INTERPRETED:
        return "interpreter"
    with torch.cuda.device(device if device.type == "cuda" else -1):
        found = triton.runtime.driver.active.get_current_target()
    return f"{found.backend}:{found.arch}"


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks can run side by side, at least: what a persistent kernel sizes its grid by."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# with on(x): every launch inside goes to x's device, whichever is current. Nothing on a CPU.
on = torch.cuda.device_of


def is_autocast_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # asked about meta, torch raises


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as torch's matmul-like operators do it."""
    device = tensors[0].device
    if not is_autocast_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def dot_precision() -> str:
    """``tl.dot``'s input_precision: IEEE float32, unless the user allowed TF32 through torch's own switch."""
    allowed = not torch.version.hip and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
