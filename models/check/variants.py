"""What the suite is run over: every preset, every registered kind of every sort of part, and every switch of each."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models.catalogue.collect import Place, kind_name, places
from models.family import Family
from models.gpt.config import GPT
from models.gpt.presets import PRESETS
from models.parts.activation import SiLU
from models.parts.attention import Causal, Infinite
from models.parts.depth import Routed
from models.parts.embedding import Factored
from models.parts.mlp import MoE, Plain, SwiGLU
from models.parts.norm import Capped, LayerNorm, RMSNorm, SliceRMSNorm
from models.parts.placement import Peri, Post
from models.parts.position import FIRE, Mixed, NoPosition, Rotary
from models.parts.qk_norm import L2QKNorm
from models.parts.residual import ReZero, Scaled
from models.parts.sharing import Shared, Sharing
from models.parts.sink import HeadSink
from models.parts.softmax import Entmax15
from models.parts.streams import Streams
from models.spec import ConfigError, Part, fields


@dataclass(frozen=True)
class Variant:
    """A small model of the suite.

    focus: dotted config field that it is about; None: all of them.
    first: whether it is where a kind is first tried, so that every check is run; else the quick ones, which find what
        parts do to each other.
    """

    spec: Family
    focus: str | None = None
    first: bool = True


# Where a switch does nothing beside the small form's other options: what it is turned in instead.
AWAKE: dict[tuple[type, str], Any] = {(Capped, "learned_radius"): Capped(radius=1.0)}


def base() -> GPT:
    """What variants differ from in one thing."""
    return GPT(
        vocab_size=30,
        d_model=16,
        n_layers=2,
        seq_len=32,
        attention=Causal.small(),
        mlp=Plain.small(),
        norm=RMSNorm(),
        position=Rotary(),
    )


def small(cls: Any) -> Any:
    """A kind with options that fit the base's width."""
    return getattr(cls, "small", cls)()


def put(place: Place, part: Any, spec: GPT) -> GPT:
    """The spec with a part there, in the small form of the kind around it. Raises ConfigError."""
    if place.outer is None:
        return dataclasses.replace(spec, **{place.field: part})
    return put(place.outer, dataclasses.replace(small(place.holder), **{place.field: part}), spec)


def shrunk(spec: GPT) -> GPT:
    """A preset at a size for tests: same parts and options, small numbers, the ratio of query to key heads kept.

    Raises AssertionError where layers differ.
    """
    attention, mlp = spec.attention, spec.mlp
    assert isinstance(attention, Part) and isinstance(mlp, Part)
    G = 1
    if isinstance(attention, Causal):
        H, K = attention.heads()
        G = H // K
        heads: dict[str, Any] = {"n_heads": 2 * G, "n_kv_heads": None if attention.n_kv_heads is None else 2}
        heads["window"] = None if attention.window is None else 5
        attention = dataclasses.replace(attention, **heads)
    else:
        attention = _small_numbers(attention)
    changes: dict[str, Any] = {"attention": attention, "mlp": _small_numbers(mlp)}
    if isinstance(mlp, (Plain, SwiGLU)):
        changes["mlp"] = dataclasses.replace(mlp, hidden=None if mlp.hidden is None else 24 * G)
    return dataclasses.replace(spec, vocab_size=30, d_model=16 * G, n_layers=2, seq_len=32, **changes)


def _small_numbers(part: Any) -> Any:
    """A part with the sizes that its small form has."""
    cls: Any = type(part)
    form = small(cls)
    changes = {}
    for name in fields(cls):
        new, old = getattr(form, name), getattr(part, name)
        assert not isinstance(old, tuple) or isinstance(new, tuple)
        if isinstance(old, Part):
            changes[name] = _small_numbers(old)
        elif isinstance(new, int) and not isinstance(new, bool) and old is not None:
            changes[name] = new
    return dataclasses.replace(part, **changes)


def variants() -> dict[str, Variant]:
    """Small models that between them hold every preset, every registered kind and every switch, one thing at a time."""
    found: dict[Family, tuple[list[str], Variant]] = {}  # names that mean the same spec are checked once
    for name, variant in (*_presets(), *_kinds(), *_switches(), *_numbers()):
        names, known = found.setdefault(variant.spec, ([], variant))
        names.append(name)
        if variant.first and not known.first:
            found[variant.spec] = (names, variant)
    return {", ".join(names): variant for names, variant in found.values()}


def _presets() -> Iterator[tuple[str, Variant]]:
    yield "base", Variant(base())
    for name, make in PRESETS.items():
        yield name, Variant(shrunk(make()), focus="tie_embeddings")  # its fields are tried by the base and by kinds


def _kinds() -> Iterator[tuple[str, Variant]]:
    """Every kind at every place of a model, and at the first place inside of another part; elsewhere one."""
    tried: set[type] = set()
    opened: set[type[Part]] = set()
    for place in places():
        kinds = list(place.sort.kinds.values())
        if place.outer is not None:
            if place.sort in opened:
                usual = type(getattr(small(place.holder), place.field))
                kinds = [k for k in kinds if k is not usual][-1:]
            opened.add(place.sort)
        for cls in kinds:
            spec = _fitting(place, small(cls))
            if spec is not None:
                inside = f" in {kind_name(place.holder)}" if place.holder is not None else ""
                yield f"{place.path()}={kind_name(cls)}{inside}", Variant(spec, place.path(), cls not in tried)
                tried.add(cls)


