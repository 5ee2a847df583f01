"""A model's own code as flat Python files, which transformers runs for `trust_remote_code=True`.

transformers copies the file that `auto_map` names, and from there whatever a line `from .NAME import` leads to; all of
them lie side by side. So each module that the model needs becomes one file (models.parts.norm: models_parts_norm.py)
with its imports of our modules rewritten. What a model needs is found by walking the imports from its classes and from
the classes of its parts, so kernels, and families and parts of a user's own modules, travel too.

`auto_map` names the classes of one more file, modeling_*.py. transformers loads each file that it names, with all that
lies below, as a package of its own: a config and a model from two files would have two copies of every part, and no
`isinstance` would hold between them.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from models.spec import ConfigError

OWN = ("models", "kernels")
REGISTRY = "models.families"  # knows every family and is of no use to one; calls of its functions are left out
# What stands beside transformers wherever it runs. Any other package may be absent, so its import is guarded.
BESIDE = frozenset("torch transformers numpy safetensors tokenizers huggingface_hub packaging regex tqdm yaml".split())


class Import(NamedTuple):
    """One import statement.  module: its target, absolute.  names: (name, as) of `from module import ...`.

    own: whether it is a module that travels.  at_once: run when its file is imported, so outside functions.
    typing: only for type checkers.  guarded: inside `try`.
    """

    node: ast.Import | ast.ImportFrom
    module: str
    names: tuple[tuple[str, str | None], ...]
    own: bool
    at_once: bool
    typing: bool
    guarded: bool


@dataclass(frozen=True)
class Source:
    """One of our modules as it stands on the disk."""

    name: str
    text: str
    imports: tuple[Import, ...]
    dropped: tuple[ast.stmt, ...]

    @property
    def needs(self) -> set[str]:
        """Our modules without which it does not run."""
        return {m for i in self.imports if i.own and not i.typing for m in modules_of(i)}

    @property
    def needs_at_once(self) -> set[str]:
        return {m for i in self.imports if i.own and i.at_once and not i.typing for m in modules_of(i)}


def write_code(model: nn.Module, folder: Path) -> list[str]:
    """Write the code of a model into a folder and name it in the folder's config.json. Returns the modules written.

    Raises ConfigError, which names file and line, for an import that cannot be followed.
    """
    config: Any = model.config
    config_class, model_class = type(config), type(model)
    parts = set(part_modules(config.spec))
    roots = {config_class.__module__, model_class.__module__}
    sources = closure({*roots, *parts, *(type(m).__module__ for m in model.modules())})
    for name, source in sources.items():
        (folder / f"{flat(name)}.py").write_text(header(name) + rewritten(source, set(sources)), encoding="utf-8")
    known = reachable(roots, sources)
    register = [module for module in sources if module in parts and module not in known]
    first = entry(config_class, model_class, register)
    name = f"modeling_{config.model_type}"
    (folder / f"{name}.py").write_text(first, encoding="utf-8")
    auto_map = {
        "AutoConfig": f"{name}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{name}.{model_class.__name__}",
    }
    path = folder / "config.json"
    tree = {**json.loads(path.read_text(encoding="utf-8")), "auto_map": auto_map}
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return list(sources)


def entry(config_class: type, model_class: type, register: Iterable[str]) -> str:
    """The file that `auto_map` names. Its classes are its own, so that saving again names this file, too.

    register: modules that nothing else imports, and whose import makes a kind of part known.
    """
    lines = [
        f'"""{model_class.__name__} and its config, for transformers\' auto classes; the files beside are imported."""',
        "",
        f"from .{flat(config_class.__module__)} import {config_class.__name__} as Config",
        f"from .{flat(model_class.__module__)} import {model_class.__name__} as Model",
        *(f"from .{flat(module)} import __name__ as _{flat(module)}" for module in register),
        "",
        "",
        f"class {config_class.__name__}(Config):",
        "    __doc__ = Config.__doc__",
        "",
        "",
        f"class {model_class.__name__}(Model):",
        "    __doc__ = Model.__doc__",
        f"    config_class = {config_class.__name__}",
        "",
    ]
    return "\n".join(lines)


def flat(module: str) -> str:
    return module.replace(".", "_")


def header(module: str) -> str:
    try:
        version = importlib.metadata.version("novella")
    except importlib.metadata.PackageNotFoundError:
        version = "from source"
    return f"# {module} of Novella {version} (MIT License), written by its export; imports point to the files beside.\n"


# ---- which modules a model needs


def part_modules(value: Any) -> Iterator[str]:
    """The modules in which a spec's parts, their options' parts and so on are defined."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from part_modules(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__module__
        for field in dataclasses.fields(value):
            yield from part_modules(getattr(value, field.name))


def is_own(module: str) -> bool:
    """Whether a module travels: ours, or one of a user's that is not installed as a package."""
    top = module.partition(".")[0]
    if top in OWN:
        return True
    if top in sys.stdlib_module_names or top in BESIDE or top == "__main__":
        return False
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    places = spec.submodule_search_locations or [spec.origin or "site-packages"]
    return not any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places)


def closure(roots: Iterable[str]) -> dict[str, Source]:
    """All our modules that the roots import, directly or not, in the order of their names."""
    found: dict[str, Source] = {}
    todo = sorted(set(roots))
    while todo:
        name = todo.pop()
        if name in found or not is_own(name) or name == REGISTRY:
            continue
        found[name] = read_source(name)
        todo += sorted(found[name].needs)
    return dict(sorted(found.items()))


