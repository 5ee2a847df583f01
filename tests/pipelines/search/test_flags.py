"""Experiment files of the modular laboratory: every flag is known, and what is searched is what the file said."""

from __future__ import annotations

import dataclasses as dc
import json
from typing import Any

import pytest
import yaml

from models.loss import CrossEntropy, Flatness, Focal
from models.spec import ConfigError, build, plain
from pipelines import search
from pipelines.lib.config import InputError, assemble, override, read_yaml, recipe
from pipelines.lib.search.flag_arrange import arrange, boxes, built
from pipelines.lib.search.flag_files import import_file, import_greedy, is_laboratory
from pipelines.lib.search.flag_runs import settings
from pipelines.lib.search.flag_values import Flags, Lacking
from pipelines.lib.search.flags import FLAGS, LEFT_OUT, is_flag, left_out
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.search.space import Space
from pipelines.lib.search.study import SPACES, SearchConfig
from pipelines.lib.training import TrainConfig
from tests.pipelines.tiny import make_tokens

# The field names of the specification's table (section 2), families of names written out.
SPECIFIED = """
n_layer n_head n_kv_group n_embd block_size vocab_size dropout bias mlp_size mlp_expansion_factor mlp_up_bias
mlp_down_bias norm_variant_attn norm_variant_output norm_variant_wte norm_variant_abs norm_variant_lm_head
norm_wte_radius norm_wte_scale norm_wte_gain norm_wte_radius_learning norm_abs_radius norm_abs_scale norm_abs_gain
norm_abs_radius_learning norm_lm_head_radius norm_lm_head_scale norm_lm_head_gain norm_lm_head_radius_learning
prmsnorm_pct krmsnorm_num hsnorm_gain hsnorm_radius hsnorm_scale hsnorm_radius_learning dact_activation dact_use_gamma
dact_use_beta dact_use_alpha dact_alpha_init use_pre_ln use_pre_ln_attn use_pre_ln_mlp use_peri_ln use_peri_ln_attn
use_peri_ln_mlp use_post_ln use_post_ln_attn use_post_ln_mlp use_parallel_mlp attn_residual_combination
mlp_residual_combination attn_residual_alpha mlp_residual_alpha attn_residual_alpha_type mlp_residual_alpha_type
residual_slerp_eps use_attn_resid_scaling use_mlp_resid_scaling attention_variant attention_list use_qk_norm
use_qk_norm_scale use_v_norm window_size use_flex_attn gate attn_logit_softcapping final_logit_softcapping
disable_flash_attention use_flash_lobo use_flash_lobo_per_head use_flash_obo_const flash_lobo_log_const n_qk_head_dim
n_v_head_dim n_cproj use_concat_heads ssm_mamba_expand ssm_conv_kernel_size ssm_dt_rank ssm_d_state ssm_io_bias
softmax_variant_attn softmax_variant_output div_by_seq_len use_abs_pos_embeddings absolute_pos_embedding_variant
use_rotary_embeddings rope_variant rope_length sym_rot_num_angles use_fire_embeddings shared_fire_embeddings
fire_log_bias fire_num_hidden_layers fire_mlp_width fire_init_c fire_init_L fire_outermost_sigma mlp_variant
activation_variant kan_poly_order kan_base_activation kan_middle_layers use_moe moe_layer_freq n_experts moe_top_k
moe_router_scheme linear_variant_attn linear_variant_mlp linear_variant_q linear_variant_k linear_variant_v
linear_variant_attn_proj linear_variant_mlp_up linear_variant_mlp_down quantize_wte quantize_linear_bits
quantize_linear_attn_q_method quantize_attn_act_softmax_input quantize_mlp_act_bits wte_weight_tying n_embd_wte
n_embd_wte_scale_tying init_variant embedding_std_init linear_std_init use_embedding_scale shared_mlp_size
shared_mlp_sym shared_mlp_seq shared_attn_size shared_attn_sym shared_attn_seq n_head_layerlist mlp_size_layerlist
n_kv_group_layerlist n_qk_head_dim_layerlist n_v_head_dim_layerlist n_cproj_layerlist attention_variant_layerlist
use_rotary_embeddings_layerlist window_size_layerlist out_dir dataset init_from gpt2_type max_iters eval_interval
eval_iters log_interval batch_size gradient_accumulation_steps learning_rate optimizer lr_scheduler grad_clip dtype
device compile seed patience training_limiters loss_fn training_mode use_gradient_checkpointing
""".split()

