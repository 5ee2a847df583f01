"""Weights from and to public layouts.

    python -m models.convert SOURCE TARGET            a GPT-2 or Llama folder, or llama2.c's .bin -> our folder
    python -m models.convert SOURCE TARGET --to llama our folder -> a folder that transformers opens without our code
    python -m models.convert model.bin TARGET --tokens tok.bin      with llama2.c's vocabulary as a tokenizer

Folders are local; the tokenizer's files are copied along.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from models.spec import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def run(source: Path, target: Path, layout: str | None, tokens: Path | None) -> str:
    """Converts and returns one line on what was written. Raises ConfigError for what cannot be."""
    from transformers.utils import logging

    from models.convert import LAYOUTS, llama2c, read, write
    from models.families import load
    from models.gpt.model import GPTForCausalLM

    logging.disable_progress_bar()
    if source.is_file():
        model = llama2c.load(source)
        if tokens is not None:
            llama2c.Pieces.load(tokens, model.spec.vocab).tokenizer().save_pretrained(target)
            model.generation_config.bos_token_id, model.generation_config.eos_token_id = llama2c.BOS, [llama2c.BOS, 2]
    elif (source / "config.json").is_file():
        loaded = load(source)
        model = loaded if isinstance(loaded, GPTForCausalLM) else read(source)
    else:
        raise ConfigError(f"{source} is neither a .bin file nor a folder with config.json")
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
    parser = argparse.ArgumentParser(
        "models.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", metavar="LAYOUT", help="gpt2 or llama; left out: ours")
    parser.add_argument("--tokens", type=Path, help="llama2.c's tokenizer file")
    args = parser.parse_args(argv)
    try:
        print(run(args.source, args.target, args.to, args.tokens))
    except (ConfigError, OSError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
