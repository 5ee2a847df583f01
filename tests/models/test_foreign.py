"""Unmodified transformers models over our memory: ragged chunks over rows give their own `generate`'s tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.families import create, load, preset
from models.foreign import Foreign, runner
from models.memory import At
from models.spec import ConfigError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=None, eos_token_id=None)
    ),
    "gemma3, windows": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=KINDS)
    ),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
}


def greedy_over_rows(model, prompts, n, chunk=4, length=32):
    """A small engine: prompts in ragged chunks into rows that are out of order, then one token for all at a time."""
    rows = torch.arange(len(prompts)).flip(0)
    memory = model.memory(len(prompts) + 1, length)
    done, out = [0] * len(prompts), [list(p) for p in prompts]
    for _ in range(100):
        todo = [i for i, ids in enumerate(out) if done[i] < len(ids) and len(ids) <= len(prompts[i]) + n]
        todo = [i for i in todo if len(out[i]) < len(prompts[i]) + n]
        if not todo:
            return [ids[len(p) :] for ids, p in zip(out, prompts, strict=True)]
        k = [min(chunk, len(out[i]) - done[i]) for i in todo]
        T = max(k)
        ids = torch.tensor([out[i][done[i] : done[i] + m] + [0] * (T - m) for i, m in zip(todo, k, strict=True)])
        pos = torch.tensor([done[i] for i in todo])[:, None] + torch.arange(T)
        upto = max(done[i] + m for i, m in zip(todo, k, strict=True))
        last = model.run(ids, At(pos, torch.tensor(k), rows[todo], upto), memory, last=True)
        for j, i in enumerate(todo):
            done[i] += k[j]
            if done[i] == len(out[i]):
                out[i].append(int(last[j, 0].argmax()))
    raise AssertionError("did not end")


@pytest.mark.parametrize("name", MODELS)
def test_foreign_models_decode_over_rows_as_their_generate_does(name):
    model = MODELS[name]().double().eval()
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)  # away from the flat logits of an untrained model
    prompts = [torch.randint(1, 61, (n,)).tolist() for n in (9, 2, 13, 5)]
    got = greedy_over_rows(runner(model), prompts, 6)
    for prompt, tokens in zip(prompts, got, strict=True):
        want = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokens == want[0, len(prompt) :].tolist()


def test_the_eager_attention_path_gives_the_same_tokens():
    model = MODELS["llama"]().double().eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    want = greedy_over_rows(runner(model), prompts, 5)
    model.set_attn_implementation("eager")
    assert greedy_over_rows(runner(model), prompts, 5) == want


def test_our_models_go_through_the_same_loop():
    import dataclasses

    model = create(dataclasses.replace(preset("tiny"), vocab_size=61)).double().eval()
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)
    assert runner(model) is model
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [1]]
    for prompt, tokens in zip(prompts, greedy_over_rows(model, prompts, 6), strict=True):
        want = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokens == want[0, len(prompt) :].tolist()


def test_gpt2_pads_may_stand_beyond_its_table():
    model = Foreign(MODELS["gpt2"]().eval())
    at = At(torch.tensor([[30, 31, 32, 33]]), torch.tensor([2]), torch.tensor([0]), 32)
    assert model.run(torch.zeros(1, 4, dtype=torch.long), at, model.memory(1, 32)).isfinite().all()


def test_a_state_space_model_is_refused_by_name():
    with pytest.raises(ConfigError, match="MambaForCausalLM remembers more than keys and values"):
        Foreign(MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4)))


def test_foreign_folders_open_with_load_and_keep_their_attributes(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    model = runner(load(tmp_path))
    assert isinstance(model, Foreign) and model.device.type == "cpu" and model.dtype == torch.float32
    assert not model.training and model.config.vocab_size == 61
