"""Known shapes of the GPT family. `PRESETS[name]()` gives a spec; `dataclasses.replace` changes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from models.gpt.config import GPT
from models.parts.activation import GELUTanh
from models.parts.attention import Causal
from models.parts.mlp import Plain, SwiGLU
from models.parts.norm import Hypersphere, LayerNorm, Norm, PartialRMSNorm, RMSNorm
from models.parts.placement import Peri
from models.parts.position import Learned, Rotary
from models.parts.qk_norm import L2QKNorm


def gpt2(d_model: int, n_layers: int, n_heads: int) -> GPT:
    """GPT-2's shape: learned positions, LayerNorm and biases everywhere, tanh GELU, tied head. Radford et al., 2019."""
    return GPT(
        vocab_size=50257,
        d_model=d_model,
        n_layers=n_layers,
        seq_len=1024,
        attention=Causal(n_heads=n_heads),
        mlp=Plain(activation=GELUTanh()),
        norm=LayerNorm(),
        position=Learned(),
        bias=True,
    )


def gpt2_124m() -> GPT:
    return gpt2(768, 12, 12)


def gpt2_355m() -> GPT:
    return gpt2(1024, 24, 16)


def gpt2_774m() -> GPT:
    return gpt2(1280, 36, 20)


def gpt2_1558m() -> GPT:
    return gpt2(1600, 48, 25)


def smollm2(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden: int, base: float) -> GPT:
    """SmolLM2's shape (a Llama): rotary positions, RMSNorm, SwiGLU, no biases, tied head. arXiv:2502.02737."""
    return GPT(
        vocab_size=49152,
        d_model=d_model,
        n_layers=n_layers,
        seq_len=8192,
        attention=Causal(n_heads=n_heads, n_kv_heads=n_kv_heads),
        mlp=SwiGLU(hidden=hidden),
        norm=RMSNorm(eps=1e-5),
        position=Rotary(base=base),
    )


def smollm2_135m() -> GPT:
    return smollm2(576, 30, 9, 3, 1536, 100000.0)


def smollm2_360m() -> GPT:
    return smollm2(960, 32, 15, 5, 2560, 100000.0)


def smollm2_1700m() -> GPT:
    return smollm2(2048, 24, 32, 32, 8192, 130000.0)


def hypersphere(norm: Norm, d_model: int = 768, n_layers: int = 12, n_heads: int = 12, seq_len: int = 2048) -> GPT:
    """Hypersphere GPT: norms on both sides of every branch, unit queries and keys with a learned scale, no biases.

    The learned scale starts at 10, where the original's 1 / sqrt(64) left attention nearly uniform.
    """
    return GPT(
        vocab_size=50257,
        d_model=d_model,
        n_layers=n_layers,
        seq_len=seq_len,
        attention=Causal(n_heads=n_heads, qk_norm=L2QKNorm()),
        mlp=Plain(),
        norm=norm,
        position=Rotary(),
        placement=Peri(),
    )


def hypersphere_124m() -> GPT:
    """Every token on a sphere of radius sqrt(768)."""
    return hypersphere(Hypersphere())


def hypersphere_124m_learned() -> GPT:
    """A learned radius for each norm."""
    return hypersphere(Hypersphere(learned_radius=True))


def hypersphere_124m_layernorm() -> GPT:
    return hypersphere(LayerNorm())


def hypersphere_124m_rmsnorm() -> GPT:
    return hypersphere(RMSNorm(eps=1e-6))


def hypersphere_124m_prmsnorm() -> GPT:
    """The root mean square of the first half of the channels."""
    return hypersphere(PartialRMSNorm(fraction=0.5))


def hypersphere_tiny() -> GPT:
    """The same shape for a laptop: 0.79 M parameters besides the vocabulary's."""
    return dataclasses.replace(hypersphere(Hypersphere(), 128, 4, 4, 256), vocab_size=None)


def nanogpt_char() -> GPT:
    """nanoGPT's character-level setting for a CPU: 0.80 M parameters besides the vocabulary's."""
    return GPT(d_model=128, n_layers=4, seq_len=64, attention=Causal(n_heads=4))


def tiny() -> GPT:
    """For tests and first tries on a laptop."""
    return GPT(
        d_model=64,
        n_layers=2,
        seq_len=128,
        attention=Causal(n_heads=4, n_kv_heads=2),
        mlp=SwiGLU(hidden=128),
        norm=RMSNorm(),
        position=Rotary(),
    )


PRESETS: dict[str, Callable[[], GPT]] = {
    f.__name__: f
    for f in (
        gpt2_124m,
        gpt2_355m,
        gpt2_774m,
        gpt2_1558m,
        smollm2_135m,
        smollm2_360m,
        smollm2_1700m,
        hypersphere_124m,
        hypersphere_124m_learned,
        hypersphere_124m_layernorm,
        hypersphere_124m_rmsnorm,
        hypersphere_124m_prmsnorm,
        hypersphere_tiny,
        nanogpt_char,
        tiny,
    )
}
