"""The one place that turns a model's parameters into optimizer groups, and the optimizers to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from models.spec import Part

if TYPE_CHECKING:
    from models.lm import LM


class Optim(Part):
    """The rule that turns gradients into updates."""

    def build(self, model: LM) -> dict[str, torch.optim.Optimizer]:
        """Optimizers by name, together holding every trainable parameter once."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(Optim):
    """Adam with decoupled weight decay (arXiv:1711.05101); matrices and embeddings decay, norms and biases do not.

    lr: peak learning rate
    betas: decay of the first and second moment
    eps: added to the root of the second moment
    weight_decay: of matrices, per update, times the learning rate
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} is not positive; try 1e-3")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas={self.betas}: each must be in [0, 1); try [0.9, 0.95]")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} is negative; try 0.1")

    def build(self, model: LM) -> dict[str, torch.optim.Optimizer]:
        groups = decay_groups(model, self.weight_decay)
        for group in groups:
            group["lr"] = group["peak_lr"] = self.lr
        # The fused update is one kernel on CPU and CUDA: same rule, 5 to 10 times fewer passes over memory.
        fused = next(model.parameters()).device.type in ("cpu", "cuda", "xpu", "mps")
        return {"adamw": torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)}


Optim.kinds = {"adamw": AdamW}


def decay_groups(model: LM, weight_decay: float) -> list[dict]:
    """Two groups, with and without decay, that hold every trainable parameter once. Tied parameters count once."""
    decays = model.decay_parameters()
    groups: dict[str, list[torch.nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, p in model.named_parameters():  # yields a tied parameter once
        if p.requires_grad:
            groups["decay" if name in decays else "no_decay"].append(p)
    held = [p for members in groups.values() for p in members]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(trainable) and {id(p) for p in held} == trainable
    return [
        {"params": members, "name": name, "weight_decay": weight_decay if name == "decay" else 0.0}
        for name, members in groups.items()
        if members
    ]
