"""Shared layers: the published patterns, one set of weights in files and optimizer, a memory per application."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.families import create, preset
from models.optim.groups import AdamW
from models.parts.attention import Causal
from models.parts.mlp import Plain
from models.parts.sharing import Shared
from models.spec import ConfigError

BASE = dataclasses.replace(preset("tiny"), vocab_size=31, d_model=16, n_layers=6, seq_len=32)


@pytest.mark.parametrize(
    "rule, pattern",
    [
        (Shared(size=2), "AABBCC"),
        (Shared(cycle=2), "ABABAB"),
        (Shared(mirror=True), "ABCCBA"),
        (Shared(size=2, cycle=2), "AABBAA"),
        (Shared(size=2, mirror=True), "AABBAA"),
        (Shared(size=6), "AAAAAA"),
    ],
)
def test_patterns(rule, pattern):
    owners = [rule.owner(i, 6) for i in range(6)]
    assert ["ABCDEF"[sorted(set(owners)).index(o)] for o in owners] == list(pattern)


def test_shared_layers_are_the_same_as_copies():
    torch.manual_seed(0)
    shared = create(dataclasses.replace(BASE, share_attention=Shared(size=2), share_mlp=Shared(mirror=True)))
    copies = create(BASE)
    own = shared.state_dict()
    state = {}
    for name in copies.state_dict():
        part = name.split(".")
        if name.startswith("blocks.") and part[2] in ("mixer", "mlp"):
            rule = shared.spec.share_attention if part[2] == "mixer" else shared.spec.share_mlp
            part[1] = str(rule.owner(int(part[1]), 6))
        state[name] = own[".".join(part)]
    copies.load_state_dict(state)
    ids = torch.arange(20)[None] % 31
    torch.testing.assert_close(shared.eval()(ids).logits, copies.eval()(ids).logits)
    assert len(shared.memory(1)) == 6
    assert sum(p.numel() for p in shared.parameters()) == shared.spec.n_parameters() < copies.spec.n_parameters()
    held = [p for o in AdamW().build(shared).values() for g in o.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(shared.parameters()))
    assert shared.flops_per_token(16) == copies.flops_per_token(16)


def test_a_copied_model_shares_its_own_weights():
    import copy

    model = copy.deepcopy(create(dataclasses.replace(BASE, share_mlp=Shared(size=6))))
    assert all(block.mlp is model.blocks[0].mlp for block in model.blocks)


def test_layers_that_differ_cannot_share():
    with pytest.raises(ConfigError, match="layers 0 and 1 use the same weights but differ in attention"):
        dataclasses.replace(BASE, attention=Causal(n_heads=(4, 2, 4, 4, 4, 4)), share_attention=Shared(size=2))
    with pytest.raises(ConfigError, match="layers 0 and 5 use the same weights but differ in mlp"):
        dataclasses.replace(BASE, mlp=Plain(hidden=(8, 8, 8, 8, 8, 9)), share_mlp=Shared(mirror=True))
    with pytest.raises(ConfigError, match="shares nothing"):
        Shared()
