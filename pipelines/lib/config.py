"""One vocabulary for every stage: recipe files with `base`, dotted overrides, --help and errors, from the dataclasses.

A stage calls `command(StageConfig, run)`. Words on its command line are laid over each other from left to right:
a recipe (a path, or a name in pipelines/recipes/), then `key=value` or `--key value` with dotted keys.
"""

from __future__ import annotations

import dataclasses as dc
import inspect
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from models.spec import ConfigError, Part, Raw, build, fields, kind_of, near, part_of, plain

FORMAT_VERSION = 1  # of a resolved config, as written beside every output; a later version adds a migration here
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


class InputError(Exception):
    """Input that cannot be used (a file, a folder, data, a machine): the message says what, where and what would do."""


class Yaml(yaml.SafeLoader):
    """YAML 1.2 scalars: 6e-3 is a number; `no`, 0123 and 12:30 are the words they look like. A key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Yaml.yaml_implicit_resolvers = {
    first: [r for r in resolvers if r[0] == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str, where: str = "") -> Any:
    """Parse YAML 1.2 text. Raises InputError with the line of the fault."""
    try:
        return yaml.load(text, Yaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{where or 'YAML'}{line}: {getattr(error, 'problem', None) or error}") from None


def write_yaml(tree: Any, inline: bool = False) -> str:
    """Plain data as YAML that `read_yaml` reads back equal. inline: lists and mappings of scalars in one line each."""
    flow = None if inline else False
    return yaml.dump(tree, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow, Dumper=_Dumper)


def as_word(value: Any) -> str:
    """A plain value as it is typed behind `key=`: text as it is, all else as YAML in one line."""
    if isinstance(value, str):
        return value
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": True, "width": 1 << 30}
    return yaml.dump(value, Dumper=_Dumper, **style).removesuffix("\n").removesuffix("\n...")


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # libyaml's, where it is there
    """Writes what `Yaml` reads back: floats with a point or exponent, words that look like numbers quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = Yaml.yaml_implicit_resolvers


def overlay(old: Any, new: Any) -> Any:
    """`new` laid over `old`: mappings of the same kind of part merge; another kind, a list or a value replaces."""
    if isinstance(old, str) and isinstance(new, dict) and not isinstance(old, Raw) and new.get("kind", old) == old:
        return {"kind": old, **new}  # options for a part that was named only
    if not isinstance(old, dict) or not isinstance(new, dict):
        if isinstance(old, dict) and isinstance(new, str) and old.get("kind", new) == new:
            return {"kind": str(new), **old}  # `norm.eps=1e-5 norm=rmsnorm`: the options may come first
        return new
    if new.get("kind", old.get("kind")) != old.get("kind"):
        return new
    return {**old, **{k: overlay(old.get(k), v) for k, v in new.items()}}


