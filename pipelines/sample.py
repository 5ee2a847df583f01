"""Continue prompts with a trained model, on the terminal or into files, and look at what it chose from.

reads   run=     a run folder, a checkpoint, or any local Hugging Face folder of a causal language model
writes  only what is asked for: output= (JSON), sample_file= (text), page= (HTML), picture= and charts= (PNG)

python -m pipelines.sample runs/demo --prompt "Once upon a time" temperature=0.7
python -m pipelines.sample runs/demo prompt_file=prompts.txt prompt_per=line num_samples=3 output=samples.json
python -m pipelines.sample runs/demo "temperature=[0.5, 1.0]" "top_k=[1, 50]" colour=probability table=true
python -m pipelines.sample runs/demo --prompt FILE:play.txt page=look.html picture=look.png charts=charts/
python -m pipelines.sample runs/demo interactive=true --stop $'\\n\\n'
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.spec import ConfigError
from pipelines.lib.config import InputError, command
from pipelines.lib.inspection.modes import Chart, Mode
from pipelines.lib.jobs import storage_path
from pipelines.lib.output import check_writable

if TYPE_CHECKING:
    from pipelines.lib.estimate import Estimate
    from pipelines.lib.samples import Job
    from serving.engine import Engine, SamplingParams

ESTIMATE_TOKENS = 32  # that an estimate generates in each row
FROM_FILE = "FILE:"  # a prompt that begins so is the text of a file
BARE_MIN_P = "0.5"


@dataclass(frozen=True)
class SampleConfig:
    """Continue prompts with a trained model.

    run: run folder, checkpoint folder or any local Hugging Face folder
    which: the checkpoint of a run: best, last or step_N
    prompt: text to continue, or FILE:path; may be given several times; none: the beginning of a document
    prompt_file: file of prompts, UTF-8
    prompt_per: whether the file is one prompt or has one on each line (empty lines are skipped)
    num_samples: continuations of each prompt
    max_tokens: tokens to generate at most
    temperature: 0 is greedy, 1 the model's own distribution; a list is run in turn
    top_k: keep the k most likely tokens; 0 keeps all; a list is run in turn, with each temperature
    top_p: keep the smallest set of tokens with at least this probability
    min_p: keep tokens with at least this fraction of the best token's probability; --min_p alone is 0.5
    repetition_penalty: above 1 makes tokens that are already in the text less likely
    presence_penalty: taken once from the logit of a token already generated
    frequency_penalty: taken from a token's logit once for each time it was generated
    cosine_penalty: [N, a]: a times the largest cosine of a token's embedding with the last N tokens' is taken off
    stop: end before this text; may be given several times (a line break is $'\\n' in most shells)
    ignore_eos: go on after the model's end token
    seed: repeats the same samples; none: a new one, which is printed
    stream: show text while it is generated
    interactive: generate, read a line from the terminal, go on behind it; the end of the input ends it
    colour: colour each token on the terminal (default of page and picture: probability)
    candidates: most likely tokens that tables, charts and pages show at each step
    table: print what each token was drawn from
    picture: PNG of the coloured text
    charts: folder for charts as PNG
    chart_kinds: of heatmap (all steps together), bars (each step), logits (the raw ones of the drawn tokens)
    page: HTML page, in one file: coloured text, likely tokens under the pointer, heatmap, charts
    sample_file: text file to which the samples are added, each below a heading
    cache: keep keys and values; false recomputes everything for each token, as a check
    output: JSON file for the results
    batch: continuations computed together
    context: tokens that prompt and continuation may have together; none: the model's own limit
    device: auto, cpu, cuda, mps or xpu
    dtype: number format of the weights; auto: as they were saved
    threads: CPU threads; one is fastest for small models
    """

    run: str
    which: str = "best"
    prompt: tuple[str, ...] = ()
    prompt_file: str | None = None
    prompt_per: Literal["file", "line"] = "file"
    num_samples: int = 1
    max_tokens: int = 200
    temperature: float | tuple[float, ...] = 0.8
    top_k: int | tuple[int, ...] = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    cosine_penalty: tuple[int, float] | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    stream: bool = True
    interactive: bool = False
    colour: Mode = "none"
    candidates: int = 10
    table: bool = False
    picture: str | None = None
    charts: str | None = None
    chart_kinds: tuple[Chart, ...] = ("heatmap", "bars")
    page: str | None = None
    sample_file: str | None = None
    cache: bool = True
    output: str | None = None
    batch: int = 16
    context: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch", "threads", "candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("temperature", "top_k", "chart_kinds"):
            if getattr(self, name) == ():
                raise ConfigError(f"{name}=[] names none")
        if self.charts is None and self.chart_kinds != type(self).chart_kinds:
            raise ConfigError("chart_kinds: it belongs to charts=, which is not given")
        if self.interactive:
            unfit = [n for n in ("picture", "charts", "page", "output", "sample_file") if getattr(self, n) is not None]
            unfit += ["prompt_file"] if self.prompt_file is not None else []
            unfit += ["num_samples"] if self.num_samples > 1 else []
            unfit += ["several prompts"] if len(self.prompt) > 1 else []
            if unfit:
                raise ConfigError(f"interactive=true is one conversation on the terminal, without {', '.join(unfit)}")

    @property
    def looks(self) -> bool:
        """Whether anything needs to know what the tokens were drawn from."""
        files = (self.picture, self.charts, self.page)
        return (
            self.colour != "none" or self.table or any(f is not None for f in files) or self.cosine_penalty is not None
        )


def open_model(run: str | Path, which: str, device: str, dtype: str) -> tuple[Any, Any, Path]:
    """Model (in evaluation mode, on its device), tokenizer and folder of what `run` names.

    Raises InputError or ConfigError for a folder or a device that is not there.
    """
    from pipelines.lib.model_folder import open_folder
    from pipelines.lib.run import resolve
    from pipelines.lib.vocab import load_tokenizer
    from pipelines.lib.world import choose_device

    folder = resolve(storage_path(run), which, say=lambda message: print(message, file=sys.stderr))
    at = choose_device(device)
    tokenizer = load_tokenizer(folder)
    model = open_folder(folder, dtype)
    return model.to(at).eval(), tokenizer, folder


def text_of(path: Path, setting: str) -> str:
    """A file's text. Raises InputError, naming the setting."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{setting}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{setting}: {error.strerror}") from None


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the command line, then the file's. Raises InputError for a file that is not there or no text."""
    prompts = [
        text_of(storage_path(text.removeprefix(FROM_FILE)), f"prompt={text}") if text.startswith(FROM_FILE) else text
        for text in config.prompt
    ]
    if config.prompt_file is not None:
        path = storage_path(config.prompt_file)
        text = text_of(path, f"prompt_file={path}")
        if config.prompt_per == "line":
            prompts += [line for line in text.splitlines() if line.strip()]
        else:
            prompts.append(text)
        if not prompts:
            raise InputError(f"prompt_file={path} holds no prompt")
    return prompts or [""]


