"""The Hugging Face protocol, roles (initialisation, decay), loading, and training under DDP."""

from __future__ import annotations

import dataclasses
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from models.families import create, load, preset
from models.gpt.config import GPT
from models.lm import last_real
from models.memory import At
from models.parts.attention import Causal
from models.parts.depth import Routed
from models.parts.mlp import Plain, SwiGLU
from models.parts.norm import RMSNorm
from models.parts.position import Rotary
from models.roles import ROLES, initialise, role_of
from models.spec import ConfigError

SPEC = GPT(
    vocab_size=31,
    d_model=16,
    n_layers=2,
    seq_len=24,
    attention=Causal(n_heads=4, n_kv_heads=2),
    mlp=SwiGLU(hidden=24),
    norm=RMSNorm(),
    position=Rotary(),
)


def model_of(**changes):
    torch.manual_seed(0)
    return create(dataclasses.replace(SPEC, **changes)).eval()


def ids_of(B=2, T=8):
    return torch.randint(0, 31, (B, T), generator=torch.Generator().manual_seed(0))


# ---- protocol


def test_loss_is_the_mean_over_shifted_targets_that_are_not_ignored():
    model, ids = model_of(), ids_of()
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits
    want = [
        F.cross_entropy(logits[b, t], labels[b, t + 1]) for b in range(2) for t in range(7) if labels[b, t + 1] >= 0
    ]
    torch.testing.assert_close(model(ids, labels=labels).loss, torch.stack(want).mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=5).loss, torch.stack(want).sum() / 5)


def test_logits_to_keep_gives_the_last_ones_or_those_named():
    model, ids = model_of(), ids_of()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 6])).logits, full[:, [0, 6]])


def test_hidden_states_and_tuple_output():
    model, ids = model_of(), ids_of()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (2, 8, 16)
    torch.testing.assert_close(out.hidden_states[-1], model.hidden(ids))
    torch.testing.assert_close(out.hidden_states[0], model.embedding(ids))
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)


def test_hidden_states_of_left_padded_rows_stand_where_their_tokens_stood():
    model, ids = model_of(), ids_of()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(ids[:1, 3:], output_hidden_states=True).hidden_states
    for got, want in zip(padded, alone, strict=True):
        torch.testing.assert_close(got[0, 3:], want[0], rtol=1e-5, atol=1e-6)


def test_a_mask_with_holes_is_the_sequence_without_the_holes():
    model, ids = model_of(), ids_of(1, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1]])
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[mask.bool()],
        model(ids[mask.bool()][None]).logits[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_padding_may_come_in_any_chunk_when_memory_is_used():
    model, ids = model_of(), ids_of(2, 8)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 1, 1]])
    memory, parts = None, []
    for a, b in ((0, 4), (4, 5), (5, 8)):
        out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    for row in range(2):
        real = mask[row].bool()
        want = model(ids[row][real][None]).logits[0]
        torch.testing.assert_close(logits[row][real], want, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_mask_in_any_chunks_gives_each_rows_own_logits(data):
    """Pads anywhere, chunks of any sizes, with a window and learned or rotary positions: as if each row were alone."""
    position = data.draw(st.sampled_from([Rotary(), preset("nanogpt_char").position]))
    window = data.draw(st.sampled_from([None, 2, 5]))
    model = model_of(position=position, attention=Causal(n_heads=4, n_kv_heads=2, window=window)).double()
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    bits = st.lists(st.integers(0, 1), min_size=T, max_size=T)
    mask = torch.tensor([data.draw(bits) for _ in range(B)])
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1)))) if T > 1 else []
    ids, memory, parts = ids_of(B, T), None, []
    for a, b in pairwise([0, *cuts, T]):
        out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    assert logits.isfinite().all()
    for row in range(B):
        real = mask[row].bool()
        if real.any():
            want = model(ids[row][real][None]).logits[0]
            torch.testing.assert_close(logits[row][real], want, rtol=1e-9, atol=1e-9)


