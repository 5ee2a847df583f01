"""MLflow beside a run folder: it shows what the folder says; a kill or a dead server loses and repeats nothing.

    python -m pipelines.lib.tracking sync RUN...    # bring MLflow up to what the run folders hold
    python -m pipelines.lib.tracking ui             # make the store if need be and open the page

The only file that imports mlflow, used in drivers only. The run folder is the truth and MLflow a copy of it:

    metrics.jsonl    one row per step, written by the training loop       -> metrics, the cursor `system/logged_step`
    system.jsonl     one row per sample of this machine, written here     -> metrics `system/...`, a cursor as well
    tracking.jsonl   the rest, in order: start, artifact, table, checkpoint, metrics, end; doing one twice does no harm
    mlflow.json      where the copy is: store, run id, bytes of tracking.jsonl done, logged models

A call on a Tracker only writes a line; one thread copies. So the loop never waits for a server, and whoever comes
later (a resumed driver, `sync`) goes on where the copy stands. Two at once do no harm: a file lock lets one copy at a
time, the cursor travels in the batch that it describes, and MLflow keeps one row per (run, name, step, time, value).

A search is a run like others, and each of its trials a run below it (`Children`), copied once it has ended. So one tree
goes from tokens (a run's input) to runs, the models that they logged, what was measured on these, and their endpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from models.spec import near
from pipelines.lib import machine
from pipelines.lib.config import InputError, write_yaml
from pipelines.lib.jobs import Parser, storage_path, storage_root
from pipelines.lib.jsonl import append, figures, finite, row_at, rows

EXPERIMENT = "novella"
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "databricks-uc")
CURSORS = {"metrics.jsonl": "system/logged_step", "system.jsonl": "system/logged_sample"}  # `system/`: own page
METRICS_PER_BATCH = 1000  # MLflow's limits: metrics and params of a request, characters of a param, a digest, a tag
PARAMS_PER_BATCH = 100
PARAM_CHARACTERS = 6000
DIGEST_CHARACTERS = 36
TAG_CHARACTERS = 8000
NAME_CHARACTERS = 250
OF_ADDING = ("time_ms", "key", "git_sha", "tags")  # what a line says of who wrote it and when, not of the trial
PROGRAMS = {"trial": "pipelines.train", "serve": "serving.app"}  # of other stages: pipelines.STAGE
STATUS = {"done": "FINISHED", "failed": "FAILED", "refused": "FAILED", "interrupted": "KILLED"}  # a trial's -> MLflow's
# Against a dead server MLflow would try for four minutes, each time for two; here a thread tries again anyway.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a line for every trial of a search
}
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")  # answers that will not change with time
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # answers to a run id that this store does not have


class Dataset(NamedTuple):
    """What a run reads, shown in MLflow as its input; the digest is the fingerprint's first 36 characters."""

    name: str
    fingerprint: str
    path: str
    context: str = "training"


# ------------------------------------------------------------------------------------------------- what stages call


