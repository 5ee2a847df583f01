"""Feed-forward networks with one or two ways up and one or two down, and the registry of all kinds.

D model width, M hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.glu import ACTIVATIONS, glu
from models.cost import Ops
from models.memory import At
from models.parts.activation import GELU, Activation, NoActivation, ReLU, Sigmoid, SiLU
from models.parts.feedforward import MLP, Matrices
from models.parts.kan import KAN
from models.parts.moe import MoE
from models.spec import kind_of

if TYPE_CHECKING:
    from models.parts.block import BlockSpec

__all__ = ["KAN", "MLP", "DualPath", "Gated", "MoE", "Plain", "SwiGLU"]


@dataclass(frozen=True)
class WithOffsets(Matrices):
    """Kinds whose activation f may be moved: act(h - a) - b in its place.

    activation: act, what stands between the matrices
    x_offset: a, subtracted before the activation
    y_offset: b, subtracted after it
    learned_offsets: whether a and b are learned from there, one number each per layer
    """

    activation: Activation = field(default_factory=GELU)
    x_offset: float = 0.0
    y_offset: float = 0.0
    learned_offsets: bool = False

    @property
    def moved(self) -> bool:
        return self.learned_offsets or self.x_offset != 0 or self.y_offset != 0

    def offset_parameters(self) -> int:
        return 2 if self.learned_offsets else 0

    def offset_ops(self) -> Ops:
        """Per hidden element."""
        both = 2 if self.learned_offsets else (self.x_offset != 0) + (self.y_offset != 0)
        return Ops(additions=both)

    def refuses(self, block: BlockSpec) -> str | None:
        return super().refuses(block) or self.activation.refuses(block)


@dataclass(frozen=True)
class Plain(WithOffsets):
    """y = W2 (act(W1 x - a) - b).   Source: arXiv:1706.03762."""

    @classmethod
    def small(cls) -> Plain:
        """Fits the width that the conformance suite uses."""
        return cls(hidden=24)

    def n_matrices(self) -> int:
        return 2

    def build(self, block: BlockSpec) -> nn.Module:
        return PlainMLP(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        d, m, (up, down) = block.d_model, self.width(block.d_model), self.biases(block)
        matrices = self.linear.n_parameters(d, m, up) + self.down.n_parameters(m, d, down)
        return matrices + self.activation.n_parameters() + self.offset_parameters()

    def ops(self, block: BlockSpec) -> Ops:
        d, m, (up, down) = block.d_model, self.width(block.d_model), self.biases(block)
        between = m * (self.activation.ops() + self.offset_ops())
        return self.linear.ops(d, m, up) + between + self.down.ops(m, d, down)


@dataclass(frozen=True)
class Gated(Matrices):
    """y = W3 (act(W1 x) * W2 x), the base of kinds that differ in act."""

    @classmethod
    def small(cls) -> Gated:
        """Fits the width that the conformance suite uses."""
        return cls(hidden=24)

    def gate(self) -> Activation:
        """act."""
        raise NotImplementedError

    def n_matrices(self) -> int:
        return 3

    def build(self, block: BlockSpec) -> nn.Module:
        return GatedMLP(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        d, m, (up, down) = block.d_model, self.width(block.d_model), self.biases(block)
        matrices = self.linear.n_parameters(d, 2 * m, up) + self.down.n_parameters(m, d, down)
        return matrices + self.gate().n_parameters()

    def ops(self, block: BlockSpec) -> Ops:
        d, m, (up, down) = block.d_model, self.width(block.d_model), self.biases(block)
        between = m * (self.gate().ops() + Ops(multiplies=1))
        return self.linear.ops(d, 2 * m, up) + between + self.down.ops(m, d, down)

    def refuses(self, block: BlockSpec) -> str | None:
        return super().refuses(block) or self.gate().refuses(block)


@dataclass(frozen=True)
class SwiGLU(Gated):
    """y = W3 (act(W1 x) * W2 x), with SiLU unless another activation is named.   Source: arXiv:2002.05202.

    hidden: hidden width, one or one per layer; none: 8/3 * d_model rounded up to a multiple of 64, which gives about
        as many parameters as a plain MLP of 4 * d_model
    activation: applied to the gate
    """

    activation: Activation = field(default_factory=SiLU)

    def gate(self) -> Activation:
        return self.activation


@dataclass(frozen=True)
class GLU(Gated):
    """y = W3 (sigmoid(W1 x) * W2 x).   Source: arXiv:1612.08083."""

    def gate(self) -> Activation:
        return Sigmoid()


@dataclass(frozen=True)
class GEGLU(Gated):
    """y = W3 (gelu(W1 x) * W2 x).   Source: arXiv:2002.05202."""

    def gate(self) -> Activation:
        return GELU()


@dataclass(frozen=True)
class ReGLU(Gated):
    """y = W3 (max(W1 x, 0) * W2 x).   Source: arXiv:2002.05202."""

    def gate(self) -> Activation:
        return ReLU()


@dataclass(frozen=True)
class Bilinear(Gated):
    """y = W3 (W1 x * W2 x).   Source: arXiv:2002.05202."""

    def gate(self) -> Activation:
        return NoActivation()


@dataclass(frozen=True)
class DualPath(WithOffsets):
    """y = W2 (act(h - a) - b) + W3 (-act(-(h + a)) - b), h = W1 x: what act lets through of both signs, apart.

    Source: ReaLLM-Forge (dual_path; with `gated` its dual_path_swiglu).

    gated: h = act(W1 x) * Wg x instead
    """

    gated: bool = False

    @classmethod
    def small(cls) -> DualPath:
        """Fits the width that the conformance suite uses."""
        return cls(hidden=24)

    def n_matrices(self) -> int:
        return 4 if self.gated else 3

    def build(self, block: BlockSpec) -> nn.Module:
        return DualPathMLP(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        d, m, (up, down) = block.d_model, self.width(block.d_model), self.biases(block)
        matrices = self.linear.n_parameters(d, (1 + self.gated) * m, up) + 2 * self.down.n_parameters(m, d, down)
        return matrices + self.activation.n_parameters() + self.offset_parameters()

    def ops(self, block: BlockSpec) -> Ops:
        d, m, (up, down) = block.d_model, self.width(block.d_model), self.biases(block)
        paths = 2 * m * (self.activation.ops() + self.offset_ops())
        gate = m * (self.activation.ops() + Ops(multiplies=1)) if self.gated else Ops()
        return self.linear.ops(d, (1 + self.gated) * m, up) + gate + paths + 2 * self.down.ops(m, d, down)


@dataclass(frozen=True)
class Identity(MLP):
    """y = x: the branch adds what its norm has made of the stream."""

    def build(self, block: BlockSpec) -> nn.Module:
        return IdentityMLP()

    def n_parameters(self, block: BlockSpec) -> int:
        return 0

    def ops(self, block: BlockSpec) -> Ops:
        return Ops()


@dataclass(frozen=True)
class NoMLP(Identity):
    """x: the block has one branch, its mixer's, and no norm for another.   Source: Mamba, arXiv:2312.00752."""

    branches = False

    def refuses(self, block: BlockSpec) -> str | None:
        if block.parallel:
            return "parallel=true adds two branches that read one input, and there is one; leave parallel out"
        return None


