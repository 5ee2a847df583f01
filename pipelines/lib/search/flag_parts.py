"""Parts of a layer from the laboratory's flags: mixer, positions, softmax, MLP, activation, linear layers.

Each function gives the part as a mapping with `kind`. Raises Lacking for what we have not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from models.parts.softmax import Softmax
from models.spec import fields, near
from pipelines.lib.search.flag_values import Flags, Lacking, equal

Part = dict[str, Any]

# ---- attention and positions


def cap(value: Any) -> float | None:
    """The laboratory's caps are switches: true is 1.0."""
    return None if value is None or value is False else float(value)


def attention(f: Flags, i: int) -> tuple[Part, Part]:
    """The mixer of layer i, and its position scheme."""
    shared = f.number("shared_attn_size")
    cycled = f("attention_list")
    if cycled:
        variants = cycled if isinstance(cycled, list) else [cycled]
        variant = variants[i % len(variants)]
    else:
        variant = f.layers("attention_variant", shared)[i]

    def at(name: str) -> Any:
        return f.layers(name, shared)[i]

    made = {
        "causal": causal,
        "infinite": infinite,
        "mla": latent,
        "linear": lambda f, at: ({"kind": "diagonal", "n_heads": at("n_head"), "bias": True}, 0),
        "ssm": state_space,
        "identity": lambda f, at: ({"kind": "identity"}, 0),
    }
    if variant in ("co4", "edgellm_asic_attn"):
        raise Lacking(f"attention_variant={variant}")
    if variant not in made:
        raise Lacking(f"attention_variant={variant!r} is none of the laboratory's{near(variant, made)}")
    part, head = made[variant](f, at)
    return part, position(f, variant, at("use_rotary_embeddings"), head)


def causal(f: Flags, at: Callable[[str], Any]) -> tuple[Part, int]:
    heads, window = at("n_head"), at("window_size")
    qkv = [linear(f, x, "attn") for x in "qkv"]
    if not equal(qkv):
        raise Lacking("linear_variant_q, _k and _v of several kinds")
    out = linear(f, "attn_proj", "attn")
    part = {
        "kind": "causal",
        "n_heads": heads,
        "n_kv_heads": at("n_kv_group"),
        "window": None if window is None else window + 1,
        **scores(f),
        "softcap": cap(f("attn_logit_softcapping")),
        "gate": {"kind": "elementwise" if f("gate") else "none"},
        "linear": qkv[0],
        "out_linear": None if out == qkv[0] else out,
    }
    return part, f.number("n_embd") // max(heads, 1)


def infinite(f: Flags, at: Callable[[str], Any]) -> tuple[Part, int]:
    head, v_head = at("n_qk_head_dim"), at("n_v_head_dim")
    if head is None or v_head is None:
        raise Lacking("attention_variant=infinite without n_qk_head_dim and n_v_head_dim, which failed there too")
    inner = [normed(f, linear(f, "attn", "attn"), f"l2_norm_attn_{x}", "embed") for x in "qkv"]
    if not equal(inner):
        raise Lacking("l2_norm_attn_q, _k and _v of which only some are on")
    out = normed(f, linear(f, "attn", "attn"), "l2_norm_attn_cproj", "hidden")
    part = {
        "kind": "infinite",
        "n_heads": at("n_head"),
        "n_kv_heads": at("n_kv_group"),
        "head_dim": head,
        "v_head_dim": v_head,
        **scores(f),
        "linear": inner[0],
        "out_linear": None if out == inner[0] else out,
        "merge": "concat" if f("use_concat_heads") else "sum",
    }
    return part, head


def scores(f: Flags) -> Part:
    """Softmax, norms of queries, keys and values, and the sink."""
    qk_norm: Part = {"kind": "none"}
    if f("use_qk_norm"):
        qk_norm = {"kind": "l2", "scale": "inv_sqrt", "learned": False}
        if f("use_qk_norm_scale"):
            scale = f("qk_norm_scale")
            qk_norm = {"kind": "l2", "scale": "length" if scale is None else float(scale), "learned": True}
    elif f("use_qk_norm_scale"):
        raise Lacking("use_qk_norm_scale without use_qk_norm")
    sink: Part = {"kind": "none"}
    if f("use_flash_lobo"):
        per_head = "head" if f("use_flash_lobo_per_head") else "learned"
        kind = "fixed" if f("use_flash_obo_const") else per_head
        sink = {"kind": kind, "score": float(f.number("flash_lobo_log_const"))}
    return {"softmax": softmax(f), "qk_norm": qk_norm, "v_norm": f("use_v_norm"), "sink": sink}


