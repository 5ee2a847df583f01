"""From accuracies to CORE: each task's accuracy is centred on what a guess reaches, CORE is the mean over the tasks.

centred = (accuracy - chance) / (1 - chance), below zero where a model is worse than a guess; nothing is clipped.
Source: DCLM, arXiv:2406.11794, section 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """A task's answers. correct: per item, in the order of items.  chance: a fraction.  file: what the items are of."""

    correct: Sequence[bool]
    chance: float
    file: Hashable

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def uniform(self) -> bool:
        """Whether all or none are right: the items' deviation, 0, then says nothing about the accuracy's error."""
        return len(self.correct) > 1 and all(c == self.correct[0] for c in self.correct)

    @property
    def stderr(self) -> float | None:
        """Of the accuracy: s / sqrt(n) with the sample deviation s, as lm-eval has it; None for one item.

        Where all or none are right: 1 / (n + 1), as far as Wilson's interval of one standard error reaches from there.
        """
        n, p = len(self.correct), self.accuracy
        if self.uniform:
            return 1 / (n + 1)
        return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None

    @property
    def centred_stderr(self) -> float | None:
        return None if self.stderr is None else self.stderr / (1 - self.chance)


def centred(accuracy: float, chance: float) -> float:
    """0 at chance, 1 when all is right. Both as fractions, chance below 1."""
    return (accuracy - chance) / (1 - chance)


def core(accuracy: Mapping[str, float], chance: Mapping[str, float], tasks: Iterable[str]) -> float:
    """The mean centred score over `tasks`."""
    scores = [centred(accuracy[task], chance[task]) for task in tasks]
    return sum(scores) / len(scores)


def core_stderr(outcomes: Iterable[Outcome]) -> float | None:
    """The standard error of the mean centred score; None where a task has one item only.

    Tasks are independent but for those that ask the same items (HellaSwag with and without examples): of these the
    mean per item is one figure, whose error holds their covariance. Those with all or none right have their own error,
    and are taken to err together.
    """
    files: dict[tuple[Hashable, int], list[Outcome]] = {}
    n_tasks, variance = 0, 0.0
    for outcome in outcomes:
        files.setdefault((outcome.file, len(outcome.correct)), []).append(outcome)
        n_tasks += 1
    for (_, n), group in files.items():
        if n < 2:
            return None
        per_item = sum(np.asarray(o.correct, float) / (1 - o.chance) for o in group)
        together = sum(o.centred_stderr or 0.0 for o in group if o.uniform)
        variance += float(np.var(per_item, ddof=1)) / n + together**2
    return math.sqrt(variance) / n_tasks
