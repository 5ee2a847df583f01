"""Mixture of experts against token-by-token loops in float64, against Mixtral, and its losses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from models.families import create
from models.gpt.config import GPT
from models.loss import Loss
from models.memory import At
from models.parts.linear import Linear
from models.parts.linear_attention import NoMixing
from models.parts.mlp import KAN, MLP, DualPath, MoE, Plain, SwiGLU
from models.parts.position import NoPosition
from models.spec import ConfigError


def network(spec, d=4, bias=False, seed=0):
    model = GPT(vocab_size=5, d_model=d, n_layers=1, mlp=spec, bias=bias, position=NoPosition(), attention=NoMixing())
    block = model.blocks()[0]
    module = nn.Module.to(block.mlp.build(block), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module, block


def at_of(B, T, n=None):
    return At.full(B, T)._replace(tables={}, n=n)


def alone(m, block, e):
    """Expert e as a network of its own, with the same weights (copies that gradients flow through are not needed)."""
    expert = nn.Module.to(block.mlp.experts.build(block), torch.float64)
    own = dict(expert.named_parameters())
    mine = dict(m.experts.named_parameters())
    assert {name.replace(".kind.", ".") for name in mine} == set(own)
    values = {}
    for name, p in mine.items():
        target = own[name.replace(".kind.", ".")]
        values[name.replace(".kind.", ".")] = p[e].reshape(target.shape) if p.numel() > target.numel() else p
    return lambda x: torch.func.functional_call(expert, values, (x, None))


def by_loops(m, block, x):
    """x [B, T, D]: every token by itself, through the experts whose logits are largest."""
    experts = [alone(m, block, e) for e in range(m.E)]
    rows = []
    for row in x:
        out = []
        for token in row:
            logits = [(w * token).sum() for w in m.router.weight]
            picked = sorted(range(m.E), key=lambda e: -logits[e].item())[: m.k]
            among = picked if m.k > 1 else range(m.E)
            total = sum(logits[e].exp() for e in among)
            out.append(sum(logits[e].exp() / total * experts[e](token[None, None])[0, 0] for e in picked))
        rows.append(torch.stack(out))
    return torch.stack(rows)


EXPERTS = {
    "mlp": (MoE(n_experts=4, experts=Plain(hidden=5)), False),
    "biases": (MoE(n_experts=3, experts=Plain(hidden=5)), True),
    "top 1": (MoE(n_experts=3, top_k=1, experts=SwiGLU(hidden=5)), False),
    "top 3": (MoE(n_experts=5, top_k=3, experts=SwiGLU(hidden=5, down_bias=True)), False),
    "kan": (MoE(n_experts=3, experts=KAN(middle=(3,))), False),
    "dual path": (MoE(n_experts=3, experts=DualPath(hidden=4, learned_offsets=True, gated=True)), False),
    "unit rows": (MoE(n_experts=3, experts=Plain(hidden=4, linear=Linear.kinds["unit_rows"]())), True),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_value_and_gradients_equal_loops_over_tokens_in_float64(name):
    spec, bias = EXPERTS[name]
    m, block = network(spec, bias=bias)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    leaves = [x, *m.parameters()]
    ours, want = m(x, at_of(2, 5)), by_loops(m, block, x)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-11)
    got = torch.autograd.grad((ours * weight).sum(), leaves)
    expected = torch.autograd.grad((want * weight).sum(), leaves, allow_unused=True)
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-8, atol=1e-10)


def test_experts_of_quantised_matrices_round_each_matrix_by_itself():
    """The scale of b1.58 is a mean over one expert's matrix, not over all of them."""
    m, block = network(MoE(n_experts=3, experts=Plain(hidden=4, linear=Linear.kinds["bitnet"]())))
    with torch.no_grad():
        for layer in (m.experts.up, m.experts.down):
            layer.weight *= torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(m(x, at_of(2, 6)), by_loops(m, block, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("k", [2, 3])
def test_swiglu_experts_equal_mixtral(k):
    d, hidden, E = 8, 6, 5
    config = MixtralConfig(
        hidden_size=d, intermediate_size=hidden, num_local_experts=E, num_experts_per_tok=k, num_attention_heads=2
    )
    theirs = MixtralSparseMoeBlock(config).double().eval()
    m, _ = network(MoE(n_experts=E, top_k=k, experts=SwiGLU(hidden=hidden)), d=d)
    with torch.no_grad():
        theirs.gate.weight.copy_(m.router.weight)
        theirs.experts.gate_up_proj.copy_(m.experts.gate_up.weight)
        theirs.experts.down_proj.copy_(m.experts.down.weight)
    x = torch.randn(2, 7, d, dtype=torch.float64)
    out = theirs(x)
    out = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(m(x, at_of(2, 7)), out, rtol=1e-5, atol=1e-6)  # Mixtral's softmax is float32


def test_no_token_is_dropped_or_moved_by_others():
    """All tokens want the same expert, and each still gets what it gets alone."""
    m, _ = network(MoE(n_experts=4, experts=Plain(hidden=5)))
    with torch.no_grad():
        m.router.weight[0] += 50
    x = torch.rand(1, 9, 4, dtype=torch.float64) + 0.1
    together = m(x, at_of(1, 9))
    one_by_one = torch.cat([m(x[:, t : t + 1], at_of(1, 1)) for t in range(9)], 1)
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
    assert m.pick(m.route(x))[1].eq(0).any(-1).all()


# ---- losses


def losses(m, x, n=None):
    at = at_of(*x.shape[:2], n=n)
    m.train()(x, at)
    return dict(at.tables.get("losses", []))


def test_balance_and_z_loss_equal_loops():
    m, _ = network(MoE(n_experts=4, experts=Plain(hidden=3), balance=0.5, z_loss=0.25))
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    n = torch.tensor([5, 2, 0])
    real = [x[b, t] for b in range(3) for t in range(n[b])]
    share, mean, z = [0.0] * 4, [0.0] * 4, 0.0
    for token in real:
        logits = (m.router.weight @ token).tolist()
        total = sum(math.exp(v) for v in logits)
        for e in sorted(range(4), key=lambda e: -logits[e])[:2]:
            share[e] += 1 / (2 * len(real))
        for e in range(4):
            mean[e] += math.exp(logits[e]) / total / len(real)
        z += math.log(total) ** 2 / len(real)
    got = losses(m, x, n)
    assert got["moe_balance"].item() == pytest.approx(0.5 * 4 * sum(f * p for f, p in zip(share, mean, strict=True)))
    assert got["moe_z"].item() == pytest.approx(0.25 * z)


def test_balance_equals_transformers_per_pick():
    """Theirs sums the k picks' shares, ours averages them, so that 1 means even whatever k is."""
    m, _ = network(MoE(n_experts=5, top_k=3, experts=Plain(hidden=3), balance=1.0))
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    theirs = load_balancing_loss_func((m.route(x).flatten(0, 1),), num_experts=5, top_k=3)
    assert losses(m, x)["moe_balance"].item() == pytest.approx(theirs.item() / 3)


def test_balance_is_one_when_even_and_n_experts_when_one_takes_all():
    m, _ = network(MoE(n_experts=4, top_k=1, experts=Plain(hidden=3), balance=1.0, z_loss=0.0))
    with torch.no_grad():
        m.router.weight.copy_(100 * torch.eye(4))
    even = torch.eye(4, dtype=torch.float64)[None]
    assert losses(m, even)["moe_balance"].item() == pytest.approx(1)
    assert losses(m, even[:, :1].expand(1, 4, 4))["moe_balance"].item() == pytest.approx(4)


def test_pads_change_neither_loss():
    m, _ = network(MoE(n_experts=4, experts=Plain(hidden=3)))
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    padded, bare = losses(m, x, torch.tensor([4])), losses(m, x[:, :4])
    for name, value in bare.items():
        torch.testing.assert_close(padded[name], value)


def test_losses_are_training_s_alone_and_none_without_weights():
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    m, _ = network(MoE(n_experts=4, experts=Plain(hidden=3)))
    at = at_of(1, 3)
    m.eval()(x, at)
    assert "losses" not in at.tables
    m, _ = network(MoE(n_experts=4, experts=Plain(hidden=3), balance=0.0, z_loss=0.0))
    assert losses(m, x) == {}


def test_the_training_loss_of_a_model_holds_them_once_per_layer_and_target():
    spec = GPT(
        vocab_size=9, d_model=8, n_layers=2, seq_len=16, mlp=MoE.small(), attention=NoMixing(), position=NoPosition()
    )
    ids = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0))

    def loss_of(balance, z_loss):
        torch.manual_seed(0)
        model = create(dataclasses.replace(spec, mlp=dataclasses.replace(spec.mlp, balance=balance, z_loss=z_loss)))
        loss, nll = Loss(model.train())(ids, ids)
        return (loss - nll).item(), nll.item()

    both, nll = loss_of(1.0, 1.0)
    (one, nll1), (other, nll2) = loss_of(1.0, 0.0), loss_of(0.0, 1.0)
    assert nll == nll1 == nll2 and loss_of(0.0, 0.0)[0] == 0
    assert both == pytest.approx(one + other, rel=1e-4)
    assert 2 * 12 * 0.9 < one < 2 * 12 * 1.6  # two layers, twelve targets, about 1 each when nearly even


