"""Hand the training loop to a launcher: this process, or N workers of Ray Train (which only this file knows)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from models.families import IMPORTS
from models.spec import ConfigError
from pipelines.lib.config import InputError
from pipelines.lib.loop import Outcome, train
from pipelines.lib.run import Run
from pipelines.lib.training import TrainConfig
from pipelines.lib.world import World, choose_device


@contextmanager
def stop_on_signal(run: Run, say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT and SIGTERM ask the workers, by a file in the run folder, to save at the next step; a third ends it."""
    run.stop_request.unlink(missing_ok=True)
    count = 0

    def ask(number: int, frame: Any) -> None:
        nonlocal count
        count += 1
        if count >= 3:
            raise KeyboardInterrupt
        run.stop_request.touch()
        say(f"{signal.Signals(number).name}: saving at the next step ...")

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        run.stop_request.unlink(missing_ok=True)


def in_process(job: dict[str, Any], config: TrainConfig) -> Outcome:
    """Train here, without Ray: the form for notebooks, tests and debuggers."""
    return train(job, World.current(choose_device(config.device)))


def worker(job: dict[str, Any]) -> None:
    """One Ray Train worker. Bad input is handed to the driver by a file, so that it is not tried again."""
    import ray.train

    config = job["config"]
    device = choose_device(config["device"])
    if device.type == "cuda":
        from ray.train.torch import get_device

        device = get_device()
    context = ray.train.get_context()

    def report(metrics: dict) -> None:
        ray.train.report({**metrics, "checkpoint": str(metrics["checkpoint"])})

    outcome_file = Path(job["attempt"]) / "outcome.json"
    if outcome_file.is_file() and "failure" in json.loads(outcome_file.read_text()):
        return  # restarted after bad input: trying again would meet it again
    try:
        outcome = train(job, World.current(device), report)
        failure = None
    except (InputError, ConfigError) as error:
        failure, outcome = f"{error}", None
    if context.get_world_rank() == 0 or failure is not None:
        record = {"failure": failure} if outcome is None else {"outcome": vars(outcome)}
        temporary = outcome_file.with_name(f".outcome.{context.get_world_rank()}")
        temporary.write_text(json.dumps(record))
        temporary.replace(outcome_file)
    if failure is not None:
        # The other workers wait in a collective for this one; ending the process lets Ray end them, too.
        os._exit(0 if context.get_world_size() == 1 else 3)


def needs(config: TrainConfig, device_type: str) -> dict[str, float]:
    """What one worker takes from the cluster."""
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if device_type == "cuda" else 0.0
    return {"CPU": config.cpus_per_worker, **({"GPU": gpus} if gpus else {})}


def check_resources(config: TrainConfig, per_worker: dict[str, float]) -> None:
    """Say at once what the cluster does not have. Raises InputError."""
    import ray

    if config.wait_for_nodes:
        return
    there = ray.cluster_resources()
    for name, each in per_worker.items():
        asked, has = each * config.num_workers, there.get(name, 0.0)
        if asked > has:
            would = int(has // each)
            hint = f"num_workers={would}" if would else f"a cluster with {name}s"
            raise InputError(
                f"num_workers={config.num_workers} need {asked:g} {name}, the cluster has {has:g}; try {hint}, "
                f"{'cpus' if name == 'CPU' else 'gpus'}_per_worker={has / config.num_workers:g}, or "
                f"wait_for_nodes=true where it grows on demand"
            )


class Fit(threading.Thread):
    """Ray's `fit` in a thread of its own, so that it leaves SIGINT and SIGTERM to us: a stop saves first.

    error: what it raised, once it has ended.
    """

    def __init__(self, fit: Callable[[], Any]) -> None:
        super().__init__(name="fit", daemon=True)
        self.fit, self.error = fit, cast(BaseException | None, None)
        self.start()

    def run(self) -> None:
        try:
            self.fit()
        except BaseException as error:
            self.error = error


def on_ray(job: dict[str, Any], config: TrainConfig, say: Callable[[str], None]) -> Outcome:
    """Train on config.num_workers workers of Ray Train, restarted up to max_failures times from the newest checkpoint.

    Raises InputError for bad input that a worker met, and RuntimeError with the worker's last words for anything else.
    """
    # Ray Train lets one report through per poll (2 s); this loop reports at checkpoints only.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    from pipelines.lib.cluster import ensure_ray

    ensure_ray(num_cpus=max(2, int(config.num_workers * config.cpus_per_worker)) if config.device == "cpu" else None)
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = (config.gpus_per_worker or 0) > 0 or (
        config.gpus_per_worker is None
        and config.device in ("auto", "cuda")
        and ray.cluster_resources().get("GPU", 0) > 0
    )
    per_worker = needs(config, "cuda" if use_gpu else "cpu")
    check_resources(config, per_worker)
    run = Run(job["run"])
    attempt = run.path / ".ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    attempt.mkdir(parents=True)
    for old in sorted(attempt.parent.iterdir())[:-3]:  # Ray's own records; nothing of value
        shutil.rmtree(old, ignore_errors=True)
    job = {**job, "attempt": str(attempt)}
    trainer = TorchTrainer(
        worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # its stub is that of the older API
            name="attempt",
            storage_path=str(attempt),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )
    thread = Fit(trainer.fit)
    outcome_file = attempt / "outcome.json"
    while thread.is_alive():
        thread.join(0.2)
        if outcome_file.is_file() and (failure := json.loads(outcome_file.read_text()).get("failure")):
            raise InputError(failure)
    if outcome_file.is_file():
        record = json.loads(outcome_file.read_text())
        if record.get("failure"):
            raise InputError(record["failure"])
        return Outcome(**record["outcome"])
    error = thread.error or RuntimeError("Ray Train ended without an outcome")
    words = "".join(traceback.format_exception_only(error)).strip()
    raise RuntimeError(f"training failed after {config.max_failures} restarts: {words}") from error


def worker_environment(config: TrainConfig) -> dict[str, str]:
    """One OpenMP pool of the right size per worker: two pools on two cores are far slower than one thread each."""
    threads = config.threads or max(1, int(config.cpus_per_worker))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = dict.fromkeys(names, str(threads))
    for name in ("HF_HUB_OFFLINE", "NOVELLA_STORAGE", IMPORTS):
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment
