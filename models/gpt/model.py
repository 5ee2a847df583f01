"""GPT with replaceable attention, MLP, norm and positions.   B batch, T time, D model width."""

from __future__ import annotations

from torch import Tensor, nn

from models.gpt.config import GPTConfig
from models.lm import LM
from models.memory import At, Slots
from models.parts.block import Block


class GPTForCausalLM(LM):
    """Embedding (+ positions), blocks, norm, head."""

    config_class = GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(spec) for spec in self.spec.blocks())
        self.post_init()

    def applications(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def stack(self, x: Tensor, at: At, mem: Slots | None = None, trace: list[Tensor] | None = None) -> Tensor:
        shared: tuple = ()
        for k, block in enumerate(self.blocks):  # x: [B, T, D]
            x, shared = self.apply_block(block, x, at, mem[k] if mem is not None else None, shared)  # type: ignore[arg-type]
            if trace is not None:
                trace.append(x)
        return x
