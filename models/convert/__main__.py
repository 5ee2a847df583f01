"""Weights from and to public layouts.

    python -m models.convert SOURCE TARGET            a folder of GPT-2, Llama or a relative, or llama2.c's .bin -> ours
    python -m models.convert SOURCE TARGET --to llama our folder -> a folder that transformers opens without our code
    python -m models.convert model.bin TARGET --tokens tok.bin      with llama2.c's vocabulary as a tokenizer

Folders are local and the target is a new or empty one; the tokenizer's files are copied along.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from pathlib import Path

from models.command import Parser
from models.spec import ConfigError, near


def run(source: Path, target: Path, layout: str | None, tokens: Path | None) -> str:
    """Converts and returns one line on what was written. Raises ConfigError for what cannot be.

    The target is made before the model is opened, so that a place that cannot be written is known first.
    """
    from transformers.utils import logging

    from models.convert import LAYOUTS, llama2c, read, write
    from models.convert.common import TOKENIZER_FILES
    from models.families import load
    from models.gpt.model import GPTForCausalLM

    if not source.is_file() and not (source / "config.json").is_file():
        raise ConfigError(f"{source} is neither a .bin file nor a folder with config.json")
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"--to {layout}: no such layout{near(layout, LAYOUTS)}")
    if tokens is not None and not source.is_file():
        raise ConfigError(f"--tokens {tokens}: for llama2.c's .bin files; the folder {source} has its own tokenizer")
    if tokens is not None and not tokens.is_file():
        raise ConfigError(f"--tokens {tokens}: no such file")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; a new or empty folder is needed")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; a new or empty folder is needed")
    target.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    if source.is_file():
        model = llama2c.load(source)
        if tokens is not None:
            llama2c.Pieces.load(tokens, model.spec.vocab).tokenizer().save_pretrained(target)
            model.generation_config.bos_token_id, model.generation_config.eos_token_id = llama2c.BOS, [llama2c.BOS, 2]
    else:
        try:
            loaded = load(source)
            model = loaded if isinstance(loaded, GPTForCausalLM) else read(source)
        except ConfigError:
            raise
        except Exception as error:  # transformers, safetensors, json and torch each have their own
            said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            raise ConfigError(f"{source}: not a model that can be opened ({said[:300]})") from error
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map  # of an export, whose code stays where it is
    if layout is None:
        model.save_pretrained(target)
    else:
        write(model, target, layout)
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy2(source / name, target / name)
    kind = layout or "novella"
    return f"{target}: {kind} layout, {model.spec.n_parameters():,} parameters (layouts: {', '.join(LAYOUTS)})"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "python -m models.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", metavar="LAYOUT", help="gpt2, llama, mistral or qwen3; left out: ours")
    parser.add_argument("--tokens", type=Path, help="llama2.c's tokenizer file")
    args = parser.parse_args(argv)
    there = args.target.exists()
    try:
        print(run(args.source, args.target, args.to, args.tokens))
    except (ConfigError, OSError, ValueError) as error:
        if not there:
            with contextlib.suppress(OSError):
                args.target.rmdir()  # if it is empty
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
