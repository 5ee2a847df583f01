"""Continuations on one page that needs nothing else: coloured tokens, the likely ones under the pointer, charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.lib.comparison.html import Safe, buttons, page, say, section, tag
from pipelines.lib.inspection.colour import STOPS
from pipelines.lib.inspection.draws import MODES, Continuation, ends_of_scale, values
from pipelines.lib.inspection.modes import Mode
from pipelines.lib.inspection.pictures import candidates

HERE = Path(__file__).resolve().parent
NAMES = {
    "probability": "probability",
    "top_k": "drawn with (after truncation)",
    "entropy": "entropy",
    "rank": "rank",
    "minmax": "logit, min-max",
    "cosine": "cosine with the token before",
}


def draws_page(all_: Sequence[Continuation], colour: Mode, k: int, command: str, folder: str) -> str:
    """The page. colour: the mode shown first.  k: likely tokens at each step.  command: that makes it again."""
    first = colour if colour in MODES else "probability"
    body = [
        tag("h1", "What the model chose from"),
        tag("p", f"{folder}: {len(all_)} continuation{'s' if len(all_) != 1 else ''}", class_="sub"),
        section(
            "how",
            "Colours",
            tag(
                "div",
                buttons("mode", [(m, NAMES[m]) for m in MODES], MODES.index(first)),
                class_="buttons",
            ),
            say(
                "Blue is what the model was sure of or liked, red what it was not. A token under the pointer (or found"
                " by Tab or the arrow keys) shows the most likely tokens of its step: the bar is p, the model's own "
                "probability; the outline is what it was drawn with, after temperature and truncation. A narrow mark "
                "without text is a token that holds a part of a character."
            ),
        ),
        *(part(i, one) for i, one in enumerate(all_)),
        tag("div", id="tip", role="tooltip", hidden="hidden"),
        tag("footer", tag("code", command)),
    ]
    data = {
        "mode": first,
        "k": k,
        "stops": STOPS,
        "all": [plain_data(one, k) for one in all_],
    }
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("draws.js", "draws.css"))
    return page("What the model chose from", body, data, (script,), style)


def part(i: int, one: Continuation) -> Safe:
    """The places of one continuation that the script fills."""
    words = [f"{name.replace('_', '-')} {value:.3f}" for name, value in one.figures().items()]
    return section(
        f"c{i}",
        one.title(),
        say(f"{len(one.tokens)} tokens; mean {', '.join(words)} (nats, but for rank)" if words else "no token"),
        tag("div", class_="scale", data_of=i),
        tag("div", class_="text", data_of=i),
        tag("details", tag("summary", "The chosen step as bars"), tag("div", class_="bars", data_of=i), open="open"),
        tag(
            "details",
            tag("summary", "Heatmap of the most likely tokens"),
            tag("div", tag("div", class_="map", data_of=i), class_="scroll"),
            open="open",
        ),
        tag("details", tag("summary", "Raw logits of the drawn tokens"), tag("div", class_="line", data_of=i)),
    )


def plain_data(one: Continuation, k: int) -> dict[str, Any]:
    """A continuation as the script reads it."""
    colours = {mode: values(one.tokens, mode, one.vocab, k) for mode in MODES}
    return {
        "prompt": one.prompt,
        "scale": {mode: ends_of_scale(one.tokens, mode, one.vocab, k) for mode in MODES},
        "tokens": [
            {
                "name": t.name,
                "text": t.text,
                "value": {mode: short(colours[mode][i]) for mode in MODES},
                "p": short(math.exp(t.draw.logprob)),
                "nats": short(-t.draw.logprob),
                "entropy": short(t.draw.entropy),
                "rank": t.draw.rank,
                "above": short(t.draw.above),
                "drawn": short(t.draw.drawn),
                "kept": t.draw.kept,
                "logit": short(t.draw.logit),
                "cosine": short(t.cosine),
                "top": [[name, short(p), short(q), drawn] for name, p, q, drawn in candidates(t, k)],
            }
            for i, t in enumerate(one.tokens)
        ],
    }


def short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.5g}")