SOFTMAXES = """softmax softermax sigsoftmax strongermax consmax consmax_v2 consmax_quan saturatingconsmax polymax
vpolymax exppolymax relumax relu2max sigmoidmax softplus softplus2max squareplus softshrink gelumax pfla_softmax
ste_argmax_softmax""".split()
ACTIVATIONS = """celu elu gelu gelu_shifted leaky_relu learned_spline mish piecewise pfla pfla_le prelu relu relu_power
relu6 rrelu disco selu sigmoid silu softplus softsign softshrink squared_relu squared_gelu tanh identity""".split()
NORMS = "layernorm rmsnorm prmsnorm krmsnorm hyperspherenorm cappedhyperspherenorm dact identity".split()
INFINITE = {"attention_variant": "infinite", "n_qk_head_dim": 32, "n_v_head_dim": 48}
# Runs that together read every flag: each chooses something that only some flags describe.
RUNS: list[dict[str, Any]] = [
    {},
    *({"softmax_variant_attn": kind, "div_by_seq_len": True} for kind in SOFTMAXES),
    {"softmax_variant_attn": "strongermax", "strongermax_div_by_sum_of_terms": False},
    {"softmax_variant_attn": "consmax", "consmax_use_euler_base": False},
    {"softmax_variant_attn": "sigsoftmax", "sigsoftmax_use_euler_base": False},
    {"softmax_variant_attn": "exppolymax", "exppolymax_use_euler_base": False},
    {"softmax_variant_attn": "pfla_softmax", "pfla_softmax_use_obo": True},
    *({"activation_variant": kind} for kind in ACTIVATIONS),
    *({"norm_variant_attn": kind} for kind in NORMS),
    {f"norm_variant_{site}": "hyperspherenorm" for site in ("output", "wte", "abs", "lm_head")},
    {"norm_variant_attn": "hyperspherenorm", "hsnorm_radius_learning": True, "hsnorm_scale": 2.0, "hsnorm_radius": 5},
    {"norm_variant_attn": "krmsnorm", "krmsnorm_quantize_type": "int8", "krmsnorm_recompute_percentage": 0.05},
    {"norm_variant_attn": "dact", "dact_use_alpha": False, "dact_activation": "relu"},
    {"use_peri_ln": True, "use_post_ln_mlp": False},
    {"use_parallel_mlp": True},
    *({"attn_residual_combination": "rezero", "attn_residual_alpha_type": kind} for kind in ("fixed", "dot", "rezero")),
    {"mlp_residual_combination": "slerp", "mlp_residual_alpha_type": "learned"},
    {f"use_{site}_resid_{what}": True for site in ("attn", "mlp") for what in ("scaling", "const")}
    | {"attn_resid_const": 1.0, "mlp_resid_const": 1.0, "learn_attn_resid_const": True},
    INFINITE,
    {**INFINITE, "use_concat_heads": True, **{f"l2_norm_attn_{x}": True for x in ("q", "k", "v", "cproj")}}
    | {"l2_norm_attn_cproj_dim": "hidden"},
    {"attention_variant": "mla", "use_mla_lobo": True},
    *({"attention_variant": kind} for kind in ("linear", "ssm", "identity")),
    {"attention_list": ["causal", "identity", "causal"]},
    {
        "attention_variant_layerlist": ["causal", "linear"],
        "use_rotary_embeddings": True,
        "use_abs_pos_embeddings": False,
    },
    {"use_qk_norm": True},
    {"use_qk_norm": True, "use_qk_norm_scale": True, "use_v_norm": True, "gate": True, "window_size": 64},
    {"attn_logit_softcapping": True, "final_logit_softcapping": 30},
    *({"use_flash_lobo": True, option: True} for option in ("use_flash_lobo_per_head", "use_flash_obo_const")),
    {"n_kv_group": 4, "n_head_layerlist": ["6", "12"], "window_size_layerlist": ["none", "32"]},
    {"absolute_pos_embedding_variant": "cyclic", "cyclic_abs_pos_cycle_lengths": [2, 3, 5]},
    {"use_rotary_embeddings": True, "rope_length": 16},
    {"use_rotary_embeddings": True, "rope_variant": "soap", "use_abs_pos_embeddings": False},
    {"use_fire_embeddings": True, "use_abs_pos_embeddings": False},
    {"use_fire_embeddings": True, "use_rotary_embeddings": True, "shared_fire_embeddings": True},
    *({"mlp_variant": kind} for kind in ("swiglu", "kan", "dual_path", "dual_path_swiglu", "identity")),
    {"mlp_size_layerlist": [256, 512], "shared_mlp_size": 2, "mlp_x_offset": 0.5, "l2_norm_mlp_up": True},
    {"l2_norm_mlp_down": True, "mlp_up_bias": True},
    {"use_moe": True},
    *({"linear_variant_mlp": kind} for kind in ("bitlinear", "bitlinear_1p58", "quantized_linear")),
    {"linear_variant_attn": "quantized_linear", "quant_scheduler": "static", "start_quant_level": 1.0},
    {"linear_variant_mlp": "adaptive_bit_linear", "adaptive_linear_init_bits": 6},
    {"n_embd_wte": 64, "use_embedding_scale": True, "wte_weight_tying": False},
    {"shared_attn_seq": 2, "shared_mlp_sym": True},
    {"use_ln_f_input_mixer": True},
    {"use_ln_f_input_mixer": True, "ln_f_input_mixer_variant": "router_topk"},
    {"lr_scheduler": "cosine", "cosine_t_max": 3500},
    {"optimizer": "adam", "weight_decay": 0},
    {"training_limiters": ["max_tokens"], "max_tokens": 10**6},
    {"training_limiters": "max_epochs", "max_epochs": 1.5, "patience": 3},
    *(
        {"loss_fn": kind}
        for kind in ("label_smoothing", "focal", "top1_margin", "entropy_penalty", "skip_correct_top1")
    ),
    {"loss_fn": "attenuated_correct_top1", "correct_top1_attenuation": 0.5},
    {"loss_fn": "flatness_boost", "flatness_beta": 0.5},
    {"loss_schedule": "0:focal,500:cross_entropy"},
]


