"""One process or many: torchrun's environment in, a wrapped model out.

    torchrun --nproc-per-node 8 -m mambavision train ...                one machine
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d ...      several

DDP copies the model to every process and averages gradients; FSDP (`fully_shard`) splits every
stage's parameters, gradients and optimizer state over the processes. Batch norm counts each
process's own images; before an evaluation or a checkpoint the running statistics are averaged.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import distribute_bn, init_distributed_device_so, is_distributed_env
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..demo import choose_device
from ..errors import CommandError

__all__ = ["Ranks", "Wrapped", "start", "stop"]


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values


def start(device: str, fsdp: bool) -> Ranks:
    """Joins the other processes, where torchrun started some."""
    if fsdp and not is_distributed_env():
        raise CommandError("--fsdp needs several processes: start it with torchrun", 2)
    found = init_distributed_device_so(choose_device(device).type)
    return Ranks(torch.device(found["device"]), found["global_rank"], found["world_size"])


# The group that was left last. DDP's reducer must not be the last to hold one: it frees it without
# letting go of the interpreter's lock, for which a thread of gloo's may be waiting (PyTorch 2.13).
_left: Any = None


def stop() -> None:
    global _left
    if dist.is_initialized():
        _left = dist.group.WORLD
        dist.destroy_process_group()


class Wrapped:
    """A model for one process or many; `bare` keeps the plain names, `run` is to be called."""

    def __init__(self, bare: Any, ranks: Ranks, fsdp: bool):
        self.bare, self.fsdp, self.count = bare, fsdp, ranks.count
        self.run: Any = bare
        if fsdp:
            from torch.distributed.fsdp import fully_shard

            # A stage's map is a view, and nothing changes it in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            for stage in bare.levels:
                fully_shard(stage)
            fully_shard(bare)
        elif ranks.count > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # Its name from torch 2.13 on, and the one before.
            known = signature(DistributedDataParallel.__init__).parameters
            names = ("forward_sync_buffers", "broadcast_buffers")
            keep_own: Any = {next(name for name in names if name in known): False}
            self.run = self.ddp = DistributedDataParallel(bare, devices, **keep_own)

    def synchronising(self, now: bool) -> AbstractContextManager[Any]:
        """Whether gradients computed inside are averaged over the processes."""
        if self.fsdp:
            self.bare.set_requires_gradient_sync(now)
        elif self.count > 1 and not now:
            return self.ddp.no_sync()
        return nullcontext()


def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Batch norm's running statistics: their mean over the processes."""
    if ranks.count > 1:
        distribute_bn(model, ranks.count, reduce=True)


def _full(**more: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, **more)


def model_state(model: nn.Module, fsdp: bool) -> dict[str, Any]:
    """Whole tensors under plain names. With FSDP every process must call it."""
    if not fsdp:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_full(cpu_offload=True))


def load_model_state(model: nn.Module, state: dict[str, Any], fsdp: bool) -> None:
    if not fsdp:
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, state, options=_full())


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, fsdp: bool) -> Any:
    if not fsdp:
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=_full(cpu_offload=True))


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Any, fsdp: bool
) -> None:
    if not fsdp:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=_full())
