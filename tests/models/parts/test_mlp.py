"""Feed-forward networks of matrices against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from models.families import create
from models.gpt.config import GPT
from models.memory import At
from models.parts.activation import GELU, ReLU, SiLU, SquaredReLU
from models.parts.linear import Linear
from models.parts.linear_attention import NoMixing
from models.parts.mlp import MLP, DualPath, Identity, Plain, SwiGLU
from models.parts.position import NoPosition
from models.spec import ConfigError, build


def network(spec, d=3, bias=False, seed=0):
    model = GPT(vocab_size=5, d_model=d, n_layers=1, mlp=spec, bias=bias, position=NoPosition(), attention=NoMixing())
    block = model.blocks()[0]
    module = nn.Module.to(block.mlp.build(block), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module, block


FUNCTIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x if x > 0 else 0 * x,
    "relu2": lambda x: x * x if x > 0 else 0 * x,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "none": lambda x: x,
}


def times(layer, vector):
    """W x + b, one sum at a time."""
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight), dtype=torch.float64)
    return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in zip(layer.weight, bias, strict=True)]


def added(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def plain(m, x, f, a=0.0, b=0.0):
    return times(m.down, [f(h - a) - b for h in times(m.up, x)])


def gated(m, x, f):
    both = times(m.gate_up, x)
    M = len(both) // 2
    return times(m.down, [f(both[i]) * both[M + i] for i in range(M)])


def dual(m, x, f, a=0.0, b=0.0, gate=False):
    h = times(m.up, x)
    if gate:
        M = len(h) // 2
        h = [f(h[i]) * h[M + i] for i in range(M)]
    return added(times(m.down, [f(t - a) - b for t in h]), times(m.down_mirrored, [-f(-(t + a)) - b for t in h]))


CASES = {
    "mlp": (Plain(hidden=4), lambda m, x: plain(m, x, FUNCTIONS["gelu"])),
    "mlp, squared relu": (
        Plain(hidden=4, activation=SquaredReLU()),
        lambda m, x: plain(m, x, FUNCTIONS["relu2"]),
    ),
    "mlp, fixed offsets": (
        Plain(hidden=4, x_offset=0.3, y_offset=-0.2, activation=SiLU()),
        lambda m, x: plain(m, x, FUNCTIONS["silu"], 0.3, -0.2),
    ),
    "mlp, learned offsets": (
        Plain(hidden=4, learned_offsets=True),
        lambda m, x: plain(m, x, FUNCTIONS["gelu"], m.act.a, m.act.b),
    ),
    "swiglu": (SwiGLU(hidden=4), lambda m, x: gated(m, x, FUNCTIONS["silu"])),
    "swiglu, gelu": (SwiGLU(hidden=4, activation=GELU()), lambda m, x: gated(m, x, FUNCTIONS["gelu"])),
    "glu": (MLP.kinds["glu"](hidden=4), lambda m, x: gated(m, x, FUNCTIONS["sigmoid"])),
    "geglu": (MLP.kinds["geglu"](hidden=4), lambda m, x: gated(m, x, FUNCTIONS["gelu"])),
    "reglu": (MLP.kinds["reglu"](hidden=4), lambda m, x: gated(m, x, FUNCTIONS["relu"])),
    "bilinear": (MLP.kinds["bilinear"](hidden=4), lambda m, x: gated(m, x, FUNCTIONS["none"])),
    "dual_path": (DualPath(hidden=4), lambda m, x: dual(m, x, FUNCTIONS["gelu"])),
    "dual_path, offsets": (
        DualPath(hidden=4, learned_offsets=True, activation=ReLU()),
        lambda m, x: dual(m, x, FUNCTIONS["relu"], m.act.a, m.act.b),
    ),
    "dual_path, gated": (
        DualPath(hidden=4, gated=True, x_offset=0.1, y_offset=0.2, activation=SiLU()),
        lambda m, x: dual(m, x, FUNCTIONS["silu"], 0.1, 0.2, gate=True),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_equal_loops_in_float64(name, bias):
    spec, formula = CASES[name]
    m, _ = network(spec, bias=bias)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    leaves = [x, *m.parameters()]
    ours = m(x[None], At.full(1, 2))[0]
    want = torch.stack([torch.stack(formula(m, row)) for row in x])
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)
    got = torch.autograd.grad((ours * weight).sum(), leaves)
    for g, w in zip(got, torch.autograd.grad((want * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_swiglu_equals_llamas_mlp():
    theirs = LlamaMLP(LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12, mlp_bias=True)).double()
    m, _ = network(SwiGLU(hidden=12), d=8, bias=True)
    with torch.no_grad():
        for p, q in zip(m.gate_up.weight.chunk(2), (theirs.gate_proj.weight, theirs.up_proj.weight), strict=True):
            q.copy_(p)
        for p, q in zip(m.gate_up.bias.chunk(2), (theirs.gate_proj.bias, theirs.up_proj.bias), strict=True):
            q.copy_(p)
        theirs.down_proj.weight.copy_(m.down.weight), theirs.down_proj.bias.copy_(m.down.bias)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(m(x, At.full(2, 3)), theirs(x), rtol=1e-12, atol=1e-12)


def test_swiglu_by_its_name_alone_has_silu():
    """In ReaLLM-Forge it took the general activation, GELU unless SiLU was asked for."""
    assert build(MLP, "swiglu").gate() == SiLU()
    assert {name: type(MLP.kinds[name]().gate()).__name__ for name in ("glu", "geglu", "reglu", "bilinear")} == {
        "glu": "Sigmoid",
        "geglu": "GELU",
        "reglu": "ReLU",
        "bilinear": "NoActivation",
    }


def test_dual_path_runs_with_default_options_and_offsets_of_zero():
    """At the head of ReaLLM-Forge it failed on a missing attribute."""
    m, _ = network(DualPath(), d=8)
    assert m(torch.randn(1, 2, 8, dtype=torch.float64), At.full(1, 2)).isfinite().all()
    assert m.act.a == 0 and not list(m.act.parameters())


def test_dual_path_lets_both_signs_through():
    """With ReLU and equal matrices down it is linear: relu(h) - relu(-h) = h."""
    m, _ = network(DualPath(hidden=5, activation=ReLU()))
    with torch.no_grad():
        m.down_mirrored.weight.copy_(m.down.weight)
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(m(x, At.full(1, 4)), x @ m.up.weight.T @ m.down.weight.T)


def test_default_widths_give_the_parameters_of_a_plain_mlp():
    """8 D^2 within the rounding to 64: gated kinds compare at equal size (ReaLLM-Forge's had half as many again)."""
    d = 768
    for kind in ("mlp", "swiglu", "glu", "geglu", "reglu", "bilinear", "dual_path"):
        _, block = network(Plain(hidden=1), d=d)
        assert abs(MLP.kinds[kind]().n_parameters(block) / (8 * d * d) - 1) < 0.01, kind
    gated_paths = DualPath(gated=True)
    assert gated_paths.width(d) == 2 * d and gated_paths.n_parameters(block) == 8 * d * d
    assert Plain().width(100) == 400 and SwiGLU().width(100) == 320 and SwiGLU().width(576) == 1536


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "glu", "geglu", "reglu", "bilinear", "dual_path", "identity"])
def test_parameters_and_multiplications_follow_their_formulas(kind):
    for family_bias in (False, True):
        for options in ({}, {"hidden": 7}, {"hidden": 7, "up_bias": True}, {"down_bias": False}, {"bias": True}):
            if kind == "identity" and options:
                continue
            m, block = network(MLP.kinds[kind](**options), d=8, bias=family_bias)
            assert sum(p.numel() for p in m.parameters()) == block.mlp.n_parameters(block)
            matrices = sum(p.numel() for p in m.parameters() if p.dim() == 2)
            ops = block.mlp.ops(block)
            hidden = 0 if kind == "identity" else block.mlp.width(8)
            assert matrices <= ops.multiplies <= matrices + 8 * hidden
            assert ops.weight_bits == 16 * sum(p.numel() for p in m.parameters())