def file(folder, text, name="old.yaml"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return path


def searched(found):
    """The training configs of a translated file, as a search builds them: recipe, fixed, then a point of the space."""
    tree = read_yaml(found.text())
    out = []
    for point in Space.read(tree["vary"]).points():
        config = {**recipe(tree["recipe"]), "data": "", "out": ""}
        for key, value in {**tree["fixed"], **point}.items():
            config = override(
                {k: v for k, v in config.items() if key not in ("tokens", "epochs") or k != "steps"}, key, value
            )
        out.append(plain(build(TrainConfig, config)))
    return out


def one(folder, **flags):
    """The training config of a file with one run."""
    configs = searched(import_file(file(folder, flags)))
    assert len(configs) == 1
    return build(TrainConfig, configs[0])


# ---- the table


def test_every_flag_of_the_specification_is_translated_or_left_out_with_a_reason():
    assert len(SPECIFIED) > 160
    for name in SPECIFIED:
        found = left_out(name)
        assert name in FLAGS or (found is not None and len(found.reason) > 3), name


def test_no_flag_stands_in_both_tables():
    assert not set(FLAGS) & set(LEFT_OUT)


def test_every_flag_of_the_table_is_read_by_some_run():
    read = {"dataset"}
    for run in RUNS:
        flags = Flags(run)
        settings(flags)
        flags("seed")
        read |= flags.read
    assert set(FLAGS) - read == set()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: ",".join(f"{k}={v}" for k, v in run.items())[:60] or "defaults")
def test_every_run_becomes_a_config_that_can_be(run):
    config = built(settings(Flags(run)))
    assert config.model.n_parameters is not None and config.rows


