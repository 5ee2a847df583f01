"""Search over the settings of training runs: sweeps, greedy growth, successive halving and others, by Ray Tune.

reads   FILE   a search file (a path, or a name in tune_spaces/): rule, recipe, what varies
        data=  folder of token shards from pipelines.tokenize
writes  out=   ledger.jsonl (every trial with the command that repeats it), results.yaml, trials/ (one run folder each),
               winner (the best trial's folder; its checkpoint is what sample, evaluate and serve open)

An `out=` that exists is resumed from its ledger when the settings are the same; its budgets may grow.
FILE may also be an experiment file of the modular laboratory (run_experiments' YAML or JSON with its own flags); it is
translated, and `python -m pipelines.search import FILE` only prints the translation.
"""

from __future__ import annotations

import dataclasses as dc
import inspect
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import plain
from pipelines.lib.config import InputError, command, write_yaml
from pipelines.lib.config import describe as describe_settings
from pipelines.lib.output import shown
from pipelines.lib.run import Run, differences, write_atomic
from pipelines.lib.search.ledger import Ledger
from pipelines.lib.search.space import label
from pipelines.lib.search.study import RECIPE, SearchConfig, Study

STOPPED = "stopped on request"
DRAWN = 12  # settings of an endless space that a dry run and an estimate look at


def prepare(config: SearchConfig) -> tuple[SearchConfig, Study]:
    """Paths made absolute, the data opened, and all that needs no training checked. Raises InputError, ConfigError."""
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.loop import open_data

    also = tuple(str(storage_path(folder)) for folder in config.also)
    for other in also:
        if not (Path(other) / "ledger.jsonl").is_file():
            raise InputError(f"also={other}: no search folder (it holds no ledger.jsonl)")
    config = dc.replace(config, data=str(storage_path(config.data)), out=str(storage_path(config.out)), also=also)
    folders = open_data([config.data], "auto")
    for folder in folders:
        folder.split("val")
    study = Study(config, folders)
    config.rule.check(study)
    if getattr(config.rule, "draws", 0) is None and config.trials is config.tokens is config.seconds is None:
        raise InputError(
            f"rule {plain(config.rule)['kind']} draws without end; give rule.draws=, or a budget: trials=, tokens= or "
            "seconds="
        )
    return config, study


def run(config: SearchConfig) -> int:
    """Search. Returns the exit code: 0 done, 130 stopped on request."""
    config, study = prepare(config)
    if config.dry_run:
        return dry_run(study)
    out = Run(config.out)
    with out.lock():
        ledger = open_ledger(out, study)
        return carry_out(out, study, ledger)


