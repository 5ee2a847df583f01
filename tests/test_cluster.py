"""cluster.yaml: what Ray's own code accepts, and what this project promises of a cluster."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
FILE = REPO / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def prepared(cluster):
    """As `ray up` sees it: merged with Ray's defaults for AWS."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(cluster)


def test_ray_accepts_it(prepared):
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


def test_ray_refuses_a_mistake_in_it(prepared):
    """So that the test above means something."""
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config({**prepared, "idle_timeout": 5})
    types = {**prepared["available_node_types"], "data": {"resources": {"CPU": "many"}, "node_config": {}}}
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "available_node_types": types})


def test_nothing_idles_and_no_type_starves_another(prepared):
    types = prepared["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != prepared["head_node_type"]}
    assert set(workers) == {"data", "training"}
    assert all(kind["min_workers"] == 0 and kind["idle_timeout_s"] > 0 for kind in workers.values())
    assert prepared["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    assert prepared["idle_timeout_minutes"] > 0 and prepared["provider"]["cache_stopped_nodes"] is False
    assert types[prepared["head_node_type"]]["resources"]["CPU"] == 0


def test_every_node_asks_for_the_token_and_only_ssh_leads_in(cluster):
    options = " ".join(cluster["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in FILE.read_text()


def test_jobs_and_tracking_use_the_shared_storage(cluster):
    options = " ".join(cluster["docker"]["run_options"])
    assert "-v /mnt/storage:/mnt/storage" in options and "NOVELLA_STORAGE=/mnt/storage" in options
    assert "sqlite:////mnt/storage/mlflow.db" in " ".join(cluster["head_start_ray_commands"])
    assert "MLFLOW_TRACKING_URI=http://127.0.0.1:5000" in " ".join(cluster["docker"]["head_run_options"])


def test_its_ray_and_python_are_those_of_the_project(cluster):
    """One Ray on laptop and cluster, or `ray job submit` refuses; and extras that exist."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    low, high = re.search(r"ray\[[^\]]*\]>=([\d.]+),<([\d.]+)", " ".join(project["dependencies"])).groups()
    images = re.findall(r"rayproject/ray:([\d.]+)-py(\d)(\d+)", FILE.read_text())
    assert len(images) == 2
    as_number = lambda text: tuple(map(int, text.split(".")))
    for version, major, minor in images:
        assert as_number(low) <= as_number(version) < as_number(high)
        assert (int(major), int(minor)) >= as_number(re.search(r"[\d.]+", project["requires-python"])[0])
    commands = cluster["setup_commands"] + cluster["available_node_types"]["training"]["worker_setup_commands"]
    assert all(re.search(r"pip install .*-e (\.|'\.\[(\w+)\]')$", command) for command in commands)
    extras = re.findall(r"\.\[(\w+)\]", " ".join(commands))
    assert extras and set(extras) <= set(project["optional-dependencies"])


def test_every_number_has_its_reason():
    """A comment on the line of each number, or on the line above or below it."""
    lines = FILE.read_text().splitlines()
    bare = []

    def visit(node):
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
            at = node.start_mark.line
            if not any("#" in line for line in lines[at - 1 : at + 2]):
                bare.append(lines[at].strip())
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            for part in child if isinstance(child, tuple) else (child,):
                visit(part)

    visit(yaml.compose(FILE.read_text()))
    assert not bare


@pytest.mark.parametrize(
    "key", ["setup_commands", "head_start_ray_commands", "initialization_commands", "worker_start_ray_commands"]
)
def test_its_commands_are_shell(cluster, key):
    for command in cluster[key]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
