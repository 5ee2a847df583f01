"""GPT with replaceable attention, MLP, norm and positions.   B batch, T time, D model width."""

from __future__ import annotations

from torch import Tensor, nn

from models.gpt.config import GPT, GPTConfig
from models.lm import LM
from models.memory import At, Slots
from models.parts.block import Block


class GPTForCausalLM(LM):
    """Embedding and positions, blocks, mixture over depth, norm, head. Layers may use the weights of earlier ones."""

    config_class = GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        spec: GPT = self.spec  # type: ignore[assignment]
        self.blocks = nn.ModuleList()
        for i, block in enumerate(spec.blocks()):
            owners = (spec.share_attention.owner(i, spec.n_layers), spec.share_mlp.owner(i, spec.n_layers))
            mixer, mlp = (None if j == i else self.blocks[j] for j in owners)
            self.blocks.append(
                Block(block, mixer if mixer is None else mixer.mixer, mlp if mlp is None else mlp.mlp)  # type: ignore
            )
        self.depth = spec.depth.build(spec.n_layers, spec.d_model)
        self.post_init()

    def applications(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def stack(self, x: Tensor, at: At, mem: Slots | None = None, trace: list[Tensor] | None = None) -> Tensor:
        shared: tuple = ()
        sources = [x]
        for k, block in enumerate(self.blocks):  # x: [B, T, D]
            x, shared = self.apply_block(block, x, at, mem[k] if mem is not None else None, shared)  # type: ignore[arg-type]
            if self.depth is not None:  # else nothing holds on to the states of all layers, which are large
                sources.append(x)
            if trace is not None:
                trace.append(x)
        return x if self.depth is None else self.depth(sources)