class Tracker:
    """Tracking that is off: every method does nothing. `Tracker.start` gives this one or a MlflowTracker."""

    run_id: str | None = None

    @staticmethod
    def start(
        run_dir: str | os.PathLike[str],
        stage: str,
        config: Mapping[str, Any],
        *,
        kind: str = "mlflow",
        name: str | None = None,
        experiment: str | None = None,
        tags: Mapping[str, Any] | None = None,
        datasets: Sequence[tuple] = (),
        parent_run_id: str | None = None,
        resume_id: str | None = None,
        interval_s: float = 2.0,
        system_s: float = 10.0,
        wait_s: float = 20.0,
    ) -> Tracker:
        """Open the MLflow run of `run_dir`, or go on with the one it has, and copy to it until `close`.

        stage: the pipeline's name.  config: the resolved config as plain data; becomes params with dotted names.
        kind: "mlflow", or "none" for no tracking.  name, experiment: as shown (default: the folder's name;
        $MLFLOW_EXPERIMENT_NAME or "novella").  datasets: (name, fingerprint, path[, context]).  resume_id: the MLflow
        run to go on with if the folder itself names none.  interval_s: seconds between two looks at the files.
        system_s: seconds between two samples of this machine; 0 takes none.  wait_s: how long to wait for `run_id`;
        it stays None while the server does not answer, and the copy is caught up later.
        Raises InputError if $MLFLOW_TRACKING_URI cannot be used.
        """
        if kind == "none":
            return Tracker()
        if kind != "mlflow":
            raise InputError(f"tracking={kind}: there is mlflow, none")
        folder = storage_path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tracker = MlflowTracker(folder, tracking_uri(), interval_s, system_s)
        tracker.note(
            "start",
            key=uuid.uuid4().hex,
            stage=stage,
            name=name or folder.name,
            experiment=experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT,
            config=dict(config),
            tags={"stage": stage, "run_dir": str(folder), **machine.tags(), **(tags or {})},
            git_sha=machine.git_sha(),
            datasets=[Dataset(*dataset) for dataset in datasets],
            parent_run_id=parent_run_id,
            resume_id=resume_id,
        )
        if diff := machine.git_diff():
            (folder / "git.diff").write_text(diff)
            tracker.artifact(folder / "git.diff")
        tracker.go(wait_s)
        return tracker

    @staticmethod
    def attach(run_dir: str | os.PathLike[str], *, interval_s: float = 2.0, wait_s: float = 20.0) -> Tracker:
        """Add to the MLflow run of a run folder (evaluation results, for example), be it finished or still training.

        Its status stays as it is. A folder that was made with tracking off gives a tracker that is off.
        """
        folder = storage_path(run_dir)
        if not (folder / "tracking.jsonl").is_file():
            return Tracker()
        tracker = MlflowTracker(folder, tracking_uri(), interval_s, system_s=0, ends=False)
        tracker.go(wait_s)
        return tracker

    def mirror(self, path: str | os.PathLike[str]) -> None:
        """Say where the loop writes its rows: RUN/metrics.jsonl, which is followed from `start` to `close`."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log figures that stand in no metrics.jsonl, such as evaluation results. step: that of their checkpoint."""

    def artifact(self, path: str | os.PathLike[str], folder: str = "") -> None:
        """Upload a file or a folder, as it is when its turn comes, into `folder` of the run's artifacts."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to the table `name`.json, which the MLflow page shows; a row that it has is not repeated."""

    def board(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the table `name`.json, of the run folder and on the MLflow page, by these rows.

        Cheap to call often: what has not changed is not written, and only the newest of several is uploaded.
        """

    def checkpoint(self, path: str | os.PathLike[str], step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show a checkpoint folder as a logged model of the run: it names the path, nothing is uploaded or pickled.

        metrics: its figures; without them, the `val/` figures of that step in metrics.jsonl.
        """

    def uses_model(self, run_dir: str | os.PathLike[str], step: int) -> None:
        """Show that this run (an evaluation, a server) works on the checkpoint `step` of the run in `run_dir`.

        The model becomes an input; the tag `trained_by` holds its run, as MLflow's search knows no model inputs.
        """

    def plot(self, name: str, keys: Sequence[str]) -> None:
        """Draw columns of metrics.jsonl over the steps into RUN/plots/`name`.png and upload it."""

    def close(self, status: str = "FINISHED", wait_s: float = 60.0) -> None:
        """Copy what is left and end the run as FINISHED, FAILED or KILLED. wait_s: how long a slow server may take."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")


class MlflowTracker(Tracker):
    """Writes each call as a line of RUN/tracking.jsonl; a thread of the driver copies the run folder to MLflow."""

    def __init__(self, folder: Path, uri: str, interval_s: float, system_s: float, ends: bool = True) -> None:
        self.folder, self.interval_s, self.system_s, self.ends = folder, interval_s, system_s, ends
        self.copy = Copy(folder, uri)
        self.looked, self.closing = threading.Event(), threading.Event()
        self.trouble: str | None = None  # why the last look failed
        self.boards: dict[str, str] = {}  # as last written
        self.threads = [threading.Thread(target=self._follow, name="tracking", daemon=True)]
        if system_s:
            self.threads.append(threading.Thread(target=self._sample, name="system-metrics", daemon=True))

    @property
    def run_id(self) -> str | None:  # type: ignore[override]
        return self.copy.run_id

    def go(self, wait_s: float) -> None:
        """Start the threads; wait until MLflow has answered or has failed to."""
        for thread in self.threads:
            thread.start()
        self.looked.wait(wait_s)
        if self.run_id:
            say(f"run {self.run_id} in {self.copy.shown}; `make ui` opens the page")

    def note(self, do: str, **what: Any) -> None:
        append(self.folder / "tracking.jsonl", {"do": do, "time_ms": time.time_ns() // 1_000_000, **what})

    def mirror(self, path: str | os.PathLike[str]) -> None:
        if self._inside(path) not in CURSORS:
            raise ValueError(f"{path} is not followed; rows belong into {self.folder / 'metrics.jsonl'}")

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.note("metrics", step=step, values=dict(values))

    def artifact(self, path: str | os.PathLike[str], folder: str = "") -> None:
        self.note("artifact", path=self._inside(path), folder=folder)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.note("table", name=name, rows=[dict(row) for row in rows])

    def board(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        text = table_text(rows)
        if self.boards.get(name) != text:
            replace_text(self.folder / f"{name}.json", text)  # before the note, which says that there is something new
            self.note("board", name=name)
            self.boards[name] = text

    def checkpoint(self, path: str | os.PathLike[str], step: int, metrics: Mapping[str, float] | None = None) -> None:
        self.note("checkpoint", path=self._inside(path), step=step, values=dict(metrics or {}))

    def uses_model(self, run_dir: str | os.PathLike[str], step: int) -> None:
        self.note("uses_model", run_dir=str(storage_path(run_dir)), step=step)

    def plot(self, name: str, keys: Sequence[str]) -> None:
        if path := draw(self.folder, name, keys):
            self.artifact(path, "plots")

    def close(self, status: str = "FINISHED", wait_s: float = 60.0) -> None:
        if self.closing.is_set():
            return
        if self.ends:
            self.note("end", status=status)
        self.closing.set()
        deadline = time.monotonic() + wait_s
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not self.copy.complete:
            why = self.trouble or f"it took more than {wait_s:.0f} s"
            say(f"{self.copy.shown} does not have all of this run yet ({why}); later: {catch_up(self.folder)}")

    def _inside(self, path: str | os.PathLike[str]) -> str:
        """A path in the run folder relative to it, so that the folder can be moved; another one absolute."""
        full = storage_path(path)
        return full.relative_to(self.folder).as_posix() if full.is_relative_to(self.folder) else str(full)

    def _follow(self) -> None:
        """The thread: look at the files again and again. On trouble say so once, wait longer, go on when it is over."""
        wait_s = self.interval_s
        while True:
            last = self.closing.is_set()  # before the look: what is written after it is nobody's loss
            try:
                self.copy.look(last)
                if self.trouble:
                    say(f"{self.copy.shown} answers again and has caught up")
                self.trouble, wait_s = None, self.interval_s
            except Timeout:
                self.copy.peek()  # another process copies this folder; what it has not seen when it ends falls to us
            except RunGone as error:
                self.trouble = str(error)
                say(str(error))
                last = True
            except Exception as error:  # whatever a server, a network or a disk can do: training goes on
                if not self.trouble:
                    say(
                        f"{self.copy.shown} does not take metrics ({first_line(error)}); the run goes on, "
                        "and they follow from its folder when it does"
                    )
                self.trouble, wait_s = first_line(error), min(60.0, 2 * wait_s)
                self.copy.forget()
            self.looked.set()
            if last and (self.copy.complete or self.trouble):
                return self.copy.release()
            self.closing.wait(wait_s) if not last else time.sleep(min(wait_s, 0.5))

    def _sample(self) -> None:
        path = self.folder / "system.jsonl"
        step = sum(1 for _ in rows(path))
        machine.load(self.folder)  # the first CPU figure counts since boot
        while not self.closing.wait(self.system_s):
            with contextlib.suppress(OSError):  # a full disk is the loop's to report
                append(path, {"step": step, "time_ms": time.time_ns() // 1_000_000, **machine.load(self.folder)})
                step += 1


class Children:
    """The trials of a search as MLflow runs below its own, each copied after it has ended, by one thread for all.

    `add` writes a few lines into the trial's folder and returns. A server that is away holds nothing up: the thread
    tries again, and `sync` on the search's folder brings what is still missing when this process ends. After a kill,
    add again the trials that `copied` does not know; what MLflow has already is not repeated.
    """

    def __init__(self, parent: Tracker, interval_s: float = 2.0) -> None:
        """parent: the search's tracker; one that is off switches this off.  interval_s: between two tries, at first."""
        self.parent = parent.folder if isinstance(parent, MlflowTracker) else None
        self.interval_s = interval_s
        self.todo: deque[Copy] = deque()  # what the thread has not copied yet
        self.done: deque[tuple[Path, str]] = deque()
        self.woken, self.closing = threading.Event(), threading.Event()
        self.trouble: str | None = None  # why the last try failed
        self.thread = threading.Thread(target=self._work, name="trials-to-mlflow", daemon=True)
        if self.parent is not None:
            self.uri, self.tags, self.git_sha = tracking_uri(), machine.tags(), machine.git_sha()
            self.thread.start()

    def add(
        self,
        run_dir: str | os.PathLike[str],
        *,
        name: str,
        config: Mapping[str, Any],
        status: str,
        metrics: Mapping[str, float],
        step: int,
        checkpoint: str | os.PathLike[str] | None = None,
        stage: str = "trial",
        tags: Mapping[str, Any] | None = None,
        datasets: Sequence[tuple] = (),
    ) -> None:
        """Show an ended trial, or what has become of it since it was added before.

        config: resolved, as plain data.  status: done, failed, refused or interrupted.  metrics: its final figures,
        named alike in all trials (`val/bpb`, `cost/parameters`), so that MLflow's charts line them up.  step: at which
        it ended.  checkpoint: its folder of that step, if that is kept: shown as a logged model.  tags, datasets: as in
        `Tracker.start`.
        """
        if self.parent is None:
            return
        folder = storage_path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        inside = lambda path: os.path.relpath(storage_path(path), folder)  # so that the search's folder can be moved
        start = {
            "do": "start",
            "stage": stage,
            "name": name,
            "config": config,
            "tags": {"stage": stage, "run_dir": str(folder), **self.tags, **(tags or {})},
            "git_sha": self.git_sha,
            "datasets": [Dataset(*dataset) for dataset in datasets],
            "parent": inside(self.parent),
            "resume_id": None,
        }
        kept = {"do": "checkpoint", "path": inside(checkpoint), "step": step, "values": {}} if checkpoint else None
        end = {"do": "end", "status": STATUS[status], "step": step, "values": metrics}
        new = jsonable(finite([note for note in (start, kept, end) if note]))
        file, now = folder / "tracking.jsonl", time.time_ns() // 1_000_000
        old = [note for note, _ in rows(file) if note and note["do"] in ("start", "checkpoint", "end")]
        key = next((note["key"] for note in old if note["do"] == "start"), None)
        bare = lambda notes: [{k: v for k, v in note.items() if k not in OF_ADDING} for note in notes]
        if bare(old[-len(new) :]) != bare(new):
            first = next((row for row, _ in rows(folder / "metrics.jsonl") if row), {})
            begun = {"time_ms": first.get("time_ms", now), "key": key or uuid.uuid4().hex}
            for note in new:
                append(file, {**(begun if note["do"] == "start" else {"time_ms": now}), **note})
        self.todo.append(Copy(folder, self.uri, new=key is None))
        self.woken.set()

    def news(self) -> list[tuple[Path, str]]:
        """The trials whose copy was finished since the last call: (folder, id of the MLflow run)."""
        return [self.done.popleft() for _ in range(len(self.done))]

    def close(self, wait_s: float = 60.0) -> None:
        """Copy what is left. wait_s: how long a slow server may take; then it is said what brings the rest."""
        if self.parent is None or self.closing.is_set():
            return
        self.closing.set()
        self.woken.set()
        self.thread.join(wait_s)
        if left := len(self.todo):
            why = self.trouble or f"it took more than {wait_s:.0f} s"
            say(f"MLflow at {public(self.uri)} lacks {left} of the trials ({why}); later: {catch_up(self.parent)}")

    def _work(self) -> None:
        """The thread: one trial after another; on trouble say so once, wait longer, go on with the next one."""
        wait_s = self.interval_s
        while True:
            last = self.closing.is_set()
            if not self.todo:
                if last:
                    return
                self.woken.wait()
                self.woken.clear()
                continue
            copy = self.todo[0]
            try:
                copy.look(last=True)
                assert copy.run_id is not None
                self.done.append((copy.folder, copy.run_id))
                self.todo.popleft()
                self.trouble, wait_s = None, self.interval_s
                continue
            except RunGone as error:
                say(str(error))
                self.todo.popleft()
                continue
            except Exception as error:
                if not self.trouble and not isinstance(error, Timeout | ParentMissing):
                    say(f"{copy.shown} does not take trials ({first_line(error)}); the search goes on, they follow")
                self.trouble, wait_s = first_line(error), min(60.0, 2 * wait_s)
                copy.forget()
            finally:
                copy.release()
            if last:
                return
            self.todo.rotate(-1)
            self.closing.wait(wait_s)


def endpoint(checkpoint: Path, url: str, settings: Mapping[str, Any]) -> Tracker:
    """The MLflow run of a server on a checkpoint of a tracked run, with that model as its input; off for other folders.

    A server that is started again on the same checkpoint and address goes on with its run. Nothing here waits for
    MLflow or raises: a server serves, whatever becomes of its record. Call `close` when it stops.
    """
    run, step = checkpoint.parent.parent, checkpoint.name.removeprefix("step_")
    try:
        if not (run / "tracking.jsonl").is_file() or not step.isdigit():
            return Tracker()
        folder = run / "endpoints" / re.sub(r"[^\w.-]+", "-", f"{checkpoint.name}-{urlsplit(url).netloc}")
        where = {"url": url, "run_dir": str(run)}
        tracker = Tracker.start(folder, "serve", settings, name=run.name, tags=where, system_s=0, wait_s=0)
        tracker.uses_model(run, int(step))
        return tracker
    except (InputError, OSError) as error:
        say(f"this endpoint is not shown in MLflow ({first_line(error)})")
        return Tracker()


# ------------------------------------------------------------------------------------------------- the copy


class RunGone(Exception):
    """The run was deleted in MLflow while it was written to."""


class ParentMissing(Exception):
    """MLflow does not have the search yet whose trial is to be shown."""


class Copy:
    """The copy in MLflow of one run folder. Every call may raise what a store or a network can raise; then `forget`.

    new: the start line was written just now, so that no earlier copy can have made a run of it.
    """

    def __init__(self, folder: Path, uri: str, new: bool = False) -> None:
        self.folder, self.uri, self.shown = folder, uri, f"MLflow at {public(uri)}"
        self.new = new
        self.lock = FileLock(folder / ".tracking.lock", thread_local=False)
        self.run_id: str | None = None
        self.complete = False  # all that the folder held at the last look is in MLflow
        self.forget()

    def forget(self) -> None:
        """Ask MLflow again where the copy stands: after an error nobody knows which part of a request it took."""
        self.client: Any = None
        self.state: dict[str, Any] = {}
        self.at: dict[str, int] = {}  # the step up to which MLflow has a file
        self.read = dict.fromkeys((*CURSORS, "tracking.jsonl"), 0)  # bytes
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.boards: dict[str, str] = {}  # as uploaded
        self.seen: Any = None  # the run as it was found, until the first line is done
        self.complete = False

    def look(self, last: bool = False) -> None:
        """Copy what is new in the folder. last: nothing more will come, so do not wait for rows that notes refer to.

        Raises filelock.Timeout while another process copies this folder.
        """
        if not self.lock.is_locked:
            self.lock.acquire(timeout=0)
            self.forget()
        self.complete = False
        if self.client is None:
            self._open()
        if self.client is None:
            self.complete = True  # no start line: nothing to copy
            return
        try:
            for name in CURSORS:
                self._rows(name)
            self.complete = self._notes(last)
        except Exception as error:
            if code(error) in REFUSED and self.client.get_run(self.run_id).info.lifecycle_stage == "deleted":
                raise RunGone(
                    f"run {self.run_id} was deleted in {self.shown}; the next start makes a new one"
                ) from None
            raise

    def peek(self) -> None:
        """While another process copies: which run it is, and whether it has done all the lines that are there."""
        state = self._saved()
        self.run_id = state.get("run_id")
        path = self.folder / "tracking.jsonl"
        self.complete = path.is_file() and state.get("done", -1) >= path.stat().st_size

    def release(self) -> None:
        self.lock.release()

    # ---- the run

    def _saved(self) -> dict[str, Any]:
        """What mlflow.json says of this store; empty if it speaks of another one."""
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.folder / "mlflow.json").read_text())
            if state["tracking_uri"] == public(self.uri):
                return state
        return {}

    def _save(self) -> None:
        state = {"tracking_uri": public(self.uri), **self.state}
        replace_text(self.folder / "mlflow.json", json.dumps(state, indent=1))

    def _open(self) -> None:
        """Find the run of this folder, or make it: named by mlflow.json, by the start line, or by that line's key."""
        start = next((n for n, _ in rows(self.folder / "tracking.jsonl") if n and n["do"] == "start"), None)
        if start is None:
            return
        make_store(self.uri)
        client = connect(self.uri)
        self.state = self._saved()
        run = find_run(client, self.state.get("run_id")) or find_run(client, start["resume_id"])
        if run is None:
            parent = self._parent(start)
            experiment = parent.get("experiment_id") or experiment_id(
                client, start.get("experiment") or EXPERIMENT, artifacts_beside(self.uri)
            )
            new, self.new = self.new, False
            key = f"tags.`novella.key` = '{start['key']}'"
            same = [] if new else client.search_runs([experiment], key, max_results=1)
            run = same[0] if same else self._create(client, experiment, start, parent.get("run_id"))
        if run.info.run_id != self.state.get("run_id"):
            self.state = {"experiment_id": run.info.experiment_id, "run_id": run.info.run_id, "done": 0}
            self.state |= {"models": {}, "folders": {}}
            self._save()
        self.run_id = run.info.run_id
        self.at = {name: int(run.data.metrics.get(cursor, -1)) for name, cursor in CURSORS.items()}
        self.client, self.seen = client, run

    def _parent(self, start: dict[str, Any]) -> dict[str, Any]:
        """Run and experiment of the search that a trial belongs to; empty for what is no trial, or has lost its search.

        Raises ParentMissing while that is not copied itself.
        """
        folder = self.folder / start.get("parent", "")
        if folder == self.folder or not (folder / "tracking.jsonl").is_file():
            return {"run_id": start.get("parent_run_id")}
        state = Copy(folder, self.uri)._saved()
        if not state:
            raise ParentMissing(f"{self.shown} does not have the search yet; {catch_up(folder.resolve())}")
        return state

    @staticmethod
    def _create(client: Any, experiment: str, start: dict[str, Any], parent: str | None) -> Any:
        program = PROGRAMS.get(start["stage"], f"pipelines.{start['stage']}")
        tags = {"novella.key": start["key"], "mlflow.source.name": program}
        tags |= {"mlflow.source.type": "JOB" if "ray_job" in start["tags"] else "LOCAL"}
        if "user" in start["tags"]:
            tags["mlflow.user"] = start["tags"]["user"]
        if parent:
            tags["mlflow.parentRunId"] = parent
        return client.create_run(experiment, start["time_ms"], tags | tags_of(start), start["name"][:NAME_CHARACTERS])

    # ---- rows

    def _rows(self, name: str) -> None:
        """Copy the new whole lines of a file, as many rows in a batch as MLflow takes, the cursor in the same batch."""
        batch: list[Any] = []
        damaged = 0
        for row, offset in rows(self.folder / name, self.read[name]):
            if row is None or not isinstance(row.get("step"), int):
                damaged += 1
            elif row["step"] > self.at[name]:
                new = self._metrics(row, row.get("time_ms", 0), row["step"])
                cursor = self._metrics({CURSORS[name]: row["step"]}, row.get("time_ms", 0), row["step"])
                if len(batch) + len(new) + 1 > METRICS_PER_BATCH:
                    self._send(batch)
                    batch = []
                while len(new) >= METRICS_PER_BATCH:  # the rest goes with the cursor; until then the row is not copied
                    self._send(new[: METRICS_PER_BATCH - 1])
                    new = new[METRICS_PER_BATCH - 1 :]
                batch += [*new, *cursor]
                self.at[name] = row["step"]
            self.read[name] = offset
        self._send(batch)
        if damaged:
            say(f"{damaged} line(s) of {self.folder / name} are no rows {{step, time_ms, ...}} and were left out")

    def _send(self, batch: list[Any]) -> None:
        if batch:
            self.client.log_batch(self.run_id, metrics=batch, synchronous=True)

    def _metrics(
        self, values: Mapping[str, Any], time_ms: int, step: int, model: str | None = None, data: Dataset | None = None
    ) -> list[Any]:
        """The figures among the values as MLflow's metrics, NaN among them, so that a lost loss does not look good."""
        from mlflow.entities import Metric

        linked = {"model_id": model, "run_id": self.run_id} if model else {}
        if data:
            linked |= {"dataset_name": data.name, "dataset_digest": digest(data)}
        return [Metric(metric_name(key), value, int(time_ms), step, **linked) for key, value in figures(values).items()]

    # ---- notes

    def _notes(self, last: bool) -> bool:
        """Do the lines of tracking.jsonl that are not done yet, in order. Returns whether all are done."""
        for note, offset in rows(self.folder / "tracking.jsonl", self.read["tracking.jsonl"]):
            if note and note["do"] == "start":
                self.state["datasets"] = note["datasets"]
            if note and note["do"] == "board" and offset <= self.state["done"]:
                self.boards.setdefault(note["name"], "")
            if note and note["do"] == "table":
                table = self.tables.setdefault(note["name"], [])
                table += [row for row in note["rows"] if row not in table]
            if note and offset > self.state["done"]:
                if not last and self._too_early(note):
                    return False
                self._do(note)
                self.seen = None
                self.state["done"] = offset
                self._save()
            self.read["tracking.jsonl"] = offset
        return True

    def _too_early(self, note: dict[str, Any]) -> bool:
        """Whether a checkpoint came before its row: its figures carry that row's time, so that MLflow has them once."""
        return note["do"] == "checkpoint" and self.at["metrics.jsonl"] < note["step"]

    def _do(self, note: dict[str, Any]) -> None:
        """One line. What MLflow or the disk refuses for good is said and left out, so that the rest can follow."""
        try:
            getattr(self, f"_do_{note['do']}")(note)
        except Exception as error:
            if not isinstance(error, OSError) and code(error) not in REFUSED:
                raise
            if self.client.get_run(self.run_id).info.lifecycle_stage == "deleted":
                raise
            say(f"could not log {note['do']} {note.get('path') or note.get('name') or ''}: {first_line(error)}")

    def _do_start(self, note: dict[str, Any]) -> None:
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput, InputTag, Param, RunTag

        run = self.seen or self.client.get_run(self.run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        # Not the folder: that is the tag run_dir, and as a param it would part all runs of a chart.
        params = flat_params({key: value for key, value in note["config"].items() if key != "out"})
        known = run.data.params
        tags = tags_of(note) | {
            f"changed.{key}": v[:TAG_CHARACTERS] for key, v in params.items() if known.get(key, v) != v
        }
        new = [Param(key, value) for key, value in params.items() if key not in known]
        said = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        for i in range(0, max(len(new), len(said)), PARAMS_PER_BATCH):
            part = slice(i, i + PARAMS_PER_BATCH)
            self.client.log_batch(self.run_id, params=new[part], tags=said[part], synchronous=True)
        inputs = [
            DatasetInput(
                MlflowDataset(
                    d.name,
                    digest(d),
                    "local",
                    json.dumps({"uri": d.path if "://" in d.path else str(storage_path(d.path))}),
                ),
                [InputTag("mlflow.data.context", d.context)],
            )
            for d in (Dataset(*fields) for fields in note["datasets"])
        ]
        if inputs:
            self.client.log_inputs(self.run_id, datasets=inputs)
        self.client.log_text(self.run_id, write_yaml(jsonable(note["config"])), "config.yaml")

    def _do_metrics(self, note: dict[str, Any]) -> None:
        model = self.state["models"].get(str(note["step"]))
        self._send_all(self._metrics(note["values"], note["time_ms"], note["step"], model))

    def _do_artifact(self, note: dict[str, Any]) -> None:
        path = self.folder / note["path"]
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), note["folder"] or path.name)
        else:
            self.client.log_artifact(self.run_id, str(path), note["folder"] or None)

    def _do_table(self, note: dict[str, Any]) -> None:
        self.client.log_text(self.run_id, table_text(self.tables[note["name"]]), f"{note['name']}.json")
        self._show_tables()

    def _do_board(self, note: dict[str, Any]) -> None:
        name = note["name"]
        text = (self.folder / f"{name}.json").read_text()
        if self.boards.get(name) != text:
            self.client.log_text(self.run_id, text, f"{name}.json")
            if name not in self.boards:
                self.boards[name] = ""
                self._show_tables()
            self.boards[name] = text

    def _show_tables(self) -> None:
        shown = [{"path": f"{name}.json", "type": "table"} for name in (*self.tables, *self.boards)]
        self.client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps(shown))

    def _do_checkpoint(self, note: dict[str, Any]) -> None:
        from mlflow.entities import LoggedModelOutput

        path, step = self.folder / note["path"], note["step"]
        if not path.exists():
            return  # dropped by the keep policy before its turn came
        model = self._model(f"step_{step}", path, step)
        outputs = self.client.get_run(self.run_id).outputs
        if model not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model, step)])
        row = row_at(self.folder / "metrics.jsonl", step) or {}
        values = note["values"] or {key: value for key, value in row.items() if key.startswith("val/")}
        values = {key: row.get(key, value) for key, value in values.items()}
        data = next((Dataset(*fields) for fields in self.state.get("datasets", [])), None)
        self._send_all(self._metrics(values, row.get("time_ms", note["time_ms"]), step, model, data))
        self.state["models"][str(step)] = model
        self.state["folders"][str(step)] = note["path"]
        self._drop_models()

    def _drop_models(self) -> None:
        """Take the models out of MLflow whose checkpoints the run's keep policy has deleted."""
        for step, folder in list(self.state["folders"].items()):
            if not (self.folder / folder).exists():
                self.client.delete_logged_model(self.state["models"].pop(step))
                del self.state["folders"][step]

    def _model(self, name: str, path: Path, step: int) -> str:
        """The id of the logged model of that name; made if MLflow has none. It is external: MLflow holds no weights."""
        experiment = self.state["experiment_id"]
        same = self.client.search_logged_models(
            [experiment], f"name = '{name}' AND source_run_id = '{self.run_id}'", max_results=1
        )
        model = same[0] if same else None
        if model is None:
            tags = {"mlflow.model.isExternal": "true", "path": str(path)}
            params = {"path": str(path), "step": str(step)}
            model = self.client.create_logged_model(experiment, name, self.run_id, tags, params, "huggingface")
        if str(model.status) != "READY":
            from mlflow.models.utils import get_external_mlflow_model_spec

            with tempfile.TemporaryDirectory() as folder:  # the card that lets the model be registered
                get_external_mlflow_model_spec(model).save(f"{folder}/MLmodel")
                self.client.log_model_artifacts(model.model_id, folder)
            self.client.finalize_logged_model(model.model_id, "READY")
        return model.model_id

    def _do_uses_model(self, note: dict[str, Any]) -> None:
        from mlflow.entities import LoggedModelInput

        other = Copy(Path(note["run_dir"]), self.uri)._saved()
        if model := other.get("models", {}).get(str(note["step"])):
            self.client.log_inputs(self.run_id, models=[LoggedModelInput(model)])
            self.client.set_tag(self.run_id, "trained_by", other["run_id"])

    def _do_end(self, note: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = []
        for pointer in ("best", "last"):
            with contextlib.suppress(OSError):
                tags.append(RunTag(f"checkpoint.{pointer}", (self.folder / pointer).read_text().strip()))
        final: list[Any] = []
        if values := note.get("values"):  # a figure that its row has is there already
            row = row_at(self.folder / "metrics.jsonl", note["step"]) or {}
            values = {key: value for key, value in values.items() if key not in row}
            model = self.state["models"].get(str(note["step"]))
            final = self._metrics(values, row.get("time_ms", note["time_ms"]), note["step"], model)
        if tags or final:
            self.client.log_batch(self.run_id, metrics=final, tags=tags, synchronous=True)
        self._drop_models()
        self.client.set_terminated(self.run_id, note["status"], note["time_ms"])

    def _send_all(self, metrics: list[Any]) -> None:
        for i in range(0, len(metrics), METRICS_PER_BATCH):
            self._send(metrics[i : i + METRICS_PER_BATCH])


# ------------------------------------------------------------------------------------------------- the store


def tracking_uri() -> str:
    """Where runs are tracked: $MLFLOW_TRACKING_URI, else mlflow.db under the storage root; sqlite paths made absolute.

    Raises InputError for what MLflow 3 cannot use, such as a folder.
    """
    text = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme = text.split(":", 1)[0].split("+", 1)[0]
    if scheme not in SCHEMES or (":" not in text and not scheme.startswith("databricks")):
        raise InputError(
            f"MLFLOW_TRACKING_URI={public(text)} is no store that MLflow 3 has; "
            "use sqlite:///mlflow.db, http://HOST:PORT or a database URL"
        )
    if database := sqlite_file(text):
        return f"sqlite:///{database}"
    return text


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite URI, relative ones under the storage root; None for another kind of store."""
    found = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return storage_path(found[1]) if found else None


def artifacts_beside(uri: str) -> str | None:
    """The folder for artifacts beside a sqlite file; None where a server decides."""
    if database := sqlite_file(uri):
        return (database.parent / "mlartifacts").as_uri()
    return None if uri.startswith(("http", "databricks")) else (storage_root() / "mlartifacts").as_uri()


def make_store(uri: str) -> None:
    """Create a sqlite store that is not there yet: once, whoever comes first, and whole or not at all.

    MLflow builds its tables in dozens of migrations; of six processes that met a new file, five failed. So one process
    at a time, under a file lock, builds it under another name and renames it.
    """
    database = sqlite_file(uri)
    if database is None or (database.is_file() and database.stat().st_size):
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        if database.is_file() and database.stat().st_size:
            return
        fresh = database.with_name(f"{database.name}.{os.getpid()}.new")
        fresh.unlink(missing_ok=True)
        connect(f"sqlite:///{fresh}").search_experiments(max_results=1)
        os.replace(fresh, database)


def connect(uri: str) -> Any:
    """An MlflowClient on that store, silent about the steps of a migration and quick to give up on a dead server."""
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def find_run(client: Any, run_id: str | None) -> Any:
    """The run of that id if this store has it and it is not deleted, else None."""
    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if code(error) in ABSENT:
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def experiment_id(client: Any, name: str, artifacts: str | None) -> str:
    """The id of an experiment, made if need be; another process may make it at the same moment."""
    for _ in range(2):
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
                say(f"experiment {name} had been deleted in MLflow and is restored")
            return found.experiment_id
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # opens as training runs, not as chat traces
            return client.create_experiment(name, artifact_location=artifacts, tags=kind)
        except Exception as error:
            if code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
    raise RuntimeError(f"MLflow neither has nor makes the experiment {name}")


def find_runs(query: str, experiment: str | None = None) -> list[Path]:
    """The run folders (tag `run_dir`) of the runs that an MLflow filter finds, oldest first, each folder once.

    query: as in MLflow's search box, such as `metrics."val/bpb" < 2 and tags.stage = 'train'`; "" finds all.
    experiment: its name; None looks in all of them.  A folder may be gone, or lie on another machine.
    Raises InputError for a filter that MLflow cannot read, an experiment or a store that is not there.
    """
    uri = tracking_uri()
    if (database := sqlite_file(uri)) and not database.is_file():
        raise InputError(f"{public(uri)}: no such store; MLFLOW_TRACKING_URI names another one")
    try:
        client = connect(uri)
        there = {e.name: e.experiment_id for e in pages(client.search_experiments)}
        if experiment is not None and experiment not in there:
            raise InputError(f"no experiment {experiment!r} in MLflow at {public(uri)}{near(experiment, there)}")
        ids = list(there.values()) if experiment is None else [there[experiment]]
        found = list(pages(client.search_runs, ids, query, order_by=["attributes.start_time ASC"])) if ids else []
    except InputError:
        raise
    except Exception as error:
        if code(error) in REFUSED:
            raise InputError(f"MLflow cannot read the filter {query!r}: {first_line(error)}") from None
        raise InputError(f"MLflow at {public(uri)} does not answer: {first_line(error)}") from None
    folders = (run.data.tags.get("run_dir") for run in found)
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def pages(search: Callable[..., Any], *what: Any, **how: Any) -> Iterator[Any]:
    """All that a search of MLflow finds, which gives it in pages."""
    token = None
    while True:
        page = search(*what, **how, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


# ------------------------------------------------------------------------------------------------- small things


def flat_params(config: Mapping[str, Any], at: str = "") -> dict[str, str]:
    """A config as MLflow's params: `optim.lr` -> "0.001". Mappings open into dotted names, lists stay one JSON value.

    So two runs line up whatever their lengths. Text stays as it is, other values are JSON (true, null, 0.001). A value
    that MLflow would cut off is replaced by its hash and length; config.yaml among the artifacts holds it whole.
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        # A part's kind stands where an override sets it: `model.norm` is "rmsnorm", `model.norm.eps` its option.
        name = at.removesuffix(".") if key == "kind" and at and isinstance(value, str) else f"{at}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat_params(value, f"{name}.")
            continue
        text = value if isinstance(value, str) and value else json.dumps(value, default=str)
        if len(text) > PARAM_CHARACTERS:
            text = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}, {len(text)} characters, see config.yaml"
        found[metric_name(name)] = text
    return found


