"""Train a language model on token shards.

reads   data=  folder(s) of token shards from pipelines.tokenize
writes  out=   a run folder: config.yaml, metrics.jsonl, log.txt, samples.txt, checkpoints/, last, best

An `out=` that exists is resumed when the settings are the same (its length may grow), and refused otherwise.
"""

from __future__ import annotations

import dataclasses as dc
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from models.spec import plain
from pipelines.lib.config import InputError, command
from pipelines.lib.output import shown
from pipelines.lib.run import Run
from pipelines.lib.training import HOW, LENGTHS, Mix, TrainConfig, growth_only

if TYPE_CHECKING:
    from pipelines.lib.loop import Batches
    from pipelines.lib.shards import TokenFolder


def resolve_config(config: TrainConfig) -> tuple[TrainConfig, Batches]:
    """Paths made absolute, the vocabulary taken from the data, and everything checked that needs no training.

    Raises InputError or ConfigError: a missing folder, ids outside the vocabulary, a batch that does not divide, no
    validation split, a context longer than the model's.
    """
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.loop import Batches, open_data

    mixes = tuple(dc.replace(mix, path=str(storage_path(mix.path))) for mix in config.mixes)
    data: str | tuple[Mix, ...] = mixes[0].path if isinstance(config.data, str) else mixes
    config = dc.replace(config, data=data, out=str(storage_path(config.out)))
    if config.init_from is not None:
        config = start_from(config, source_of(config.init_from))
    folders = open_data([mix.path for mix in config.mixes], "size")
    check_streams(config, folders)
    vocab_size = max(folder.vocab_size for folder in folders)
    if config.model.vocab_size is None:
        config = dc.replace(config, model=dc.replace(cast(Any, config.model), vocab_size=vocab_size))
    elif config.model.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {vocab_size} ids of {mixes[0].path}; "
            f"leave it out, or give {vocab_size} or more"
        )
    assert config.rows  # raises what does not divide
    for folder in folders:
        folder.split("val")
    return config, Batches(config, folders)


def check_streams(config: TrainConfig, folders: list[TokenFolder]) -> None:
    """Raises InputError where the data's ids are made of other streams than the model's embedding reads."""
    of_model = list(getattr(config.model.embedding, "sizes", ()))
    for folder in folders:
        of_data = folder.manifest["tokenizer"].get("sizes")
        if of_model and of_data and of_model != of_data:
            raise InputError(
                f"model.embedding.sizes={of_model}, but the ids of {folder.path} are made of streams of {of_data}; "
                f"give model.embedding.sizes={of_data}"
            )


def source_of(init_from: str) -> Path:
    """The folder that `init_from` names: a run, a model folder, or a model of the Hub. Raises InputError."""
    from pipelines.lib import hub
    from pipelines.lib.jobs import storage_path

    path = storage_path(init_from)
    return hub.model_folder(init_from) if not path.exists() and hub.looks_like_name(init_from) else path


def start_from(config: TrainConfig, path: Path) -> TrainConfig:
    """Take the architecture of the model that a run starts from; dropout stays the run's own.

    Raises InputError for a layout that neither is ours nor is read by models.convert, for `model` settings that say
    otherwise, and for another tokenizer than the data's.
    """
    from models.convert import LAYOUTS
    from models.family import FamilyConfig
    from models.spec import flatten, near
    from pipelines.lib.model_folder import open_folder, same_tokenizer
    from pipelines.lib.run import resolve

    folder = resolve(path)
    found = open_folder(folder).config
    if isinstance(found, FamilyConfig):
        spec = found.spec
    elif found.model_type in LAYOUTS:
        spec = LAYOUTS[found.model_type].spec_of(found)
    else:
        raise InputError(
            f"init_from={folder}: its layout {found.model_type!r} is not read{near('', LAYOUTS)} and our own"
        )
    spec = dc.replace(spec, dropout=cast(Any, config.model).dropout)
    asked, usual, has = (flatten(plain(m)) for m in (config.model, type(config.model)(), spec))
    against = [
        f"model.{k}={v} but it has {has.get(k)}" for k, v in asked.items() if v not in (usual.get(k), has.get(k))
    ]
    if against:
        raise InputError(f"init_from={folder} brings its architecture along ({'; '.join(against)}); leave model out")
    theirs = Path(config.mixes[0].path) / "tokenizer"
    if (folder / "tokenizer.json").is_file() and theirs.is_dir() and not same_tokenizer(folder, theirs):
        raise InputError(
            f"init_from={folder} has another tokenizer than {config.mixes[0].path}; tokenize with tokenizer={folder}"
        )
    return dc.replace(config, init_from=str(folder), model=spec)


