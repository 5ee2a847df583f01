"""Compile every shipped kernel for GPUs that need not be there: registers, spills, shared memory.

    python -m kernels.compiled [OPERATION ...] [arch=90,80] [out=FOLDER]

Writes kernels_compiled.md and .json to out= where that is given, and ends with code 1 when a kernel does not compile or
spills registers without a reason written beside it. It proves that kernels compile, not that they are fast.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels import ops
from kernels.op import Build, triton

ARCHITECTURES = ("80", "86", "89", "90")  # Ampere, Ada, Hopper


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. registers: per thread; spills: bytes stored and loaded; shared: bytes."""

    op: str
    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    seconds: float
    reason: str = ""
    error: str = ""


def compile_one(op: str, build: Build, arch: int) -> Compiled:
    """Through Triton to a cubin, then through ptxas once more for its account of registers and spills."""
    import time

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    began = time.perf_counter()
    names = build.kernel.arg_names
    unknown = set(names) ^ {*build.signature, *build.constants}
    assert not unknown, f"{build.kernel.__name__}: signature and constants differ from its arguments by {unknown}"
    signature = {n: "constexpr" if n in build.constants else build.signature[n] for n in names}
    aligned = {n for n, t in build.signature.items() if t.startswith("*")} | set(build.aligned)
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    source = ASTSource(build.kernel, signature, build.constants, attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        registers, spills = account(made.asm["ptx"])
    except Exception as error:  # whatever the compiler raises belongs in the table
        lines = str(error).strip().splitlines()
        return Compiled(op, build.name, arch, 0, 0, 0, time.perf_counter() - began, error=(lines or [repr(error)])[-1])
    seconds = time.perf_counter() - began
    return Compiled(op, build.name, arch, registers, spills, made.metadata.shared, seconds, build.spills)


def account(ptx: str) -> tuple[int, int]:
    """(registers per thread, bytes spilled) that ptxas reports for the code's own target."""
    from triton.backends.nvidia.compiler import get_ptxas

    found = re.search(r"^\.target (sm_\w+)", ptx, re.M)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(int(re.sub(r"\D", "", found[1]))).path, "-v", f"--gpu-name={found[1]}", str(path)]
        said = subprocess.run([*command, "-o", str(path) + ".cubin"], capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return registers, spills


def table(rows: list[Compiled]) -> str:
    """Markdown."""
    lines = ["| operation | kernel and configuration | arch | registers | spilled bytes | shared bytes | |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for r in rows:
        said = f"**{r.error}**" if r.error else r.reason if r.spills else ""
        lines.append(f"| {r.op} | {r.kernel} | sm_{r.arch} | {r.registers} | {r.spills} | {r.shared:,} | {said} |")
    return "\n".join(lines)


def is_fault(row: Compiled) -> bool:
    return bool(row.error) or (row.spills > 0 and not row.reason)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    known, wanted = ops(), [word for word in words if "=" not in word]
    if wrong := [w for w in wanted if w not in known] + [k for k in given if k not in ("arch", "out")]:
        print(f"error: {wrong[0]!r} is neither an operation ({', '.join(known)}) nor arch= or out=", file=sys.stderr)
        return 2
    arches = given.get("arch", "90,80").split(",")
    if wrong := [a for a in arches if a not in ARCHITECTURES]:
        print(f"error: arch={wrong[0]}: {', '.join(ARCHITECTURES)} are compiled for", file=sys.stderr)
        return 2
    if triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        print("error: this needs Triton, and TRITON_INTERPRET unset: interpreted kernels have no code", file=sys.stderr)
        return 2
    rows = []
    for name in wanted or known:
        for build in known[name].builds():
            for arch in map(int, arches):
                rows.append(compile_one(name, build, arch))
                print(json.dumps(asdict(rows[-1])), flush=True)
    if out := given.get("out"):
        Path(out).mkdir(parents=True, exist_ok=True)
        head = (
            "# Kernels, compiled\n\n"
            f"`python -m kernels.compiled {' '.join(words)}`, Triton {triton.__version__}: {len(rows)} kernels, "
            f"{sum(r.spills > 0 for r in rows)} of them with spilled registers. No GPU is needed for this, so it says "
            "nothing about speed.\n\n"
        )
        Path(out, "kernels_compiled.md").write_text(head + table(rows) + "\n")
        Path(out, "kernels_compiled.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    for row in rows:
        if is_fault(row):
            print(
                f"fault: {row.kernel} for sm_{row.arch}: {row.error or f'{row.spills} bytes spilled'}", file=sys.stderr
            )
    return 1 if any(map(is_fault, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
