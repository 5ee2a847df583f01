"""One run of the modular laboratory, given by its flags, as settings of ours: several flags make one part.

`settings(Flags(given))` are dotted keys of a training config; parts below them are mappings with `kind`. What the
laboratory computed is kept, with its defaults; what it meant to compute where it had a fault (flags.py says where).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.spec import near
from pipelines.lib.search.flag_parts import ADDED, Part, activation, attention, cap, mlp
from pipelines.lib.search.flag_values import Flags, Lacking, equal
from pipelines.lib.search.flags import ANY, left_out

# norms before, on the output of, and after a branch -> kind
PLACEMENTS = {
    (1, 0, 0): "pre",
    (0, 0, 1): "post",
    (1, 1, 0): "peri",
    (0, 1, 0): "output",
    (1, 0, 1): "pre_post",
    (1, 1, 1): "peri_post",
    (0, 1, 1): "output_post",
    (0, 0, 0): "none",
}


def settings(f: Flags) -> dict[str, Any]:
    """Dotted settings of a run. Raises Lacking, and InputError for what is no number."""
    for name, value in f.given.items():
        found = left_out(name)
        if found is not None and found.off is not ANY and value is not None and value != found.off:
            raise Lacking(f"{name}={value} ({found.reason})")
    return {**model(f), **training(f)}


# ---- the model


def model(f: Flags) -> dict[str, Any]:
    d, n = f.number("n_embd"), f.number("n_layer")
    init = f.number("embedding_std_init")
    if init != f.number("linear_std_init"):
        raise Lacking("linear_std_init and embedding_std_init of two sizes")
    attentions, positions = zip(*(attention(f, i) for i in range(n)), strict=True)
    out: dict[str, Any] = {
        "model": "gpt",
        "model.d_model": d,
        "model.n_layers": n,
        "model.seq_len": f.number("block_size"),
        **spread("model.attention", list(attentions)),
        **spread("model.mlp", [mlp(f, i, d) for i in range(n)]),
        "model.norm": norm(f, "norm_variant_attn"),
        "model.position": positions[0] if equal(positions) else list(positions),
        **placement(f),
        "model.embedding": embedding(f, d),
        "model.embedding_norm": norm(f, "norm_variant_wte", "norm_wte"),
        "model.position_norm": norm(f, "norm_variant_abs", "norm_abs"),
        "model.depth": depth(f),
        "model.final_norm": norm(f, "norm_variant_output"),
        "model.head_norm": norm(f, "norm_variant_lm_head", "norm_lm_head"),
        "model.logit_softcap": cap(f("final_logit_softcapping")),
        "model.tie_embeddings": f("wte_weight_tying"),
        "model.share_attention": sharing(f, "attn"),
        "model.share_mlp": sharing(f, "mlp"),
        "model.bias": f("bias"),
        "model.dropout": f.number("dropout"),
        "model.init_std": init,
    }
    if isinstance(out["model.position"], list) and any(p["kind"] in ADDED or "absolute" in p for p in positions):
        raise Lacking("absolute positions beside others that only some layers have")
    return out


def spread(key: str, parts: list[Part]) -> dict[str, Any]:
    """One part for all layers, its options as keys of their own; or a list with one part per layer."""
    if not equal(parts):
        return {key: parts}
    return {key: parts[0]["kind"], **{f"{key}.{name}": value for name, value in parts[0].items() if name != "kind"}}


def placement(f: Flags) -> dict[str, Any]:
    """Norms around branches, and how these join the stream."""
    found: dict[str, Any] = {}
    for site in ("attn", "mlp"):
        places: Any = tuple(
            int(bool(f(f"use_{at}_ln") if f(f"use_{at}_ln_{site}") is None else f(f"use_{at}_ln_{site}")))
            for at in ("pre", "peri", "post")
        )
        found[f"{site}_placement"] = PLACEMENTS[places]
        found[f"{site}_residual"] = residual(f, site)
    parallel = bool(f("use_parallel_mlp"))
    if parallel and found["attn_placement"] != "pre":
        raise Lacking(f"use_parallel_mlp with other norms than one before both branches ({found['attn_placement']})")
    out: dict[str, Any] = {"model.parallel": parallel}
    for name in ("placement", "residual"):
        own = found[f"mlp_{name}"]
        out[f"model.{name}"] = found[f"attn_{name}"]
        out[f"model.mlp_{name}"] = None if parallel or own == found[f"attn_{name}"] else own
    return out


def residual(f: Flags, site: str) -> Part:
    rule = f.one_of(
        f"{site}_residual_combination", {"add": "add", "rezero": "scaled", "lerp": "scaled", "slerp": "slerp"}
    )
    if f(f"use_{site}_resid_scaling"):
        f.one_of(f"{site}_confidence_variant", {"zeros": 0}, ("ones", "gaussian"))
        if rule != "add":
            raise Lacking(f"use_{site}_resid_scaling with {site}_residual_combination")
        constant = f.number(f"{site}_resid_const") if f(f"use_{site}_resid_const") else 0.0
        return {
            "kind": "confidence",
            "constant": float(constant),
            "learned": bool(f(f"use_{site}_resid_const") and f(f"learn_{site}_resid_const")),
        }
    if rule == "add":
        return {"kind": "add"}
    alpha = float(f.number(f"{site}_residual_alpha"))
    types = {
        "fixed": {"alpha": alpha, "learned": False},
        "learned": {"alpha": alpha, "learned": True},
        "rezero": {"alpha": 0.0, "learned": True},
        "dot": {"alpha": alpha**2, "learned": True, "gated": True},
    }
    part = {"kind": rule, **f.one_of(f"{site}_residual_alpha_type", types)}
    if rule == "slerp":
        if "gated" in part:
            raise Lacking(f"{site}_residual_combination=slerp with {site}_residual_alpha_type=dot")
        eps = f.number("residual_slerp_eps")
        part |= {"eps": float(eps)} if eps else {}
    return part


def norm(f: Flags, name: str, own: str = "") -> Part | None:
    """own: what the flags begin with that go before hsnorm_*."""
    if f(name) is None:
        return None

    def sphere(option: str) -> Any:
        value = f(f"{own}_{option}") if own else None
        return f(f"hsnorm_{option}") if value is None else value

    def krmsnorm() -> Part:
        bits = f.one_of("krmsnorm_quantize_type", {"none": None, "int8": 8, "int16": 16})
        which = f.one_of("krmsnorm_selection_type", {w: w for w in ("first", "last", "random")})
        fallback = f("krmsnorm_recompute_percentage")
        return {"kind": "krmsnorm", "k": f.number("krmsnorm_num"), "which": which, "bits": bits, "fallback": fallback}

    def hypersphere() -> Part:
        return {
            "kind": "hypersphere",
            "radius": sphere("radius"),
            "learned_radius": sphere("radius_learning"),
            "gain": sphere("gain"),
            "scale": float(sphere("scale")),
        }

    def dyt() -> Part:
        alpha = {"alpha": float(f.number("dact_alpha_init")), "learned_alpha": True}
        if not f("dact_use_alpha"):
            alpha = {"alpha": 1.0, "learned_alpha": False}
        act = activation(f, "dact_activation")
        return {"kind": "dyt", **alpha, "activation": act, "gain": f("dact_use_gamma"), "bias": f("dact_use_beta")}

    kinds: dict[str, Callable[[], Part]] = {
        "layernorm": lambda: {"kind": "layernorm"},
        "rmsnorm": lambda: {"kind": "rmsnorm", "eps": 1e-6},
        "prmsnorm": lambda: {"kind": "prmsnorm", "fraction": float(f.number("prmsnorm_pct"))},
        "krmsnorm": krmsnorm,
        "hyperspherenorm": hypersphere,
        "cappedhyperspherenorm": lambda: {"kind": "capped"},
        "dact": dyt,
        "identity": lambda: {"kind": "identity"},
    }
    return f.one_of(name, kinds)()


def embedding(f: Flags, d: int) -> Part:
    scale = "learned" if f("use_embedding_scale") else "none"
    rank = f("n_embd_wte")
    if rank is None or rank == d:
        return {"kind": "table", "scale": scale}
    return {"kind": "factored", "rank": rank, "tied": f("n_embd_wte_scale_tying"), "scale": scale}


def depth(f: Flags) -> Part:
    if not f("use_ln_f_input_mixer"):
        return {"kind": "last"}
    kinds = {"linear": {"kind": "weighted"}, "router_topk": {"kind": "routed", "top_k": f("ln_f_mixer_top_k")}}
    return f.one_of("ln_f_input_mixer_variant", kinds, ("router_top1", "decoder"))


def sharing(f: Flags, site: str) -> Part:
    size, cycle, mirror = (f(f"shared_{site}_{name}") for name in ("size", "seq", "sym"))
    if size == 1 and cycle == 1 and not mirror:
        return {"kind": "own"}
    return {"kind": "shared", "size": size, "cycle": None if cycle == 1 else cycle, "mirror": mirror}


# ---- training


def training(f: Flags) -> dict[str, Any]:
    rows, width, steps = f.number("batch_size"), f.number("block_size"), f.number("gradient_accumulation_steps")
    clip, patience = f.number("grad_clip"), f("patience")
    return {
        **optimizer(f),
        **schedule(f),
        "batch_tokens": rows * steps * width,
        "micro_batch": rows,
        **length(f),
        "patience": None if patience is None else patience + 1,
        "grad_clip": float(clip) if clip else None,
        "loss": loss(f),
        "precision": f.one_of("dtype", {"float16": "bf16", "bfloat16": "bf16", "float32": "fp32"}),
        "activation_checkpointing": f("use_gradient_checkpointing"),
        "compile": f("compile"),
        "eval_every": f.number("eval_interval"),
        "eval_tokens": f.number("eval_iters") * rows * width,
        "log_every": f.number("log_interval"),
    }


def optimizer(f: Flags) -> dict[str, Any]:
    kind = f("optimizer")
    decay = f.number("adamw_weight_decay" if kind == "adamw" else "weight_decay")
    if kind != "adamw" and (kind != "adam" or decay):  # without decay the two are one
        raise Lacking(f"optimizer={kind}")
    return {
        "optim": "adamw",
        "optim.lr": float(f.number("learning_rate")),
        "optim.betas": [float(f.number("beta1")), float(f.number("beta2"))],
        "optim.eps": float(f.number("adamw_eps")),
        "optim.weight_decay": float(decay),
    }


def schedule(f: Flags) -> dict[str, Any]:
    """Nothing of it warmed up there, and `none` was constant."""
    kind = f.one_of("lr_scheduler", {"none": "constant", "cosine": "cosine"}, ("exponential", "step", "plateau"))
    out: dict[str, Any] = {"schedule": kind, "schedule.warmup_steps": 0}
    if kind == "cosine":
        if f.number("cosine_t_max") != f.number("max_iters"):
            raise Lacking(
                "lr_scheduler=cosine with another cosine_t_max than max_iters: its rate rose again or broke off"
            )
        out["schedule.min_ratio"] = f.number("cosine_eta_min") / f.number("learning_rate")
    return out


def length(f: Flags) -> dict[str, Any]:
    limits = f("training_limiters")
    limits = limits if isinstance(limits, list) else [limits]
    if len(limits) != 1 or limits == ["max_seconds"]:
        raise Lacking(f"training_limiters={limits}")
    known = {"max_iters": "steps", "max_tokens": "tokens", "max_epochs": "epochs"}
    if limits[0] not in known:
        raise Lacking(f"training_limiters={limits[0]!r} is none of the laboratory's{near(limits[0], known)}")
    return {known[limits[0]]: f.number(limits[0])}


def loss(f: Flags) -> Part:
    """`loss_schedule` is `0:focal,500:cross_entropy`: from which update on which rules; else `loss_fn` does."""
    given = f("loss_schedule")
    if not given:
        return f.one_of("loss_fn", objectives(f), LACKING)()
    stages = []
    for entry in str(given).split(","):
        step, _, name = entry.strip().partition(":")
        if not step.isdecimal():
            raise Lacking(f"loss_schedule={given!r}, whose entries are no step:name")
        stages.append((int(step), Flags({**f.given, "loss_fn": name.strip()})))
    stages.sort(key=lambda stage: stage[0])
    if stages[0][0] != 0:
        raise Lacking(f"loss_schedule={given!r}, which does not say what rules from update 0")
    parts = [of.one_of("loss_fn", objectives(f), LACKING)() for _, of in stages]  # options are read from f
    ends: list[int | None] = [step for step, _ in stages[1:]]
    if len(parts) == 1:
        return parts[0]
    listed = [{"loss": part, "until": end} for part, end in zip(parts, [*ends, None], strict=True)]
    return {"kind": "schedule", "stages": listed}


LACKING = (
    "distance_attenuated_top1", "top1_ratio", "rank_distance", "entropy_focal", "rank_distance_focal",
    "entropy_rank_distance_focal", "bit_balanced_cross_entropy", "no_repeat_cross_entropy",
)  # fmt: skip


def objectives(f: Flags) -> dict[str, Callable[[], Part]]:
    """The laboratory's name of a loss -> ours, where it computes the same."""

    def attenuated() -> Part:
        factor = f.number("correct_top1_attenuation")
        return {"kind": "cross_entropy"} if factor == 1 else {"kind": "attenuated", "factor": float(factor)}

    return {
        "cross_entropy": lambda: {"kind": "cross_entropy"},
        "top1_focus": lambda: {"kind": "cross_entropy"},  # what it adds has no gradient
        "label_smoothing": lambda: {"kind": "smoothed", "epsilon": float(f.number("label_smoothing"))},
        "focal": lambda: {"kind": "focal", "gamma": float(f.number("focal_gamma"))},
        "skip_correct_top1": lambda: {"kind": "attenuated", "factor": 0.0},
        "attenuated_correct_top1": attenuated,
        "top1_margin": lambda: {"kind": "margin", "margin": float(f.number("top1_margin")), "weight": 1.0},
        "entropy_penalty": lambda: {"kind": "entropy", "weight": float(f.number("entropy_beta"))},
        "flatness_boost": lambda: {"kind": "flatness", "weight": float(f.number("flatness_beta"))},
    }
