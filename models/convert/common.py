"""What converters share."""

from __future__ import annotations

import dataclasses
from typing import NoReturn, TypeVar

import torch
from torch import nn

from models.gpt.config import GPT
from models.parts.block import BlockSpec, Layer
from models.spec import ConfigError

M = TypeVar("M", bound=nn.Module)


def as_dtype(model: M, dtype: torch.dtype) -> M:
    """The same module with weights in `dtype`. (transformers' own `to` hides its signature from type checkers.)"""
    return nn.Module.to(model, dtype)


def refuse(layout: str, needed: str) -> NoReturn:
    """Says what a layout needs. Raises ConfigError."""
    raise ConfigError(f"the {layout} layout needs {needed}")


def one(spec: GPT, layout: str) -> BlockSpec:
    """The spec that all layers share. Raises ConfigError when layers differ, which public layouts cannot say."""
    blocks = spec.blocks()
    if any(dataclasses.replace(b, layer=Layer(0, spec.n_layers)) != blocks[0] for b in blocks):
        refuse(layout, "the same parts and sizes in every layer")
    return blocks[0]
