"""Tree-structured Parzen estimator: draws that lean towards what has been good so far.   Needs optuna."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.lib.config import InputError
from pipelines.lib.search.domains import DEFAULT, Domain, Interval, Options, is_number, same
from pipelines.lib.search.rules.listed import Random, Settings, draw, first_draws, fresh, key, stream, ways
from pipelines.lib.search.space import Space
from pipelines.lib.search.trials import Problem, Trial

if TYPE_CHECKING:
    import optuna

ATTEMPTS = 20  # suggestions until one is new and not refused; then a plain draw is taken


@dataclass(frozen=True)
class Tpe(Random):
    """Random draws at first, then suggestions of optuna's tree-structured Parzen estimator.

    Source: Bergstra et al. 2011 and arXiv:2304.11127; by optuna, with its multivariate form, decomposed into groups so
    that keys which exist under a condition only are modelled too. Its study is made anew from the trials for every
    suggestion, and its random numbers depend on the suggestion's number, so a resumed search suggests the same.
    Trials that run count as bad ones (constant liar), so that parallel workers spread out. The value of settings is
    their mean over the seeds; what diverged or failed is the worst there is.

    startup: settings that are plain draws, the same as those of `random`
    """

    startup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.startup < 1:
            raise ValueError(f"startup={self.startup}: there is nothing to learn from before the first draw; try 10")

    def check(self, problem: Problem) -> None:
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise InputError("rule: tpe needs optuna: pip install 'optuna>=5'") from None
        super().check(problem)

    def opening(self, problem: Problem, most: int) -> Sequence[Settings]:
        return first_draws(problem, self.startup if self.draws is None else min(self.startup, self.draws), most)

    def draw(self, problem: Problem, known: Mapping[str, Sequence[Trial]]) -> dict[str, Any] | None:
        index = len(known)
        if index < self.startup:
            return draw(problem, index, known)
        study = make_study(problem, known)
        settings = fresh(problem, known, lambda a: suggest(study, problem, index, a), ATTEMPTS)
        return draw(problem, index, known) if settings is None else settings


def make_study(problem: Problem, known: Mapping[str, Sequence[Trial]]) -> optuna.Study:
    """An optuna study that holds what is known, in the order of asking."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    states = optuna.trial.TrialState
    for of in known.values():
        choices = recall(problem.space, of[0].ask.settings)
        if choices is None or any(t.status == "refused" for t in of):
            continue
        ended = not any(t.status == "running" for t in of) and len(of) >= len(problem.seeds)
        study.add_trial(
            optuna.trial.create_trial(
                state=states.COMPLETE if ended else states.RUNNING,
                value=math.fsum(problem.objective.loss(t) for t in of) / len(of) if ended else None,
                params={parameter(at, domain): coded(domain, value) for at, (domain, value) in choices.items()},
                distributions={parameter(at, domain): distribution(domain) for at, (domain, _) in choices.items()},
            )
        )
    return study


def suggest(study: optuna.Study, problem: Problem, *words: object) -> dict[str, Any]:
    """The study's next settings. words: what its random numbers depend on, beside the search's seed."""
    import optuna

    seed = stream(problem.seed, "tpe", *words).randrange(2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=1, group=True, multivariate=True, seed=seed)
    trial = study.ask()
    settings = problem.space.draw(lambda at, domain: decoded(domain, choose(trial, at, domain)))
    study.tell(trial, state=optuna.trial.TrialState.FAIL)  # it was only a question: whether it runs is not known yet
    return settings


def recall(space: Space, settings: Mapping[str, Any]) -> dict[str, tuple[Domain, Any]] | None:
    """The choices that lead to settings: key -> (its domain, the value); None if none do.

    A key's own value is known; which group was chosen is not, so the groups are tried.
    """

    def values(at: str, domain: Domain) -> Sequence[Any]:
        if isinstance(domain, Options) and at.startswith("@"):
            return domain.values
        value = settings.get(at, DEFAULT)
        if fits(domain, value):
            return [value]
        return [domain.values[0] if isinstance(domain, Options) else domain.low]  # a group that was not chosen

    wanted = key(settings)
    return next((chosen for chosen, got in ways(space, values) if key(got) == wanted), None)


def fits(domain: Domain, value: Any) -> bool:
    """Whether a domain could have given this value."""
    if isinstance(domain, Options):
        return any(same(v, value) for v in domain.values)
    return isinstance(domain, Interval) and is_number(value) and domain.low <= value <= domain.high


def ordered(domain: Options) -> list[Any] | None:
    """The values by size where they are three numbers or more, so that neighbours are alike; else None."""
    if len(domain.values) < 3 or not all(is_number(v) for v in domain.values):
        return None
    return sorted(domain.values)


def parameter(at: str, domain: Domain) -> str:
    """A name for optuna, for which a parameter has one domain; a key may have another one in another group."""
    return f"{at}: {domain}"


def choose(trial: optuna.Trial, at: str, domain: Domain) -> Any:
    """optuna's choice, coded."""
    word = parameter(at, domain)
    if isinstance(domain, Interval) and not domain.integer:
        return trial.suggest_float(word, domain.low, domain.high, log=domain.log)
    if isinstance(domain, Interval):
        return trial.suggest_int(word, int(domain.low), int(domain.high), log=domain.log)
    assert isinstance(domain, Options)
    if ordered(domain):
        return trial.suggest_int(word, 0, len(domain.values) - 1)
    return trial.suggest_categorical(word, range(len(domain.values)))


def distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """What `choose` chooses from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Interval) and not domain.integer:
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    if isinstance(domain, Interval):
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    assert isinstance(domain, Options)
    if ordered(domain):
        return IntDistribution(0, len(domain.values) - 1)
    return CategoricalDistribution(range(len(domain.values)))


def coded(domain: Domain, value: Any) -> Any:
    """A value as optuna knows it: positions for what is a list."""
    if not isinstance(domain, Options):
        return value
    values = ordered(domain) or domain.values
    return next(i for i, v in enumerate(values) if same(v, value))


def decoded(domain: Domain, code: Any) -> Any:
    """The inverse of `coded`; fractions keep six digits, so that a trial's command stays readable."""
    if isinstance(domain, Options):
        return (ordered(domain) or domain.values)[code]
    assert isinstance(domain, Interval)
    return code if domain.integer else min(max(float(f"{code:.6g}"), domain.low), domain.high)
