"""What each parameter is for, and what follows from it: initialisation and weight decay. One table.

A module says in `roles` what its own parameters are: {"weight": "matrix", "bias": "bias"}. Roles stand on modules,
because attributes set on Parameters do not survive `from_pretrained`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import nn


class Role(NamedTuple):
    """init: how a parameter starts. `normal` draws N(0, std), `residual` N(0, std / sqrt(branches)), where branches is
    the number of branches added to the residual stream (2 per layer), so that its scale at initialisation does not
    grow with depth (GPT-2). `given` takes what the module's `initial[name]` holds: a number, or a function that fills
    the parameter in place.
    decay: whether weight decay pulls on it.
    """

    init: Literal["normal", "residual", "zeros", "ones", "given"]
    decay: bool


ROLES = {
    "embedding": Role("normal", decay=True),
    "position": Role("normal", decay=True),
    "matrix": Role("normal", decay=True),
    "residual": Role("residual", decay=True),  # the last matrix of a branch
    "head": Role("normal", decay=True),
    "gain": Role("ones", decay=False),
    "bias": Role("zeros", decay=False),
    "scalar": Role("given", decay=False),
}

M = TypeVar("M", bound=nn.Module)


def mark(module: M, **roles: str) -> M:
    """Says what a plain torch module's parameters are for: `mark(nn.Embedding(9, 4), weight="embedding")`."""
    module.roles = roles  # type: ignore[assignment]
    return module


def role_of(module: nn.Module, name: str) -> Role:
    """The role of a module's own parameter. Raises KeyError that names the module when it declares none."""
    role = getattr(module, "roles", {}).get(name)
    if role not in ROLES:
        raise KeyError(
            f"{type(module).__name__}.{name} has role {role!r}; give it one of {', '.join(ROLES)} in `roles`"
        )
    return ROLES[role]


@torch.no_grad()
def initialise(module: nn.Module, std: float, branches: int) -> None:
    """Initialises a module's own parameters (not its children's) by role, leaving what was loaded from a file.

    Calls the module's `rebuild_buffers`, if any: non-persistent buffers hold garbage after loading through the meta
    device.
    """
    for name, parameter in module.named_parameters(recurse=False):
        role = role_of(module, name)
        if getattr(parameter, "_is_hf_initialized", False):
            continue
        if role.init == "normal":
            parameter.normal_(0.0, std)
        elif role.init == "residual":
            parameter.normal_(0.0, std / math.sqrt(branches))
        elif role.init == "given":
            start = module.initial[name]  # type: ignore[index]
            start(parameter) if callable(start) else parameter.fill_(start)
        else:
            parameter.fill_(1.0 if role.init == "ones" else 0.0)
    if hasattr(module, "rebuild_buffers"):
        module.rebuild_buffers()  # type: ignore[operator]


def decay_names(model: nn.Module) -> set[str]:
    """Names, as in `named_parameters()`, of the parameters that weight decay pulls on."""
    names, seen = set(), set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and role_of(module, name).decay:
                names.add(f"{path}.{name}" if path else name)
            seen.add(id(parameter))
    return names