def open_ledger(out: Run, study: Study) -> Ledger:
    """The ledger of a search folder, new or to go on with. Raises InputError with the difference."""
    config, ledger = study.config, Ledger(out.path)
    if out.config.is_file():
        old = out.read_config()
        if not old:
            raise InputError(f"{out.config} is empty; restore it, or begin with another out=")
        changed = differences(old, plain(config), SearchConfig.HOW)
        if ledger.computes is not None:  # the recipe by what it says, the data by what is in it
            changed += differences(ledger.computes, json.loads(json.dumps(study.computes())))
        if changed:
            raise InputError(
                f"out={out.path} is a search with other settings ({'; '.join(changed)}); "
                "choose another out=, or the same settings"
            )
    elif out.path.is_dir() and any(p for p in out.path.iterdir() if not p.name.startswith(".")):
        raise InputError(f"out={out.path} holds something that is no search (no config.yaml); choose another folder")
    out.write_config(plain(config))
    write_atomic(out.path / RECIPE, write_yaml(study.recipe_tree))
    ledger.session(study.computes())
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
        print(f"{many(resumed, 'trial')} in its ledger", flush=True)
    report = Report(study, ledger, out)
    with Progress(config.trials, "trials", f"search {out.path.name}") as progress, stop_on_signal(out, progress.print):
        guide = Guide(study, ledger, out.path, progress.print)
        shown_trials = ShownTrials(study, ledger, progress)

        def ended(row: dict[str, Any]) -> None:
            shown_trials(row)
            report.trial(row)

        guide.ended = ended

        def stop() -> str:
            return STOPPED if out.stop_request.exists() else guide.out_of_time()

        try:
            if (nothing := guide.nothing_left()) is not None:
                reason = nothing
            elif config.parallel == 0:
                reason = in_process(guide, stop)
            else:
                ensure_ray()
                from pipelines.lib.search.executor import on_tune

                reason = on_tune(guide, stop)
        except BaseException:
            report.close("FAILED")
            raise
    if guide.stopping == STOPPED:
        report.close("KILLED")
        where = shlex.quote(shown(out.path))
        count = many(len(ledger.trials), "trial")
        print(f"stopped after {count}; resume with: python -m pipelines.search {where}/config.yaml")
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
        self.said = len(study.config.rule.lines(study, ledger.trials))

    def __call__(self, row: dict[str, Any]) -> None:
        objective, trials = self.study.objective, self.ledger.trials
        loss = objective.loss(trials[row["number"]])
        found = f"{objective.metric} {trials[row['number']].metrics.get(objective.metric, math.nan):.4f}"
        if row["status"] != "done":
            found = f"{row['status']}: {row['error']}"
        elif not math.isfinite(loss):
            found = f"diverged: {row['error'] or 'the loss is not finite'}"
        share = "" if row["share"] == 1.0 else f" at {100 * row['share']:.3g} %"
        seconds = row["cost"].get("seconds")
        took = f", {seconds:.1f} s" if seconds is not None else ""
        what = label(row["settings"], self.dimensions)
        what += f"  ({row['why']})" if row["why"] else ""
        self.progress.print(f"trial {row['number']}{share}, seed {row['seed']}: {found}{took}  {what}")
        lines = self.study.config.rule.lines(self.study, trials)
        for line in lines[self.said :]:
            self.progress.print(f"decided: {line}")
        self.said = len(lines)
        done = [objective.loss(t) for t in trials if t.status == "done" and t.ask.share == 1.0]
        figures = {"best": f"{min(done):.4f}"} if done and math.isfinite(min(done)) else {}
        self.progress.update(sum(1 for _ in self.ledger.ended()), **figures)


class Report:
    """The search in MLflow: a parent run with its trials below it, a leaderboard, the promoted checkpoint's model."""

    def __init__(self, study: Study, ledger: Ledger, out: Run):
        from pipelines.lib.tracking import Children, Tracker

        config = study.config
        self.study, self.ledger, self.out = study, ledger, out
        self.datasets = [(Path(config.data).name, folder.fingerprint, config.data) for folder in study.folders]
        self.dimensions = study.space.dimensions()
        self.tracker = Tracker.start(
            out.path,
            "search",
            plain(config),
            kind=config.track,
            name=config.name,
            experiment=config.experiment,
            tags={"rule": plain(config.rule)["kind"]},
            datasets=self.datasets,
        )
        self.children = Children(self.tracker)
        for row in ledger.ended():  # a driver that was killed may have left some behind
            if row["run"] and row["same_as"] is None and not row.get("mlflow_run"):
                self._add(row)

    def trial(self, row: dict[str, Any]) -> None:
        """A trial has ended."""
        if row["run"]:
            self._add(row)
        self.tracker.board("leaderboard", leaderboard(self.study, self.ledger))
        self._news()

    def close(self, status: str) -> None:
        promoted = [row for row in self.ledger.ended() if row.get("promoted") and row["same_as"] is None]
        for row in promoted:
            self._add(row)
        self.children.close()
        self._news()
        self.tracker.board("leaderboard", leaderboard(self.study, self.ledger))
        if (self.out.path / "results.yaml").is_file():
            self.tracker.artifact(self.out.path / "results.yaml")
        self.tracker.artifact(self.ledger.path)
        self.tracker.close(status)

    def _add(self, row: dict[str, Any]) -> None:
        folder = self.out.path / row["run"]
        config = self.study.train_config(row["settings"], row["seed"], str(folder))
        name = label(row["settings"], self.dimensions)
        self.children.add(
            folder,
            name=f"{name} s{row['seed']}",
            config=plain(config),
            status=row["status"],
            metrics={**row["metrics"], **{f"cost/{k}": v for k, v in row["cost"].items()}},
            step=row["until"],
            checkpoint=self.out.path / row["checkpoint"] if row.get("promoted") else None,
            tags={"trial": row["number"], "trial_id": row["id"], "why": row["why"]},
            datasets=self.datasets,
        )

    def _news(self) -> None:
        for folder, run_id in self.children.news():
            inside = folder.relative_to(self.out.path).as_posix()
            mine = [row for row in self.ledger.ended() if row["run"] == inside]
            if mine and mine[-1].get("mlflow_run") != run_id:
                self.ledger.write("mlflow", number=mine[-1]["number"], mlflow_run=run_id)


