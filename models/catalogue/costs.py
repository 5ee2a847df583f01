"""What one part of each sort costs per token, at stated sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from models.cost import Ops
from models.gpt.config import GPT
from models.parts.attention import Causal
from models.parts.linear import Dense
from models.parts.norm import RMSNorm


@dataclass(frozen=True)
class Setting:
    """Sizes at which costs are counted.

    d_model: width of the residual stream
    heads: attention heads
    layers: number of blocks
    context: tokens a query looks back on
    vocab: tokens in the vocabulary
    """

    d_model: int = 768
    heads: int = 12
    layers: int = 12
    context: int = 1024
    vocab: int = 50257

    def spec(self) -> GPT:
        """The model whose parts are counted: GPT's defaults at these sizes. Raises ConfigError."""
        return GPT(
            vocab_size=self.vocab,
            d_model=self.d_model,
            n_layers=self.layers,
            seq_len=self.context,
            attention=Causal(n_heads=self.heads),
        )

    def words(self) -> str:
        return (
            f"d_model {self.d_model}, {self.heads} heads, {self.layers} layers, context {self.context:,}, "
            f"vocabulary {self.vocab:,}"
        )


class Measure(NamedTuple):
    """unit: what the figures are of.  of: (part, model) -> parameters, operations per token."""

    unit: str
    of: Callable[[Any, GPT], tuple[int, Ops]]


def _position(part: Any, spec: GPT) -> tuple[int, Ops]:
    block, T, d = _block(spec, position=part), spec.seq_len, spec.d_model
    parameters = (part.n_parameters(d, T) if part.embeds else 0) + part.bias_parameters(block)
    return parameters, part.ops(block, T) + (part.embedding_ops(d) if part.embeds else Ops())


def _block(spec: GPT, **changes: Any) -> Any:
    """The model's first block with a part exchanged."""
    import dataclasses

    return dataclasses.replace(spec.blocks()[0], **changes)


def _head(spec: GPT) -> tuple[int, int]:
    heads: int = spec.attention.n_heads  # type: ignore[union-attr, assignment]
    return heads, spec.d_model // heads


def _gate(part: Any, spec: GPT) -> tuple[int, Ops]:
    wanted = (spec.d_model, Dense(), False, *_head(spec))
    return part.n_parameters(*wanted), part.ops(*wanted)


def _placement(part: Any, spec: GPT) -> tuple[int, Ops]:
    norm, d = RMSNorm(), spec.d_model
    return part.n_norms * norm.n_parameters(d, False), part.n_norms * norm.ops(d, False)


MEASURES: dict[str, Measure] = {
    "attention": Measure(
        "one layer without positions, a token at the full context",
        lambda p, s: (p.n_parameters(_block(s, attention=p, position=_none())), p.ops(_plain(s, p), s.seq_len)),
    ),
    "mlp": Measure("one layer", lambda p, s: (p.n_parameters(_block(s, mlp=p)), p.ops(_block(s, mlp=p)))),
    "norm": Measure("one norm over d_model", lambda p, s: (p.n_parameters(s.d_model, False), p.ops(s.d_model, False))),
    "position": Measure("one layer, and what is added once to the embedding", _position),
    "placement": Measure("one branch, its norms being rmsnorm", _placement),
    "residual": Measure("one branch", lambda p, s: (p.n_parameters(s.d_model), p.ops(s.d_model))),
    "embedding": Measure(
        "the look-up and both changes of width; parameters besides table and head",
        lambda p, s: (p.n_parameters(s.d_model), p.ops(s.d_model)),
    ),
    "depth": Measure(
        "the whole model", lambda p, s: (p.n_parameters(s.n_layers, s.d_model), p.ops(s.n_layers, s.d_model))
    ),
    "softmax": Measure(
        "one row of scores, of one query in one head over the full context; parameters of a layer",
        lambda p, s: (p.n_parameters(_head(s)[0]), p.ops(s.seq_len)),
    ),
    "activation": Measure("one element; parameters of a layer", lambda p, s: (p.n_parameters(), p.ops())),
    "linear": Measure(
        "a d_model x d_model matrix without bias",
        lambda p, s: (p.n_parameters(s.d_model, s.d_model, False), p.ops(s.d_model, s.d_model, False)),
    ),
    "qk_norm": Measure(
        "one layer, queries and keys of all heads",
        lambda p, s: (p.n_parameters(_head(s)[1]), p.ops(2 * _head(s)[0], _head(s)[1])),
    ),
    "gate": Measure("one layer", _gate),
    "sink": Measure("one layer", lambda p, s: (p.n_parameters(_head(s)[0]), p.ops(_head(s)[0]))),
}


def _none() -> Any:
    from models.parts.position import NoPosition

    return NoPosition()


def _plain(spec: GPT, attention: Any) -> Any:
    return _block(spec, attention=attention, position=_none())
