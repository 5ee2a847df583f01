"""The check that no config field is silently ignored."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from models.check.helpers import Make, Verdict, tokens
from models.families import create
from models.family import Family
from models.loss import Loss
from models.spec import ConfigError, Part, fields, part_of

# Fields that limit or describe and are read by stages, so that changing them may change neither output nor parameters.
LIMITS = {"seq_len": "the longest trained context: a learned position table has so many rows, other schemes none"}


def every_field_matters(make: Make, focus: str | None = None) -> Verdict:
    """Every config field, of the family and of each part, changes the output or the parameters, or is refused.

    focus: a dotted field; only it and what is below it is tried.
    """
    spec = make().spec
    base = effect(spec)
    silent, tried, refused = [], 0, 0
    for name, others in alternatives(spec):
        if name in LIMITS or (focus is not None and name != focus and not name.startswith(f"{focus}.")):
            continue
        changed, valid = False, 0
        for other in others:
            if changed:
                break
            try:
                changed = effect(other()) != base
                valid += 1
            except ConfigError:
                refused += 1
        tried += valid
        if valid and not changed:
            silent.append(name)
    detail = f"{tried} changes, {refused} refused"
    return not silent, f"no effect: {', '.join(silent)}" if silent else detail


def effect(spec: Family) -> tuple:
    """What a spec does: shapes and values of the initial parameters, logits in training and in eval mode, the loss."""
    torch.manual_seed(0)
    model = nn.Module.to(create(spec), torch.float64)
    shapes = tuple((name, tuple(p.shape), p.sum().item()) for name, p in model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():  # from initialisation alone, attention is nearly uniform and a gain is 1
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
        ids = tokens(model, 2, min(12, spec.seq_len))
        torch.manual_seed(1)
        loss, _ = Loss(model.train())(ids, ids)  # with what parts add to it (load balance)
        logits = []
        for mode in (True, False):
            torch.manual_seed(1)
            logits.append(model.train(mode)(ids).logits.sum((0, 1)).tolist())
    return shapes, logits, loss.item()


def alternatives(x: Any, name: str = "") -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """Dotted field name -> ways to build `x` with another value there; raises ConfigError when called and refused."""
    cls: Any = type(x)
    for key, (annotation, _) in fields(cls).items():
        value, path = getattr(x, key), f"{name}.{key}" if name else key
        base = part_of(annotation)

        def changed(new: Callable[[], Any], key: str = key) -> Callable[[], Any]:
            return lambda: dataclasses.replace(x, **{key: new()})

        if isinstance(value, tuple):  # one per layer: vary the first
            yield from _first_of(value, key, path, changed, getattr(cls, "lists", ()))
            continue
        if base is not None:
            kinds = [getattr(kind, "small", kind) for kind in base.kinds.values() if kind is not type(value)]
            if kinds:
                yield path, [changed(kind) for kind in kinds]
            if isinstance(value, Part):
                for sub, others in alternatives(value, path):
                    yield sub, [changed(other) for other in others]
            continue
        yield path, [changed(lambda v=v: v) for v in _values(annotation, value) if v != value]  # type: ignore[misc]


def _first_of(
    value: tuple, key: str, path: str, changed: Callable[..., Callable[[], Any]], lists: tuple[str, ...]
) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    first, rest = value[0], value[1:]
    if key in lists:  # a list of its own, of any length
        yield path, [changed(lambda: rest or (*value, value[-1] + 1))]
    elif isinstance(first, Part):
        for sub, others in alternatives(first, path):
            yield sub, [changed(lambda o=o: (o(), *rest)) for o in others]  # type: ignore[misc]


def _values(annotation: Any, value: Any) -> list[Any]:
    """Other values of a scalar field."""
    text = str(annotation)
    if literal := _literals(annotation):
        return [v for v in literal if v != value] + ([value * 2] if isinstance(value, float) else [])
    if isinstance(value, bool) or "bool" in text:
        return [not value] if isinstance(value, bool) else [True, False]
    if isinstance(value, float) or "float" in text:
        return [0.25, 4.0, 0.01] if value in (None, 0.0) else [value * 3, value / 3, value * 300, value / 300, 0.9]
    return [1, 2, 3, 8] if value is None else [value * 2, max(1, value // 2), value + 1]


def _literals(annotation: Any) -> list[Any]:
    """The choices inside an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [v for arg in typing.get_args(annotation) for v in _literals(arg)]