def open_run(config: TrainConfig) -> tuple[Any, bool]:
    """The run folder of a config, and whether it goes on with an earlier run. Raises InputError with the difference."""
    from pipelines.lib.run import differences

    run = Run(config.out)
    if not run.exists():
        strange = run.path.is_dir() and any(p for p in run.path.iterdir() if not p.name.startswith("."))
        if strange and not run.config.is_file():
            raise InputError(f"out={run.path} holds something that is no run (no config.yaml); choose another folder")
        return run, False
    old, new = run.read_config(), plain(config)
    changed = differences(old, new, HOW | frozenset(LENGTHS)) + growth_only(old, new)
    if changed:
        raise InputError(
            f"out={run.path} is a run with other settings ({'; '.join(changed)}); "
            "choose another out=, or the same settings"
        )
    return run, True


def run(config: TrainConfig) -> int:
    """Train, watch and track one run. Returns the exit code: 0 done, 130 stopped on request."""
    from pipelines.lib.launch import in_process, on_ray, stop_on_signal
    from pipelines.lib.runlog import read_samples
    from pipelines.lib.tracking import Tracker
    from pipelines.lib.watch import Watch

    config, batches = resolve_config(config)
    folders = batches.folders
    the_run, again = open_run(config)
    with the_run.lock():
        the_run.write_config(plain(config))
        datasets = [(Path(m.path).name, f.fingerprint, m.path) for m, f in zip(config.mixes, folders, strict=True)]
        job = {"config": plain(config), "run": str(the_run.path)}
        total = config.total_steps(batches.order.samples_per_epoch)
        what = f"{config.model.n_parameters():,} parameters, {config.batch_tokens:,} tokens per update"
        print(f"{'resuming' if again else 'training'} {the_run.path}: {what}, {total or '?'} updates", flush=True)
        tracker = Tracker.start(
            the_run.path,
            "train",
            plain(config),
            kind=config.track,
            name=config.name,
            experiment=config.experiment,
            tags={"parameters": config.model.n_parameters(), **config.tags},
            datasets=datasets,
        )
        if config.init_from is not None and Path(config.init_from).name.startswith("step_"):
            source = Path(config.init_from)
            if (source.parent.parent / "tracking.jsonl").is_file():
                tracker.uses_model(source.parent.parent, int(source.name.removeprefix("step_")))
        status = "FAILED"
        try:
            tracker.mirror(the_run.metrics)
            on_checkpoint = lambda step, path: tracker.checkpoint(path, step)
            with Watch(the_run, total, on_checkpoint) as watch, stop_on_signal(the_run, watch.say):
                outcome = nothing_left(the_run, total, [folder.fingerprint for folder in folders])
                if outcome is None:
                    outcome = in_process(job, config) if config.num_workers == 0 else on_ray(job, config, watch.say)
            status = "KILLED" if outcome.stopped == "asked to stop" else "FINISHED"
        finally:
            for path in (the_run.samples, the_run.log):
                if path.is_file():
                    tracker.artifact(path)
            if samples := read_samples(the_run.samples):
                tracker.table("samples", samples)
            tracker.plot("loss", ["train/nll", "val/nll"])
            tracker.close(status)
    return summary(the_run, outcome)


def nothing_left(the_run: Run, total: int | None, data: list[str]) -> Any:
    """The outcome of a run that has its length already, so that no worker is started to find nothing to do."""
    from pipelines.lib.checkpoint import read_state
    from pipelines.lib.loop import Outcome, last_figures

    newest = the_run.newest_valid()
    if newest is None or total is None:
        return None
    state = read_state(newest)
    if state.step < total or state.owed is not None or state.data != data:
        return None
    return Outcome(state.step, last_figures(the_run, state))


def summary(the_run: Any, outcome: Any) -> int:
    """Say what was written and what to do next."""
    where = shlex.quote(shown(the_run.path))
    if outcome.stopped == "asked to stop":
        print(f"stopped and saved at step {outcome.step:,}; resume with: python -m pipelines.train {where}/config.yaml")
        return 130
    figures = ", ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in outcome.metrics.items() if k.startswith("val/"))
    print(f"{where}: {outcome.step:,} updates{f' ({outcome.stopped})' if outcome.stopped else ''}; {figures}")
    print(f"wrote {where}/checkpoints/{the_run.pointed('last')} (best: {the_run.pointed('best') or 'none'})")
    print(
        f"next: python -m pipelines.sample {where} --prompt 'The '\n"
        f"      python -m pipelines.evaluate {where}\n"
        f"      serve run serving.app:build run={where}\n"
        f"      python -m pipelines.export {where} {shlex.quote('exported/' + the_run.path.name)}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    from pipelines.lib.estimate import training

    return command(TrainConfig, run, argv, estimate=training)


if __name__ == "__main__":
    from pipelines.train import main  # so that what reaches Ray's workers is pickled by reference

    sys.exit(main())
