"""kernels/op.py: which path is picked, and that it is known afterwards."""

from __future__ import annotations

import pytest
import torch

from kernels.op import pick, power_of_2, record


def test_a_processor_takes_its_own_path_where_there_is_one():
    x = torch.ones(1)
    with record() as ran:
        assert pick("a", x, "auto", cpu=True) == "cpu"
        assert pick("b", x, "auto") == "reference"
        with record() as inner:
            pick("c", x, "reference")
    assert ran == [("a", "cpu"), ("b", "reference")] and inner == [("c", "reference")]


def test_what_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError, match="a: impl='cuda' does not exist; auto, triton, cpu, reference do"):
        pick("a", torch.ones(1), "cuda")


@pytest.mark.parametrize(("n", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_2(n, expected):
    assert power_of_2(n) == expected