def test_a_schedule_of_losses_keeps_its_updates_and_their_options():
    given = {"loss_schedule": "0:flatness_boost, 500:focal,900:cross_entropy", "focal_gamma": 3, "flatness_beta": 0.5}
    rule = built(settings(Flags(given))).loss
    assert rule.rules() == (Flatness(0.5), Focal(3.0), CrossEntropy())
    assert [rule.stage(step) for step in (0, 499, 500, 899, 900)] == [0, 0, 1, 1, 2]
    assert built(settings(Flags({"loss_schedule": "0:focal"}))).loss == Focal()
    for bad in ("focal", "5:focal", "0:focal,9:rank_distance", "0:focul"):
        with pytest.raises(Lacking, match="loss_"):
            settings(Flags({"loss_schedule": bad}))


def test_the_laboratorys_default_model_has_as_many_parameters():
    model = built(settings(Flags({}))).model
    assert dc.replace(model, vocab_size=65).n_parameters() == 10_745_088
    without = built(settings(Flags({"use_abs_pos_embeddings": False}))).model
    assert dc.replace(without, vocab_size=65).n_parameters() == 10_646_784


# ---- combinations of flags


@pytest.mark.parametrize(
    ("pre", "peri", "post", "kind"),
    [
        (1, 0, 0, "pre"),
        (1, 1, 0, "peri"),
        (0, 0, 1, "post"),
        (1, 0, 1, "pre_post"),
        (0, 1, 0, "output"),
        (0, 0, 0, "none"),
    ],
)
def test_three_switches_make_a_placement(pre, peri, post, kind):
    found = settings(Flags({"use_pre_ln": bool(pre), "use_peri_ln": bool(peri), "use_post_ln": bool(post)}))
    assert found["model.placement"] == kind and found["model.mlp_placement"] is None


def test_a_branchs_own_switch_goes_first():
    found = settings(Flags({"use_peri_ln": True, "use_peri_ln_mlp": False}))
    assert (found["model.placement"], found["model.mlp_placement"]) == ("peri", "pre")


def test_norms_in_all_three_places_at_once_stay():
    assert settings(Flags({"use_peri_ln": True, "use_post_ln": True}))["model.placement"] == "peri_post"


def test_a_window_of_w_was_w_plus_1_keys(tmp_path):
    assert one(tmp_path, window_size=128).model.attention.window == 129


def test_mlp_width_follows_the_models_width(tmp_path):
    assert one(tmp_path, n_embd=96, mlp_expansion_factor=3).model.mlp.hidden == 288
    assert one(tmp_path, n_embd=96, mlp_variant="swiglu").model.mlp.hidden == 384
    assert one(tmp_path, n_embd=96).model.mlp.width(96) == 384


def test_qk_norm_and_its_scale_are_one_part(tmp_path):
    plain_norm = one(tmp_path, use_qk_norm=True).model.attention.qk_norm
    scaled = one(tmp_path, use_qk_norm=True, use_qk_norm_scale=True).model.attention.qk_norm
    assert (plain_norm.scale, plain_norm.learned) == ("inv_sqrt", False)
    assert (scaled.scale, scaled.learned) == ("length", True)


def test_absolute_and_rotary_positions_are_mixed_and_short_rope_is_a_fraction(tmp_path):
    position = plain(one(tmp_path, use_rotary_embeddings=True, rope_length=16).model.position)
    assert position["kind"] == "mixed" and position["absolute"]["kind"] == "learned"
    assert position["rotary"]["fraction"] == 16 / 64 and position["bias"]["kind"] == "none"


def test_layer_lists_are_cycled_by_groups_of_shared_layers(tmp_path):
    model = one(tmp_path, n_layer=6, shared_mlp_size=2, mlp_size_layerlist=[["100", "200"]]).model
    assert [block.mlp.hidden for block in model.blocks()] == [100, 100, 200, 200, 100, 100]
    model = one(tmp_path, n_layer=3, window_size_layerlist=[["none", 31]]).model
    assert [block.attention.window for block in model.blocks()] == [None, 32, None]


