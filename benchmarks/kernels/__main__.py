"""Time every operation of kernels/ beside its public peers, on a GPU where there is one, on the processor otherwise.

    python -m benchmarks.kernels [OPERATION ...] [--out benchmarks/results] [--minutes 8] [--threads 1] [--fresh]

Each row is checked before it is timed. Contestants take turns within a row, so that what disturbs the machine disturbs
all of them; the figure is the median of the rounds. The floor is what the work's products and bytes take at the rates
of a matrix product and a copy that were measured in the same run. Rows are written as they come: the same command goes
on where it was ended. Needs neither Ray nor a network. Writes kernels_cuda.md and .json, or kernels_cpu.*.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.row import Row

FILES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "__main__", "row"))
ROUNDS, LEAST = 7, 0.02  # rounds of each contestant, and seconds that a round lasts at least


class Clock:
    """Seconds and peak bytes of a call on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        # Written before each call on a GPU, so that nobody finds his inputs in the cache.
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if self.cuda else None

    def seconds(self, call: Callable[[], Any], times: int) -> float:
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - began) / times
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        assert self.flush is not None
        for first, last in marks:
            self.flush.zero_()
            first.record()
            call()
            last.record()
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in marks) / 1e3

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes above what was held before."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - before)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmHWM")
        call()
        return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def turns(clock: Clock, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    times = {}
    for name, call in calls.items():
        call()  # compiles, allocates
        once = clock.seconds(call, 1)
        times[name] = max(1, min(50, int(LEAST / max(once, 1e-7))))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS):
        order = list(calls) if i % 2 else list(reversed(calls))
        for name in order:
            rounds[name].append(clock.seconds(calls[name], times[name]))
        if sum(map(sum, rounds.values())) > 12 and i >= 2:  # a slow row is not worth seven rounds
            break
    return {name: statistics.median(values) for name, values in rounds.items()}


def rates(clock: Clock, device: str) -> dict[str, float]:
    """Bytes per second of a copy (read and write counted), FLOP per second of a matrix product in each dtype."""
    n, size = (1 << 28, 8192) if clock.cuda else (1 << 25, 1024)
    a, b = torch.empty(n, device=device), torch.empty(n, device=device)
    a.fill_(1.0), b.fill_(2.0)
    measured = {"copy": 8 * n / turns(clock, {"copy": lambda: b.copy_(a)})["copy"]}
    for dtype in ("float32", "bfloat16"):
        x = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
        y, out = torch.randn_like(x), torch.empty_like(x)
        best = turns(clock, {"mm": lambda x=x, y=y, out=out: torch.mm(x, y, out=out)})["mm"]  # type: ignore[misc]
        measured[dtype] = 2 * size**3 / best
    return measured


def rows(device: str, wanted: list[str]) -> Iterator[Row]:
    for file in FILES:
        if not wanted or file in wanted:
            yield from importlib.import_module(f"benchmarks.kernels.{file}").rows(device)


