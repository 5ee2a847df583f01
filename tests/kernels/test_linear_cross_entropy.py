"""kernels/linear_cross_entropy.py: its options, what it never allocates, and which path a training step takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import linear_cross_entropy as module
from kernels.linear_cross_entropy import OP, chunk_rows, config, linear_cross_entropy, linear_cross_entropy_reference
from kernels.op import INTERPRETED, record, triton
from tests.kernels.judge import arguments, check

CUDA = torch.cuda.is_available()
GPU = "cuda" if CUDA else "cpu"
FAST = ["cpu"] + (["triton"] if triton is not None and (CUDA or INTERPRETED) else [])
OPTIONS = {
    "plain": {"z_weight": 0.0},
    "z": {"z_weight": 1e-2},
    "cap": {"softcap": 2.5},
    "smooth": {"smoothing": 0.2},
    "mean": {"reduction": "mean"},
    "ignore": {"ignore_index": 3},
    "no bias": {"bias": None},
    "all": {"z_weight": 0.1, "softcap": 5.0, "smoothing": 0.1, "reduction": "mean"},
}


class Largest(TorchDispatchMode):
    """How large the largest tensor is that an operation gives back, in numbers; and how many products there are."""

    numbers = 0
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.fixture
def inside(monkeypatch):
    """What goes on in the operation, which hides it from whoever stands outside."""
    seen, chunks = Largest(), module._all_chunks

    def watched(*args):
        with seen:
            return chunks(*args)

    monkeypatch.setattr(module, "_all_chunks", watched)
    return seen


def device(impl):
    return GPU if impl == "triton" else "cpu"


def draw(n, d, v, dtype=torch.float32, at="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(*size, generator=generator).to(at, dtype).requires_grad_() for size in ((n, d), (v, d)))
    targets = torch.randint(v, (n,), generator=generator)
    targets[2::5] = -100
    return x, w, targets.to(at)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_is_as_exact_as_the_reference_and_changes_the_loss(name, impl):
    plain = arguments(OP, (65, 16, 130))
    if "ignore_index" in OPTIONS[name]:
        plain["targets"] = plain["targets"].where(plain["targets"] >= 0, 3)
    args = {**plain, **OPTIONS[name]}
    for dtype in (torch.float32, torch.bfloat16 if impl == "cpu" or CUDA else torch.float16):
        check(OP, args, dtype, impl, device(impl))
    if name != "z":  # which is what the arguments have already
        assert not torch.allclose(linear_cross_entropy(**plain)[0], linear_cross_entropy(**args)[0], rtol=1e-4)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 48, 37), (2, 3, 1), (7, 5, 11), (1, 3, 2049)])
def test_single_tokens_and_single_words_are_exact(shape, impl):
    check(OP, arguments(OP, shape), torch.float32, impl, device(impl))


@pytest.mark.parametrize("impl", FAST)
def test_equal_to_torch_cross_entropy_with_smoothing_over_several_chunks(impl, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *a: 8)
    x, w, targets = draw(45, 12, 70, at=device(impl))
    loss, nll = linear_cross_entropy(x, w, targets, smoothing=0.3, reduction="mean", impl=impl)
    ours = torch.autograd.grad(loss, (x, w))
    logits = F.linear(x, w)
    truth = F.cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets))
    for a, b in zip(ours, torch.autograd.grad(truth, (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", [*FAST, "reference"])
@pytest.mark.parametrize("weight", [0.0, 1e-6, 1e-4])
def test_the_gradient_is_that_of_cross_entropy_plus_the_weighted_square_of_the_log_normaliser(weight, impl):
    x, w, targets = draw(33, 16, 130, at=device(impl))
    ours = torch.autograd.grad(linear_cross_entropy(x, w, targets, z_weight=weight, impl=impl)[0], (x, w))
    real = targets != -100
    wide, wide_w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    lse = torch.logsumexp(wide @ wide_w.T, -1)[real]
    truth = F.cross_entropy(wide @ wide_w.T, targets, reduction="sum") + weight * lse.square().sum()
    for a, b in zip(ours, torch.autograd.grad(truth, (wide, wide_w)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", FAST)
def test_a_loss_of_16_bit_logits_is_summed_in_float32(impl):
    half = torch.bfloat16 if impl == "cpu" or CUDA else torch.float16
    x, w, targets = draw(300, 64, 500, half, device(impl))
    loss, nll = linear_cross_entropy(x, w, targets, reduction="mean", impl=impl)
    exact = F.cross_entropy(F.linear(x, w).double(), targets)
    assert loss.dtype == nll.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 1e-5
    assert x.dtype == torch.autograd.grad(loss, w)[0].dtype == half


@pytest.mark.parametrize("impl", FAST)
def test_rows_without_a_target_have_zero_gradients_and_no_part_in_the_loss(impl):
    x, w, targets = draw(20, 6, 9, at=device(impl))
    loss, nll = linear_cross_entropy(x, w, targets, z_weight=0.1, softcap=3.0, smoothing=0.1, impl=impl)
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert not dx[targets == -100].any() and dx[targets != -100].any(1).all()
    kept = targets != -100
    rest, _ = linear_cross_entropy(x[kept], w, targets[kept], z_weight=0.1, softcap=3.0, smoothing=0.1, impl=impl)
    torch.testing.assert_close(loss, rest)
    for reduction in ("sum", "mean"):
        loss, nll = linear_cross_entropy(x, w, torch.full_like(targets, -100), reduction=reduction, impl=impl)
        assert loss.item() == nll.item() == 0.0
        assert not any(g.any() for g in torch.autograd.grad(loss, (x, w)))


def test_extreme_logits_give_neither_infinity_nor_nan():
    for impl in FAST:
        x = torch.tensor([[1.0], [1.0], [-1.0]], device=device(impl), requires_grad=True)
        w = torch.tensor([[3e4], [-3e4], [0.0], [2.9e4]], device=device(impl), requires_grad=True)
        targets = torch.tensor([1, 0, 3], device=device(impl))
        loss, _ = linear_cross_entropy(x, w, targets, impl=impl)
        truth = F.cross_entropy((x @ w.T).double(), targets, reduction="sum")
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.skipif("triton" not in FAST, reason="needs TRITON_INTERPRET=1 or a GPU")
def test_rows_may_lie_more_than_2_31_numbers_apart_and_a_wrong_target_is_nan():
    stride = 1 << 31
    far = torch.empty_strided((2, 8), (stride, 1), device=GPU, dtype=torch.float16)
    far[:] = torch.arange(16.0).view(2, 8)
    expected = F.cross_entropy(far.float(), torch.tensor([1, 7], device=GPU), reduction="none")
    outs = torch.empty(2, 2, device=GPU)
    terms = module.Terms(0.0, 0.0, 0.0, -100)
    module._rows_triton(far, torch.tensor([1, 7], device=GPU), outs[0], outs[1], terms, True)
    torch.testing.assert_close(outs[0], expected)
    torch.testing.assert_close(far.float().sum(1), torch.zeros(2, device=GPU), atol=1e-2, rtol=0)
    x, w, _ = draw(3, 4, 5, at=GPU)
    loss, _ = linear_cross_entropy(x, w, torch.tensor([0, 5, 1], device=GPU), impl="triton")
    assert loss.isnan()


def test_all_logits_are_never_there(inside):
    n, d, v = 1024, 8, 3000
    x, w, targets = draw(n, d, v)
    options = {"z_weight": 1e-4, "softcap": 20.0, "smoothing": 0.1}
    loss, _ = linear_cross_entropy(x, w, targets, **options)
    with Largest() as after:
        loss.backward()
    assert max(n * d, v * d) < inside.numbers <= chunk_rows(n, v, d, 4, "cpu") * v < n * v
    assert after.numbers == v * d
    with Largest() as of_reference:
        linear_cross_entropy_reference(x, w, targets, **options)[0].backward()
    assert of_reference.numbers == n * v  # what the measure sees where they are


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_rows_of_a_chunk_are_few_where_the_vocabulary_is_large_and_all_where_it_is_small(path):
    assert chunk_rows(16384, 65, 128, 4, path) == 16384
    for n, d, v, size in [(16384, 768, 32768, 2), (16384, 1152, 262144, 2), (2048, 768, 50304, 4), (513, 64, 50257, 2)]:
        rows = chunk_rows(n, v, d, size, path)
        assert rows == chunk_rows(n, v, d, size, path) and 0 < rows < n
        assert rows * v * size <= (256 * v * size if path == "cpu" else max(1 << 25, v * d * size) + 128 * v * size)
    assert chunk_rows(0, 5, 5, 4, path) == 1


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_every_block_that_config_gives_is_compiled():
    built = {(b.constants["BLOCK"], b.num_warps) for b in OP.builds()}
    for v in (1, 2, 65, 1023, 1024, 1025, 4096, 50257, 262144):
        assert config(v) == config(v)
        assert (config(v)["BLOCK"], config(v)["num_warps"]) in built


@pytest.mark.parametrize("impl", FAST)
def test_without_gradients_there_is_one_product_a_chunk(impl, inside):
    x, w, targets = draw(40, 8, 30, at=device(impl))

    def products(*args):
        inside.products = 0
        linear_cross_entropy(*args, impl=impl)
        return inside.products

    assert products(x, w, targets) == 3
    assert products(x, w.detach(), targets) == 2
    with torch.no_grad():
        assert products(x, w, targets) == 1


@pytest.mark.parametrize("impl", FAST)
def test_gradients_can_be_asked_for_twice_but_not_differentiated(impl):
    half = torch.bfloat16 if impl == "cpu" else torch.float16
    for dtype in (torch.float32, half):
        x, w, targets = draw(20, 6, 9, dtype, device(impl))
        loss, _ = linear_cross_entropy(x, w, targets, z_weight=0.1, impl=impl)
        first = [g.clone() for g in torch.autograd.grad(3 * loss, (x, w), retain_graph=True)]
        again = [g.clone() for g in torch.autograd.grad(0 * loss, (x, w), retain_graph=True)]
        last = torch.autograd.grad(3 * loss, (x, w))
        assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True)) and not any(g.any() for g in again)
    loss, _ = linear_cross_entropy(x, w, targets, z_weight=0.1, impl=impl)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()


def test_a_narrow_gradient_made_in_place_is_the_one_made_apart(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 3)
    for rows in (1, 2, 3, 10):
        wide = torch.randn(rows, 5)
        expected = (wide * 0.7).bfloat16()
        assert torch.equal(module._scaled(wide, torch.tensor(0.7), torch.bfloat16), expected)


@pytest.mark.parametrize("impl", FAST)
def test_autocast_makes_products_in_16_bits_and_gradients_in_float32(impl):
    half = torch.bfloat16
    if impl == "triton" and not CUDA:
        pytest.skip("the interpreter cuts bfloat16 off")
    x, w, targets = draw(50, 16, 70, at=device(impl))
    with torch.autocast(device(impl), half):
        loss, _ = linear_cross_entropy(x, w, targets, impl=impl)
        truth = F.cross_entropy(F.linear(x, w).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(truth, (x, w)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert not torch.equal(loss, linear_cross_entropy(x, w, targets, impl=impl)[0])


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_compile_sees_one_node_and_its_gradients_are_equal(impl, dtype):
    x, w, targets = draw(40, 8, 30, dtype, device(impl))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def step(x, w):
        return 3 * linear_cross_entropy(2 * x, w, targets, z_weight=0.1, reduction="mean", impl=impl)[0]

    for backend in (keep, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        for a, b in zip(
            torch.autograd.grad(compiled(x, w), (x, w)), torch.autograd.grad(step(x, w), (x, w)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    assert len(graphs) == 1
    assert sum("novella" in str(node.target) for node in graphs[0].graph.nodes) == 1


@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 60), st.floats(-40, 40), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_constant_added_to_all_logits_changes_nothing_and_gradients_of_logits_sum_to_zero(n, d, v, shift, seed):
    x, w, targets = draw(n, d, v, torch.float64, seed=seed)
    bias = torch.zeros(v, dtype=torch.float64, requires_grad=True)
    loss, nll = linear_cross_entropy(x, w, targets, bias=bias, impl="cpu")
    moved, _ = linear_cross_entropy(x, w, targets, bias=bias + shift, impl="cpu")
    torch.testing.assert_close(loss, moved)
    (db,) = torch.autograd.grad(loss, bias)
    assert abs(db.sum().item()) < 1e-9 * n and torch.equal(loss, nll)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"reduction": "none"}, "reduction='none' does not exist; sum and mean do"),
        ({"smoothing": 1.0}, "smoothing=1.0 must lie in"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"link": torch.tanh, "impl": "cpu"}, "impl='cpu' takes no link"),
    ],
)
def test_settings_that_do_not_exist_are_refused_by_name(settings_, words):
    x, w, targets = draw(3, 2, 4)
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(x, w, targets, **settings_)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.ones(1, 3, 2)}, r"x \[1, 3, 2\], weight \[4, 2\] must be \[N, D\], \[V, D\]"),
        ({"weight": torch.ones(4, 3)}, r"weight \[4, 3\] must be"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets \[5\] in torch.int64 must be \[3\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, r"targets \[3\] in torch.int32"),
        ({"bias": torch.ones(1)}, r"bias \[1\] must be \[4\]"),
    ],
)
@pytest.mark.parametrize("impl", [*FAST, "reference", "auto"])
def test_shapes_that_do_not_fit_are_refused_on_every_path(arguments, words, impl):
    given = {"x": torch.ones(3, 2), "weight": torch.ones(4, 2), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**{**given, **arguments}, impl=impl)


def test_a_link_and_few_logits_take_the_reference():
    x, w, targets = draw(64, 4, 8192 + 1)
    with record() as ran:
        linear_cross_entropy(x, w, targets)
        linear_cross_entropy(x[:1], w, targets[:1])
        loss, _ = linear_cross_entropy(x, w, targets, link=lambda z: 2 * z)
    paths = ["triton", "triton"] if x.is_cuda else ["cpu", "reference"]
    assert ran == [("linear_cross_entropy", path) for path in [*paths, "reference"]]
    torch.testing.assert_close(loss, F.cross_entropy(2 * F.linear(x, w), targets, reduction="sum"))
