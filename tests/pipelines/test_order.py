"""pipelines/lib/order.py: the data order is a pure function of the plan and visits every window once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.spec import ConfigError
from pipelines.lib.order import BLOCK, Order, Source, key, permute


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation_for_every_size_and_key(n, seed):
    out = permute(np.arange(n, dtype=np.uint64), n, np.uint64(seed))
    assert sorted(out.tolist()) == list(range(n))


def test_permutations_of_different_keys_are_unrelated_and_uniform():
    n, keys = 12, np.arange(24000, dtype=np.uint64)
    at = permute(np.full(keys.shape, 5, np.uint64), n, keys).astype(int)
    counts = np.bincount(at, minlength=n)
    chi2 = ((counts - len(keys) / n) ** 2 / (len(keys) / n)).sum()
    assert chi2 < 31.3  # 99.9 % of chi-square with 11 degrees of freedom
    neighbours = permute(np.full(keys.shape, 6, np.uint64), n, keys).astype(int)
    pairs = np.bincount((neighbours - at) % n, minlength=n)[1:]
    expected = len(keys) / (n - 1)
    assert ((pairs - expected) ** 2 / expected).sum() < 29.6  # 99.9 %, 10 degrees of freedom


def test_every_window_once_per_epoch_and_another_cut_in_the_next():
    order = Order([Source("a", 1003)], seq_len=10, seed=3)
    windows = 100
    source, first, epoch = order(np.arange(3 * windows))
    assert (source == 0).all() and epoch.tolist() == sorted(epoch.tolist())
    phases = []
    for e in range(3):
        starts = np.sort(first[epoch == e])
        assert len(starts) == windows
        assert (np.diff(starts) == 10).all()
        assert starts[0] >= 0 and starts[-1] + 11 <= 1003
        phases.append(starts[0])
    assert len(set(phases)) > 1
    assert not np.array_equal(np.argsort(first[:100]), np.argsort(first[100:200]))


def test_sources_get_their_share_in_every_block_and_any_split_gives_the_same_samples():
    order = Order([Source("a", 5000, 0.7), Source("b", 900, 0.2, start=40), Source("c", 90000, 0.1)], 16, seed=1)
    source, first, epoch = order(np.arange(2 * BLOCK))
    for block in (source[:BLOCK], source[BLOCK:]):
        assert np.bincount(block).tolist() == [2867, 819, 410]
    assert first[source == 1].min() >= 40
    assert epoch[source == 1].max() == 29  # 1638 samples over 56 windows
    pieces = [order(np.arange(i, 2 * BLOCK, 7)) for i in range(7)]
    for i, (s, f, e) in enumerate(pieces):
        assert np.array_equal(s, source[i::7]) and np.array_equal(f, first[i::7]) and np.array_equal(e, epoch[i::7])
    assert order.samples_per_epoch == int(56 * BLOCK / 819)


def test_the_plan_hash_and_the_order_change_with_the_seed_and_the_sources():
    plans = [
        Order([Source("a", 500)], 16, 1),
        Order([Source("a", 500)], 16, 2),
        Order([Source("a", 501)], 16, 1),
        Order([Source("a", 500, fingerprint="x")], 16, 1),
    ]
    assert len({p.hash for p in plans}) == 4
    assert not np.array_equal(plans[0](np.arange(31))[1], plans[1](np.arange(31))[1])
    assert key(1, 2) != key(2, 1) and key(0) != key(0, 0) and 0 <= key(-5) < 2**63


def test_a_source_too_short_for_one_window_is_refused_with_what_would_do():
    with pytest.raises(ConfigError, match=r"tiny: 10 training tokens hold no window of seq_len=10.*try seq_len=9"):
        Order([Source("tiny", 10)], 10, 0)
    with pytest.raises(ConfigError, match="less than one sample"):
        Order([Source("a", 100, 1.0), Source("b", 100, 1e-6)], 10, 0)
