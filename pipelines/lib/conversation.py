"""A conversation with a model on the terminal: it writes until a stop, a line of the user goes on behind that."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.lib.config import InputError

if TYPE_CHECKING:
    from serving.engine import Engine, Request, SamplingParams


@dataclasses.dataclass(eq=False)
class Turn:
    """What the model wrote in one turn: `request` continues `prompt`; sample: number of the turn."""

    request: Request
    prompt: str
    sample: int


def converse(
    engine: Engine, prompt: str, every: Sequence[SamplingParams], look: Callable[[Any], None] | None = None
) -> int:
    """Turn by turn until the input ends, or somebody stops it. Returns the exit code.

    every: settings; each has a text of its own, and the user's lines go into all of them.  look: shows a finished turn.
    A turn ends with a stop string, which belongs to the text, or after max_tokens. The user's line is added with its
    line break; a \\ at its end takes that away. A text that outgrows the context loses its beginning, which is said.
    """
    try:
        take_turns(engine, prompt, every, look)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def take_turns(
    engine: Engine, prompt: str, every: Sequence[SamplingParams], look: Callable[[Any], None] | None
) -> None:
    """The turns of `converse`. Raises InputError for a prompt that the model cannot read."""
    from serving.engine import RequestError, seed_of_sample

    texts, number, cut = [prompt] * len(every), 0, False
    print(prompt, end="" if len(every) == 1 else "\n", flush=True)
    while True:
        for i, params in enumerate(every):
            if len(every) > 1:
                print(f"--- temperature {params.temperature:g}, top_k {params.top_k}")
            params = dataclasses.replace(params, seed=seed_of_sample(params.seed, number))
            try:
                ids = engine.encode(texts[i]) if texts[i] else engine.check("", params)
            except RequestError as error:  # of the prompt: `listened` has tried the user's lines
                raise InputError(f"the prompt: {error}") from None
            room = engine.context - min(params.max_tokens or engine.context // 2, engine.context // 2)
            if len(ids) > room:
                if not cut:
                    print("(the text outgrows the context: the model no longer sees its beginning)", file=sys.stderr)
                ids, cut = ids[-room:], True
            request = written(engine, ids, params)
            if request.error:
                raise InputError(f"turn {number + 1}: {request.error}")
            met = request.stops.met if request.stops is not None else None
            print(met or "", flush=True)
            if look is not None:
                look(Turn(request, "", number))
            texts[i] += request.text + (met or "")
        line = listened(engine)
        if line is None:
            return
        texts = [text + line for text in texts]
        number += 1


def written(engine: Engine, ids: Sequence[int], params: SamplingParams) -> Request:
    """The continuation, printed as it grows."""
    request, shown = engine.submit(ids, params), 0
    while not request.finished:
        engine.step()
        print(request.text[shown:], end="", flush=True)
        shown = len(request.text)
    return request


def listened(engine: Engine) -> str | None:
    """A line of the user that the model's tokenizer can read; None at the end of the input."""
    from serving.engine import RequestError

    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return None
        bare = line.removesuffix("\n")
        text = bare.removesuffix("\\") if bare.endswith("\\") else bare + "\n"
        try:
            engine.encode(text)
        except RequestError as error:
            print(f"{error}; another line, please", file=sys.stderr)
            continue
        return text