def test_position_ids_without_memory_say_where_tokens_stand():
    model, ids = model_of(position=preset("nanogpt_char").position), ids_of(1, 6)
    shifted = model(ids, position_ids=torch.arange(3, 9)[None]).logits
    assert not torch.allclose(shifted, model(ids).logits)
    want = model.logits(model.hidden(ids, At(torch.arange(3, 9)[None], upto=9)))
    torch.testing.assert_close(shifted, want)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({}, "input_ids of shape"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"got \(3,\)"),
        ({"inputs_embeds": torch.zeros(1, 2, 16), "input_ids": ids_of()}, "inputs_embeds are not supported"),
        ({"input_ids": ids_of(), "labels": ids_of(), "logits_to_keep": 1}, "labels need all logits"),
        ({"input_ids": ids_of(), "past_key_values": object()}, "must be the model's own memory"),
        ({"input_ids": ids_of(), "attention_mask": torch.ones(2, 5)}, r"\[2, 8\] is needed"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        model_of()(**inputs)


def test_a_learned_table_refuses_positions_beyond_it_and_takes_pads_anywhere():
    model = model_of(position=preset("nanogpt_char").position)
    with pytest.raises(ValueError, match="position 24 has no learned vector: this model's seq_len is 24"):
        model(ids_of(1, 25))
    pos = torch.tensor([[22, 23, 24, 25]])
    logits = model.run(ids_of(1, 4), At(pos, torch.tensor([2]), torch.tensor([0]), 24), model.memory(1, 24))
    assert logits.isfinite().all()


def test_pads_do_not_count_as_context():
    """26 columns, of which 24 at most are real, fit a table of 24 positions; with memory too."""
    model, ids = model_of(position=preset("nanogpt_char").position), ids_of(2, 26)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, :9] = 0
    for use_cache in (False, True):
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(logits[0, 2:], model(ids[:1, 2:]).logits[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits[1, 9:], model(ids[1:, 9:]).logits[0], rtol=1e-5, atol=1e-6)


def test_positions_beyond_the_table_are_no_pads_and_fail():
    model = model_of(position=preset("nanogpt_char").position)
    with pytest.raises(IndexError):
        model(ids_of(1, 2), position_ids=torch.tensor([[23, 24]]))


def test_rotary_runs_beyond_the_trained_context():
    assert model_of()(ids_of(1, 40)).logits.isfinite().all()


def test_run_can_spare_the_head_on_all_but_the_last_real_token():
    model, ids = model_of(), ids_of(3, 6)
    at = At(torch.arange(6).expand(3, 6), torch.tensor([6, 1, 4]), torch.tensor([2, 0, 1]), 6)
    full = model.run(ids, at, model.memory(3, 8))
    last = model.run(ids, at, model.memory(3, 8), last=True)
    torch.testing.assert_close(last[:, 0], full[torch.arange(3), torch.tensor([5, 0, 3])])
    assert last_real(full, at._replace(n=None)).equal(full[:, -1:])


def test_neighbouring_rows_as_a_slice_give_the_logits_of_a_row_tensor():
    model, ids = model_of(), ids_of(2, 6)
    n = torch.tensor([6, 4])
    results = []
    for rows in (torch.tensor([1, 2]), slice(1, 3)):
        memory = model.memory(4, 8)
        model.run(ids, At(torch.arange(6).expand(2, 6), n, rows, 6), memory)
        at = At(n[:, None], None, rows, 7)
        results.append(model.run(ids[:, :1], at, memory))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_memory_follows_the_dtype_of_the_weights_or_the_one_named():
    model = model_of()
    assert model.memory(1).mem[0].tensors["k"].dtype == torch.float32
    assert model.memory(1, dtype=torch.bfloat16).mem[0].tensors["k"].dtype == torch.bfloat16
    half = model.to(torch.bfloat16)
    assert half.memory(1).mem[0].tensors["k"].dtype == torch.bfloat16
    out = half.generate(ids_of(1, 4), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 8)


def test_assisted_generation_rolls_memory_back_and_keeps_the_greedy_text():
    model = model_of()
    ids = ids_of(1, 5).repeat(1, 2)  # a repetition, so that prompt lookup proposes tokens
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), want)


def test_sampling_repeats_with_its_seed():
    model = model_of()
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(model.generate(ids_of(2, 3), max_new_tokens=6, do_sample=True, pad_token_id=0))
    assert torch.equal(*draws)