def jsonable(tree: Any) -> Any:
    """Plain data for YAML: what JSON does not know becomes text."""
    return json.loads(json.dumps(tree, default=str))


def tags_of(start: dict[str, Any]) -> dict[str, str]:
    """The tags of a start line, as long as MLflow takes them."""
    tags = {key: str(value)[:TAG_CHARACTERS] for key, value in start["tags"].items() if value is not None}
    return tags | ({"mlflow.source.git.commit": start["git_sha"]} if start["git_sha"] else {})


def table_text(table: Sequence[Mapping[str, Any]]) -> str:
    """Rows as the JSON of a table artifact, which MLflow's page shows."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    data = {"columns": columns, "data": [[row.get(key) for key in columns] for row in table]}
    return json.dumps(finite(data), default=str)


def replace_text(path: Path, text: str) -> None:
    """Write a file anew in one step: a reader sees the old or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    os.replace(fresh, path)


def metric_name(key: str) -> str:
    """A name that MLflow takes: letters, digits, `_-. :/`, no empty or dotted path parts, at most 250 characters."""
    parts = [
        part for part in re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII).split("/") if part not in ("", ".", "..")
    ]
    return "/".join(parts)[:250] or "_"


def digest(dataset: Dataset) -> str:
    return dataset.fingerprint[:DIGEST_CHARACTERS] or "unknown"


