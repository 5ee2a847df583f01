"""Linear maps y = x W^T + b, marked with what they are for.

`matrix` goes into a branch, `residual` is a branch's last one (its initialisation shrinks with depth), `head` gives
logits. Kinds that round do it in training and in evaluation alike, and pass the gradient straight through the rounding
(arXiv:1308.3432). Scales of inputs are taken per token, so that no token or row of a batch has a say in another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cost import WIDTH, Ops, product
from models.parts.numeric import require, straight_through, wide
from models.roles import mark
from models.spec import Part

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


class Linear(Part):
    """A kind of linear layer: `build`, `n_parameters`, `ops` (of one token).

    `build(d_in, d_out, bias, role)` gives a module whose `weight` is the latent full-precision matrix [d_out, d_in].
    """

    kinds: ClassVar[dict[str, type]]

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        raise NotImplementedError

    def n_parameters(self, d_in: int, d_out: int, bias: bool) -> int:
        return d_in * d_out + (d_out if bias else 0)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        raise NotImplementedError

    def refuses(self, block: BlockSpec) -> str | None:
        return None


@dataclass(frozen=True)
class Dense(Linear):
    """y = W x + b."""

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        return marked(nn.Linear(d_in, d_out, bias=bias), role)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        return product(d_in, d_out, bias=bias)


L = TypeVar("L", bound=nn.Linear)


def marked(layer: L, role: str) -> L:
    """A linear layer with its roles."""
    return mark(layer, weight=role) if layer.bias is None else mark(layer, weight=role, bias="bias")


# ---- rounding


def nearest(x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """x rounded to multiples of `step`, at least `low` and at most `high` of them; the gradient is x's."""
    return straight_through((x / step).round().clamp(low, high) * step, x)


def positive(x: Tensor) -> Tensor:
    """A scale that can be divided by: what is all zeros is rounded to zeros by any."""
    return x.clamp(min=1e-5)


def symmetric(x: Tensor, bits: int, whole: bool = False) -> Tensor:
    """Each row (with `whole`, the whole matrix) as whole multiples of max |x| / (2^(bits-1) - 1)."""
    top = 2 ** (bits - 1) - 1
    largest = x.detach().abs()
    largest = largest.amax() if whole else largest.amax(-1, keepdim=True)
    return nearest(x, positive(largest) / top, -top, top)


def affine(x: Tensor, bits: int, whole: bool = False) -> Tensor:
    """Each row (with `whole`, the whole matrix) on 2^bits values from its least to its greatest, 0 among them."""
    fixed = x.detach()
    low, high = fixed.aminmax() if whole else fixed.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = positive(high - low) / (2**bits - 1)
    zero = (low / step).round()
    return straight_through(((fixed / step).round() - zero).clamp(0, 2**bits - 1).add(zero) * step, x)


class Latent(nn.Linear):
    """y = inputs(x) weights(W)^T + b: kinds change the latent matrix and the inputs, in float32 at least."""

    def weights(self, w: Tensor) -> Tensor:
        return w

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights(wide(self.weight)).to(self.weight.dtype)
        return F.linear(self.inputs(wide(x)).to(x.dtype), w, self.bias)


# ---- one or two bits


@dataclass(frozen=True)
class BitNet(Linear):
    """y = Q(x) T(W)^T + b, T(W) = s min(max(round(W / s), -1), 1), s = mean |W|.   Source: b1.58, arXiv:2402.17764.

    activation_bits: bits of Q, per token: multiples of max |x| / (2^(bits-1) - 1)
    """

    activation_bits: int = 8

    def __post_init__(self) -> None:
        _check_bits("bitnet", "activation_bits", self.activation_bits)

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layer = TernaryLinear(d_in, d_out, bias=bias)
        layer.activation_bits = self.activation_bits
        return marked(layer, role)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        return _signed_ops(d_in, d_out, bias, math.log2(3), self.activation_bits)


