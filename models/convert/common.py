"""What converters share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import nn

from models.gpt.config import GPT
from models.parts.attention import Causal
from models.parts.block import BlockSpec, Layer
from models.parts.mlp import Plain, SwiGLU
from models.spec import ConfigError, flatten, plain

M = TypeVar("M", bound=nn.Module)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class Layout(NamedTuple):
    """A public layout.

    spec_of: its config -> our spec.  config_of: our spec -> its config.  from_layout, to_layout: models with weights.
    Each raises ConfigError that names what the other side does not have.
    """

    spec_of: Callable[[Any], GPT]
    config_of: Callable[[GPT], Any]
    from_layout: Callable[[Any], Any]
    to_layout: Callable[[Any], Any]


def as_dtype(model: M, dtype: torch.dtype) -> M:
    """The same module with weights in `dtype`. (transformers' own `to` hides its signature from type checkers.)"""
    return nn.Module.to(model, dtype)


def refuse(layout: str, needed: str) -> NoReturn:
    """Says what a layout needs. Raises ConfigError."""
    raise ConfigError(f"the {layout} layout needs {needed}")


def decoder(model: Any, layout: str) -> GPT:
    """The spec of a model, which must be of the family that layouts are written for. Raises ConfigError."""
    if not isinstance(model.spec, GPT):
        refuse(layout, f"a model of the gpt family, not a {type(model).__name__}")
    return model.spec


def one(spec: GPT, layout: str) -> BlockSpec:
    """The spec that all layers share. Raises ConfigError when layers differ, which public layouts cannot say."""
    if not isinstance(spec, GPT):
        refuse(layout, f"a model of the gpt family, not {type(spec).__name__}")
    blocks = spec.blocks()
    if any(dataclasses.replace(b, layer=Layer(0, spec.n_layers)) != blocks[0] for b in blocks):
        refuse(layout, "the same parts and sizes in every layer")
    return blocks[0]


def settings(spec: GPT, layout: str) -> dict[str, Any]:
    """All settings, flat, with every default that follows from another setting written out: equal for equal models.

    For specs whose attention is `causal`, and whose MLP is `mlp` or `swiglu`.
    """
    block, tree = one(spec, layout), plain(spec)
    attention, mlp, final_norm = block.attention, block.mlp, spec.final_norm or block.norm
    assert isinstance(attention, Causal) and isinstance(mlp, Plain | SwiGLU)
    tree |= {f.name: plain(getattr(block, f.name)) for f in dataclasses.fields(block) if f.name in tree}
    tree["final_norm"] = plain(final_norm)
    tree["attention"] |= {
        "n_kv_heads": attention.heads()[1],
        "head_dim": attention.width(spec.d_model),
        "v_head_dim": attention.v_width(spec.d_model),
        "out_linear": plain(attention.out_linear or attention.linear),
        "dropout": spec.dropout if attention.dropout is None else attention.dropout,
    }
    tree["mlp"]["hidden"] = mlp.width(spec.d_model)
    for name, part in (("attention", attention), ("mlp", mlp), ("norm", block.norm), ("final_norm", final_norm)):
        if "bias" in tree[name]:
            tree[name]["bias"] = block.bias_of(part)
    del tree["bias"]
    return flatten(tree)


def check_nothing_lost(layout: str, spec: GPT, again: GPT, added: tuple[str, ...] = ()) -> None:
    """Raise ConfigError, which names the setting, if a spec is not what its config in a layout reads back as.

    So a part or option that a converter does not know is refused and never dropped.  added: endings of settings that
    the layout always has, switched off in ours (biases that become zeros).
    """
    mine, theirs = settings(spec, layout), settings(again, layout)
    for key, value in mine.items():
        if theirs.get(key) != value and not (key.endswith(added) and value is False if added else False):
            refuse(layout, f"{key}={theirs.get(key)}, not {value}")