def describe(study: Study) -> str:
    config = study.config
    dimensions = study.space.dimensions()
    kind = plain(config.rule)["kind"]
    return (
        f"{kind} over {many(len(dimensions), 'setting')} ({', '.join(dimensions)}), {many(config.seeds, 'seed')} each"
    )


def many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


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
    more = [f"{failed} failed or refused"] if failed else []
    if known := sum(row["same_as"] is not None for row in ledger.ended()):
        more.append(f"{known} known before")
    if left := len(ledger.running):
        more.append(f"{left} unfinished")
    said = f" ({', '.join(more)})" if more else ""
    print(f"{where}: {many(len(ended), 'trial')}{said}; {reason}")
    dimensions = study.space.dimensions()
    for place, row in enumerate(leaderboard(study, ledger)[:5], 1):
        spread = f" ± {row['standard_error']:.4f}" if row["seeds"] > 1 else " (one seed)"
        trial = ledger.trials[int(row["trials"].split()[0])]
        said = label(trial.ask.settings, dimensions)
        print(f"  {place}. {objective.metric} {row[objective.metric]:.4f}{spread}  {said}")
    for line in study.config.rule.lines(study, ledger.trials):
        print(f"  {line}")
    if cut_off := study.config.rule.unfinished(study, ledger.trials):
        print(f"  {cut_off}")
    winner = out.path / "winner"
    if winner.is_file():
        folder = shlex.quote(shown(Path(os.path.normpath(out.path / winner.read_text().strip()))))
        settings = study.config.rule.winner(study, ledger.trials) or {}
        print(f"winner: {folder}  {label(settings, dimensions)}")
        print(f"next: python -m pipelines.compare {where}\n      python -m pipelines.sample {folder} --prompt 'The '")
        print(f"      serve run serving.app:build run={folder}")


def dry_run(study: Study) -> int:
    """Print the trials that the space expands to, with parameters, time and memory; nothing is written."""
    from rich.table import Table

    from pipelines.lib.estimate import duration, estimate_many
    from pipelines.lib.terminal import print_table

    settings = study.config.rule.opening(study, DRAWN)
    dimensions = study.space.dimensions()
    print(f"{describe(study)}; it begins with")
    table = Table("id", "parameters", "tokens", "time", "memory", "settings")
    kept = [one for one in settings if study.refuses(one) is None]
    configs = [study.train_config(one, study.seeds[0]) for one in kept]
    found = estimate_many(configs, study.folders)
    for one, config, guess in zip(kept, configs, found, strict=True):
        table.add_row(
            study.id_of(config),
            f"{config.model.n_parameters():,}",
            f"{guess.tokens:,}",
            "?" if guess.seconds is None else duration(guess.seconds),
            "?" if guess.memory_gb is None else f"{1024 * guess.memory_gb:,.0f} MiB",
            label(one, dimensions),
        )
    print_table(table)
    for one in settings:
        if (why := study.refuses(one)) is not None:
            print(f"refused: {label(one, dimensions)}: {why}")
    work = study.config.rule.work(study)
    mean = sum(guess.seconds or 0.0 for guess in found) / len(found)
    if work is None:
        print(f"one trial takes {duration(mean)} on average; how many there will be is known at the end only")
    else:
        print(f"at most {work:,.4g} trials of full length: {duration(work * mean)} of work, one at a time")
    return 0