def test_experts_stand_in_every_second_layer_from_the_first(tmp_path):
    model = one(tmp_path, n_layer=4, use_moe=True, n_experts=4).model
    assert [plain(block.mlp)["kind"] for block in model.blocks()] == ["moe", "mlp", "moe", "mlp"]
    assert model.mlp[0].balance == 0 == model.mlp[0].z_loss


def test_adamw_decayed_by_its_own_flag_and_the_rate_was_constant(tmp_path):
    config = one(tmp_path, weight_decay=0.3, beta2=0.95, warmup_iters=200, learning_rate="3e-4")
    assert config.optim.weight_decay == 0.01 and config.optim.betas == (0.9, 0.95) and config.optim.lr == 3e-4
    assert plain(config.schedule) == {"kind": "constant", "warmup_steps": 0}


@pytest.mark.parametrize("run", [run for run in RUNS if not {"softmax_variant_attn", "activation_variant"} & set(run)])
def test_nothing_of_the_recipe_or_of_our_defaults_shows_through(run):
    fixed, vary = arrange([settings(Flags(run))])
    config = {**recipe("gpt_debug"), "data": "", "out": ""}
    for key, value in fixed.items():
        config = override(
            {k: v for k, v in config.items() if key not in ("tokens", "epochs") or k != "steps"}, key, value
        )
    assert vary == {} and build(TrainConfig, config) == built(settings(Flags(run)))


# ---- files

BASE = {"dataset": ["tiny"], "n_layer": [2, 3], "learning_rate": ["1e-3", 0.01], "use_post_ln": [False]}
OTHER = {"dataset": "tiny", "max_iters": 10, "parameter_groups": [{"n_head": ["3", "6"]}, {"mlp_variant": "swiglu"}]}


def all_settings(folder, text, name):
    return sorted(json.dumps(config, sort_keys=True) for config in searched(import_file(file(folder, text, name))))


def test_lists_documents_and_json_are_one(tmp_path):
    listed = all_settings(tmp_path, [BASE, OTHER], "a.yaml")
    documents = "---\n" + yaml.safe_dump(BASE) + "---\n" + yaml.safe_dump(OTHER)
    assert listed == all_settings(tmp_path, documents, "b.yaml")
    assert listed == all_settings(tmp_path, json.dumps([BASE, OTHER]), "c.json")
    assert len(set(listed)) == 4 + 3


def test_both_forms_of_conditions_hold(tmp_path):
    conditional = {"options": [True], "conditions": [["use_qk_norm", True]]}
    flags = {"use_qk_norm": [True, False], "use_qk_norm_scale": conditional}
    pairs = all_settings(tmp_path, flags, "pairs.yaml")
    conditional["conditions"] = {"use_qk_norm": True}
    assert pairs == all_settings(tmp_path, flags, "mapping.yaml")
    norms = {json.loads(config)["model"]["attention"]["qk_norm"]["kind"] for config in pairs}
    assert norms == {"l2", "none"}
    assert all(json.loads(c)["model"]["attention"]["qk_norm"].get("scale", "length") == "length" for c in pairs)


NAMED = """
named_static_groups:
  - {named_group: qk_norm, use_qk_norm: [true], use_qk_norm_scale: [true]}
  - {named_group: rotary, use_rotary_embeddings: [yes], use_abs_pos_embeddings: [no]}
  - {named_group: idle, n_kv_group: [1]}
  - {named_group: hd_32, n_qk_head_dim: [32], n_v_head_dim: [32]}
  - {named_group: "48", n_qk_head_dim: [48], n_v_head_dim: [48]}
named_variation_groups:
  - {named_group: heads, n_head: {range: {start: 1, end: 3}}}
common_group: {dataset: [minipile], max_iters: [100], never_save_checkpoint: [true], device: [cuda]}
parameter_groups:
  - named_group_static: [qk_norm, rotary]
    attention_variant: infinite
    softmax_variant_attn: [softmax, relu2max]
    named_group_variations: [heads]
    named_group_alternates: [hd_32, "48"]
  - {n_head: ["6", "12"], use_post_ln: [true, false], hsnorm_radius: [3], optimizer: [adamw, muon]}
"""


