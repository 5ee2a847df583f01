"""Optimizer state as named tensors and JSON, by parameter name: no pickle, any number of optimizers.

A tensor is named `optimizer/parameter/key`. (torch.distributed.checkpoint's flat state dict has the same keys, but its
files need a pickled index and its reader a process group; safetensors opens anywhere and is read by name.)
"""

from __future__ import annotations

from typing import Any

import torch

Optimizers = dict[str, torch.optim.Optimizer]


def split(optimizers: Optimizers, names: dict[int, str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the rest of the optimizers' state.

    names: {id(parameter): name}. Returns ({"optimizer/parameter/key": tensor}, JSON-able groups and scalars).
    """
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for o, optimizer in optimizers.items():
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [names[id(p)] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        scalars: dict[str, Any] = {}
        for p, state in optimizer.state.items():
            for k, v in state.items():
                if torch.is_tensor(v):
                    tensors[f"{o}/{names[id(p)]}/{k}"] = v.detach()
                else:
                    scalars[f"{names[id(p)]}/{k}"] = v
        rest[o] = {"groups": groups, "scalars": scalars}
    return tensors, rest


def join(optimizers: Optimizers, names: dict[int, str], tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    """Put back what `split` took, in place. Raises ValueError if the groups are not the same.

    What the optimizer was built with (learning rate, decay) stays: it is the config's, and a search that changes it
    halfway (population-based training) means it.
    """
    for o, optimizer in optimizers.items():
        by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
        for group, saved in zip(optimizer.param_groups, rest[o]["groups"], strict=True):
            if [names[id(p)] for p in group["params"]] != saved["params"]:
                raise ValueError(f"optimizer {o}: the checkpoint groups its parameters in another way")
            for k, v in saved.items():
                if k not in group:
                    group[k] = v
        optimizer.state.clear()
        for name, t in tensors.items():
            owner, parameter, k = name.split("/")
            if owner == o:
                p = by_name[parameter]
                # Adam's step counter is a 0-d tensor that stays on the CPU unless the update is fused or captured.
                where = p.device if t.ndim or group_is_fused(optimizer) else torch.device("cpu")
                optimizer.state[p][k] = t.to(where)
        for name, v in rest[o]["scalars"].items():
            parameter, k = name.split("/")
            optimizer.state[by_name[parameter]][k] = v


def group_is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
