"""Who am I among the workers? One class for a notebook, torchrun and Ray Train (both set up torch.distributed)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """rank: this process, counted from 0.  size: how many there are.  device: where this one computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @staticmethod
    def current(device: torch.device | str = "cpu") -> World:
        device = torch.device(device)
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size(), device)
        return World(device=device)

    def sum(self, t: torch.Tensor) -> torch.Tensor:
        """t summed over the workers, in place."""
        if self.size > 1:
            moved = t.to(self.device) if self.device.type == "cuda" else t
            dist.all_reduce(moved)
            if moved is not t:
                t.copy_(moved)
        return t

    def agree(self, x: Any) -> Any:
        """Rank 0's x, on every rank."""
        box = [x]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module whose backward averages gradients over the workers (itself when there is one)."""
        if self.size == 1:
            return module
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        # Buffers are constants of the architecture here, so none is broadcast.
        return torch.nn.parallel.DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name; `auto` takes the first of CUDA / ROCm, Intel's XPU, Apple's MPS, else the CPU.

    Raises ConfigError if the named one is not there.
    """
    from models.spec import ConfigError

    there = [
        kind
        for kind, is_there in (
            ("cuda", torch.cuda.is_available()),  # ROCm builds answer to this name too
            ("xpu", hasattr(torch, "xpu") and torch.xpu.is_available()),
            ("mps", torch.backends.mps.is_available()),
            ("cpu", True),
        )
        if is_there
    ]
    if name == "auto":
        return torch.device(there[0])
    if name.split(":")[0] not in there:
        raise ConfigError(f"device={name!r} is not on this machine; there is {', '.join(there)}")
    return torch.device(name)
