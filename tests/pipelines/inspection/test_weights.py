"""Figures of tensors against numpy and scipy, and readers of weight files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from pipelines.lib.config import InputError
from pipelines.lib.inspection import weights
from pipelines.lib.inspection.weights import change, entropy_rank, histogram, moments, singular_values, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_scipys(dtype, monkeypatch):
    monkeypatch.setattr(weights, "AT_ONCE", 37)  # several pieces
    torch.manual_seed(0)
    x = (torch.randn(13, 29) ** 3 + 0.7).to(dtype)
    x[2, 3] = 0
    y = x.double().numpy().ravel()
    m = moments(x)
    assert (m.n, m.bad) == (y.size, 0) and m.zeros == pytest.approx(1 / y.size)
    assert (m.mean, m.std, m.norm) == pytest.approx((y.mean(), y.std(), np.linalg.norm(y)))
    assert m.kurtosis == pytest.approx(stats.kurtosis(y)) and m.largest == abs(y).max()
    assert (m.low, m.high) == (y.min(), y.max())


def test_what_is_not_finite_is_counted_and_left_out():
    x = torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf])
    m = moments(x)
    assert (m.n, m.bad, m.mean, m.std, m.largest) == (5, 3, 2.0, 1.0, 3.0)
    assert moments(torch.full((4,), math.nan)).bad == 4 and histogram(torch.full((4,), math.nan)) == ((), ())
    assert sum(histogram(x)[1]) == 2 and singular_values(x.expand(3, 5)) == ()


def test_a_gain_near_one_keeps_its_kurtosis_and_a_constant_has_none():
    torch.manual_seed(0)
    x = 1 + 1e-5 * torch.randn(4000, dtype=torch.float64)
    assert moments(x).kurtosis == pytest.approx(stats.kurtosis(x.numpy()), abs=1e-6)
    assert math.isnan(moments(torch.full((9,), 0.3)).kurtosis)


def test_singular_values_are_numpys_also_by_the_smaller_side(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(40, 12) @ torch.diag(torch.logspace(0, -3, 12))
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False)
    assert singular_values(x) == pytest.approx(exact)
    monkeypatch.setattr(weights, "LONGEST_SIDE", 16)
    for y in (x, x.T):
        assert singular_values(y) == pytest.approx(exact, rel=1e-9, abs=1e-8 * exact[0])


def test_ranks_of_a_spectrum():
    eye = weights.figures_of("eye", 3 * torch.eye(8))
    assert eye.stable_rank == pytest.approx(8) == eye.effective_rank
    one = weights.figures_of("one", torch.outer(torch.arange(1.0, 9), torch.ones(5)))
    assert one.stable_rank == pytest.approx(1) and one.effective_rank == pytest.approx(1, abs=1e-6)
    assert entropy_rank([1, 1, 0, 2]) == pytest.approx(math.exp(2 * 0.25 * math.log(4) + 0.5 * math.log(2)))
    assert math.isnan(entropy_rank([])) and math.isnan(eye.__class__("v", (3,), eye.moments).stable_rank)


def test_quantiles_axes_and_angles_are_numpys(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(9, 14)
    y = x.double().numpy()
    figures = weights.figures_of("x", x)
    assert figures.quantiles == pytest.approx(np.quantile(y, weights.QUANTILES), rel=1e-5)
    rows, columns = np.linalg.norm(y, axis=1), np.linalg.norm(y, axis=0)
    got = figures.axes
    assert (got.row_norm, got.row_norm_std) == pytest.approx((rows.mean(), rows.std()))
    assert (got.column_norm, got.column_norm_std) == pytest.approx((columns.mean(), columns.std()))
    cosines = [abs(y[i] @ y[j]) / rows[i] / rows[j] for i in range(9) for j in range(9) if i != j]
    assert got.row_cosine == pytest.approx(np.mean(cosines))
    assert weights.axes(torch.full((2, 2), math.nan)) is None and weights.axes(torch.ones(3)) is None
    monkeypatch.setattr(weights, "ROWS", 3)
    cosines = [abs(y[i] @ y[j]) / rows[i] / rows[j] for i in (0, 4, 8) for j in (0, 4, 8) if i != j]
    assert weights.axes(x).row_cosine == pytest.approx(np.mean(cosines))


def test_change_has_angle_relative_size_and_ratio_of_norms():
    a = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    c = change("x", a, b)
    assert (c.angle, c.relative, c.norm_ratio) == pytest.approx((45, 1, math.sqrt(2)))
    assert change("x", a, -a).angle == pytest.approx(180) and change("x", a, a).angle == 0
    tiny = change("x", a, a + torch.tensor([[0.0, 3e-6], [0.0, 0.0]]))
    assert tiny.angle == pytest.approx(math.degrees(1e-6), rel=1e-3)  # the arc cosine would have rounded it away
    assert math.isnan(change("x", 0 * a, a).angle)


def test_weights_come_from_safetensors_and_from_pickles_of_plain_tensors_only(tmp_path):
    state = {"a.weight": torch.randn(3, 4), "b": torch.ones(2), "steps": torch.tensor(3)}
    save_file(state, tmp_path / "model.safetensors")
    assert {n: tuple(x.shape) for n, x in tensors(tmp_path)} == {"a.weight": (3, 4), "b": (2,)}
    old = tmp_path / "old"
    old.mkdir()
    torch.save({**state, "tied": state["a.weight"]}, old / "pytorch_model.bin")
    assert sorted(n for n, _ in tensors(old)) == ["a.weight", "b"]
    torch.save({"model": {"_orig_mod.a": state["b"]}, "iter_num": 3}, old / "ckpt.pt")
    assert [n for n, _ in weights.pickled_tensors(old / "ckpt.pt")] == ["a"]
    torch.save({"model": weights.Change("x", 1, 2, 3)}, old / "evil.pt")
    with pytest.raises(InputError, match="plain tensors"):
        list(weights.pickled_tensors(old / "evil.pt"))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    for read in (lambda: list(tensors(tmp_path)), lambda: weights.safe_header(tmp_path / "model.safetensors")):
        with pytest.raises(InputError, match=r"model\.safetensors"):
            read()