def measured(row: Row, clock: Clock, rate: dict[str, float]) -> dict[str, Any]:
    found: dict[str, Any] = {"op": row.op, "case": row.case, "goal": row.goal, "flops": row.flops, "bytes": row.bytes}
    try:
        row.check()
    except Exception as error:
        return {**found, "wrong": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
    calls, failed = {"ours": row.ours}, {}
    for name, peer in row.peers.items():
        try:
            peer()
            calls[name] = peer
        except Exception as error:  # a peer that does not run here is no reason to stop
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
    floor = max(row.flops / rate[row.dtype], row.bytes / rate["copy"])
    seconds = turns(clock, calls)
    return {
        **found,
        "seconds": seconds,
        "peak_bytes": {name: clock.peak(call) for name, call in calls.items()},
        "floor_seconds": floor,
        "failed": failed,
    }


def page(found: dict[str, Any]) -> str:
    """Markdown: one table an operation, one line a contestant."""
    about = found["about"]
    lines = [
        f"# Kernels on {about['device']}",
        "",
        f"`{about['command']}`, {about['date']}, torch {about['torch']}, Triton {about['triton']}, "
        f"{about['threads']} threads. Median of up to {ROUNDS} rounds, contestants in turns. Measured in the same run: "
        f"a copy {about['rates']['copy'] / 1e9:,.0f} GB/s, a matrix product {about['rates']['float32'] / 1e12:.3g} "
        f"(float32) and {about['rates']['bfloat16'] / 1e12:.3g} TFLOP/s (bfloat16); the floor is the larger of the two "
        "times that the work takes at these rates. `x ours`: how many times as long as ours. Memory: peak above what "
        "was held before the call.",
        *([f"Not run for lack of time: {', '.join(found['left'])}."] if found.get("left") else []),
    ]
    by_op: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"].values():
        by_op.setdefault(row["op"], []).append(row)
    for op, of_op in by_op.items():
        lines += ["", f"## {op}", "", "| case | who | ms | x ours | GB/s | TFLOP/s | x floor | peak MiB |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for row in of_op:
            if "wrong" in row:
                lines.append(f"| {row['case']} | **wrong: {row['wrong']}** | | | | | | |")
                continue
            for name, s in row["seconds"].items():
                case = row["case"] + (f" ({row['goal']})" if row["goal"] else "") if name == "ours" else ""
                x = "" if name == "ours" else f"{s / row['seconds']['ours']:.2f}"
                floor = f"{s / row['floor_seconds']:.2f}" if row["floor_seconds"] else ""
                peak = row["peak_bytes"][name] / 2**20
                lines.append(
                    f"| {case} | {name} | {s * 1e3:.3f} | {x} | {row['bytes'] / s / 1e9:,.1f} | "
                    f"{row['flops'] / s / 1e12:.3f} | {floor} | {peak:,.1f} |"
                )
            lines += [f"| | {name}: {why} | | | | | | |" for name, why in row.get("failed", {}).items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", help=", ".join(FILES))
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=None, help="of the processor; all cores where nothing is said")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the file already")
    o = parser.parse_args(argv)
    if wrong := [name for name in o.operations if name not in FILES]:
        parser.error(f"{wrong[0]!r} is no operation; {', '.join(FILES)} are")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = o.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    began, clock = time.monotonic(), Clock(device)
    suffix = device if device == "cuda" else f"cpu_{threads}_thread{'s' * (threads > 1)}"
    path = Path(o.out, f"kernels_{suffix}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {platform.machine()}",
        "torch": torch.__version__, "triton": version, "threads": threads,
    }  # fmt: skip
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not o.fresh else {}
    if found and {k: found["about"].get(k) for k in about} != about:
        print(f"{path} is of another machine or version; measuring anew", flush=True)
        found = {}
    words = " ".join(sys.argv[1:] if argv is None else argv)
    rate = rates(clock, device)
    found.setdefault("rows", {})
    date = time.strftime("%Y-%m-%d")
    found["about"] = {**about, "rates": rate, "date": date, "command": f"python -m benchmarks.kernels {words}".strip()}
    found["left"] = []
    for row in rows(device, o.operations):
        if row.name in found["rows"]:
            continue
        if time.monotonic() - began > 60 * o.minutes:
            found["left"].append(row.name)
            continue
        result = measured(row, clock, rate)
        found["rows"][row.name] = result
        said = result.get("wrong") or ", ".join(f"{n} {s * 1e3:.3f} ms" for n, s in result["seconds"].items())
        print(f"{row.name}: {said}", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(found))
        del row
        gc.collect()
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(found))
    print(f"wrote {path.with_suffix('.md')} and {path.name}")
    if found["left"]:
        print(f"{len(found['left'])} rows are left; the same command goes on with them")
    return 1 if any("wrong" in row for row in found["rows"].values()) else 0


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
