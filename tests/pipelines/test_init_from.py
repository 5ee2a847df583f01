"""init_from: what a run starts from is the whole model, byte for byte, or the start is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from models.families import load
from pipelines.lib import hub
from pipelines.lib.config import InputError
from pipelines.lib.model_folder import same_tokenizer
from pipelines.lib.vocab import Bytes, chars_tokenizer
from pipelines.train import main, source_of
from tests.pipelines.tiny import make_tokens

GPT2 = {"vocab_size": 128, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
LLAMA = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8}
SOURCES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **NO_TOKENS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, **NO_TOKENS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, **NO_TOKENS)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens")


def source(folder, name, dtype=torch.float32):
    """A folder of a random model whose norms, biases and positions are far from where they start."""
    torch.manual_seed(0)
    model = SOURCES[name]()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def train(data, out, *more):
    """One update that changes nothing: a step this small is lost in float32."""
    words = [f"data={data}", f"out={out}", "steps=1", "optim.lr=1e-30", "num_workers=0", "track=none", "device=cpu"]
    words += ["batch_tokens=128", "micro_batch=4", "sample_prompts=[]", "eval_every=1"]
    return main([*words, *more])


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_starts_from_every_weight_of_a_public_model(name, data, tmp_path):
    folder = source(tmp_path / "theirs", name)
    assert train(data, tmp_path / "run", f"init_from={folder}") == 0
    ours = load(tmp_path / "run/checkpoints/step_1")
    theirs = SOURCES[name]().from_pretrained(folder)
    ids = torch.randint(0, 128, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    held = {round(float(t.double().sum()), 4) for t in ours.state_dict().values()}
    if name == "gpt2":  # the original left these random
        state = theirs.state_dict()
        for key in ("transformer.wpe.weight", "transformer.ln_f.bias", "transformer.h.0.ln_1.weight"):
            assert round(float(state[key].double().sum()), 4) in held
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["val/nll"] > 0 and "weights from" in (tmp_path / "run/log.txt").read_text()


def test_a_run_starts_from_another_run_and_from_what_it_was_exported_to(data, tmp_path):
    from pipelines.export import main as export

    small = ["model.d_model=16", "model.n_layers=1", "model.attention.n_heads=2", "model.seq_len=32"]
    assert train(data, tmp_path / "a", *small) == 0
    assert export([str(tmp_path / "a"), str(tmp_path / "out"), "track=none"]) == 0
    first = load_file(tmp_path / "a/checkpoints/step_1/model.safetensors")
    for i, place in enumerate(("a", "out")):
        assert train(data, tmp_path / f"b{i}", f"init_from={tmp_path / place}", "init_seed=7") == 0
        again = load_file(tmp_path / f"b{i}/checkpoints/step_1/model.safetensors")
        assert again.keys() == first.keys() and all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("victim", ["transformer.h.1.ln_2.weight", "transformer.wpe.weight"])
def test_a_source_without_a_weight_is_refused_by_its_name(victim, data, tmp_path, capsys):
    folder = source(tmp_path / "theirs", "gpt2")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != victim}, folder / "model.safetensors", {"format": "pt"})
    assert train(data, tmp_path / "run", f"init_from={folder}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"no weights for {victim}" in error and not (tmp_path / "run/checkpoints").exists()


def test_bfloat16_weights_become_float32_ones(data, tmp_path):
    folder = source(tmp_path / "theirs", "llama", torch.bfloat16)
    assert train(data, tmp_path / "run", f"init_from={folder}") == 0
    ours = load(tmp_path / "run/checkpoints/step_1")
    want = load_file(folder / "model.safetensors")["model.norm.weight"].float()
    assert ours.dtype == torch.float32 and torch.equal(ours.norm.weight, want)


# ---- the Hub


def test_a_name_that_is_no_folder_is_a_model_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns, local_files_only):
        asked.append((name, local_files_only, [p for p in allow_patterns if "bin" in p or ".py" in p]))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "ask", lambda kind, name: "there")
    with pytest.raises(InputError, match="no safetensors of it, and weights in pickles are not read"):
        source_of("gpt2-xl")
    (tmp_path / "model.safetensors").touch()
    assert source_of("owner/name") == tmp_path
    assert asked == [("gpt2-xl", False, []), ("owner/name", False, [])]
    (tmp_path / "gpt2").mkdir()
    assert source_of("gpt2") == tmp_path / "gpt2" and len(asked) == 2
    assert source_of("/no/such/run") == source_of("file:///no/such/run") and len(asked) == 2
    monkeypatch.setattr(hub, "ask", lambda kind, name: "missing")
    with pytest.raises(InputError, match="neither a folder here nor a model of the Hub; did you mean 'gpt2-medium'"):
        source_of("gpt2-medum")
    monkeypatch.setattr(hub, "ask", lambda kind, name: "unreachable")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(InputError, match="runs/demo: no such folder, and the Hub cannot be reached"):
        source_of("runs/demo")


# ---- tokenizers


def test_tokenizers_are_the_same_by_what_they_do_not_by_their_files(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    Bytes().make(lambda: ()).save_pretrained(model)
    tokenizer = Bytes().make(lambda: ())
    tokenizer.save_pretrained(data)
    tree = json.loads((data / "tokenizer.json").read_text())
    (data / "tokenizer.json").write_text(json.dumps({**dict(reversed(tree.items())), "truncation": None}))
    assert same_tokenizer(model, data)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "more")
    assert same_tokenizer(tmp_path / "more", data)  # one token more than the data has
    assert not same_tokenizer(data, tmp_path / "more")
    chars_tokenizer("abc").save_pretrained(tmp_path / "abc")
    chars_tokenizer("acb").save_pretrained(tmp_path / "acb")
    assert same_tokenizer(tmp_path / "abc", tmp_path / "abc") and not same_tokenizer(tmp_path / "abc", tmp_path / "acb")


def test_the_same_vocabulary_with_other_merges_is_another_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    from pipelines.lib.vocab import hf_tokenizer

    vocab = {c: i for i, c in enumerate([*map(chr, range(32, 127)), "ab", "bc", "abc"])}
    for name, merges in (("a", [("a", "b"), ("ab", "c")]), ("b", [("b", "c"), ("a", "bc")])):
        hf_tokenizer(Tokenizer(models.BPE(vocab, merges, unk_token=" ")), None).save_pretrained(tmp_path / name)
    assert not same_tokenizer(tmp_path / "a", tmp_path / "b")
