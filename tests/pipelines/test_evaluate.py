"""pipelines.evaluate: figures against loops written here, lm-eval against figures by hand, one line for bad input."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.families import create, load
from models.gpt.config import GPT
from models.parts.attention import Causal
from models.parts.norm import RMSNorm
from models.parts.position import Rotary
from pipelines.evaluate import main
from pipelines.lib.output import check_writable
from pipelines.lib.scoring import compression_baselines, ratio_error, windows
from pipelines.lib.vocab import Bytes, chars_tokenizer, load_tokenizer

CONTEXT, STRIDE = 24, 10
LONG = "The grey cat sat on the mat. «Où est le chat?» 你好 🙂, said the cat, and sat. " * 2
TEXTS = [LONG, "x", "A short one.", "", "   and an end — é"]


def save_model(folder: Path, vocab_size: int, **options) -> Path:
    """A random model whose large weights make its guesses differ from token to token."""
    torch.manual_seed(0)
    spec = GPT(
        vocab_size=vocab_size,
        d_model=32,
        n_layers=2,
        seq_len=CONTEXT,
        attention=Causal(n_heads=4),
        norm=RMSNorm(),
        position=Rotary(),
        init_std=0.3,
        **options,
    )
    create(spec).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model of ours and the bytes tokenizer."""
    folder = save_model(tmp_path_factory.mktemp("ours"), 257)
    Bytes().make(lambda: ()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The same for an unmodified model of transformers, with a vocabulary larger than the tokenizer's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=CONTEXT, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    Bytes().make(lambda: ()).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    return path


def evaluate(folder: Path, *words: str, out: Path, code: int = 0) -> dict:
    """Run the command and read its results."""
    assert main([str(folder), *words, f"out={out}", "track=none", "device=cpu"]) == code
    return json.loads((out / "results.json").read_text())


def log_probabilities(folder: Path, ids: list[int], context: int, stride: int) -> list[float]:
    """In float64, one token at a time: token t is given what the window that scores it has before it."""
    net = load(folder, torch.float64)
    found = []
    for t in range(1, len(ids)):
        k = max(0, -(-(t - context) // stride))  # windows after the first begin every `stride` tokens
        with torch.no_grad():
            logits = net(torch.tensor([ids[k * stride : t]])).logits[0, -1]
        found.append(float(logits.log_softmax(-1)[ids[t]]))
    return found


# ---- bits per byte


@pytest.mark.parametrize("kind", ["model", "llama"])
def test_bits_per_byte_equal_a_float64_loop_over_single_tokens(kind, texts, tmp_path, request):
    folder = request.getfixturevalue(kind)
    results = evaluate(folder, f"text={texts}", f"stride={STRIDE}", "batch_size=3", out=tmp_path / "out")
    row = results["text"]["texts"]
    kept = [t for t in TEXTS if t]
    nats = [-x for t in kept for x in log_probabilities(folder, [256, *t.encode()], CONTEXT, STRIDE)]
    n_bytes = sum(len(t.encode()) for t in kept)
    assert (row["tokens"], row["bytes"], row["documents"]) == (len(nats), n_bytes, 4)
    assert row["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / n_bytes, rel=1e-6)
    assert row["nats_per_token"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert row["begins_with"] == "<|endoftext|>" and row["context"] == CONTEXT and row["stride"] == STRIDE


def test_without_a_token_to_begin_with_the_first_one_is_not_scored_and_its_bytes_do_not_count(tmp_path):
    text = "éabcabcé" * 5
    folder = save_model(tmp_path / "chars", 4)
    chars_tokenizer(sorted(set(text))).save_pretrained(folder)
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    row = evaluate(folder, f"text={tmp_path / 't.txt'}", out=tmp_path / "out")["text"]["t"]
    ids = [sorted(set(text)).index(c) for c in text]
    nats = -sum(log_probabilities(folder, ids, CONTEXT, CONTEXT // 2))
    assert (row["tokens"], row["bytes"], row["begins_with"]) == (len(text) - 1, len(text.encode()) - 2, None)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / row["bytes"], rel=1e-6)


def test_text_mb_stops_within_a_document_at_a_whole_character(model, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("é" * 1000, encoding="utf-8")
    row = evaluate(model, f"text={path}", f"text_mb={101 / 2**20}", out=tmp_path / "out")["text"]["t"]
    assert (row["bytes"], row["tokens"]) == (100, 100)


@pytest.mark.parametrize("n, length, stride", [(2, 1, 1), (50, 7, 3), (50, 7, 7), (8, 7, 2), (9, 7, 1), (1000, 64, 32)])
def test_windows_score_every_token_once_with_the_promised_context(n, length, stride):
    scored = []
    for i, w in enumerate(windows(n, length, stride)):
        assert 0 < w.end - w.begin <= length
        assert i == 0 or w.first + 1 - w.begin >= length - stride + 1
        scored += range(w.first + 1, w.end + 1)
    assert scored == list(range(1, n))


def test_the_standard_error_of_a_ratio_is_that_of_resampling_its_units():
    draw = np.random.default_rng(0)
    weights = draw.uniform(10, 200, 300)
    nats = weights * draw.normal(2.0, 0.4, 300)
    picks = draw.integers(0, 300, (4000, 300))
    resampled = (nats[picks].sum(1) / weights[picks].sum(1)).std()
    assert ratio_error(nats, weights) == pytest.approx(resampled, rel=0.05)
    assert ratio_error(nats[:1], weights[:1]) is None


def test_many_documents_are_the_units_of_the_error_and_few_are_cut_into_blocks(model, tmp_path):
    words = LONG.split()
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"text": " ".join(words[i % 9 :])}) + "\n" for i in range(40)))
    row = evaluate(model, f"text={many}", out=tmp_path / "many")["text"]["many"]
    assert row["stderr_over"] == "40 documents" and row["bits_per_byte_stderr"] > 0
    nats, n_bytes = [], []
    for i in range(40):
        text = " ".join(words[i % 9 :])
        nats.append(
            -sum(log_probabilities(model, [256, *text.encode()], CONTEXT, CONTEXT // 2)) if i < 9 else nats[i % 9]
        )
        n_bytes.append(len(text.encode()))
    by_hand = ratio_error(np.array(nats), np.array(n_bytes)) / math.log(2)
    assert row["bits_per_byte_stderr"] == pytest.approx(by_hand, rel=1e-4)
    few = tmp_path / "few.txt"
    few.write_text(LONG, encoding="utf-8")
    assert "blocks" in evaluate(model, f"text={few}", out=tmp_path / "few")["text"]["few"]["stderr_over"]


def test_baselines_are_those_of_the_libraries_and_of_the_text_s_own_frequencies():
    text = "to be or not to be, that is the question. " * 30
    found = compression_baselines(text)
    assert found["gzip"] == 8 * len(gzip.compress(text.encode(), 9, mtime=0)) / len(text)
    best = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert found["xz"] == pytest.approx(8 * best / len(text), rel=0.02)
    counts = np.array([text.count(c) for c in set(text)])
    assert found["unigram"] == pytest.approx(-(counts / len(text) * np.log2(counts / len(text))).sum())
    assert compression_baselines(bytes(range(256)) * 4)["unigram"] == 8
    assert compression_baselines("") == {}


# ---- lm-eval


def choices_task(folder: Path, n: int = 12) -> Path:
    """A folder with one multiple-choice task and its data beside it."""
    folder.mkdir()
    rows = []
    for i in range(n):
        rows.append(
            {
                "question": f"{i} and {i} make" if i else LONG.strip(),
                "choices": [f"{i}", f"{2 * i} or é", "more"],
                "gold": i % 3,
            }
        )
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "sums.yaml").write_text(
        "task: sums_local\ndataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\nmetadata: {version: 1.0}\n"
    )
    return folder


@pytest.fixture(scope="module")
def _lm_eval_cache(tmp_path_factory):
    """datasets keeps what it reads; in a test, beside the test."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.mark.usefixtures("_lm_eval_cache")
def test_a_local_task_s_log_likelihoods_are_those_computed_by_hand(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks = choices_task(tmp_path / "tasks")
    out = tmp_path / "out"
    results = evaluate(model, f"tasks={tasks}", "samples=true", out=out)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    right = []
    for sample in samples:
        doc, scores = sample["doc"], []
        for choice, response in zip(doc["choices"], sample["filtered_resps"], strict=True):
            ids = [*f"{doc['question']} {choice}".encode()]
            n = len(f" {choice}".encode())
            ids = ids[-(CONTEXT + 1) :]  # the beginning of what is longer than the context is cut
            by_hand = log_probabilities(model, ids, CONTEXT, CONTEXT)[-n:]
            assert response[0] == pytest.approx(sum(by_hand), rel=1e-5)
            scores.append(sum(by_hand))
        right.append(float(np.argmax(scores) == doc["gold"]))
    row = results["tasks"]["sums_local"]
    accuracy = row["metrics"]["acc"]
    assert accuracy["value"] == pytest.approx(np.mean(right))
    assert accuracy["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(12))
    assert row["documents"] == 12 and results["cut_prompts"] == 3
    again = evaluate(model, f"tasks={tasks / 'sums.yaml'}", "limit=4", out=tmp_path / "limited")
    assert again["tasks"]["sums_local"]["documents"] == 4


@pytest.mark.usefixtures("_lm_eval_cache")
@pytest.mark.parametrize("kind", ["model", "llama"])
def test_few_shot_batch_dtype_and_device_of_the_runner_act_on_ours_and_others_models(kind, tmp_path, request):
    """Fewer examples of tiny prompts, so that they fit into the context of 24 bytes."""
    folder, tasks = request.getfixturevalue(kind), choices_task(tmp_path / "tasks")
    rows = [json.loads(line) for line in (tasks / "sums.jsonl").read_text().splitlines()]
    short = [{**row, "question": f"q{i}", "choices": ["a", "b", "cc"]} for i, row in enumerate(rows)]
    (tasks / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))

    def run(*words):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        results = evaluate(folder, f"tasks={tasks}", "samples=true", *words, out=out)
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        return results, [[float(r[0]) for r in s["filtered_resps"]] for s in samples], samples

    plain, scores, _ = run()
    shown, with_examples, samples = run("num_fewshot=2", "seed=7")
    assert (plain["tasks"]["sums_local"]["num_fewshot"], shown["tasks"]["sums_local"]["num_fewshot"]) == (0, 2)
    for sample in samples:
        prompt = str(sample["arguments"])
        assert len(set(re.findall(r"q\d+", prompt))) == 3 and sample["doc"]["question"] in prompt
    assert with_examples != scores and run("num_fewshot=2", "seed=8")[1] != with_examples
    assert np.allclose(run("batch_size=1")[1], scores, rtol=1e-5)
    half, rough, _ = run("dtype=bfloat16")
    assert half["model"]["dtype"] == "bfloat16" and plain["model"]["dtype"] == "float32"
    assert rough != scores and np.allclose(rough, scores, rtol=0.1, atol=0.3)
    assert plain["device"].startswith("cpu") and plain["model"]["class"] == half["model"]["class"]


def test_resampled_errors_are_lm_eval_s_and_are_made_in_silence(capfd, monkeypatch):
    from lm_eval.api.metrics import bootstrap_stderr, median

    from pipelines.lib.harness import quiet

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    figures = [float(x) for x in np.random.default_rng(0).random(20)]
    theirs = bootstrap_stderr(median, figures, 2000)
    assert "bootstrapping" in capfd.readouterr().out
    with quiet():
        assert bootstrap_stderr(median, figures, 2000) == theirs
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_a_place_that_cannot_be_written_is_said_before_measuring(model, texts, tmp_path, capsys, monkeypatch):
    from pipelines import evaluate as module

    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    for out in ("file", "file/inside", "file/further/inside"):
        assert main([str(model), f"text={texts}", f"out={tmp_path / out}", "track=none"]) == 2
        assert f"out={tmp_path / out}: " in capsys.readouterr().err
    check_writable(tmp_path / "a" / "b" / "c", "out")
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("_lm_eval_cache")
def test_lm_eval_s_bits_per_byte_are_ours(model, tmp_path):
    """Documents that fit into the context are scored alike by both; lm-eval itself gives no error for it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": f"Nr {i}: {'é' * (i % 3)} cat{i * i}"} for i in range(31)]
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "t.yaml").write_text(
        "task: rolling_local\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\n"
        'output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\nmetadata: {version: 1.0}\n"
    )
    results = evaluate(model, f"tasks={folder}", f"text={folder / 'd.jsonl'}", out=tmp_path / "out")
    ours, theirs = results["text"]["d"], results["tasks"]["rolling_local"]["metrics"]["bits_per_byte"]
    assert theirs["value"] == pytest.approx(ours["bits_per_byte"], rel=1e-6)
    assert theirs["stderr"] == pytest.approx(ours["bits_per_byte_stderr"], rel=1e-4)


@pytest.mark.usefixtures("_lm_eval_cache")
def test_generation_tasks_run_on_our_models_with_prompts_of_several_lengths(model, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    net, tokenizer, rows = load(model), load_tokenizer(model), []
    for prompt in ("a", "the cat", "123"):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = net.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        rows.append({"q": prompt, "a": tokenizer.decode(out, skip_special_tokens=True)})
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "t.yaml").write_text(
        "task: generate_local\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\n"
        'output_type: generate_until\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        "generation_kwargs: {until: [ZZZZ], max_gen_toks: 5, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\nmetadata: {version: 1.0}\n"
    )
    results = evaluate(model, f"tasks={folder}", out=tmp_path / "out")
    assert results["tasks"]["generate_local"]["metrics"]["exact_match"]["value"] == 1.0


# ---- a run: its validation split, MLflow, results that are there already


def test_a_run_s_validation_repeats_training_s_figure_and_goes_to_its_mlflow_run(tmp_path, capsys):
    from mlflow import MlflowClient

    from pipelines.lib.tracking import tracking_uri
    from pipelines.tokenize import main as tokenize
    from pipelines.train import main as train

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{i}. {LONG[i:]}"}) + "\n" for i in range(40)))
    data, run = tmp_path / "data", tmp_path / "runs" / "a"
    assert tokenize([f"source={corpus}", "tokenizer=bytes", "workers=0", f"out={data}", "track=none"]) == 0
    model = "model={kind: gpt, d_model: 16, n_layers: 1, seq_len: 32, attention: {kind: causal, n_heads: 2}}"
    few = ["batch_tokens=256", "micro_batch=8", "steps=6", "eval_every=3", "num_workers=0", "sample_prompts=[]"]
    assert train([f"data={data}", f"out={run}", model, *few, "device=cpu", "threads=1"]) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = next(row for row in logged if row["step"] == 6)
    step_3 = next(row for row in logged if row["step"] == 3)

    assert main([str(run), "stride=32", "which=last", "device=cpu"]) == 0
    (path,) = (run / "evaluation").glob("step_6-val-*/results.json")
    results = json.loads(path.read_text())
    row = results["text"]["val"]
    assert row["nats_per_token"] == pytest.approx(trained["val/nll"], rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(trained["val/bpb"], rel=1e-6)
    assert set(row["baselines_bits_per_byte"]) == {"gzip", "xz", "unigram"}
    assert len(results["model"]["sha256"]["model.safetensors"]) == 64 and results["versions"]["torch"]

    client = MlflowClient(tracking_uri())
    mine = json.loads((run / "mlflow.json").read_text())["run_id"]
    metrics = client.get_run(mine).data.metrics
    assert metrics["eval/val/bpb"] == pytest.approx(row["bits_per_byte"])
    assert metrics["eval/val/bpb_stderr"] == pytest.approx(row["bits_per_byte_stderr"])
    assert client.get_metric_history(mine, "eval/val/bpb")[0].step == 6
    assert client.get_run(mine).info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(mine, f"evaluation/{path.parent.name}")]

    before = path.stat().st_mtime_ns
    capsys.readouterr()
    assert main([str(run), "stride=32", "which=last", "device=cpu"]) == 0
    assert "has these figures since" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    assert main([str(run), "data_tokens=100", f"out={tmp_path / 'part'}", "device=cpu", "track=none"]) == 0
    assert json.loads((tmp_path / "part" / "results.json").read_text())["text"]["val"]["tokens"] == 99
    older = run / "checkpoints" / "step_3"
    assert main([str(older), "stride=32", f"out={path.parent}", "device=cpu", "track=none"]) == 2
    assert "measured otherwise" in capsys.readouterr().err
    assert main([str(older), "stride=32", f"out={path.parent}", "device=cpu", "overwrite=true", "track=none"]) == 0
    again = json.loads(path.read_text())["text"]["val"]
    assert again["nats_per_token"] == pytest.approx(step_3["val/nll"], rel=1e-6)

    (shard,) = data.glob("val-*.arrow")
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    capsys.readouterr()
    assert main([str(run), "track=none"]) == 2
    assert f"{shard.name}: expected sha256" in capsys.readouterr().err


def test_what_is_no_run_gets_an_mlflow_run_of_its_own(model, texts, tmp_path):
    from mlflow import MlflowClient

    from pipelines.lib.tracking import tracking_uri

    out = tmp_path / "out"
    assert main([str(model), f"text={texts}", f"out={out}", "device=cpu"]) == 0
    row = json.loads((out / "results.json").read_text())["text"]["texts"]
    run = MlflowClient(tracking_uri()).get_run(json.loads((out / "mlflow.json").read_text())["run_id"])
    assert run.data.metrics["eval/texts/bpb"] == pytest.approx(row["bits_per_byte"])
    assert run.data.tags["stage"] == "evaluate" and run.info.status == "FINISHED"


# ---- bad input, check, help


BAD = [
    (["nowhere"], "nowhere: no such folder"),
    (["{tmp}"], "neither a run folder"),
    (["{model}", "txt=a"], "did you mean 'text'?"),
    (["{model}"], "is of no run, so it has no validation split"),
    (["{model}", "text={tmp}/none.txt"], "no such file"),
    (["{model}", "text={tmp}/empty.txt"], "nothing to read"),
    (["{model}", "text={tmp}/binary.txt"], "no text in it"),
    (["{chars}", "text={tmp}/one.txt"], "at least 2 are needed"),
    (["{chars}", "text={tmp}/other.txt"], "no id for the character"),
    (["{bare}", "text={tmp}/one.txt"], "text and tasks need the model's tokenizer"),
    (["{bare}", "tasks={tmp}/tasks"], "text and tasks need the model's tokenizer"),
    (["{cut}", "text={tmp}/one.txt"], "not a model that can be opened"),
    (["{part}", "text={tmp}/one.txt"], "hold no weights for blocks.0.mlp"),
    (["{other}", "text={tmp}/one.txt"], "config.json asks for [300, 32]"),
    (["{small}", "text={tmp}/one.txt"], "its tokens are not the model's"),
    (["{nan}", "text={tmp}/one.txt"], "no finite likelihood"),
    (["{model}", "text={tmp}/one.txt", "context=25"], "context=25 is longer than the 24 tokens"),
    (["{model}", "text={tmp}/one.txt", "stride=25"], "stride=25 is more than the context"),
    (["{model}", "text={tmp}/one.txt", "device=nope"], "is not on this machine"),
    (["{model}", "text={tmp}/one.txt", "stride=0"], "stride=0 is not positive"),
    (["{model}", "data={tmp}/none"], "none"),
    (["{model}", "tasks={tmp}/tasks,{tmp}/nowhere"], "no such file or folder"),
    (["{model}", "tasks={tmp}/void"], "no task YAML"),
    (["{model}", "tasks={tmp}/lost"], "task lost_local: it cannot be loaded"),
    (["{model}", "text={tmp}/one.txt", "limit=5"], "limit=5.0: it belongs to tasks="),
    (["{model}", "text={tmp}/one.txt", "samples=true"], "samples=True: it belongs to tasks="),
    (["{model}", "text={tmp}/one.txt", "num_fewshot=0"], "it belongs to tasks="),
    (["{model}", "text={tmp}/one.txt", "include_path={tmp}"], "it belongs to tasks="),
    (["{model}", "text={tmp}/one.txt", "split=train"], "split=train: it belongs to data="),
    (["{model}", "tasks={tmp}/tasks", "text_mb=1"], "text_mb=1.0: it belongs to text="),
    (["{model}", "tasks={tmp}/tasks", "stride=4"], "it belongs to text= or data="),
    (["{run}"], "config.yaml names no `data`"),
    (["{model}", "text={tmp}/one.txt", "out={tmp}/one.txt/x"], "one.txt/x: "),
    (["check", "gptt"], "did you mean 'gpt'"),
    (["check", "{llama}"], "of transformers; the suite is for our own families"),
    (["check", "gpt", "only=cachd"], "no such check"),
]


@pytest.fixture(scope="module")
def places(model, llama, tmp_path_factory):
    """Folders and files with something wrong, by the names that BAD uses."""
    import shutil

    from safetensors.torch import load_file, save_file

    from pipelines.lib.shards import file_sha256

    tmp = tmp_path_factory.mktemp("bad")
    found = {"tmp": tmp / "t", "model": model, "llama": llama}
    (tmp / "t").mkdir()
    for name in ("bare", "cut", "part", "other", "small", "nan"):
        found[name] = tmp / name
        shutil.copytree(model, tmp / name)
    for path in tmp.glob("bare/tokenizer*"):
        path.unlink()
    weights = (tmp / "cut" / "model.safetensors").read_bytes()
    (tmp / "cut" / "model.safetensors").write_bytes(weights[:5000])
    tensors = load_file(tmp / "part" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.0.mlp")}
    save_file(kept, tmp / "part" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp / "other" / "config.json").read_text())
    (tmp / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    save_model(tmp / "small", 100)
    broken = load(model)
    with torch.no_grad():
        broken.embedding.weight[5] = float("nan")
    broken.save_pretrained(tmp / "nan")
    found["chars"] = save_model(tmp / "chars", 3)
    chars_tokenizer("abc").save_pretrained(found["chars"])
    shutil.copytree(model, tmp / "run" / "checkpoints" / "step_1")
    (tmp / "run" / "config.yaml").write_text("format_version: 1\nseed: 1\n")
    (tmp / "run" / "last").write_text("step_1\n")
    files = {p.name: p for p in (tmp / "run" / "checkpoints" / "step_1").iterdir()}
    entries = {n: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for n, p in files.items()}
    (tmp / "run" / "checkpoints" / "step_1" / "manifest.json").write_text(json.dumps({"files": entries}))
    found["run"] = tmp / "run"
    (tmp / "t" / "empty.txt").touch()
    (tmp / "t" / "one.txt").write_text("a")
    (tmp / "t" / "other.txt").write_text("abz")
    (tmp / "t" / "binary.txt").write_bytes(bytes(range(256)) * 4)
    choices_task(tmp / "t" / "tasks", 2)
    (tmp / "t" / "void").mkdir()
    (tmp / "t" / "lost").mkdir()
    (tmp / "t" / "lost" / "l.yaml").write_text(
        "task: lost_local\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_choice: []\ndoc_to_target: 0\n'
    )
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize("words, message", BAD, ids=[" ".join(w) for w, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(words, message, places, capsys, monkeypatch):
    monkeypatch.chdir(places["tmp"])
    words = [word.format(**places) for word in words]
    assert main([*words, *([] if words[0] == "check" else ["track=none"])]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and message in said[-1], said
    assert sum(line.startswith("error: ") for line in said) == 1


def test_an_unknown_task_is_answered_with_the_nearest_name(model, tmp_path, capsys, monkeypatch):
    """Without lm-eval's own 14,000 names, which take 10 s to read."""
    from lm_eval.tasks import TaskManager

    from pipelines.lib import harness

    def local(include_path=None, include_defaults=True):
        return TaskManager(include_path=include_path or str(tmp_path), include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", local)
    tasks = choices_task(tmp_path / "tasks", 2)
    assert main([str(model), f"tasks={tasks},sums_locale", "track=none"]) == 2
    said = capsys.readouterr().err
    assert "lm-eval knows no task 'sums_locale'; did you mean 'sums_local'? `lm-eval ls tasks` lists them all" in said
    assert main([str(model), f"tasks={tasks},nosuchtask", "track=none"]) == 2
    assert "lm-eval knows no task 'nosuchtask'; `lm-eval ls tasks` lists them all" in capsys.readouterr().err


def test_check_answers_0_when_every_promise_holds_and_1_when_one_does_not(model, monkeypatch, capsys):
    from models import check

    assert main(["check", str(model), "only=ties"]) == 0
    assert "1 of 1 checks hold" in capsys.readouterr().out
    monkeypatch.setitem(check.CHECKS, "ties_to_nothing", lambda make: (False, "it never does"))
    assert main(["check", str(model), "only=ties"]) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said and "it never does" in said and "1 of 2 checks hold" in said
    monkeypatch.delitem(check.CHECKS, "ties_to_nothing")
    assert main(["check", "gpt", "only=parameters_follow"]) == 0
    assert main(["check", "gpt_debug", "only=ties"]) == 0


def test_help_needs_neither_torch_nor_lm_eval():
    code = (
        "import sys; from pipelines.evaluate import main; assert main(['--help']) == main(['check', '-h']) == 0;"
        "assert not {'torch', 'lm_eval', 'transformers', 'ray', 'mlflow', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "conformance" in done.stdout
    assert "python -m pipelines.evaluate check MODEL" in done.stdout and "pipelines.lib" not in done.stdout


# ---- real data


def test_a_published_model_reaches_its_author_s_loss(data_dir, tmp_path):
    """stories260K on TinyStories: 1.2968 nats per token by its author's note, on stories that are not in our sample."""
    from models.convert import llama2c
    from tests.serving.tiny import stories_tokenizer

    folder = tmp_path / "stories"
    llama2c.load(data_dir / "stories260K" / "stories260K.bin").save_pretrained(folder)
    stories_tokenizer(data_dir / "stories260K" / "tok512.bin").save_pretrained(folder)
    text = (data_dir / "tinystories" / "tinystories.txt").read_text(encoding="utf-8")
    stories = [re.sub(r"\n+", "\n", story).strip() for story in re.split(r"(?<!\n)\n(?!\n)", text)]
    whole = [s for s in stories if s.isascii() and s.startswith(("Once upon a time", "One day")) and len(s) > 400][:40]
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": s}) + "\n" for s in whole))
    row = evaluate(folder, f"text={path}", out=tmp_path / "out")["text"]["stories"]
    assert abs(row["nats_per_token"] - 1.2968) < 0.1
    assert row["bits_per_byte"] < row["baselines_bits_per_byte"]["xz"]
