"""The conformance suite as a command, for a part of one's own too."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from models.check import CHECKS
from models.cost import Ops, elementwise
from models.parts.norm import Norm
from models.roles import mark
from pipelines.evaluate import main
from pipelines.lib.checking import changed


@dataclass(frozen=True)
class Mine(Norm):
    """y = x / (|x| mean + shift) * gain.   Source: this test.

    shift: added to the mean of |x|
    unused: nothing reads it
    """

    shift: float = 1.0
    unused: int = 1

    def build(self, d, bias):
        return Mean(d, self.shift)

    def n_parameters(self, d, bias):
        return d

    def ops(self, d, bias):
        return elementwise(d, multiplies=2, additions=2) + Ops(divisions=1, reductions=1)


class Mean(nn.Module):
    roles = {"weight": "gain"}

    def __init__(self, d, shift):
        super().__init__()
        mark(self, weight="gain").weight = nn.Parameter(torch.ones(d))
        self.shift = shift

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.shift) * self.weight.to(x.dtype)


class OverTime(Mean):
    """Looks at later tokens."""

    def forward(self, x):
        return x / (x.abs().mean((-1, -2), keepdim=True) + self.shift) * self.weight.to(x.dtype)


def test_a_part_of_ones_own_is_checked_and_what_it_breaks_is_named(monkeypatch, capsys):
    monkeypatch.setitem(Norm.kinds, "mine", Mine)
    assert main(["check", "gpt", "model.norm=mine"]) == 1
    said = capsys.readouterr().out
    assert f"{len(CHECKS) - 1} of {len(CHECKS)} checks hold on 1 model(s)" in said
    assert "no effect: norm.unused" in said
    monkeypatch.setattr(Mine, "build", lambda self, d, bias: OverTime(d, self.shift))
    assert main(["check", "gpt", "model.norm=mine", "only=look_ahead"]) == 1
    assert "0 of 1 checks hold" in capsys.readouterr().out


def test_changes_are_laid_over_a_preset_or_recipe_and_not_over_a_run(capsys, tmp_path):
    assert main(["check", "tiny", "model.norm.eps=1e-3", "model.position=alibi", "only=formula"]) == 0
    assert main(["check", "gpt_debug", "model.attention.softmax=relumax", "only=formula"]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path), "model.norm=rmsnorm"]) == 2
    assert "a trained model is what it is" in capsys.readouterr().err
    assert main(["check", "gpt", "model.norm=rmsnorn"]) == 2
    assert "did you mean 'rmsnorm'" in capsys.readouterr().err
    assert main(["check", "gpt", "model.attention=ssm", "only=formula"]) == 2
    assert "attention=ssm has none to turn" in capsys.readouterr().err


def test_a_part_that_is_named_alone_is_small_and_is_what_must_matter():
    from models.check.variants import base

    spec, focus = changed(base(), ["model.attention=mla"])
    assert (spec.attention.n_heads, focus) == (4, "attention")
    assert changed(base(), ["norm=layernorm", "bias=true"])[1] is None
    assert changed(base(), []) == (base(), None)


def test_help_says_how_a_part_of_ones_own_is_checked(capsys):
    assert main(["check", "--help"]) == 0
    said = capsys.readouterr().out
    for words in ("NOVELLA_IMPORTS=my.norms", "model.norm=mine", 'Norm.kinds["mine"] = Mine', "changes="):
        assert words in said


@pytest.mark.parametrize("word", ["changes=norm", "changes=model.norm"])
def test_a_change_without_a_value_is_refused(word, capsys):
    assert main(["check", "gpt", word]) == 2
    assert "a setting is needed, such as model.norm=rmsnorm" in capsys.readouterr().err
