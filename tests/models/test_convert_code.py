"""A model's code as flat files: nothing of ours is imported any more, and what a user wrote travels too."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import dynamic_module_utils as dynamic

from models.convert.code import closure, read_source, rewritten, write_code
from models.families import create, preset
from models.parts.attention import Attention, Causal
from models.parts.mlp import MLP, Plain
from models.parts.norm import Norm
from models.parts.position import NoPosition
from models.spec import ConfigError, fields, part_of

TINY = dataclasses.replace(preset("tiny"), vocab_size=61)


HELPER = """import math


def scale(x):
    return math.sqrt(0.25) * x


class Halved:
    pass
"""
PARTS = """from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from models.parts.norm import Norm, RMSNorm
from travelling_lab import helper as other
from travelling_lab.helper import (
    Halved,
    scale,  # with a comment
)

if TYPE_CHECKING:
    from models.loss import Loss


class Module(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        assert other.Halved is Halved
        return scale(self.norm(x))


@dataclass(frozen=True)
class Half(RMSNorm):
    def build(self, d, bias):
        return Module(super().build(d, bias))


Norm.kinds["travelling_half"] = Half
"""


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies a folder's code to, for this test alone."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def saved(model, folder):
    model.save_pretrained(folder)
    write_code(model, folder)
    return folder


def opened(folder):
    """The folder's model by the folder's own classes, whatever this process has registered."""
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    config = dynamic.get_class_from_dynamic_module(names["AutoConfig"], str(folder)).from_pretrained(folder)
    model_class = dynamic.get_class_from_dynamic_module(names["AutoModelForCausalLM"], str(folder))
    return model_class.from_pretrained(folder, config=config).eval()


def imported(text):
    """Top-level packages that a file imports, its neighbours left out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def user_package(folder, monkeypatch, name, **files):
    """A package that is importable for this test."""
    (folder / name).mkdir(parents=True)
    for stem, text in {"__init__": "", **files}.items():
        (folder / name / f"{stem}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


@torch.no_grad()
def test_the_folder_opens_where_triton_and_numba_are_not(tmp_path):
    """transformers looks for the packages of every import outside `try`: one below `if` would ask for Triton."""
    model = create(TINY).eval()
    folder = saved(model, tmp_path / "hf")
    code = f"""import sys
sys.modules.update(triton=None, numba=None)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in ("triton", "numba") else find(name, *a)
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.arange(9)[None]
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})"""
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(torch.arange(9)[None]).logits)


@torch.no_grad()
def test_the_folder_s_own_classes_give_the_same_logits_and_import_nothing_of_ours(tmp_path, modules_cache):
    model = create(TINY).eval()
    folder = saved(model, tmp_path / "hf")
    files = sorted(folder.glob("*.py"))
    for path in files:
        compile(path.read_text(), path, "exec")
        # Triton may be absent: kernels import it inside `try`.
        assert set(imported(path.read_text())) <= {"torch", "transformers", "triton", *sys.stdlib_module_names}
        assert '"novella::' not in path.read_text(), "a name that would take this package's operations away"
    again = opened(folder)
    assert type(again) is not type(model) and type(again).__module__.startswith("transformers_modules.")
    assert all(
        sys.modules[base.__module__].__name__.startswith(("transformers", "torch", "builtins"))
        for base in type(again).__mro__
    )
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def test_what_is_saved_again_by_a_stranger_still_stands_alone(tmp_path, modules_cache):
    folder = saved(create(TINY), tmp_path / "hf")
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    again = opened(folder)
    type(again.config).register_for_auto_class()  # as from_pretrained of the auto classes does
    type(again).register_for_auto_class("AutoModelForCausalLM")
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["auto_map"] == names
    for path in folder.glob("*.py"):
        assert (tmp_path / "again" / path.name).read_text() == path.read_text()
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(opened(tmp_path / "again")(ids).logits, again(ids).logits)


def test_config_and_model_share_one_copy_of_every_part(tmp_path, modules_cache):
    """Two copies would make `isinstance` fail between what a config holds and what a model's code knows."""
    again = opened(saved(create(TINY), tmp_path / "hf"))
    packages = {type(x).__module__.rpartition(".")[0] for x in (again, again.config, again.spec, again.spec.norm)}
    assert len(packages) == 1


def one_part_each():
    """TINY with one part exchanged: every kind of every registry, those inside attention and MLP included."""
    base = dataclasses.replace(TINY, d_model=16, attention=Causal(n_heads=4), mlp=Plain(hidden=24), vocab_size=31)
    yield "preset", dataclasses.replace(preset("hypersphere_tiny"), vocab_size=31)
    for owner, change in (
        (base, lambda name, part: {name: part}),
        (base.attention, lambda name, part: {"attention": dataclasses.replace(base.attention, **{name: part})}),
        (base.mlp, lambda name, part: {"mlp": dataclasses.replace(base.mlp, **{name: part})}),
    ):
        for name, (annotation, _) in fields(type(owner)).items():
            registry = part_of(annotation)
            for kind, cls in registry.kinds.items() if registry else ():
                for place in ({}, {"position": NoPosition()}):  # not every mixer has queries to turn
                    with contextlib.suppress(ConfigError, TypeError):  # or has an option without a default
                        part = getattr(cls, "small", cls)()
                        yield f"{name}={kind}", dataclasses.replace(base, **place, **change(name, part))
                        break


@torch.no_grad()
def test_every_registered_part_computes_the_same_in_the_folder_s_own_classes(tmp_path, modules_cache):
    """One folder's files serve for all of them: registries list every kind, so its module travels."""
    again = opened(saved(create(TINY), tmp_path / "hf"))
    theirs, their_config = type(again), type(again.config)
    ids = torch.randint(0, 31, (2, 11))
    seen = set()
    for name, spec in one_part_each():
        torch.manual_seed(0)
        model = create(spec).eval()
        tree = json.loads(model.config.to_json_string())
        copy = theirs(their_config(**{k: v for k, v in tree.items() if k in their_config.family.__dataclass_fields__}))
        copy.load_state_dict(model.state_dict())
        assert torch.equal(copy.eval()(ids).logits, model(ids).logits), name
        seen.add(name)
    kinds = {f"{n}={k}" for n, r in (("norm", Norm), ("mlp", MLP), ("attention", Attention)) for k in r.kinds}
    assert kinds <= seen and len(seen) > 50


@torch.no_grad()
def test_a_user_s_family_travels_without_its_registration(tmp_path, modules_cache):
    from tests.made_up import Looped

    model = create(Looped(vocab_size=61)).eval()
    folder = saved(model, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_test_looped.LoopedConfig",
        "AutoModelForCausalLM": "modeling_test_looped.LoopedForCausalLM",
    }
    text = (folder / "tests_made_up.py").read_text()
    assert "register" not in text and not (folder / "models_families.py").exists()
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(opened(folder)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_user_s_part_travels_with_its_helpers_and_is_known_when_the_config_is_built(
    tmp_path, modules_cache, monkeypatch
):
    user_package(tmp_path / "lab", monkeypatch, "travelling_lab", helper=HELPER, parts=PARTS)
    from models.parts.norm import Norm

    half = importlib.import_module("travelling_lab.parts").Half
    try:
        model = create(dataclasses.replace(TINY, norm=half())).eval()
        folder = saved(model, tmp_path / "hf")
        ids = torch.randint(0, 61, (2, 9))
        want = model(ids).logits
    finally:
        del Norm.kinds["travelling_half"]
    assert {"travelling_lab_parts.py", "travelling_lab_helper.py"} <= {p.name for p in folder.glob("*.py")}
    assert not (folder / "models_loss.py").exists()
    assert torch.equal(opened(folder)(ids).logits, want)


def test_imports_that_others_may_not_have_are_guarded_and_ours_are_rewritten(tmp_path, monkeypatch):
    text = (
        "import json, math\n"
        "def f():\n"
        "    import absent_package as ap\n"
        "    é = 'é'; from travelling.b import (x,\n        y as z); é += x\n"
        "    return ap\n"
        "try:\n    import absent_too\nexcept ImportError:\n    absent_too = None\n"
        "from . import b\n"
    )
    user_package(tmp_path, monkeypatch, "travelling", a=text, b="x = y = 1\n")
    sources = closure(["travelling.a"])
    assert set(sources) == {"travelling.a", "travelling.b"}
    out = rewritten(sources["travelling.a"], set(sources))
    assert dynamic.get_imports(str(_file(tmp_path / "out.py", out))) == ["json", "math"]
    assert "    é = 'é'; from .travelling_b import x, y as z; é += x\n" in out and "import absent_package as ap" in out
    assert "from . import travelling_b as b" in out
    assert set(dynamic.get_relative_imports(tmp_path / "out.py")) == {"travelling_b"}


def test_an_import_that_cannot_be_followed_is_named_with_its_line(tmp_path, monkeypatch):
    user_package(tmp_path, monkeypatch, "travelling_wrong", a="import os\nimport models.spec\n")
    with pytest.raises(ConfigError, match=r"a\.py line 2: write `from models.spec import"):
        read_source("travelling_wrong.a")
    user_package(tmp_path, monkeypatch, "travelling_too", a="def f():\n    x = 1; import absent_package\n")
    with pytest.raises(ConfigError, match=r"travelling_too\.a line 2: give this import a line of its own"):
        rewritten(read_source("travelling_too.a"), {"travelling_too.a"})
    with pytest.raises(ConfigError, match="typed_in has no source file"):
        read_source("typed_in")


def _file(path, text):
    path.write_text(text)
    return path
