"""One device or many, by PyTorch's own engines: DDP, FSDP2 and, for the blocks, tensor parallelism with DTensor.

``torchrun`` starts one process (rank) a device. Each sees its share of a step's batch; losses are divided by the whole
step's tokens and examples, so that the sum over ranks is the loss of one process, to rounding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

KINDS = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class Parallel:
    """How a run is spread. ``rank`` 0 writes the files."""

    kind: str = "none"
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether no rank holds all weights."""
        return self.kind == "fsdp"

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module whose forward and backward keep the ranks together."""
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(objective)
        if self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in objective.model.transformer.h:  # type: ignore[union-attr]
                fully_shard(block)
            fully_shard(objective)
        return objective

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Inside, a backward pass exchanges gradients only where it is the ``last`` of its step."""
        if self.kind == "ddp" and not last:
            with module.no_sync():  # type: ignore[operator]
                yield
            return
        if self.kind == "fsdp":
            module.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def sum(self, x: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def whole(self, model: Any) -> Any:
        """``model`` itself, or where it is sharded a whole copy on rank 0; None on the others."""
        if not self.sharded:
            return model
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if not self.is_main:
            return None
        copy = type(model)(model.config)
        copy.load_state_dict(state)
        return copy.to(model.device)


def start(kind: str | None = None, device: torch.device | None = None) -> tuple[Parallel, torch.device]:
    """Joins the processes that ``torchrun`` started. ``kind`` is "ddp" if None, and "none" without ``torchrun``.

    Returns:
        how the run is spread, and this rank's device.

    Raises:
        ValueError: ``kind`` is not of ``KINDS``, or needs ``torchrun``.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    under_torchrun = "RANK" in os.environ
    kind = kind or ("ddp" if under_torchrun else "none")
    if kind not in KINDS:
        raise ValueError(f"parallel must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "none" and world > 1:
        raise ValueError(f"parallel must be ddp or fsdp for {world} processes, got 'none'")
    if kind != "none" and not under_torchrun:
        raise ValueError(f"parallel={kind!r} needs torchrun: torchrun --nproc-per-node N -m gptfast.cli train …")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "none":
        return Parallel(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Parallel(kind, dist.get_rank(), dist.get_world_size()), device


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``, whose norm is that of all ranks' shards together. Returns it, unclipped."""
    parameters = list(parameters)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
