"""Compare runs on one page that needs nothing else, and give a run its report card.

reads   RUN ...   run folders, folders of runs, search folders; or query= for runs that MLflow knows
writes  out=      compare.html (one self-contained page), compare.md with its plots as PNG

python -m pipelines.compare runs/a runs/b runs/c
python -m pipelines.compare runs/ baseline="norm=rmsnorm"
python -m pipelines.compare searches/lr
python -m pipelines.compare query="params.model.norm = 'rmsnorm'" experiment=novella
python -m pipelines.compare card runs/a          (one run: config, data, curves, evaluation, cost, estimate)

Runs that differ in nothing but their seed are one variant. Differences are paired over common seeds and adjusted for
how many they are; one inside its error is called none. What makes runs incomparable is said first.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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
    question = question_of(found, config.metric, config.mode, config.at, config.level)
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
    return shlex.join(["python", "-m", "pipelines.compare", *config.runs, *(f"{k}={v}" for k, v in settings.items())])


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


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["card"]:
        return command(CompareConfig, run, named(words, "runs"), positional="runs")
    if {"-h", "--help"} & set(words):
        call = "python -m pipelines.compare card RUN key=value ... [--debug]"
        print(
            "\n".join(
                [
                    "A run's report card.",
                    "",
                    call,
                    "",
                    "settings and defaults:",
                    *describe(CardConfig, positional="run"),
                ]
            )
        )
        return 0
    return partial(command, CardConfig, run_card, named(words[1:], "run"), positional="run")()


if __name__ == "__main__":
    from pipelines.compare import main  # so that classes have their importable names

    sys.exit(main())
