"""Unmodified transformers models behind what the engine knows: `run(ids, at, mem)` and `memory(rows, length)`.

Keys and values go to our Slots through `Cache.update`; the mask is given ready-made, so the model's own padding logic
is not used. Seen equal, token for token, to `generate` for Llama, GPT-2, Qwen3 and Gemma3 (sliding windows included).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.lm import LM, last_real
from models.memory import At, Field, Slots, visible
from models.spec import ConfigError


class Foreign:
    """A transformers causal model with `run` and `memory`. Not a module: `model` stays what it was.

    Raises ConfigError for an architecture whose memory is not keys and values per layer (a state space).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        config = self.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        n_heads = getattr(config, "num_attention_heads", None)
        if n_heads is None or not kinds <= {"full_attention", "sliding_attention"}:
            raise ConfigError(
                f"{type(model).__name__} remembers more than keys and values ({', '.join(sorted(kinds))}); "
                "the engine cannot serve it, transformers' generate can"
            )
        if config._attn_implementation not in ("sdpa", "eager"):
            model.set_attn_implementation("sdpa")
        self.kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        window = getattr(config, "sliding_window", None)
        self.by_kind = "sliding_attention" in kinds  # such models take one mask per kind of layer
        self.window = window if self.by_kind or getattr(config, "use_sliding_window", True) else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)  # device, dtype, generation_config, eval(), ...

    def memory(self, rows: int, length: int = 64, dtype: torch.dtype | None = None) -> Slots:
        """Keys and values of every layer, `rows` x `length` tokens."""
        fields = {"k": Field((self.kv_heads, self.head_dim)), "v": Field((self.kv_heads, self.head_dim))}
        specs = [fields] * self.config.num_hidden_layers
        return Slots(specs, rows, length, dtype or self.model.dtype, self.model.device)

    @torch.no_grad()
    def run(self, ids: Tensor, at: At, mem: Slots, last: bool = False) -> Tensor:
        """As LM.run: right-padded ids [B, T] at explicit rows -> logits [B, T, V], or [B, 1, V] with `last`."""
        pos = at.pos
        if at.n is not None:  # a pad's position may lie beyond a learned table
            pos = torch.where(torch.arange(ids.shape[1], device=pos.device) < at.n[:, None], pos, 0)
        full = self._mask(visible(at, True))
        mask: Any = full
        if self.by_kind:
            mask = {"full_attention": full, "sliding_attention": self._mask(visible(at, True, self.window))}
        elif self.window is not None:
            mask = self._mask(visible(at, True, self.window))
        mem.at = at
        try:
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=pos,
                past_key_values=mem,
                use_cache=True,
                logits_to_keep=1 if last and at.n is None else 0,
            ).logits
        finally:
            mem.at = None
        return last_real(out, at) if last else out

    def _mask(self, ok: Tensor) -> Tensor:
        """[B, 1, T, S]: boolean for SDPA, additive for the eager path."""
        ok = ok[:, None]
        if self.config._attn_implementation == "sdpa":
            return ok
        return torch.zeros(ok.shape, dtype=self.model.dtype, device=ok.device).masked_fill_(
            ~ok, torch.finfo(self.model.dtype).min
        )


def runner(model: nn.Module) -> LM | Foreign:
    """What the engine runs: our models as they are, others behind Foreign."""
    return model if isinstance(model, LM) else Foreign(model)