def estimate(config: SearchConfig) -> Any:
    """A search's estimate: what its rule trains at most, never more than the budgets allow."""
    from pipelines.lib.estimate import Estimate, estimate_many

    config, study = prepare(config)
    settings = [one for one in config.rule.opening(study, DRAWN) if study.refuses(one) is None]
    found = estimate_many([study.train_config(one, study.seeds[0]) for one in settings], study.folders)
    mean_tokens = sum(guess.tokens for guess in found) / len(found)
    seconds_per_token = sum(guess.seconds or 0.0 for guess in found) / sum(guess.tokens for guess in found)
    limits = []
    if (work := config.rule.work(study)) is not None:
        limits.append(("the rule's own end", work * mean_tokens))
    if config.trials is not None:
        limits.append((f"trials={config.trials}, all of full length", config.trials * mean_tokens))
    if config.tokens is not None:
        limits.append((f"tokens={config.tokens}", float(config.tokens)))
    if config.seconds is not None:
        limits.append((f"seconds={config.seconds:g}", config.seconds / max(seconds_per_token, 1e-12)))
    if not limits:
        raise InputError(
            f"rule {plain(config.rule)['kind']} ends by itself, nobody knows when; give trials=, tokens= or seconds= "
            "for an estimate up to there"
        )
    why, tokens = min(limits, key=lambda limit: limit[1])
    return Estimate(
        tokens=round(tokens),
        seconds=tokens * seconds_per_token,
        memory_gb=max(guess.memory_gb or 0.0 for guess in found),
        notes=(
            f"at most {tokens / mean_tokens:,.4g} trials' worth of training, by {why}, one at a time; divide by how "
            "many run at once on cores of their own",
            f"from {many(len(found), 'setting')}, of which the smallest, a middle and the largest were measured",
        ),
    )


@dataclass(frozen=True)
class ImportConfig:
    """Translate an experiment file of the modular laboratory (run_experiments, hyperparam_search) into a search file.

    file: the laboratory's YAML or JSON file
    out: search file to write (null: it is printed)
    dataset: of several that the file's runs train on, the one that is meant
    ignore: names of flags that are not known here (of other versions of the laboratory), to be left out
    param_names: of a greedy search (hyperparam_search), whose --orig_settings or results FILE then is
    increments: of each of param_names, or one for all
    """

    file: str
    out: str | None = None
    dataset: str | None = None
    ignore: tuple[str, ...] = ()
    param_names: tuple[str, ...] = ()
    increments: tuple[float, ...] = (1.0,)


def run_import(config: ImportConfig) -> int:
    """Write or print a translation, with what became of each flag as comments."""
    from pipelines.lib.search.flag_files import import_file, import_greedy

    if config.param_names:
        found = import_greedy(config.file, config.param_names, config.increments)
    else:
        found = import_file(config.file, config.dataset, config.ignore)
    if config.out is None:
        print(found.text(), end="")
        return 0
    if Path(config.out).exists():
        raise InputError(f"out={config.out} exists; choose another")
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(config.out), found.text())
    print("\n".join(found.notes))
    where = shlex.quote(config.out)
    print(f"wrote {where}\nnext: python -m pipelines.search {where} data=FOLDER out=FOLDER dry_run=true")
    return 0


def translated(words: list[str]) -> list[str]:
    """A command line whose experiment file of the laboratory, if there is one, is replaced by what it says."""
    for i, word in enumerate(words):
        follows = i > 0 and words[i - 1].startswith("--") and "=" not in words[i - 1]
        if word.startswith("-") or follows or not word.endswith((".yaml", ".yml", ".json")) or not Path(word).is_file():
            continue
        from pipelines.lib.search.flag_files import import_file, is_laboratory

        if is_laboratory(Path(word)):
            found = import_file(word)
            print("\n".join(found.notes), flush=True)
            return [*words[:i], *found.words(), *words[i + 1 :]]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["import"]:
        if {"-h", "--help"} & set(words):
            call = "python -m pipelines.search import FILE key=value ... [--debug]"
            says = inspect.cleandoc(ImportConfig.__doc__ or "").splitlines()[0]
            settings = describe_settings(ImportConfig, positional="file")
            print("\n".join([says, "", call, "", "settings and defaults:", *settings]))
            return 0
        # A bare word is the file, which elsewhere, ending in .yaml, is a recipe for the command itself.
        return command(ImportConfig, run_import, [w if "=" in w or w[:1] == "-" else f"file={w}" for w in words[1:]])
    if not {"-h", "--help"} & set(words):
        try:
            words = translated(words)
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return command(SearchConfig, run, words, estimate=estimate)


if __name__ == "__main__":
    from pipelines.search import main  # so that what reaches Ray's workers is pickled by reference

    sys.exit(main())