def test_learned_offsets_are_two_parameters_that_start_where_they_are_given():
    for spec in (Plain(hidden=4, x_offset=0.5, learned_offsets=True), DualPath(hidden=4, learned_offsets=True)):
        block = GPT(
            vocab_size=5, d_model=4, n_layers=1, mlp=spec, position=NoPosition(), attention=NoMixing()
        ).blocks()[0]
        m = block.mlp.build(block)
        assert sum(p.numel() for p in m.parameters()) == block.mlp.n_parameters(block)
        assert (m.act.a.item(), m.act.b.item()) == (spec.x_offset, 0.0)


def test_down_linear_is_the_last_matrix_alone():
    ternary = Linear.kinds["bitnet"]()
    m, _ = network(Plain(hidden=4, down_linear=ternary))
    assert type(m.up) is nn.Linear and type(m.down) is not nn.Linear
    m, _ = network(Plain(hidden=4, linear=ternary))
    assert type(m.up) is type(m.down) is not nn.Linear


def test_identity_gives_back_what_it_reads():
    m, block = network(Identity())
    x = torch.randn(1, 2, 3)
    assert m(x, At.full(1, 2)) is x and block.mlp.n_parameters(block) == 0


def test_biases_of_both_sides_leave_nothing_for_bias_to_say():
    with pytest.raises(ConfigError, match="bias=True has no effect beside up_bias and down_bias"):
        network(Plain(bias=True, up_bias=True, down_bias=False))
    m, _ = network(SwiGLU(hidden=4, up_bias=False, down_bias=True))
    assert m.gate_up.bias is None and m.down.bias is not None


OUT = {
    "mlp": ["down"],
    "swiglu": ["down"],
    "dual_path": ["down", "down_mirrored"],
    "kan": ["layers.1.base", "layers.1.curves"],
    "moe": ["experts.down"],
}


@pytest.mark.parametrize("kind", OUT)
def test_every_matrix_out_of_a_branch_starts_smaller_in_deep_models(kind):
    """ReaLLM-Forge found them by name and missed SwiGLU's, both of dual path's and others."""
    cls = MLP.kinds[kind]
    part = cls(middle=(64,)) if kind == "kan" else cls()
    model = create(
        GPT(vocab_size=5, d_model=64, n_layers=8, mlp=part, position=NoPosition(), attention=NoMixing(), init_std=0.02)
    )
    network = model.blocks[3].mlp
    inner = {name for name, p in network.named_parameters() if p.dim() >= 2 and p.shape[-2] > 1}
    for name in inner:
        want = 0.02 / 4 if name.removesuffix(".weight") in OUT[kind] else 0.02  # 16 branches
        assert network.get_parameter(name).std().item() == pytest.approx(want, rel=0.1), name
    assert {f"{name}.weight" for name in OUT[kind]} < inner
