"""One device or many, by PyTorch's own engines: DDP, FSDP2 and, for the MLPs, tensor parallelism with DTensor.

``torchrun`` starts one process (rank) a device. Each sees its share of a step's batch; losses are divided by the whole
step's tokens and examples, so that the sum over ranks is the loss of one process, to rounding.

With "tensor" every rank sees the whole batch and holds its columns of each ``c_fc`` and its rows of each ``c_proj`` in
the MLPs, two thirds of a block's weights. The other third, attention's, is on every rank: q, k and v share one weight,
whose columns would have to be put in another order, by heads, in every file.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

KINDS = ("none", "ddp", "fsdp", "tensor")


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
        return self.kind in ("fsdp", "tensor")

    @property
    def replicas(self) -> int:
        """Into how many parts ranks cut a batch; ``replica`` is this rank's."""
        return 1 if self.kind == "tensor" else self.world

    @property
    def replica(self) -> int:
        return 0 if self.kind == "tensor" else self.rank

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module whose forward and backward keep the ranks together."""
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(objective)
        if self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in objective.model.transformer.h:  # type: ignore[union-attr]
                fully_shard(block)
            fully_shard(objective)
        if self.kind == "tensor":
            model: Any = objective.model
            mesh = init_device_mesh(model.device.type, (self.world,))
            if 4 * model.config.n_embd % self.world:
                raise ValueError(f"4 * n_embd must be a multiple of {self.world} ranks, got {4 * model.config.n_embd}")
            for block in model.transformer.h:
                distribute_module(block.mlp, mesh, _shard, _to_mesh, _from_mesh)  # type: ignore[arg-type]
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
        """Over all parts of a batch, in place."""
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world // self.replicas
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


def _shard(name: str, layer: nn.Module, mesh: DeviceMesh) -> None:
    """Of an MLP: ``c_fc`` by columns, ``c_proj`` by rows; weights are [in, out]. ``c_proj.bias`` is on every rank."""
    placements: dict[str, dict[str, Placement]] = {
        "c_fc": {"weight": Shard(1), "bias": Shard(0)},
        "c_proj": {"weight": Shard(0)},
    }
    for parameter, placement in placements.get(name, {}).items():
        sharded = distribute_tensor(getattr(layer, parameter), mesh, [placement])
        layer.register_parameter(parameter, nn.Parameter(sharded))


def _to_mesh(mlp: nn.Module, inputs: Any, mesh: DeviceMesh) -> tuple[DTensor]:
    """All ranks have the same x; its gradient is the sum of theirs."""
    return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),)


def _from_mesh(mlp: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
    return output.redistribute(mesh, [Replicate()]).to_local()


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
        raise ValueError(f"parallel must be ddp, fsdp or tensor for {world} processes, got 'none'")
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
    kinds = [kind for kind in alike([p for p in parameters if p.grad is not None]) if kind]
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def alike(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that are no DTensors and those that are: torch's fused loops over several take no mixture."""
    plain, spread = ([p for p in parameters if isinstance(p, DTensor) == wanted] for wanted in (False, True))
    return plain, spread
