"""Every operation of kernels/ on every path against its reference in float64, in value and gradient.

Without a GPU, Triton's kernels run in its interpreter (float32 and float16; it cuts bfloat16 off instead of rounding).
"""

from __future__ import annotations

import pytest
import torch

from kernels import ops
from kernels.op import triton
from tests.kernels.judge import arguments, cast, check, flat, outputs_and_grads, strided

OPS = ops()
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUNS = [(op, impl) for op in OPS.values() for impl in op.paths if impl != "reference" and not (impl == "cpu" and CUDA)]
named = {"ids": lambda value: value.name if hasattr(value, "name") else str(value)}


def dtypes(op, impl):
    """bfloat16 too where it is real: on processors and GPUs, not in the interpreter."""
    extra = [torch.bfloat16] if impl != "triton" or CUDA else []
    return [*dict.fromkeys([*(d for d in op.dtypes if impl == "triton" or d != torch.float16), *extra])]


@pytest.mark.parametrize(("op", "impl"), RUNS, **named)
def test_values_and_gradients_err_at_most_twice_what_pytorch_errs(op, impl):
    device = DEVICE if impl in ("triton", "auto") else "cpu"
    for shape in op.shapes:
        args = arguments(op, shape)
        for dtype in dtypes(op, impl):
            check(op, args, dtype, impl, device)


@pytest.mark.parametrize(("op", "impl"), RUNS, **named)
def test_strides_do_not_matter(op, impl):
    device = DEVICE if impl in ("triton", "auto") else "cpu"
    args = arguments(op, op.shapes[1])
    fn = (lambda **k: op.fn(**k)) if impl == "auto" else (lambda **k: op.fn(**k, impl=impl))
    plain = cast(args, torch.float32, device)
    spread = {
        k: v.to(device).detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) and CUDA else v
        for k, v in strided(cast(args, torch.float32)).items()
    }
    for a, b in zip(flat(outputs_and_grads(fn, plain)), flat(outputs_and_grads(fn, spread)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("op", "impl"), [(op, impl) for op, impl in RUNS if op.empty is not None], **named)
def test_nothing_in_is_nothing_out(op, impl):
    check(op, arguments(op, op.empty), torch.float32, impl, DEVICE if impl in ("triton", "auto") else "cpu")


@pytest.mark.parametrize("op", OPS.values(), **named)
def test_compiles_as_one_graph_with_equal_results(op):
    args = cast(arguments(op, op.shapes[1]), torch.float32, DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **k: op.fn(**k), backend="aot_eager", fullgraph=True)
    for a, b in zip(flat(outputs_and_grads(compiled, args)), flat(outputs_and_grads(op.fn, args)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [op for op in OPS.values() if "auto" not in op.paths], **named)
def test_an_unknown_path_is_refused_by_name(op):
    with pytest.raises(ValueError, match=f"{op.name}: impl='fast' does not exist; auto, triton, cpu, reference do"):
        op.fn(**cast(arguments(op, op.shapes[0]), torch.float32), impl="fast")


@pytest.mark.skipif(triton is None, reason="needs Triton")
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.builds is not tuple], **named)
def test_nothing_is_tuned_when_it_runs(op):
    """Tiles come from a function of shapes: a second call costs what the first did, and results repeat."""
    tuned = (triton.runtime.Autotuner, triton.runtime.autotuner.Heuristics)
    assert not [b.kernel for b in op.builds() if isinstance(b.kernel, tuned)]
