"""Llama's Hugging Face layout (SmolLM2 and relatives), both ways: same logits as transformers' LlamaForCausalLM.

Llama keeps q, k, v and gate, up apart; ours are one matrix each. Both turn halves (i, i + h/2), so nothing is permuted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from models.convert.common import as_dtype, one, refuse
from models.gpt.config import GPT, GPTConfig
from models.gpt.model import GPTForCausalLM
from models.parts.activation import SiLU
from models.parts.attention import Causal
from models.parts.mlp import SwiGLU
from models.parts.norm import RMSNorm
from models.parts.position import Rotary


def spec_of(config: LlamaConfig) -> GPT:
    """Our spec of a Llama config. Raises ConfigError for settings that GPT does not have."""
    rope = cast("dict[str, Any]", config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        refuse("llama", f"rope_type=default, not {rope['rope_type']!r}")
    if config.hidden_act != "silu":
        refuse("llama", f"hidden_act=silu, not {config.hidden_act!r}")
    return GPT(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        seq_len=config.max_position_embeddings,
        attention=Causal(
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
        ),
        mlp=SwiGLU(hidden=config.intermediate_size, bias=config.mlp_bias),
        norm=RMSNorm(eps=config.rms_norm_eps),
        position=Rotary(base=float(rope.get("rope_theta", 10000.0))),
        tie_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


def config_of(spec: GPT) -> LlamaConfig:
    """The Llama config of a spec. Raises ConfigError that names the part Llama does not have."""
    block = one(spec, "llama")
    attention, mlp, norm, position = block.attention, block.mlp, block.norm, block.position
    if not isinstance(position, Rotary):
        refuse("llama", "position=rotary")
    if not isinstance(norm, RMSNorm):
        refuse("llama", "norm=rmsnorm")
    if not isinstance(mlp, SwiGLU) or not isinstance(mlp.activation, SiLU):
        refuse("llama", "mlp=swiglu with activation=silu")
    if not isinstance(attention, Causal) or attention.window:
        refuse("llama", "attention=causal without a window")
    if spec.dropout and attention.dropout is None:
        refuse("llama", "dropout=0 (Llama drops attention weights only: attention.dropout)")
    return LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.d_model,
        intermediate_size=mlp.width(spec.d_model),
        num_hidden_layers=spec.n_layers,
        num_attention_heads=attention.heads()[0],
        num_key_value_heads=attention.heads()[1],
        head_dim=attention.width(spec.d_model),
        max_position_embeddings=spec.seq_len,
        rms_norm_eps=norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": position.base},
        attention_bias=block.bias_of(attention),
        mlp_bias=block.bias_of(mlp),
        attention_dropout=attention.dropout or 0.0,
        initializer_range=spec.init_std,
        tie_word_embeddings=spec.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _sizes(spec: GPT) -> tuple[list[int], int]:
    """Rows of q, k, v in qkv, and of gate in gate_up."""
    block = spec.blocks()[0]
    assert isinstance(block.attention, Causal) and isinstance(block.mlp, SwiGLU)
    (H, K), h = block.attention.heads(), block.attention.width(spec.d_model)
    return [H * h, K * h, K * h], block.mlp.width(spec.d_model)


def from_layout(model: LlamaForCausalLM) -> GPTForCausalLM:
    """transformers' Llama as ours, with copied weights in their dtype."""
    spec = spec_of(model.config)
    theirs = model.state_dict()
    state = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for i in range(spec.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        state[a + "mixer_norm.weight"] = theirs[b + "input_layernorm.weight"]
        state[a + "mlp_norm.weight"] = theirs[b + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if b + f"self_attn.q_proj.{kind}" in theirs:
                state[a + f"mixer.qkv.{kind}"] = torch.cat([theirs[b + f"self_attn.{n}_proj.{kind}"] for n in "qkv"])
                state[a + f"mixer.out.{kind}"] = theirs[b + f"self_attn.o_proj.{kind}"]
            if b + f"mlp.up_proj.{kind}" in theirs:
                state[a + f"mlp.gate_up.{kind}"] = torch.cat(
                    [theirs[b + f"mlp.{n}_proj.{kind}"] for n in ("gate", "up")]
                )
                state[a + f"mlp.down.{kind}"] = theirs[b + f"mlp.down_proj.{kind}"]
    out = as_dtype(GPTForCausalLM(GPTConfig.of(spec)), model.dtype)
    out.load_state_dict(state)
    out.generation_config = model.generation_config
    return out.eval()


def to_layout(model: GPTForCausalLM) -> LlamaForCausalLM:
    """Ours as transformers' Llama."""
    spec: GPT = model.spec  # type: ignore[assignment]
    out = as_dtype(LlamaForCausalLM(config_of(spec)), model.dtype)
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
