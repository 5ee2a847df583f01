"""The gate: one model's log-likelihoods in process, by HTTP, from an exported folder and by CORE's scorer."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from pipelines.evaluate import main
from pipelines.export import main as export
from pipelines.lib import parity
from pipelines.lib.parity import Answer, ParityConfig, compare, pairs_for
from pipelines.lib.vocab import chars_tokenizer
from tests.pipelines.core.bundle import save_llama, save_model, write_bundle

CONTEXT = 256


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model of ours, its export, and a bundle of CORE's kind."""
    tmp = tmp_path_factory.mktemp("parity")
    model = save_model(tmp / "model", CONTEXT)
    assert export([str(model), str(tmp / "exported"), "track=none"]) == 0
    return {"model": model, "exported": tmp / "exported", "bundle": write_bundle(tmp / "bundle")}


@pytest.fixture(scope="module")
def endpoint(ray_session, places):
    from ray import serve

    from serving.app import build

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"run": str(places["model"]), "rows": "4"}), name="parity")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_four_ways_give_the_same_log_likelihoods(places, endpoint, tmp_path, capsys, monkeypatch):
    """Float32, random weights: differences of 1.9e-7 (CORE), 1.5e-7 (endpoint) and 0 (exported) were measured."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    out = tmp_path / "parity.json"
    words = [f"endpoint={endpoint}", f"exported={places['exported']}", f"bundle={places['bundle']}", f"out={out}"]
    assert main(["parity", str(places["model"]), *words, "device=cpu"]) == 0
    told = json.loads(out.read_text())
    assert [row["name"] for row in told["compared"]] == ["CORE", "endpoint", "exported"]
    assert all(row["agrees"] and row["flags"] == 0 for row in told["compared"])
    assert len(told["pairs"]) > 30 and set(told["answers"]) == {"in process", "CORE", "endpoint", "exported"}
    likely = [a for a, _ in told["answers"]["in process"]]
    assert len({round(a, 3) for a in likely}) == len(likely) and all(a < -1 for a in likely)
    assert "agrees" in capsys.readouterr().out


def test_another_model_s_export_differs_and_the_exit_code_says_so(places, tmp_path, capsys, monkeypatch):
    """The other process is replaced by figures, one of which is off."""
    real = parity.by_core
    monkeypatch.setattr(parity, "by_export", lambda folder, pairs, *more: [Answer(-5.0, False) for _ in pairs])
    assert main(["parity", str(places["model"]), "exported=x", "device=cpu"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERS" in said and "exported differs most on" in said and "not asked: endpoint=" in said
    monkeypatch.setattr(parity, "by_core", lambda *words: [a._replace(greedy=not a.greedy) for a in real(*words)])
    assert main(["parity", str(places["model"]), "device=cpu"]) == 1


def test_a_difference_is_measured_in_units_of_the_log_likelihood():
    ours = [Answer(-0.5, True), Answer(-1000.0, False)]
    found = compare("x", ours, [Answer(-0.5, True), Answer(-1000.01, False)], 1e-4)
    assert found.worst == pytest.approx(1e-5) and found.at == 1 and found.agrees
    assert not compare("x", ours, [Answer(-0.5002, True), ours[1]], 1e-4).agrees
    assert not compare("x", ours, [Answer(-0.5, False), ours[1]], 1e-4).agrees
    assert not compare("x", ours, [Answer(float("nan"), True), ours[1]], 1e-4).agrees


def test_no_two_pairs_are_one_text_and_characters_without_an_id_are_left_out(places):
    """lm-eval keeps logits by text, so pairs of one text would share their figures."""
    encode = lambda text: list(text.encode())
    pairs, left_out = pairs_for(ParityConfig("x", bundle=str(places["bundle"])), encode, 10_000)
    assert len({"".join(pair) for pair in pairs}) == len(pairs) > 30 and left_out == 0
    short, left_out = pairs_for(ParityConfig("x"), encode, 60)
    assert all(len("".join(pair).encode()) < 60 for pair in short) and left_out > 0
    tokenizer = chars_tokenizer(list(" abcdefghijklmnopqrstuvwxyz"))
    known, _ = pairs_for(ParityConfig("x"), checked(tokenizer), 10_000)
    assert len(known) >= 15 and set("".join("".join(pair) for pair in known)) <= set(" abcdefghijklmnopqrstuvwxyz")


def checked(tokenizer):
    from pipelines.lib.config import InputError

    def encode(text):
        try:
            return tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:
            raise InputError(str(error)) from None

    return encode


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["endpoint=localhost"], "an address is needed"),
        (["endpoint=http://127.0.0.1:9"], "no model is served there"),
        (["exported={bundle}"], "no config.json; write one with python -m pipelines.export"),
        (["tolerance=0"], "tolerance must be above 0"),
        (["bundle={model}"], "no core.yaml here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, places, capsys):
    words = [word.format(**places) for word in words]
    assert main(["parity", str(places["model"]), "device=cpu", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and message in said[-1], said


@pytest.mark.slow
def test_a_folder_that_needs_our_code_is_no_export(places, capsys):
    assert main(["parity", str(places["model"]), f"exported={places['model']}", "device=cpu"]) == 2
    assert "cannot be opened without our code: ValueError" in capsys.readouterr().err


def test_an_unmodified_model_of_transformers_is_compared_too(tmp_path, capsys):
    assert main(["parity", str(save_llama(tmp_path / "llama", 128)), "device=cpu"]) == 0
    assert "agrees" in capsys.readouterr().out


def test_the_real_trained_model_agrees_with_itself(data_dir, tmp_path, capsys):
    """A tokenizer that puts a token before every text, and weights that are not random."""
    from models.convert import llama2c

    folder = Path(tmp_path / "stories")
    source = data_dir / "stories260K"
    model = llama2c.load(source / "stories260K.bin")
    model.save_pretrained(folder)
    llama2c.Pieces.load(source / "tok512.bin", model.spec.vocab).tokenizer().save_pretrained(folder)
    assert torch.get_default_dtype() == torch.float32
    words = [f"bundle={data_dir / 'core'}", "limit=1", "device=cpu"]
    assert main(["parity", str(folder), *words]) == 0
    assert " 0 " in capsys.readouterr().out
