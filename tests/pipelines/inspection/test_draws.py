"""Coloured continuations: the values, the text of tokens, terminal, picture, charts and page."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import pytest
from PIL import Image
from rich.console import Console

from models.spec import ConfigError
from pipelines.lib.config import InputError
from pipelines.lib.inspection import pictures
from pipelines.lib.inspection.colour import coloured, hex_of, print_coloured, rgb, shown, table_of
from pipelines.lib.inspection.draws import MODES, Continuation, Token, by_rank, continuation, values
from pipelines.lib.inspection.draws_page import draws_page
from serving.engine import Draw, Engine, SamplingParams
from tests.serving.tiny import byte_level_tokenizer, gpt, wordpiece_tokenizer

NASTY = "</script><img src=x onerror=alert(1)> $x_1$ \\n"


def token(name, rank=1, p=0.5, drawn=0.5, entropy=1.0, logit=0.0, cosine=0.0, top=()):
    draw = Draw(7, logit, math.log(p), entropy, rank, 0.1, drawn, 3, 0.0, tuple((i, math.log(q), q) for i, q, _ in top))
    return Token(name, name, draw, cosine, tuple(n for *_, n in top))


@pytest.fixture(scope="module")
def made_up():
    some = (
        token("one", 1, 0.9, 1.0, 0.2, 3.0, 0.1, ((7, 0.9, "one"), (8, 0.05, "<b>"))),
        token(NASTY, 2, 0.2, 0.4, 2.0, 1.0, 0.5, ((8, 0.3, "two"), (7, 0.2, NASTY))),
        token("世\n", 40, 0.01, 0.0, 4.0, 2.0, -0.3, ((8, 0.3, "two"), (9, 0.2, "three"))),
    )
    return Continuation("the prompt: ", 0, 0.8, 50, some, 100, "length")


def test_values_are_those_of_the_modes(made_up):
    def of(mode):
        return values(made_up.tokens, mode, 100, 10)

    assert of("probability") == pytest.approx([0.9, 0.2, 0.01])
    assert of("top_k") == [1.0, 0.4, 0.0]
    assert of("entropy") == pytest.approx([1 - h / math.log(100) for h in (0.2, 2.0, 4.0)])
    assert of("rank") == [None, 1.0, 0.0]  # the best is plain, the second blue, beyond k red
    assert of("minmax") == [1.0, 0.0, 0.5]
    assert of("cosine") == pytest.approx([0.5, 1.0, 0.0])
    assert by_rank(6, 10) == 0.5 and by_rank(10, 10) == by_rank(500, 10) == 0 and by_rank(2, 1) == 1
    with pytest.raises(ConfigError, match="entropy"):
        values(made_up.tokens, "entropie", 100, 10)


def test_equal_logits_are_in_the_middle_of_the_scale_and_nothing_has_no_values():
    assert values((token("a"), token("b")), "minmax", 10, 5) == [0.5, 0.5]
    assert [values((), mode, 10, 5) for mode in MODES] == [[]] * len(MODES)


@pytest.mark.parametrize("make", [byte_level_tokenizer, wordpiece_tokenizer])
def test_the_texts_of_tokens_join_to_the_text_also_where_tokens_are_parts_of_characters(make):
    tokenizer = make()
    engine = Engine(gpt(vocab_size=len(tokenizer)), tokenizer, rows=4)
    every = [SamplingParams(max_tokens=40, temperature=1.5, seed=s, draws=3, ignore_eos=True) for s in range(4)]
    requests = engine.complete(["the 你"] * 4, every)
    parts = 0
    for request in requests:
        one = continuation(engine, request, "the 你", 0)
        assert one.text == request.text and len(one.tokens) == len(request.tokens)
        for t in one.tokens:
            if t.name.startswith("bytes:"):
                parts += 1
            elif t.draw.id not in engine.token_bytes.special and engine.token_bytes.exact:
                assert t.text.replace("\ufffd", "") == t.name
    assert parts > 0 or make is wordpiece_tokenizer


def test_a_stop_string_cuts_the_tokens_where_it_cuts_the_text():
    engine = Engine(gpt(), byte_level_tokenizer(), rows=1)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, draws=1)
    (whole,) = engine.complete(["the cat"], params)
    stop = whole.text[5:7]
    (cut,) = engine.complete(["the cat"], SamplingParams(**{**params.__dict__, "stop": (stop,)}))
    one = continuation(engine, cut, "the cat", 0)
    assert one.text == cut.text == whole.text[: whole.text.index(stop)]
    assert len(one.tokens) < len(whole.tokens)


def test_cosines_are_those_of_the_embeddings():
    model = gpt()
    engine = Engine(model, byte_level_tokenizer(), rows=1)
    (request,) = engine.complete(["the cat"], SamplingParams(max_tokens=9, seed=2, draws=0, ignore_eos=True))
    rows = model.get_input_embeddings().weight.detach().double()
    ids = request.prompt[-1:] + request.tokens
    for t, a, b in zip(continuation(engine, request, "", 0).tokens, ids, ids[1:], strict=False):
        assert t.cosine == pytest.approx(float(rows[a] @ rows[b] / rows[a].norm() / rows[b].norm()), abs=1e-5)


def test_the_terminal_shows_every_token_on_its_colour(made_up):
    text = coloured(made_up, "probability", 10)
    assert text.plain == made_up.prompt + made_up.text
    spans = {text.plain[s.start : s.end]: s.style for s in text.spans}
    assert spans["one"].bgcolor.name == hex_of(rgb(0.9)) != hex_of(rgb(0.2))
    out = io.StringIO()
    print_coloured(Console(file=out, force_terminal=True, color_system="truecolor", width=200), made_up, MODES, 2, True)
    assert "\x1b[38;2;24;26;30;48;2;{};{};{}mone".format(*rgb(0.9)) in out.getvalue()  # not dim, as the prompt is
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert all(f"{mode}: " in plain for mode in MODES) and plain.count("the prompt: one") == len(MODES)


def test_the_table_has_what_each_token_was_drawn_from(made_up):
    out = io.StringIO()
    Console(file=out, width=220).print(table_of(made_up.tokens, 2))
    row = next(line for line in out.getvalue().splitlines() if line.strip().startswith("3 "))
    cells = row.split()
    assert cells[1:7] == ["世↵", f"{-math.log(0.01):.3f}", "40", "0.0100", "0.1000", "0.0000"]
    assert "two\u00a00.300" in row and "three\u00a00.200" in row
    assert shown("\x07") == "\\x07"


def test_pictures_are_drawn_with_dollars_and_letters_of_any_script(made_up, tmp_path):
    pictures.coloured_picture([made_up], MODES, 10, tmp_path / "a" / "text.png")
    short = dataclasses.replace(made_up, tokens=made_up.tokens[:1])
    made = pictures.charts([made_up, short], ("heatmap", "bars", "logits"), 2, tmp_path / "charts")
    assert sorted({p.parent.name for p in made}) == ["001", "002"]
    assert sorted(p.name for p in made[:5]) == [
        *("heatmap.png", "logits.png"),
        *(f"step_{n:04d}.png" for n in (1, 2, 3)),
    ]
    wanted = hex_of(rgb(0.9))
    with Image.open(tmp_path / "a" / "text.png") as image:
        assert wanted in {hex_of(c[1][:3]) for c in image.convert("RGB").getcolors(1 << 24)}
    for path in made:
        with Image.open(path) as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_candidates_hold_the_drawn_token_also_when_it_is_not_among_the_best(made_up):
    assert [drawn for *_, drawn in pictures.candidates(made_up.tokens[0], 2)] == [True, False]
    assert pictures.candidates(made_up.tokens[2], 2)[-1] == ("世\n", pytest.approx(0.01), 0.0, True)


def test_text_is_laid_out_by_the_width_of_its_characters():
    runs, lines = pictures.laid_out([("ab", 1), ("世世c\nd", 2)], columns=5)
    assert runs == [(0, 0, "ab", 1), (0, 2, "世", 2), (1, 0, "世c↵", 2), (2, 0, "d", 2)] and lines == 3


def test_a_picture_that_would_be_too_tall_is_refused(made_up, tmp_path):
    with pytest.raises(InputError, match=r"picture=.*page="):
        pictures.coloured_picture([made_up] * 500, MODES, 10, tmp_path / "x.png")


def test_the_page_stands_alone_and_text_cannot_become_markup(made_up):
    page = draws_page([made_up], "rank", 2, "python -m pipelines.sample x", "folder")
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page.replace("src=x", ""))
    assert "</script><img" not in page and "plotly" not in page and len(page) < 100_000
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', page, re.S)[1])
    assert data["mode"] == "rank" and data["all"][0]["tokens"][1]["text"] == NASTY
    assert data["all"][0]["tokens"][0]["top"] == [["one", 0.9, 0.9, True], ["<b>", 0.05, 0.05, False]]
    assert data["all"][0]["tokens"][2]["value"] == {
        "probability": 0.01,
        "top_k": 0.0,
        "entropy": pytest.approx(1 - 4 / math.log(100), abs=1e-4),
        "rank": 0.0,
        "minmax": 0.5,
        "cosine": 0.0,
    }
    assert "0 token" not in page and "no token" in draws_page(
        [Continuation("p", 0, 1.0, 0, (), 100, "stop")], "none", 2, "", ""
    )
