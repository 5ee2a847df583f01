"""The driver's side of a search, without Ray: which piece is handed out next, and what is written when it ends.

Between the rule (what would be worth knowing) and the executor (who does the work) stand here the ledger, the budgets,
results that are known already, tries after a crash, and which checkpoints stay.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.spec import plain
from pipelines.lib.config import write_yaml
from pipelines.lib.run import Run, write_atomic
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.search.study import Study
from pipelines.lib.search.trials import Ask, Done, Trial
from pipelines.lib.search.worker import perform

LOOK_S = 0.1  # between two looks at whether a search should stop
RESULTS, WINNER = "results.yaml", "winner"


@dataclass(frozen=True)
class Work:
    """A piece to be done. job: what worker.perform takes."""

    number: int
    job: dict[str, Any]


class Guide:
    """Hands out work and takes results, one call at a time.

    ended: called with the row of every trial that has come to its end (not for those that were known already).
    say: for lines that people should read.
    """

    def __init__(
        self,
        study: Study,
        ledger: Ledger,
        out: Path,
        say: Callable[[str], None] = print,
        ended: Callable[[dict[str, Any]], None] = lambda row: None,
    ):
        self.study, self.ledger, self.out, self.say, self.ended = study, ledger, out, say, ended
        self.config, self.rule = study.config, study.config.rule
        self.again = list(ledger.running)  # a driver that was killed left them, or they are tried once more
        self.active: set[int] = set()
        self.known: dict[tuple[str, int, float], int] = {}
        for row in ledger.ended():
            self._remember(row)
        self.elsewhere = {  # what other searches have found out
            (row["id"], row["seed"], row["share"]): (Path(folder), row)
            for folder in self.config.also
            for row in Ledger(folder).ended()
            if row["status"] == "done" and row["source"] is None and row["same_as"] is None
        }
        self.stopping = ""  # why nothing more is handed out
        self.began = time.monotonic()
        self.before_s = ledger.spent_s

    # ---- what the executor calls

    def next(self) -> Work | Done | None:
        """The next piece; None: not now; Done: all is ended."""
        if not self.stopping:
            self.stopping = self.over_budget()
        while not self.stopping:
            if self.again:
                return self._start(self.again.pop(0))
            found = self.rule.next(self.study, self.ledger.trials)
            if isinstance(found, Done):
                return self._finish(found)
            if found is None:
                if not self.active:
                    raise RuntimeError(f"rule {type(self.rule).__name__} waits for trials, but none is running")
                return None
            if work := self._ask(found):
                return work
            self.stopping = self.over_budget()
        return None if self.active else Done(self.stopping)

    def end(self, number: int, outcome: dict[str, Any] | None, error: str = "") -> None:
        """Take what came of a piece; outcome None: its process died, `error` says how."""
        self.active.discard(number)
        row = self.ledger.rows[number]
        outcome = outcome or {"status": "failed", "metrics": {}, "cost": {}, "checkpoint": None, "error": error}
        if outcome["status"] == "failed" and row["attempt"] <= self.config.retries:
            self.say(f"trial {number} failed and is tried again: {outcome['error']}")
            outcome["status"] = "interrupted"
        if outcome["status"] == "interrupted":
            self.ledger.write("end", number=number, **outcome)
            self.again.append(number)
            return
        if outcome["checkpoint"]:
            outcome["checkpoint"] = f"{row['run']}/{outcome['checkpoint']}"
        self.ledger.write("end", number=number, **outcome)
        row = self.ledger.rows[number]
        self._remember(row)
        self.prune()
        self.write_results()
        self.ended(row)

    def nothing_left(self) -> str | None:
        """Why there is nothing to do, asked before anything starts; None if there is."""
        if self.again:
            return None
        found = self.over_budget() or self.rule.next(self.study, self.ledger.trials)
        winner = self.winner_row()
        if isinstance(found, Done) and (winner is None or self._has(winner)):
            return found.reason
        return found if isinstance(found, str) else None

    # ---- budgets

    def over_budget(self) -> str:
        """Which budget is used up, in words; empty while there is some left."""
        config, asked = self.config, [t for t in self.ledger.trials if not self._was_known(t.number)]
        if config.trials is not None and len(asked) >= config.trials and not self.again:
            return f"the budget of {config.trials} trials is used up"
        if config.tokens is not None and self.tokens() >= config.tokens and not self.again:
            return f"the budget of {config.tokens:,} tokens is used up"
        return self.out_of_time()

    def out_of_time(self) -> str:
        """As over_budget, of the time alone."""
        limit = self.config.seconds
        return f"the budget of {limit:g} seconds is used up" if limit and self.elapsed_s() >= limit else ""

    def stop(self, why: str) -> None:
        """Hand out nothing more, and let the pieces that run save at their next update and end."""
        self.stopping = self.stopping or why
        for number in list(self.active):
            folder = self.out / self.ledger.rows[number]["run"]
            if folder.is_dir():
                (folder / ".stop").touch()

    def elapsed_s(self) -> float:
        return self.before_s + time.monotonic() - self.began

    def tokens(self) -> int:
        """Tokens of all pieces that were handed out."""
        return sum(row["piece_tokens"] for row in self.ledger.rows.values())

    # ---- handing out

    def _ask(self, ask: Ask) -> Work | None:
        """Start the trial that the rule asks for; None if its result is known already and was written down."""
        number = len(self.ledger.trials)
        if reason := self.study.refuses(ask.settings):
            self._write_start(number, ask, "", {}, 0)
            self._write_known(number, {"status": "refused", "metrics": {}, "cost": {}, "error": reason})
            return None
        config = self.study.train_config(ask.settings, ask.seed)
        ident = self.study.id_of(config)
        if ask.source is None and self._is_known(number, ask, ident):
            return None
        folder, goes_on = self._place(ask, ident)
        until = self.study.steps(config, ask.share)
        tokens = max(0, until - goes_on) * config.batch_tokens
        more = {"run": folder, "until": until, "steps": self.study.steps(config)}
        self._write_start(number, ask, ident, more, tokens)
        return self._work(number)

    def _is_known(self, number: int, ask: Ask, ident: str) -> bool:
        """Write down what an equal trial of this search or of another one gave, if there is one that will do."""
        key = (ident, ask.seed, ask.share)
        if (earlier := self.known.get(key)) is not None:
            row, same_as, at = self.ledger.rows[earlier], str(earlier), Path()
        elif key in self.elsewhere:
            folder, row = self.elsewhere[key]
            same_as, at = str(folder), Path(os.path.relpath(folder, self.out))
        else:
            return False
        checkpoint = str(at / row["checkpoint"]) if row["checkpoint"] else None
        if ask.keep and not (checkpoint and (self.out / checkpoint).is_dir()):
            return False
        more = {"run": str(at / row["run"]), "until": row["until"], "steps": row["steps"], "same_as": same_as}
        self._write_start(number, ask, ident, more, 0)
        result = {k: row[k] for k in ("status", "metrics", "cost", "error")}
        self._write_known(number, {**result, "checkpoint": checkpoint})
        return True

    def _place(self, ask: Ask, ident: str) -> tuple[str, int]:
        """The run folder of a piece, and the update that it goes on from."""
        folder = f"trials/{ident}-s{ask.seed}"
        if ask.source is None:
            return folder, self._reached(folder)
        source = self.ledger.rows[ask.source]
        if (source["id"], source["seed"]) == (ident, ask.seed) and self._reached(source["run"]) == source["until"]:
            return source["run"], source["until"]
        return f"{folder}-from{ask.source}", source["until"]

    def _reached(self, folder: str) -> int:
        """The furthest update to which a piece was trained in a run folder."""
        return max((row["until"] for row in self.ledger.ended() if row.get("run") == folder), default=0)

    def _write_start(self, number: int, ask: Ask, ident: str, more: dict[str, Any], tokens: int) -> None:
        ends = {"status": "running", "run": "", "until": 0, "same_as": None, **more}
        command = ""  # of what took over a checkpoint there is none: it did not begin at its beginning
        if ends["run"] and ask.source is None:
            command = self.study.command(ask.settings, ask.seed, os.path.normpath(self.out / ends["run"]))
        self.ledger.write(
            "start",
            number=number,
            id=ident,
            seed=ask.seed,
            share=ask.share,
            settings=dict(ask.settings),
            keep=ask.keep,
            source=ask.source,
            why=ask.why,
            attempt=1,
            piece_tokens=tokens,
            command=command,
            **ends,
        )

    def _write_known(self, number: int, result: dict[str, Any]) -> None:
        self.ledger.write("end", number=number, **{"checkpoint": None, **result})
        if result["status"] == "refused":
            self.say(f"trial {number} refused: {result['error']}")
        self.write_results()

    def _start(self, number: int, **changes: Any) -> Work:
        """Start a trial once more: it goes on from its checkpoint if it has one. changes: of its line in the ledger."""
        row = self.ledger.rows[number]
        again = {k: row[k] for k in row if k not in ("metrics", "cost", "checkpoint", "error", "status", "number")}
        self.ledger.write("start", number=number, **{**again, "attempt": row["attempt"] + 1, **changes})
        return self._work(number)

    def _work(self, number: int) -> Work:
        row = self.ledger.rows[number]
        folder = self.out / row["run"]
        keep_last = 0 if self.rule.looks_back else 1  # on the way; what ends a piece is the guide's to keep
        config = replace(self.study.train_config(row["settings"], row["seed"], str(folder)), keep_last=keep_last)
        hold = [Path(r["checkpoint"]).name for r in self.ledger.ended() if r["run"] == row["run"] and r["checkpoint"]]
        source = None
        if row["source"] is not None and self.ledger.rows[row["source"]]["run"] != row["run"]:
            source = self.ledger.rows[row["source"]]["checkpoint"]
        objective = self.config.objective
        sign = 1.0 if objective.mode == "min" else -1.0
        below = (objective.metric, sign, self._limit()) if row["share"] == 1.0 else None
        piece = {"until": row["until"], "keep": row["keep"], "below": below}
        self.active.add(number)
        job = {"config": plain(config), "run": str(folder), "piece": piece, "hold": hold}
        return Work(number, {**job, "source": str(self.out / source) if source else None})

    def _limit(self) -> float:
        """What a trial's objective must lie below for its checkpoint to stay: that of the last one of the `keep`."""
        losses = sorted(self.config.objective.loss(t) for t in self._whole() if self._has(self.ledger.rows[t.number]))
        return losses[self.config.keep - 1] if len(losses) >= self.config.keep else math.inf

    # ---- what is known, what stays

    def _remember(self, row: dict[str, Any]) -> None:
        if row["status"] == "done":
            self.known.setdefault((row["id"], row["seed"], row["share"]), row["number"])

    def _was_known(self, number: int) -> bool:
        row = self.ledger.rows[number]
        return row["same_as"] is not None or row["status"] == "refused"

    def _whole(self) -> list[Trial]:
        return [t for t in self.ledger.trials if t.status == "done" and t.ask.share == 1.0]

    def _has(self, row: dict[str, Any]) -> bool:
        return bool(row.get("checkpoint")) and (self.out / row["checkpoint"]).is_dir()

    def prune(self, last: bool = False) -> None:
        """Delete checkpoints that nothing goes on from: of whole trials all but the best `keep`, at the end all."""
        if self.rule.looks_back and not last:
            return
        held = [row for row in self.ledger.ended() if self._has(row)]
        whole = [self.ledger.trials[row["number"]] for row in held if row["share"] == 1.0]
        best = sorted(whole, key=self.config.objective.loss)[: self.config.keep]
        stay = {self.ledger.rows[trial.number]["checkpoint"] for trial in best}
        if winner := self.winner_row():
            stay.add(winner["checkpoint"])
        for row in held:
            if row["checkpoint"] in stay or row["checkpoint"].startswith(".."):  # another search's
                continue
            if last or row["share"] == 1.0 or self._reached(row["run"]) > row["until"]:
                checkpoint = self.out / row["checkpoint"]
                Run(checkpoint.parent.parent).drop(checkpoint.name)

    def winner_row(self) -> dict[str, Any] | None:
        """The best whole trial among those of the winning settings, by objective."""
        settings = self.rule.winner(self.study, self.ledger.trials)
        if settings is None:
            return None
        ident = self.study.identity(settings)
        mine = [t for t in self._whole() if t.id == ident]
        return self.ledger.rows[min(mine, key=self.config.objective.loss).number] if mine else None

    def _finish(self, done: Done) -> Work | Done | None:
        """The rule has ended: see that the winner's checkpoint is there, by training it once more if need be."""
        if self.active:
            return None  # a running trial may still fail and be tried again
        row = self.winner_row()
        if row is not None and not self._has(row) and row["attempt"] <= self.config.retries + 1:
            self.say(f"trial {row['number']} is the winner and left no checkpoint; it is trained again for one")
            if row["same_as"] is None:
                return self._start(row["number"], keep=True)
            own = f"trials/{row['id']}-s{row['seed']}"  # the trial that it was taken from may be another search's
            return self._start(row["number"], keep=True, run=own, same_as=None)
        return done

    def close(self, reason: str) -> None:
        """The search has ended by itself: keep the winner's checkpoint, drop the others, write the reason."""
        self.prune(last=True)
        row = self.winner_row()
        if row is not None and self._has(row):
            write_atomic(self.out / WINNER, row["run"] + "\n")
            self.ledger.write("promoted", number=row["number"], promoted=True)
        self.ledger.write("done", reason=reason)
        self.write_results()

    def write_results(self) -> None:
        """OUT/results.yaml: what the rule has decided so far, in one step so that a reader never sees half of it."""
        records = self.rule.records(self.study, self.ledger.trials)
        if records is not None:
            write_atomic(self.out / RESULTS, write_yaml(plain(records)))


def in_process(guide: Guide, stop: Callable[[], str]) -> str:
    """One piece after another here, without Ray, for notebooks, tests and debuggers. Returns why the search ended.

    stop: why the search should stop now, empty while it should not; asked several times a second.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if why := stop():
                guide.stop(why)

    thread = threading.Thread(target=watch, name="stop", daemon=True)
    thread.start()
    try:
        while True:
            if why := stop():
                guide.stop(why)
            found = guide.next()
            if isinstance(found, Done):
                return found.reason
            assert found is not None
            guide.end(found.number, perform(found.job))
    finally:
        over.set()
        thread.join()
