"""What is worth knowing of the machine and the source that a run came from: commit and diff, load, memory, GPUs."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2]
GIT_SHA = "NOVELLA_GIT_SHA"  # for a job, whose upload has no .git: the commit that it was submitted from
DIFF_BYTES = 4 << 20
MEGABYTE = 1e6  # as in MLflow's own system metrics
NVIDIA_FIELDS = ("utilization.gpu", "memory.used", "memory.total", "power.draw")


def git_sha() -> str | None:
    """The commit of this source, with `+` behind it if files differ from it; None outside a git checkout."""
    sha = _git("rev-parse", "HEAD")
    if not sha:
        return os.environ.get(GIT_SHA)
    return sha.strip() + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def git_diff() -> str | None:
    """What differs from the commit, with the names of new files; cut after 4 MiB with a note. None if nothing does."""
    diff, new = _git("diff", "HEAD"), _git("ls-files", "--others", "--exclude-standard")
    if diff is None or not (diff or new):
        return None
    if len(diff) > DIFF_BYTES:
        diff = diff[:DIFF_BYTES] + f"\n# cut here: the whole diff has {len(diff)} characters\n"
    return diff + "".join(f"# new file, not in the diff: {name}\n" for name in (new or "").splitlines())


def _git(*words: str) -> str | None:
    if not (SOURCE / ".git").exists():  # a copy inside another project's repository must not show that one's commit
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run(["git", "-C", str(SOURCE), *words], capture_output=True, timeout=20)
        if answer.returncode == 0:
            return answer.stdout.decode(errors="replace")
    return None


def tags() -> dict[str, str]:
    """Who, where, with what: flat names and short values."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"host": socket.gethostname(), "python": platform.python_version()}
    for package in ("torch", "ray", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[f"version.{package}"] = version(package)
    with contextlib.suppress(Exception):  # a container's user may have no name
        found["user"] = getpass.getuser()
    with contextlib.suppress(KeyError, ValueError):  # what `ray job submit` tells the process that it starts
        found["ray_job"] = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    return found


def load(disk: Path) -> dict[str, Any]:
    """This machine now, under MLflow's names for system metrics. CPU and network count since the last call or boot.

    disk: a path on the disk to report.
    """
    import psutil

    memory, net, free = psutil.virtual_memory(), psutil.net_io_counters(), shutil.disk_usage(disk)
    found: dict[str, Any] = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": memory.percent,
        "system/system_memory_usage_megabytes": round((memory.total - memory.available) / MEGABYTE, 1),
        "system/disk_available_megabytes": round(free.free / MEGABYTE, 1),
        "system/driver_memory_usage_megabytes": round(psutil.Process().memory_info().rss / MEGABYTE, 1),
    }
    if net:
        found["system/network_receive_megabytes"] = round(net.bytes_recv / MEGABYTE, 3)
        found["system/network_transmit_megabytes"] = round(net.bytes_sent / MEGABYTE, 3)
    for i, (used_pct, used, total, watts) in enumerate(_nvidia()):
        found[f"system/gpu_{i}_utilization_percentage"] = used_pct
        found[f"system/gpu_{i}_memory_usage_megabytes"] = used
        found[f"system/gpu_{i}_memory_usage_percentage"] = round(100 * used / total, 2) if total else 0.0
        found[f"system/gpu_{i}_power_usage_watts"] = watts
    return found


def _nvidia() -> list[list[float]]:
    """One row per NVIDIA GPU: utilisation %, MiB used, MiB in all, W; nothing where the driver's tool is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(NVIDIA_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return [[_number(word) for word in line.split(",")] for line in answer.splitlines() if line.count(",") == 3]
    except (OSError, subprocess.SubprocessError):
        return []


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:  # "[N/A]" where a virtual GPU hides a figure
        return 0.0