def settings(config: SampleConfig, seed: int) -> list[SamplingParams]:
    """The engine's parameters for each temperature with each top-k, in turn, none twice.

    Raises ConfigError for a value that cannot be.
    """
    from serving.engine import RequestError, SamplingParams

    names = ("max_tokens", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    same = {name: getattr(config, name) for name in (*names, "cosine_penalty", "stop", "ignore_eos")}
    draws = config.candidates if config.looks else None
    each, ks = ((v if isinstance(v, tuple) else (v,)) for v in (config.temperature, config.top_k))
    pairs = dict.fromkeys((temperature, k) for temperature in each for k in ks)
    try:
        return [SamplingParams(temperature=t, top_k=int(k), seed=seed, draws=draws, **same) for t, k in pairs]
    except RequestError as error:
        raise ConfigError(str(error)) from None


def check_places(config: SampleConfig) -> None:
    """Raises InputError if a file could not be written, before anything is generated."""
    for name in ("output", "page", "picture", "sample_file"):
        if (value := getattr(config, name)) is not None:
            check_writable(storage_path(value), f"{name}={value}")
    if config.charts is not None:
        check_writable(storage_path(config.charts) / "heatmap.png", f"charts={config.charts}")


def open_engine(config: SampleConfig, rows: int) -> tuple[Engine, Path]:
    """The engine on the model, and the model's folder. candidates= is at most the vocabulary. Raises ConfigError."""
    import torch

    from serving.engine import Engine

    torch.set_num_threads(config.threads)
    model, tokenizer, folder = open_model(config.run, config.which, config.device, config.dtype)
    try:
        engine = Engine(model, tokenizer, rows, config.context, cache=config.cache, dedicated=True)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.looks and config.candidates > engine.vocab:
        raise ConfigError(f"candidates={config.candidates} exceeds the vocabulary's {engine.vocab}")
    return engine, folder


def run(config: SampleConfig) -> int:
    import dataclasses

    from pipelines.lib.samples import Job, write_files
    from serving.engine import RequestError, seed_of_sample

    prompts = read_prompts(config)
    check_places(config)
    seed = secrets.randbits(31) if config.seed is None else config.seed
    every = settings(config, seed)
    engine, folder = open_engine(config, min(config.batch, len(every) * len(prompts) * config.num_samples))
    if config.interactive:
        from pipelines.lib.conversation import converse

        return converse(engine, prompts[0], every, printer(engine, config))
    jobs: list[Job] = []
    for params in every:
        for i, prompt in enumerate(prompts):
            for j in range(config.num_samples):
                try:
                    request = engine.submit(prompt, dataclasses.replace(params, seed=seed_of_sample(seed, j)))
                except RequestError as error:
                    raise InputError(f"prompt {i + 1} of {len(prompts)}: {error}") from None
                jobs.append(Job(request, prompt, j))
    began = time.perf_counter()
    try:
        show(engine, jobs, config, several_settings=len(every) > 1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    elapsed = time.perf_counter() - began
    generated = sum(len(job.request.tokens) for job in jobs)
    print(
        f"{generated} tokens in {elapsed:.1f} s ({generated / elapsed:.0f} tokens/s), seed {seed}, {folder}",
        file=sys.stderr,
    )
    write_files(config, seed, folder, engine, jobs)
    failed = next((job.request.error for job in jobs if job.request.finish_reason == "error"), None)
    if failed:
        raise InputError(f"{folder}: {failed}")
    return 0


def estimate(config: SampleConfig) -> Estimate:
    """What the continuations will take, if none ends early: a batch of them is generated for a few tokens."""
    import dataclasses

    from pipelines.lib.cost import Memory
    from pipelines.lib.estimate import Estimate
    from pipelines.lib.world import choose_device
    from serving.engine import RequestError

    prompts, every = read_prompts(config), settings(config, 0)
    memory = Memory(choose_device(config.device))
    continuations = len(every) * len(prompts) * config.num_samples
    rows = min(config.batch, continuations)
    engine, _ = open_engine(config, rows)

    def generate(n: int) -> tuple[float, int]:
        """Seconds and tokens of a full batch, n tokens each."""
        few = [dataclasses.replace(params, max_tokens=n, ignore_eos=True, stop=()) for params in every]
        began = time.perf_counter()
        try:
            requests = [engine.submit(prompts[i % len(prompts)], few[i % len(few)]) for i in range(rows)]
        except RequestError as error:
            raise InputError(f"a prompt: {error}") from None
        while engine.step():
            pass
        return time.perf_counter() - began, sum(len(r.tokens) for r in requests)

    generate(1)  # opens what only the first call opens
    first_s, _ = generate(1)
    longer = max(2, min(config.max_tokens, ESTIMATE_TOKENS))
    longer_s, generated = generate(longer)
    token_s = max(0.0, longer_s - first_s) / max(1, generated / rows - 1)
    rounds = -(-continuations // rows)
    return Estimate(
        tokens=continuations * config.max_tokens,
        seconds=rounds * (first_s + token_s * max(0, config.max_tokens - 1)),
        memory_gb=memory.gb(),
        parameters=engine.model.num_parameters(),
        notes=("a continuation that meets an end of text or a stop is shorter, and later tokens take longer",),
    )


def printer(engine: Engine, config: SampleConfig) -> Callable[[Job], None] | None:
    """What shows a finished continuation in colours or as a table; None if plain text is all that is wanted."""
    if config.colour == "none" and not config.table and config.cosine_penalty is None:
        return None
    from rich.console import Console

    from pipelines.lib.inspection.colour import modes_of, print_coloured
    from pipelines.lib.samples import continuation_of
    from pipelines.lib.terminal import LOG_WIDTH

    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
    modes = modes_of(config.colour)

    def look(job: Job) -> None:
        print_coloured(console, continuation_of(engine, job), modes, config.candidates, config.table)

    return look


def show(engine: Engine, jobs: Sequence[Job], config: SampleConfig, several_settings: bool) -> None:
    """Runs the engine to the end and prints the texts in order: the first unfinished one as it grows."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    look = printer(engine, config)
    plain_text = config.colour == "none"
    at, shown, more = 0, -1, True
    while at < len(jobs):
        more = engine.step() if more else False
        while at < len(jobs):
            request = jobs[at].request
            ready = request.finished or (config.stream and plain_text)
            if shown < 0 and ready:
                if len(jobs) > 1:
                    p = request.params
                    words = f", temperature {p.temperature:g}, top_k {p.top_k}" if several_settings else ""
                    print(f"--- {at + 1} of {len(jobs)}{words}")
                if plain_text:
                    print(jobs[at].prompt, end="", flush=True)
                shown = 0
            if shown >= 0 and ready and plain_text:
                print(request.text[shown:], end="", flush=True)
                shown = len(request.text)
            if not request.finished:
                break
            if plain_text:
                print()
            if look is not None and request.finish_reason != "error":
                look(jobs[at])
            at, shown = at + 1, -1


def words_of(argv: Sequence[str]) -> list[str]:
    """The command line, with `--min_p` alone (the originals' bare --softmax_threshold) as min_p=0.5."""
    out = list(argv)
    for i, word in enumerate(out):
        follows = out[i + 1] if i + 1 < len(out) else "--"
        if word in ("--min_p", "--min-p") and (follows.startswith("--") or "=" in follows):
            out[i] = f"min_p={BARE_MIN_P}"
    return out


def main(argv: Sequence[str] | None = None) -> int:
    words = words_of(sys.argv[1:] if argv is None else argv)
    return command(SampleConfig, run, words, positional="run", estimate=estimate)


if __name__ == "__main__":
    from pipelines.sample import main  # so that classes have their importable names

    sys.exit(main())