def _fitting(place: Place, part: Any) -> GPT | None:
    """The base with the part there; without positions where it has nothing that they could turn. None: refused."""
    start = dataclasses.replace(base(), n_layers=4) if place.sort is Sharing else base()
    for spec in (start, dataclasses.replace(start, position=NoPosition())):
        try:
            return put(place, part, spec)
        except ConfigError:
            continue
    return None


def _switches() -> Iterator[tuple[str, Variant]]:
    """Every kind with each of its switches turned, and each of its words."""
    known: set[type[Part]] = set()
    for place in places():
        if place.sort in known:
            continue
        known.add(place.sort)
        for cls in place.sort.kinds.values():
            usual = small(cls)
            for name, (annotation, _) in fields(cls).items():
                for value in words(annotation):
                    if value == getattr(usual, name):
                        continue
                    try:
                        part = dataclasses.replace(AWAKE.get((cls, name), usual), **{name: value})
                    except ConfigError:
                        continue
                    if (spec := _fitting(place, part)) is not None:
                        label = f"{place.path()}={kind_name(cls)}.{name}={str(value).lower()}"
                        yield label, Variant(spec, f"{place.path()}.{name}", first=False)
    for name, (annotation, _) in fields(GPT).items():
        for value in words(annotation):
            if value != getattr(base(), name):
                yield f"{name}={value}".lower(), Variant(dataclasses.replace(base(), **{name: value}), name)


def words(annotation: Any) -> list[Any]:
    """The values of an option that has few: a switch or a Literal."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if annotation is bool:
        return [False, True]
    return [v for arg in typing.get_args(annotation) for v in words(arg) if typing.get_origin(annotation) is not tuple]


def _numbers() -> Iterator[tuple[str, Variant]]:
    """Options whose numbers change what is computed, lists per layer, and things that only several parts can show."""
    start = base()

    def with_(focus: str | None, **changes: Any) -> Variant:
        return Variant(dataclasses.replace(start, **changes), focus)

    yield "one key head", with_("attention", attention=Causal(n_heads=4, n_kv_heads=1, head_dim=6))
    yield "uneven groups", with_("attention", attention=Causal(n_heads=4, n_kv_heads=3))
    yield "values of another size", with_("attention", attention=Causal(n_heads=4, n_kv_heads=2, v_head_dim=3))
    yield "window", with_("attention.window", attention=Causal(n_heads=4, window=3))
    yield "window and sinks", with_("attention", attention=Causal(n_heads=4, n_kv_heads=2, window=3, sink=HeadSink()))
    yield "window, infinite heads", with_("attention.window", attention=Infinite(5, 2, head_dim=4, window=3))
    yield "soft-cap", with_("attention.softcap", attention=Causal(n_heads=4, softcap=2.0))
    yield "logit soft-cap", with_("logit_softcap", logit_softcap=3.0)
    yield "a score bias shared by layers", with_("position", position=FIRE(shared=True, width=4))
    yield "a score bias of two layers", with_("position", position=FIRE(hidden=2, width=4, threshold=4.0))
    yield "a score bias that is one number", with_("position", position=FIRE(hidden=0))
    yield "all three kinds of positions", with_("position", position=Mixed(bias=FIRE(width=4)))
    yield "half rotary", with_("position.fraction", position=Rotary(fraction=0.5))
    yield "biases", with_("bias", bias=True, norm=LayerNorm())
    yield "dropout", with_("dropout", dropout=0.2)
    yield "one layer", with_("n_layers", n_layers=1)
    yield "quantised norm", with_("norm", norm=SliceRMSNorm(k=6, bits=8, fallback=0.3, which="random", seed=1))
    yield "parallel, both normed", with_("parallel", parallel=True, placement=Peri(), residual=ReZero(alpha=0.3))
    yield "mlp placed otherwise", with_("mlp_placement", placement=Post(), mlp_placement=Peri())
    yield "mlp joined otherwise", with_("mlp_residual", mlp_residual=Scaled(gated=True))
    yield "factored, with its own way back", with_("embedding", embedding=Factored(rank=5, tied=False, scale="sqrt"))
    yield "factored, untied head", with_("embedding", embedding=Factored(rank=5), tie_embeddings=False)
    yield (
        "streams, untied head",
        with_("embedding", embedding=Streams((2, 15)), tie_embeddings=False, head_norm=RMSNorm()),
    )
    yield "shared in cycles", with_(None, n_layers=4, share_attention=Shared(cycle=2), share_mlp=Shared(size=2))
    yield "shared in a mirror", with_("share_mlp", n_layers=4, share_mlp=Shared(mirror=True))
    yield "three of five depths", with_("depth", n_layers=4, depth=Routed(top_k=3))
    yield "experts in every other layer", with_("mlp", mlp=(Plain.small(), MoE.small()))
    yield "parallel in one layer of two", with_("parallel", parallel=(True, False))
    lists: dict[str, Any] = {
        "attention": Causal(
            n_heads=(2, 4, 1),
            n_kv_heads=1,
            window=(3, None, 5),
            head_dim=4,
            softmax=(small(Causal).softmax, Entmax15(), small(Causal).softmax),
            qk_norm=(small(Causal).qk_norm, L2QKNorm(), L2QKNorm(learned=False)),
        ),
        "mlp": (Plain(hidden=24), SwiGLU(hidden=8), Plain(activation=SiLU())),
        "norm": (RMSNorm(), LayerNorm(), RMSNorm(eps=1e-3)),
        "position": (Rotary(), NoPosition(), Rotary(base=100.0)),
        "placement": (Peri(), Post(), Peri()),
    }
    yield "a list per layer", with_(None, n_layers=3, **lists)