def latent(f: Flags, at: Callable[[str], Any]) -> tuple[Part, int]:
    score = float(f.number("mla_lobo_init"))
    sink = {"kind": "learned", "score": score} if f("use_mla_lobo") else {"kind": "none"}
    heads = at("n_head")
    return {"kind": "mla", "n_heads": heads, "sink": sink}, f.number("n_embd") // max(heads, 1)


def state_space(f: Flags, at: Callable[[str], Any]) -> tuple[Part, int]:
    names = {"expand": "ssm_mamba_expand", "conv": "ssm_conv_kernel_size", "dt_rank": "ssm_dt_rank"}
    options = {ours: f.number(theirs) for ours, theirs in names.items()}
    return {"kind": "ssm", **options, "state": f.number("ssm_d_state"), "bias": f("ssm_io_bias")}, 0


ADDED = ("learned", "cyclic")


def position(f: Flags, variant: str, rotary: bool, head: int) -> Part:
    """head: size of a head that is turned; 0: nothing is."""
    parts: dict[str, Part] = {}
    if f("use_abs_pos_embeddings"):
        if f.one_of("absolute_pos_embedding_variant", {"learned": 1, "cyclic": 2}) == 1:
            parts["absolute"] = {"kind": "learned"}
        else:
            lengths = f("cyclic_abs_pos_cycle_lengths")
            part = {"kind": "cyclic", "random_phase": f("cyclic_abs_pos_randomize_starts")}
            parts["absolute"] = part | ({"lengths": lengths} if lengths else {})
    if (rotary and head) or variant == "mla":  # which has a rotary branch of its own
        length = f("rope_length") if variant != "mla" else None
        fraction = 1.0 if length is None else length / head
        soap = f.one_of("rope_variant", {"rope": False, "soap": True}) and variant != "mla"
        steps = {"kind": "soap", "steps": f.number("sym_rot_num_angles")} if soap else {"kind": "rotary"}
        parts["rotary"] = {**steps, "fraction": fraction}
    if f("use_fire_embeddings") and variant == "causal":
        hidden = f.number("fire_num_hidden_layers")
        parts["bias"] = {
            "kind": "fire",
            "hidden": hidden,
            **({"width": f.number("fire_mlp_width")} if hidden else {}),
            "final_relu": f("fire_outermost_sigma"),
            "shared": f("shared_fire_embeddings"),
            "c": float(f.number("fire_init_c")),
            "b": float(f.number("fire_log_bias")),
            "threshold": float(f.number("fire_init_L")),
        }
    if len(parts) < 2:
        return next(iter(parts.values()), {"kind": "none"})
    return {"kind": "mixed", **{name: parts.get(name, {"kind": "none"}) for name in ("absolute", "rotary", "bias")}}


