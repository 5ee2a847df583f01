"""Ray Tune does the work of a search.

Each piece that the guide hands out is one Tune trial. Tune gives it resources and an actor (the same ones again, with
their token folders open) and says when it has ended or died. It decides nothing: its own record of an experiment may
be lost with the driver, and a search goes on from the ledger.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from pipelines.lib.config import InputError
from pipelines.lib.search.guide import Guide
from pipelines.lib.search.trials import Done
from pipelines.lib.search.worker import perform


class Piece(tune.Trainable):
    """The actor: one step is one piece."""

    def setup(self, config: dict[str, Any]) -> None:
        self.job = config["job"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config["job"]
        return True

    def step(self) -> dict[str, Any]:
        return {"outcome": json.dumps(perform(self.job)), "done": True}  # as text: Tune flattens trees


class Follow(Searcher):
    """Tune asks here what to run; the answers are the guide's. Both run in Tune's one thread."""

    def __init__(self, guide: Guide | None = None) -> None:
        super().__init__(metric="done", mode="max")
        self.guide, self.numbers, self.reason = guide, dict[str, int](), "stopped"

    def __reduce__(self) -> Any:
        """Tune pickles its searcher into its record of the experiment, which nothing reads."""
        return Follow, ()

    def suggest(self, trial_id: str) -> Any:
        assert self.guide is not None
        found = self.guide.next()
        if isinstance(found, Done):
            self.reason = found.reason
            return Searcher.FINISHED
        if found is not None:
            self.numbers[trial_id] = found.number
        return None if found is None else {"job": found.job}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        assert self.guide is not None
        if (number := self.numbers.pop(trial_id, None)) is not None:
            text = (result or {}).get("outcome") if not error else None
            self.guide.end(number, json.loads(text) if text else None, "" if text else "its process died")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its ledger")


def on_tune(guide: Guide, stop: Callable[[], bool]) -> str:
    """The pieces on Ray Tune, as many at once as fit or are asked for. Returns why the search ended. Ray must run.

    stop: asked several times a second; True lets running pieces save and end, and starts no others.
    """
    config = guide.config
    cluster = ray.cluster_resources()
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.get("GPU", 0) else 0.0
    slots = slots_of(config.parallel, config.workers, config.cpus_per_worker, gpus, cluster)
    # Ray Train's workers take their resources themselves; the trial that drives them takes next to none.
    own = {"CPU": config.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    share: dict[str, float] = {"memory": float(2**20)} if config.workers else own
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)
    follow = Follow(guide)
    attempt = guide.out / ".ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    attempt.mkdir(parents=True)
    for old in sorted(attempt.parent.iterdir())[:-3]:
        shutil.rmtree(old, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(Piece, tune.PlacementGroupFactory([share])),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=follow,
            max_concurrent_trials=slots,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"piece_{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"piece_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="attempt",
            storage_path=str(attempt),
            verbose=0,
            callbacks=[],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    caught: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            caught.append(error)

    # In a thread of its own, so that Tune leaves SIGINT and SIGTERM to us: pieces that run save first.
    thread = threading.Thread(target=fit, name="tune", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if stop():
            guide.stopping = guide.stopping or "stopped"
            ask_to_stop(guide)
    if caught:
        raise caught[0]
    return follow.reason


def ask_to_stop(guide: Guide) -> None:
    """Let the pieces that run save at their next update and end."""
    for number in list(guide.active):
        folder = guide.out / guide.ledger.rows[number]["run"]
        if folder.is_dir():
            (folder / ".stop").touch()


def slots_of(asked: int | None, workers: int, cpus: float, gpus: float, cluster: dict[str, float]) -> int:
    """How many trials may run at once. Raises InputError when not even one fits, or fewer than asked.

    workers: Ray Train workers of a trial, which Tune does not count; cpus, gpus: of each (0 workers: of the trial).
    """
    each = max(1, workers)
    room = [cluster.get("CPU", 0.0) // (cpus * each)] if cpus else []
    if gpus:
        room.append(cluster.get("GPU", 0.0) // (gpus * each))
    most = int(min(room)) if room else 1
    if most < 1:
        raise InputError(
            f"a trial needs {cpus * each:g} CPUs and {gpus * each:g} GPUs, the cluster has {cluster.get('CPU', 0):g} "
            f"and {cluster.get('GPU', 0):g}; try a smaller workers, cpus_per_worker or gpus_per_worker"
        )
    if asked is not None and asked > most:
        raise InputError(f"parallel={asked} trials do not fit on this cluster; try parallel={most}")
    return asked or most
