"""Mixture of experts: each token goes through the few networks that a router picks.   E experts, k picked, N tokens.

No token is ever dropped and none depends on another: a capacity limit would let later tokens push out earlier ones, and
make a prompt's logits depend on what stands beside it in the batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.grouped_linear import grouped_linear
from models.cost import Ops, elementwise, product
from models.memory import At
from models.parts.feedforward import MLP
from models.parts.linear import Latent, Linear
from models.parts.numeric import wide
from models.roles import mark
from models.spec import kind_of

if TYPE_CHECKING:
    from models.parts.block import BlockSpec


def _plain() -> MLP:
    return MLP.kinds["mlp"]()


@dataclass(frozen=True)
class MoE(MLP):
    """y = sum over the top k experts e of g_e expert_e(x), g = softmax of their k router logits W x.

    With k = 1, g is the picked expert's softmax over all E (Switch), or the router would get no gradient. Matrices are
    each expert's own; learned numbers of activations and norms are shared by the experts of a layer. In training, each
    call adds `balance` * E sum_e f_e p_e, where f_e is e's share of the picks and p_e its mean probability (1 when
    even; Switch, arXiv:2101.03961), and `z_loss` * mean logsumexp(W x)^2 (ST-MoE, arXiv:2202.08906); pads do not count.
    Sources: arXiv:1701.06538 (noise), Mixtral, arXiv:2401.04088.

    experts: kind of MLP that every expert is
    n_experts: E
    top_k: k
    balance: weight of the load-balance loss; 0 = none
    z_loss: weight of the router's z-loss; 0 = none
    noisy: whether training adds normal noise times softplus(W_noise x) to the router's logits before they are ranked
    """

    experts: MLP = field(default_factory=_plain)
    n_experts: int | tuple[int, ...] = 8
    top_k: int | tuple[int, ...] = 2
    balance: float = 0.01
    z_loss: float = 0.001
    noisy: bool = False

    @classmethod
    def small(cls) -> MoE:
        """Fits the width that the conformance suite uses."""
        return cls(n_experts=4, experts=MLP.kinds["mlp"](hidden=8))

    def sizes(self) -> tuple[int, int]:
        """E and k of a resolved layer."""
        return self.n_experts, self.top_k  # type: ignore[return-value]

    def stacked(self, groups: Groups) -> MLP:
        """The expert's kind with all E experts' matrices in one."""
        changes = {name: Stacked(self.sizes()[0], linear, groups) for name, linear in self._linears().items()}
        return dataclasses.replace(self.experts, **changes)  # type: ignore[type-var]

    def _linears(self) -> dict[str, Linear]:
        options = {f.name: getattr(self.experts, f.name) for f in dataclasses.fields(self.experts)}  # type: ignore[arg-type]
        return {name: option for name, option in options.items() if isinstance(option, Linear)}

    def build(self, block: BlockSpec) -> nn.Module:
        return Experts(self, block)

    def n_parameters(self, block: BlockSpec) -> int:
        routers = (2 if self.noisy else 1) * block.d_model * self.sizes()[0]
        return routers + self.stacked(Groups()).n_parameters(block)

    def ops(self, block: BlockSpec) -> Ops:
        d, (E, k) = block.d_model, self.sizes()
        router = product(d, E) + Ops(additions=k * E + k, exponentials=k, divisions=k, reductions=k + 1)
        return router + k * self.experts.ops(block) + elementwise(d, multiplies=k, additions=k - 1)

    def refuses(self, block: BlockSpec) -> str | None:
        E, k = self.sizes()
        if E < 2:
            return f"n_experts={E} must be at least 2; one expert is experts={kind_of(self.experts)} itself"
        if not 1 <= k < E:
            return f"top_k={k} must lie between 1 and n_experts - 1 = {E - 1}; with all of them nothing is picked"
        if self.balance < 0 or self.z_loss < 0:
            return f"balance={self.balance} and z_loss={self.z_loss} must not be below 0"
        if isinstance(self.experts, MoE):
            return "experts that pick among experts are one larger mixture; raise n_experts instead"
        if not self._linears():
            return f"experts={kind_of(self.experts)} have no matrices of their own, so all of them are the same"
        if reason := self.experts.refuses(block):
            return f"experts={kind_of(self.experts)}: {reason}"
        return None


class Groups:
    """Where each expert's rows end, set by each call for the matrices inside."""

    ends: Tensor | None = None


class Experts(nn.Module):
    def __init__(self, spec: MoE, block: BlockSpec) -> None:
        super().__init__()
        self.spec, d, (self.E, self.k) = spec, block.d_model, spec.sizes()
        self.groups = Groups()
        self.router = mark(nn.Linear(d, self.E, bias=False), weight="matrix")
        self.noise = mark(nn.Linear(d, self.E, bias=False), weight="matrix") if spec.noisy else None
        self.experts = spec.stacked(self.groups).build(block)

    def flops_per_token(self, T: int) -> float:
        """Of the k experts that a token goes through."""
        stacks = [m for m in self.experts.modules() if isinstance(m, StackedLinear)]
        return 2.0 * self.k * sum(m.weight[0].numel() for m in stacks)

    def forward(self, x: Tensor, at: At) -> Tensor:
        B, T, D = x.shape
        logits = self.route(x)  # [B, T, E]
        g, picked = self.pick(logits)  # [B, T, k]
        if self.training:
            self.add_losses(logits, picked, at)
        expert = picked.flatten()
        order = expert.argsort(stable=True)
        self.groups.ends = (expert[:, None] <= torch.arange(self.E, device=x.device)).sum(0)
        # Each row of the copies is read once and written once, so that no gradient depends on an order of additions.
        copies = x.unsqueeze(2).expand(B, T, self.k, D).reshape(1, -1, D)
        y = self.experts(copies[:, order], at)[0]
        self.groups.ends = None
        y = y[order.argsort()].view(B, T, self.k, D)
        return (wide(y) * g[..., None]).sum(2).to(y.dtype)

    def route(self, x: Tensor) -> Tensor:
        """Router logits, in float32 at least: rounding them changes which experts a token meets."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(wide(x), wide(self.router.weight))
            if self.noise is not None and self.training:
                scale = F.softplus(F.linear(wide(x), wide(self.noise.weight)))
                logits = logits + torch.randn_like(logits) * scale
        return logits

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts of each token, [..., k]."""
        top, picked = logits.topk(self.k, -1)
        return (top.softmax(-1) if self.k > 1 else logits.softmax(-1).gather(-1, picked)), picked

    def add_losses(self, logits: Tensor, picked: Tensor, at: At) -> None:
        T = logits.shape[1]
        weight = torch.ones_like(logits[..., 0])
        if at.n is not None:
            weight = (torch.arange(T, device=logits.device) < at.n[:, None]).to(weight.dtype)
        weight = weight / weight.sum().clamp(min=1)  # [B, T], sums to 1
        if self.spec.balance:
            picks = F.one_hot(picked, self.E).sum(2).to(weight.dtype) / self.k
            f, p = (torch.einsum("bt,bte->e", weight, t) for t in (picks, logits.softmax(-1)))
            at.add_loss("moe_balance", self.spec.balance * self.E * (f * p).sum())
        if self.spec.z_loss:
            at.add_loss("moe_z", self.spec.z_loss * (weight * logits.logsumexp(-1).square()).sum())


@dataclass(frozen=True)
class Stacked(Linear):
    """One linear layer per group of rows: what `linear` builds, n times. Not a kind of its own."""

    n: int
    linear: Linear
    groups: Groups = field(compare=False)

    def build(self, d_in: int, d_out: int, bias: bool, role: str) -> nn.Module:
        layers = [cast(nn.Linear, self.linear.build(d_in, d_out, bias, role)) for _ in range(self.n)]
        return StackedLinear(layers, self.groups)

    def n_parameters(self, d_in: int, d_out: int, bias: bool) -> int:
        own = d_in * d_out + (d_out if bias else 0)
        return self.n * own + self.linear.n_parameters(d_in, d_out, bias) - own

    def refuses(self, block: BlockSpec) -> str | None:
        return self.linear.refuses(block)


class StackedLinear(nn.Module):
    """[1, n, D] -> [1, n, M]: rows of group g through matrix g. What else a kind learns (bits) the groups share."""

    def __init__(self, layers: list[nn.Linear], groups: Groups) -> None:
        super().__init__()
        first: Any = layers[0]
        self.roles = first.roles
        self.groups = groups
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        # Not [E, M]: what has two dimensions counts as a matrix that every token is multiplied by.
        self.bias = nn.Parameter(torch.zeros(len(layers), 1, first.out_features)) if first.bias is not None else None
        self.kind = first if isinstance(first, Latent) else None
        del first.weight, first.bias

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.kind is not None:
            weight = torch.stack([self.kind.weights(wide(w)) for w in weight.unbind()]).to(weight.dtype)
            x = self.kind.inputs(wide(x)).to(x.dtype)
        bias = self.bias[:, 0] if self.bias is not None else None
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None
        assert self.groups.ends is not None
        return grouped_linear(x[0], weight, self.groups.ends, bias)[None]
