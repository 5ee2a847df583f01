"""Compare runs on one page that needs nothing else, and give a run its report card.

reads   RUN ...   run folders, folders of runs, search folders; or query= for runs that MLflow knows
writes  out=      compare.html (one self-contained page), compare.md with its plots as PNG

python -m pipelines.compare runs/a runs/b runs/c
python -m pipelines.compare runs/ baseline="norm=rmsnorm"
python -m pipelines.compare searches/lr
python -m pipelines.compare query="params.model.norm = 'rmsnorm'" experiment=novella
python -m pipelines.compare card runs/a          (one run: config, data, curves, evaluation, cost, estimate)
python -m pipelines.compare checkpoints runs/    (every checkpoint below a folder: losses, NaNs, norms, kurtosis)
python -m pipelines.compare statistics runs/a    (activations and weights of one model, or of two beside each other)

Runs that differ in nothing but their seed are one variant. Differences are paired over common seeds and adjusted for
how many they are; one inside its error is called none. What makes runs incomparable is said first.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.spec import ConfigError
from pipelines.lib.config import InputError, command, describe
from pipelines.lib.output import check_writable


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs.

    runs: run folders, folders of runs, search folders
    query: an MLflow filter, such as tags.stage = 'train' (null: none; '' finds all)
    experiment: MLflow experiment in which query looks (null: all)
    metric: figure of metrics.jsonl that decides (null: a search's own, else val/bpb, else val/nll)
    mode: whether less or more of it is better (null: as the search says, else min)
    at: its last value, its best, or the last at the largest number of tokens that all runs reached
    level: of confidence intervals
    baseline: a variant's or a run's name: the others are tested against it (null: every pair)
    shown: variants in colour; the others are grey
    costs: figures of cost.json besides the usual ones, as columns and as fronts: multiplies, weight_bits, energy_j, ...
    title: heading of the page (null: the names of what is compared)
    out: folder to write to (null: comparison/ in the one folder given, else comparison/ here)
    """

    runs: tuple[str, ...] = ()
    query: str | None = None
    experiment: str | None = None
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    at: Literal["last", "best", "common"] = "last"
    level: float = 0.95
    baseline: str | None = None
    shown: int = 12
    costs: tuple[str, ...] = ()
    title: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if not self.runs and self.query is None:
            raise ConfigError("nothing to compare: give run folders, a folder of runs, a search, or query=")
        if not 0.5 <= self.level < 1:
            raise ConfigError(f"level={self.level}: a share such as 0.95 is needed, at least 0.5 and below 1")
        if self.shown < 1:
            raise ConfigError(f"shown={self.shown} is not positive")
        if self.experiment is not None and self.query is None:
            raise ConfigError(f"experiment={self.experiment}: it belongs to query=, which is not given")


@dataclass(frozen=True)
class CardConfig:
    """A run's report card.

    run: run folder
    out: folder to write to (null: RUN/card)
    """

    run: str
    out: str | None = None


@dataclass(frozen=True)
class CheckpointsConfig:
    """Every checkpoint below a folder, as a table.

    folder: what to look through
    sort: by path, best loss, step, weights that are not finite, the step where a run first was not finite, or others
    reverse: largest first; what is not known comes last either way
    path_regex: only those whose path below the folder this expression finds something in
    fast: read text files only: no NaNs, norms and kurtosis, and no check of the files against their hashes
    output: CSV file with all columns
    """

    folder: str = "."
    sort: Literal["path", "loss", "step", "nan", "nan_step", "norm", "kurtosis", "parameters", "skipped"] = "path"
    reverse: bool = False
    path_regex: str = ""
    fast: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        check_pattern("path_regex", self.path_regex)


