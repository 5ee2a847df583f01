"""Every shipped kernel configuration compiles for sm_90 and sm_80, and spills no register without a written reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels import ops
from kernels.compiled import Compiled, is_fault, main, table
from kernels.op import triton

# Operations that are made of another's kernels list none of their own.
WITH_KERNELS = [name for name, op in ops().items() if op.builds is not tuple]


@pytest.mark.skipif(triton is None, reason="needs Triton's compiler")
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_every_configuration_compiles_for_sm_90_and_sm_80_without_spills(name):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.compiled", name], capture_output=True, text=True, env=env, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]
    assert {row.arch for row in rows} == {80, 90}
    assert all(row.registers for row in rows)


def test_every_operation_with_a_triton_path_is_made_of_listed_kernels():
    composed = {"symmetric_polynomial", "newton_schulz"}  # of symmetric_product's
    assert {name for name, op in ops().items() if "triton" in op.paths} == {*WITH_KERNELS, *composed}


def test_a_spill_without_a_reason_is_a_fault():
    spilled = Compiled("op", "kernel", 90, 255, 16, 0, 0.1)
    assert is_fault(spilled)
    assert not is_fault(Compiled("op", "kernel", 90, 255, 16, 0, 0.1, reason="rare"))
    assert is_fault(Compiled("op", "kernel", 90, 0, 0, 0, 0.1, error="no such type"))
    assert "| 255 | 16 |" in table([spilled])


def test_an_unknown_operation_is_one_line_and_code_2(capsys):
    assert main(["no_such_op"]) == 2
    assert capsys.readouterr().err.startswith("error: 'no_such_op' is neither an operation")


def test_an_architecture_that_is_none_is_one_line_and_code_2(capsys):
    assert main(["arch=x"]) == 2
    assert capsys.readouterr().err == "error: arch=x: 80, 86, 89, 90 are compiled for\n"
    assert main(["--help"]) == 0 and "registers, spills" in capsys.readouterr().out
