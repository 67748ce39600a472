"""What a failing driver makes of a row: its status, its cause, and which figures it lacks; none is made up."""

from __future__ import annotations

import math
import os

import pytest
from support.nvml_stand_in import CALLS, Script

from mpscale.core.cause import Cause
from mpscale.core.columns import Source, measured_columns
from mpscale.core.device import find_device
from mpscale.core.processes.events import PhaseReached
from mpscale.core.reason import Code
from mpscale.telemetry import host
from mpscale.telemetry.client import open_driver

FEW = Code.TOO_FEW_SAMPLES
WHOLE, RISE, QUEUED = "gpu_memory_process_peak_mib", "gpu_memory_device_rise_mib", "gpu_memory_queued_peak_mib"
HEADLINE = "gpu_memory_nvml_peak_mib"
V3 = "nvmlDeviceGet{}RunningProcesses_v3"
PEAKS = (WHOLE, RISE, QUEUED, HEADLINE)
OK, SUSPECT, LOST = ("ok", None), ("invalid", Cause.GPU_STATE), ("crashed", Cause.GPU_LOST)


def without_gauges(script):
    script.set(sm_clock_mhz=None, utilization=None, event_reasons="n/a")


GAUGES = {
    "gpu_sm_clock_mhz_median": Code.NOT_TOLD,
    "gpu_utilization_median": Code.NOT_TOLD,
    "gpu_event_reasons": Code.IMPLAUSIBLE,
    "gpu_throttled_share": Code.IMPLAUSIBLE,
}
# What begins when the first step is done: the status, the cause, and figures that are unknown then.
MODES = {
    "nothing": (lambda script: script, OK, {}),
    "memory": (lambda script: script.fail("nvmlDeviceGetMemoryInfo_v2", 999), OK, {RISE: FEW}),
    "processes": (lambda script: script.fail(V3.format("Compute"), 999), OK, {WHOLE: FEW}),
    "gauges": (without_gauges, OK, GAUGES),
    "throttled": (lambda script: script.set(event_reasons=0x40), SUSPECT, {}),
    "another process": (lambda script: script.process("compute", 4242, 100), SUSPECT, {}),
    "another power limit": (lambda script: script.set(power_limit_w=300), SUSPECT, {}),
    "crash": (lambda script: script.crash("nvmlDeviceGetMemoryInfo_v2"), OK, dict.fromkeys(PEAKS, Code.MONITOR_DIED)),
    "hang": (
        lambda script: script.latency("nvmlDeviceGetMemoryInfo_v2", 1e9),
        OK,
        dict.fromkeys(PEAKS, Code.DRIVER_SILENT),
    ),
    "lost": (lambda script: script.set(lost=0.0), LOST, dict.fromkeys(PEAKS, FEW)),
    "lost before": (lambda script: script, ("error", Cause.GPU_LOST), dict.fromkeys(PEAKS, Code.NOT_REACHED)),
}
AS_MEASURED = ("gpu_sample_interval_ms", "gpu_sample_gap_ms", "gpu_energy_window_s")
"""Figures that differ from case to case."""
CHANGED = {
    "throttled": ("gpu_event_reasons", "gpu_throttled_share"),
    "processes": ("gpu_memory_method",),
    V3.format("Compute"): ("gpu_memory_method",),
    "another process": ("gpu_other_processes", RISE),
}
"""Figures that a state of the GPU changes, so that another value is right."""


@pytest.fixture
def on_gpu(run, tmp_path, stand_in_nvml, monkeypatch):
    """Run cases on a GPU of the stand-in, each with something that begins when its first step is done."""
    monkeypatch.setattr("mpscale.telemetry.client._MARK_S", 0.05)
    monkeypatch.setattr("mpscale.telemetry.client._STOP_S", 0.5)
    monkeypatch.setattr("mpscale.telemetry.client._KILL_S", 0.2)
    script = Script(tmp_path / "nvml.txt")
    driver = open_driver({**os.environ, **script.environ(stand_in_nvml)})
    device = find_device(driver.devices, {}, host.cpu())

    def start(changes):
        made, cases, _ = run(*["on_gpu()"] * len(changes), device=device, driver=driver, gpu_retries=0)
        for case, change in zip(cases, changes, strict=True):
            script.heal().no_processes()
            script.set(power_w=200, utilization=50, temperature_c=35, sm_clock_mhz=1410, event_reasons=0)
            script.set(power_limit_w=400)

            def act(_, event, change=change):
                if not isinstance(event, PhaseReached):
                    return
                if event.phase == "idle":
                    script.process("compute", made._supervisor._watch._pid, 300)
                elif event.phase == "compiled":
                    change(script)

            made._listener = act
            if made._supervisor is not None:
                made._supervisor._listener = act
            yield made.run(case).record

    yield start
    driver.close()


@pytest.mark.parametrize(
    "names",
    [
        # A driver that hangs takes seconds; tests/telemetry/test_failures.py has that, too.
        pytest.param([name for name in MODES if name != "hang"], id="quick"),
        pytest.param(list(MODES), id="all", marks=pytest.mark.slow),
    ],
)
def test_each_failure_has_the_right_row_and_no_figure_that_was_not_measured(on_gpu, names):
    healthy = None
    for name, row in zip(names, on_gpu([MODES[name][0] for name in names]), strict=True):
        _, (status, cause), missing = MODES[name]
        assert (row["status"], row["cause"]) == (status, cause), f"{name}: {row['status_reason']}"
        found = {column: row.why_empty(column) for column in missing}
        assert {column: why and why.code for column, why in found.items()} == missing, name
        healthy = healthy or row
        assert_nothing_is_made_up(row, healthy, name)


def assert_nothing_is_made_up(row, healthy, name):
    """Every figure of the GPU is what it is while the driver works, or is empty with a reason."""
    for column in measured_columns(source=Source.MONITOR):
        value, right = row[column], healthy[column]
        if value is None:
            assert row.why_empty(column) is not None, f"{name}: {column}"
        elif column not in (*AS_MEASURED, *CHANGED.get(name, ())):
            same = isinstance(value, float) and isinstance(right, float) and math.isclose(value, right, rel_tol=1e-6)
            assert value == right or same, f"{name}: {column}"


@pytest.mark.slow
@pytest.mark.parametrize("code", [3, 999])
def test_whatever_call_fails_no_figure_is_made_up(on_gpu, code):
    changes = [lambda script, call=call: script.fail(call, code) for call in sorted(CALLS)]
    healthy = None
    for name, row in zip(("nothing", *sorted(CALLS)), on_gpu([MODES["nothing"][0], *changes]), strict=True):
        assert row["status"] == "ok", f"{name}: {row['status_reason']}"
        healthy = healthy or row
        assert_nothing_is_made_up(row, healthy, name)