def public(uri: str) -> str:
    """A URI without user name and password, for messages and files."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def code(error: BaseException) -> str:
    """The error code of an answer from MLflow, "" for any other error."""
    return getattr(error, "error_code", "")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def say(text: str) -> None:
    print(f"tracking: {text}", file=sys.stderr, flush=True)


def catch_up(folder: Path) -> str:
    return f"python -m pipelines.lib.tracking sync {folder}"


def draw(folder: Path, name: str, keys: Sequence[str]) -> Path | None:
    """Columns of metrics.jsonl over the steps as RUN/plots/name.png; None if the file has none of them."""
    curves: dict[str, list[tuple[int, float]]] = {key: [] for key in keys}
    for row, _ in rows(folder / "metrics.jsonl"):
        for key in keys:
            if row and isinstance(row.get(key), int | float):  # a gap where it is null
                curves[key].append((row["step"], row[key]))
    if not any(curves.values()):
        return None
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and may look for a display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "plots" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


# ------------------------------------------------------------------------------------------------- the command


def sync(folder: Path) -> str:
    """Bring MLflow up to one run folder, and end there as KILLED a run whose driver died. Returns its run id.

    Raises InputError if the folder holds no tracked run, or if a driver is copying it.
    """
    path = folder / "tracking.jsonl"
    if not path.is_file():
        raise InputError(f"{folder} holds no tracking.jsonl: no run folder, or a run made with tracking off")
    copy = Copy(folder, tracking_uri())
    try:
        copy.lock.acquire(timeout=1)
    except Timeout:
        raise InputError(f"{folder} is being copied by its driver, which is still running; nothing to do") from None
    try:
        marks = [note["do"] for note, _ in rows(path) if note and note["do"] in ("start", "end")]
        if marks and marks[-1] == "start":
            append(path, {"do": "end", "time_ms": path.stat().st_mtime_ns // 1_000_000, "status": "KILLED"})
        copy.look(last=True)
    except ParentMissing as error:
        raise InputError(str(error)) from None
    finally:
        copy.release()
    if copy.run_id is None:
        raise InputError(f"{path} has no start line; the run cannot be made from it")
    return copy.run_id


def sync_trials(folder: Path) -> int:
    """Bring MLflow up to the trials of a search, whose run it has. Returns how many there are."""
    count = 0
    for path in sorted(folder.glob("*/*/tracking.jsonl")):
        start = next((note for note, _ in rows(path) if note and note["do"] == "start"), {})
        if "parent" in start and (path.parent / start["parent"]).resolve() == folder.resolve():
            count += 1
            if not copied(path.parent):
                sync(path.parent)
    return count


def copied(folder: Path) -> str | None:
    """The id of the MLflow run that holds all that the folder's tracking.jsonl says, None if there is none yet.

    By the folder's files alone: no server is asked.  Raises InputError as `tracking_uri`.
    """
    copy = Copy(folder, tracking_uri())
    copy.peek()
    return copy.run_id if copy.complete else None


def ui(host: str, port: int) -> None:
    """Become MLflow's server on the store that runs go to; for a store behind HTTP say where its page is."""
    uri = tracking_uri()
    if not uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        print(f"MLflow is served at {public(uri)}")
        return
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{host}:{port} cannot be used ({error.strerror}); another one: --port {port + 1}"
            ) from None
    make_store(uri)
    print(f"MLflow starts on http://{host}:{port} (end it with Ctrl-C), runs in {public(uri)}", flush=True)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # seven processes for judges of chat traces
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    if database := sqlite_file(uri):  # not the folder where the server happens to start
        command += ["--artifacts-destination", str(database.parent / "mlartifacts")]
    os.execv(sys.executable, [*command, "--host", host, "--port", str(port)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m pipelines.lib.tracking", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("sync", help="bring MLflow up to what run folders hold")
    run.add_argument("run", nargs="+", help="a run folder")
    page = commands.add_parser("ui", help="open the MLflow page")
    page.add_argument("--host", default="127.0.0.1")
    page.add_argument("--port", type=int, default=5000)
    words = parser.parse_args(argv)
    try:
        if words.command == "ui":
            ui(words.host, words.port)
        else:
            for folder in words.run:
                run_id, trials = sync(storage_path(folder)), sync_trials(storage_path(folder))
                more = f" with {trials} trials" if trials else ""
                print(f"{folder}: MLflow run {run_id} is up to date{more}", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not code(error) and not isinstance(error, OSError):
            raise
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
