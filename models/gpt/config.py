"""The modular decoder's config: a frozen dataclass, and the transformers config around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from models.cost import Ops
from models.family import Family, FamilyConfig
from models.parts.attention import Attention, Causal
from models.parts.block import BlockSpec, Layer, at_layer
from models.parts.depth import Depth, Last
from models.parts.embedding import Embedding, Table
from models.parts.mlp import MLP, Plain
from models.parts.norm import LayerNorm, NoNorm, Norm
from models.parts.placement import Placement, Pre
from models.parts.position import Learned, Position
from models.parts.residual import Add, Residual
from models.parts.sharing import Own, Shared, Sharing
from models.parts.softmax import PlainSoftmax, Softmax
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
    norm: the norm of each branch
    position: what tells places apart
    placement: where norms stand around a branch
    mlp_placement: the same for the MLP's branch; none: as `placement`
    residual: how a branch joins the residual stream
    mlp_residual: the same for the MLP's branch; none: as `residual`
    parallel: whether attention and MLP read the same input and are added together
    embedding: the table and what stands between it and the residual stream
    embedding_norm: norm of the token embeddings; none: no norm
    position_norm: norm after positions were added; none: no norm
    depth: what the final norm reads
    final_norm: the norm before the head; none: the last layer's kind
    head_norm: norm of the head's rows, one per token of the vocabulary; none: no norm. Its radius sets the size of the
        first logits: rmsnorm's is sqrt(d_model), where a plain head starts at init_std sqrt(d_model)
    logit_softcap: c of c tanh(logits / c); none: no cap
    output_softmax: what turns logits into the distribution over tokens, in training and everywhere else
    tie_embeddings: whether the head uses the embedding's matrix
    share_attention: layers that use the same attention weights
    share_mlp: layers that use the same MLP weights
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
    placement: Placement | tuple[Placement, ...] = field(default_factory=Pre)
    mlp_placement: Placement | tuple[Placement, ...] | None = None
    residual: Residual | tuple[Residual, ...] = field(default_factory=Add)
    mlp_residual: Residual | tuple[Residual, ...] | None = None
    parallel: bool | tuple[bool, ...] = False
    embedding: Embedding = field(default_factory=Table)
    embedding_norm: Norm | None = None
    position_norm: Norm | None = None
    depth: Depth = field(default_factory=Last)
    final_norm: Norm | None = None
    head_norm: Norm | None = None
    logit_softcap: float | None = None
    output_softmax: Softmax = field(default_factory=PlainSoftmax)
    tie_embeddings: bool = True
    share_attention: Sharing = field(default_factory=Own)
    share_mlp: Sharing = field(default_factory=Own)
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
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise ConfigError(f"logit_softcap={self.logit_softcap} must be above 0; 30 is usual, none is no cap")
        self._check_position()
        for block in self.blocks():
            block.check()
        self._check_second_branch()
        self._check_norms()
        self._check_sharing()
        for name, reason in (
            ("output_softmax", self.output_softmax.refuses_output()),
            ("embedding", self.embedding.refuses(self)),
            ("depth", self.depth.refuses(self.n_layers)),
        ):
            if reason:
                raise ConfigError(f"{name}={kind_of(getattr(self, name))}: {reason}")

    def _check_position(self) -> None:
        """What belongs to the whole model stands in no list, and a bias that all layers share fits all of them."""
        blocks = self.blocks()
        for position in self.position if isinstance(self.position, tuple) else ():
            if position.embeds or position.shared:
                what = "is added to the embedding" if position.embeds else "shares one bias among all layers"
                raise ConfigError(
                    f"position={kind_of(position)} {what}, so it cannot stand in a list per layer; give it alone"
                )
        if blocks[-1].position.shared and len({block.attention.scored(block) for block in blocks}) > 1:
            raise ConfigError(
                f"position={kind_of(blocks[-1].position)}: layers that share one bias need equally many heads; give "
                "attention.n_heads one value, or leave shared out"
            )

    def _check_second_branch(self) -> None:
        """What stands around the MLP's own branch needs one layer that has such a branch."""
        given = [name for name in ("mlp_placement", "mlp_residual") if getattr(self, name) is not None]
        if not given or any(block.mlp.branches and not block.parallel for block in self.blocks()):
            return
        if any(block.parallel for block in self.blocks()):
            raise ConfigError(
                f"parallel=true: both branches read one normed input and join in one sum, so {given[0]} has nothing to "
                "stand around; leave it out"
            )
        raise ConfigError(f"mlp=none: there is no second branch for {given[0]} to stand around; leave it out")

    def _check_norms(self) -> None:
        block = self.blocks()[-1]
        for name in ("embedding_norm", "position_norm", "head_norm"):
            if isinstance(getattr(self, name), NoNorm):
                raise ConfigError(f"{name}=identity: {name}=null says the same; leave it out")
        for name in ("embedding_norm", "position_norm", "final_norm", "head_norm"):
            norm = getattr(self, name)
            if norm is not None and (reason := norm.refuses(block)):
                raise ConfigError(f"{name}={kind_of(norm)}: {reason}")

    def _check_sharing(self) -> None:
        blocks = self.blocks()
        for name, part in (("share_attention", "attention"), ("share_mlp", "mlp")):
            rule = getattr(self, name)
            if isinstance(rule, Shared) and all(rule.owner(i, self.n_layers) == i for i in range(self.n_layers)):
                raise ConfigError(
                    f"{name}: size={rule.size}, cycle={rule.cycle}, mirror={rule.mirror} shares nothing among "
                    f"n_layers={self.n_layers}; say own, or another pattern"
                )
            for i in range(self.n_layers):
                j = rule.owner(i, self.n_layers)
                wanted, lent = blocks[i], blocks[j]
                parts = (part, "position") if part == "attention" else (part,)
                for p in parts:
                    if getattr(wanted, p) != getattr(lent, p):
                        raise ConfigError(f"{name}: layers {j} and {i} use the same weights but differ in {p}")

    def blocks(self) -> tuple[BlockSpec, ...]:
        """One spec per layer, per-layer lists resolved. Raises ConfigError for a list of the wrong length."""
        return tuple(self._block(Layer(i, self.n_layers)) for i in range(self.n_layers))

    def _block(self, layer: Layer) -> BlockSpec:
        names = ("norm", "position", "attention", "mlp", "placement", "residual", "parallel")
        parts = {name: at_layer(getattr(self, name), layer, name) for name in names}
        for name in ("placement", "residual"):
            own = at_layer(getattr(self, f"mlp_{name}"), layer, f"mlp_{name}")
            parts[f"mlp_{name}"] = parts[name] if own is None else own
        return BlockSpec(layer, self.d_model, self.seq_len, self.bias, self.dropout, **parts)

    def n_parameters(self) -> int:
        """What is outside the blocks + blocks, shared modules once + the mixture over depth."""
        total = self.outer_parameters() + self.depth.n_parameters(self.n_layers, self.d_model)
        for i, block in enumerate(self.blocks()):
            total += block.own_parameters()
            total += block.attention.n_parameters(block) if self.share_attention.owner(i, self.n_layers) == i else 0
            total += block.mlp.n_parameters(block) if self.share_mlp.owner(i, self.n_layers) == i else 0
        return total

    def ops(self, T: int) -> Ops:
        """Operations of one forward pass per token at context T, the head's included."""
        blocks = sum((block.ops(T) for block in self.blocks()), Ops())
        return self.outer_ops(T) + blocks + self.depth.ops(self.n_layers, self.d_model)


class GPTConfig(FamilyConfig):
    """`GPTConfig(d_model=64, attention={"kind": "causal", "n_heads": 4}, ...)`, or `GPTConfig.of(GPT(...))`."""

    model_type = "novella_gpt"
    family: ClassVar[type] = GPT
