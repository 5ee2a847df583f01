"""Connect to Ray: to the cluster named by RAY_ADDRESS (so also inside a Ray job), else to a small one of our own.

One function, `ensure_ray()`, is the only place of this project that calls `ray.init`.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.lib.config import InputError

LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # our own progress lines; Ray's bars rewrite the terminal
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task with num_gpus=0 keeps CUDA_VISIBLE_DEVICES as it is
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux: bind 127.0.0.1 instead of the LAN address
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files: a trial's run folder has it all
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own record of an experiment, which nothing reads
    "RAY_AIR_NEW_OUTPUT": "0",
}
OBJECT_STORE_BYTES = 256 * 2**20  # Ray's own default is 30 % of memory; our stages pass paths and counts, not data


def ensure_ray(num_cpus: int | None = None, object_store_bytes: int = OBJECT_STORE_BYTES) -> bool:
    """Make `ray` usable in this process; calling it again does nothing.

    With RAY_ADDRESS in the environment (set by hand, or by `ray job submit` for a job's driver) this joins that cluster
    and num_cpus and object_store_bytes are the cluster's own. Otherwise Ray starts here for the life of this process:
    loopback only, no dashboard, no usage statistics, num_cpus logical CPUs (default: those this process may use, at
    least 2, because a Ray Train run with one worker and a dataset needs more than one).

    Returns True if a local Ray was started by this call, False if one was joined or already there. Raises InputError if
    the cluster cannot be joined.
    """
    for name, value in LOCAL_ENVIRONMENT.items():  # read when ray is imported, so set before
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    with _own_sigterm():
        return _init(ray, num_cpus, object_store_bytes)


def _init(ray: Any, num_cpus: int | None, object_store_bytes: int) -> bool:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            cause = str(error.__cause__ or error)
            why = "it wants a token" if "token" in cause else cause.strip().splitlines()[0]
            hint = "set RAY_AUTH_MODE=token" if "token" in cause else "unset RAY_ADDRESS to start one here"
            raise InputError(f"RAY_ADDRESS={address}: cannot join this cluster, {why}; {hint}") from None
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(
            address="local",  # never join a cluster that merely happens to run on this machine
            num_cpus=num_cpus or max(2, usable_cpus()),
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            **quiet,
        )
    return True


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep a stage's own SIGTERM handler: `ray.init` puts Ray's in its place, and a stop would not save first."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def usable_cpus() -> int:
    """CPUs that this process may use (affinity mask), not those that the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
