"""Continue prompts with a trained model, on the terminal or into a JSON file.

reads   run=     a run folder, a checkpoint, or any local Hugging Face folder of a causal language model
writes  output=  every continuation with its settings, as JSON (only if asked for)

python -m pipelines.sample runs/demo --prompt "Once upon a time" temperature=0.7
python -m pipelines.sample runs/demo prompt_file=prompts.txt prompt_per=line num_samples=3 output=samples.json
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.spec import ConfigError, plain
from pipelines.lib.config import InputError, command
from pipelines.lib.jobs import storage_path
from pipelines.lib.output import check_writable

if TYPE_CHECKING:
    from pipelines.lib.estimate import Estimate
    from serving.engine import Engine, Request, SamplingParams

ESTIMATE_TOKENS = 32  # that an estimate generates in each row


@dataclass(frozen=True)
class SampleConfig:
    """Continue prompts with a trained model.

    run: run folder, checkpoint folder or any local Hugging Face folder
    which: the checkpoint of a run: best, last or step_N
    prompt: text to continue; may be given several times; none: the beginning of a document
    prompt_file: file of prompts, UTF-8
    prompt_per: whether the file is one prompt or has one on each line (empty lines are skipped)
    num_samples: continuations of each prompt
    max_tokens: tokens to generate at most
    temperature: 0 is greedy, 1 the model's own distribution
    top_k: keep the k most likely tokens; 0 keeps all
    top_p: keep the smallest set of tokens with at least this probability
    min_p: keep tokens with at least this fraction of the best token's probability
    repetition_penalty: above 1 makes tokens that are already in the text less likely
    presence_penalty: taken once from the logit of a token already generated
    frequency_penalty: taken from a token's logit once for each time it was generated
    stop: end before this text; may be given several times (a line break is $'\\n' in most shells)
    ignore_eos: go on after the model's end token
    seed: repeats the same samples; none: a new one, which is printed
    stream: show text while it is generated
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
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    stream: bool = True
    cache: bool = True
    output: str | None = None
    batch: int = 16
    context: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")


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


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the command line, then the file's. Raises InputError for a file that is not there or no text."""
    prompts = list(config.prompt)
    if config.prompt_file is not None:
        path = storage_path(config.prompt_file)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"prompt_file={path}: not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise InputError(f"prompt_file={path}: {error.strerror}") from None
        if config.prompt_per == "line":
            prompts += [line for line in text.splitlines() if line.strip()]
        else:
            prompts.append(text)
        if not prompts:
            raise InputError(f"prompt_file={path} holds no prompt")
    return prompts or [""]


def settings(config: SampleConfig, seed: int) -> SamplingParams:
    """The engine's parameters of a config. Raises ConfigError for a value that cannot be."""
    from serving.engine import RequestError, SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    same = {name: getattr(config, name) for name in (*names, "frequency_penalty", "stop", "ignore_eos")}
    try:
        return SamplingParams(seed=seed, **same)
    except RequestError as error:
        raise ConfigError(str(error)) from None


def run(config: SampleConfig) -> int:
    import dataclasses

    import torch

    from serving.engine import Engine, RequestError, seed_of_sample

    prompts = read_prompts(config)
    if config.output is not None:
        check_writable(storage_path(config.output), f"output={config.output}")
    seed = secrets.randbits(31) if config.seed is None else config.seed
    params = settings(config, seed)
    torch.set_num_threads(config.threads)
    model, tokenizer, folder = open_model(config.run, config.which, config.device, config.dtype)
    rows = min(config.batch, len(prompts) * config.num_samples)
    try:
        engine = Engine(model, tokenizer, rows, config.context, cache=config.cache, dedicated=True)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    requests = []
    for i, prompt in enumerate(prompts):
        for j in range(config.num_samples):
            try:
                requests.append(engine.submit(prompt, dataclasses.replace(params, seed=seed_of_sample(seed, j))))
            except RequestError as error:
                raise InputError(f"prompt {i + 1} of {len(prompts)}: {error}") from None
    texts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    began = time.perf_counter()
    try:
        show(engine, requests, texts, config)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    elapsed = time.perf_counter() - began
    generated = sum(len(r.tokens) for r in requests)
    print(
        f"{generated} tokens in {elapsed:.1f} s ({generated / elapsed:.0f} tokens/s), seed {seed}, {folder}",
        file=sys.stderr,
    )
    if config.output is not None:
        write_results(storage_path(config.output), config, seed, folder, requests, texts)
    failed = next((r.error for r in requests if r.finish_reason == "error"), None)
    if failed:
        raise InputError(f"{folder}: {failed}")
    return 0


def estimate(config: SampleConfig) -> Estimate:
    """What the continuations will take, if none ends early: a batch of them is generated for a few tokens."""
    import dataclasses

    import torch

    from pipelines.lib.cost import Memory
    from pipelines.lib.estimate import Estimate
    from pipelines.lib.world import choose_device
    from serving.engine import Engine, RequestError

    prompts, params = read_prompts(config), settings(config, 0)
    torch.set_num_threads(config.threads)
    memory = Memory(choose_device(config.device))
    model, tokenizer, _ = open_model(config.run, config.which, config.device, config.dtype)
    continuations = len(prompts) * config.num_samples
    rows = min(config.batch, continuations)
    try:
        engine = Engine(model, tokenizer, rows, config.context, cache=config.cache, dedicated=True)
    except ValueError as error:
        raise ConfigError(str(error)) from None

    def generate(n: int) -> tuple[float, int]:
        """Seconds and tokens of a full batch, n tokens each."""
        few = dataclasses.replace(params, max_tokens=n, ignore_eos=True, stop=())
        began = time.perf_counter()
        try:
            requests = [engine.submit(prompts[i % len(prompts)], few) for i in range(rows)]
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
        parameters=model.num_parameters(),
        notes=("a continuation that meets an end of text or a stop is shorter, and later tokens take longer",),
    )


def show(engine: Engine, requests: Sequence[Request], prompts: Sequence[str], config: SampleConfig) -> None:
    """Runs the engine to the end and prints the texts in order: the first unfinished one as it grows."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    several = len(requests) > 1
    at, shown, more = 0, -1, True
    while at < len(requests):
        more = engine.step() if more else False
        while at < len(requests):
            request = requests[at]
            if shown < 0 and (config.stream or request.finished):
                if several:
                    print(f"--- {at + 1} of {len(requests)}")
                print(prompts[at], end="", flush=True)
                shown = 0
            if shown >= 0 and (config.stream or request.finished):
                print(request.text[shown:], end="", flush=True)
                shown = len(request.text)
            if not request.finished:
                break
            print()
            at, shown = at + 1, -1


def write_results(
    path: Path, config: SampleConfig, seed: int, folder: Path, requests: Sequence[Request], prompts: Sequence[str]
) -> None:
    """All settings and continuations as one JSON object. Raises InputError if the file cannot be written."""
    tree = {
        "checkpoint": str(folder),
        "settings": {**plain(config), "seed": seed},
        "samples": [
            {
                "prompt": prompt,
                "sample": i % config.num_samples,
                "text": r.text,
                "finish_reason": r.finish_reason,
                "prompt_tokens": len(r.prompt),
                "tokens": r.tokens,
            }
            for i, (r, prompt) in enumerate(zip(requests, prompts, strict=True))
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"output={path}: {error.strerror}") from None
    print(f"wrote {path}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    return command(SampleConfig, run, argv, positional="run", estimate=estimate)


if __name__ == "__main__":
    from pipelines.sample import main  # so that classes have their importable names

    sys.exit(main())
