"""What is seen of a process that uses two GPUs."""

from __future__ import annotations

import subprocess
import time

import pytest
from support.gpu_case import ENERGY_OFF, TRAINING, kept_samples

from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.telemetry.replicas import together, with_other_machines
from mpscale.telemetry.samples import known
from mpscale.telemetry.watch import HOST_COLUMN, WatchResult, WorkerFacts

PEAK, POWER = "gpu_memory_nvml_peak_mib", "gpu_power_w_mean"
CLOCK, HOT = "gpu_sm_clock_mhz_median", "gpu_temperature_c_max"


def seen_on_two(script, gpu_case, replicas, keep=None):
    second = script.device(power_w=250, temperature_c=60, sm_clock_mhz=1200, used_mib=10)
    script.set(0, -1, power_w=100, temperature_c=40, sm_clock_mhz=1400)
    case = gpu_case(several=True)

    def use():
        script.process("compute", case.pid, 300)
        script.process("compute", case.pid, 900, device=second)

    facts = WorkerFacts(energy_steps=10, energy_applied_steps=10, replicas=replicas)
    return case.run(use, lambda: time.sleep(0.3), worker=facts, keep=keep), second


def test_memory_is_the_largest_of_any_gpu_and_power_the_sum(script, gpu_case, tmp_path):
    keep = tmp_path / "gpu" / "case--a1.jsonl.gz"
    keep.parent.mkdir()
    seen, _ = seen_on_two(script, gpu_case, 2, keep)
    found = seen.findings.values
    assert (found[PEAK], found["gpu_memory_process_peak_mib"], found["gpu_memory_idle_mib"]) == (900, 900, 10)
    assert found[POWER] == pytest.approx(350)
    assert (found[CLOCK], found[HOT]) == (1200, 60)
    assert found[HOST_COLUMN] > 1
    # Too short for energy on both: not the energy of one, either.
    assert seen.findings.unavailable["gpu_energy_j_per_step"].code is Code.WINDOW_TOO_SHORT
    assert not found.keys() & seen.findings.unavailable.keys()
    assert seen.suspicions == []
    files = (keep, keep.with_name("case--a1--gpu1.jsonl.gz"))
    assert [max(known(kept_samples(path).rows, "power_w")) for path in files] == [100, 250]


def test_a_case_that_uses_one_of_two_gpus_has_the_figures_of_that_one(script, gpu_case):
    seen, _ = seen_on_two(script, gpu_case, 1)
    found = seen.findings.values
    assert (found[PEAK], found[CLOCK], found[HOT]) == (300, 1400, 40)
    assert found[POWER] == pytest.approx(100)


def test_each_of_two_processes_is_watched_on_a_gpu_of_its_own(script, gpu_case):
    second = script.device()
    case = gpu_case(several=True)
    other = subprocess.Popen(["sleep", "60"])
    try:
        case.watch.start(case.pid, time.monotonic(), None, [(other.pid, None)])
        case.watch.mark("idle")
        script.process("compute", case.pid, 300)
        script.process("compute", other.pid, 900, device=second)
        for phase in ("context-ready", *TRAINING, "done"):
            case.watch.mark(phase)
        seen = case.watch.stop(WorkerFacts(energy_off=ENERGY_OFF, replicas=2), None)
    finally:
        other.kill()
        other.wait()
    # Neither process is somebody else's on its GPU.
    assert seen.suspicions == []
    assert seen.findings.values["gpu_memory_process_peak_mib"] == 900


def test_gpus_of_another_machine_count_as_those_of_this_one():
    own = Findings({PEAK: 300.0, POWER: 100.0, CLOCK: 1400.0, HOST_COLUMN: 5.0})
    theirs = Findings({PEAK: 900.0, POWER: 250.0, CLOCK: 1200.0})
    seen = with_other_machines(WatchResult(own), [(theirs, "worker 2 of 2: throttled")])
    assert seen.findings.values == {PEAK: 900.0, POWER: 350.0, CLOCK: 1200.0, HOST_COLUMN: 5.0}
    assert [(one.reason, one.passes) for one in seen.suspicions] == [("worker 2 of 2: throttled", True)]
    silent = Reason(Code.HOST_SILENT, "worker 2 of 2 did not report its GPUs")
    unknown = Findings(unavailable=dict.fromkeys((PEAK, POWER, CLOCK), silent))
    seen = with_other_machines(WatchResult(own), [(unknown, None)])
    assert seen.findings.values == {HOST_COLUMN: 5.0}
    assert seen.findings.unavailable[POWER] == silent
    assert seen.findings.unavailable[PEAK].text == f"which GPU has the largest peak is unknown: {silent.text}"


def test_what_is_unknown_of_one_gpu_is_unknown_of_both(script, gpu_case):
    second = script.device()
    script.set(second, -1, power_w=None, energy=None)
    script.process("graphics", 1, 100, device=second)
    case = gpu_case(several=True)
    seen = case.run(lambda: case.uses(300), worker=WorkerFacts(energy_off=ENERGY_OFF, replicas=2))
    assert seen.findings.unavailable[PEAK].code is not None
    assert PEAK not in seen.findings.values
    assert not case.watch.has_power()


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("gpu_energy_j_per_step", (2.0, 3.5), 5.5),
        ("gpu_energy_window_s", (10.0, 10.5), 10.5),
        ("gpu_energy_steps", (100, 100), 100),
        ("gpu_energy_method", ("counter", "power"), "counter, power"),
        ("gpu_energy_method", ("counter", "counter"), "counter"),
        ("gpu_throttled_share", (0.0, 0.25), 0.25),
        ("gpu_utilization_median", (90.0, 70.0), 70.0),
    ],
)
def test_columns_of_several_gpus_together(column, values, expected):
    assert together([Findings({column: value}) for value in values]).values[column] == expected
    reason = Reason(Code.GPU_LOST, "it was lost")
    found = together([Findings({column: values[0]}), Findings(unavailable={column: reason})])
    assert (found.values, found.unavailable[column]) == ({}, reason)
