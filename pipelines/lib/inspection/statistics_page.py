"""Activations and weights of a model, or of two, on one page that needs nothing else: tiles, SVG charts, tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.lib.comparison.html import Safe, page, say, section, table, tag
from pipelines.lib.inspection.svg import COLOURS, Line, grid, histogram, lines, number
from pipelines.lib.inspection.weights import QUANTILES

if TYPE_CHECKING:
    from pipelines.lib.inspection.statistics import Model
    from pipelines.lib.inspection.weights import Change, TensorFigures

HERE = Path(__file__).resolve().parent
SPECTRUM_POINTS = 120  # of a spectrum that are drawn
LEAST = 1e-7  # of the largest value of a spectrum: what is below is rounding, and would squeeze the rest


def statistics_page(
    models: Sequence[Model], changes: Sequence[Change], alone: Sequence[str], title: str, command: str
) -> str:
    """The page. changes: from the first model to the second, tensor by tensor.  alone: tensors without a namesake."""
    body = [
        tag("h1", f"Inside {title}"),
        tag("p", "Activations on text, and the weights as they are saved", class_="sub"),
        *(tiles(model, i, len(models)) for i, model in enumerate(models)),
        stream(models),
        attention(models),
        final_states(models),
        *([between(models, changes, alone)] if len(models) == 2 else []),
        weights(models),
        *(tensor_table(model) for model in models),
        tag("footer", tag("code", command)),
    ]
    return page(f"Inside {title}", body, {}, style=(HERE / "statistics.css").read_text(encoding="utf-8"))


def tiles(model: Model, i: int, n: int) -> Safe:
    """What one model is and its few figures."""
    seen, states = model.activations, model.states
    bad = sum(r.bad for r in seen.stream.values()) + sum(t.moments.bad for t in model.tensors)
    facts = [
        (f"{model.parameters:,}", "parameters"),
        (f"{model.step:,}", "step") if model.run is not None else None,
        (
            f"{seen.nats_per_token:.4f}",
            f"nats per token on {model.text}, {seen.tokens:,} tokens, rows of {model.context}",
        ),
        (f"{states.rankme:.1f}", f"RankMe of {states.n:,} final states (of {len(states.singular)})"),
        (f"{states.alpha_req:.2f}", "alpha-ReQ of the final states"),
        (number(max(r.largest for r in seen.stream.values())), "largest |activation| of the residual stream"),
        (f"{bad:,}", "numbers that are not finite, in activations and weights") if bad else None,
    ]
    head = tag("h3", tag("span", class_="dot", style=f"background:{COLOURS[i]}") if n > 1 else "", model.name)
    cards = [tag("div", tag("b", a), tag("span", b), class_="tile") for a, b in filter(None, facts)]
    return Safe(head + tag("div", *cards, class_="tiles"))


def stream(models: Sequence[Model]) -> Safe:
    """The residual stream from the embedding to the final norm, and what the branches add to it."""
    names = list(dict.fromkeys(name for m in models for name in m.activations.stream))
    short = [re.sub(r"^layer ", "", name) for name in names]

    def over(of: Callable[[Any], float]) -> list[Line]:
        out = []
        for i, m in enumerate(models):
            found = m.activations.stream
            ys = [of(found[name]) if name in found else math.nan for name in names]
            out.append(Line(m.name, range(len(names)), ys, COLOURS[i]))
        return out

    charts = [
        lines("RMS", over(lambda r: r.rms), "after layer", log_y=True, names=short),
        lines("Excess kurtosis (0: normal)", over(lambda r: r.kurtosis), "after layer", names=short),
        lines("Largest |value|", over(lambda r: r.largest), "after layer", log_y=True, names=short),
    ]
    for of, what in ((lambda r: r.rms, "RMS"), (lambda r: r.kurtosis, "excess kurtosis")):
        series = [
            Line(
                f"{m.name} {kind}".strip() if len(models) > 1 else kind, range(len(found)), [of(r) for r in found], c, o
            )
            for i, m in enumerate(models)
            for kind, found, c, o in (
                ("mixer", m.activations.mixers, COLOURS[i], 1.0),
                (
                    "mlp",
                    m.activations.mlps,
                    COLOURS[i] if len(models) > 1 else COLOURS[1],
                    0.5 if len(models) > 1 else 1,
                ),
            )
            if found
        ]
        if series:
            layers = [str(j) for j in range(max(len(line.xs) for line in series))]
            charts.append(lines(f"What each branch gives: {what}", series, "layer", log_y=what == "RMS", names=layers))
    return section(
        "stream",
        "Residual stream",
        say(
            "Over all tokens and channels. A kurtosis far above 0 says that a few channels or tokens carry values much "
            "larger than the rest, which rounding to few bits suffers from."
        ),
        tag("div", *charts, class_="grid3"),
    )


def attention(models: Sequence[Model]) -> Safe:
    """Per head: entropy as a share of uniform attention, how far back it looks, what its weights sum to."""
    charts = []
    far = max((h.mean()["distance"] for m in models for row in m.activations.heads.values() for h in row), default=1.0)
    for m in models:
        layers = m.activations.heads
        if not layers:
            charts.append(say(f"{m.name}: its mixers have no attention weights."))
            continue
        most = max(map(len, layers.values()))
        for key, title in (
            ("share", "entropy / ln(keys in sight)"),
            ("distance", "mean distance looked back (share of the longest)"),
        ):
            means = {layer: [head.mean() for head in heads] for layer, heads in layers.items()}
            top = 1.0 if key == "share" else far or 1.0
            cells = [
                [
                    (
                        h[key] / top,
                        f"layer {layer} head {j}: {h['entropy']:.3f} nats, {h['share']:.3f} of uniform, "
                        f"{h['distance']:.1f} tokens back, weights sum to {h['total']:.3f}",
                    )
                    for j, h in enumerate(row)
                ]
                for layer, row in means.items()
            ]
            rows = [f"layer {layer}" for layer in means]
            charts.append(grid(f"{m.name}: {title}", rows, [str(j) for j in range(most)], cells))
    return section(
        "attention",
        "Attention",
        say(
            "A row per layer, a cell per head. Dark: the head spreads evenly over what it sees (left), or looks far "
            "back (right). Light on the left: it looks at one token. Rows of weights are scaled to sum 1 first."
        ),
        tag("div", *charts, class_="grid2"),
    )


def final_states(models: Sequence[Model]) -> Safe:
    """Spectra of the final hidden states."""
    eigen, singular = [], []
    for i, m in enumerate(models):
        values = [v for v in m.states.eigenvalues if v > LEAST**2 * m.states.eigenvalues[0]]
        xs = list(range(1, len(values) + 1))
        eigen.append(Line(m.name, *thinned(xs, values), COLOURS[i]))
        if math.isfinite(m.states.alpha_req) and len(values) > 1:
            lead = min(len(values), max(2, len(m.states.eigenvalues) // 2))
            # Least squares pass through the mean point.
            mx = sum(math.log(x) for x in xs[:lead]) / lead
            my = sum(math.log(v) for v in values[:lead]) / lead
            ends = [1.0, float(lead)]
            fit = [math.exp(my - m.states.alpha_req * (math.log(x) - mx)) for x in ends]
            eigen.append(Line("fit", ends, fit, COLOURS[i], 0.8, dashed=True))
        top = m.states.singular[0] if m.states.singular else 1.0
        shares = [s / top for s in m.states.singular if s > LEAST * top]
        singular.append(Line(m.name, *thinned(range(1, len(shares) + 1), shares), COLOURS[i]))
    return section(
        "states",
        "Final hidden states",
        say(
            "RankMe is exp of the entropy of the singular values' shares: how many directions the states fill. "
            "alpha-ReQ is the steepness of the eigenvalues (dashed, fitted to the leading half)."
        ),
        tag(
            "div",
            lines("Eigenvalues of the covariance", eigen, "number", log_x=True, log_y=True),
            lines("Singular values, of the largest", singular, "number", log_y=True),
            class_="grid2",
        ),
    )


def between(models: Sequence[Model], changes: Sequence[Change], alone: Sequence[str]) -> Safe:
    """How far the second model's tensors lie from the first's."""
    a, b = models
    inside: list[Any] = [say(f"From {a.name} to {b.name}: the angle between a tensor's two versions as vectors.")]
    layered: dict[str, dict[int, Change]] = {}
    for c in changes:
        role, layer = role_of(c.name)
        if layer is not None:
            layered.setdefault(role, {})[layer] = c
    for name, of in (("Angle, degrees", "angle"), ("|b - a| / |a|", "relative")):
        series = [
            Line(role, list(found), [getattr(c, of) for c in found.values()], spread(i, len(layered)))
            for i, (role, found) in enumerate(layered.items())
        ]
        if series:
            inside.append(lines(name, series, "layer"))
    charts = tag("div", *inside[1:], class_="grid2")
    rows = [(c.name, f"{c.angle:.2f}", f"{c.relative:.4f}", f"{c.norm_ratio:.4f}") for c in changes]
    head = [("tensor", ""), ("angle, degrees", "n"), ("|b - a| / |a|", "n"), ("|b| / |a|", "n")]
    more = say(f"Without a namesake of the same shape: {', '.join(alone)}") if alone else ""
    return section("between", "Between the two", inside[0], charts, tag("div", table(head, rows), class_="tall"), more)


def weights(models: Sequence[Model]) -> Safe:
    """Per role of a tensor: its figures over the layers, and the spectra of its matrices."""
    inside: list[Any] = []
    for m in models:
        roles: dict[str, dict[int, TensorFigures]] = {}
        for t in m.tensors:
            role, layer = role_of(t.name)
            if layer is not None and len(t.shape) == 2:
                roles.setdefault(role, {})[layer] = t
        if not roles:
            continue
        if len(models) > 1:
            inside.append(tag("h3", m.name))
        charts = []
        measures: tuple[tuple[str, Callable[[TensorFigures], float]], ...] = (
            ("Standard deviation", lambda t: t.moments.std),
            ("Excess kurtosis", lambda t: t.moments.kurtosis),
            ("Stable rank", lambda t: t.stable_rank),
        )
        for name, of in measures:
            series = [
                Line(role, list(found), [of(t) for t in found.values()], spread(i, len(roles)))
                for i, (role, found) in enumerate(roles.items())
            ]
            charts.append(lines(name, series, "layer"))
        for role, found in roles.items():
            last = max(found) or 1
            series = [
                Line(
                    f"layer {layer}",
                    *thinned(range(1, len(t.singular) + 1), [s / t.singular[0] for s in t.singular]),
                    COLOURS[0],
                    0.25 + 0.75 * layer / last,
                )
                for layer, t in found.items()
                if t.singular and t.singular[0] > 0
            ]
            if series:
                charts.append(lines(f"Singular values of {role}, of the largest", series, "number", log_y=True))
        inside.append(tag("div", *charts, class_="grid3"))
    words = say("Matrices by their role, over the layers. In spectra, later layers are darker.")
    return section("weights", "Weights", words, *inside) if inside else Safe("")


def tensor_table(model: Model) -> Safe:
    """Every tensor with its figures."""
    head = [("tensor", ""), ("shape", ""), ("", "")]
    head += [(n, "n") for n in ("mean", "std", "kurtosis", "norm", "max |w|", "zeros", "s. rank", "e. rank", "sigma 1")]
    head += [("row norms", "n"), ("|cos| of rows", "n")]
    rows = []
    for t in model.tensors:
        m = t.moments
        words = f"{t.name}: from {number(m.low)} to {number(m.high)}"
        if t.quantiles:
            words += "; quantiles " + ", ".join(
                f"{q:g}: {number(v)}" for q, v in zip(QUANTILES, t.quantiles, strict=True)
            )
        picture = histogram(t.counts, words)
        rows.append(
            (
                t.name,
                "\u00a0x\u00a0".join(map(str, t.shape)),  # in one line
                tag("td", picture),
                *(number(x) for x in (m.mean, m.std)),
                f"{m.kurtosis:.2f}" if math.isfinite(m.kurtosis) else "",
                *(number(x) for x in (m.norm, m.largest)),
                f"{m.zeros:.1%}" if m.zeros else "",
                *(f"{x:.1f}" if math.isfinite(x) else "" for x in (t.stable_rank, t.effective_rank)),
                number(t.singular[0]) if t.singular else "",
                f"{number(t.axes.row_norm)} ± {t.axes.row_norm_std:.2g}" if t.axes is not None else "",
                f"{t.axes.row_cosine:.3f}" if t.axes is not None and math.isfinite(t.axes.row_cosine) else "",
            )
        )
    words = say(
        "s. rank: |W|² / largest singular value², how many directions of the strongest one's size; e. rank: exp of the "
        "entropy of the singular values' shares; sigma 1: the largest singular value; |cos| of rows: the mean of two "
        "different rows. Quantiles stand at the histograms."
    )
    return section("tensors", f"Every tensor of {model.name}", words, tag("div", table(head, rows), class_="tall"))


def role_of(name: str) -> tuple[str, int | None]:
    """A tensor's name without its layer, and the layer.

    >>> role_of("blocks.3.mlp.up.weight"), role_of("embedding.weight")
    (('mlp.up', 3), ('embedding', None))
    """
    found = re.search(r"\.(\d+)\.", name)
    short = name.removesuffix(".weight")
    if found is None:
        return short, None
    return short[found.end() :] or short, int(found[1])


def spread(i: int, n: int) -> str:
    """Colour number i of n that can be told apart."""
    return f"hsl({(210 + 360 * i / max(1, n)) % 360:.0f} 60% 50%)"


def thinned(xs: Sequence[int], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """A spectrum with at most SPECTRUM_POINTS points, closer together at its beginning."""
    n = len(xs)
    if n <= SPECTRUM_POINTS:
        return [float(x) for x in xs], list(ys)
    kept = sorted({round((n - 1) * (i / (SPECTRUM_POINTS - 1)) ** 2) for i in range(SPECTRUM_POINTS)})
    return [float(xs[i]) for i in kept], [ys[i] for i in kept]
