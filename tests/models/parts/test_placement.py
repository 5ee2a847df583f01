"""Every placement of norms, for both branches and in parallel, is its formula."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from models.families import create, preset
from models.memory import At
from models.parts.mlp import NoMLP
from models.parts.placement import Placement
from models.parts.residual import Scaled
from models.spec import ConfigError

BASE = dataclasses.replace(preset("tiny"), vocab_size=31, d_model=16, n_layers=1, seq_len=32)


def block_of(**changes):
    torch.manual_seed(0)
    model = create(dataclasses.replace(BASE, **changes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    at = At.full(2, 7)._replace(tables={})
    model.blocks[0].mixer.prepare(at, False, torch.float64)
    return model, model.blocks[0], at


def formula(kind: str, norms: list, f, x, join):
    """Each kind's own line; norms in the order before, output, after."""
    n = iter(norms)
    if kind == "pre":
        return join(x, f(next(n)(x)))
    if kind == "post":
        return next(n)(join(x, f(x)))
    if kind == "peri":
        a, b = next(n), next(n)
        return join(x, b(f(a(x))))
    if kind == "output":
        return join(x, next(n)(f(x)))
    if kind == "pre_post":
        a, b = next(n), next(n)
        return b(join(x, f(a(x))))
    if kind == "peri_post":
        a, b, c = next(n), next(n), next(n)
        return c(join(x, b(f(a(x)))))
    if kind == "output_post":
        a, b = next(n), next(n)
        return b(join(x, a(f(x))))
    return join(x, f(x))


def norms_of(block, branch: str) -> list:
    names = {"mixer": ("mixer_norm", "mixer_output_norm", "mixer_after_norm")}.get(
        branch, ("mlp_norm", "mlp_output_norm", "mlp_after_norm")
    )
    return [getattr(block, n) for n in names if getattr(block, n) is not None]


@pytest.mark.parametrize("first, second", itertools.product(Placement.kinds, Placement.kinds))
def test_a_block_is_its_placements(first, second):
    changes = {"placement": Placement.kinds[first](), "mlp_placement": Placement.kinds[second]()}
    model, block, at = block_of(**changes, residual=Scaled(alpha=0.7))
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    want = formula(first, norms_of(block, "mixer"), lambda h: block.mixer(h, at)[0], x, lambda a, b: a + 0.7 * b)
    want = formula(second, norms_of(block, "mlp"), lambda h: block.mlp(h, at), want, lambda a, b: a + 0.7 * b)
    torch.testing.assert_close(block(x, at)[0], want)
    assert sum(p.numel() for p in model.parameters()) == model.spec.n_parameters()


@pytest.mark.parametrize("kind", Placement.kinds)
def test_a_parallel_block_reads_one_input_and_makes_one_sum(kind):
    model, block, at = block_of(placement=Placement.kinds[kind](), parallel=True)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    h = block.mixer_norm(x) if block.mixer_norm is not None else x
    a, b = block.mixer(h, at)[0], block.mlp(h, at)
    if block.mixer_output_norm is not None:
        a, b = block.mixer_output_norm(a), block.mlp_output_norm(b)
    want = x + a + b
    want = block.mixer_after_norm(want) if block.mixer_after_norm is not None else want
    torch.testing.assert_close(block(x, at)[0], want)
    assert sum(p.numel() for p in model.parameters()) == model.spec.n_parameters()


def test_a_block_without_an_mlp_is_its_mixer_alone():
    model, block, at = block_of(placement=Placement.kinds["peri"](), mlp=NoMLP())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    want = x + block.mixer_output_norm(block.mixer(block.mixer_norm(x), at)[0])
    torch.testing.assert_close(block(x, at)[0], want)
    assert sum(p.numel() for p in model.parameters()) == model.spec.n_parameters()
    assert not any("mlp" in name for name, _ in model.named_parameters())
    for options in ({"parallel": True}, {"mlp_placement": Placement.kinds["pre"]()}, {"mlp_residual": Scaled()}):
        with pytest.raises(ConfigError, match="mlp=none"):
            dataclasses.replace(BASE, mlp=NoMLP(), **options)


def test_the_last_matrix_of_a_branch_starts_by_how_many_branches_there_are():
    deep = dataclasses.replace(BASE, n_layers=8, d_model=64)
    for mlp, branches in ((BASE.mlp, 16), (NoMLP(), 8)):
        torch.manual_seed(0)
        model = create(dataclasses.replace(deep, mlp=mlp))
        assert model.residual_branches() == branches
        measured = torch.cat([block.mixer.out.weight.flatten() for block in model.blocks]).std().item()
        assert measured == pytest.approx(deep.init_std / branches**0.5, rel=0.05)
