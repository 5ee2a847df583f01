"""GPT-2's Hugging Face layout, both ways: same logits as transformers' GPT2LMHeadModel.

GPT-2 stores matrices as [in, out] (Conv1D), ours are [out, in] (Linear).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from models.convert.common import Layout, as_dtype, check_nothing_lost, decoder, one, refuse
from models.gpt.config import GPT, GPTConfig
from models.gpt.model import GPTForCausalLM
from models.parts.activation import GELU, Activation, GELUTanh, ReLU, SiLU
from models.parts.attention import Causal
from models.parts.mlp import Plain
from models.parts.norm import LayerNorm
from models.parts.position import Learned
from models.spec import near

ACTIVATIONS: dict[str, type[Activation]] = {
    "gelu_new": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "gelu": GELU,
    "relu": ReLU,
    "silu": SiLU,
    "swish": SiLU,
}

# (ours, GPT-2's, whether the matrix is transposed); each with a weight and a bias
LAYER = (
    ("mixer_norm", "ln_1", False),
    ("mixer.qkv", "attn.c_attn", True),
    ("mixer.out", "attn.c_proj", True),
    ("mlp_norm", "ln_2", False),
    ("mlp.up", "mlp.c_fc", True),
    ("mlp.down", "mlp.c_proj", True),
)


def spec_of(config: GPT2Config) -> GPT:
    """Our spec of a GPT-2 config. Raises ConfigError for settings that GPT does not have."""
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        refuse("gpt2", "scale_attn_weights=true, scale_attn_by_inverse_layer_idx=false, add_cross_attention=false")
    if config.activation_function not in ACTIVATIONS:
        refuse(
            "gpt2", f"activation_function {config.activation_function!r}{near(config.activation_function, ACTIVATIONS)}"
        )
    if config.embd_pdrop != config.resid_pdrop:
        refuse("gpt2", f"embd_pdrop={config.embd_pdrop} equal to resid_pdrop={config.resid_pdrop}")
    return GPT(
        vocab_size=config.vocab_size,
        d_model=config.n_embd,
        n_layers=config.n_layer,
        seq_len=config.n_positions,
        attention=Causal(
            n_heads=config.n_head, dropout=None if config.attn_pdrop == config.resid_pdrop else config.attn_pdrop
        ),
        mlp=Plain(hidden=config.n_inner, activation=ACTIVATIONS[config.activation_function]()),
        norm=LayerNorm(eps=config.layer_norm_epsilon),
        position=Learned(),
        tie_embeddings=config.tie_word_embeddings,
        bias=True,
        dropout=config.resid_pdrop,
        init_std=config.initializer_range,
    )


def config_of(spec: GPT) -> GPT2Config:
    """The GPT-2 config of a spec. Raises ConfigError that names the part GPT-2 does not have."""
    block = one(spec, "gpt2")
    attention, mlp, norm = block.attention, block.mlp, block.norm
    if not isinstance(block.position, Learned):
        refuse("gpt2", "position=learned")
    if not isinstance(norm, LayerNorm):
        refuse("gpt2", "norm=layernorm")
    if not isinstance(mlp, Plain):
        refuse("gpt2", "mlp=mlp")
    names = {cls: name for name, cls in reversed(ACTIVATIONS.items())}
    if type(mlp.activation) not in names:
        refuse("gpt2", f"mlp.activation among {', '.join(ACTIVATIONS)}")
    if type(attention) is not Causal or attention.window or attention.heads()[0] != attention.heads()[1]:
        refuse("gpt2", "attention=causal with n_kv_heads=n_heads and no window")
    if attention.width(spec.d_model) * attention.heads()[0] != spec.d_model:
        refuse("gpt2", "head_dim=d_model/n_heads")
    config = GPT2Config(
        vocab_size=spec.vocab,
        n_positions=spec.seq_len,
        n_embd=spec.d_model,
        n_layer=spec.n_layers,
        n_head=attention.heads()[0],
        n_inner=mlp.width(spec.d_model),
        activation_function=names[type(mlp.activation)],
        resid_pdrop=spec.dropout,
        embd_pdrop=spec.dropout,
        attn_pdrop=spec.dropout if attention.dropout is None else attention.dropout,
        layer_norm_epsilon=norm.eps,
        initializer_range=spec.init_std,
        tie_word_embeddings=spec.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    check_nothing_lost("gpt2", spec, spec_of(config), added=(".bias",))
    return config


def from_layout(model: GPT2LMHeadModel) -> GPTForCausalLM:
    """transformers' GPT-2 as ours, with copied weights in their dtype."""
    spec = spec_of(model.config)
    theirs = model.state_dict()
    state = {
        "embedding.weight": theirs["transformer.wte.weight"],
        "position.weight": theirs["transformer.wpe.weight"],
        "norm.weight": theirs["transformer.ln_f.weight"],
        "norm.bias": theirs["transformer.ln_f.bias"],
        "head.weight": theirs["lm_head.weight"],
    }
    for i in range(spec.n_layers):
        for ours, name, transposed in LAYER:
            weight = theirs[f"transformer.h.{i}.{name}.weight"]
            state[f"blocks.{i}.{ours}.weight"] = weight.t().contiguous() if transposed else weight
            state[f"blocks.{i}.{ours}.bias"] = theirs[f"transformer.h.{i}.{name}.bias"]
    out = as_dtype(GPTForCausalLM(GPTConfig.of(spec)), model.dtype)
    out.load_state_dict(state)
    out.generation_config = model.generation_config
    return out.eval()


def to_layout(model: GPTForCausalLM) -> GPT2LMHeadModel:
    """Ours as transformers' GPT-2. Biases that ours does not have become zeros, which leaves the logits as they are."""
    spec = decoder(model, "gpt2")
    out = as_dtype(GPT2LMHeadModel(config_of(spec)), model.dtype)
    ours = model.state_dict()

    def bias(name: str, like: Tensor) -> Tensor:
        return ours.get(f"{name}.bias", torch.zeros(like.shape[0], dtype=like.dtype, device=like.device))

    state = {
        "transformer.wte.weight": ours["embedding.weight"],
        "transformer.wpe.weight": ours["position.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": bias("norm", ours["norm.weight"]),
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(spec.n_layers):
        for name, theirs, transposed in LAYER:
            weight = ours[f"blocks.{i}.{name}.weight"]
            state[f"transformer.h.{i}.{theirs}.weight"] = weight.t().contiguous() if transposed else weight
            state[f"transformer.h.{i}.{theirs}.bias"] = bias(f"blocks.{i}.{name}", weight)
    out.load_state_dict(state)
    out.generation_config = model.generation_config
    return out.eval()


LAYOUTS = {"gpt2": Layout(spec_of, config_of, from_layout, to_layout)}
