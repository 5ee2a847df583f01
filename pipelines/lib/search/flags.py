"""The flags of the modular laboratory (ReaLLM-Forge's train.py): their defaults, and what they are called here.

`FLAGS` holds those that a run is translated by (flag_runs.py and flag_parts.py: several of them make one of our parts),
`LEFT_OUT` those without a counterpart: of no effect on what is computed, or of none in the laboratory itself, or absent
here. An absent one stands with the value that means "off"; a run that has it on cannot be translated.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import Any

from models.spec import near

ANY: Any = object()


@dataclass(frozen=True)
class Flag:
    """A flag that runs are translated by.

    default: of the laboratory's command line
    ours: the setting it becomes
    note: where its meaning differs, for the value `when`; `ANY`: for every value but the default
    """

    default: Any
    ours: str
    note: str = ""
    when: Any = ANY

    def changes(self, value: Any) -> bool:
        """Whether a value means something else here."""
        return bool(self.note) and (value != self.default if self.when is ANY else value == self.when)


@dataclass(frozen=True)
class LeftOut:
    """reason: why.  off: the value that changes nothing; `ANY`: no value does."""

    reason: str
    off: Any


FLAGS: dict[str, Flag] = {
    # size
    "n_layer": Flag(6, "model.n_layers"),
    "n_head": Flag(6, "model.attention.n_heads"),
    "n_kv_group": Flag(None, "model.attention.n_kv_heads"),
    "n_embd": Flag(384, "model.d_model"),
    "block_size": Flag(256, "model.seq_len, batch_tokens"),
    "dropout": Flag(0.0, "model.dropout"),
    "bias": Flag(False, "model.bias"),
    # norms
    "norm_variant_attn": Flag("rmsnorm", "model.norm", "rmsnorm had no eps there; it has 1e-6 here", "rmsnorm"),
    "norm_variant_output": Flag("rmsnorm", "model.final_norm"),
    "norm_variant_wte": Flag(None, "model.embedding_norm"),
    "norm_variant_abs": Flag(None, "model.position_norm"),
    "norm_variant_lm_head": Flag(None, "model.head_norm"),
    **{
        f"norm_{site}_{option}": Flag(None, f"model.{ours}_norm.{theirs}")
        for site, ours in (("wte", "embedding"), ("abs", "position"), ("lm_head", "head"))
        for option, theirs in (
            ("radius", "radius"),
            ("scale", "scale"),
            ("gain", "gain"),
            ("radius_learning", "learned_radius"),
        )
    },
    "prmsnorm_pct": Flag(0.0625, "norm prmsnorm: fraction"),
    "krmsnorm_num": Flag(10, "norm krmsnorm: k"),
    "krmsnorm_quantize_type": Flag("none", "norm krmsnorm: bits"),
    "krmsnorm_selection_type": Flag("last", "norm krmsnorm: which"),
    "krmsnorm_recompute_percentage": Flag(None, "norm krmsnorm: fallback"),
    "hsnorm_gain": Flag(False, "norm hypersphere: gain"),
    "hsnorm_radius": Flag(None, "norm hypersphere: radius"),
    "hsnorm_scale": Flag(1.0, "norm hypersphere: scale"),
    "hsnorm_radius_learning": Flag(False, "norm hypersphere: learned_radius"),
    "dact_activation": Flag("tanh", "norm dyt: activation"),
    "dact_alpha_init": Flag(1.0, "norm dyt: alpha"),
    "dact_use_alpha": Flag(True, "norm dyt: alpha, learned_alpha"),
    "dact_use_gamma": Flag(True, "norm dyt: gain"),
    "dact_use_beta": Flag(True, "norm dyt: bias"),
    # placement and residual
    **{
        f"use_{name}_ln{site}": Flag(None if site else name == "pre", f"model.{'mlp_' * (site == '_mlp')}placement")
        for name in ("pre", "peri", "post")
        for site in ("", "_attn", "_mlp")
    },
    "use_parallel_mlp": Flag(False, "model.parallel"),
    **{
        f"{site}_{name}": Flag(default, f"model.{'mlp_' * (site == 'mlp')}residual", note)
        for site in ("attn", "mlp")
        for name, default, note in (
            ("residual_combination", "add", ""),
            ("residual_alpha", 0.05, ""),
            (
                "residual_alpha_type",
                "fixed",
                "dot starts at alpha^2, as there, and its direction is divided by sqrt(D)",
            ),
            ("confidence_variant", "zeros", ""),
            ("resid_const", 0.0, ""),
        )
    },
    "residual_slerp_eps": Flag(0.0, "residual slerp: eps", "0 divided 0 by 0 there; it is 1e-3 here"),
    **{
        f"{word}{site}_{name}": Flag(False, f"model.{'mlp_' * (site == 'mlp')}residual confidence")
        for site in ("attn", "mlp")
        for word, name in (("use_", "resid_scaling"), ("use_", "resid_const"), ("learn_", "resid_const"))
    },
    # attention
    "attention_variant": Flag(
        "causal", "model.attention", "linear was diagonal and stays so; kind linear here is the usual one"
    ),
    "attention_list": Flag(None, "model.attention, one per layer, again from the first"),
    "use_qk_norm": Flag(False, "model.attention.qk_norm: l2"),
    "use_qk_norm_scale": Flag(
        False, "attention qk_norm l2: scale, learned", "their fused path scaled by another power of the head size"
    ),
    "qk_norm_scale": Flag(None, "attention qk_norm l2: scale"),
    "use_v_norm": Flag(False, "model.attention.v_norm"),
    "window_size": Flag(None, "model.attention.window", "W meant W + 1 keys there, so it is W + 1 here"),
    "gate": Flag(False, "model.attention.gate: elementwise", "theirs was drawn anew in every forward; ours is trained"),
    "attn_logit_softcapping": Flag(None, "model.attention.softcap", "`true` meant a cap of 1.0 there"),
    "final_logit_softcapping": Flag(None, "model.logit_softcap", "`true` meant a cap of 1.0 there"),
    "use_flash_lobo": Flag(False, "model.attention.sink: learned", "no token saw itself there; here it does"),
    "use_flash_lobo_per_head": Flag(False, "model.attention.sink: head"),
    "use_flash_obo_const": Flag(False, "model.attention.sink: fixed"),
    "flash_lobo_log_const": Flag(0.0, "attention sink: score"),
    "n_qk_head_dim": Flag(None, "model.attention.head_dim"),
    "n_v_head_dim": Flag(None, "model.attention.v_head_dim"),
    "use_concat_heads": Flag(False, "model.attention.merge"),
    **{
        f"l2_norm_attn_{site}{dim}": Flag("embed" if dim else False, f"model.attention.{ours}: unit_rows")
        for site, ours in (("q", "linear"), ("k", "linear"), ("v", "linear"), ("cproj", "out_linear"))
        for dim in ("", "_dim")
    },
    "use_mla_lobo": Flag(False, "attention mla: sink", "the constant was added after the maximum was taken off there"),
    "mla_lobo_init": Flag(0.0, "attention mla: sink score"),
    "ssm_mamba_expand": Flag(2, "attention ssm: expand"),
    "ssm_conv_kernel_size": Flag(3, "attention ssm: conv"),
    "ssm_dt_rank": Flag(8, "attention ssm: dt_rank"),
    "ssm_d_state": Flag(16, "attention ssm: state"),
    "ssm_io_bias": Flag(False, "attention ssm: bias"),
    # softmax
    "softmax_variant_attn": Flag("softmax", "model.attention.softmax"),
    "div_by_seq_len": Flag(False, "softmax: per_key", "divided by the row's length there, by the visible keys here"),
    "consmax_initial_beta": Flag(2.5, "softmax consmax: beta"),
    "consmax_initial_gamma": Flag(100.0, "softmax consmax: gamma"),
    "consmax_use_euler_base": Flag(True, "softmax consmax: base"),
    "consmax_base": Flag(2.0, "softmax consmax: base"),
    "consmax_per_head": Flag(True, "softmax consmax_v2 (per head) or consmax"),
    "consmax_saturation": Flag(11.0, "softmax saturatingconsmax: saturation", "the curve fell there; it is flat here"),
    "consmax_learnable_beta": Flag(True, "softmax saturatingconsmax: learn_beta"),
    "consmax_learnable_gamma": Flag(True, "softmax saturatingconsmax: learn_gamma"),
    "polymax_x_intercept": Flag(-100.0, "softmax polymax: start"),
    "polymax_y_intercept": Flag(1.0, "softmax polymax: height"),
    "polymax_power": Flag(2.0, "softmax polymax: power"),
    "polymax_divisor": Flag(1000.0, "softmax polymax: divisor"),
    "relumax_divisor": Flag(256.0, "softmax relumax: divisor"),
    "relu2max_divisor": Flag(256.0, "softmax relu2max: divisor"),
    "sigmoidmax_divisor": Flag(256.0, "softmax sigmoid: divisor"),
    "sigsoftmax_use_euler_base": Flag(True, "softmax sigsoftmax: base"),
    "sigsoftmax_base": Flag(2.0, "softmax sigsoftmax: base"),
    "strongermax_strength": Flag(math.e, "softmax strongermax: base"),
    "strongermax_div_by_sum_of_terms": Flag(True, "softmax strongermax: normalise"),
    "strongermax_divisor": Flag(1.0, "softmax strongermax: divisor"),
    "strongermax_use_xmax": Flag(True, "softmax strongermax: max_guess"),
    "strongermax_xmax_guess": Flag(None, "softmax strongermax: max_guess"),
    "strongermax_obo": Flag(0.0, "softmax strongermax: obo", "added after the maximum was taken off there"),
    "strongermax_use_learned_obo": Flag(False, "softmax strongermax: learn_obo"),
    "strongermax_use_learned_obo_per_head": Flag(False, "softmax strongermax: obo_per_head"),
    "strongermax_temperature_factor": Flag(1.0, "softmax strongermax: temperature"),
    "strongermax_use_learned_temperature_factor": Flag(False, "softmax strongermax: learn_temperature"),
    "exppolymax_use_euler_base": Flag(True, "softmax exppolymax: base"),
    "exppolymax_base": Flag(4.0, "softmax exppolymax: base"),
    "exppolymax_power": Flag(2.0, "softmax exppolymax: power", "jumped at 0 there; it is continuous here"),
    "exppolymax_divisor": Flag(1000.0, "softmax exppolymax: divisor"),
    "softplus_divisor": Flag(256.0, "softmax softplus, softplus2: divisor"),
    "squareplus_divisor": Flag(100.0, "softmax squareplus: divisor"),
    "softshrink_attn_lambda": Flag(0.5, "softmax softshrink: threshold"),
    "softshrink_attn_divisor": Flag(64.0, "softmax softshrink: divisor"),
    "pfla_softmax_num_points": Flag(
        30, "softmax pfla: knots", "an increasing curve here, from softplus instead of gelu"
    ),
    "pfla_softmax_left_bound": Flag(-10.0, "softmax pfla: span"),
    "pfla_softmax_right_bound": Flag(10.0, "softmax pfla: span"),
    "pfla_softmax_use_obo": Flag(False, "softmax pfla: obo"),
    "pfla_softmax_obo": Flag(0.0, "softmax pfla: obo"),
    # positions
    "use_abs_pos_embeddings": Flag(True, "model.position: learned"),
    "absolute_pos_embedding_variant": Flag("learned", "model.position: learned, cyclic"),
    "cyclic_abs_pos_cycle_lengths": Flag(None, "position cyclic: lengths"),
    "cyclic_abs_pos_randomize_starts": Flag(False, "position cyclic: random_phase"),
    "use_rotary_embeddings": Flag(False, "model.position: rotary", "turned pairs are halves apart here: a permutation"),
    "rope_variant": Flag("rope", "model.position: rotary, soap"),
    "rope_length": Flag(None, "position rotary, soap: fraction"),
    "sym_rot_num_angles": Flag(512, "position soap: steps"),
    "use_fire_embeddings": Flag(False, "model.position: fire"),
    "shared_fire_embeddings": Flag(False, "position fire: shared"),
    "fire_log_bias": Flag(1.0, "position fire: b"),
    "fire_num_hidden_layers": Flag(1, "position fire: hidden"),
    "fire_mlp_width": Flag(32, "position fire: width"),
    "fire_init_c": Flag(0.1, "position fire: c"),
    "fire_init_L": Flag(512.0, "position fire: threshold"),
    "fire_outermost_sigma": Flag(False, "position fire: final_relu"),
    # MLP
    "mlp_variant": Flag("mlp", "model.mlp"),
    "mlp_size": Flag(None, "model.mlp.hidden"),
    "mlp_expansion_factor": Flag(4, "model.mlp.hidden"),
    "mlp_up_bias": Flag(None, "model.mlp.up_bias"),
    "mlp_down_bias": Flag(None, "model.mlp.down_bias"),
    "mlp_x_offset": Flag(0.0, "model.mlp.x_offset"),
    "mlp_y_offset": Flag(0.0, "model.mlp.y_offset"),
    "learn_mlp_x_offset": Flag(False, "model.mlp.learned_offsets"),
    "learn_mlp_y_offset": Flag(False, "model.mlp.learned_offsets"),
    "l2_norm_mlp_up": Flag(False, "model.mlp.linear: unit_rows"),
    "l2_norm_mlp_down": Flag(False, "model.mlp.down_linear: unit_rows"),
    "l2_norm_mlp_up_dim": Flag("embed", "model.mlp.linear: unit_rows"),
    "l2_norm_mlp_down_dim": Flag("hidden", "model.mlp.down_linear: unit_rows"),
    "activation_variant": Flag("gelu", "model.mlp.activation"),
    "relu_power": Flag(2.0, "activation relu_power: power"),
    "shifted_gelu_initial_shift": Flag(0.0, "activation gelu_shifted: shift"),
    "softshrink_lambda": Flag(0.5, "activation softshrink: threshold"),
    "pla_num_points": Flag(7, "activation piecewise: knots"),
    "pla_left_bound": Flag(-2.0, "activation piecewise: span"),
    "pla_right_bound": Flag(2.0, "activation piecewise: span"),
    "pfla_num_points": Flag(50, "activation pfla, pfla_le: knots"),
    "pfla_left_bound": Flag(-10.0, "activation pfla, pfla_le: span"),
    "pfla_right_bound": Flag(10.0, "activation pfla, pfla_le: span"),
    "kan_poly_order": Flag(3, "mlp kan: order", "inputs were squashed with a look ahead there; by tanh here"),
    "kan_base_activation": Flag("silu", "mlp kan: activation"),
    "kan_middle_layers": Flag([], "mlp kan: middle"),
    "use_moe": Flag(False, "model.mlp: moe, one per layer"),
    "moe_layer_freq": Flag(2, "model.mlp: the layers that are moe"),
    "n_experts": Flag(8, "mlp moe: n_experts"),
    "moe_top_k": Flag(2, "mlp moe: top_k"),
    "moe_router_scheme": Flag("softmax", "mlp moe: noisy", "noise was added to the wrong tensor there"),
    # linear layers
    "linear_variant_attn": Flag("linear", "model.attention.linear"),
    "linear_variant_mlp": Flag("linear", "model.mlp.linear"),
    **{
        f"linear_variant_{site}": Flag(None, ours)
        for site, ours in (
            ("q", "model.attention.linear"),
            ("k", "model.attention.linear"),
            ("v", "model.attention.linear"),
            ("attn_proj", "model.attention.out_linear"),
            ("mlp_up", "model.mlp.linear"),
            ("mlp_down", "model.mlp.down_linear"),
        )
    },
    "quant_scheduler": Flag(None, "linear quantised"),
    "start_quant_level": Flag(0.0, "linear quantised"),
    "quantize_linear_method": Flag("affine_quant", "linear quantised: method", "from the first step here, no warm-up"),
    "quantize_linear_bits": Flag(8, "linear quantised: weight_bits"),
    "adaptive_linear_init_bits": Flag(8.0, "linear adaptive_bits: bits"),
    "adaptive_linear_min_bits": Flag(1.0, "linear adaptive_bits: low"),
    "adaptive_linear_max_bits": Flag(8.0, "linear adaptive_bits: high"),
    "adaptive_linear_activation_bits": Flag(8.0, "linear adaptive_bits: activation_bits"),
    # embedding and initialisation
    "wte_weight_tying": Flag(True, "model.tie_embeddings"),
    "n_embd_wte": Flag(None, "model.embedding: factored, rank"),
    "n_embd_wte_scale_tying": Flag(True, "embedding factored: tied"),
    "use_embedding_scale": Flag(False, "model.embedding.scale: learned"),
    "embedding_std_init": Flag(0.02, "model.init_std"),
    "linear_std_init": Flag(0.02, "model.init_std"),
    # sharing and depth
    **{
        f"shared_{site}_{name}": Flag(default, f"model.share_{ours}")
        for site, ours in (("attn", "attention"), ("mlp", "mlp"))
        for name, default in (("size", 1), ("sym", False), ("seq", 1))
    },
    **{
        f"{name}_layerlist": Flag(None, f"{ours}, one per layer, again from the first")
        for name, ours in (
            ("n_head", "model.attention.n_heads"),
            ("n_kv_group", "model.attention.n_kv_heads"),
            ("n_qk_head_dim", "model.attention.head_dim"),
            ("n_v_head_dim", "model.attention.v_head_dim"),
            ("window_size", "model.attention.window"),
            ("attention_variant", "model.attention"),
            ("use_rotary_embeddings", "model.position"),
            ("mlp_size", "model.mlp.hidden"),
        )
    },
    "use_ln_f_input_mixer": Flag(False, "model.depth"),
    "ln_f_input_mixer_variant": Flag("linear", "model.depth: weighted, routed"),
    "ln_f_mixer_top_k": Flag(2, "depth routed: top_k"),
    # training
    "dataset": Flag("shakespeare_char", "data", "the folder of tokens is given as data="),
    "max_iters": Flag(3500, "steps"),
    "max_tokens": Flag(None, "tokens"),
    "max_epochs": Flag(None, "epochs"),
    "training_limiters": Flag(["max_iters"], "steps, tokens or epochs"),
    "eval_interval": Flag(250, "eval_every"),
    "eval_iters": Flag(200, "eval_tokens", "as many tokens, but always the same ones"),
    "log_interval": Flag(10, "log_every"),
    "batch_size": Flag(64, "micro_batch, batch_tokens"),
    "gradient_accumulation_steps": Flag(1, "batch_tokens"),
    "learning_rate": Flag(1e-3, "optim.lr"),
    "optimizer": Flag(
        "adamw", "optim", "weight decay is of matrices and embeddings here, of everything there", "adamw"
    ),
    "beta1": Flag(0.9, "optim.betas"),
    "beta2": Flag(0.99, "optim.betas"),
    "adamw_eps": Flag(1e-8, "optim.eps"),
    "adamw_weight_decay": Flag(0.01, "optim.weight_decay"),
    "weight_decay": Flag(0.1, "optim.weight_decay", "was read by optimizers other than adamw only"),
    "lr_scheduler": Flag("none", "schedule"),
    "cosine_t_max": Flag(1000, "schedule: cosine"),
    "cosine_eta_min": Flag(0.0, "schedule cosine: min_ratio"),
    "grad_clip": Flag(1.0, "grad_clip"),
    "dtype": Flag("float16", "precision", "float16 becomes bf16, which needs no loss scaler", "float16"),
    "compile": Flag(False, "compile"),
    "seed": Flag(1337, "first_seed, seeds"),
    "patience": Flag(None, "patience", "stopped when P was exceeded there, so it is P + 1 here"),
    "loss_fn": Flag("cross_entropy", "loss", "validation is plain cross-entropy here, whatever is trained on"),
    "label_smoothing": Flag(0.1, "loss smoothed: epsilon"),
    "focal_gamma": Flag(2.0, "loss focal: gamma"),
    "correct_top1_attenuation": Flag(1.0, "loss attenuated: factor"),
    "top1_margin": Flag(0.1, "loss margin: margin"),
    "entropy_beta": Flag(0.01, "loss entropy: weight"),
    "flatness_beta": Flag(1.0, "loss flatness: weight"),
    "loss_schedule": Flag(None, "loss schedule: stages"),
    "use_gradient_checkpointing": Flag(False, "activation_checkpointing"),
}

# reason -> names, `*` for any letters
_WITHOUT_EFFECT = {
    "logging; a search writes metrics.jsonl, MLflow and results.yaml": (
        "log_* logs_* tensorboard_* wandb_* csv_* zeus_* timestamp create_statistics plot_statistics statistic "
        "graph_type box_plot_* print_model_info print_model_stats_table compute_model_stats model_stats_device "
        "eta_variant iteration_window eval_cycle_window softmax_io_* consmax_beta_gamma_logging l2_norm_print_dims "
        "per_token_metrics_dir dataset_benchmarks exploration_* name run_name_override store_activations"
    ),
    "where files go; the search's out= says it": "out_dir export_* onnx_output save_config_json quantization_data_file",
    "which checkpoints stay; keep= says it": (
        "save_major_ckpt_interval only_save_checkpoint_at_end always_save_checkpoint never_save_checkpoint"
    ),
    "samples; pipelines.sample does that": (
        "max_sample_tokens sample_* num_samples temperature top_k softmax_threshold cosine_penalty colorize_* show_* "
        "chart_type last_k_tokens token_boundary interactive stop_string eval_dataset eval_only"
    ),
    "the machine; the search's own settings say it": (
        "device backend disable_flash_attention use_flex_attn recompute_backward_pass"
    ),
    "the vocabulary comes with the data": "vocab_size",
    "of no use from scratch": (
        "gpt2_type prev_run_ckpt init_from_ckpt reset_best_val_loss_on_resume init_wte_npy import_*_freeze "
        "lsv_index lsv_variant apply_vector_scaling_factor"
    ),
    "numbers cannot overflow here": (
        "consmax_v2_clamping strongermax_clamping strongermax_clamp_value strongermax_overflow_recompute* "
        "softermax_use_xmax"
    ),
    "had no effect in the laboratory": "adamw_betas mla_latent_dim mla_rotary_dim lsa_num_knots softmax_variant_output",
    "had no effect in the laboratory: its rate stayed constant; fixed.schedule=cosine is the usual choice": (
        "warmup_iters min_lr decay_lr lr_decay_iters lr_decay_match_max_iters"
    ),
    "several last matrices of one vector equal one": "n_cproj n_cproj_layerlist mlp_down_projs",
    "every window is read once per pass here, in a shuffled order": "sampling_method",
}
_gradual = dict.fromkeys(("activation_start", "activation_end", "activation_transition_*"), ANY)
# reason -> {name: the value that means off}
_ABSENT: dict[str, dict[str, Any]] = {
    "begins with other weights; give fixed.init_from=": {"init_from": "scratch", "import_*": None},
    "a search compares runs of equal length, not of equal time": {"max_seconds": None},
    "the rank weighs by its logarithm here, loss=rank": {"rank_scale*": ANY},
    "join the folders by pipelines.tokenize streams, and give fixed.model.embedding=streams with their sizes": {
        "multicontext": False,
        "multicontext_datasets": None,
    },
    "several data sets with tables of their own, or numbers for tokens: a model here reads ids of one vocabulary": {
        "training_mode": "single",
        "multidataset_wte": False,
        "numerical_multicontext": False,
        "numerical_*": ANY,
        "norm_channel_*": ANY,
        "vocab_sizes": None,
        "dataset_list": None,
        "dataset_interleaving*": False,
        "dataset_sampling_*": None,
    },
    "distillation (tier D)": {"distillation_teacher_ckpt": None, "distillation_*": ANY, "passive_distillation*": False},
    "the gradient noise scale does not set the batch here": {
        "gns_type": None,
        "gns_target": None,
        "gns_*": ANY,
    },
    "steering vectors (tier D)": {
        "use_lsv": False,
        "lsv_focused_training": False,
        "apply_vector_*": None,
        "obtain_vector_*": None,
        "apply_lsv_at_layer_idx": None,
    },
    "the ASIC variants (tier D)": {"use_edgellm_asic": False, "use_gradual_activation": False, **_gradual},
    "Co4 (tier D)": {"n_latent": ANY, "triadic_loops": ANY, "mod_fn": ANY},
    "MeZO (tier D)": {"mezo_*": ANY},
    "embeddings start as N(0, init_std) here": {
        "init_variant": "gaussian",
        "init_scale": ANY,
        "init_radius": ANY,
        "gaussian_*_norm": ANY,
        "embedding_mean_init": 0.0,
        "linear_mean_init": 0.0,
        "embedding_scale_init": None,
        "wte_fixed_norm": False,
        "wte_fixed_norm_value": ANY,
    },
    "noise on embeddings is not offered": {
        "embedding_gaussian_noise_std": 0.0,
        "embedding_gaussian_noise_*_std": None,
        "embedding_gaussian_noise_*": ANY,
    },
    "quantised activations, embeddings and schedules of quantisation are not offered": {
        "quantize_wte": None,
        "quantize_wpe": None,
        "quantize_linear_*_method": None,
        "quantize_linear_*_bits": None,
        "quantize_*_bits": ANY,
        "quantize_*_method": ANY,
        "activations_quant_method": ANY,
        "quantize_*": False,
        "full_quant_iteration": ANY,
        "quantization_warmup_iters": ANY,
        "adaptive_linear_quantize_input": True,
    },
    "not offered": {
        "attention_residual_variant": "standard",
        "attention_residual_eps": ANY,
        "use_flash_norm": None,
        "krmsnorm_enable_gain": True,
        "resid_gaussian_*": ANY,
        "mlp_cproj_scale": 1.0,
        "mlp_post_act_l2_norm": False,
        "attn_cproj_scale": 1.0,
        "attn_post_act_l2_norm": False,
        "shifted_gelu_learnable_shift": True,
        "exppolymax_y_intercept": 1.0,
        "consmax_v2_clamp_value": 80.0,
        "relu2max_line_transition": ANY,
        "pfla_softmax_learn_x": False,
        "pfla_softmax_learn_y": True,
        "pfla_softmax_init_activation": ANY,
        "pfla_softmax_density": "linear",
        "pfla_softmax_use_learned_divisor": False,
        "pfla_softmax_gamma_init": ANY,
        "pfla_softmax_use_learned_obo": False,
        "pfla_softmax_mode": "linear",
    },
    "another optimizer's": {
        **dict.fromkeys(
            "sgd_* muon_* entropy_lr_boost adagrad_* rmsprop_* adams_* ademamix_* nadam_* asgd_* ortho_* lbfgs_* "
            "rprop_* adadelta_* adamax_* adafactor_* sophiag_* soap_* varlr_* adabelief_* adan_* lookahead_* opt_* "
            "adabound_* adamod_* lamb_* shampoo_* pid_* activation_decay activation_stat".split(),
            ANY,
        ),
    },
    "another schedule's": {"exponential_gamma": ANY, "step_lr_*": ANY, "plateau_*": ANY},
    "another loss's": dict.fromkeys(
        "top1_focus_alpha top1_ratio_beta bit_loss_* distance_top1_strength".split(),
        ANY,
    ),
}
LEFT_OUT: dict[str, LeftOut] = {
    **{name: LeftOut(reason, ANY) for reason, names in _WITHOUT_EFFECT.items() for name in names.split()},
    **{name: LeftOut(reason, off) for reason, flags in _ABSENT.items() for name, off in flags.items()},
}


def left_out(name: str) -> LeftOut | None:
    """Why a flag has no counterpart; None: it has one, or is unknown. An exact name goes before a pattern."""
    if name in FLAGS:
        return None
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    return next((found for pattern, found in LEFT_OUT.items() if fnmatch.fnmatchcase(name, pattern)), None)


def is_flag(name: str) -> bool:
    return name in FLAGS or left_out(name) is not None


def unknown(name: str) -> str:
    """What is wrong with a name that is no flag."""
    return f"{name} is no flag of the laboratory{near(name, [*FLAGS, *LEFT_OUT])}"
