"""Ray Tune does the work of a search.

A Tune trial is a lane: an actor with its share of the cluster that stays for the whole search, token folders open, and
trains one piece after another. Tune gives lanes their resources and says when one has died; then another takes its
place. Which piece a lane gets is the guide's to say, as soon as the lane is free, in the driver's main thread. Tune's
own record of the experiment may be lost with the driver: a search goes on from its ledger.

(One Tune trial per piece, with reused actors, was tried: Tune drops all but one actor when pieces end together, and a
new one, slower to start than a short piece to end, never gets to work.)
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from pipelines.lib.config import InputError
from pipelines.lib.launch import Fit
from pipelines.lib.search.desk import Desk
from pipelines.lib.search.guide import LOOK_S, Guide
from pipelines.lib.search.trials import Done
from pipelines.lib.search.worker import perform


class Lane(tune.Trainable):
    """One step is one piece; no job means that the search has ended."""

    def setup(self, config: dict[str, Any]) -> None:
        self.lane, self.desk = config["lane"], config["desk"]

    def step(self) -> dict[str, Any]:
        job = ray.get(self.desk.take.remote(self.lane))
        if job is None:
            return {"outcome": "", "done": True}
        return {"outcome": json.dumps(perform(job)), "done": False}  # as text: Tune flattens trees


class Lanes(Searcher):
    """What Tune asks for trials and tells of them, in its own thread; events: what the main thread should know."""

    def __init__(self, desk: Any = None, events: queue.SimpleQueue | None = None) -> None:
        super().__init__(metric="outcome", mode="max")
        self.desk, self.events, self.ending = desk, events, False

    def __reduce__(self) -> Any:
        """Tune pickles its searcher into its record of the experiment, which nothing reads."""
        return Lanes, ()

    def suggest(self, trial_id: str) -> Any:
        if self.ending:
            return Searcher.FINISHED
        self.tell(trial_id, "free", "")
        return {"lane": trial_id, "desk": self.desk}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result["outcome"]:
            self.tell(trial_id, "ended", result["outcome"])

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.tell(trial_id, "gone", "")

    def tell(self, lane: str, what: str, text: str) -> None:
        assert self.events is not None
        self.events.put((lane, what, text))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its ledger")


def on_tune(guide: Guide, stop: Callable[[], str]) -> str:
    """The pieces on Ray Tune, as many at once as fit or are asked for. Returns why the search ended. Ray must run.

    stop: as in guide.in_process.
    """
    config = guide.config
    cluster = ray.cluster_resources()
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.get("GPU", 0) else 0.0
    slots = slots_of(config.parallel, config.workers, config.cpus_per_worker, gpus, cluster)
    # Ray Train's workers take their resources themselves; the lane that drives them takes next to none.
    own = {"CPU": config.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    share: dict[str, float] = {"memory": float(2**20)} if config.workers else own
    for name in ("ray.tune", "ray.air"):  # a lane that dies is said by the guide, in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    attempt = guide.out / ".ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    attempt.mkdir(parents=True)
    for old in sorted(attempt.parent.iterdir())[:-3]:
        shutil.rmtree(old, ignore_errors=True)
    desk: Any = ray.remote(num_cpus=0)(Desk).remote()
    lanes = Lanes(desk, queue.SimpleQueue())
    tuner = tune.Tuner(
        tune.with_resources(Lane, tune.PlacementGroupFactory([share])),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=lanes,
            max_concurrent_trials=slots,
            trial_name_creator=lambda trial: f"lane_{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"lane_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="attempt",
            storage_path=str(attempt),
            verbose=0,
            callbacks=[],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    thread = Fit(tuner.fit)
    try:
        reason = hand_out(guide, lanes, thread, stop)
        thread.join()
    finally:  # after a third Ctrl-C, too: no lane waits for a job any more
        lanes.ending = True
        ray.kill(desk)
    if thread.error is not None:
        raise thread.error
    if reason is None:
        raise RuntimeError("Ray Tune ended before the search did")
    return reason


def hand_out(guide: Guide, lanes: Lanes, thread: Fit, stop: Callable[[], str]) -> str | None:
    """Give every free lane a piece and take what comes back, until the search ends. Returns why; None: Tune ended."""
    assert lanes.events is not None
    free: list[str] = []
    busy: dict[str, int] = {}  # lane -> number of its trial
    reason: str | None = None
    while thread.is_alive():
        try:
            lane, what, text = lanes.events.get(timeout=LOOK_S)
        except queue.Empty:
            lane, what, text = "", "", ""
        if lane in busy and what != "free":
            guide.end(busy.pop(lane), json.loads(text) if text else None, "" if text else "its process died")
        if what in ("free", "ended"):
            free.append(lane)
        elif lane in free:
            free.remove(lane)
        if why := stop():
            guide.stop(why)
        while free and reason is None:
            found = guide.next()
            if found is None:
                break
            if isinstance(found, Done):
                reason, lanes.ending = found.reason, True
                break
            busy[free[0]] = found.number
            lanes.desk.put.remote(free.pop(0), found.job)
        while reason is not None and free:
            lanes.desk.put.remote(free.pop(0), None)
    return reason


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
