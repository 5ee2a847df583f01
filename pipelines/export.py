"""Write a trained model as a Hugging Face folder that loads where only transformers and torch are.

reads   run=   a run folder, a checkpoint, or any folder of a model of ours
writes  out=   config.json, model.safetensors, tokenizer, generation_config.json, README.md (the model card) and, for
               layout=own, the model's code; export.json says what was exported and how it was checked

python -m pipelines.export runs/demo exported/demo
python -m pipelines.export runs/demo exported/demo layout=llama dtype=bfloat16
HF_TOKEN=... python -m pipelines.export runs/demo exported/demo --push-to-hub me/demo

layout=own keeps every part: the folder holds the code, and loads with trust_remote_code=True. The other layouts are
classes of transformers itself, the ones that other engines are written for; a model with a part that they do not have
is refused.
Before the folder gets its name it is opened by a process that has transformers and torch only: weights must be equal
bit for bit, logits to 1e-5 of the largest in float32, and a left-padded batch must continue as its rows do.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from models.spec import ConfigError, plain
from pipelines.lib.config import InputError, command

FORMAT_VERSION = 1
RECORD = "export.json"
Layout = Literal["own", "gpt2", "llama", "mistral", "qwen3"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as a Hugging Face folder.

    run: run folder, checkpoint folder or a Hugging Face folder of a model of ours
    out: folder to write, new or empty
    which: the checkpoint of a run: best, last or step_N
    layout: own: with the model's code; else the class of transformers to write it as
    dtype: number format of the weights; auto: as they were saved
    chat_template: file with a Jinja chat template for the tokenizer; null: the one it has, if any
    overwrite: replace an earlier export at out
    push_to_hub: repository of the Hugging Face Hub (owner/name) to upload to, with the token in HF_TOKEN
    private: whether a repository that is made for it can be seen by you alone
    track: where the export is noted beside the folder
    """

    run: str
    out: str
    which: str = "best"
    layout: Layout = "own"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    chat_template: str | None = None
    overwrite: bool = False
    push_to_hub: str | None = None
    private: bool = True
    track: Literal["mlflow", "none"] = "mlflow"

    def __post_init__(self) -> None:
        if not self.private and self.push_to_hub is None:
            raise ConfigError("private=false: it belongs to push_to_hub=, which is not given")


@dataclass(frozen=True)
class Source:
    """What is exported.

    folder: where its weights lie.  run, step: of a checkpoint of a run; None, 0: of none.  model: in the number format
    to write.  tokenizer: None: it has none.
    """

    folder: Path
    run: Path | None
    step: int
    model: Any
    tokenizer: Any


def run(config: ExportConfig) -> int:
    """Export, check, and upload if asked to. Returns the exit code."""
    from pipelines.lib.export.push import client, push
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.output import shown

    out = storage_path(config.out)
    check_out(out, config.overwrite)
    api = client(config.push_to_hub) if config.push_to_hub is not None else None
    source = open_source(config)
    with written_whole(out) as temporary:
        said = write(config, temporary, source)
    print(f"{shown(out)}: {said}")
    if config.layout == "own" and (others := fitting(source.model.spec)):
        print(f"it fits transformers' own classes too: {', '.join(f'layout={name}' for name in others)}")
    note(config, source, out)
    if api is not None and config.push_to_hub is not None:
        print(f"pushed to {push(api, out, config.push_to_hub, config.private)}")
    return 0


def check_out(out: Path, overwrite: bool) -> None:
    """Raise InputError if `out` holds something that is no earlier export, or one that is not to be replaced."""
    from pipelines.lib.output import check_writable

    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; a new or empty folder is needed")
    if out.is_dir() and any(out.iterdir()):
        if not (out / RECORD).is_file():
            raise InputError(f"out={out} is not empty and no export; choose another folder")
        if not overwrite:
            raise InputError(f"out={out} holds an export already; overwrite=true replaces it")
    check_writable(out / RECORD, f"out={out}")


def open_source(config: ExportConfig) -> Source:
    """The model and its tokenizer, ready to be written.

    Raises InputError for a folder that is none of ours, or a layout that it does not fit, before anything is written.
    """
    import torch

    from models.convert import LAYOUTS
    from models.convert.common import as_dtype
    from models.lm import LM
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.model_folder import open_folder
    from pipelines.lib.run import Run, resolve

    folder = resolve(storage_path(config.run), config.which, say=lambda message: print(message, file=sys.stderr))
    owner = folder.parent.parent if folder.parent.name == "checkpoints" else None
    number = folder.name.removeprefix("step_")
    tokenizer = open_tokenizer(folder, config.chat_template)
    model = open_folder(folder)
    if not isinstance(model, LM):
        raise InputError(
            f"{folder} is a {type(model).__name__} of transformers, which every program opens as it is; "
            "python -m models.convert reads it as a model of ours"
        )
    if config.layout != "own":
        LAYOUTS[config.layout].config_of(cast(Any, model.spec))  # before anything is written
    if config.dtype != "auto":
        model = as_dtype(model, getattr(torch, config.dtype))
    complete(model, tokenizer)
    is_run = owner is not None and Run(owner).exists()
    step = int(number) if is_run and number.isdigit() else 0
    return Source(folder, owner if is_run else None, step, model, tokenizer)