def test_checkpointing_keeps_the_gradients_of_the_losses():
    m, _ = network(MoE(n_experts=4, experts=Plain(hidden=3)))
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)

    def gradients(run):
        at = at_of(1, 6)
        y = run(at)
        total = y.square().sum() + sum(value for _, value in at.tables["losses"])
        return torch.autograd.grad(total, [x, *m.parameters()])

    plain = gradients(lambda at: m(x, at))
    again = gradients(lambda at: checkpoint(m, x, at, use_reentrant=False))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


# ---- router


def test_noise_moves_the_logits_that_are_ranked_over_experts():
    """ReaLLM-Forge added it to another tensor, and ranked over time. Here: logits + normal * softplus(W_noise x)."""
    m, _ = network(MoE(n_experts=5, experts=Plain(hidden=3), noisy=True))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    clean = m.eval().route(x)
    assert torch.equal(clean, x @ m.router.weight.T)
    m.train()
    torch.manual_seed(4)
    noisy = m.route(x)
    torch.manual_seed(4)
    drawn = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(noisy - clean, drawn * torch.log1p((x @ m.noise.weight.T).exp()))
    torch.manual_seed(4)
    g, picked = m.pick(m.route(x))
    for b in range(2):
        for t in range(3):
            order = noisy[b, t].argsort(descending=True)[:2]
            assert picked[b, t].tolist() == order.tolist()
            torch.testing.assert_close(g[b, t], noisy[b, t, order].softmax(-1))


