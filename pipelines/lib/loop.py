"""The training loop: torch only, the same for a notebook, torchrun and Ray Train.   B rows, T tokens of a micro-batch.

The unit of work is the micro-batch: which tokens it holds and which dropout it sees depend on (seed, step, m) alone,
and rank r of w computes m = r, r+w, ... Losses are sums over the global number of targets. So any number of workers
makes the same run, no random generator is ever saved, and a run killed anywhere repeats the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from kernels.linear_cross_entropy import IGNORE
from models.convert import LAYOUTS
from models.families import create
from models.lm import LM
from models.loss import Loss
from models.spec import build
from pipelines.lib.checkpoint import Checkpoints, State, restore
from pipelines.lib.config import InputError
from pipelines.lib.cost import Cost, operations
from pipelines.lib.estimate import Foretold
from pipelines.lib.jsonl import row_at
from pipelines.lib.measure import hidden_statistics, peak_flops, update_ratio
from pipelines.lib.model_folder import open_folder
from pipelines.lib.order import Order, Source, key
from pipelines.lib.run import Run, write_atomic
from pipelines.lib.runlog import Log, Metrics, write_sample
from pipelines.lib.shards import TokenFolder, Tokens
from pipelines.lib.training import TrainConfig, Verify
from pipelines.lib.world import World, choose_device

INIT, ORDER, DROPOUT = 0, 1, 2  # streams of the seed
ASKED = "asked to stop"
DIVERGED = "non-finite loss or gradient"
AHEAD = 4096  # sample numbers whose places are computed at once


def open_source(folder: Path) -> LM:
    """The model to start from: a folder of ours, or one in a public layout that models.convert reads."""
    model = open_folder(folder, "float32")
    layout = LAYOUTS.get(model.config.model_type)
    return cast(LM, layout.from_layout(model) if layout else model)


@dataclass
class Outcome:
    """What a run came to. stopped: why it ended before its length, or None."""

    step: int
    metrics: dict[str, float]
    stopped: str | None = None


def outcome_figures(row: dict[str, Any], state: State) -> dict[str, float]:
    """What of a log row with a validation becomes the metrics of an outcome."""
    figures = {k: v for k, v in row.items() if k.startswith("val/") or k == "train/loss"}
    return figures | ({"val/best_nll": state.best} if state.best is not None else {})


def last_figures(run: Run, state: State) -> dict[str, float]:
    """The same of a run that has nothing left to do, from its log."""
    return outcome_figures(row_at(run.metrics, state.step) or {}, state)


@dataclass(frozen=True)
class Piece:
    """What a search asks of a run: to train up to some update, and to leave a checkpoint there only if it is wanted.

    Schedules see the whole length, and the pieces of a run make the same run as one piece would.
    until: update to stop at
    keep: whether to leave a checkpoint at the end
    below: (metric, sign, limit): keep one also if sign * metric is below the limit
    save_s: seconds after which the next validation leaves one, so that a killed search loses no more than that
    """

    until: int
    keep: bool = False
    below: tuple[str, float, float] | None = None
    save_s: float = 60.0

    def wants(self, figures: dict[str, float]) -> bool:
        """Whether a checkpoint is wanted at the end, where the validation gave these figures."""
        if self.below is None:
            return self.keep
        metric, sign, limit = self.below
        return self.keep or sign * figures.get(metric, math.nan) < limit


class Batches:
    """Micro-batch m of step s, from the token folders of a plan."""

    def __init__(self, config: TrainConfig, folders: list[TokenFolder]):
        self.config, self.folders, self.seq_len = config, folders, config.context
        self.splits = [folder.split("train") for folder in folders]
        sources = [
            Source(str(folder.path), split.n_tokens, mix.weight, fingerprint=folder.fingerprint)
            for mix, folder, split in zip(config.mixes, folders, self.splits, strict=True)
        ]
        # The path does not enter the plan: a folder that moved is the same data.
        named = [Source(f"source {i}", s.tokens, s.weight, 0, s.fingerprint) for i, s in enumerate(sources)]
        try:
            self.order = Order(named, self.seq_len, key(config.order_stream, ORDER))
        except ValueError as error:
            text = str(error)
            for i, s in enumerate(sources):
                text = text.replace(f"source {i}:", f"{s.name}:")
            raise InputError(text) from None
        self._first = -AHEAD
        self._places: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, first token and epoch of samples first .. first + count."""
        if self._places is None or not self._first <= first <= self._first + AHEAD - count:
            if count > AHEAD:
                return self.order(np.arange(first, first + count))
            self._first, self._places = first, self.order(np.arange(first, first + AHEAD))
        at = first - self._first
        source, token, epoch = (x[at : at + count] for x in self._places)
        return source, token, epoch

    def micro(self, first_sample: int, m: int) -> dict[str, Tensor]:
        """ids, targets [B, T] (and pos, doc when documents are masked) of micro-batch m of the step at first_sample."""
        rows = self.config.micro_batch
        source, token, _ = self.places(first_sample + m * rows, rows)
        windows = np.empty((rows, self.seq_len + 1), np.int64)
        for s in range(len(self.splits)) if len(self.splits) > 1 else (0,):
            mine = source == s
            if mine.any():
                windows[mine] = self.splits[s].batch(token[mine], self.seq_len + 1)
        batch = as_batch(windows)
        if self.config.mask_documents:
            places = [self.splits[s].documents(int(t), self.seq_len) for s, t in zip(source, token, strict=True)]
            batch["doc"] = torch.from_numpy(np.stack([d for d, _ in places]))
            batch["pos"] = torch.from_numpy(np.stack([p for _, p in places]))
        return batch


