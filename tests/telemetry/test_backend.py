"""Another vendor's GPU, through everything between a driver and the columns of a case."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
from support.fake_vendor import VENDOR, Acme, AcmeError

from mpscale.core import device as devices
from mpscale.core.reason import Code, Reason
from mpscale.telemetry import host
from mpscale.telemetry.__main__ import Family, SamplingLoop
from mpscale.telemetry.backend import open_backend
from mpscale.telemetry.gpu_memory import memory_columns
from mpscale.telemetry.gpu_state import state_columns, suspicions
from mpscale.telemetry.samples import Reading, SampleFile, read_samples


@pytest.fixture
def acme(monkeypatch) -> Acme:
    """The opened backend, on a machine without another vendor's driver."""
    monkeypatch.setitem(devices.VENDORS, VENDOR.name, VENDOR)
    monkeypatch.setitem(devices.VENDORS, "NVIDIA", dataclasses.replace(devices.NVIDIA, backend="support.no_vendor"))
    backend = open_backend()
    assert isinstance(backend, Acme)
    return backend


@pytest.fixture
def case(acme, tmp_path):
    """Samples a case of this process: phases are marked with ``case(phase)``, and ``case()`` ends it."""
    gpu = acme.gpu(acme.devices()[1])
    path = tmp_path / "samples.jsonl"
    loop = SamplingLoop(gpu, Family(os.getpid()), SampleFile(path), time.monotonic())

    def step(phase=None):
        if phase is not None:
            time.sleep(0.005)  # so that no two samples have the same time
            loop.sample(phase)
            return None
        loop.file.close()
        return read_samples(path.read_text().splitlines(keepends=True))

    step.gpu = gpu
    return step


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "ACME Ray 0"),
        ({"ACME_VISIBLE_DEVICES": "1"}, "ACME Ray 1"),
        ({"ACME_VISIBLE_DEVICES": "GPU-acme-1"}, "ACME Ray 1"),
        ({"ACME_VISIBLE_DEVICES": "none"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "ACME Ray 0"),
    ],
)
def test_its_own_variable_selects_the_device(acme, environ, name):
    found = devices.find_device(acme.devices(), environ, host.cpu())
    assert found.name == name if name else found.kind == "cpu"


def test_readings_become_columns(acme, case):
    case("idle")
    acme.state |= {"vram": 1_000_000_000 + 300 * 2**20, "pids": [(os.getpid(), 300 * 2**20)]}
    case("context-ready")
    acme.state |= {"throttle": 1, "celsius": 80}
    case("steps-synchronised")
    case("timing-start")
    case("")
    case("timing-end")
    case("done")
    samples = case()
    found = memory_columns(samples)
    found.add(state_columns(samples))
    assert found.values["gpu_memory_process_peak_mib"] == pytest.approx(300.0)
    assert found.values["gpu_memory_device_rise_mib"] == pytest.approx(300.0)
    assert found.values["gpu_temperature_c_max"] == 80.0
    assert found.values["gpu_event_reasons"] == "hardware thermal slowdown"
    assert found.values["gpu_throttled_share"] == 1.0
    assert found.unavailable["gpu_memory_reserved_mib"].code is Code.NOT_TOLD
    assert found.unavailable["gpu_sm_clock_mhz_median"].code is Code.NOT_TOLD
    assert len(suspicions(samples, ({}, {}), {}, 95.0)) == 1
    assert {row.power_w for row in samples.rows} == {60.0}


def test_the_first_call_that_answers_is_kept(case):
    ways, reasons = case.gpu.how()
    assert ways[Reading.POWER] == "mean"
    assert Reading.POWER not in reasons
    assert Reading.SM_CLOCK not in ways
    assert reasons[Reading.SM_CLOCK].code is Code.NOT_TOLD


def test_settings_and_facts_that_it_does_not_report(case):
    facts = case.gpu.facts()
    assert (facts["vendor"], facts["driver"], facts["slowdown_c"], facts["ecc"]) == ("ACME", "7.1", 95, None)
    assert facts["unknown"]["firmware"]["code"] == Code.NOT_TOLD


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (0, Code.IMPLAUSIBLE),
        (900, Code.IMPLAUSIBLE),
        (float("nan"), Code.IMPLAUSIBLE),
        (AcmeError(7), Code.GPU_LOST),
        (AcmeError(8), Code.OTHER),
    ],
)
def test_an_answer_that_is_no_measurement(acme, case, answer, code):
    acme.state["celsius"] = answer
    reason = case.gpu.read(Reading.TEMPERATURE)
    assert isinstance(reason, Reason)
    assert reason.code is code
    assert case.gpu.lost == (code is Code.GPU_LOST)
    acme.state["celsius"] = 50
    assert case.gpu.read(Reading.TEMPERATURE) == 50