def test_what_is_searched_is_what_every_run_of_the_file_was(tmp_path):
    found = import_file(file(tmp_path, NAMED))
    runs = [
        {"attention_variant": "infinite", "n_head": n, "softmax_variant_attn": s, "n_qk_head_dim": d, "n_v_head_dim": d}
        | {
            "use_qk_norm": True,
            "use_qk_norm_scale": True,
            "use_rotary_embeddings": True,
            "use_abs_pos_embeddings": False,
        }
        for s in ("softmax", "relu2max")
        for n in (1, 2, 3)
        for d in (32, 48)
    ] + [{"n_head": n, "use_post_ln": post} for n in (6, 12) for post in (True, False)]
    wanted = [plain(built(settings(Flags({**run, "max_iters": 100})))) for run in runs]
    got = searched(found)
    assert len(got) == len(wanted) == 16 == found.runs
    assert sorted(map(json.dumps, got)) == sorted(map(json.dumps, wanted))


def test_everything_that_is_left_out_or_changed_is_told(tmp_path):
    notes = "\n".join(import_file(file(tmp_path, NAMED)).notes)
    for line in (
        "named group idle (no run uses it)",
        "4 of 20 runs: optimizer=muon",
        "never_save_checkpoint (which checkpoints",
        "device (the machine",
        "hsnorm_radius (nothing that these runs choose reads it)",
        "changed: dtype: float16 becomes bf16",
        "changed: norm_variant_attn: rmsnorm had no eps",
    ):
        assert line in notes
    assert "changed: window_size" not in notes


def test_products_stay_products(tmp_path):
    found = import_file(file(tmp_path, {"n_head": [2, 4], "learning_rate": [0.1, 0.2, 0.3], "bias": [True, False]}))
    assert found.tree["vary"] == {
        "model.attention.n_heads": [2, 4],
        "model.bias": [True, False],
        "optim.lr": [0.1, 0.2, 0.3],
    }


def test_boxes_hold_each_point_once():
    points = [{"a": a, "b": b} for a in (1, 2, 3) for b in (1, 2) if (a, b) != (3, 1)] + [{"a": 1}]
    found = boxes(points)
    held = [dict(zip(box, pair, strict=True)) for box in found for pair in _product(list(box.values()))]
    assert sorted(map(json.dumps, held)) == sorted(map(json.dumps, points)) and len(found) == 3


def _product(lists):
    return [(x, *rest) for x in lists[0] for rest in _product(lists[1:])] if lists else [()]


def test_a_part_of_another_kind_brings_all_its_options(tmp_path):
    fixed, vary = arrange([settings(Flags({"n_head": 3})), settings(Flags({"n_head": 3, **INFINITE}))])
    assert {key: fixed[key] for key in fixed if "attention" in key} == {
        "model.attention": {"kind": "causal", "n_heads": 3}
    }
    assert [group["model.attention"] for group in vary["parameter_groups"]] == ["causal", "infinite"]
    assert vary["model.attention.n_heads"] == 3


def test_seeds_become_seeds(tmp_path):
    tree = import_file(file(tmp_path, {"seed": [5, 6, 7], "n_head": [2, 4]})).tree
    assert (tree["seeds"], tree["first_seed"], tree["vary"]) == (3, 5, {"model.attention.n_heads": [2, 4]})
    notes = import_file(file(tmp_path, {"seed": [5, 9]})).notes
    assert any("seed: [5, 9] become 2" in line for line in notes)


def test_other_batches_mean_other_numbers_of_tokens(tmp_path):
    found = import_file(file(tmp_path, {"batch_size": [16, 24], "max_iters": 10, "block_size": 64, "eval_iters": 2}))
    configs = [build(TrainConfig, config) for config in searched(found)]
    assert [(c.batch_tokens, c.tokens, c.micro_batch) for c in configs] == [(1024, 10240, 8), (1536, 15360, 8)]
    assert {c.eval_tokens for c in configs} == {2 * 24 * 64}


def test_default_and_null_leave_a_flag_to_its_default(tmp_path):
    configs = all_settings(tmp_path, {"n_head": ["default", 12, None]}, "a.yaml")
    assert sorted(json.loads(c)["model"]["attention"]["n_heads"] for c in configs) == [6, 12]


