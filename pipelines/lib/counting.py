"""Memory of a training step, counted without doing it: the step runs on tensors that have a shape but no data.

What is counted are the tensors that are alive at once, so nothing of it depends on a family's formula; what libraries
take beside them (workspaces, what an allocator wastes) is not in it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.families import create
from models.family import Family
from models.loss import Loss, Objective
from models.optim.groups import Optim
from pipelines.lib.training import TrainConfig


@dataclass(frozen=True)
class Counted:
    """Bytes of one worker, and work per token.

    activations: what forward and backward hold at most beside the rest, logits included
    logits: of these, the scores over the vocabulary and their gradient
    update: what the optimizer holds at most beside the rest, during its step
    macs_per_token: multiply-accumulates of a forward pass
    """

    parameters: int
    macs_per_token: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    update: int

    def peak(self, accumulates: bool) -> int:
        """Bytes that are alive at once. accumulates: several micro-batches add to the gradients of one update."""
        passes = self.activations + (self.gradients if accumulates else 0)
        return self.weights + self.optimizer + max(passes, self.gradients + self.update)


class Live(TorchDispatchMode):
    """Bytes of the tensors made under it that are still referred to. now: at this moment.  most: since `mark`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, Any] = {}

    def mark(self) -> int:
        """Forget the most so far; returns what is alive now."""
        self.most = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def count(config: TrainConfig) -> Counted:
    """Count one micro-batch and one update of a run, with the tensors that PyTorch's CPU kernels keep.

    Where one objective follows another: those of the one that takes most.
    """
    each = [
        _count(
            config.model, config.optim, config.micro_batch, config.context, config.precision, config.z_loss,
            rule, config.mask_documents, config.activation_checkpointing,
        )
        for rule in dict.fromkeys(config.loss.rules())
    ]  # fmt: skip
    return max(each, key=lambda counted: counted.activations)


@functools.lru_cache(maxsize=1024)
def _count(
    family: Family,
    optim: Optim,
    rows: int,
    T: int,
    precision: str,
    z_loss: float,
    objective: Objective,
    masked: bool,
    again: bool,
) -> Counted:
    random = torch.get_rng_state()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), Live() as live:
            model = create(family).train()
            optimizers = optim.build(model)
            if again:
                model.gradient_checkpointing_enable()
            weights = live.mark()
            loss = Loss(model, z_loss, objective, torch.ones(family.vocab, dtype=torch.int64))
            batch = {name: torch.zeros(rows, T, dtype=torch.int64) for name in ("ids", "targets")}
            if masked:
                batch |= {name: torch.zeros(rows, T, dtype=torch.int64) for name in ("pos", "doc")}
            autocast: Any = contextlib.nullcontext()
            if precision == "bf16":
                autocast = torch.autocast("cpu", torch.bfloat16)
            with autocast:
                total, _ = loss(**batch)
            total.backward()
            activations = live.most - weights
            del total, batch
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = sum(p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None)
            before = live.mark()
            for optimizer in optimizers.values():
                optimizer.step()
            optimizer_bytes = live.now - before
            update = live.most - before - optimizer_bytes
    finally:
        torch.set_rng_state(random)
    own = cast(nn.Module, model)
    return Counted(
        parameters=sum(p.numel() for p in parameters),
        macs_per_token=model.flops_per_token(T) / 6,
        weights=sum({id(p): p.numel() * p.element_size() for p in (*own.parameters(), *own.buffers())}.values()),
        gradients=gradients,
        optimizer=optimizer_bytes,
        activations=activations,
        logits=2 * 4 * rows * T * family.vocab,
        update=update,
    )
