"""The modular decoder's config: a frozen dataclass, and the transformers config around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from models.family import Family, FamilyConfig
from models.parts.attention import Attention, Causal
from models.parts.block import BlockSpec, Layer, at_layer
from models.parts.mlp import MLP, Plain
from models.parts.norm import LayerNorm, Norm
from models.parts.position import Learned, Position
from models.spec import ConfigError, kind_of


@dataclass(frozen=True)
class GPT(Family):
    """A decoder built from replaceable parts. A list for any part or size means one entry per layer.

    vocab_size: tokens in the vocabulary; none: as many as the tokenizer has
    d_model: width of the residual stream
    n_layers: number of blocks
    seq_len: longest context it is trained on, in tokens
    attention: what mixes tokens
    mlp: the feed-forward part
    norm: the norm before each branch; the last layer's kind also stands before the head
    position: what tells places apart
    tie_embeddings: whether the head uses the embedding's matrix
    bias: whether matrices and norms have biases, where a part does not say otherwise
    dropout: of embedding, branches and attention weights, in [0, 1)
    init_std: standard deviation of matrices and embeddings at initialisation
    """

    vocab_size: int | None = None
    d_model: int = 768
    n_layers: int = 12
    seq_len: int = 1024
    attention: Attention | tuple[Attention, ...] = field(default_factory=Causal)
    mlp: MLP | tuple[MLP, ...] = field(default_factory=Plain)
    norm: Norm | tuple[Norm, ...] = field(default_factory=LayerNorm)
    position: Position | tuple[Position, ...] = field(default_factory=Learned)
    tie_embeddings: bool = True
    bias: bool = False
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name, low in (("d_model", 1), ("n_layers", 1), ("seq_len", 1), ("vocab_size", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}={value} must be at least {low}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.init_std <= 0:
            raise ConfigError(f"init_std={self.init_std} must be above 0; 0.02 is usual")
        if isinstance(self.position, tuple):
            for position in self.position:
                if position.embeds:
                    raise ConfigError(
                        f"position={kind_of(position)} is added to the embedding, so it cannot stand in a list per "
                        "layer; give it alone"
                    )
        for block in self.blocks():
            block.check()

    def blocks(self) -> tuple[BlockSpec, ...]:
        """One spec per layer, per-layer lists resolved. Raises ConfigError for a list of the wrong length."""
        return tuple(self._block(Layer(i, self.n_layers)) for i in range(self.n_layers))

    def _block(self, layer: Layer) -> BlockSpec:
        parts = {name: at_layer(getattr(self, name), layer, name) for name in ("norm", "position", "attention", "mlp")}
        return BlockSpec(layer, self.d_model, self.seq_len, self.bias, self.dropout, **parts)

    def n_parameters(self) -> int:
        """V D (twice when untied) + positions + blocks + final norm."""
        blocks, d = self.blocks(), self.d_model
        embedding = self.vocab * d * (1 if self.tie_embeddings else 2)
        position = blocks[-1].position.n_parameters(d, self.seq_len) if blocks[-1].position.embeds else 0
        return embedding + position + sum(b.n_parameters() for b in blocks) + blocks[-1].norm.n_parameters(d, self.bias)


class GPTConfig(FamilyConfig):
    """`GPTConfig(d_model=64, attention={"kind": "causal", "n_heads": 4}, ...)`, or `GPTConfig.of(GPT(...))`."""

    model_type = "novella_gpt"
    family: ClassVar[type] = GPT