def softmax(f: Flags) -> Part:
    def based(name: str) -> float:
        return math.e if f(f"{name}_use_euler_base") else float(f.number(f"{name}_base"))

    def consmax(kind: str) -> Part:
        part = {"kind": kind, "beta": f.number("consmax_initial_beta"), "gamma": f.number("consmax_initial_gamma")}
        part["base"] = based("consmax")
        if kind == "consmax_v2" and not f("consmax_per_head"):
            part["kind"] = "consmax"
        if kind == "saturatingconsmax":
            part["saturation"] = f.number("consmax_saturation")
            part |= {f"learn_{x}": f(f"consmax_learnable_{x}") for x in ("beta", "gamma")}
        return part

    def polymax(kind: str) -> Part:
        names = {"start": "x_intercept", "height": "y_intercept", "power": "power", "divisor": "divisor"}
        return {"kind": kind, **{ours: f.number(f"polymax_{theirs}") for ours, theirs in names.items()}}

    def stronger() -> Part:
        part = {
            "kind": "strongermax",
            "base": f.number("strongermax_strength"),
            "temperature": f.number("strongermax_temperature_factor"),
            "learn_temperature": f("strongermax_use_learned_temperature_factor"),
            "divisor": f.number("strongermax_divisor"),
        }
        if not f("strongermax_div_by_sum_of_terms"):
            guess = f("strongermax_xmax_guess")
            return {**part, "normalise": False, "max_guess": guess if f("strongermax_use_xmax") else 0.0}
        part["obo"], learned = f.number("strongermax_obo"), f("strongermax_use_learned_obo")
        per_head = f("strongermax_use_learned_obo_per_head")
        if (learned or per_head) and not part["obo"] > 0:
            raise Lacking("a learned strongermax_obo that starts at 0 (it is learned by its logarithm here)")
        return {**part, "learn_obo": bool(learned or per_head), "obo_per_head": bool(per_head)}

    def learned() -> Part:
        obo = f.number("pfla_softmax_obo") if f("pfla_softmax_use_obo") else 0.0
        knots, span = f.number("pfla_softmax_num_points"), both(f, "pfla_softmax")
        return {"kind": "pfla", "knots": knots, "span": span, "obo": obo}

    def divided(kind: str, flag: str | None, **options: str) -> Callable[[], Part]:
        names = ({"divisor": flag} if flag else {}) | options
        return lambda: {"kind": kind, **{ours: f.number(theirs) for ours, theirs in names.items()}}

    kinds: dict[str, Callable[[], Part]] = {
        **{name: divided(name, None) for name in ("softmax", "softermax", "gelumax")},
        "ste_argmax_softmax": divided("ste_argmax", None),
        "sigsoftmax": lambda: {"kind": "sigsoftmax", "base": based("sigsoftmax")},
        "consmax": lambda: consmax("consmax"),
        "consmax_v2": lambda: consmax("consmax_v2"),
        "consmax_quan": lambda: consmax("consmax_quantised"),
        "saturatingconsmax": lambda: consmax("saturatingconsmax"),
        "polymax": lambda: polymax("polymax"),
        "vpolymax": lambda: polymax("vpolymax"),
        "exppolymax": lambda: {
            "base": based("exppolymax"),
            **divided("exppolymax", "exppolymax_divisor", power="exppolymax_power")(),
        },
        "strongermax": stronger,
        "pfla_softmax": learned,
        "relumax": divided("relumax", "relumax_divisor"),
        "relu2max": divided("relu2max", "relu2max_divisor"),
        "sigmoidmax": divided("sigmoid", "sigmoidmax_divisor"),
        "softplus": divided("softplus", "softplus_divisor"),
        "softplus2max": divided("softplus2", "softplus_divisor"),
        "squareplus": divided("squareplus", "squareplus_divisor"),
        "softshrink": divided("softshrink", "softshrink_attn_divisor", threshold="softshrink_attn_lambda"),
    }
    part = f.one_of("softmax_variant_attn", kinds, ("relu2max_line",))()
    if "per_key" in fields(Softmax.kinds[part["kind"]]) and f("div_by_seq_len"):
        part["per_key"] = True
    return part


# ---- MLP, activations, linear layers


def both(f: Flags, name: str) -> float:
    """Half the width of an interval around 0."""
    left, right = f.number(f"{name}_left_bound"), f.number(f"{name}_right_bound")
    if left != -right:
        raise Lacking(f"{name}_left_bound={left} with {name}_right_bound={right}: knots stand symmetrically here")
    return float(right)


def activation(f: Flags, name: str) -> Part:
    plain = (
        "celu elu gelu leaky_relu mish prelu relu relu6 rrelu selu sigmoid silu softplus softsign tanh identity disco "
        "squared_gelu"
    ).split()
    kinds: dict[str, Callable[[], Part]] = {
        **{kind: partial(dict, kind=kind) for kind in plain},
        "squared_relu": lambda: {"kind": "relu2"},
        "relu_power": lambda: {"kind": "relu_power", "power": f.number("relu_power")},
        "softshrink": lambda: {"kind": "softshrink", "threshold": f.number("softshrink_lambda")},
        "gelu_shifted": lambda: {"kind": "gelu_shifted", "shift": f.number("shifted_gelu_initial_shift")},
        "piecewise": lambda: {"kind": "piecewise", "knots": f.number("pla_num_points"), "span": both(f, "pla")},
        "pfla": lambda: {"kind": "pfla", "knots": f.number("pfla_num_points"), "span": both(f, "pfla")},
        "pfla_le": lambda: {"kind": "pfla_le", "knots": f.number("pfla_num_points"), "span": both(f, "pfla")},
        "learned_spline": lambda: {"kind": "learned_spline", "knots": 10},
    }
    return f.one_of(name, kinds, ("glu",))()


LINEARS = {
    "linear": "dense",
    "bitlinear_1p58": "bitnet",
    "bitlinear": "binary",
    "quantized_linear": "quantised",
    "adaptive_bit_linear": "adaptive_bits",
}
NO_LINEARS = ("bitlinear_optimized", "kan")


