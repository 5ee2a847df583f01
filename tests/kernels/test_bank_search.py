"""kernels/bank_search: exact ids whatever the bank, ties, repeated bits, gradients, far rows, memory, no Numba."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.bank_search as kernel
from kernels.bank_search import OP, bank_search, blend_weights, gpu, processor
from kernels.op import INTERPRETED, record, triton
from tests.kernels.judge import arguments, check

PATHS = ["cpu", "reference", *(["triton"] if triton is not None and INTERPRETED else [])]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(q, keys, k):
    """One query after the other, in float64: by falling score, then by id."""
    scores = (q.double()[:, None] * keys.double()[None]).sum(-1).tolist()
    ids = [sorted(range(len(keys)), key=lambda n, s=s: (-s[n], n))[:k] for s in scores]
    return torch.tensor([[s[n] for n in i] for s, i in zip(scores, ids, strict=True)]), torch.tensor(ids)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize(("B", "N", "r", "k"), [(3, 50, 8, 5), (17, 100, 20, 40)])
def test_ids_are_those_of_float64(B, N, r, k, impl):
    q, keys = randn(B, r), randn(N, r, seed=1)
    scores, ids = bank_search(q, keys, k, impl=impl)
    expected, names = by_hand(q, keys, k)
    assert torch.equal(ids, names) and ids.dtype == torch.int64
    torch.testing.assert_close(scores.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rough", [True, False])
@pytest.mark.parametrize(
    "bank", ["unit", "clusters", "one direction", "negative", "lengths", "zeros and copies", "huge"]
)
def test_a_rough_product_first_loses_no_key_in_any_bank(monkeypatch, bank, rough):
    monkeypatch.setattr(processor, "has_bfloat16", lambda: rough)
    N, r, k = 5000, 64, 32
    q, keys = randn(70, r), randn(N, r, seed=1)
    if bank == "unit":
        q, keys = (torch.nn.functional.normalize(x, dim=1) for x in (q, keys))
    elif bank == "clusters":
        keys = keys[:20].repeat(250, 1) + 1e-3 * keys
        q = keys[:70] + 1e-3 * q
    elif bank == "one direction":
        keys = keys[:1] + 1e-5 * keys
    elif bank == "negative":
        q, keys = q.abs(), -keys.abs()
    elif bank == "lengths":
        keys = (
            keys * 10 ** torch.linspace(-6, 3, N)[torch.randperm(N, generator=torch.Generator().manual_seed(2)), None]
        )
    elif bank == "zeros and copies":
        keys, q[5] = keys[:40].repeat(125, 1), 0
    else:
        q, keys = q * 1e18, keys * 1e19
    scores, ids = bank_search(q, keys, k, impl="cpu")
    exact = q.double() @ keys.double().T
    reached = exact.gather(1, ids)
    best, names = torch.sort(exact, dim=1, descending=True, stable=True)
    size = q.norm(dim=1, keepdim=True).double() * keys.norm(dim=1).max().double()
    assert ((best[:, :k] - reached).abs() <= 1e-7 * size).all()  # the scores of the best, to float32
    assert ((scores.double() - reached).abs() <= 1e-6 * size).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    if bank in ("unit", "negative"):
        assert torch.equal(ids, names[:, :k])


@pytest.mark.parametrize("impl", PATHS)
def test_of_equal_scores_the_lower_id_comes_first_and_minus_zero_is_zero(impl):
    q = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    keys = torch.tensor([[2.0, 1.0], [-0.0, 5.0], [2.0, -7.0], [0.0, 1.0], [-3.0, 0.0], [2.0, 0.0]])
    scores, ids = bank_search(q, keys, 5, impl=impl)
    assert ids.tolist() == [[0, 2, 5, 1, 3], [0, 1, 2, 3, 4], [4, 1, 3, 0, 2]]
    assert scores.tolist() == [[2, 2, 2, 0, 0], [0] * 5, [3, 0, 0, -2, -2]]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 400), st.integers(1, 20), st.data())
def test_any_shape_equals_the_reference(seed, B, N, r, data):
    k = data.draw(st.integers(1, N))
    generator = torch.Generator().manual_seed(seed)
    q, keys = (torch.randint(-4, 5, (n, r), generator=generator) / 4.0 for n in (B, N))
    for ours, plain in zip(bank_search(q, keys, k, "cpu"), bank_search(q, keys, k, "reference"), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.skipif("triton" not in PATHS, reason="needs Triton's interpreter")
@pytest.mark.parametrize("k", [1, 33, 128])
def test_keys_that_several_programs_share_are_joined(monkeypatch, k):
    monkeypatch.setattr(gpu, "splits", lambda B, N, c: 3)
    q, keys = randn(3, 8), randn(300, 8, seed=1)
    for ours, plain in zip(bank_search(q, keys, k, "triton"), bank_search(q, keys, k, "reference"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [p for p in PATHS if p != "reference"])
def test_the_same_bits_each_time_and_with_any_number_of_threads(impl):
    q, keys = (randn(130, 16), randn(900, 16, seed=1)) if impl == "cpu" else (randn(9, 16), randn(90, 16, seed=1))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in (q, keys)]
            scores, ids = bank_search(*leaves, 8, impl=impl)
            results.append([scores.detach(), ids, *torch.autograd.grad(scores.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("impl", [p for p in PATHS if p != "reference"])
def test_keys_that_nobody_chose_get_zeros(impl):
    q, keys = randn(3, 4), randn(50, 4, seed=1).requires_grad_()
    scores, ids = bank_search(q, keys, 2, impl=impl)
    (d,) = torch.autograd.grad(scores.sum(), keys)
    chosen = torch.zeros(50, dtype=torch.bool).index_fill(0, ids.flatten(), True)
    assert not d[~chosen].any() and d[chosen].any(1).all()


def test_scores_and_ids_are_never_stored_for_all_keys():
    q, keys = randn(600, 16), randn(6000, 16, seed=1)
    bank_search(q, keys, 4, "cpu")  # compiled
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor))
            return out

    with Sizes():
        processor.search(q, keys, 4)
    assert sizes and max(sizes) <= processor.QUERIES * processor.KEYS < 600 * 6000


@pytest.mark.skipif("triton" not in PATHS, reason="needs Triton's interpreter")
def test_rows_more_than_2_to_the_31_numbers_apart_are_read_where_they_lie():
    far = torch.empty_strided((2, 16), (2**31 + 16, 1), dtype=torch.float16)
    far.copy_(randn(2, 16))
    bank = torch.cat([randn(5, 16, seed=1), randn(2, 16)]).half()
    for ours, plain in zip(bank_search(far, bank, 3, "triton"), bank_search(far, bank, 3, "reference"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(bank_search(bank, far, 2, "triton")[1], bank_search(bank, far, 2, "reference")[1])


def test_without_numba_the_same_function_runs_in_pytorch(monkeypatch):
    monkeypatch.setattr(processor, "numba", lambda: None)
    for shape in OP.shapes:
        check(OP, arguments(OP, shape), torch.float32, "cpu")


def test_a_processor_takes_its_own_path_and_autocast_casts_as_for_a_product():
    q, keys = randn(2, 8), randn(20, 8, seed=1)
    with record() as ran, torch.autocast("cpu", torch.bfloat16):
        scores, _ = bank_search(q, keys, 3)
    assert ran == [("bank_search", "cpu")] and scores.dtype == torch.float32
    assert torch.equal(scores, bank_search(q.bfloat16(), keys.bfloat16(), 3)[0])
    assert not torch.equal(scores, bank_search(q, keys, 3)[0])


def test_a_second_derivative_is_refused():
    q = randn(2, 4, dtype=torch.float64).requires_grad_()
    scores, _ = bank_search(q, randn(9, 4, seed=1, dtype=torch.float64), 3)
    (g,) = torch.autograd.grad(scores.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), q)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.01, 100))
def test_weights_sum_to_one_and_fall_with_the_scores(seed, k, temperature):
    scores = randn(5, k, seed=seed).sort(descending=True).values
    w = blend_weights(scores, temperature)
    torch.testing.assert_close(w.sum(-1), torch.ones(5))
    assert (w.diff(dim=-1) <= 0).all() and (w >= 0).all()
    ratio = ((scores[:, :1] - scores) / temperature).clamp(max=50).exp()
    torch.testing.assert_close(w.clamp(min=1e-20) * ratio, w[:, :1].expand_as(w), rtol=1e-3, atol=1e-3)


def test_the_gradient_of_a_score_is_its_weight_times_what_its_value_exceeds_the_blend_by():
    scores = randn(4, 6, dtype=torch.float64).requires_grad_()
    values = randn(4, 6, seed=1, dtype=torch.float64)
    w = blend_weights(scores, 0.5)
    (g,) = torch.autograd.grad((w * values).sum(), scores)
    torch.testing.assert_close(g, w * (values - (w * values).sum(-1, True)) / 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_configuration_is_compiled(dtype):
    built = {tuple(b.constants.values()) for b in gpu.builds()}
    for k in range(1, gpu.MOST + 1):
        c = gpu.config(k, dtype)
        assert (c.QUERIES, c.KEYS, c.DEPTH, c.K) in built and k <= c.K
        for B, N in ((1, k), (64, 10**5), (4096, 16384)):
            assert 1 <= gpu.splits(B, N, c) <= gpu.TARGET


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bank_search(torch.ones(2, 3), torch.ones(4, 5), 1), r"must be \[B, r\] and \[N, r\]"),
        (lambda: bank_search(torch.ones(2, 3), torch.ones(4, 3), 5), "k=5 of 4 keys; it must be 1 to 4"),
        (lambda: bank_search(torch.ones(2, 3), torch.ones(4, 3).double(), 1), "make them one"),
        (lambda: blend_weights(torch.ones(2, 3), 0), "temperature=0 must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_the_registration_is_what_torch_library_asks_for():
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        kernel._search, (randn(2, 8).requires_grad_(), randn(9, 8, seed=1), 3, "cpu"), test_utils=kinds
    )
