"""Search over the settings of training runs: sweeps, greedy growth, successive halving and others, by Ray Tune.

reads   FILE   a search file (a path, or a name in tune_spaces/): rule, recipe, what varies
        data=  folder of token shards from pipelines.tokenize
writes  out=   ledger.jsonl (every trial with the command that repeats it), results.yaml, trials/ (one run folder each),
               winner (the best trial's folder; its checkpoint is what sample, evaluate and serve open)

An `out=` that exists is resumed from its ledger when the settings are the same; its budgets may grow.
"""

from __future__ import annotations

import dataclasses as dc
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from models.spec import plain
from pipelines.lib.config import InputError, command, write_yaml
from pipelines.lib.run import Run, differences
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.search.space import label
from pipelines.lib.search.study import SearchConfig, Study
from pipelines.train import shown


def prepare(config: SearchConfig) -> tuple[SearchConfig, Study]:
    """Paths made absolute, the data opened, and all that needs no training checked. Raises InputError, ConfigError."""
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.loop import open_data

    config = dc.replace(config, data=str(storage_path(config.data)), out=str(storage_path(config.out)))
    folders = open_data([config.data], "auto")
    for folder in folders:
        folder.split("val")
    study = Study(config, folders)
    config.rule.check(study)
    return config, study


def run(config: SearchConfig) -> int:
    """Search. Returns the exit code: 0 done, 130 stopped on request."""
    config, study = prepare(config)
    if config.dry_run:
        return dry_run(study)
    out = Run(config.out)
    with out.lock():
        ledger = open_ledger(out, config)
        return carry_out(out, study, ledger)


def open_ledger(out: Run, config: SearchConfig) -> Ledger:
    """The ledger of a search folder, new or to go on with. Raises InputError with the difference."""
    ledger = Ledger(out.path)
    if out.config.is_file():
        changed = differences(out.read_config(), plain(config), SearchConfig.HOW)
        if changed:
            raise InputError(
                f"out={out.path} is a search with other settings ({'; '.join(changed)}); "
                "choose another out=, or the same settings"
            )
    elif out.path.is_dir() and any(p for p in out.path.iterdir() if not p.name.startswith(".")):
        raise InputError(f"out={out.path} holds something that is no search (no config.yaml); choose another folder")
    out.write_config(plain(config))
    ledger.session()
    return ledger


def carry_out(out: Run, study: Study, ledger: Ledger) -> int:
    """Hand out trials until the rule or a budget ends them, and show and track them meanwhile."""
    from pipelines.lib.cluster import ensure_ray
    from pipelines.lib.launch import stop_on_signal
    from pipelines.lib.progress import Progress
    from pipelines.lib.search.guide import Guide, in_process

    config = study.config
    resumed = len(ledger.trials)
    print(f"{'resuming' if resumed else 'searching'} {shown(out.path)}: {describe(study)}", flush=True)
    if resumed:
        print(f"{resumed} trials are in its ledger", flush=True)
    report = Report(study, ledger, out)
    with Progress(config.trials, "trials", f"search {out.path.name}") as progress, stop_on_signal(out, progress.print):
        guide = Guide(study, ledger, out.path, progress.print)
        shown_trials = ShownTrials(study, ledger, progress)

        def ended(row: dict[str, Any]) -> None:
            shown_trials(row)
            report.trial(row)

        guide.ended = ended

        def stop() -> bool:
            return out.stop_request.exists() or bool(guide.stopping and guide.stopping.endswith("seconds is used up"))

        try:
            if config.parallel == 0:
                reason = in_process(guide, stop)
            else:
                ensure_ray()
                from pipelines.lib.search.executor import on_tune

                reason = on_tune(guide, stop)
        except BaseException:
            report.close("FAILED")
            raise
        asked = out.stop_request.exists()
    if asked or guide.stopping == "stopped":
        report.close("KILLED")
        where = shlex.quote(shown(out.path))
        print(f"stopped after {len(ledger.trials)} trials; resume with: python -m pipelines.search {where}/config.yaml")
        return 130
    guide.close(reason)
    report.close("FINISHED")
    summary(out, study, ledger, reason)
    return 0


class ShownTrials:
    """One line for each trial that ends, and the best so far beside the bar."""

    def __init__(self, study: Study, ledger: Ledger, progress: Any):
        self.study, self.ledger, self.progress = study, ledger, progress
        self.dimensions = study.space.dimensions()

    def __call__(self, row: dict[str, Any]) -> None:
        objective, trials = self.study.objective, self.ledger.trials
        loss = objective.loss(trials[row["number"]])
        found = f"{objective.metric} {row['metrics'].get(objective.metric, math.nan) or math.nan:.4f}"
        if row["status"] != "done":
            found = f"{row['status']}: {row['error']}"
        elif not math.isfinite(loss):
            found = f"diverged: {row['error'] or 'the loss is not finite'}"
        share = "" if row["share"] == 1.0 else f" at {100 * row['share']:.3g} %"
        seconds = row["cost"].get("seconds")
        took = f", {seconds:.1f} s" if seconds is not None else ""
        what = label(row["settings"], self.dimensions) or "the recipe as it is"
        what += f"  ({row['why']})" if row["why"] else ""
        self.progress.print(f"trial {row['number']}{share}, seed {row['seed']}: {found}{took}  {what}")
        done = [objective.loss(t) for t in trials if t.status == "done" and t.ask.share == 1.0]
        figures = {"best": f"{min(done):.4f}"} if done and math.isfinite(min(done)) else {}
        self.progress.update(sum(1 for _ in self.ledger.ended()), **figures)