def test_one_seed_gives_one_model_and_dropout_follows_the_generator():
    a, b = model_of(dropout=0.3), model_of(dropout=0.3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    ids = ids_of()
    torch.manual_seed(1)
    first = a.train()(ids).logits
    torch.manual_seed(1)
    assert torch.equal(first, a(ids).logits)
    assert not torch.equal(first, a(ids).logits)


# ---- roles


def test_initialisation_follows_the_table():
    spec = dataclasses.replace(
        SPEC, vocab_size=4000, d_model=256, n_layers=8, bias=True, mlp=Plain(), position=preset("nanogpt_char").position
    )
    torch.manual_seed(0)
    model = create(spec)
    wanted = {"normal": 0.02, "residual": 0.02 / 16**0.5, "zeros": 0.0, "ones": 0.0}
    seen = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            role = role_of(module, name)
            seen.add(role.init)
            std = wanted[role.init]
            assert abs(p.std(unbiased=False).item() - std) <= 0.06 * std, (module, name)
            assert abs(p.mean().item() - (1.0 if role.init == "ones" else 0.0)) < 0.002
    assert seen == {"normal", "residual", "zeros", "ones"}
    out = {id(b.mixer.out) for b in model.applications()} | {id(b.mlp.down) for b in model.applications()}
    assert out == {id(m) for m in model.modules() if getattr(m, "roles", {}).get("weight") == "residual"}


def test_matrices_and_embeddings_decay_gains_and_biases_do_not():
    model = model_of(bias=True, mlp=Plain(hidden=24), position=preset("nanogpt_char").position)
    decays = model.decay_parameters()
    names = {name for name, _ in model.named_parameters()}
    assert decays <= names and "head.weight" not in decays  # tied: counted once, as embedding.weight
    assert decays == {name for name, p in model.named_parameters() if p.dim() == 2}
    assert "head.weight" in model_of(tie_embeddings=False).decay_parameters()


def test_a_parameter_without_a_role_is_an_error_that_names_it():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = torch.nn.Parameter(torch.ones(2))

    with pytest.raises(KeyError, match=r"Odd\.gamma has role None; give it one of"):
        initialise(Odd(), 0.02, 4)
    assert {"embedding", "matrix", "residual", "gain", "bias", "head"} <= ROLES.keys()


def test_given_scalars_and_buffers_are_set_in_the_same_place():
    class Scaled(torch.nn.Module):
        roles = {"scale": "scalar"}
        initial = {"scale": 2.5}

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.empty(()))
            self.register_buffer("table", torch.empty(2), persistent=False)

        def rebuild_buffers(self):
            self.table.fill_(7.0)

    module = Scaled()
    initialise(module, 0.02, 4)
    assert module.scale.item() == 2.5 and module.table.tolist() == [7.0, 7.0]


def test_loading_a_folder_without_one_tensor_initialises_that_one_alone(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = "blocks.1.mlp.down.weight"
    save_file({k: v for k, v in tensors.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"no weights for {missing}"):
        load(tmp_path)
    torch.manual_seed(3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # as transformers alone does it
    for name, p in loaded.named_parameters():
        if name == missing:
            assert not torch.equal(p, tensors[name]) and 0.5 < p.std().item() / (0.02 / 2) < 1.5
        else:
            assert torch.equal(p, tensors[name]), name


def test_resizing_the_vocabulary_keeps_roles_ties_and_the_config():
    model = model_of()
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert model.spec.vocab_size == model.config.spec.vocab_size == 40 and model(ids_of()).logits.shape[-1] == 40
    assert "embedding.weight" in model.decay_parameters()
    assert model.config.spec.n_parameters() == sum(p.numel() for p in model.parameters())


def test_transformers_opens_a_folder_by_its_auto_class(tmp_path):
    model, ids = model_of(), ids_of()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and type(again) is type(model)
    assert (again(ids).logits.float() - model(ids).logits).abs().max() < 0.05
    assert load(tmp_path, torch.float64).dtype == torch.float64


def test_training_flops_equal_a_count_by_hand():
    """d=16, 4 heads of 4, 2 key heads, hidden 24, 2 layers, 31 tokens: each matrix 6 x, each score and sum 12 x."""
    layer = 16 * (16 + 2 * 8) + 16 * 16 + 16 * 48 + 24 * 16
    assert model_of().flops_per_token(10) == 6 * (2 * layer + 31 * 16) + 2 * 12 * 16 * 10
    windowed = model_of(attention=Causal(n_heads=4, n_kv_heads=2, window=3))
    assert windowed.flops_per_token(10) == 6 * (2 * layer + 31 * 16) + 2 * 12 * 16 * 3
    assert model_of(tie_embeddings=False).flops_per_token(10) == model_of().flops_per_token(10)


def test_distributed_data_parallel_finds_every_gradient(tmp_path):
    """DDP raises in the second step when a parameter got no gradient in the first."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(model_of(bias=True).train())
        for _ in range(2):
            ddp(ids_of(), labels=ids_of()).loss.backward()
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_the_states_of_earlier_layers_are_let_go_unless_something_asked_for_them():
    """A prompt's states of all layers together are what a small machine has no room for."""
    model = create(dataclasses.replace(SPEC, n_layers=4)).eval()
    states: list[weakref.ref] = []
    alive: list[int] = []

    def watch(module, inputs, output):
        alive.append(sum(ref() is not None for ref in states))
        states.append(weakref.ref(output[0]))

    for block in model.blocks:
        block.register_forward_hook(watch)
    model(torch.arange(8)[None])
    assert alive[-1] <= 2, alive  # its own input, at most, and what is being made of it


def test_a_mixture_of_more_sources_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"depth=routed: top_k=9 exceeds the 3 sources"):
        dataclasses.replace(SPEC, n_layers=2, depth=Routed(top_k=9))
