"""Pairs of parts: small models in which every two kinds of different sorts stand together at least once (allpairspy).

`cover(whole)` gives rows of choices, `spec_of(chosen(row))` a model. Without `whole`, elementwise parts that are built
by one class stand for each other (30 activations are 7 modules), which makes the cover some five times smaller.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from allpairspy import AllPairs

from models.check.variants import base, small
from models.gpt.config import GPT
from models.parts.activation import Activation
from models.parts.attention import Attention, Causal, Infinite
from models.parts.depth import Depth
from models.parts.embedding import Factored, Table
from models.parts.gate import Gate
from models.parts.linear import Linear
from models.parts.mlp import MLP
from models.parts.norm import Hypersphere, NoNorm, Norm
from models.parts.placement import Placement
from models.parts.position import FIRE, Mixed, NoPosition, Position
from models.parts.qk_norm import QKNorm
from models.parts.residual import Residual
from models.parts.sharing import Own, Shared
from models.parts.sink import Sink
from models.parts.softmax import Softmax
from models.parts.streams import Streams
from models.spec import ConfigError, Part, kind_of, plain, registry_of

ORDER = (
    "attention", "mlp", "position", "norm", "attention.softmax", "mlp.activation", "attention.linear", "mlp.linear",
    "attention.qk_norm", "attention.sink", "attention.gate", "attention.softcap", "placement", "mlp_placement",
    "residual", "mlp_residual", "parallel", "embedding", "embedding_norm", "position_norm", "final_norm", "head_norm",
    "depth", "output_softmax", "logit_softcap", "tie_embeddings", "share_attention", "share_mlp", "bias", "dropout",
)  # fmt: skip
NONE = "usual"  # this choice leaves the field as the part around it has it


def kinds(registry: type[Part]) -> list[Any]:
    return [small(cls) for cls in registry.kinds.values()]


def unlike(parts: list[Any], built: Any) -> list[Any]:
    """One part for each sort of thing that they build."""
    return list({built(part): part for part in parts}.values())


def _activation(part: Any) -> Any:
    module = part.build()
    return (type(module).__name__, part.n_parameters() > 0)


def _softmax(part: Any) -> Any:
    return type(part.build(4)).__name__, part.sums_to_one, part.n_parameters(4) > 0


@functools.cache
def choices(whole: bool) -> dict[str, list[Any]]:
    """Dotted field -> what may stand there."""
    activations, softmaxes = kinds(Activation), kinds(Softmax)
    if not whole:
        activations, softmaxes = unlike(activations, _activation), unlike(softmaxes, _softmax)
    outputs = [s for s in softmaxes if s.refuses_output() is None]
    outer = [None, *(unlike(kinds(Norm), lambda n: type(n.build(16, False))) if not whole else kinds(Norm))]
    inner = [norm for norm in outer if not isinstance(norm, NoNorm)]  # there, none is the word for it
    fixed = Hypersphere(learned_radius=True, gain=False)
    return {
        "attention": [*kinds(Attention), Causal(n_heads=4, n_kv_heads=3, window=5), Infinite(4, 2, 6, merge="concat")],
        "mlp": kinds(MLP),
        "position": [*kinds(Position), FIRE(shared=True, width=4), Mixed(bias=FIRE(hidden=0))],
        "norm": [*kinds(Norm), fixed],
        "attention.softmax": [NONE, *softmaxes],
        "mlp.activation": [NONE, *activations],
        "attention.linear": [NONE, *kinds(Linear)],
        "mlp.linear": [NONE, *kinds(Linear)],
        "attention.qk_norm": [NONE, *kinds(QKNorm)],
        "attention.sink": [NONE, *kinds(Sink)],
        "attention.gate": [NONE, *kinds(Gate)],
        "attention.softcap": [NONE, 3.0],
        "placement": kinds(Placement),
        "mlp_placement": [None, *kinds(Placement)],
        "residual": kinds(Residual),
        "mlp_residual": [None, *kinds(Residual)],
        "parallel": [False, True],
        "embedding": [
            *(Table(), Table(scale="learned"), Factored(rank=5), Factored(rank=5, tied=False, scale="sqrt")),
            Streams.small(),
        ],
        "embedding_norm": inner,
        "position_norm": inner,
        "final_norm": outer,
        "head_norm": inner,
        "depth": kinds(Depth),
        "output_softmax": outputs,
        "logit_softcap": [None, 5.0],
        "tie_embeddings": [True, False],
        "share_attention": [Own(), Shared(size=2)],
        "share_mlp": [Own(), Shared(size=2)],
        "bias": [False, True],
        "dropout": [0.0, 0.2],
    }


def spec_of(row: dict[str, Any]) -> GPT:
    """The model of some choices. Raises ConfigError for those that cannot stand together, and for an option without
    a part that has it."""
    changes = {name: value for name, value in row.items() if "." not in name}
    for name, value in row.items():
        if "." in name and value is not NONE:
            field, option = name.split(".")
            part = changes.get(field, getattr(base(), field))
            if not hasattr(part, option):
                raise ConfigError(f"{kind_of(part)} has no {option}")
            changes[field] = dataclasses.replace(part, **{option: value})
    return dataclasses.replace(base(), **{"position": NoPosition(), **changes})


def has_a_say(name: str, value: Any) -> bool:
    """Whether a choice could refuse another: kinds that inherit `refuses` unchanged say nothing."""
    if isinstance(value, Part):
        registry = registry_of(type(value))
        return getattr(type(value), "refuses", None) is not getattr(registry, "refuses", None)
    return name == "parallel"


def may_clash(one: str, a: Any, other: str, b: Any) -> bool:
    if "." not in one and "." not in other:
        return has_a_say(one, a) or has_a_say(other, b)
    same = one.split(".")[0] == other.split(".")[0]
    return same and a is not NONE and b is not NONE


@functools.cache
def refused_pairs(whole: bool) -> dict[tuple[str, int, str, int], str]:
    """Pairs that cannot be: (field, number of the choice, field, number) -> why. Each choice alone is fine."""
    table, found = choices(whole), {}
    for one, other in itertools.combinations(table, 2):
        for (i, a), (j, b) in itertools.product(enumerate(table[one]), enumerate(table[other])):
            if may_clash(one, a, other, b) and (reason := refused({one: a, other: b})):
                found[one, i, other, j] = reason
    return found


def refused(row: dict[str, Any]) -> str | None:
    try:
        spec_of(row)
    except ConfigError as error:
        return str(error)
    return None


Row = dict[str, int]  # field -> number of its choice


@functools.cache
def cover(whole: bool = False) -> tuple[Row, ...]:
    """Rows such that every pair of choices that can be stands in one.

    The rows of the covering array know nothing of what cannot be (told of it, the library searches for hours). Their
    impossible choices go back to the first, which fits everything; the pairs that this loses are packed into more rows.
    """
    table, never = choices(whole), refused_pairs(whole)
    found = [dict(zip(table, numbers, strict=True)) for numbers in AllPairs([range(len(v)) for v in table.values()])]
    kept = [mended(row, never) for row in found]
    left = sorted(possible_pairs(whole) - {pair for row in kept for pair in pairs_of(row)})
    while left:
        row: Row = {}
        for a, i, b, j in left:
            if row.get(a, i) == i and row.get(b, j) == j and fits(a, i, row, never) and fits(b, j, row, never):
                row |= {a: i, b: j}
        kept.append(mended(dict.fromkeys(table, 0) | row, never))
        here = set(pairs_of(kept[-1]))
        rest = [pair for pair in left if pair not in here]
        assert len(rest) < len(left), f"a choice that is refused alone stands in the table: {left[0]}"
        left = rest
    return tuple(kept)


def fits(name: str, number: int, row: Row, never: Any) -> bool:
    """Whether a choice can stand beside those of a row."""
    at = ORDER.index(name)
    return not any(
        ((other, i, name, number) if ORDER.index(other) < at else (name, number, other, i)) in never
        for other, i in row.items()
    )


def pairs_of(row: Row) -> list[tuple[str, int, str, int]]:
    names = [name for name in ORDER if name in row]
    return [(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)]


def possible_pairs(whole: bool) -> set[tuple[str, int, str, int]]:
    table = choices(whole)
    every = {
        (a, i, b, j)
        for a, b in itertools.combinations(table, 2)
        for i in range(len(table[a]))
        for j in range(len(table[b]))
    }
    return every - set(refused_pairs(whole))


def mended(row: Row, never: Any) -> Row:
    """The row with its later choices back at the first wherever two cannot be together."""
    row = dict(row)
    for pair in pairs_of(row):
        if (pair[0], row[pair[0]], pair[2], row[pair[2]]) in never:
            row[pair[2] if row[pair[2]] else pair[0]] = 0
    return row


def chosen(row: Row, whole: bool = False) -> dict[str, Any]:
    return {name: choices(whole)[name][number] for name, number in row.items()}


def label(row: Row, whole: bool = False) -> str:
    """The choices that are not the first ones."""
    return " ".join(f"{name}={word(choices(whole)[name][number])}" for name, number in row.items() if number)


def word(value: Any) -> str:
    """A choice in short: `causal`, or `causal{window=5}`."""
    if not isinstance(value, Part):
        return str(value).lower()
    usual, options = plain(small(type(value))), plain(value)
    other = [f"{k}={v}" for k, v in options.items() if usual[k] != v]
    return kind_of(value) + ("{" + ",".join(other) + "}" if other else "")
