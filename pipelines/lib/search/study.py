"""The file of a search as a typed config, and what follows from it: the training config of each trial."""

from __future__ import annotations

import dataclasses as dc
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from models.families import IMPORTS
from models.spec import ConfigError, build, fields, flatten, near, plain
from pipelines.lib.config import RECIPES, InputError, as_word, defaults_under, one_of, override, recipe
from pipelines.lib.search.rules import Sweep
from pipelines.lib.search.space import Space, unknown_keys
from pipelines.lib.search.trials import Objective, Rule
from pipelines.lib.search.worker import METRICS
from pipelines.lib.training import HOW, TrainConfig

RECIPE = "recipe.yaml"  # in the search's folder: the recipe as it was when the search began
SPACES = Path(__file__).resolve().parents[3] / "tune_spaces"
OWN = {  # settings of a training run that a search sets itself -> what to do instead
    "data": "give data= to the search",
    "out": "give out= to the search",
    "seed": "give seeds= and first_seed= to the search",
    "num_workers": "give workers= to the search",
    "cpus_per_worker": "give cpus_per_worker= to the search",
    "gpus_per_worker": "give gpus_per_worker= to the search",
    "verify": "the data is checked once, when the search begins",
    "track": "give track= to the search",
    "experiment": "give experiment= to the search",
    "name": "give name= to the search",
    "tags": "MLflow shows a trial by its settings",
}
BETTER = {"val/bpb": "min", "val/nll": "min", "val/ppl": "min", "val/score": "max"}  # of the others either may be meant
# How a trial is carried out, not what it computes. (Another micro-batch has other dropout masks, so it counts.)
NOT_COMPUTED = (HOW - {"micro_batch"}) | {"seed"}


@dataclass(frozen=True)
class SearchConfig:
    """Search over the settings of training runs.

    data: folder of token shards that every trial trains on
    out: folder of the search; an existing one with the same settings is resumed
    recipe: training recipe that every trial starts from: a file, or a name in pipelines/recipes/
    fixed: settings laid over the recipe for all trials, dotted
    vary: what varies (see the README for its forms)
    rule: how the trials are chosen; --help rule=greedy explains the options of that one
    objective: what is optimised
    seeds: seeds per setting; equal seeds of two settings share data order and make a pair
    first_seed: the first of them
    search_seed: of the rule's own draws
    trials: stop after this many trials (of rules that train in pieces: pieces)
    tokens: stop when this many tokens were trained on
    seconds: stop after this time; what runs then is stopped and counts for nothing
    parallel: trials at once (null: as many as the CPUs or GPUs allow; 0: one after another in this process)
    workers: Ray Train workers per trial (0: the trial's own process trains, without another start-up)
    cpus_per_worker: CPUs that a trial, or each of its workers, takes
    gpus_per_worker: GPUs that a trial, or each of its workers, takes
    retries: how often a trial that crashed or lost its worker is tried again
    also: folders of other searches, whose results count where settings, data and seed are the same
    keep: how many of the best trials keep their last checkpoint; the first is what sample and serve open
    samples: whether trials continue the recipe's sample prompts at each validation
    dry_run: print the trials with parameters, time and memory, and start nothing
    track: where metrics go beside the folder
    experiment: MLflow experiment
    name: run name (null: the folder's)
    """

    RECIPES: ClassVar[Path] = SPACES
    BESIDE: ClassVar[tuple[str, ...]] = ("recipe",)  # may be named as it stands beside the search file
    HOW: ClassVar[frozenset[str]] = frozenset(
        "out data recipe trials tokens seconds parallel workers cpus_per_worker gpus_per_worker retries also keep "
        "samples dry_run track experiment name".split()
    )

    data: str
    out: str
    vary: Any
    recipe: str = "gpt_debug"
    fixed: dict[str, Any] = field(default_factory=dict)
    rule: Rule = field(default_factory=Sweep)
    objective: Objective = field(default_factory=Objective)
    seeds: int = 1
    first_seed: int = 0
    search_seed: int = 0
    trials: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    parallel: int | None = None
    workers: int = 0
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None
    retries: int = 2
    also: tuple[str, ...] = ()
    keep: int = 1
    samples: bool = False
    dry_run: bool = False
    track: str = "mlflow"
    experiment: str = "novella"
    name: str | None = None

    def __post_init__(self) -> None:
        for key in ("seeds", "keep"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("first_seed", "retries", "workers"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} is negative")
        for key in ("trials", "tokens", "seconds"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)} is not positive; leave it out for no such limit")
        if self.parallel is not None and self.parallel < 0:
            raise ValueError(f"parallel={self.parallel} is negative; 0 runs the trials in this process")
        if self.track not in ("mlflow", "none"):
            raise ValueError(f"track={self.track}; there is mlflow, none")
        if not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker={self.cpus_per_worker} is not positive")


