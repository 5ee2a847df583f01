"""Known shapes of the GPT family. `PRESETS[name]()` gives a spec; `dataclasses.replace` changes it."""

from __future__ import annotations

from collections.abc import Callable

from models.gpt.config import GPT
from models.parts.activation import GELUTanh
from models.parts.attention import Causal
from models.parts.mlp import Plain, SwiGLU
from models.parts.norm import LayerNorm, RMSNorm
from models.parts.position import Learned, Rotary


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
        nanogpt_char,
        tiny,
    )
}