def as_batch(windows: np.ndarray) -> dict[str, Tensor]:
    """[B, T + 1] tokens -> ids [B, T] and the next token of each as targets [B, T]."""
    t = torch.from_numpy(windows)
    return {"ids": t[:, :-1].contiguous(), "targets": t[:, 1:].contiguous()}


def validation_windows(split: Tokens, seq_len: int, limit: int | None) -> np.ndarray:
    """First tokens of the validation windows: the same for every run over a dataset, evenly spread when limited.

    Windows of seq_len follow each other without a gap; the last may be shorter, so every token but the first is a
    target once.
    """
    starts = np.arange(0, max(1, split.n_tokens - 1), seq_len)
    if limit is not None and limit < split.n_tokens:
        starts = starts[np.linspace(0, len(starts) - 1, max(1, limit // seq_len)).astype(np.int64)]
    return starts


def open_data(paths: Sequence[str], verify: Verify) -> list[TokenFolder]:
    """The token folders of a run, checked. Raises InputError for what is damaged or does not fit together.

    verify: TrainConfig.verify.
    """
    folders = []
    how: Literal["size", "sha256"]
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"data={path}: no such folder; make one with python -m pipelines.tokenize out={path}")
        if verify == "auto":
            size = sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else 0
            how = "sha256" if size < 4 * 2**30 else "size"
        else:
            how = verify
        folders.append(TokenFolder.open(path, verify=how))
    hashes = {folder.manifest.get("tokenizer", {}).get("sha256") for folder in folders}
    if len(hashes) > 1:
        raise InputError(f"data: the folders were made with different tokenizers ({', '.join(map(str, paths))})")
    return folders


class Trainer:
    """One worker of a run: model, optimizer, data, and the step."""

    def __init__(self, config: TrainConfig, run: Run, world: World, log: Log, folders: list[TokenFolder] | None = None):
        self.config, self.run, self.world, self.log = config, run, world, log
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        # Measuring the peak takes memory that is no part of the run's cost, so it comes first.
        self.peak = peak_flops(world.device, config.precision)
        self.cost = Cost(world)
        self.folders = folders or open_data([mix.path for mix in config.mixes], config.verify)
        self.batches = Batches(config, self.folders)
        self.total = config.total_steps(self.batches.order.samples_per_epoch)
        self.model = self._model()
        self.optimizers = config.optim.build(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        table = self.folders[0].token_bytes()
        self.token_bytes = None if table is None else torch.from_numpy(np.asarray(table, np.int64))
        self.loss: torch.nn.Module = Loss(self.model, config.z_loss, config.loss, self.token_bytes)
        if config.compile:
            self.loss = cast(torch.nn.Module, torch.compile(self.loss, dynamic=False))
        self.step_loss = world.wrap(self.loss)
        self.state = State(plan=self.batches.order.hash, data=[folder.fingerprint for folder in self.folders])
        self.checkpoints = Checkpoints(run, config.keep_last, config.keep_every, self.folders[0].tokenizer_dir, log)
        self.flops_per_token = self.model.flops_per_token(config.context)
        self.vals = [folder.split("val") for folder in self.folders]
        self.val_starts = [validation_windows(val, config.context, config.eval_tokens) for val in self.vals]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the data, for samples; None if the data has none."""
        if self.folders[0].tokenizer_dir is None:
            return None
        from pipelines.lib.vocab import load_tokenizer

        return load_tokenizer(self.folders[0].tokenizer_dir)

    def _model(self) -> LM:
        torch.manual_seed(key(self.config.init_stream, INIT))
        model = create(self.config.model)
        if self.config.init_from is not None:
            model.load_state_dict(open_source(Path(self.config.init_from)).state_dict())
        model.to(cast(Any, self.world.device))
        return model.train()

    # ---- one update

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.config.precision == "bf16":
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world.device.type == "cpu":
            return batch
        return {k: v.to(self.world.device, non_blocking=True) for k, v in batch.items()}

    def update(self, stop: bool, measure: bool) -> dict[str, Any]:
        """One optimizer update over the global batch. stop: this rank wishes to stop after it.

        measure: also the update-to-weight ratio. Returns the step's figures; `applied` is False when it was skipped.
        """
        config, world, step = self.config, self.world, self.state.step
        began = time.perf_counter()
        mine = range(world.rank, config.micros, world.size)
        batches = [self.batches.micro(self.state.samples, m) for m in mine]
        read_s = time.perf_counter() - began
        crc = sum(zlib.crc32(cast(Any, batch["ids"].numpy())) for batch in batches)
        targets = sum(int((b["targets"] != IGNORE).sum()) for b in batches)
        scale = world.size / config.batch_tokens  # DDP averages over the workers; the exact count is applied below
        loss_sum = torch.zeros(2, dtype=torch.float64)
        stage = config.loss.stage(step)
        for i, (m, batch) in enumerate(zip(mine, batches, strict=True)):
            torch.manual_seed(key(config.seed, DROPOUT, step, m))
            more = i < len(batches) - 1
            quiet = world.size > 1 and more
            with cast(Any, self.step_loss).no_sync() if quiet else contextlib.nullcontext():
                with self.autocast():
                    loss, nll = self.step_loss(**self.to_device(batch), stage=stage)
                (loss * scale).backward()
            loss_sum += torch.stack([loss.detach(), nll.detach()]).to("cpu", torch.float64)
        if not batches:  # more workers than micro-batches: take part in the average with a zero
            batch = self.to_device(self.batches.micro(self.state.samples, 0))
            (self.step_loss(**batch, stage=stage)[0] * 0.0).backward()
        totals = torch.cat([loss_sum, torch.tensor([targets, crc, float(stop)], dtype=torch.float64)])
        loss_total, nll_total, count, crc_total, stops = self.world.sum(totals).tolist()
        norm, applied = self._apply(config.batch_tokens / max(1.0, count), loss_total, measure)
        figures = {
            "train/loss": loss_total / count,
            "train/nll": nll_total / count,
            "train/grad_norm": norm,
            "data/crc": int(crc_total),  # of the token ids: equal data, equal number
            "read_s": read_s,
            "applied": applied,
            "stop": stops > 0,
        }
        if measure and applied:
            figures["train/update_ratio"] = self._ratio
        self.state.step += 1
        self.state.samples += config.rows
        self.state.tokens += config.batch_tokens
        return figures

    def _apply(self, scale: float, loss: float, measure: bool) -> tuple[float, bool]:
        """Scale and clip the gradients, then step. Returns (gradient norm, whether the update was made)."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            clip = self.config.grad_clip
            factor = scale * (min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0)
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            multiplier = self.config.schedule(self.state.step, self.total_steps())
            before = [p.detach().clone() for p in self.parameters] if measure else []
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * multiplier
                optimizer.step()
            if measure:
                self._ratio = update_ratio(before, self.parameters)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def total_steps(self) -> float:
        """Updates of the whole run; for a run measured in seconds, as the pace so far foretells."""
        if self.total is not None:
            return self.total
        assert self.config.seconds is not None
        elapsed = self.world.agree(self.state.elapsed_s) if self.world.size > 1 else self.state.elapsed_s
        return max(self.state.step + 1, self.state.step * self.config.seconds / max(elapsed, 1e-9))

    def lr(self) -> float:
        return next(iter(self.optimizers.values())).param_groups[0]["lr"]

    # ---- validation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean over all validation windows: nats, perplexity, bits per byte; and statistics of the hidden states.

        With several token folders also nats per folder; the mean is over the targets of all of them. With several
        streams also nats of each, val/stream_1_nll being the text's.
        """
        self.model.eval()
        totals = torch.stack([self._score(source) for source in range(len(self.vals))])
        nll_sum, count, n_bytes, *apart = totals.sum(0).tolist()
        nll = nll_sum / count
        # val/score: the geometric mean of the probabilities given to the right tokens.
        figures = {"val/nll": nll, "val/ppl": math.exp(min(700.0, nll)), "val/score": math.exp(-nll)}
        if n_bytes:
            figures["val/bpb"] = nll_sum / math.log(2) / n_bytes
        figures |= {f"val/stream_{i}_nll": stream / count for i, stream in enumerate(apart, 1)}
        if len(self.vals) > 1:
            for i, (folder, (nll, targets, *_)) in enumerate(zip(self.folders, totals.tolist(), strict=True)):
                name = f"val/{Path(folder.path).name}"
                if f"{name}/nll" in figures:  # two folders of one name
                    name = f"{name}-{i + 1}"
                figures[f"{name}/nll"] = nll / targets
        if self.world.rank == 0:
            T = self.config.context
            starts = self.val_starts[0][: max(1, 2048 // T)]
            probe = self._validation_batch(0, starts, len(starts), T)
            figures |= hidden_statistics(self.model.hidden(probe["ids"].to(self.world.device)))
        self.model.train()
        return figures

    def _score(self, source: int) -> Tensor:
        """float64: summed nats, targets and bytes of one folder's validation windows, over all workers.

        [3], and with several streams [3 + k]: summed nats of each.
        """
        rows, T = self.config.micro_batch, self.config.context
        loss, k = cast(Loss, self.loss), len(getattr(self.model.spec.embedding, "sizes", ()))
        totals = torch.zeros(3 + k, dtype=torch.float64)
        starts = self.val_starts[source]
        blocks = [starts[i : i + rows] for i in range(0, len(starts), rows)]
        for block in blocks[self.world.rank :: self.world.size]:
            batch = self._validation_batch(source, block, rows, T)
            with self.autocast():
                nll = loss.nlls(**self.to_device(batch)) if k else loss(**self.to_device(batch))[1][None]
            targets = batch["targets"]
            real = targets != IGNORE
            n_bytes = float(self.token_bytes[targets[real]].sum()) if self.token_bytes is not None else 0.0
            apart = nll.tolist() if k else []
            totals += torch.tensor([float(nll.sum()), float(real.sum()), n_bytes, *apart], dtype=torch.float64)
        return self.world.sum(totals)

    def _validation_batch(self, source: int, starts: np.ndarray, rows: int, T: int) -> dict[str, Tensor]:
        """Always [rows, T], so that a compiled loss sees one shape; what is not there is no target."""
        val = self.vals[source]
        windows = np.zeros((rows, T + 1), np.int64)
        length = np.minimum(T + 1, val.n_tokens - starts)
        for n in np.unique(length):
            windows[: len(starts)][length == n, :n] = val.batch(starts[length == n], int(n))
        batch = as_batch(windows)
        there = torch.zeros(rows, dtype=torch.int64)
        there[: len(starts)] = torch.from_numpy(length - 1)
        batch["targets"] = batch["targets"].masked_fill(torch.arange(T) >= there[:, None], IGNORE)
        if self.config.mask_documents:
            doc = torch.zeros(rows, T, dtype=torch.int64)
            pos = torch.arange(T).repeat(rows, 1)
            for row, (start, n) in enumerate(zip(starts, length - 1, strict=True)):
                ids, places = val.documents(int(start), int(n))
                doc[row, :n], pos[row, :n] = torch.from_numpy(ids), torch.from_numpy(places)
            batch |= {"doc": doc, "pos": pos}
        return batch

    # ---- checkpoints

    def resume(self) -> bool:
        """Take up the newest valid checkpoint that rank 0 finds. Returns whether there was one."""
        if self.world.rank == 0:
            self.checkpoints.clear_unfinished()
        newest = self.run.newest_valid(self.log) if self.world.rank == 0 else None
        chosen = self.world.agree(str(newest) if newest else None)
        if chosen is None:
            return False
        state = restore(Path(chosen), self.model, self.optimizers)
        if state.data != self.state.data:
            raise InputError(
                f"the token folder has changed since {Path(chosen).name}: expected fingerprint "
                f"{[d[:16] for d in state.data]}, found {[d[:16] for d in self.state.data]}; "
                f"give the data this run was trained on, or another out="
            )
        if state.plan != self.state.plan:
            raise InputError(f"{chosen}: its data order is another one (plan {state.plan}, now {self.state.plan})")
        self.state = state
        if state.spent:
            self.cost.resume(state.spent)
        self.log(f"resumed from {Path(chosen).name}: {state.step:,} updates, {state.tokens:,} tokens")
        return True

    def save(self, best: bool, wait: bool = False) -> None:
        if self.world.rank == 0:
            self.state.spent = self.cost.spent()
            self.checkpoints.save(self.model, self.optimizers, self.state, best, wait)


def train(
    job: dict[str, Any],
    world: World | None = None,
    report: Callable[[dict], None] = lambda metrics: None,
    folders: list[TokenFolder] | None = None,
) -> Outcome:
    """Train one run to its length, or until it is asked to stop.

    job: {"config": plain TrainConfig, "run": absolute path of the run folder}, and in a search "piece": the fields of a
    Piece.  world: default, that of the process group.  report: called on every rank at each checkpoint with {"step",
    "checkpoint"}.  folders: the token folders of the config, if they are open already.
    """
    config: TrainConfig = build(TrainConfig, job["config"])
    world = world or World.current(choose_device(config.device))
    run = Run(job["run"])
    log = Log(run.log if world.rank == 0 else None)
    try:
        foretold = Foretold(config, run, log) if world.rank == 0 and "piece" not in job else None
        trainer = Trainer(config, run, world, log, folders)
        resumed = trainer.resume()
        if not resumed and config.init_from is not None:
            log(f"weights from {config.init_from}")
        peak, threads = trainer.peak, torch.get_num_threads()
        log(
            f"workers: {world.size} on {world.device}, CPU threads each: {threads}; "
            f"{trainer.flops_per_token / 1e6:.1f} MFLOP per token; peak {peak.flops / 1e9:,.0f} GFLOP/s ({peak.how})"
        )
        metrics = Metrics(run.metrics if world.rank == 0 else None)
        piece = Piece(**job["piece"]) if "piece" in job else None
        return Course(trainer, metrics, report, piece, foretold).to_the_end()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text:
            smaller = [d for d in range(1, config.micro_batch // 2 + 1) if config.rows % d == 0]
            hint = (
                f"try micro_batch={smaller[-1]}: the batch of batch_tokens={config.batch_tokens} stays the same"
                if smaller
                else "try activation_checkpointing=true, precision=bf16 or a smaller seq_len"
            )
            raise InputError(
                f"out of memory with micro_batch={config.micro_batch} rows of {config.context}; {hint}"
            ) from error
        raise
    finally:
        log.close()


class Course:
    """A run from where its trainer stands to its end: update, validate, log and save, until done or stopped."""

    def __init__(
        self,
        trainer: Trainer,
        metrics: Metrics,
        report: Callable[[dict], None],
        piece: Piece | None = None,
        foretold: Foretold | None = None,
    ):
        self.trainer, self.metrics, self.report, self.piece, self.foretold = trainer, metrics, report, piece, foretold
        self.end = trainer.total if piece is None else piece.until  # None: the length is in seconds
        self.saved = time.monotonic()
        self.config, self.run, self.state, self.world = trainer.config, trainer.run, trainer.state, trainer.world
        self.stopped: str | None = None
        self.latest: dict[str, float] = {}
        self.began, self.earlier_s = time.monotonic(), self.state.elapsed_s
        self.open_window()

    def open_window(self) -> None:
        """Begin to count the updates that the next log line's pace is taken over (without validation and saving)."""
        self.window_began, self.window_steps, self.window_read_s = time.perf_counter(), 0, 0.0

    def to_the_end(self) -> Outcome:
        self.pay_validation()
        self.look_at_patience()
        while not self.stopped and not self.long_enough():
            self.step()
        if self.world.rank == 0:
            self.trainer.checkpoints.wait()
            self.trainer.cost.write(self.run.cost, self.counted())
        return Outcome(self.state.step, self.latest or last_figures(self.run, self.state), self.stopped)

    def counted(self) -> dict[str, float]:
        """The figures of the run's cost that follow from what it is and how far it came, over all attempts."""
        per_token = self.trainer.flops_per_token
        return {
            "parameters": self.config.model.n_parameters(),
            "macs_per_token": per_token / 6,  # of the forward pass: a third of the FLOPs, two of them each
            **operations(self.config.model, self.config.context),
            "tokens": self.state.tokens,
            "flops": per_token * self.state.tokens,
            "seconds": self.earlier_s + time.monotonic() - self.began,
        }

    def pay_validation(self) -> None:
        """Make up for the validation that a stop request left out, so that the run equals one that was not stopped."""
        if self.state.owed is None:
            return
        row, self.state.owed = dict(self.state.owed), None
        row |= self.trainer.evaluate()
        best = self.judge(row)
        self.metrics.write(self.state.step, row)
        self.trainer.save(best)
        self.open_window()

    def long_enough(self) -> bool:
        if self.end is not None:
            return self.state.step >= self.end
        assert self.config.seconds is not None
        return bool(self.world.agree(self.state.elapsed_s >= self.config.seconds))

    def look_at_patience(self) -> None:
        if self.config.patience is not None and self.state.stale >= self.config.patience:
            self.stopped = f"no better validation loss in {self.state.stale} evaluations"

    def step(self) -> None:
        """One update, and what is due after it."""
        config, state, following = self.config, self.state, self.state.step + 1
        last = self.end is not None and following >= self.end
        measured = last or following % config.eval_every == 0
        began = time.perf_counter()
        figures = self.trainer.update(stop=self.run.stop_request.exists(), measure=measured)
        self.trainer.cost.count(time.perf_counter() - began)
        if self.foretold is not None:
            self.foretold.count(time.perf_counter() - began, self.trainer.folders, self.end)
        state.elapsed_s = self.earlier_s + time.monotonic() - self.began
        self.window_steps += 1
        self.window_read_s += figures["read_s"]
        if not figures["applied"]:
            self.count_skipped()
        if figures["stop"]:
            self.stopped = ASKED
        if self.end is None and self.long_enough():
            last = measured = True
        row, best = {}, False
        if measured or self.stopped or state.step % config.log_every == 0 or state.step == 1:
            row = self.training_row(figures)
        if measured and not self.stopped:
            row |= self.trainer.evaluate()
            best = self.judge(row)
        if measured and self.stopped == ASKED:
            state.owed = row  # saving cannot wait for a validation; who resumes makes up for it
        elif row:
            self.metrics.write(state.step, row)
        if self.saves(best, last, measured, row):
            self.saved = time.monotonic()
            self.trainer.save(best, wait=bool(self.stopped or last))
            self.report({"step": state.step, "checkpoint": str(self.run.checkpoints / f"step_{state.step}")})
        if measured and config.sample_prompts and config.sample_tokens and self.world.rank == 0:
            samples(self.trainer)
        if row:
            self.open_window()

    def saves(self, best: bool, last: bool, measured: bool, row: dict[str, float]) -> bool:
        """Whether a checkpoint is due after this update."""
        if self.piece is None:
            often = self.config.save_every or self.config.eval_every
            return bool(best or self.stopped or last or self.state.step % often == 0)
        if last and not self.stopped:
            return self.piece.wants(row)
        late = time.monotonic() - self.saved > self.piece.save_s
        return bool(self.stopped or (measured and self.world.agree(late)))

    def count_skipped(self) -> None:
        """Raises InputError when the policy says that it is enough."""
        config, state = self.config, self.state
        state.skipped += 1
        self.trainer.log(
            f"step {state.step}: loss or gradient is not finite; the update was skipped ({state.skipped} so far)"
        )
        if config.nonfinite == "stop" or state.skipped > config.max_skipped:
            good = self.run.pointed("last")
            raise InputError(
                f"stopped at step {state.step}: {state.skipped} steps had a {DIVERGED} "
                f"(nonfinite={config.nonfinite}, max_skipped={config.max_skipped}); "
                f"the last good checkpoint is {good or 'none yet'}; try a smaller optim.lr"
            )

    def training_row(self, figures: dict[str, Any]) -> dict[str, float]:
        trainer, state = self.trainer, self.state
        spent = (time.perf_counter() - self.window_began) / self.window_steps
        rate = self.config.batch_tokens / spent
        given = ("train/loss", "train/nll", "train/grad_norm", "train/update_ratio", "data/crc")
        return {k: figures[k] for k in given if k in figures} | {
            "train/lr": trainer.lr(),
            "train/tokens": state.tokens,
            "train/tokens_per_s": rate,
            "train/step_time_s": spent,
            "train/read_time_s": self.window_read_s / self.window_steps,
            "train/skipped": state.skipped,
            "train/mfu": trainer.flops_per_token * rate / (trainer.peak.flops * self.world.size),
            "train/elapsed_s": state.elapsed_s,
            "system/memory_gb": trainer.peak.memory_gb(),
        }

    def judge(self, row: dict[str, float]) -> bool:
        """Whether this validation is the best so far (never a non-finite one); ends the run when patience does."""
        state, loss = self.state, row["val/nll"]
        best = math.isfinite(loss) and (state.best is None or loss < state.best)
        if best:
            state.best, state.best_step, state.stale = loss, state.step, 0
        else:
            state.stale += 1
        self.latest = outcome_figures(row, state)
        self.look_at_patience()
        return best


def samples(trainer: Trainer) -> None:
    """Continue the sample prompts (temperature 0.8, top-k 50, fixed seed) and add them to samples.txt.

    samples.html shows the newest ones, each token coloured by its probability, with what it was drawn from.
    """
    if trainer.tokenizer is None:
        return
    from pipelines.lib.inspection.draws import continuation
    from pipelines.lib.inspection.draws_page import draws_page
    from serving.engine import Engine, RequestError, SamplingParams

    config = trainer.config
    params = SamplingParams(max_tokens=config.sample_tokens, temperature=0.8, top_k=50, seed=config.seed, draws=10)
    engine = Engine(trainer.model, trainer.tokenizer)
    looked = []
    for prompt in config.sample_prompts:
        try:
            (request,) = engine.complete([prompt], params)
        except RequestError as error:  # a prompt that this tokenizer or context cannot take costs no training
            trainer.log(f"no sample of {prompt!r}: {error}")
            continue
        write_sample(trainer.run.samples, trainer.state.step, prompt, request.text)
        looked.append(continuation(engine, request, prompt, 0))
    if looked:
        page = draws_page(looked, "probability", 10, "of the newest validation", f"step {trainer.state.step}")
        write_atomic(trainer.run.samples.with_name("samples.html"), page)
