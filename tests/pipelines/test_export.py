"""pipelines.export: the folder that strangers open, what is refused, the card's figures, the upload."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from models.families import load
from pipelines.export import main
from pipelines.lib.config import InputError
from pipelines.lib.export import verify as checks
from pipelines.lib.export.alone import digest
from pipelines.lib.shards import _tokenizer_hash, write_manifest
from pipelines.lib.vocab import Bytes
from tests.pipelines.test_evaluate import choices_task
from tests.pipelines.tiny import make_tokens, tiny_config

REPO = Path(__file__).resolve().parent.parent.parent
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 updates on bytes, a Llama in its parts."""
    from models.spec import build
    from pipelines.lib.training import TrainConfig
    from pipelines.train import run as train

    place = tmp_path_factory.mktemp("export")
    data = make_tokens(place / "tokens", vocab_size=257)
    Bytes().make(lambda: ()).save_pretrained(data / "tokenizer")
    manifest = {k: v for k, v in json.loads((data / "manifest.json").read_text()).items() if k != "fingerprint"}
    manifest["tokenizer"] |= {"folder": "tokenizer", "sha256": _tokenizer_hash(data / "tokenizer")}
    write_manifest(data, manifest)
    model = {"vocab_size": 257, "mlp": {"kind": "swiglu", "hidden": 48}}
    assert train(build(TrainConfig, tiny_config(data, place / "small", model=model))) == 0
    return place / "small"


@pytest.fixture(scope="module")
def exported(run):
    """The run as a folder with its own code."""
    out = run.parent / "exported"
    assert main([str(run), str(out), "track=none"]) == 0
    return out


