"""Energy counters: which are read, and that they add up, also when they come round."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from pipelines.lib.energy import Meter, counters, nvml, rapl, readable


def zone(root, name, label, microjoules, span=1_000_000_000):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_the_packages_are_counted_once_and_their_parts_not(tmp_path):
    a, b = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000), zone(tmp_path, "intel-rapl:1", "package-1", 7)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 1)
    psys, again = zone(tmp_path, "intel-rapl:2", "psys", 1), zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    found = rapl(tmp_path)
    assert [c.name for c in found] == ["package-0", "package-1"]
    with Meter(found) as meter:
        a.write_text("8500000")
        b.write_text("2000007")
        for other in (core, psys, again):
            other.write_text("900000000")
    assert meter.joules() == pytest.approx(3.5 + 2.0)


def test_a_counter_that_comes_round_goes_on(tmp_path):
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    meter = Meter(rapl(tmp_path))
    for reading in (995_000_000, 4_000_000, 999_000_000, 1_000_000):
        energy.write_text(str(reading))
        last = meter.joules()
    assert last == pytest.approx(5 + 9 + 995 + 2)
    meter.restart()
    assert meter.joules() == 0.0


def test_what_cannot_be_read_is_absent(tmp_path):
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    energy.unlink()
    assert rapl(tmp_path) == [] and rapl(tmp_path / "nowhere") == []
    assert Meter(rapl(tmp_path)).joules() is None
    assert nvml([torch.device("cpu")]) == []
    assert readable() == [c.name for c in counters()]


def test_a_gpu_is_found_by_its_uuid_and_counts_in_joules(monkeypatch):
    """NVML numbers GPUs otherwise than CUDA does; its counter is in millijoules."""
    millijoules = {"GPU-b": 4_000}
    fake = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="b"))
    with Meter(nvml([torch.device("cuda", 1)])) as meter:
        millijoules["GPU-b"] = 6_500
    assert meter.names == ["GPU 1"] and meter.joules() == pytest.approx(2.5)