class Study:
    """What the rule may know (see trials.Problem), and the training config of every trial.

    config: with absolute paths.  folders: the token folders, opened.  Raises InputError for a space whose keys do not
    exist, and for a recipe whose trials would not be comparable.
    """

    def __init__(self, config: SearchConfig, folders: list[Any]):
        self.config, self.folders = config, folders
        self.space = Space.read(config.vary, "vary")
        if wrong := unknown_keys(self.space, TrainConfig):
            raise InputError("; ".join(f"vary: {line}" for line in wrong))
        self.objective, self.seed = config.objective, config.search_seed
        self.seeds = tuple(range(config.first_seed, config.first_seed + config.seeds))
        kept = Path(config.out) / RECIPE  # a job's own copy of the recipe may be gone when the search goes on
        self.recipe_tree = recipe(kept if kept.is_file() and not _known(config.recipe) else config.recipe)
        varied = {key.split(".")[0] for key in self.space.keys()}  # noqa: SIM118  # a method of its own
        for where, keys in (("vary", varied), ("fixed", {key.split(".")[0] for key in config.fixed})):
            for key in sorted(keys & set(OWN)):
                raise InputError(f"{where}: {key} belongs to the search itself; {OWN[key]}")
        self.ignored = NOT_COMPUTED - varied
        self.vocab_size = max(folder.vocab_size for folder in folders)
        self.fingerprints = [folder.fingerprint for folder in folders]
        first = self.train_config({}, self.seeds[0])
        self._check_objective(len(getattr(first.model.embedding, "sizes", ())))
        if first.seconds is not None:
            raise InputError(
                f"recipe {config.recipe}: its length is in seconds, so trials would not see equal tokens; "
                "give fixed.tokens or fixed.steps"
            )
        if first.steps is not None and varied & {"batch_tokens"}:
            raise InputError(
                "vary: batch_tokens with a length in steps trains trials on different numbers of tokens; "
                f"give fixed.tokens={first.steps * first.batch_tokens}"
            )
        self._base = flatten(plain(first))

    def _check_objective(self, streams: int) -> None:
        """streams: how many the recipe's embedding has; 0: it is of one."""
        metric, measured = self.objective.metric, [*METRICS, *(f"val/stream_{i + 1}_nll" for i in range(streams))]
        if metric not in measured:
            raise InputError(f"objective.metric={metric} is not measured at validation{near(metric, measured)}")
        if BETTER.get(metric, self.objective.mode) != self.objective.mode:
            raise InputError(f"objective.mode={self.objective.mode}: of {metric} {BETTER[metric]} is meant")
        if metric == "val/bpb" and any(folder.token_bytes() is None for folder in self.folders):
            raise InputError(
                f"objective.metric=val/bpb needs the bytes of each token, which {self.config.data} does not tell; "
                "try objective.metric=val/nll"
            )

    # ---- what a rule asks

    def base(self, key: str) -> Any:
        """The plain value of a dotted key in the resolved recipe: a scalar, a list, a part's name or mapping."""
        if key in self._base:
            return self._base[key]
        node: Any = plain(self.train_config({}, self.seeds[0]))
        for word in key.split("."):
            if not isinstance(node, dict) or word not in node:
                raise InputError(f"{key}: not a setting of recipe {self.config.recipe}{near(key, self._base)}")
            node = node[word]
        return node

    def tree(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The resolved config with these settings as plain nested data."""
        return plain(self.train_config(settings, self.seeds[0]))

    def refuses(self, settings: Mapping[str, Any]) -> str | None:
        try:
            config = self.train_config(settings, self.seeds[0])
            assert config.rows
        except (ConfigError, InputError) as error:
            return str(error)
        return None

    def identity(self, settings: Mapping[str, Any]) -> str:
        return self.id_of(self.train_config(settings, self.seeds[0]))

    def computes(self) -> dict[str, Any]:
        """What all trials share: the resolved recipe and the data's fingerprints, as plain data."""
        tree = {k: v for k, v in plain(self.train_config({}, self.seeds[0])).items() if k not in self.ignored}
        return {"recipe": tree, "data": self.fingerprints}

    # ---- trials

    def train_config(self, settings: Mapping[str, Any], seed: int, out: str = "") -> TrainConfig:
        """The resolved training config of settings. Raises ConfigError for settings that cannot be."""
        return self._train_config(json.dumps(settings, sort_keys=False), seed, out)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  # a study lives as long as its process
    def _train_config(self, settings: str, seed: int, out: str) -> TrainConfig:
        config = self.config
        tree = self.recipe_tree
        own: dict[str, Any] = {
            "data": config.data,
            "out": out,
            "num_workers": config.workers,
            "cpus_per_worker": config.cpus_per_worker,
            "gpus_per_worker": config.gpus_per_worker,
            "verify": "size",
            "track": "none",
            **({} if config.samples else {"sample_prompts": []}),
        }
        changes = {**config.fixed, **json.loads(settings)}
        for key, value in {**own, **changes, "seed": seed}.items():
            tree = override(one_of(TrainConfig, tree, {key: value}), key, value)
        built = build(TrainConfig, defaults_under(TrainConfig, tree))
        if built.model.vocab_size is None:
            built = dc.replace(built, model=dc.replace(built.model, vocab_size=self.vocab_size))
        elif built.model.vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size={built.model.vocab_size} is smaller than the {self.vocab_size} ids of {config.data}"
            )
        assert built.context  # raises for a row longer than the model's context
        return built

    def id_of(self, config: TrainConfig) -> str:
        """Twelve hexadecimal digits over what a trial computes: the resolved config without its seed, and the data."""
        tree = {k: v for k, v in plain(config).items() if k not in self.ignored}
        text = json.dumps([tree, self.fingerprints], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def steps(self, config: TrainConfig, share: float = 1.0) -> int:
        """Updates up to a share of a trial's length."""
        from pipelines.lib.loop import Batches

        per_epoch = 0 if config.epochs is None else Batches(config, self.folders).order.samples_per_epoch
        total = config.total_steps(per_epoch)
        assert total is not None
        return max(1, round(share * total))

    def command(self, settings: Mapping[str, Any], seed: int, out: str) -> str:
        """The command that trains these settings again, alone and whole."""
        usual = {name: f.default for name, (_, f) in fields(TrainConfig).items()}
        words = {**self.config.fixed, **settings, "seed": seed, "num_workers": self.config.workers}
        if not self.config.samples and "sample_prompts" not in words:
            words["sample_prompts"] = []
        for key in ("cpus_per_worker", "gpus_per_worker"):
            if getattr(self.config, key) != usual[key]:
                words[key] = getattr(self.config, key)
        said = [f"{key}={as_word(value)}" for key, value in words.items()]
        named = (RECIPES / f"{self.config.recipe}.yaml").is_file()
        name = self.config.recipe if named else str(Path(self.config.out) / RECIPE)
        parts = ["python", "-m", "pipelines.train", name, f"data={self.config.data}", *said, f"out={out}"]
        imports = os.environ.get(IMPORTS)
        return (f"{IMPORTS}={shlex.quote(imports)} " if imports else "") + shlex.join(parts)


def _known(name: str) -> bool:
    return Path(name).is_file() or (RECIPES / f"{name}.yaml").is_file()