def linear(f: Flags, name: str, site: str = "") -> Part:
    """The linear layer of a place: `name`, else the general one of `site` (attn, mlp)."""
    flag = f"linear_variant_{name}"
    kind = f.one_of(flag if f(flag) is not None else f"linear_variant_{site}", LINEARS, NO_LINEARS)
    if kind == "quantised":
        methods = {"affine_quant": "affine", "symmetric_quant": "symmetric"}
        if f("quant_scheduler") is not None and (f("quant_scheduler") != "static" or f("start_quant_level") != 1):
            raise Lacking("quantized_linear that is quantised little by little (quant_scheduler, start_quant_level)")
        method = f.one_of("quantize_linear_method", methods, ("ternary_quant", "stochastic_quant"))
        bits = f.number("quantize_linear_bits")
        return {"kind": kind, "weight_bits": bits, "activation_bits": None, "method": method, "per_channel": False}
    if kind == "adaptive_bits":
        names = {"bits": "init_bits", "low": "min_bits", "high": "max_bits", "activation_bits": "activation_bits"}
        return {"kind": kind, **{ours: f.number(f"adaptive_linear_{theirs}") for ours, theirs in names.items()}}
    return {"kind": kind}


def normed(f: Flags, part: Part, flag: str, along: str) -> Part:
    """The linear layer, its rows of length 1 where a flag asks for that. along: the axis that makes a row."""
    if not f(flag):
        return part
    if f(f"{flag}_dim") != along or part["kind"] != "dense":
        raise Lacking(f"{flag} with {flag}_dim={f(f'{flag}_dim')} and a {part['kind']} layer (rows have length 1 here)")
    return {"kind": "unit_rows"}


def mlp(f: Flags, i: int, d: int) -> Part:
    """The MLP of layer i at width d."""
    if f("use_moe") and i % f.number("moe_layer_freq") == 0:
        noisy = f.one_of("moe_router_scheme", {"softmax": False, "noisy_top_k": True})
        part = {"kind": "moe", "experts": feed_forward(f, i, d), "n_experts": f.number("n_experts")}
        return {**part, "top_k": f.number("moe_top_k"), "balance": 0.0, "z_loss": 0.0, "noisy": noisy}
    return feed_forward(f, i, d)


def feed_forward(f: Flags, i: int, d: int) -> Part:
    kinds = {"mlp": "mlp", "swiglu": "swiglu", "dual_path": "dual_path", "dual_path_swiglu": "dual_path"}
    own = {"kan": "kan", "identity": "identity"}
    kind = f.one_of("mlp_variant", {**kinds, **own}, ("edgellm_asic_mlp",))
    if kind == "identity":
        return {"kind": kind}
    if kind == "kan":
        middle = f("kan_middle_layers")
        middle = middle if isinstance(middle, list) else [middle]
        act = activation(f, "kan_base_activation")
        return {"kind": kind, "order": f.number("kan_poly_order"), "activation": act, "middle": middle}
    size, factor = f.layers("mlp_size", f.number("shared_mlp_size"))[i], f.number("mlp_expansion_factor")
    if size is None and (factor != 4 or kind == "swiglu"):  # else what ours has anyhow, which follows the width
        size = d * factor
    up = normed(f, linear(f, "mlp_up", "mlp"), "l2_norm_mlp_up", "embed")
    down = normed(f, linear(f, "mlp_down", "mlp"), "l2_norm_mlp_down", "hidden")
    return {
        "kind": kind,
        "hidden": size,
        "activation": activation(f, "activation_variant"),
        "up_bias": f("mlp_up_bias"),
        "down_bias": f("mlp_down_bias"),
        "linear": up,
        "down_linear": None if down == up else down,
        **offsets(f, kind),
        **({"gated": f("mlp_variant") == "dual_path_swiglu"} if kind == "dual_path" else {}),
    }


def offsets(f: Flags, kind: str) -> Part:
    x, y = float(f.number("mlp_x_offset")), float(f.number("mlp_y_offset"))
    learned = [bool(f(f"learn_mlp_{axis}_offset")) for axis in "xy"]
    if kind == "swiglu":
        if x or y or any(learned):
            raise Lacking("mlp_x_offset and mlp_y_offset in swiglu")
        return {}
    if not equal(learned):
        raise Lacking("learn_mlp_x_offset and learn_mlp_y_offset, one without the other")
    return {"x_offset": x, "y_offset": y, "learned_offsets": learned[0]}
