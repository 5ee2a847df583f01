"""The tree: what may import what, what a file may name, what is there for a newcomer."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "models", "pipelines", "serving")
# A folder of one machine: somebody's home (but not that of a container's or cloud image's user), a CI workspace.
MACHINE = re.compile(r"(?<![\w.~$}/-])/(?:root|Users/\w+|home/(?!ray\b|ubuntu\b)\w+|work|workspace)(?:/|\b)")


def tracked(*endings):
    """The project's files; from git where there is a checkout, else by a walk past what git would ignore."""
    answer = subprocess.run(["git", "-C", REPO, "ls-files"], capture_output=True, text=True)
    if answer.returncode == 0 and answer.stdout:
        files = [REPO / name for name in answer.stdout.splitlines()]
    else:
        tops = [*(REPO / top for top in (*PACKAGES, "tests", "benchmarks", "tune_spaces")), REPO / ".ci"]
        files = [*(p for top in tops for p in top.rglob("*")), *REPO.iterdir()]
    return [p for p in files if p.is_file() and (not endings or p.suffix in endings or p.name in endings)]


def imports(path):
    """The top-level modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_kernels_and_models_import_without_ray_mlflow_and_datasets():
    code = f"""import sys, pkgutil, importlib
sys.path.insert(0, {str(REPO)!r})
sys.modules.update(ray=None, mlflow=None, datasets=None)          # any import of these now fails
count = 0
for name in ("kernels", "models"):
    for m in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(m.name)
        count += 1
assert count
print(count)"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_mlflow_is_imported_in_one_file_and_ray_in_few():
    where = {"mlflow": set(), "ray": set()}
    for package in PACKAGES:
        for path in (REPO / package).rglob("*.py"):
            for name in set(imports(path)) & set(where):
                where[name].add(path.relative_to(REPO).as_posix())
    assert where["mlflow"] == {"pipelines/lib/tracking.py"}
    assert where["ray"] == {
        "pipelines/lib/cluster.py",  # starts or joins Ray
        "pipelines/lib/launch.py",  # Ray Train
        "pipelines/lib/search/executor.py",  # Ray Tune
        "pipelines/lib/core/workers.py",  # Ray tasks
        "pipelines/lib/contamination.py",  # Ray Data
        "pipelines/tokenize.py",  # Ray Data
        "pipelines/demo.py",  # Ray Serve, for one request
        "serving/app.py",  # Ray Serve
    }


def test_import_linter_holds_the_rule_and_knows_every_package():
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert set(settings["root_packages"]) == set(PACKAGES)
    forbidden = {(s, f) for c in settings["contracts"] for s in c["source_modules"] for f in c["forbidden_modules"]}
    for pair in (
        ("kernels", "models"),
        ("kernels", "pipelines"),
        ("models", "pipelines"),
        ("models", "ray"),
        ("models", "mlflow"),
        ("models", "datasets"),
        ("kernels", "ray"),
        ("pipelines", "mlflow"),
        ("serving.engine", "ray"),
    ):
        assert pair in forbidden


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_starts_nothing(package, tmp_path):
    """No folder made, no Ray session, no MLflow run: everything of that kind happens in functions."""
    code = f"""
import importlib, os, pkgutil, sys
package = importlib.import_module({package!r})
names = [m.name for m in pkgutil.walk_packages(package.__path__, {package!r} + ".") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert not os.listdir("."), os.listdir(".")
assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)})


def test_no_file_names_a_path_of_one_machine():
    """Absolute paths under somebody's home, and hosts that only one network has."""
    found = []
    for path in tracked(".py", ".md", ".toml", ".yaml", ".yml", ".txt", "Makefile", "run", ".rayignore", ".gitignore"):
        if path == Path(__file__).resolve():
            continue  # holds the pattern itself
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE.search(line):
                found.append(f"{path.relative_to(REPO)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_the_machine_path_pattern_finds_one():
    home = "/" + "home/somebody/novella"
    assert MACHINE.search(f'open("{home}/data")') and MACHINE.search("cd /" + "root/x")
    assert not MACHINE.search("/mnt/storage") and not MACHINE.search("a/work/b") and not MACHINE.search("~/novella")


def test_a_newcomer_finds_the_two_commands_and_the_licence():
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.M))
    assert {"demo", "test", "ui", "lint"} <= targets
    assert (REPO / "LICENSE").read_text().startswith("MIT License")
    assert os.access(REPO / ".ci" / "run", os.X_OK)


def test_make_reinstalls_only_when_pyproject_has_changed(tmp_path):
    """A dry run of make over a copy with the stamps in place: nothing, then pip after a change."""
    (tmp_path / "Makefile").write_text((REPO / "Makefile").read_text())
    project = tmp_path / "pyproject.toml"
    project.write_text("")
    os.utime(project, (1, 1))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("")
    os.utime(python, (1, 1))
    for stamp in (".installed", ".installed-dev"):
        (tmp_path / ".venv" / stamp).write_text("")
    plan = lambda target: subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "pip install" not in plan("demo") + plan("test") + plan("ui")
    os.utime(project)
    os.utime(project, (2**32, 2**32))
    assert "pip install" in plan("demo") and ".[dev]" in plan("test") and ".[dev]" not in plan("demo")


def test_every_test_that_keeps_a_fault_out_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (REPO / "docs" / "faults.md").read_text())
    assert len(named) > 80
    lost = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (REPO / path).read_text()]
    assert not lost
