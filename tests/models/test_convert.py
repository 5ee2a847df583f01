"""Public layouts, both ways, against transformers' own classes; and a trained model that reproduces its known text."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.convert import LAYOUTS, gpt2, llama, llama2c, read, write
from models.convert.__main__ import main
from models.families import create, load, preset
from models.parts.activation import GELU, ReLU, SquaredReLU
from models.parts.attention import Causal, Infinite
from models.parts.linear import BitNet
from models.parts.mlp import Plain, SwiGLU
from models.parts.norm import LayerNorm, RMSNorm
from models.parts.placement import Peri
from models.parts.position import NoPosition, Rotary
from models.parts.qk_norm import L2QKNorm, RMSQKNorm
from models.parts.residual import ReZero
from models.parts.rotation import NTKScaling
from models.spec import ConfigError

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
ROPE = {"rope_type": "default", "rope_theta": 5e4}
ORIGINAL = {"original_max_position_embeddings": 16, "factor": 4.0}
LLAMA3 = ROPE | ORIGINAL | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | ORIGINAL | {"rope_type": "yarn", "beta_fast": 8.0, "beta_slow": 1.0}
GPT2_SIZES = {  # heads, layers and the width of a head: the ratios of the real ones, at an eighth of their width
    "gpt2 124m": (12, 3, 8),
    "gpt2 355m": (16, 6, 8),
    "gpt2 774m": (20, 9, 8),
    "gpt2 1558m": (25, 12, 8),
}
THEIRS = {
    **{
        name: lambda heads=heads, layers=layers, h=h: GPT2LMHeadModel(
            GPT2Config(**GPT2 | {"n_embd": heads * h, "n_layer": layers, "n_head": heads})
        )
        for name, (heads, layers, h) in GPT2_SIZES.items()
    },
    "llama 3.1's scaling": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=LLAMA3)),
    "llama linear scaling": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0})
    ),
    "llama yarn": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=5, head_dim=8)),
    "mistral without a window": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=12, rms_norm_eps=1e-4, tie_word_embeddings=True)),
    "qwen3 biases": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8, attention_bias=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama biases, wide heads, base": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, head_dim=16, rope_parameters=ROPE, rms_norm_eps=1e-3)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2 untied, other options": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, n_inner=40, activation_function="relu", tie_word_embeddings=False, layer_norm_epsilon=1e-3)
    ),
}


def random_weights(model):
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model.double().eval()


def layout_of(model):
    return LAYOUTS[model.config.model_type]


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_transformers_weights_give_equal_logits_both_ways(name):
    theirs = random_weights(THEIRS[name]())
    ids = torch.randint(0, 61, (2, 17))
    want = theirs(ids).logits
    ours = layout_of(theirs).from_layout(theirs)
    assert ours.dtype == torch.float64 and not ours.training
    # rotary tables are float32 in transformers and float64 in ours, hence not 1e-12
    torch.testing.assert_close(ours(ids).logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    if "gpt2" in name:
        torch.testing.assert_close(ours(ids).logits, want, rtol=1e-10, atol=1e-10)
    back = layout_of(theirs).to_layout(ours)
    assert torch.equal(back(ids).logits, want)
    assert all(torch.equal(p, back.state_dict()[n]) for n, p in theirs.state_dict().items())


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_folders_are_read_and_written(name, tmp_path):
    theirs = random_weights(THEIRS[name]()).float()
    ids = torch.randint(0, 61, (2, 9))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read(tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    write(load(tmp_path / "ours"), tmp_path / "back", theirs.config.model_type)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(theirs) and torch.equal(back(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", ["tiny", "smollm2_135m", "gpt2_124m", "nanogpt_char"])
@torch.no_grad()
def test_our_own_models_come_out_in_a_public_layout(name):
    """nanoGPT's setting has no biases; GPT-2's layout gets zeros for them, and the same logits."""
    from models.check import shrunk

    ours = random_weights(create(shrunk(preset(name))))
    layout = gpt2 if "gpt" in name else llama
    out = layout.to_layout(ours)
    ids = torch.randint(0, ours.spec.vocab, (2, 17))
    torch.testing.assert_close(out(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_weights_stay_bfloat16():
    theirs = random_weights(THEIRS["llama tied"]()).to(torch.bfloat16)
    ours = llama.from_layout(theirs)
    assert ours.dtype == torch.bfloat16
    assert ours.head.weight.data_ptr() == ours.embedding.weight.data_ptr()
    ids = torch.randint(0, 61, (1, 8))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 0.05 * theirs(ids).logits.abs().max()


def test_generation_settings_travel_with_the_weights():
    theirs = THEIRS["llama"]()
    theirs.generation_config.eos_token_id = 7
    ours = llama.from_layout(theirs)
    assert ours.generation_config.eos_token_id == 7
    assert llama.to_layout(ours).generation_config.eos_token_id == 7


mistral, qwen3 = LAYOUTS["mistral"], LAYOUTS["qwen3"]
TINY = dataclasses.replace(preset("tiny"), vocab_size=61)
SMALL_GPT2 = dataclasses.replace(preset("nanogpt_char"), vocab_size=61)


@pytest.mark.parametrize(
    "layout, spec, words",
    [
        (llama, {"position": NoPosition()}, "position=rotary"),
        (llama, {"norm": LayerNorm()}, "norm=rmsnorm"),
        (llama, {"mlp": Plain()}, "mlp=swiglu"),
        (llama, {"mlp": SwiGLU(activation=GELU())}, "activation=silu"),
        (llama, {"attention": Causal(n_heads=4, window=3)}, "without a window .layout=mistral has one"),
        (llama, {"attention": Causal(n_heads=4, qk_norm=RMSQKNorm())}, "qk_norm=none .layout=qwen3 has rms"),
        (llama, {"attention": Causal(n_heads=4, qk_norm=L2QKNorm())}, "attention.qk_norm=none, not l2"),
        (llama, {"attention": Causal(n_heads=4, softcap=30.0)}, "attention.softcap=None, not 30.0"),
        (llama, {"attention": Causal(n_heads=4, v_head_dim=8)}, "attention.v_head_dim=16, not 8"),
        (llama, {"attention": Infinite(n_heads=4, head_dim=16)}, "attention=causal"),
        (llama, {"position": Rotary(fraction=0.5)}, "position.fraction=1.0, not 0.5"),
        (llama, {"position": Rotary(scaling=NTKScaling())}, "position.scaling among"),
        (llama, {"placement": Peri()}, "placement=pre, not peri"),
        (llama, {"residual": ReZero()}, "residual=add, not rezero"),
        (llama, {"parallel": True}, "parallel=False, not True"),
        (llama, {"logit_softcap": 30.0}, "logit_softcap=None, not 30.0"),
        (llama, {"final_norm": LayerNorm()}, "final_norm=rmsnorm, not layernorm"),
        (llama, {"norm": RMSNorm(gain=False)}, "norm.gain=True, not False"),
        (llama, {"mlp": SwiGLU(linear=BitNet())}, "mlp.linear=dense, not"),
        (qwen3, {"attention": Causal(n_heads=4)}, "attention.qk_norm=rms"),
        (qwen3, {"attention": Causal(n_heads=4, qk_norm=RMSQKNorm())}, "attention.qk_norm.eps=1e-05, not 1e-06"),
        (qwen3, {"attention": Causal(n_heads=4, qk_norm=RMSQKNorm(1e-5)), "bias": True}, "mlp.bias=False, not True"),
        (mistral, {"bias": True}, "attention.bias=False, not True"),
        (llama, {"dropout": 0.1}, "dropout=0"),
        (llama, {"norm": (RMSNorm(), RMSNorm(eps=1e-3))}, "in every layer"),
        (gpt2, {"position": Rotary()}, "position=learned"),
        (gpt2, {"norm": RMSNorm()}, "norm=layernorm"),
        (gpt2, {"mlp": SwiGLU()}, "mlp=mlp"),
        (gpt2, {"mlp": Plain(activation=SquaredReLU())}, "mlp.activation among gelu_new"),
        (gpt2, {"attention": Causal(n_heads=4, n_kv_heads=2)}, "n_kv_heads=n_heads"),
        (gpt2, {"attention": Causal(n_heads=4, head_dim=8)}, "head_dim=d_model/n_heads"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_by_name(layout, spec, words):
    base = SMALL_GPT2 if layout is gpt2 else TINY
    with pytest.raises(ConfigError, match=words):
        layout.config_of(dataclasses.replace(base, **spec))


@pytest.mark.parametrize(
    "layout, config, words",
    [
        (llama, LlamaConfig(**LLAMA, hidden_act="gelu"), "hidden_act=silu, not 'gelu'"),
        (
            llama,
            LlamaConfig(**LLAMA, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type among default, linear, llama3, yarn .*, not 'dynamic'",
        ),
        (gpt2, GPT2Config(**GPT2, activation_function="tanh"), "activation_function 'tanh'"),
        (gpt2, GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=false"),
        (gpt2, GPT2Config(**GPT2, embd_pdrop=0.3), "embd_pdrop=0.3 equal to resid_pdrop=0.1"),
    ],
)
def test_what_our_family_cannot_say_is_refused_by_name(layout, config, words):
    with pytest.raises(ConfigError, match=words):
        layout.spec_of(config)


def test_other_layouts_and_names_are_refused(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a 'gpt_neox' model"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        write(create(TINY), tmp_path / "x", "lama")


@pytest.mark.parametrize(
    "name, victim",
    [
        ("gpt2", "transformer.h.1.ln_1.weight"),
        ("gpt2", "transformer.h.2.ln_2.bias"),
        ("gpt2", "transformer.ln_f.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("llama", "model.layers.0.input_layernorm.weight"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
    ],
)
def test_a_weight_that_is_not_there_is_named_and_never_left_random(name, victim, tmp_path):
    """In the original's GPT-2 import, norms and positions that were not found stayed random without notice."""
    from safetensors.torch import load_file, save_file

    random_weights(THEIRS[name]()).float().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != victim}, tmp_path / "model.safetensors", {"format": "pt"})
    assert victim in weights
    with pytest.raises(ConfigError, match=f"no weights for {victim}"):
        read(tmp_path)
    theirs = THEIRS[name]()
    state = {k: v for k, v in theirs.state_dict().items() if k != victim}
    theirs.state_dict = lambda: state
    with pytest.raises(KeyError, match=victim):
        layout_of(theirs).from_layout(theirs)


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_positions_and_norms_of_every_gpt2_size_arrive(name):
    theirs = random_weights(THEIRS[name]())
    ours = layout_of(theirs).from_layout(theirs)
    state, mine = theirs.state_dict(), ours.state_dict()
    assert torch.equal(mine["position.weight"], state["transformer.wpe.weight"])
    assert torch.equal(mine["norm.bias"], state["transformer.ln_f.bias"])
    for i in range(theirs.config.n_layer):
        for a, b in (("mixer_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                assert torch.equal(mine[f"blocks.{i}.{a}.{kind}"], state[f"transformer.h.{i}.{b}.{kind}"])
    presets = {p: preset(p) for p in ("gpt2_124m", "gpt2_355m", "gpt2_774m", "gpt2_1558m")}
    heads = {p.attention.n_heads: p for p in presets.values()}
    real = heads[theirs.config.n_head]
    assert dataclasses.replace(real, d_model=theirs.config.n_embd, n_layers=theirs.config.n_layer) == (
        dataclasses.replace(
            ours.spec, vocab_size=50257, seq_len=1024, dropout=0.0, mlp=dataclasses.replace(ours.spec.mlp, hidden=None)
        )
    )


@torch.no_grad()
def test_qwen2_is_read_and_goes_out_as_a_llama():
    """Its attention has biases before, none behind; ours gets zeros there."""
    theirs = random_weights(Qwen2ForCausalLM(Qwen2Config(**LLAMA)))
    ids = torch.randint(0, 61, (2, 17))
    ours = layout_of(theirs).from_layout(theirs)
    want = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert not ours.state_dict()["blocks.0.mixer.out.bias"].any()
    torch.testing.assert_close(llama.to_layout(ours)(ids).logits, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match=r"read only.*write layout=llama"):
        LAYOUTS["qwen2"].to_layout(ours)


@torch.no_grad()
def test_a_window_in_some_layers_is_read_layer_by_layer():
    config = Qwen3Config(**LLAMA, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    theirs = random_weights(Qwen3ForCausalLM(config))
    ours = layout_of(theirs).from_layout(theirs)
    assert [block.attention.window for block in ours.spec.blocks()] == [None, None, 5]
    ids = torch.randint(0, 61, (2, 17))
    want = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_dropout_and_options_of_a_config_survive_the_round_trip():
    config = GPT2Config(**GPT2, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.0, activation_function="relu")
    spec = gpt2.spec_of(config)
    assert (spec.dropout, spec.attention.dropout) == (0.2, 0.0) and isinstance(spec.mlp.activation, ReLU)
    again = gpt2.config_of(spec)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_function", "n_head", "layer_norm_epsilon"):
        assert getattr(again, key) == getattr(config, key)
    source = LlamaConfig(**LLAMA, attention_dropout=0.1, rope_parameters=ROPE)
    out = llama.config_of(llama.spec_of(source))
    for key in ("attention_dropout", "rms_norm_eps", "head_dim", "num_key_value_heads", "intermediate_size"):
        assert getattr(out, key) == getattr(source, key)
    assert out.rope_parameters["rope_theta"] == 5e4
    assert json.loads(out.to_json_string())["tie_word_embeddings"] is False


# ---- llama2.c


def llama2c_file(path, tied=True, dim=8, hidden=12, layers=2, heads=2, kv=1, vocab=10, length=6):
    """A model file written by its description alone, and a float64 computation of it that shares nothing with ours."""
    rng = np.random.default_rng(0)
    h = dim // heads
    shapes = [(vocab, dim), (layers, dim), (layers, dim, dim), (layers, kv * h, dim), (layers, kv * h, dim)]
    shapes += [(layers, dim, dim), (layers, dim), (layers, hidden, dim), (layers, dim, hidden), (layers, hidden, dim)]
    arrays = [rng.normal(0, 0.5, s).astype("<f4") for s in [*shapes, (dim,)]]
    tail = [np.zeros(2 * length * (h // 2), "<f4")] + ([] if tied else [rng.normal(0, 0.5, (vocab, dim)).astype("<f4")])
    header = struct.pack("<7i", dim, hidden, layers, heads, kv, vocab if tied else -vocab, length)
    path.write_bytes(header + b"".join(a.tobytes() for a in arrays + tail))
    emb, n1, wq, wk, wv, wo, n2, w1, w2, w3, nf = (a.astype(np.float64) for a in arrays)
    head = emb if tied else tail[1].astype(np.float64)

    def norm(x, w):
        return x / np.sqrt((x * x).mean() + 1e-5) * w

    def turn(x, p):
        out = x.copy()
        for i in range(0, len(x), 2):
            a = p * 10000.0 ** (-(i % h) / h)
            out[i] = x[i] * np.cos(a) - x[i + 1] * np.sin(a)
            out[i + 1] = x[i] * np.sin(a) + x[i + 1] * np.cos(a)
        return out

    def logits(ids):
        keys = [[] for _ in range(layers)]
        for p, token in enumerate(ids):
            x = emb[token].copy()
            for n in range(layers):
                y = norm(x, n1[n])
                keys[n].append((turn(wk[n] @ y, p), wv[n] @ y))
                q, out = turn(wq[n] @ y, p), np.zeros(dim)
                for head_ in range(heads):
                    mine = slice(head_ * h, head_ * h + h)
                    shared = slice(head_ // (heads // kv) * h, head_ // (heads // kv) * h + h)
                    s = np.array([q[mine] @ k[shared] for k, _ in keys[n]]) / np.sqrt(h)
                    s = np.exp(s - s.max())
                    out[mine] = sum(w * v[shared] for w, (_, v) in zip(s / s.sum(), keys[n], strict=True))
                x = x + wo[n] @ out
                y = norm(x, n2[n])
                g = w1[n] @ y
                x = x + w2[n] @ (g / (1 + np.exp(-g)) * (w3[n] @ y))
        return head @ norm(x, nf)

    return logits


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_llama2c_files_give_the_logits_of_their_description(tied, tmp_path):
    logits = llama2c_file(tmp_path / "model.bin", tied)
    model = llama2c.load(tmp_path / "model.bin").double()
    ids = [1, 7, 3, 3, 9, 2]
    np.testing.assert_allclose(model(torch.tensor([ids])).logits[0, -1].numpy(), logits(ids), rtol=1e-8, atol=1e-8)


def test_damaged_llama2c_files_are_named(tmp_path):
    llama2c_file(tmp_path / "model.bin")
    data = (tmp_path / "model.bin").read_bytes()
    for damaged, words in (
        (data[:20], "has 20 bytes; a llama2.c header alone has 28"),
        (data[:-4], f"has {len(data) - 4} bytes, its header promises {len(data)}"),
        (b"\xff" * 28, "is no llama2.c model"),
    ):
        (tmp_path / "bad.bin").write_bytes(damaged)
        with pytest.raises(ConfigError, match=words):
            llama2c.load(tmp_path / "bad.bin")


def pieces_file(path, pieces):
    body = b"".join(struct.pack("<fi", score, len(raw)) + raw for raw, score in pieces)
    path.write_bytes(struct.pack("<i", max(len(p) for p, _ in pieces)) + body)


def test_llama2c_tokens_decode_and_encode(tmp_path):
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{b:02X}>".encode(), 0.0) for b in range(256)]
    pieces += [(b" ", -1.0), (b"a", -2.0), (b"b", -3.0), (b" a", -0.5), (b"ab", -0.1)]
    pieces_file(tmp_path / "tok.bin", pieces)
    vocab = llama2c.Pieces.load(tmp_path / "tok.bin", len(pieces))
    ids = vocab.encode("ab é")
    assert ids == [1, 259, 263, 259, 3 + 0xC3, 3 + 0xA9]  # "ab" merges before " a": its score is higher
    assert vocab.decode(ids) == "ab é".encode()
    assert vocab.encode("") == [1]
    for size, words in ((len(pieces) + 1, "ends within token"), (len(pieces) - 1, "holds more than")):
        with pytest.raises(ConfigError, match=words):
            llama2c.Pieces.load(tmp_path / "tok.bin", size)


def command(*args):
    return main([str(a) for a in args])


@torch.no_grad()
def test_the_command_converts_folders_and_their_tokenizers_both_ways(tmp_path, capsys):
    theirs = random_weights(THEIRS["llama"]()).float()
    theirs.save_pretrained(tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    assert command(tmp_path / "a", tmp_path / "b") == 0
    assert command(tmp_path / "b", tmp_path / "c", "--to", "llama") == 0
    assert "llama layout" in capsys.readouterr().out
    ids = torch.randint(0, 61, (1, 5))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "c")(ids).logits, theirs(ids).logits)
    assert (tmp_path / "c/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "args, words",
    [
        (("{}/none", "{}/x"), "neither a .bin file nor a folder with config.json"),
        (("{}/ours", "{}/short.bin"), "is a file; a new or empty folder is needed"),
        (("{}/ours", "{}/other"), "is not empty; a new or empty folder is needed"),
        (("{}/ours", "{}/ours"), "is not empty"),
        (("{}/ours", "{}/x", "--tokens", "{}/short.bin"), "for llama2.c's .bin files"),
        (("{}/short.bin", "{}/x", "--tokens", "{}/none"), "none: no such file"),
        (("{}/cut", "{}/x"), "cut: not a model that can be opened"),
        (("{}/ours", "{}/x", "--to", "lama"), "did you mean 'llama'"),
        (("{}/ours", "{}/x", "--to", "gpt2"), "the gpt2 layout needs position=learned"),
        (("{}/short.bin", "{}/x"), "a llama2.c header alone has 28"),
    ],
)
def test_the_command_answers_bad_input_in_one_line(args, words, tmp_path, capsys):
    create(TINY).save_pretrained(tmp_path / "ours")
    create(TINY).save_pretrained(tmp_path / "cut")
    weights = (tmp_path / "cut/model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(weights[:-100])
    (tmp_path / "short.bin").write_bytes(b"12")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_bytes(b"theirs")
    capsys.readouterr()
    assert command(*(a.format(tmp_path) for a in args)) == 2
    assert (tmp_path / "other/model.safetensors").read_bytes() == b"theirs" and not (tmp_path / "x").exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_a_wrong_command_line_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        command("only_a_source")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and line.startswith("error: ") and "target" in line


def test_an_export_that_is_converted_names_no_code_that_it_does_not_have(tmp_path):
    from models.convert.code import write_code

    model = create(TINY)
    model.save_pretrained(tmp_path / "export")
    write_code(model, tmp_path / "export")
    assert command(tmp_path / "export", tmp_path / "ours") == 0
    assert "auto_map" not in json.loads((tmp_path / "ours/config.json").read_text())
    assert command(tmp_path / "export", tmp_path / "llama", "--to", "llama") == 0
    assert "auto_map" not in json.loads((tmp_path / "llama/config.json").read_text())


def test_the_stories_tokenizer_is_the_one_of_llama2c(data_dir, tmp_path):
    """As a Hugging Face folder: equal ids on real text, and text that comes back."""
    stories = data_dir / "stories260K"
    assert command(stories / "stories260K.bin", tmp_path, "--tokens", stories / "tok512.bin") == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    pieces = llama2c.Pieces.load(stories / "tok512.bin", 512)
    lines = (data_dir / "tinystories/tinystories.txt").read_text(encoding="utf-8").splitlines()[:200]
    for line in [*filter(str.strip, lines), "  two  spaces", "a é ☃"]:
        ids = tokenizer(line).input_ids
        assert ids == pieces.encode(line)
        assert tokenizer.decode(ids, skip_special_tokens=True) == line
    model = load(tmp_path)
    out = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named"
    )


def test_the_trained_stories_model_reproduces_its_known_text(data_dir):
    """200 greedy tokens of a real trained Llama, byte for byte; through memory, and in Llama's layout too."""
    folder = data_dir / "stories260K"
    model = llama2c.load(folder / "stories260K.bin")
    vocab = llama2c.Pieces.load(folder / "tok512.bin", 512)
    expected = (folder / "expected_greedy_200.txt").read_bytes()
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": llama2c.BOS, "pad_token_id": 0}
    for m in (model, llama.to_layout(model)):
        ids = m.generate(torch.tensor([[llama2c.BOS]]), **options)[0].tolist()
        assert vocab.decode(ids) == expected
    assert vocab.encode("Once upon a time, there was") == ids[: len(vocab.encode("Once upon a time, there was"))]