def reachable(roots: Iterable[str], sources: dict[str, Source]) -> set[str]:
    """What is imported when the roots are, functions not run."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        if (at := todo.pop()) in sources and at not in found:
            found.add(at)
            todo += sources[at].needs_at_once
    return found


def modules_of(statement: Import) -> list[str]:
    """The modules an import opens: its target, and what it takes from it that is itself a module."""
    if isinstance(statement.node, ast.Import):
        return [name for name, _ in statement.names]
    below = [f"{statement.module}.{name}" for name, _ in statement.names]
    inside = [name for name in below if is_module(name)]
    return inside if len(inside) == len(below) else [statement.module, *inside]


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def read_source(name: str) -> Source:
    """Raises ConfigError for a module without a source file, as one typed into a notebook."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"{name} has no source file to export; put its classes into a module of their own")
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    imports = tuple(find_imports(tree, package))
    for found in imports:
        if found.own and isinstance(found.node, ast.Import) and not found.typing:
            for module, alias in found.names:
                if alias is None and "." in module:
                    raise ConfigError(f"{spec.origin} line {found.node.lineno}: write `from {module} import ...`")
    return Source(name, text, imports, tuple(registry_calls(tree, imports)))


def find_imports(
    node: ast.AST, package: str, at_once: bool = True, typing: bool = False, guarded: bool = False
) -> Iterator[Import]:
    """Every import below a node."""
    if isinstance(node, ast.Import):
        names = tuple((alias.name, alias.asname) for alias in node.names)
        own = any(is_own(name) for name, _ in names)
        yield Import(node, names[0][0], names, own, at_once, typing, guarded)
    elif isinstance(node, ast.ImportFrom):
        target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        names = tuple((alias.name, alias.asname) for alias in node.names)
        yield Import(node, target, names, is_own(target), at_once, typing, guarded)
    at_once = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    guarded = guarded or isinstance(node, ast.Try)
    body = node.body if isinstance(node, ast.If) and for_type_checkers(node.test) else []
    for child in ast.iter_child_nodes(node):
        yield from find_imports(child, package, at_once, typing or child in body, guarded)


def for_type_checkers(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"


def registry_calls(tree: ast.Module, imports: Iterable[Import]) -> Iterator[ast.stmt]:
    """Statements that tell the registry of families about a family, which a folder with one family does not need."""
    called = {alias or name for i in imports if i.module == REGISTRY for name, alias in i.names}
    for statement in tree.body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in called:
            yield statement


# ---- how a module reads in the folder


def rewritten(source: Source, present: set[str]) -> str:
    """The module's text with its imports pointing to the files beside it. Raises ConfigError for one it cannot part."""
    changes: dict[ast.stmt, str] = dict.fromkeys(source.dropped, "pass")
    for statement in source.imports:
        if statement.own:
            changes[statement.node] = own_import(statement, present)
        elif not (statement.guarded or statement.typing or tops(statement) <= BESIDE | sys.stdlib_module_names):
            changes[statement.node] = guarded_import(statement.node)
    lines = source.text.encode().splitlines(keepends=True)  # columns of the syntax tree count bytes
    for node, text in sorted(changes.items(), key=lambda item: (-item[0].lineno, -item[0].col_offset)):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        if "\n" in text and before.strip():
            raise ConfigError(f"{source.name} line {node.lineno}: give this import a line of its own")
        indented = text.replace("\n", "\n" + " " * node.col_offset)
        gone = text == "pass" and not before and not after.strip()  # at the top of a file nothing need stand there
        lines[first : last + 1] = [] if gone else [before + indented.encode() + after]
    return b"".join(lines).decode()


def own_import(statement: Import, present: set[str]) -> str:
    """`from models.parts.norm import Norm` -> `from .models_parts_norm import Norm`; nothing for what stays behind."""
    lines = []
    attributes = []
    for name, alias in statement.names:
        module = name if isinstance(statement.node, ast.Import) else f"{statement.module}.{name}"
        if module in present:  # transformers' search for files knows only `from .NAME import`, hence two lines
            lines += [f"from .{flat(module)} import __name__ as _name"]
            lines += [f"from . import {flat(module)} as {alias or module.rpartition('.')[2]}"]
        elif statement.module in present and not isinstance(statement.node, ast.Import):
            attributes.append(f"{name} as {alias}" if alias else name)
    if attributes:
        words = f"from .{flat(statement.module)} import "
        joined = ", ".join(attributes)
        fits = len(words) + len(joined) + statement.node.col_offset <= 120
        lines.append(words + (joined if fits else "(\n    " + ",\n    ".join(attributes) + ",\n)"))
    return "\n".join(lines) or "pass"


def tops(statement: Import) -> set[str]:
    """The packages of an import that is not ours."""
    names = [n for n, _ in statement.names] if isinstance(statement.node, ast.Import) else [statement.module]
    return {name.partition(".")[0] for name in names}


def guarded_import(node: ast.stmt) -> str:
    """The same import, inside `try`: transformers refuses a folder at once whose bare imports are not installed."""
    return f"try:\n    {ast.unparse(node)}\nexcept ImportError:\n    raise"
