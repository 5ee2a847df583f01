"""Per-token feed-forward networks: the base of all kinds and the options of those made of matrices.

A network is a module `forward(x [B, T, D], at) -> [B, T, D]`; `at` says where the tokens stand, and a network with a
loss of its own (load balance) hands it to `at.add_loss`. FLOPs that are in no 2-D parameter are `flops_per_token(T)`.
mlp.py ends with the registry.   D model width, M hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from models.cost import Ops
from models.parts.linear import Dense, Linear
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class MLP(Part):
    """A kind of MLP: `build(block)`, `n_parameters(block)`, and `ops(block)` of one token.

    branches: whether there is a branch at all; without one the block has no norms and no sum for it either.
    """

    kinds: ClassVar[dict[str, type]]
    branches: ClassVar[bool] = True

    def build(self, block: BlockSpec) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, block: BlockSpec) -> int:
        raise NotImplementedError

    def ops(self, block: BlockSpec) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class Matrices(MLP):
    """What kinds with a hidden width share: n matrices into it or out of it, the last one `down`.

    The laboratory's `mlp_down_projs` (k matrices down, summed) is left out: their sum is one matrix.

    hidden: hidden width, one or one per layer; none: about as many parameters as a plain MLP of 4 * d_model
    bias: whether the matrices have biases; none: as the family's `bias` says
    up_bias: whether those into the hidden width have; none: as `bias`
    down_bias: whether those out of it have; none: as `bias`
    linear: kind of linear layer
    down_linear: kind of those out of the hidden width; none: as `linear`
    """

    hidden: int | tuple[int, ...] | None = None
    bias: bool | None = None
    up_bias: bool | None = None
    down_bias: bool | None = None
    linear: Linear = field(default_factory=Dense)
    down_linear: Linear | None = None

    def n_matrices(self) -> int:
        """Matrices of D x M numbers."""
        raise NotImplementedError

    def width(self, d: int) -> int:
        """8 D^2 / n_matrices for the parameters of a plain MLP; in multiples of 64, unless that is 4 D already."""
        if isinstance(self.hidden, int):
            return self.hidden
        n = self.n_matrices()
        return 4 * d if n == 2 else -(-(8 * d) // (64 * n)) * 64

    def biases(self, block: BlockSpec) -> tuple[bool, bool]:
        """Of the matrices into the hidden width, and out of it."""
        both = block.bias_of(self)
        return both if self.up_bias is None else self.up_bias, both if self.down_bias is None else self.down_bias

    @property
    def down(self) -> Linear:
        """The kind of the matrices out of the hidden width."""
        return self.linear if self.down_linear is None else self.down_linear

    def refuses(self, block: BlockSpec) -> str | None:
        hidden = self.width(block.d_model)
        if hidden < 1:
            return f"hidden={hidden} must be above 0"
        if self.bias is not None and self.up_bias is not None and self.down_bias is not None:
            return f"bias={self.bias} has no effect beside up_bias and down_bias; leave one of the three out"
        return self.linear.refuses(block) or self.down.refuses(block)