def open_tokenizer(folder: Path, template: str | None) -> Any:
    """The tokenizer of a model folder, with a pad token and a chat template as asked for; None if it has none.

    Raises InputError for a tokenizer or template that cannot be used.
    """
    from models.convert.common import TOKENIZER_FILES
    from pipelines.lib.jobs import storage_path
    from pipelines.lib.vocab import load_tokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if template is not None:
            raise InputError(f"chat_template={template}: {folder} has no tokenizer to hold it")
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # batches are padded with something; attention never sees it
    if template is not None:
        try:
            tokenizer.chat_template = storage_path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template={template}: {getattr(error, 'strerror', None) or error}") from None
    if tokenizer.chat_template is not None:
        from pipelines.lib.export.verify import CHAT

        try:
            tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2 has its own classes
            raise InputError(f"the chat template cannot be used: {str(error).splitlines()[0]}") from None
    return tokenizer


def complete(model: Any, tokenizer: Any) -> None:
    """Generation settings and lengths that other programs read: which tokens begin, end and pad a text."""
    if tokenizer is None:
        return
    tokenizer.model_max_length = model.spec.seq_len
    settings = model.generation_config
    settings._from_model_config = False  # else transformers may make it anew from config.json
    for role in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        if getattr(settings, f"{role}_token_id") is None and token is not None and token < model.spec.vocab:
            setattr(settings, f"{role}_token_id", token)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and is gone otherwise."""
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.is_dir():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(config: ExportConfig, folder: Path, source: Source) -> str:
    """All files of the export, checked. Returns one line on it. Raises InputError for what does not come out equal."""
    from transformers.utils import logging

    from models.convert import LAYOUTS
    from models.convert.code import flat, write_code
    from pipelines.lib.export.alone import digest
    from pipelines.lib.export.card import Subject, model_card
    from pipelines.lib.export.verify import verify
    from pipelines.lib.model_folder import weight_hashes
    from pipelines.lib.shards import file_sha256

    logging.disable_progress_bar()
    model, tokenizer = source.model, source.tokenizer
    dtype, modules, written = str(model.dtype).removeprefix("torch."), [], model
    if config.layout != "own":
        written = LAYOUTS[config.layout].to_layout(model)
        returns_equal(config.layout, written, model)
    written.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # written for their owner alone
        path.chmod((folder / "config.json").stat().st_mode)
    if config.layout == "own":
        modules = write_code(model, folder)
    else:
        complete_config(folder, model.generation_config)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    weights = {name: digest(tensor) for name, tensor in written.state_dict().items()}
    hide = sorted({module.partition(".")[0] for module in modules})
    verified = verify(folder, model, weights, code=bool(modules), tokenizer=tokenizer, hide=hide)
    first = f"modeling_{model.config.model_type}.py"
    subject = Subject(
        name=config.push_to_hub or Path(config.out).name,
        spec=model.spec,
        run=source.run,
        step=source.step,
        layout=config.layout,
        dtype=dtype,
        tokenizer=tokenizer,
        tokenizer_sha256=file_sha256(folder / "tokenizer.json") if tokenizer is not None else None,
        files=(first, *(f"{flat(module)}.py" for module in modules)) if modules else (),
        verified=verified,
    )
    (folder / "README.md").write_text(model_card(subject), encoding="utf-8")
    record = {
        "format_version": FORMAT_VERSION,
        "config": plain(config),
        "source": str(source.folder),
        "source_sha256": weight_hashes(source.folder),
        "sha256": weight_hashes(folder),
        "check": asdict(verified),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    what = f"its code in {len(modules) + 1} files" if modules else f"layout {config.layout}"
    return f"{verified.model_class}, {model.spec.n_parameters():,} parameters, {dtype}, {what}; {verified}"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files, under the class name that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def complete_config(folder: Path, settings: Any) -> None:
    """What other programs look for in config.json itself: the tokens that begin and end a text, and rotary settings
    under the names that transformers 4 had, without which an older reader would take its own base without a word.
    """
    path = folder / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree |= {f"{role}_token_id": getattr(settings, f"{role}_token_id") for role in ("bos", "eos")}
    if rope := tree.get("rope_parameters"):
        tree["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        tree["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def fitting(spec: Any) -> list[str]:
    """The public layouts that can say all of a model."""
    from models.convert import LAYOUTS

    found = []
    for name, layout in LAYOUTS.items():
        with suppress(ConfigError):
            layout.config_of(spec)
            found.append(name)
    return found


def returns_equal(layout: str, written: Any, model: Any) -> None:
    """Whether a model in a public layout reads back as ours, bit for bit. Raises InputError."""
    import torch

    from models.convert import LAYOUTS

    ours, back = model.state_dict(), LAYOUTS[layout].from_layout(written).state_dict()
    for name, tensor in ours.items():
        if not torch.equal(back[name], tensor):
            raise InputError(f"{name} does not come back from the {layout} layout as it was")
    for name in set(back) - set(ours):  # biases that the layout has and ours does not
        if back[name].any():
            raise InputError(f"the {layout} layout would add {name} to the model")


def note(config: ExportConfig, source: Source, out: Path) -> None:
    """The card and the record as artifacts of the run's MLflow run."""
    from pipelines.lib.tracking import Tracker

    if config.track == "none" or source.run is None:
        return
    with Tracker.attach(source.run) as tracker:
        for name in ("README.md", RECORD):
            tracker.artifact(out / name, f"export/{out.name}")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    bare = [word for word in words[:2] if "=" not in word and not word.startswith("-")]
    if len(bare) == 2:
        words[1] = f"out={words[1]}"
    return command(ExportConfig, run, words, positional="run")


if __name__ == "__main__":
    from pipelines.export import main  # so that classes have their importable names

    sys.exit(main())