def recipe(name: str | Path, folder: Path = RECIPES, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a recipe file, laid over its `base`. name: a path, or the name of a file in `folder`."""
    path = Path(name)
    if not path.is_file():
        path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise InputError(f"no recipe {str(name)!r}: neither a file nor a name in {folder.name}/{near(name, known)}")
    path = path.resolve()
    if path in seen:
        raise InputError(f"recipe {path.name}: its `base` leads back to itself")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except UnicodeDecodeError:
        raise InputError(f"recipe {path}: not UTF-8 text") from None
    if not isinstance(tree, dict):
        raise InputError(f"recipe {path}: a mapping is needed")
    version = tree.pop("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: config of format_version {version}; this program reads {FORMAT_VERSION}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / f"{base}.yaml"
    return overlay(recipe(beside if beside.is_file() else base, folder, (*seen, path)), tree)


def scalar(text: str) -> Any:
    """A value as typed on the command line: YAML, with the text kept for fields that are text.

    Quoted text with a backslash is what YAML makes of it (`source.separator="\\n\\n"`). Only `null`, `~` and nothing
    are null: a line break or `---`, which YAML reads as no value, are the text they are.
    """
    try:
        value = yaml.load(text, Yaml)
    except yaml.YAMLError:
        return text  # `--prompt "Once: upon"` is text, not YAML
    if value is None and text.lower() not in ("", "~", "null"):
        return text
    if isinstance(value, str) and text[:1] == text[-1:] == '"' and "\\" in text:
        return value
    return Raw(text, value) if not isinstance(value, (dict, list, str)) else (text if isinstance(value, str) else value)


def override(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`a.b.c` = value laid over the tree."""
    for word in reversed(key.split(".")):
        value = {word: value}
    return overlay(tree, value)


def defaults_under(cls: type, tree: dict[str, Any]) -> dict[str, Any]:
    """Give the options of a default part a place to land: `norm.eps=1e-5` keeps the default norm's kind."""
    out = dict(tree)
    for name, (tp, f) in fields(cls).items():
        if not isinstance(out.get(name), dict):
            continue
        default = f.default if f.default is not dc.MISSING else None
        if f.default_factory is not dc.MISSING:
            default = f.default_factory()
        base = part_of(tp)
        if base is not None and isinstance(default, Part) and "kind" not in out[name]:
            out[name] = {"kind": kind_of(default), **out[name]}
        inner: Any = tp if dc.is_dataclass(tp) else None
        if base is not None:
            inner = base.kinds.get(str(out[name].get("kind")))
        if inner is not None and dc.is_dataclass(inner):
            out[name] = {
                **({"kind": out[name]["kind"]} if "kind" in out[name] else {}),
                **defaults_under(typing.cast(type, inner), {k: v for k, v in out[name].items() if k != "kind"}),
            }
    return out


def assemble(words: Sequence[str], cls: type, positional: str | None = None) -> Any:
    """Command-line words -> a config of type `cls`. positional: the field that a bare word fills (else: a recipe)."""
    tree: dict[str, Any] = {}
    names = fields(cls)
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word.startswith("--"):
            key, given, value = word[2:].partition("=")
            key = key.replace("-", "_")
            is_switch = key in names and names[key][0] is bool
            if not given:
                follows = queue[0] if queue else None
                if is_switch and follows not in ("true", "false"):
                    value = "true"
                elif follows is None:
                    raise ConfigError(f"--{key} needs a value")
                else:
                    value = queue.pop(0)
        elif re.match(r"[A-Za-z_][\w.\[\]]*=", word):
            key, _, value = word.partition("=")
        elif positional is not None and positional not in tree and not word.endswith((".yaml", ".yml")):
            key, value = positional, word
        else:
            key, value = "recipe", word
        if key == "recipe" and (value is word or "recipe" not in names):
            laid = recipe(value, getattr(cls, "RECIPES", RECIPES))
            for name in getattr(cls, "BESIDE", ()):
                beside = Path(value).parent / str(laid.get(name))
                if Path(value).is_file() and beside.is_file():
                    laid = {**laid, name: str(beside.resolve())}
            tree = overlay(one_of(cls, tree, laid), laid)
            continue
        parsed: Any = scalar(value)
        tp = names[key][0] if key in names else None
        is_list = value.startswith("[") and any(
            typing.get_origin(t) in (list, tuple) for t in (tp, *typing.get_args(tp))
        )
        if _takes_text(tp) and not is_list and value not in ("null", "~"):
            parsed = value  # `--prompt "Once: upon"` is text, whatever YAML would make of it
        if key in tree and _is_repeatable(tp) and not isinstance(parsed, list):
            parsed = [*(tree[key] if isinstance(tree[key], list) else [tree[key]]), parsed]
        tree = override(one_of(cls, tree, {key: parsed}), key, parsed)
    return build(cls, defaults_under(cls, tree))


def one_of(cls: type, tree: dict[str, Any], laid: dict[str, Any]) -> dict[str, Any]:
    """Drop from `tree` what `laid` replaces though it has another name: `seconds=20` over a recipe's `steps`."""
    dropped = {
        name
        for group in getattr(cls, "ONE_OF", ())
        if any(laid.get(k) is not None and getattr(laid[k], "value", 0) is not None for k in group)
        for name in group
        if name not in laid
    }
    return {k: v for k, v in tree.items() if k not in dropped}


def _takes_text(tp: Any) -> bool:
    union = typing.get_origin(tp) in (types.UnionType, typing.Union)
    return tp is str or _is_repeatable(tp) or (union and str in typing.get_args(tp) and part_of(tp) is None)


def _is_repeatable(tp: Any) -> bool:
    """`--prompt a --prompt b` collects in a field of type tuple[str, ...]."""
    return typing.get_origin(tp) in (list, tuple) and typing.get_args(tp)[0] is str


def describe(
    cls: type, at: str = "", positional: str | None = None, chosen: typing.Mapping[str, str] | None = None
) -> list[str]:
    """The lines of --help: dotted key, default, choices and the docstring's words for every field.

    chosen: kinds of parts to describe instead of the default ones, by dotted key.
    """
    chosen = chosen or {}
    said: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        said.update(re.findall(r"^\s*(\w+): (.+)$", inspect.cleandoc(ancestor.__dict__.get("__doc__") or ""), re.M))
    lines = []
    for name, (tp, f) in fields(cls).items():
        default: Any = f.default if f.default is not dc.MISSING else None
        if f.default_factory is not dc.MISSING:
            default = f.default_factory()
        required = _is_required(f)
        base = part_of(tp)
        if dc.is_dataclass(tp) and base is None:
            if name in said:
                lines.append(f"  {at + name + '.':38} {said[name]}")
            lines += describe(typing.cast(type, tp), f"{at}{name}.", chosen=chosen)
            continue
        kind = base.kinds.get(chosen.get(at + name, "")) if base is not None else None
        if kind is not None and not any(_is_required(f) for _, f in fields(kind).values()):
            default, required = kind(), False
        shown = kind_of(default) if isinstance(default, Part) else ("(required)" if required else plain(default))
        text = said.get(name, "")
        if base is not None:
            text = f"{text} [{', '.join(base.kinds)}]".strip()
        elif typing.get_origin(tp) is typing.Literal:
            text = f"{text} [{', '.join(map(str, typing.get_args(tp)))}]".strip()
        if name == positional:
            text += "  (may stand without its name)"
        if shown is None or isinstance(shown, bool):
            shown = {None: "null", True: "true", False: "false"}[shown]
        lines.append(f"  {at + name + '=' + str(shown):38} {text}".rstrip())
        if isinstance(default, Part) and dc.is_dataclass(default):
            lines += describe(type(default), f"{at}{name}.", chosen=chosen)
        if base is not None:
            lines += _other_kinds(base, type(default), at + name)
    return lines


def _is_required(f: dc.Field) -> bool:
    return f.default is dc.MISSING and f.default_factory is dc.MISSING


def _other_kinds(base: type[Part], but: type, at: str) -> list[str]:
    """One line of --help for each kind that is not the default: its options with their defaults."""
    lines = []
    for kind, cls in base.kinds.items():
        if cls is but or not fields(cls):
            continue
        options = []
        for name, (_, f) in fields(cls).items():
            default = f.default_factory() if f.default_factory is not dc.MISSING else f.default
            shown = (
                "..." if default is dc.MISSING else kind_of(default) if isinstance(default, Part) else plain(default)
            )
            shown = as_word(shown) if isinstance(shown, list) else shown
            options.append(
                f"{name}: {'null' if shown is None else str(shown).lower() if isinstance(shown, bool) else shown}"
            )
        lines.append(f"    or {at}={{kind: {kind}, {', '.join(options)}}}")
    return lines


def usage(
    cls: type,
    positional: str | None = None,
    program: str | None = None,
    estimates: bool = False,
    words: Sequence[str] = (),
) -> str:
    """The whole of --help for a stage. program: the module that users run; its docstring comes first.

    estimates: whether it takes --estimate.  words: the others on the command line: `rule=greedy` describes that kind.
    """
    chosen = {key: kind for key, given, kind in (word.partition("=") for word in words) if given}
    program = program or cls.__module__
    stage = sys.modules[program]
    word = f"{positional.upper()} " if positional else ""
    head = inspect.cleandoc(stage.__doc__ or cls.__doc__ or "")
    recipes = "RECIPE.yaml " if not positional else ""
    call = f"python -m {program} {word}{recipes}key=value ... {'[--estimate] ' if estimates else ''}[--debug]"
    says = "--estimate only says what it would take: tokens, memory, disk, time and, with price_per_hour=, money"
    return "\n".join(
        [
            head,
            "",
            call,
            *([says] if estimates else []),
            "",
            "settings and defaults:",
            *describe(cls, positional=positional, chosen=chosen),
        ]
    )


def command(
    cls: type,
    run: Callable[[Any], Any],
    argv: Sequence[str] | None = None,
    positional: str | None = None,
    estimate: Callable[[Any], Any] | None = None,
) -> int:
    """A stage as a command: parse, run, and turn bad input into one line and exit code 2 (--debug: a traceback).

    estimate: from the config to a pipelines.lib.estimate.Estimate, which --estimate shows instead of running.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        if {"-h", "--help"} & set(words):
            program = run.__module__ if run.__module__ in sys.modules else None
            print(usage(cls, positional, program, estimate is not None, words), flush=True)
            return 0
        if "--estimate" in words:
            return _estimate([w for w in words if w != "--estimate"], cls, positional, estimate)
        outcome = run(assemble(words, cls, positional))
    except (ConfigError, InputError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError, FileNotFoundError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return outcome if isinstance(outcome, int) and not isinstance(outcome, bool) else 0


def _estimate(words: Sequence[str], cls: type, positional: str | None, estimate: Callable[[Any], Any] | None) -> int:
    """Show what a command would take."""
    from pipelines.lib.estimate import show
    from pipelines.lib.prices import take

    if estimate is None:
        raise ConfigError("--estimate: there is none for this command")
    prices, words = take(words)
    prices.chosen()  # before seconds are spent on measuring
    show(estimate(assemble(words, cls, positional)), prices)
    return 0