def test_settings_that_cannot_be_are_told(tmp_path):
    notes = import_file(file(tmp_path, {"n_embd": [384, 100], "n_head": 6})).notes
    assert any(
        line.startswith("refused: 1 of 2 settings: attention=causal: d_model=100 is not divisible") for line in notes
    )


GREEDY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "window_size": 31, "mlp_size_layerlist": [100, 200], "max_iters": 9}


def test_a_greedy_search_steps_along_the_same_settings(tmp_path):
    names, steps = ["n_layer", "n_embd", "window_size", "learning_rate"], [1.0, 64.0, 16.0, 0.001]
    found = import_greedy(file(tmp_path, GREEDY), names, steps)
    assert found.tree["rule"] == "greedy" and found.tree["vary"] == {
        "model.n_layers": {"increment": 1},
        "model.d_model": {"increment": 64},
        "model.attention.window": {"increment": 16},
        "optim.lr": {"increment": 0.001},
    }
    assert [layer["hidden"] for layer in found.tree["fixed"]["model.mlp"]] == [100, 200]  # a list is a value there
    assert found.tree["fixed"]["model.attention.window"] == 32 and found.tree["fixed"]["steps"] == 9
    Space.read(found.tree["vary"])


def test_greedy_results_go_on_from_their_last_baseline(tmp_path):
    log = {
        "baseline_config": {"n_layer": 2},
        "iterations": [{"iter": -1}, {"baseline_config_after": {"n_layer": 4}}, {}],
    }
    assert import_greedy(file(tmp_path, log), ["n_head"], [1.0]).tree["fixed"]["model.n_layers"] == 4


def test_steps_that_change_two_settings_or_no_number_are_refused(tmp_path):
    path = file(tmp_path, {"mlp_variant": "swiglu"})
    with pytest.raises(InputError, match=r"a step of n_embd changes model\.d_model, model\.mlp\.hidden"):
        import_greedy(path, ["n_embd"], [64.0])
    with pytest.raises(InputError, match="mlp_variant=swiglu is no number"):
        import_greedy(path, ["mlp_variant"], [1.0])


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"n_layers": 3}, "n_layers is no flag of the laboratory; did you mean 'n_layer'?"),
        ({"n_embd": "wide"}, "n_embd='wide' is no number"),
        ({"n_head": 2.5}, "n_head=2.5 is no whole number"),
        ({"use_qk_norm": "often"}, "use_qk_norm='often' is neither true nor false"),
        ({"norm_variant_attn": "rmsnrom"}, "did you mean 'rmsnorm'?"),
        ({"init_from": "gpt2"}, "give fixed.init_from="),
        ({"dataset": ["a", "b"]}, "dataset=a out=..."),
        ({"common_group": {"n_head": 3}, "n_head": [1, 2]}, "stands in common_group"),
        ({"n_head": {"options": [1], "conditions": [["n_layer", 9]]}, "n_layer": [1, 2]}, "can never be true"),
        ([1, 2], "a mapping, a list of mappings"),
    ],
)
def test_errors_name_the_flag_and_what_would_do(tmp_path, flags, says):
    with pytest.raises(InputError) as error:
        import_file(file(tmp_path, flags))
    assert says in str(error.value) and str(error.value).startswith(str(tmp_path / "old.yaml"))


def test_broken_files_are_named_with_their_line(tmp_path):
    with pytest.raises(InputError, match=r"old.yaml line 2"):
        import_file(file(tmp_path, "a: 1\nb: [1}\n"))
    with pytest.raises(InputError, match=r"old.json line 1"):
        import_file(file(tmp_path, "[{,}]", "old.json"))
    with pytest.raises(InputError, match="'a' stands twice"):
        import_file(file(tmp_path, "a: 1\na: 2\n"))


def test_flags_of_another_version_are_left_out_when_asked(tmp_path):
    path = file(tmp_path, {"n_head": [2, 4], "wq_weight_norm": [True]})
    with pytest.raises(InputError, match="ignore=wq_weight_norm"):
        import_file(path)
    assert "left out: wq_weight_norm (as asked" in "\n".join(import_file(path, ignore=["wq_weight_norm"]).notes)