def test_both_router_matrices_learn_and_so_does_the_router_of_a_single_pick():
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    for spec in (MoE(n_experts=4, noisy=True, experts=Plain(hidden=3)), MoE(n_experts=4, top_k=1)):
        m, _ = network(spec)
        m.train()(x, at_of(2, 5)).square().sum().backward()
        assert all(p.grad.any() for p in m.parameters())


# ---- machinery


def test_compiles_to_one_graph_with_its_losses():
    m, _ = network(MoE(n_experts=4, experts=SwiGLU(hidden=3)))
    m.train()

    def total(x, at):
        at = at._replace(tables={})
        y = m(x, at)
        return y.square().sum() + sum(value for _, value in at.tables["losses"])

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        got, want = (torch.autograd.grad(f(x, At.full(2, 5)), list(m.parameters())) for f in (compiled, total))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_repeats_bit_for_bit():
    m, _ = network(MoE(n_experts=4, experts=Plain(hidden=8)), d=16)
    m = nn.Module.to(m, torch.float32)
    x = torch.randn(4, 50, 16)
    runs = []
    for _ in range(2):
        y = m(x, at_of(4, 50))
        runs.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_keeps_the_router_in_float32_and_experts_in_bfloat16():
    m, _ = network(MoE(n_experts=4, experts=SwiGLU(hidden=8)), d=16, bias=True)
    m = nn.Module.to(m, torch.float32)
    x = torch.randn(2, 9, 16)
    full, logits = m(x, at_of(2, 9)), m.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = m(x, at_of(2, 9))
        assert torch.equal(m.route(x), logits) and logits.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().max() < 0.03 * full.abs().max()
    half.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("name", EXPERTS)
def test_parameters_and_flops_follow_their_formulas(name):
    spec, bias = EXPERTS[name]
    m, block = network(spec, bias=bias, d=8)
    assert sum(p.numel() for p in m.parameters()) == block.mlp.n_parameters(block)
    expert = block.mlp.experts.build(block)
    matrices = sum(p.numel() for p in expert.parameters() if p.dim() == 2)
    assert m.flops_per_token(64) == 2 * m.k * matrices
    assert sum(p.numel() for p in m.parameters() if p.dim() == 2) == m.router.weight.numel()
    used = block.mlp.experts.ops(block)
    assert block.mlp.ops(block).weight_bits == m.k * used.weight_bits + 16 * 8 * m.E


def test_adaptive_bits_are_shared_by_the_experts_of_a_layer():
    spec = MoE(n_experts=3, experts=Plain(hidden=4, linear=Linear.kinds["adaptive_bits"]()))
    m, block = network(spec)
    assert sum(p.numel() for p in m.parameters()) == block.mlp.n_parameters(block) == 4 * 3 + 3 * 2 * 16 + 2


def test_every_kth_layer_is_a_list():
    layers = tuple(MoE.small() if k % 2 else Plain(hidden=8) for k in range(4))
    spec = GPT(vocab_size=9, d_model=8, n_layers=4, mlp=layers, attention=NoMixing(), position=NoPosition())
    assert sum(p.numel() for p in create(spec).parameters()) == spec.n_parameters()


@pytest.mark.parametrize(
    "spec, words",
    [
        (MoE(n_experts=1, top_k=1), "one expert is experts=mlp itself"),
        (MoE(n_experts=4, top_k=4), "nothing is picked"),
        (MoE(n_experts=4, top_k=0), "top_k=0 must lie between 1 and"),
        (MoE(balance=-1.0), "must not be below 0"),
        (MoE(experts=MoE()), "one larger mixture"),
        (MoE(experts=MLP.kinds["identity"]()), "no matrices of their own"),
        (MoE(experts=Plain(hidden=-2)), "experts=mlp: hidden=-2 must be above 0"),
    ],
)
def test_refuses_what_is_no_mixture(spec, words):
    with pytest.raises(ConfigError, match=words):
        network(spec)