class Report:
    """The search in MLflow: a parent run with its trials as children, a leaderboard, the promoted checkpoint."""

    def __init__(self, study: Study, ledger: Ledger, out: Run):
        self.study, self.ledger, self.out = study, ledger, out

    def trial(self, row: dict[str, Any]) -> None: ...

    def close(self, status: str) -> None: ...


def describe(study: Study) -> str:
    config = study.config
    dimensions = study.space.dimensions()
    kind = plain(config.rule)["kind"]
    return f"{kind} over {len(dimensions)} settings ({', '.join(dimensions)}), {config.seeds} seed(s) each"


def leaderboard(study: Study, ledger: Ledger) -> list[dict[str, Any]]:
    """One row per setting that was trained to its end, best mean first: mean, standard error, seeds, costs, trials."""
    from pipelines.lib.statistics import interval

    groups: dict[str, list[Any]] = {}
    for trial in ledger.trials:
        if trial.status == "done" and trial.ask.share == 1.0:
            groups.setdefault(trial.id, []).append(trial)
    objective = study.objective
    table = []
    for ident, trials in groups.items():
        by_seed = {t.ask.seed: t for t in trials}
        losses = [objective.loss(t) for t in by_seed.values()]
        finite = all(math.isfinite(x) for x in losses)
        found = interval([t.metrics[objective.metric] for t in by_seed.values()]) if finite else None
        first = trials[0]
        table.append(
            {
                "id": ident,
                objective.metric: found.mean if found else math.nan,
                "standard_error": found.se if found else math.nan,
                "seeds": len(by_seed),
                **{k: first.cost[k] for k in ("parameters", "tokens") if k in first.cost},
                "trials": " ".join(str(t.number) for t in trials),
                **{k: _cell(v) for k, v in first.ask.settings.items()},
            }
        )
    sign = 1 if objective.mode == "min" else -1
    return sorted(table, key=lambda row: (math.isnan(row[objective.metric]), sign * row[objective.metric]))


def _cell(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) or value is None else write_yaml(value).strip()


def summary(out: Run, study: Study, ledger: Ledger, reason: str) -> None:
    """Say how it ended, who leads, what was written and what to do next."""
    objective = study.objective
    where = shlex.quote(shown(out.path))
    ended = [row for row in ledger.ended() if row["same_as"] is None]
    failed = sum(row["status"] != "done" for row in ended)
    print(f"{where}: {len(ended)} trials{f' ({failed} failed or refused)' if failed else ''}; {reason}")
    dimensions = study.space.dimensions()
    for place, row in enumerate(leaderboard(study, ledger)[:5], 1):
        spread = f" +- {row['standard_error']:.4f}" if row["seeds"] > 1 else " (one seed)"
        trial = ledger.trials[int(row["trials"].split()[0])]
        said = label(trial.ask.settings, dimensions) or "the recipe as it is"
        print(f"  {place}. {objective.metric} {row[objective.metric]:.4f}{spread}  {said}")
    winner = out.path / "winner"
    if winner.is_file():
        folder = shlex.quote(shown(out.path / winner.read_text().strip()))
        print(f"winner: {folder}")
        print(f"next: python -m pipelines.compare {where}\n      python -m pipelines.sample {folder} --prompt 'The '")
        print(f"      serve run serving.app:build run={folder}")


def dry_run(study: Study) -> int:
    """Print the trials that the space expands to, with parameters and an estimate of time and memory."""
    points, how = study.space, "all of them"
    try:
        settings: Sequence[Mapping[str, Any]] = points.points()
    except InputError:
        import random

        rng = random.Random(study.seed)
        settings = [points.sample(rng) for _ in range(12)]
        how = "12 drawn at random, since the space is not finite"
    dimensions = points.dimensions()
    print(f"{describe(study)}: {len(settings)} settings, {how}, {len(study.seeds)} seed(s) each")
    kept = []
    for one in settings:
        if (why := study.refuses(one)) is not None:
            print(f"  refused: {label(one, dimensions)}: {why}")
        else:
            kept.append(one)
    configs = [study.train_config(one, study.seeds[0]) for one in kept]
    for one, config in zip(kept, configs, strict=True):
        print(f"  {study.id_of(config)}  {config.model.n_parameters():>12,} parameters  {label(one, dimensions)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return command(SearchConfig, run, argv)


if __name__ == "__main__":
    from pipelines.search import main  # so that what reaches Ray's workers is pickled by reference

    sys.exit(main())