def check_pattern(setting: str, pattern: str) -> None:
    """Raises ConfigError, naming the setting, for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{setting}={pattern}: {error}") from None


@dataclass(frozen=True)
class StatisticsConfig:
    """Activations and weights of a model, or of two beside each other.

    runs: a run folder, checkpoint or local Hugging Face folder, or two
    which: the checkpoint of a run: best, last or step_N; of two runs one word each may be given
    text: text to run the models on, as in pipelines.evaluate
    data: folder of token shards to run them on (neither: the validation split that the first run watched)
    split: which split of data
    tokens: of the text that the models read
    context: tokens of a row; null: what the models were made for
    device: auto, cpu, cuda, mps or xpu
    dtype: number format of the weights in the forward pass; auto: as they were saved
    threads: CPU threads; null: the machine's own choice
    tensors: only tensors in whose name this expression finds something
    title: heading of the page (null: the names of what is looked at)
    out: folder to write to (null: RUN/statistics, else statistics/ here)
    track: whether page and figures also go to the first run's MLflow run
    """

    runs: tuple[str, ...]
    which: tuple[str, ...] = ("best",)
    text: str | None = None
    data: str | None = None
    split: str = "val"
    tokens: int = 8192
    context: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = None
    tensors: str = ""
    title: str | None = None
    out: str | None = None
    track: Literal["mlflow", "none"] = "mlflow"

    def __post_init__(self) -> None:
        check_pattern("tensors", self.tensors)
        if not 1 <= len(self.runs) <= 2:
            raise ConfigError(f"runs: one model, or two to compare, are needed; {len(self.runs)} are given")
        if len(self.which) not in (1, len(self.runs)):
            raise ConfigError(f"which: one word, or one for each of the {len(self.runs)} runs")
        if self.text is not None and self.data is not None:
            raise ConfigError("text= and data= are both given; one is needed")
        for name in ("tokens", "context", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive")
        if self.tokens < 2:
            raise ConfigError(f"tokens={self.tokens}: at least 2 are needed")


def run(config: CompareConfig) -> int:
    """Collect, analyse, write the page and the paper, say the findings. Returns the exit code."""
    from pipelines.lib.comparison.collect import collect
    from pipelines.lib.comparison.findings import analyse, question_of
    from pipelines.lib.comparison.page import comparison_page
    from pipelines.lib.comparison.paper import comparison_paper
    from pipelines.lib.comparison.sentences import in_short
    from pipelines.lib.jobs import storage_path

    paths = [storage_path(path) for path in config.runs]
    out = folder_of(config, paths)
    found = collect(paths, config.query, config.experiment)
    question = question_of(found, config.metric, config.mode, config.at, config.level, config.costs)
    findings = analyse(found, question, config.baseline)
    check_writable(out / "compare.html", f"out={out}")
    title = config.title or title_of(config, paths)
    words = repeated(config)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "compare.html", comparison_page(findings, title, words, config.shown))
    write(out / "compare.md", comparison_paper(findings, title, words, config.shown, out))
    for note in findings.notes:
        if note.kind == "stop":
            print(note.text)
    for line in in_short(findings):
        print(line)
    if found.left_out:
        first = found.left_out[0]
        print(f"{len(found.left_out)} left out, such as {first.name}: {first.why}")
    print(f"wrote {out / 'compare.html'} and compare.md")
    return 0


def run_card(config: CardConfig) -> int:
    """Read one run, write its card. Returns the exit code."""
    from pipelines.lib.comparison.card import card_of, card_page, card_paper
    from pipelines.lib.jobs import storage_path

    path = storage_path(config.run)
    if not path.is_dir():
        raise InputError(f"run={path}: no such folder; a run folder is needed")
    card = card_of(path)
    out = storage_path(config.out) if config.out else path / "card"
    check_writable(out / "card.html", f"out={out}")
    out.mkdir(parents=True, exist_ok=True)
    words = shlex.join(["python", "-m", "pipelines.compare", "card", config.run])
    write(out / "card.html", card_page(card, words))
    write(out / "card.md", card_paper(card, words, out))
    print(f"{card.run.name}: {card.run.status}{f', {card.run.note}' if card.run.note else ''}")
    print(f"wrote {out / 'card.html'} and card.md")
    return 0


def run_checkpoints(config: CheckpointsConfig) -> int:
    """Read what there is, print the table, write the CSV. Returns the exit code."""
    from pipelines.lib.inspection.checkpoints import as_csv, collect, in_order, shown_path, table_of
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.terminal import print_table

    output = storage_path(config.output) if config.output is not None else None
    if output is not None:
        check_writable(output, f"output={config.output}")
    found = in_order(collect(storage_path(config.folder), config.path_regex, config.fast), config.sort, config.reverse)
    print_table(table_of(found))
    wrong = [row for row in found if row.note]
    for row in wrong:
        print(f"{shown_path(row)}: {row.note}")
    count = f"{len(found)} checkpoint{'s' if len(found) != 1 else ''}"
    print(count + (f", {len(wrong)} with something wrong" if wrong else ""))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(output, as_csv(found))
        print(f"wrote {output}")
    return 0


def run_statistics(config: StatisticsConfig) -> int:
    """Run the models on the text, write page and figures. Returns the exit code."""
    from pipelines.lib.inspection.statistics import make

    return make(config)


def folder_of(config: CompareConfig, paths: Sequence[Path]) -> Path:
    from pipelines.lib.jobs import storage_path

    if config.out is not None:
        return storage_path(config.out)
    return paths[0] / "comparison" if len(paths) == 1 and config.query is None else storage_path("comparison")


def title_of(config: CompareConfig, paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    if config.query is not None:
        names.append(config.query or config.experiment or "all runs")
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def repeated(config: CompareConfig) -> str:
    """The command that makes this page again."""
    settings = {
        name: getattr(config, name)
        for name, f in config.__dataclass_fields__.items()
        if name != "runs" and getattr(config, name) != f.default
    }
    words = (f"{k}={_word(v)}" for k, v in settings.items())
    return shlex.join(["python", "-m", "pipelines.compare", *config.runs, *words])


def _word(value: Any) -> str:
    """As the command line takes it."""
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def write(path: Path, text: str) -> None:
    """A file, whole or not at all. Raises InputError if it cannot be written."""
    from pipelines.lib.run import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise InputError(f"out={path.parent}: {error.strerror}") from None


def named(words: Sequence[str], field: str) -> list[str]:
    """Bare words as `field=word`; a word after `--key`, and a YAML file of settings, stay as they are."""
    out: list[str] = []
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before and before != "--debug"
        bare = not word.startswith("-") and "=" not in word and not word.endswith((".yaml", ".yml"))
        out.append(f"{field}={word}" if bare and not is_value else word)
    return out


# word -> what it is, its config, what it runs, the field of its bare words
COMMANDS: dict[str, tuple[str, type, Callable[..., int], str]] = {
    "card": ("A run's report card.", CardConfig, run_card, "run"),
    "checkpoints": ("Every checkpoint below a folder, as a table.", CheckpointsConfig, run_checkpoints, "folder"),
    "statistics": (
        "Activation and weight statistics of a model, or of two beside each other, as one page.",
        StatisticsConfig,
        run_statistics,
        "runs",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        return command(CompareConfig, run, named(words, "runs"), positional="runs")
    says, cls, runs, field = COMMANDS[words[0]]
    if {"-h", "--help"} & set(words):
        call = f"python -m pipelines.compare {words[0]} {field.upper()} key=value ... [--debug]"
        print("\n".join([says, "", call, "", "settings and defaults:", *describe(cls, positional=field)]))
        return 0
    return command(cls, runs, named(words[1:], field), positional=field)


if __name__ == "__main__":
    from pipelines.compare import main  # so that classes have their importable names

    sys.exit(main())
