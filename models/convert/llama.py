"""Llama's Hugging Face layout and its relatives', both ways: same logits as transformers' own classes.

llama (SmolLM2 and many more), mistral (a sliding window), qwen3 (norms of queries and keys), qwen2 (read only: its
biases stand at q, k and v alone). They keep q, k, v and gate, up apart; ours are one matrix each. Both turn halves
(i, i + h/2), so nothing is permuted.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.convert.common import Layout, as_dtype, check_nothing_lost, decoder, one, refuse
from models.gpt.config import GPT, GPTConfig
from models.gpt.model import GPTForCausalLM
from models.parts.activation import SiLU
from models.parts.attention import Causal
from models.parts.mlp import SwiGLU
from models.parts.norm import RMSNorm
from models.parts.position import Rotary
from models.parts.qk_norm import NoQKNorm, RMSQKNorm
from models.parts.rotation import LinearScaling, Llama3Scaling, RopeScaling, Unscaled, YarnScaling


class Relative(NamedTuple):
    """One of Llama's relatives. The others: what its config can say."""

    config: type
    model: type
    attention_bias: bool = False
    mlp_bias: bool = False
    window: bool = False
    qk_norm: bool = False


RELATIVES = {
    "llama": Relative(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True),
    "mistral": Relative(MistralConfig, MistralForCausalLM, window=True),
    "qwen2": Relative(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": Relative(Qwen3Config, Qwen3ForCausalLM, attention_bias=True, qk_norm=True),
}


# ---- configs


def spec_of(config: Any) -> GPT:
    """Our spec of a config of one of RELATIVES. Raises ConfigError for settings that GPT does not have."""
    name, rope = config.model_type, cast("dict[str, Any]", config.rope_parameters or {})
    if config.hidden_act != "silu":
        refuse(name, f"hidden_act=silu, not {config.hidden_act!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(name, f"partial_rotary_factor=1, not {rope['partial_rotary_factor']}")
    norm = RMSNorm(eps=config.rms_norm_eps)
    return GPT(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        seq_len=config.max_position_embeddings,
        attention=Causal(
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None),
            window=windows_of(config),
            qk_norm=RMSQKNorm(eps=norm.eps) if RELATIVES[name].qk_norm else NoQKNorm(),
            bias=name == "qwen2" or bool(getattr(config, "attention_bias", False)),
            dropout=config.attention_dropout,
        ),
        mlp=SwiGLU(hidden=config.intermediate_size, bias=bool(getattr(config, "mlp_bias", False))),
        norm=norm,
        position=Rotary(base=float(rope.get("rope_theta", 10000.0)), scaling=scaling_of(config, rope)),
        tie_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


def windows_of(config: Any) -> int | tuple[int | None, ...] | None:
    """The window of all layers, or one per layer. One that the context does not reach is none."""
    width = getattr(config, "sliding_window", None)
    if width is None or width >= config.max_position_embeddings or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is None or set(kinds) == {"sliding_attention"}:
        return width
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def scaling_of(config: Any, rope: dict[str, Any]) -> RopeScaling:
    """How rotary angles are stretched. Raises ConfigError for a way that depends on the length of the text."""
    kind = rope.get("rope_type", "default")
    original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    if kind == "default":
        return Unscaled()
    if kind == "linear":
        return LinearScaling(factor=rope["factor"])
    if kind == "llama3":
        return Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    if kind == "yarn" and rope.get("truncate", True) and not rope.get("mscale"):
        fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
        return YarnScaling(rope["factor"], original, fast, slow, rope.get("attention_factor"))
    refuse(config.model_type, f"rope_type among default, linear, llama3, yarn (truncated, no mscale), not {kind!r}")


def rope_of(position: Rotary) -> dict[str, Any] | None:
    """transformers' rope_parameters of ours; None for a scaling that it does not have."""
    scaling, theta = position.scaling, {"rope_theta": position.base}
    if isinstance(scaling, Unscaled):
        return {"rope_type": "default", **theta}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor, **theta}
    if isinstance(scaling, Llama3Scaling):
        ends: dict[str, Any] = {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        original = {"original_max_position_embeddings": scaling.original}
        return {"rope_type": "llama3", "factor": scaling.factor, **ends, **original, **theta}
    if isinstance(scaling, YarnScaling):
        ends = {"beta_fast": scaling.fast, "beta_slow": scaling.slow, "attention_factor": scaling.attention}
        original = {"original_max_position_embeddings": scaling.original}
        given = {k: v for k, v in ends.items() if v is not None}
        return {"rope_type": "yarn", "factor": scaling.factor, **given, **original, **theta}
    return None


def config_of(spec: GPT, layout: str = "llama") -> Any:
    """The config of a spec in a layout. Raises ConfigError that names the part or setting that it does not have."""
    says, block = RELATIVES[layout], one(spec, layout)
    attention, mlp, norm, position = block.attention, block.mlp, block.norm, block.position
    if layout == "qwen2":
        refuse(layout, "to be read only: it has biases at q, k and v and none behind them; write layout=llama")
    if not isinstance(position, Rotary):
        refuse(layout, "position=rotary")
    if not isinstance(norm, RMSNorm):
        refuse(layout, "norm=rmsnorm")
    if not isinstance(mlp, SwiGLU) or not isinstance(mlp.activation, SiLU):
        refuse(layout, "mlp=swiglu with activation=silu")
    if type(attention) is not Causal:
        refuse(layout, "attention=causal")
    if attention.window and not says.window:
        refuse(layout, "attention=causal without a window (layout=mistral has one)")
    if isinstance(attention.qk_norm, RMSQKNorm) != says.qk_norm:
        needed = {True: "rms", False: "none (layout=qwen3 has rms)"}[says.qk_norm]
        refuse(layout, f"attention.qk_norm={needed}")
    if spec.dropout and attention.dropout is None:
        refuse(layout, "dropout=0 (it drops attention weights only: attention.dropout)")
    rope = rope_of(position)
    if rope is None:
        refuse(layout, "position.scaling among none, linear, llama3, yarn")
    options = {
        "attention_bias": (says.attention_bias, block.bias_of(attention)),
        "mlp_bias": (says.mlp_bias, block.bias_of(mlp)),
        "sliding_window": (says.window, attention.window),
    }
    config = says.config(
        vocab_size=spec.vocab,
        hidden_size=spec.d_model,
        intermediate_size=mlp.width(spec.d_model),
        num_hidden_layers=spec.n_layers,
        num_attention_heads=attention.heads()[0],
        num_key_value_heads=attention.heads()[1],
        head_dim=attention.width(spec.d_model),
        max_position_embeddings=spec.seq_len,
        rms_norm_eps=norm.eps,
        rope_parameters=rope,
        attention_dropout=attention.dropout or 0.0,
        initializer_range=spec.init_std,
        tie_word_embeddings=spec.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{name: value for name, (known, value) in options.items() if known},
    )
    check_nothing_lost(layout, spec, spec_of(config))
    return config


# ---- weights


def _sizes(spec: GPT) -> tuple[list[int], int]:
    """Rows of q, k, v in qkv, and of gate in gate_up."""
    block = spec.blocks()[0]
    assert isinstance(block.attention, Causal) and isinstance(block.mlp, SwiGLU)
    (H, K), h = block.attention.heads(), block.attention.width(spec.d_model)
    return [H * h, K * h, K * h], block.mlp.width(spec.d_model)


def from_layout(model: Any) -> GPTForCausalLM:
    """A model of transformers as ours, with copied weights in their dtype."""
    spec = spec_of(model.config)
    theirs: dict[str, Tensor] = model.state_dict()
    state = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    block = spec.blocks()[0]
    normed = isinstance(cast(Causal, block.attention).qk_norm, RMSQKNorm)
    kinds = lambda part: ("weight", "bias") if block.bias_of(part) else ("weight",)
    for i in range(spec.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        if model.config.model_type == "qwen2":
            theirs[b + "self_attn.o_proj.bias"] = torch.zeros(spec.d_model, dtype=model.dtype, device=model.device)
        state[a + "mixer_norm.weight"] = theirs[b + "input_layernorm.weight"]
        state[a + "mlp_norm.weight"] = theirs[b + "post_attention_layernorm.weight"]
        for name in "qk" if normed else "":
            state[a + f"mixer.qk_norm.{name}"] = theirs[b + f"self_attn.{name}_norm.weight"]
        for kind in kinds(block.attention):
            state[a + f"mixer.qkv.{kind}"] = torch.cat([theirs[b + f"self_attn.{n}_proj.{kind}"] for n in "qkv"])
            state[a + f"mixer.out.{kind}"] = theirs[b + f"self_attn.o_proj.{kind}"]
        for kind in kinds(block.mlp):
            state[a + f"mlp.gate_up.{kind}"] = torch.cat([theirs[b + f"mlp.{n}_proj.{kind}"] for n in ("gate", "up")])
            state[a + f"mlp.down.{kind}"] = theirs[b + f"mlp.down_proj.{kind}"]
    out = as_dtype(GPTForCausalLM(GPTConfig.of(spec)), model.dtype)
    out.load_state_dict(state)
    out.generation_config = model.generation_config
    return out.eval()


def to_layout(model: GPTForCausalLM, layout: str = "llama") -> Any:
    """Ours as a model of transformers."""
    spec = decoder(model, layout)
    out = as_dtype(RELATIVES[layout].model(config_of(spec, layout)), model.dtype)
    ours = model.state_dict()
    qkv, hidden = _sizes(spec)
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(spec.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        state[b + "input_layernorm.weight"] = ours[a + "mixer_norm.weight"]
        state[b + "post_attention_layernorm.weight"] = ours[a + "mlp_norm.weight"]
        for name in "qk":
            if a + f"mixer.qk_norm.{name}" in ours:
                state[b + f"self_attn.{name}_norm.weight"] = ours[a + f"mixer.qk_norm.{name}"]
        for kind in ("weight", "bias"):
            if a + f"mixer.qkv.{kind}" in ours:
                for name, part in zip("qkv", ours[a + f"mixer.qkv.{kind}"].split(qkv), strict=True):
                    state[b + f"self_attn.{name}_proj.{kind}"] = part.contiguous()
                state[b + f"self_attn.o_proj.{kind}"] = ours[a + f"mixer.out.{kind}"]
            if a + f"mlp.down.{kind}" in ours:
                for name, part in zip(("gate", "up"), ours[a + f"mlp.gate_up.{kind}"].split(hidden), strict=True):
                    state[b + f"mlp.{name}_proj.{kind}"] = part.contiguous()
                state[b + f"mlp.down_proj.{kind}"] = ours[a + f"mlp.down.{kind}"]
    out.load_state_dict(state)
    out.generation_config = model.generation_config
    return out.eval()


LAYOUTS = {
    name: Layout(spec_of, partial(config_of, layout=name), from_layout, partial(to_layout, layout=name))
    for name in RELATIVES
}
