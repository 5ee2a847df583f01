"""A second family, made up for tests: one block applied `loops` times. Known to every process by NOVELLA_IMPORTS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from models.families import register
from models.family import Family, FamilyConfig
from models.lm import LM
from models.memory import At, Slots
from models.parts.attention import Attention, Causal
from models.parts.block import Block, BlockSpec, Layer
from models.parts.mlp import MLP, Plain
from models.parts.norm import Norm, RMSNorm
from models.parts.position import Position, Rotary


@dataclass(frozen=True)
class Looped(Family):
    """One block, applied again and again.

    loops: how often
    """

    vocab_size: int | None = None
    d_model: int = 32
    loops: int = 2
    seq_len: int = 32
    attention: Attention = field(default_factory=lambda: Causal(n_heads=2))
    mlp: MLP = field(default_factory=Plain)
    norm: Norm = field(default_factory=RMSNorm)
    position: Position = field(default_factory=Rotary)
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.loops < 1:
            raise ValueError(f"loops={self.loops} must be at least 1")
        self.blocks()[0].check()

    def blocks(self) -> tuple[BlockSpec, ...]:
        parts = {name: getattr(self, name) for name in ("norm", "position", "attention", "mlp")}
        return (BlockSpec(Layer(0, 1), self.d_model, self.seq_len, False, self.dropout, **parts),)

    def n_parameters(self) -> int:
        embedding = self.vocab * self.d_model * (1 if self.tie_embeddings else 2)
        return embedding + self.blocks()[0].n_parameters() + self.norm.n_parameters(self.d_model, False)


class LoopedConfig(FamilyConfig):
    model_type = "test_looped"
    family: ClassVar[type] = Looped


class LoopedForCausalLM(LM):
    config_class = LoopedConfig

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.block = Block(self.spec.blocks()[0])
        self.post_init()

    def applications(self) -> list[Block]:
        return [self.block] * self.spec.loops

    def stack(self, x: Tensor, at: At, mem: Slots | None = None, trace: list[Tensor] | None = None) -> Tensor:
        shared: tuple = ()
        for k, block in enumerate(self.applications()):  # x: [B, T, D]
            x, shared = self.apply_block(block, x, at, mem[k] if mem is not None else None, shared)
            if trace is not None:
                trace.append(x)
        return x


register("looped", Looped, LoopedConfig, lambda: LoopedForCausalLM)