class TernaryLinear(Latent):
    activation_bits: int

    def weights(self, w: Tensor) -> Tensor:
        return nearest(w, positive(w.detach().abs().mean()), -1, 1)

    def inputs(self, x: Tensor) -> Tensor:
        return symmetric(x, self.activation_bits)


@dataclass(frozen=True)
class Binary(Linear):
    """y = Q(x) B(W)^T + b, B(W) = s sign(W - mean W), s = mean |W - mean W|.   Source: BitNet, arXiv:2310.11453.

    activation_bits: bits of Q, per token: multiples of max |x| / (2^(bits-1) - 1)
    """

    activation_bits: int = 8

    def __post_init__(self) -> None:
        _check_bits("binary", "activation_bits", self.activation_bits)

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layer = BinaryLinear(d_in, d_out, bias=bias)
        layer.activation_bits = self.activation_bits
        return marked(layer, role)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        return _signed_ops(d_in, d_out, bias, 1, self.activation_bits)


class BinaryLinear(Latent):
    activation_bits: int

    def weights(self, w: Tensor) -> Tensor:
        centred = (w - w.mean()).detach()
        scale = centred.abs().mean()
        return straight_through(torch.where(centred < 0, -scale, scale), w)

    def inputs(self, x: Tensor) -> Tensor:
        return symmetric(x, self.activation_bits)


# ---- several bits


@dataclass(frozen=True)
class Quantised(Linear):
    """y = Q(x) Q(W)^T + b, trained with rounded weights and inputs.   Source: arXiv:1712.05877.

    weight_bits: bits of a weight, from 2 to 16
    activation_bits: bits of an input, from 2 to 16; none: inputs are not rounded
    method: symmetric is whole multiples of max |x| / (2^(bits-1) - 1); affine is 2^bits steps from least to greatest
    per_channel: whether each output channel (row of W) has its own scale, or the matrix has one; tokens always have
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    method: Literal["symmetric", "affine"] = "symmetric"
    per_channel: bool = True

    def __post_init__(self) -> None:
        _check_bits("quantised", "weight_bits", self.weight_bits)
        if self.activation_bits is not None:
            _check_bits("quantised", "activation_bits", self.activation_bits)

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layer = QuantisedLinear(d_in, d_out, bias=bias)
        layer.spec = self
        return marked(layer, role)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        scales = Ops(multiplies=d_out, weight_bits=WIDTH * (d_out if self.per_channel else 1))
        if self.activation_bits is None:
            return product(d_in, d_out, self.weight_bits, WIDTH, bias) + scales
        return product(d_in, d_out, self.weight_bits, self.activation_bits, bias) + scales + _rounding_ops(d_in)


class QuantisedLinear(Latent):
    spec: Quantised

    def weights(self, w: Tensor) -> Tensor:
        return METHODS[self.spec.method](w, self.spec.weight_bits, not self.spec.per_channel)

    def inputs(self, x: Tensor) -> Tensor:
        bits = self.spec.activation_bits
        return x if bits is None else METHODS[self.spec.method](x, bits)


@dataclass(frozen=True)
class AdaptiveBits(Linear):
    """y = Q(x) Q_b(W)^T + b0 with b = round(low + (high - low) sigmoid(u)) bits, u learned per matrix.

    Q_b(W) is k W's nearest value of 2^b equally spaced ones on [-max |W|, max |W|]. u has a gradient: rounding alone is
    passed straight through, so that Q_b(W) depends on the step between the values, and the step on b.
    Source: the step's gradient as in LSQ, arXiv:1902.08153.

    bits: b at the start, between low and high
    low: fewest bits, at least 1
    high: most bits, at most 16
    activation_bits: bits of Q, per token: multiples of max |x| / (2^(bits-1) - 1)
    """

    bits: float = 6.0
    low: int = 1
    high: int = 8
    activation_bits: int = 8

    def __post_init__(self) -> None:
        _check_bits("adaptive_bits", "activation_bits", self.activation_bits)
        require(
            1 <= self.low < self.bits < self.high <= 16,
            f"adaptive_bits: low={self.low} < bits={self.bits} < high={self.high} must hold, within 1 and 16",
        )

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layer = AdaptiveLinear(self, d_in, d_out, bias)
        layer.roles = {**marked(layer, role).roles, "width": "scalar"}  # type: ignore[assignment,dict-item]
        return layer

    def n_parameters(self, d_in: int, d_out: int, bias: bool) -> int:
        return super().n_parameters(d_in, d_out, bias) + 1

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        """At the bits it starts with."""
        scales = Ops(multiplies=d_out, weight_bits=WIDTH)
        return product(d_in, d_out, round(self.bits), self.activation_bits, bias) + scales + _rounding_ops(d_in)


class AdaptiveLinear(Latent):
    def __init__(self, spec: AdaptiveBits, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.spec = spec
        share = (spec.bits - spec.low) / (spec.high - spec.low)
        self.initial = {"width": math.log(share / (1 - share))}
        self.width = nn.Parameter(torch.tensor(self.initial["width"]))

    def bits(self) -> Tensor:
        """Bits in use, a whole number with the gradient of the learned one."""
        b = self.spec.low + (self.spec.high - self.spec.low) * torch.sigmoid(wide(self.width))
        return straight_through(b.round(), b)

    def weights(self, w: Tensor) -> Tensor:
        largest = positive(w.detach().abs().amax())
        step = 2 * largest / (torch.exp2(self.bits()) - 1)
        place = (w + largest) / step
        return straight_through(place.round(), place) * step - largest

    def inputs(self, x: Tensor) -> Tensor:
        return symmetric(x, self.spec.activation_bits)


# ---- unit rows


@dataclass(frozen=True)
class UnitRows(Linear):
    """y_j = W_j . x / sqrt(||W_j||^2 + eps) + b_j: rows of length 1.   Source: nGPT, arXiv:2410.01131.

    eps: added to the squared length, above 0
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.eps > 0, f"unit_rows: eps={self.eps} must be above 0, or a row of zeros gives NaN")

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layer = UnitLinear(d_in, d_out, bias=bias)
        layer.eps = self.eps
        return marked(layer, role)

    def ops(self, d_in: int, d_out: int, bias: bool) -> Ops:
        return product(d_in, d_out, bias=bias)


