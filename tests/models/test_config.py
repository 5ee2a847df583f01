"""A family's config: what is refused and how it says so, lists per layer, JSON, and the sizes of known models."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig

from models.families import create, load, preset
from models.family import Family
from models.gpt.config import GPT, GPTConfig
from models.gpt.model import GPTForCausalLM
from models.gpt.presets import PRESETS
from models.parts.attention import Causal
from models.parts.mlp import NoMLP, Plain, SwiGLU
from models.parts.norm import LayerNorm, NoNorm, RMSNorm
from models.parts.placement import Peri
from models.parts.position import Learned, NoPosition, Rotary
from models.parts.residual import Add, ReZero
from models.parts.sharing import Shared
from models.spec import ConfigError, build, plain


def refused(match, **options):
    with pytest.raises(ConfigError, match=match):
        GPT(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"d_model": 770}, "d_model=770 is not divisible by n_heads=12; try 768 or 780"),
        ({"d_model": 5}, "d_model=5 is not divisible by n_heads=12; try 12"),
        ({"attention": Causal(n_kv_heads=13)}, "n_kv_heads=13 must lie in 1 .. n_heads=12"),
        ({"attention": Causal(n_heads=0)}, "n_heads=0 must be at least 1"),
        ({"attention": Causal(head_dim=0)}, "head_dim=0 must be at least 1"),
        ({"attention": Causal(head_dim=7), "position": Rotary()}, "head_dim=7 must be even; try 6 or 8"),
        ({"attention": Causal(window=0)}, "window=0 must be at least 1"),
        ({"attention": Causal(window=1024)}, "window=1024 has no effect at seq_len=1024"),
        ({"attention": Causal(dropout=1.0)}, "dropout=1.0 must lie in"),
        ({"position": Rotary(base=1.0)}, "base=1.0 must be above 1"),
        ({"mlp": Plain(hidden=0)}, "hidden=0 must be above 0"),
        ({"mlp": SwiGLU(hidden=-1)}, "hidden=-1 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
        ({"init_std": 0.0}, "init_std=0.0 must be above 0"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"norm": (RMSNorm(), RMSNorm())}, "norm lists 2 values for n_layers=12; give one, or one per layer"),
        ({"attention": Causal(n_heads=(2, 4))}, "attention.n_heads lists 2 values for n_layers=12"),
        ({"n_layers": 1, "position": (Learned(),)}, "position=learned is added to the embedding"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(options, words):
    with pytest.raises(ConfigError) as error:
        GPT(**options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_norm_without_epsilon_is_refused():
    with pytest.raises(ConfigError, match=r"eps=0.0 must be above 0"):
        GPT(norm=RMSNorm(eps=0.0))


def test_the_layer_that_cannot_be_is_named():
    refused(r"n_heads=5.*\(layer 1\)", n_layers=3, attention=Causal(n_heads=(12, 5, 12)))


def test_unknown_fields_name_the_nearest_right_one():
    with pytest.raises(ConfigError, match="did you mean 'n_layers'"):
        build(Family, {"kind": "gpt", "n_layer": 3})
    with pytest.raises(ConfigError, match="did you mean 'd_model'"):
        GPTConfig(d_modle=3)
    with pytest.raises(ConfigError, match="did you mean 'rmsnorm'"):
        build(Family, {"kind": "gpt", "norm": "rmsnrm"})
    with pytest.raises(ConfigError, match=r"attention=causal has no option 'n_heds'"):
        build(Family, {"kind": "gpt", "attention": {"kind": "causal", "n_heds": 3}})


def test_a_list_gives_every_layer_its_own_part_and_size():
    spec = build(
        Family,
        {
            "kind": "gpt",
            "vocab_size": 9,
            "d_model": 12,
            "n_layers": 3,
            "attention": {"kind": "causal", "n_heads": [1, 2, 3], "window": [None, 4, None]},
            "mlp": ["mlp", {"kind": "swiglu", "hidden": 8}, {"kind": "mlp", "hidden": 5}],
            "norm": ["rmsnorm", "layernorm", "rmsnorm"],
            "position": ["rotary", "none", "rotary"],
        },
    )
    blocks = spec.blocks()
    assert [b.attention.n_heads for b in blocks] == [1, 2, 3]
    assert [b.attention.window for b in blocks] == [None, 4, None]
    assert [b.mlp.width(12) for b in blocks] == [48, 8, 5]
    assert [type(b.norm) for b in blocks] == [RMSNorm, LayerNorm, RMSNorm]
    assert [type(b.position) for b in blocks] == [Rotary, NoPosition, Rotary]
    assert [(b.layer.index, b.layer.count) for b in blocks] == [(0, 3), (1, 3), (2, 3)]
    model = create(spec)
    assert [b.mixer.window for b in model.applications()] == [None, 4, None]
    assert build(Family, plain(spec)) == spec


def test_config_json_holds_declared_fields_and_comes_back(tmp_path):
    spec = GPT(vocab_size=9, d_model=8, n_layers=2, attention=Causal(n_heads=(2, 4)), mlp=(Plain(), SwiGLU(hidden=6)))
    config = GPTConfig.of(spec)
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert {f.name for f in dataclasses.fields(GPT)} <= raw.keys()
    assert raw["attention"]["n_heads"] == [2, 4] and raw["format_version"] == 1
    assert "spec" not in raw
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.spec == spec
    assert (again.hidden_size, again.num_hidden_layers, again.max_position_embeddings) == (8, 2, 1024)
    assert again.tie_word_embeddings is True


def test_a_newer_format_is_refused():
    with pytest.raises(ConfigError, match="format_version=99, this version reads up to 1"):
        GPTConfig(format_version=99)


def test_config_takes_transformers_names_and_built_parts():
    config = GPTConfig(hidden_size=24, num_hidden_layers=1, tie_word_embeddings=False, norm=RMSNorm(), vocab_size=5)
    assert config.spec == GPT(vocab_size=5, d_model=24, n_layers=1, tie_embeddings=False, norm=RMSNorm())


def test_vocabulary_must_be_known_before_a_model_is_made():
    with pytest.raises(ConfigError, match="vocab_size is not known yet"):
        create(GPT())
    with pytest.raises(ConfigError, match="vocab_size is not known yet"):
        GPT().n_parameters()


def test_unknown_presets_and_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'gpt2_124m'"):
        preset("gpt2_124")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


# Known sizes: GPT-2 from its paper's code (124M is 124,439,808), SmolLM2 from its model cards' safetensors headers.
@pytest.mark.parametrize(
    "name, size",
    [
        ("gpt2_124m", 124_439_808),
        ("gpt2_355m", 354_823_168),
        ("gpt2_774m", 774_030_080),
        ("gpt2_1558m", 1_557_611_200),
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1700m", 1_711_376_384),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, size):
    assert preset(name).n_parameters() == size


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_built_at_full_size_as_their_formula_says(name):
    spec = dataclasses.replace(preset(name), vocab_size=preset(name).vocab_size or 65)
    with torch.device("meta"):
        model = create(spec)
    assert sum(p.numel() for p in model.parameters()) == spec.n_parameters()


def test_nanogpt_character_setting_has_its_published_size():
    spec = dataclasses.replace(preset("nanogpt_char"), vocab_size=65)
    assert spec.n_parameters() - spec.seq_len * spec.d_model == 795_904  # nanoGPT prints 0.80M, without positions


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("hypersphere_124m", 123_569_676),
        ("hypersphere_124m_learned", 123_569_725),
        ("hypersphere_124m_layernorm", 123_569_676),
        ("hypersphere_124m_rmsnorm", 123_569_676),
        ("hypersphere_124m_prmsnorm", 123_569_676),
    ],
)
def test_the_hero_size_of_hypersphere_gpt_has_its_published_parameters(name, parameters):
    spec = PRESETS[name]()
    assert spec.n_parameters() == parameters
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig.of(spec))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "options, words",
    [
        ({"parallel": True, "mlp_placement": Peri()}, "parallel=true: .*mlp_placement has nothing to stand around"),
        ({"mlp": NoMLP(), "mlp_residual": Add()}, "mlp=none: there is no second branch for mlp_residual"),
        ({"share_mlp": Shared(cycle=5), "n_layers": 2}, "share_mlp: .*shares nothing among n_layers=2"),
        ({"head_norm": NoNorm()}, "head_norm=identity: head_norm=null says the same"),
    ],
)
def test_an_option_that_can_have_no_effect_is_refused(options, words):
    refused(words, **options)


def test_layers_with_and_without_a_second_branch_stand_in_one_model():
    mixed = GPT(n_layers=2, mlp=(NoMLP(), Plain()), mlp_residual=(Add(), ReZero()))
    assert [b.n_norms() for b in mixed.blocks()] == [1, 2]
    assert [b.n_norms() for b in GPT(n_layers=2, parallel=(True, False), mlp_placement=Peri()).blocks()] == [1, 3]