class Offsets(nn.Module):
    """A function f as f(h - a) - b, and mirrored as -f(-(h + a)) - b."""

    def __init__(self, spec: WithOffsets) -> None:
        super().__init__()
        self.f: Callable[[Tensor], Tensor] = spec.activation.build()
        self.a: Tensor | float = spec.x_offset
        self.b: Tensor | float = spec.y_offset
        if spec.learned_offsets:
            self.a, self.b = (nn.Parameter(torch.tensor(float(v))) for v in (spec.x_offset, spec.y_offset))
            self.roles = {"a": "scalar", "b": "scalar"}
            self.initial = {"a": spec.x_offset, "b": spec.y_offset}

    def forward(self, h: Tensor) -> Tensor:
        return self.f(h - self.a) - self.b

    def mirrored(self, h: Tensor) -> Tensor:
        return -self.f(-(h + self.a)) - self.b


class PlainMLP(nn.Module):
    def __init__(self, spec: Plain, block: BlockSpec) -> None:
        super().__init__()
        d, m, (up, down) = block.d_model, spec.width(block.d_model), spec.biases(block)
        self.up = spec.linear.build(d, m, up, "matrix")
        self.down = spec.down.build(m, d, down, "residual")
        self.act: Callable[[Tensor], Tensor] = Offsets(spec) if spec.moved else spec.activation.build()

    def forward(self, x: Tensor, at: At) -> Tensor:  # [B, T, D]
        return self.down(self.act(self.up(x)))


class GatedMLP(nn.Module):
    """One matrix holds gate and up, so that there is one product instead of two."""

    def __init__(self, spec: Gated, block: BlockSpec) -> None:
        super().__init__()
        d, m, (up, down) = block.d_model, spec.width(block.d_model), spec.biases(block)
        self.gate_up = spec.linear.build(d, 2 * m, up, "matrix")
        self.down = spec.down.build(m, d, down, "residual")
        self.act: Callable[[Tensor], Tensor] = spec.gate().build()
        kind = kind_of(spec.gate())
        self.fused = kind if kind in ACTIVATIONS else None  # the kernel knows activations by the registry's names

    def forward(self, x: Tensor, at: At) -> Tensor:  # [B, T, D]
        h = self.gate_up(x)
        if self.fused is not None:
            return self.down(glu(h, activation=self.fused))
        gate, up = h.chunk(2, -1)
        return self.down(self.act(gate) * up)


class DualPathMLP(nn.Module):
    def __init__(self, spec: DualPath, block: BlockSpec) -> None:
        super().__init__()
        d, m, (up, down) = block.d_model, spec.width(block.d_model), spec.biases(block)
        self.gated = spec.gated
        self.up = spec.linear.build(d, (1 + spec.gated) * m, up, "matrix")
        self.act = Offsets(spec)
        self.down = spec.down.build(m, d, down, "residual")
        self.down_mirrored = spec.down.build(m, d, down, "residual")

    def forward(self, x: Tensor, at: At) -> Tensor:  # [B, T, D]
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = self.act.f(gate) * h
        return self.down(self.act(h)) + self.down_mirrored(self.act.mirrored(h))


class IdentityMLP(nn.Module):
    def forward(self, x: Tensor, at: At) -> Tensor:
        return x


MLP.kinds = {
    "mlp": Plain,
    "swiglu": SwiGLU,
    "glu": GLU,
    "geglu": GEGLU,
    "reglu": ReGLU,
    "bilinear": Bilinear,
    "dual_path": DualPath,
    "kan": KAN,
    "moe": MoE,
    "identity": Identity,
    "none": NoMLP,
}