def test_our_own_search_files_are_not_taken_for_the_laboratorys(tmp_path):
    assert not any(is_laboratory(path) for path in SPACES.glob("*.yaml"))
    assert is_laboratory(file(tmp_path, BASE)) and is_laboratory(file(tmp_path, NAMED))


def test_patterns_of_left_out_names_take_none_that_is_translated():
    assert not is_flag("n_layers")
    for pattern in LEFT_OUT:
        assert left_out(pattern.replace("*", "x")) is not None, pattern


# ---- the command

SMALL = """
- {dataset: tiny, n_layer: 1, n_head: 2, n_embd: 16, block_size: 32, batch_size: 4, max_iters: 3, eval_interval: 3,
   eval_iters: 2, dtype: float32, device: cpu, activation_variant: [gelu, squared_relu], seed: 5}
"""


def test_a_search_runs_from_the_laboratorys_own_file(tmp_path, capsys):
    data = make_tokens(tmp_path / "data")
    words = [str(file(tmp_path, SMALL)), f"data={data}", f"out={tmp_path / 'out'}", "track=none", "parallel=0"]
    assert search.main(words) == 0
    said = capsys.readouterr().out
    assert "left out: device (the machine" in said and "2 trials" in said
    trials = Ledger(tmp_path / "out").trials
    assert [(t.ask.settings["model.mlp.activation"], t.ask.seed) for t in trials] == [
        ("gelu", 5),
        ("relu2", 5),
    ]
    assert search.main(words) == 0  # the same file goes on from the ledger
    assert len(Ledger(tmp_path / "out").trials) == 2


def test_a_search_begins_though_its_sizes_vary(tmp_path):
    data = make_tokens(tmp_path / "data")
    flags = {"n_embd": [90, 70], "n_head": {"options": [5, 6], "conditions": [["n_embd", 90]]}, "block_size": [24, 40]}
    found = import_file(file(tmp_path, {**flags, "attention_variant": ["causal", "identity"], "batch_size": 3}))
    words = [*found.words(), f"data={data}", f"out={tmp_path / 'out'}", "track=none"]
    _, study = search.prepare(assemble(words, SearchConfig))
    points = [point for point in study.space.points() if not study.refuses(point)]
    seen = {json.dumps(plain(study.train_config(point, 1).model)) for point in points}
    wanted = [
        settings(Flags({"n_embd": 90, "n_head": n, "block_size": t, "attention_variant": a, "batch_size": 3}))
        for n in (5, 6)
        for t in (24, 40)
        for a in ("causal", "identity")
    ]
    assert {json.dumps(plain(dc.replace(built(one).model, vocab_size=128))) for one in wanted} <= seen


def test_import_prints_or_writes_a_search_file(tmp_path, capsys):
    path = file(tmp_path, SMALL)
    assert search.main(["import", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# old.yaml: 2 runs of the laboratory, here 2 settings\n")
    assert search.main(["import", str(path), f"out={tmp_path / 'new' / 'ours.yaml'}"]) == 0
    assert (tmp_path / "new" / "ours.yaml").read_text() == printed
    assert "next: python -m pipelines.search" in capsys.readouterr().out
    assert search.main(["import", str(path), f"out={tmp_path / 'new' / 'ours.yaml'}"]) == 2
    assert "exists; choose another" in capsys.readouterr().err


def test_command_errors_are_one_line(tmp_path, capsys):
    path = file(tmp_path, {"n_layer": 2, "n_hed": [1, 2]})
    for words in ([str(path), "data=x", "out=y"], ["import", str(path)]):
        assert search.main(words) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: n_hed is no flag of the laboratory; did you mean")


def test_help_of_import_names_its_settings(capsys):
    assert search.main(["import", "--help"]) == 0
    assert "dataset=null" in capsys.readouterr().out


def test_a_config_error_is_what_refuses():
    with pytest.raises(ConfigError):
        built({**settings(Flags({})), "model.d_model": 7})