class UnitLinear(Latent):
    """The lengths are taken out of the matrix once, so a token costs what it costs without."""

    eps: float

    def weights(self, w: Tensor) -> Tensor:
        return w * torch.rsqrt(w.square().sum(-1, keepdim=True) + self.eps)


def _rounding_ops(d_in: int) -> Ops:
    """The largest of a token's inputs, its inverse, then a product and a rounding of each."""
    return Ops(multiplies=d_in, additions=2 * d_in, divisions=1, reductions=1)


def _signed_ops(d_in: int, d_out: int, bias: bool, weight_bits: float, input_bits: int) -> Ops:
    """Weights -1, 0 and 1 add and subtract; one product per output brings both scales back."""
    signs = Ops(
        additions=d_in * d_out + (d_out if bias else 0),
        multiplies=d_out,
        weight_bits=d_in * d_out * weight_bits + WIDTH * (1 + (d_out if bias else 0)),
        bit_operations=d_in * d_out * weight_bits * input_bits,
    )
    return signs + _rounding_ops(d_in)


def _check_bits(kind: str, name: str, bits: int) -> None:
    require(2 <= bits <= 16, f"{kind}: {name}={bits} must lie in [2, 16]; 8 is usual")


METHODS = {"symmetric": symmetric, "affine": affine}

Linear.kinds = {
    "dense": Dense,
    "bitnet": BitNet,
    "binary": Binary,
    "quantised": Quantised,
    "adaptive_bits": AdaptiveBits,
    "unit_rows": UnitRows,
}
