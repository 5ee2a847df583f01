"""The whole config of a training run, and what follows from it by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from models.families import Family
from models.gpt.config import GPT
from models.loss import CrossEntropy, Objective
from models.optim.groups import AdamW, Optim
from models.optim.schedule import Cosine, Schedule
from models.spec import ConfigError


@dataclass(frozen=True)
class Mix:
    """One token folder of a mix.

    path: folder of token shards
    weight: its share of the samples, relative to the others
    """

    path: str
    weight: float = 1.0


# How a run is carried out, not what it computes: these may change when it is resumed.
# (Another micro-batch keeps the data and the batch; where there is dropout, its masks differ from there on.)
HOW = frozenset(
    "out data num_workers cpus_per_worker gpus_per_worker device threads micro_batch max_failures wait_for_nodes "
    "verify keep_last keep_every save_every log_every sample_prompts sample_tokens track experiment name tags".split()
)
Verify = Literal["auto", "sha256", "size"]
LENGTHS = ("steps", "tokens", "epochs", "seconds")


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on token shards.

    data: folder of token shards (or several, with weights)
    out: run folder; an existing one with the same settings is resumed
    model: the family and its parts
    init_from: run, Hugging Face folder or Hub name (gpt2 ... gpt2-xl) whose weights to start from (null: from scratch)
    optim: the update rule
    schedule: learning rate over the run
    batch_tokens: tokens per update over all workers
    micro_batch: rows per forward pass; the unit of work, the same for any number of workers
    seq_len: tokens per row (null: the model's)
    mask_documents: attention does not cross documents and positions restart in each
    steps: length in updates (give exactly one of steps, tokens, epochs, seconds)
    tokens: length in tokens
    epochs: length in passes over the data
    seconds: length in training time
    patience: stop after this many evaluations without a better validation loss
    grad_clip: largest gradient norm (null: not clipped)
    loss: what is minimised at each token; plain cross-entropy is reported whatever it is
    z_loss: weight of the squared log-normaliser in the loss
    precision: fp32, or bf16 autocast with fp32 weights
    activation_checkpointing: recompute activations in the backward pass, for memory
    compile: compile model and loss with torch.compile
    eval_every: updates between validations
    eval_tokens: validation tokens to use, evenly spread (null: the whole split)
    sample_prompts: texts continued at each validation
    sample_tokens: tokens per sample
    save_every: updates between checkpoints (null: at each validation)
    keep_last: newest checkpoints to keep beside the best (0: all)
    keep_every: also keep checkpoints at multiples of this many updates
    log_every: updates between log lines
    seed: sets initialisation, data order and dropout, each by its own stream
    init_seed: own seed of the initialisation (null: from seed)
    order_seed: own seed of the data order (null: from seed)
    nonfinite: a step with non-finite loss or gradient is skipped and counted, or stops the run
    max_skipped: stop when more steps than this were skipped
    num_workers: processes that train together (0: in this one, without Ray)
    cpus_per_worker: CPUs that a worker needs
    gpus_per_worker: GPUs that a worker needs (null: 1 where the device is a GPU)
    threads: CPU threads per worker (null: cpus_per_worker, or the machine's own choice in-process)
    device: auto, cpu, cuda, mps, xpu
    max_failures: restarts after a lost worker
    wait_for_nodes: the cluster grows on demand, so wait for resources that are not there yet
    verify: how token shards are checked at the start (auto: sha256 below 4 GB, else size)
    track: where metrics go beside the run folder
    experiment: MLflow experiment
    name: run name (null: the folder's)
    tags: free labels of the run
    """

    ONE_OF: ClassVar[tuple[tuple[str, ...], ...]] = (LENGTHS,)

    data: str | tuple[Mix, ...]
    out: str
    model: Family = GPT()
    init_from: str | None = None
    optim: Optim = AdamW()
    schedule: Schedule = Cosine()
    batch_tokens: int = 16384
    micro_batch: int = 8
    seq_len: int | None = None
    mask_documents: bool = False
    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    patience: int | None = None
    grad_clip: float | None = 1.0
    loss: Objective = CrossEntropy()
    z_loss: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    compile: bool = False
    eval_every: int = 250
    eval_tokens: int | None = None
    sample_prompts: tuple[str, ...] = ("The ",)
    sample_tokens: int = 64
    save_every: int | None = None
    keep_last: int = 2
    keep_every: int = 0
    log_every: int = 10
    seed: int = 0
    init_seed: int | None = None
    order_seed: int | None = None
    nonfinite: Literal["skip", "stop"] = "skip"
    max_skipped: int = 10
    num_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None
    threads: int | None = None
    device: str = "auto"
    max_failures: int = 3
    wait_for_nodes: bool = False
    verify: Verify = "auto"
    track: Literal["mlflow", "none"] = "mlflow"
    experiment: str = "novella"
    name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [k for k in LENGTHS if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(LENGTHS)}; given: {', '.join(given) or 'none'}")
        for k in (given[0], "batch_tokens", "micro_batch", "eval_every", "log_every", "cpus_per_worker"):
            if not getattr(self, k) > 0:
                raise ValueError(f"{k}={getattr(self, k)} is not positive")
        for k in ("num_workers", "z_loss", "keep_last", "keep_every", "max_failures", "max_skipped", "sample_tokens"):
            if getattr(self, k) < 0:
                raise ValueError(f"{k}={getattr(self, k)} is negative")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"gpus_per_worker={self.gpus_per_worker} is negative; 0 trains without")
        for k in ("patience", "save_every", "seq_len", "grad_clip", "eval_tokens", "threads"):
            if getattr(self, k) is not None and not getattr(self, k) > 0:
                raise ValueError(f"{k}={getattr(self, k)} is not positive; null switches it off")

    @property
    def mixes(self) -> tuple[Mix, ...]:
        return (Mix(self.data),) if isinstance(self.data, str) else self.data

    @property
    def context(self) -> int:
        """Tokens per row. Raises ConfigError if it is longer than the model's context."""
        longest = self.model.seq_len
        if self.seq_len is not None and self.seq_len > longest:
            raise ConfigError(f"seq_len={self.seq_len} is longer than the model's context model.seq_len={longest}")
        return self.seq_len or longest

    @property
    def rows(self) -> int:
        """Rows per update. Raises ConfigError if the batch does not divide."""
        rows, rest = divmod(self.batch_tokens, self.context)
        if rest or rows == 0:
            lower, upper = max(1, rows) * self.context, (rows + 1) * self.context
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} is no multiple of seq_len={self.context}; try {lower} or {upper}"
            )
        if rows % self.micro_batch:
            would = [d for d in range(1, rows + 1) if rows % d == 0]
            nearest = min(would, key=lambda d: abs(d - self.micro_batch))
            raise ConfigError(
                f"micro_batch={self.micro_batch} does not divide the {rows} rows of batch_tokens={self.batch_tokens}; "
                f"try {nearest}"
            )
        return rows

    @property
    def micros(self) -> int:
        """Micro-batches per update."""
        return self.rows // self.micro_batch

    def total_steps(self, samples_per_epoch: int) -> int | None:
        """Updates of the whole run; None when the length is in seconds."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return max(1, -(-self.tokens // self.batch_tokens))
        if self.epochs is not None:
            return max(1, round(self.epochs * samples_per_epoch / self.rows))
        return None

    @property
    def init_stream(self) -> int:
        return self.seed if self.init_seed is None else self.init_seed

    @property
    def order_stream(self) -> int:
        return self.seed if self.order_seed is None else self.order_seed


def growth_only(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why the run may not go on with the new length: it shrank, or its unit changed. Empty when it may."""
    unit = [k for k in LENGTHS if old.get(k) is not None]
    now = [k for k in LENGTHS if new.get(k) is not None]
    if not unit:
        return ["length: its config.yaml has none"]
    if unit != now:
        return [f"length: {unit[0]}={old[unit[0]]} -> {now[0]}={new[now[0]]} (its unit may not change)"]
    if new[now[0]] < old[now[0]]:
        return [f"{now[0]}: {old[now[0]]} -> {new[now[0]]} (a length may only grow)"]
    return []