def last_row(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = int((run / "best").read_text().strip().removeprefix("step_"))
    return next(row for row in rows if row["step"] == step)


def test_the_folder_has_all_that_a_stranger_needs_and_its_weights_are_the_run_s(run, exported):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md", "tokenizer.json"} <= names
    assert {"models_gpt_model.py", "models_parts_attention.py"} <= names and not any("training" in n for n in names)
    model, source = load(exported), load(run / "checkpoints" / (run / "best").read_text().strip())
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.eos_token_id == 256 and model.generation_config.pad_token_id == 256
    assert json.loads((exported / "generation_config.json").read_text())["_from_model_config"] is False
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<|endoftext|>", 32)
    assert tokenizer("ab")["input_ids"] == [97, 98]  # a prompt is not ended before it is continued
    assert json.loads((exported / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    record = json.loads((exported / "export.json").read_text())
    assert record["check"]["difference"] <= 1e-5 * max(1, record["check"]["scale"])
    assert record["check"]["model_class"] == "GPTForCausalLM" and record["check"]["n_tensors"] == len(
        model.state_dict()
    )


def test_the_card_has_the_run_s_own_figures_and_no_path_of_this_machine(run, exported):
    card, row = (exported / "README.md").read_text(), last_row(run)
    figures = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.M))
    assert figures["parameters"] == f"{load(exported).num_parameters():,}"
    assert figures["tokens trained on"] == f"{row['train/tokens']:,}"
    assert figures["validation loss, nats per token"] == f"{row['val/nll']:.4f}"
    assert figures["training loss, nats per token"] == f"{row['train/nll']:.4f}"
    manifest = json.loads((run.parent / "tokens/manifest.json").read_text())
    assert f"| tokens | {manifest['fingerprint']} |" in card
    assert figures["attention.n_heads"] == "2" and figures["optim.lr"] == "0.003"
    assert 'from_pretrained("exported", trust_remote_code=True)' in card and "step 20 of the run small" in card
    assert str(run.parent) not in card and os.uname().nodename not in card


def test_a_public_layout_in_bfloat16_with_a_chat_template(run, tmp_path, capsys):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    out = tmp_path / "llama"
    words = [str(run), str(out), "layout=llama", "dtype=bfloat16", f"chat_template={tmp_path / 'chat.jinja'}"]
    assert main([*words, "track=none"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out and not list(out.glob("*.py"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model) is LlamaForCausalLM and model.dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())  # as transformers 4 and llama.cpp look for it
    assert (config["eos_token_id"], config["rope_theta"], config["rope_scaling"]) == (256, 10000.0, None)
    source = load(run / "checkpoints" / (run / "best").read_text().strip()).to(torch.bfloat16)
    assert torch.equal(model.lm_head.weight, source.head.weight)
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<user>Hi>"
    card = (out / "README.md").read_text()
    assert "It has a chat template." in card and "trust_remote_code" not in card and "(bfloat16)" in card


def test_every_layout_that_can_be_written_can_be_asked_for(run):
    from models.convert import LAYOUTS
    from pipelines.export import Layout, fitting

    assert set(Layout.__args__) == {"own", *LAYOUTS} - {"qwen2"}  # which is read only
    model = load(run / "checkpoints" / (run / "best").read_text().strip())
    assert fitting(model.spec) == ["llama", "mistral"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["{tmp}/none", "{tmp}/x"], "none: no such folder"),
        (["{run}"], "out is required"),
        (["{run}", "{tmp}/x", "layout=gpt2"], "the gpt2 layout needs position=learned"),
        (["{run}", "{tmp}/x", "layout=lama"], "did you mean 'llama'"),
        (["{run}", "{tmp}/x", "which=step_7"], "no checkpoint 'step_7'; there is"),
        (["{run}", "{tmp}/full"], "full is not empty and no export"),
        (["{run}", "{exported}"], "holds an export already; overwrite=true replaces it"),
        (["{run}", "{tmp}/full/file"], "file is a file"),
        (["{run}", "{tmp}/x", "chat_template={tmp}/none"], "none: No such file"),
        (["{run}", "{tmp}/x", "chat_template={tmp}/wrong.jinja"], "the chat template cannot be used"),
        (["{run}", "{tmp}/x", "private=false"], "private=false: it belongs to push_to_hub="),
        (["{run}", "{tmp}/x", "--push-to-hub", "me/a/b"], "push_to_hub=me/a/b: Repo id must be"),
        (["{tmp}/llama", "{tmp}/x"], "is a LlamaForCausalLM of transformers"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line_and_leaves_nothing(run, exported, tmp_path, capsys, words, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "wrong.jinja").write_text("{% for %}")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "llama")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([w.format(run=run, tmp=tmp_path, exported=exported) for w in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_does_not_open_alone_is_not_left_behind(run, tmp_path, capsys, monkeypatch):
    from models.convert import code

    whole = code.write_code

    def one_file_short(model, folder):
        names = whole(model, folder)
        (folder / "models_parts_norm.py").unlink()
        return names

    monkeypatch.setattr(code, "write_code", one_file_short)
    assert main([str(run), str(tmp_path / "x"), "track=none"]) == 2
    error = capsys.readouterr().err
    assert "does not open alone" in error and "models_parts_norm.py" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*x*"))


@pytest.mark.parametrize(
    "harm, said",
    [
        ("none", None),
        ("imported", "still imports models"),
        ("missing", "norm.weight is missing"),
        ("weights", "norm.weight is not what was written"),
        ("extra", "more is not among the model's weights"),
        ("logits", "its logits differ by"),
        ("nan", "its logits differ by nan"),
        ("generated", "row 1 of a left-padded batch continues otherwise than alone, at its token 3"),
        ("tokens", "gives other tokens"),
    ],
)
@torch.no_grad()
def test_each_kind_of_difference_is_refused(run, tmp_path, monkeypatch, harm, said):
    model = load(run / "checkpoints" / (run / "best").read_text().strip())
    tokenizer = Bytes().make(lambda: ())
    weights = {name: digest(tensor) for name, tensor in model.state_dict().items()}

    def answer(folder, asked, python):
        found = {"class": "X", "missing": [], "imported": [], "weights": dict(weights), "generated": []}
        found["versions"] = {"torch": "1", "transformers": "2"}
        logits = {f"row_{i}": model(torch.tensor([row])).logits[0] for i, row in enumerate(asked["rows"])}
        for row in asked["rows"]:
            out = model.generate(torch.tensor([row]), max_new_tokens=asked["new"], do_sample=False, eos_token_id=None)
            found["generated"].append(out[0, len(row) :].tolist())
        found["tokens"] = tokenizer(asked["text"])["input_ids"]
        found["decoded"] = tokenizer.decode(found["tokens"], skip_special_tokens=True)
        if harm == "imported":
            found["imported"] = ["models"]
        elif harm == "missing":
            found["missing"] = ["norm.weight"]
        elif harm == "weights":
            found["weights"]["norm.weight"] = digest(model.state_dict()["norm.weight"] * 1.0000001)
        elif harm == "extra":
            found["weights"]["more"] = ""
        elif harm in ("logits", "nan"):
            logits["row_2"][0, 3] += 1e-3 if harm == "logits" else float("nan")
        elif harm == "generated":
            worst = int(model(torch.tensor([asked["rows"][1] + found["generated"][1][:2]])).logits[0, -1].argmin())
            found["generated"][1][2] = worst
        elif harm == "tokens":
            found["tokens"] = found["tokens"][1:]
        return found, logits

    monkeypatch.setattr(checks, "ask", answer)
    if said is None:
        assert checks.verify(tmp_path, model, weights, code=True, tokenizer=tokenizer).difference == 0
    else:
        with pytest.raises(InputError, match=said):
            checks.verify(tmp_path, model, weights, code=True, tokenizer=tokenizer)


def test_the_card_and_the_record_become_artifacts_of_the_run(run, exported, monkeypatch):
    from pipelines.export import ExportConfig, Source, note
    from pipelines.lib.tracking import Tracker

    kept = []
    monkeypatch.setattr(Tracker, "artifact", lambda self, path, folder="": kept.append((Path(path).name, folder)))
    config = ExportConfig(str(run), str(exported))
    note(config, Source(run, run, 20, None, None), exported)
    note(config, Source(run, None, 0, None, None), exported)
    assert kept == [("README.md", "export/exported"), ("export.json", "export/exported")]


# ---- the Hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; keeps what it was sent."""

    def _answer(self, tree, code=200):
        body = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _take(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization"), body))
        return body

    def do_GET(self):
        self._take()
        self._answer({"id": "me/small", "private": self.server.private, "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self._take()
        if self.path.endswith("/repos/create"):
            if self.server.denies:
                return self._answer({"error": f"no right to write with {self.headers['Authorization']}"}, 400)
            return self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/small", "name": "me/small"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        if "/commit/" in self.path:
            return self._answer(
                {
                    "commitUrl": f"http://127.0.0.1:{self.server.server_port}/me/small/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                }
            )
        return self._answer({"warnings": [], "errors": []})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.private, server.denies = [], True, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub, folder, **environment):
    """Upload in a process that knows the stub as the Hub; returns its output, both streams."""
    code = (
        "import sys; from pathlib import Path; from pipelines.lib.config import InputError\n"
        "from pipelines.lib.export.push import client, push\n"
        "try:\n    print('pushed to', push(client('me/small'), Path(sys.argv[1]), 'me/small', True))\n"
        "except InputError as error:\n    print('error:', error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    env = {k: v for k, v in {**env, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1", **environment}.items() if v}
    words = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(words, env=env, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stdout


def test_an_upload_is_private_holds_the_folder_and_never_shows_the_token(hub, exported):
    assert push(hub, exported).startswith(f"pushed to http://127.0.0.1:{hub.server_port}/me/small")
    assert {authorization for _, _, authorization, _ in hub.seen} == {"Bearer hf_secret"}
    (made,) = [json.loads(body) for _, path, _, body in hub.seen if path.endswith("/repos/create")]
    assert (made["name"], made["organization"]) == ("small", "me")
    assert made.get("visibility") == "private" or made.get("private") is True  # as the client's version has it
    (commit,) = [body for _, path, _, body in hub.seen if "/commit/" in path]
    sent = [json.loads(line) for line in commit.splitlines()]
    files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in sent if e["key"] == "file"}
    assert set(files) == {path.name for path in exported.iterdir()} - {"export.json"}
    assert files["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert b"hf_secret" not in b"".join(files.values())


def test_an_upload_that_may_not_be_is_said_in_one_line_without_the_token(hub, exported):
    assert "put a write token of the Hub into the environment variable HF_TOKEN" in push(hub, exported, HF_TOKEN="")
    assert "HF_HUB_OFFLINE is set" in push(hub, exported, HF_HUB_OFFLINE="1")
    hub.private = False
    assert "it exists and is public; private=false says that this is meant" in push(hub, exported)
    hub.denies = True
    said = push(hub, exported)
    assert (
        "no right to write with Bearer ***" in said
        and f"{exported} is complete, so push it again" in said
        and said.count("\n") == 1
    )


# ---- a separate virtual environment


def requirements(*roots: str) -> list[importlib.metadata.Distribution]:
    """The installed distributions that `pip install ROOTS` would bring, extras left out."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(roots)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        wanted = [Requirement(line) for line in found[name].requires or ()]
        todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return list(found.values())


def environment(folder: Path, *roots: str) -> Path:
    """A virtual environment that holds some packages and what they need, as links; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in requirements(*roots):
        files = distribution.files or ()
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_a_separate_environment_with_transformers_only_opens_it_and_lm_eval_scores_it_the_same(run, exported, tmp_path):
    """Equal logits, `generate`, and lm-eval's own `hf` model against our scoring of the run itself."""
    from pipelines.evaluate import main as evaluate

    python = environment(tmp_path / "alone", "transformers", "torch")
    for absent in ("models", "pipelines", "ray", "mlflow", "lm_eval", "datasets"):
        assert subprocess.run([python, "-c", f"import {absent}"], capture_output=True, cwd=tmp_path).returncode == 1
    model = load(run / "checkpoints" / (run / "best").read_text().strip())
    weights = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(exported)
    verified = checks.verify(exported, model, weights, code=True, tokenizer=tokenizer, python=[str(python), "-I"])
    assert verified.difference == 0 and verified.model_class == "GPTForCausalLM"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    (example,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    words = [str(python), "-I", "-c", example]
    done = subprocess.run(words, capture_output=True, text=True, cwd=exported.parent, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stdout.startswith("The ") and "custom code" not in done.stdout + done.stderr

    task = choices_task(tmp_path / "task")
    words = [str(run), f"tasks={task}", f"out={tmp_path / 'ours'}", "samples=true", "track=none", "device=cpu"]
    assert evaluate(words) == 0
    ours = json.loads((tmp_path / "ours/results.json").read_text())["tasks"]
    python = environment(tmp_path / "harness", "transformers", "torch", "lm_eval", "accelerate", "peft")
    code = (
        "import json, sys; from lm_eval import simple_evaluate; from lm_eval.tasks import TaskManager\n"
        "folder, tasks, names = sys.argv[1:]\n"
        "model = f'pretrained={folder},trust_remote_code=True,dtype=float32,max_length=32'\n"
        "manager = TaskManager(include_path=tasks, include_defaults=False)\n"
        "found = simple_evaluate('hf', model_args=model, tasks=names.split(), device='cpu', task_manager=manager)\n"
        "print('RESULTS', json.dumps([found['results'], found['samples']], default=str))"
    )
    words = [str(python), "-I", "-c", code, str(exported), str(task), " ".join(ours)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=task, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, samples = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS"))[8:])
    for name, table in ours.items():
        for metric, entry in table["metrics"].items():
            assert theirs[name][f"{metric},none"] == pytest.approx(entry["value"], abs=1e-9)
    rows = [json.loads(line) for line in (tmp_path / "ours/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        (other,) = [sample for sample in samples[row["task"]] if sample["doc_id"] == row["doc_id"]]
        for (mine, greedy), (likelihood, is_greedy) in zip(row["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(likelihood) == pytest.approx(float(mine), abs=1e-4) and str(is_greedy) == str(greedy)
