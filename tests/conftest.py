"""What tests share: one Ray session, the folder of real data, one OpenMP thread, nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP pools on two cores are far slower than one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # Ray Train lets one report through per poll

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels/ is imported

from pipelines.lib.cluster import LOCAL_ENVIRONMENT

for _name, _value in LOCAL_ENVIRONMENT.items():  # read when ray is imported, by whichever test file comes first
    os.environ.setdefault(_name, _value)

REPO = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("NOVELLA_DATA") or REPO.parent / "shared" / "data")


SCATTERED = ("test_conformance.py",)  # files whose tests share nothing and are many
STARTS_RAY = ("test_jobs.py", "test_app.py")  # beside those that use `ray_session`


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What runs together when tests are spread over processes (-n 2 --dist loadgroup).

    Everything with Ray is one group, so that there is one Ray at a time; another file is a group of its own, so that
    what its tests share is made once; conformance tests share nothing and go wherever there is room.
    """
    with_ray = {item.path for item in items if "ray_session" in getattr(item, "fixturenames", ())}
    for number, item in enumerate(items):
        if item.path in with_ray or item.path.name in STARTS_RAY:
            group = "ray"
        else:
            group = f"{item.path}-{number % 16 if item.path.name in SCATTERED else ''}"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real texts and known answers; a test that needs it says so when it is not there."""
    if not DATA.is_dir():
        pytest.skip(f"needs the real data folder; set NOVELLA_DATA (looked in {DATA})")
    return DATA


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """One local Ray for all tests of the session."""
    from pipelines.lib.cluster import ensure_ray

    ensure_ray(num_cpus=4)  # two workers of a fit, its controller's tasks, and a replica beside them
    import ray

    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    """Every test tracks into its own folder, never into the project's."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
