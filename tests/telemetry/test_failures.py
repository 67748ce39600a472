"""Every known way in which NVML fails or misleads, through nvidia-ml-py and a stand-in for the driver."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from support.gpu_case import ENERGY_OFF, GpuCase
from support.nvml_stand_in import Script

from mpscale.core.columns import Source, measured_columns
from mpscale.core.device import find_device
from mpscale.core.processes.wire import Wire
from mpscale.core.reason import Code
from mpscale.telemetry import host
from mpscale.telemetry.client import Driver, NoDriver, open_driver
from mpscale.telemetry.samples import Reading
from mpscale.telemetry.watch import WorkerFacts

PEAK, METHOD = "gpu_memory_nvml_peak_mib", "gpu_memory_method"
WHOLE = "gpu_memory_process_peak_mib"
MEMORY_V2 = "nvmlDeviceGetMemoryInfo_v2"
V3 = [f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics", "MPSCompute")]


def test_no_library(tmp_path):
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    environ.pop("MPSCALE_STAND_IN_NVML", None)
    driver = open_driver(environ)
    assert isinstance(driver, NoDriver)
    assert driver.devices == []
    assert driver.reason.code is Code.NO_LIBRARY


def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_text("not an ELF file")
    driver = open_driver({**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    assert isinstance(driver, NoDriver)
    assert driver.reason


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (4, Code.NO_PERMISSION),
        (9, Code.DRIVER_NOT_LOADED),
        (12, Code.NO_LIBRARY),
        (15, Code.GPU_LOST),
        (18, Code.DRIVER_MISMATCH),
        (999, Code.OTHER),
    ],
)
def test_driver_that_fails_to_initialise(script, stand_in_nvml, error, code):
    script.general(init_error=error)
    driver = open_driver({**os.environ, **script.environ(stand_in_nvml)})
    assert isinstance(driver, NoDriver)
    assert driver.reason.code is code
    assert (driver.reason.cure is None) == (code is Code.OTHER)


def test_library_without_todays_init(script, older):
    driver = open_driver({**os.environ, **script.environ(older("nvmlInitWithFlags"))})
    assert isinstance(driver, NoDriver)
    assert driver.reason.code is Code.DRIVER_TOO_OLD


def test_driver_that_crashes_during_initialisation(script, stand_in_nvml):
    script.crash("nvmlInitWithFlags")
    driver = open_driver({**os.environ, **script.environ(stand_in_nvml)})
    assert isinstance(driver, NoDriver)
    assert driver.reason.code is Code.MONITOR_DIED
    assert "SIGSEGV" in driver.reason.text


@pytest.mark.timeout(300)  # without a limit on the wait it would hang forever
def test_driver_that_hangs_during_initialisation(script, stand_in_nvml, monkeypatch):
    monkeypatch.setattr("mpscale.telemetry.client._DESCRIBE_S", 0.5)
    script.latency("nvmlInitWithFlags", 1e9)
    driver = open_driver({**os.environ, **script.environ(stand_in_nvml)})
    assert isinstance(driver, NoDriver)
    assert driver.reason.code is Code.DRIVER_SILENT


@pytest.mark.parametrize(
    ("missing", "reading", "way"),
    [
        ((), Reading.MEMORY, MEMORY_V2),
        ((MEMORY_V2,), Reading.MEMORY, "nvmlDeviceGetMemoryInfo"),
        ((V3[0],), Reading.PROCESSES, "nvmlDeviceGetComputeRunningProcesses_v2"),
        ((V3[1],), Reading.GRAPHICS_PROCESSES, "nvmlDeviceGetGraphicsRunningProcesses_v2"),
        ((V3[2],), Reading.SERVICE_PROCESSES, "nvmlDeviceGetMPSComputeRunningProcesses_v2"),
        ((), Reading.TEMPERATURE, "nvmlDeviceGetTemperatureV"),
        (("nvmlDeviceGetTemperatureV",), Reading.TEMPERATURE, "nvmlDeviceGetTemperature"),
        ((), Reading.CLOCK_EVENTS, "nvmlDeviceGetCurrentClocksEventReasons"),
        (
            ("nvmlDeviceGetCurrentClocksEventReasons",),
            Reading.CLOCK_EVENTS,
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        ),
        ((), Reading.POWER, "instant"),
        (("nvmlDeviceGetFieldValues",), Reading.POWER, "mean of up to a second"),
        ((), Reading.ENERGY, "counter"),
        (("nvmlDeviceGetTotalEnergyConsumption",), Reading.ENERGY, "counter (field 83)"),
        (("nvmlDeviceGetEnforcedPowerLimit",), Reading.POWER_LIMIT, "nvmlDeviceGetPowerManagementLimit"),
    ],
)
def test_missing_symbol_is_replaced_by_an_older_one(script, older, gpu_case, missing, reading, way):
    case = gpu_case(older(*missing))
    facts = case.driver.facts(case.device)
    assert facts["ways"][reading] == way
    assert reading not in facts["reasons"]


def test_structure_unknown_to_the_driver_is_replaced_by_the_older_one(script, gpu_case):
    script.fail(MEMORY_V2, 25)
    case = gpu_case()
    assert case.driver.facts(case.device)["ways"][Reading.MEMORY] == "nvmlDeviceGetMemoryInfo"


def test_reading_that_no_call_gives_has_a_reason(older, gpu_case):
    case = gpu_case(older("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTotalEnergyConsumption"))
    case.script.fail("nvmlDeviceGetFieldValues", 3)
    seen = case.run(lambda: case.uses(300))
    assert seen.findings.unavailable["gpu_utilization_median"].code is Code.DRIVER_TOO_OLD
    assert "gpu_utilization_median" not in seen.findings.values
    reasons = case.driver.facts(case.device)["reasons"]
    assert reasons[Reading.UTILIZATION].code is Code.DRIVER_TOO_OLD
    assert reasons[Reading.ENERGY].code is Code.NOT_TOLD


@pytest.mark.parametrize(
    ("listed", "peak", "method"),
    [
        ("300", 300.0, "process"),
        ("n/a(300)", 300.0, "device-minus-idle"),  # WSL2
        ("0(300)", 300.0, "device-minus-idle"),  # containers, driver 560
    ],
)
def test_process_listed_without_its_memory(gpu_case, listed, peak, method):
    case = gpu_case()
    seen = case.run(lambda: case.uses(listed))
    assert seen.findings.values[PEAK] == peak
    assert seen.findings.values[METHOD] == method
    assert seen.suspicions == []
    if method != "process":
        assert seen.findings.unavailable["gpu_memory_process_peak_mib"].code is Code.NOT_TOLD


def test_worker_of_another_pid_namespace_alone_on_the_gpu(gpu_case):
    """The driver uses the host's process ids: the process that appears is the worker, and memory that of the GPU."""
    case = gpu_case()
    case.script.general(offset_pid=100_000)
    seen = case.run(lambda: case.uses(700))
    assert seen.findings.values[PEAK] == 700.0
    assert seen.findings.values[METHOD] == "device-minus-idle"
    assert seen.findings.unavailable["gpu_memory_process_peak_mib"].code is Code.NOT_TOLD
    assert seen.findings.values["gpu_other_processes"] == 0
    assert seen.suspicions == []


def test_worker_of_another_pid_namespace_beside_another_process(gpu_case):
    case = gpu_case()
    case.script.general(offset_pid=100_000).process("compute", 1, 500)
    seen = case.run(lambda: case.uses(700))
    assert PEAK not in seen.findings.values
    assert seen.findings.unavailable[PEAK].code is Code.SHARED
    assert "other processes" in seen.suspicions[0].reason


def test_process_id_that_is_another_process_for_the_driver(gpu_case):
    """A process with the worker's id is listed before the worker has touched the GPU."""
    case = gpu_case()
    case.uses(5000)
    seen = case.run()
    assert seen.findings.unavailable["gpu_memory_process_peak_mib"].code is Code.NOT_TOLD
    assert PEAK not in seen.findings.values


@pytest.mark.parametrize("version", ["535.43.02", "535.54.03", "535.86.10"])
def test_garbled_list_of_processes_is_not_read(gpu_case, version):
    case = gpu_case_with(gpu_case, driver=version, entry_bytes=32)
    seen = case.run(lambda: case.uses(300))
    assert seen.findings.values[PEAK] == 300.0
    assert seen.findings.values[METHOD] == "device-minus-idle"
    assert seen.findings.unavailable["gpu_memory_process_peak_mib"].code is Code.GARBLED
    assert "gpu_other_processes" not in seen.findings.values
    facts = case.driver.facts(case.device)
    assert Reading.PROCESSES not in facts["ways"]
    assert facts["reasons"][Reading.PROCESSES].code is Code.GARBLED


@pytest.mark.parametrize("version", ["535.42.99", "535.98", "535.104.05", "550.54.14"])
def test_list_of_processes_of_other_drivers_is_read(gpu_case, version):
    case = gpu_case_with(gpu_case, driver=version)
    assert case.run(lambda: case.uses(300)).findings.values[METHOD] == "process"


def gpu_case_with(gpu_case, **general) -> GpuCase:
    case = gpu_case()
    case.driver.close()
    case.script.general(**general)
    case.close()
    return gpu_case()


def test_no_list_of_processes_at_all(script, gpu_case):
    for kind in ("Compute", "Graphics", "MPSCompute"):
        for version in ("_v2", "_v3"):
            script.fail(f"nvmlDeviceGet{kind}RunningProcesses{version}", 4)
    case = gpu_case()
    seen = case.run(lambda: case.script.set(used_mib=1450))
    assert (seen.findings.values[PEAK], seen.findings.values[METHOD]) == (1000.0, "device-minus-idle")
    reason = seen.findings.unavailable["gpu_memory_process_peak_mib"]
    assert reason.code is Code.NO_PERMISSION
    assert "no list of processes" in reason.text


def test_memory_of_descendants_counts(gpu_case, script):
    case = gpu_case()
    sleeper = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        grandchild = int(parent.stdout.readline())
        case.pid = parent.pid
        seen = case.run(lambda: (case.uses(300), script.process("compute", grandchild, 200)))
        parent.kill()
        os.kill(grandchild, 9)
    assert seen.findings.values[PEAK] == 500.0
    assert seen.findings.values["gpu_other_processes"] == 0


@pytest.mark.parametrize("kind", ["mps", "graphics"])
def test_worker_in_another_list(gpu_case, kind):
    """Under CUDA's multi-process service, or if it also draws."""
    case = gpu_case()
    seen = case.run(lambda: (case.uses(400, kind), time.sleep(0.25)), lambda: time.sleep(0.25))
    assert seen.findings.values[PEAK] == 400.0
    assert seen.findings.values[METHOD] == "process"


@pytest.mark.parametrize("v2_used", ["includes_reserved", "excludes_reserved"])
def test_reserved_memory_is_separated_by_arithmetic(gpu_case, v2_used):
    case = gpu_case()
    case.script.set(v2_used=v2_used, used_mib=450, reserved_mib=500)
    seen = case.run(lambda: case.uses(300))
    assert seen.findings.values["gpu_memory_idle_mib"] == pytest.approx(450)
    assert seen.findings.values["gpu_memory_reserved_mib"] == 500


@pytest.mark.parametrize(("v1_used", "idle"), [("includes_reserved", 950), ("excludes_reserved", 450)])
def test_first_version_of_memory_leaves_reserved_unknown(older, gpu_case, v1_used, idle):
    case = gpu_case(older(MEMORY_V2))
    case.script.set(v1_used=v1_used)
    seen = case.run(lambda: case.uses("n/a(300)"))
    assert seen.findings.values["gpu_memory_idle_mib"] == idle
    assert seen.findings.values[PEAK] == 300.0
    assert "gpu_memory_reserved_mib" not in seen.findings.values


def test_another_process_makes_figures_suspect(gpu_case):
    case = gpu_case()
    case.script.process("compute", 4242, 100)
    (suspicion,) = case.run(lambda: case.uses(300)).suspicions
    assert "4242" in suspicion.reason
    assert suspicion.passes


def test_another_process_that_only_draws_is_counted(gpu_case):
    """A desktop always runs, and would make every figure of a workstation suspect."""
    case = gpu_case()
    case.script.process("graphics", 4242, 100)
    seen = case.run(lambda: case.uses(300))
    assert seen.suspicions == []
    assert seen.findings.values["gpu_graphics_processes"] == 1


@pytest.mark.parametrize(("when", "seconds"), [("train", 0.06), ("timed", 0.8)])
def test_process_that_comes_and_goes_between_two_phases_is_seen(gpu_case, when, seconds):
    case = gpu_case()

    def visit():
        case.script.process("compute", 4242, 100)
        time.sleep(seconds)
        case.script.process("compute", 4242, None)
        time.sleep(0.06)

    (suspicion,) = case.run(lambda: case.uses(300), **{when: visit}).suspicions
    assert "4242" in suspicion.reason


def test_mig_instance_has_memory_and_no_energy(script, gpu_case):
    script.mig()
    script.mig()
    case = gpu_case(visible="MIG-5b0c4a1e-0000-1111-0000-000000000001")
    worker = WorkerFacts(energy_steps=10, energy_applied_steps=10)
    seen = case.run(lambda: script.process("compute", case.pid, 300, instance=1), worker=worker)
    assert case.device.parent_uuid == script._units[0, -1].lines["uuid"]
    assert seen.findings.values[PEAK] == 300.0
    assert seen.findings.values["gpu_memory_idle_mib"] == 12.0
    for column in ("gpu_energy_j_per_step", "gpu_utilization_median", "gpu_power_source", "gpu_temperature_c_max"):
        assert seen.findings.unavailable[column].code is Code.SHARED
    assert seen.suspicions == []


def test_gpu_is_found_by_its_uuid(script, gpu_case):
    second = script.device(name="mpscale stand-in H100", capability=(9, 0))
    uuid = script._units[second, -1].lines["uuid"]
    case = gpu_case(visible=uuid)
    seen = case.run(lambda: script.process("compute", case.pid, 900, device=second))
    assert case.device.name == "mpscale stand-in H100"
    assert seen.findings.values[PEAK] == 900.0


def test_gpu_that_does_not_answer_keeps_its_place(script, gpu_case, stand_in_nvml):
    script.device()
    script.fail("nvmlDeviceGetHandleByIndex_v2", 15, times=1)
    driver = open_driver({**os.environ, **script.environ(stand_in_nvml)})
    lost, fine = driver.devices
    driver.close()
    assert lost.uuid is None and "GPU is lost" in lost.name
    assert find_device([lost, fine], {"CUDA_VISIBLE_DEVICES": "1"}, host.cpu()) == fine


def test_gpu_lost_in_mid_case_keeps_what_was_measured(gpu_case):
    case = gpu_case()
    seen = case.run(lambda: case.uses(300), lambda: case.script.set(lost=0.0) and time.sleep(0.15))
    assert seen.lost
    assert seen.findings.values[PEAK] == 300.0


@pytest.mark.timeout(300)  # without a limit on the wait it would hang forever
def test_sample_that_came_late_is_not_of_its_phase_if_the_driver_hangs_after_it(gpu_case):
    """The late sample lists the worker, which at that phase would be another process with its id."""
    case = gpu_case()
    case.script.latency(MEMORY_V2, 0.5)
    case.watch.start(case.pid, time.monotonic())
    case.watch.mark("idle")
    case.uses(300)
    case.script.heal()
    time.sleep(0.6)
    for phase in ("context-ready", "compiled"):
        case.watch.mark(phase)
    case.script.latency(MEMORY_V2, 1e9)
    for phase in ("steps-synchronised", "done"):
        case.watch.mark(phase)
    found = case.watch.stop(WorkerFacts(energy_off=ENERGY_OFF), None).findings
    for column in (WHOLE, PEAK, "gpu_memory_device_rise_mib"):
        assert found.unavailable[column].code is Code.DRIVER_SILENT, column
    assert "late" in found.unavailable["gpu_memory_idle_mib"].text
    assert "stopped answering after compiled" in found.unavailable[WHOLE].text


@pytest.mark.timeout(300)  # without a limit on the wait it would hang forever
@pytest.mark.parametrize("symbol", [MEMORY_V2, "nvmlDeviceGetPowerUsage"])
def test_call_that_hangs_costs_a_figure_and_no_more(script, gpu_case, symbol):
    script.fail("nvmlDeviceGetFieldValues", 3)
    case = gpu_case()
    seen = case.run(lambda: case.uses(300), lambda: case.script.latency(symbol, 1e9))
    assert seen.findings.unavailable[WHOLE].code is Code.DRIVER_SILENT
    assert "stopped answering after timing-start" in seen.findings.unavailable[WHOLE].text
    assert "300 MiB was the most until then" in seen.findings.unavailable[WHOLE].text
    assert seen.findings.values[PEAK] == 300.0  # which had been measured by then
    # The next case gets a monitor of its own.
    case.script.heal().process("compute", case.pid, None)
    assert case.run(lambda: case.uses(400)).findings.values[PEAK] == 400.0


def test_call_that_is_late_loses_nothing(gpu_case):
    case = gpu_case()
    seen = case.run(
        lambda: case.uses(300),
        train=lambda: (case.script.latency(MEMORY_V2, 0.5), time.sleep(0.05), case.script.heal()),
    )
    assert seen.findings.values[PEAK] == 300.0
    assert seen.findings.values["gpu_sample_gap_ms"] > 400


def test_driver_that_crashes_in_mid_case(gpu_case):
    case = gpu_case()
    seen = case.run(lambda: case.uses(300), lambda: (case.script.crash(MEMORY_V2), time.sleep(0.1)))
    assert seen.findings.unavailable[WHOLE].code is Code.MONITOR_DIED
    assert "300 MiB was the most until then" in seen.findings.unavailable[WHOLE].text
    assert seen.findings.values[PEAK] == 300.0
    case.script.heal().process("compute", case.pid, None)
    assert case.run(lambda: case.uses(400)).findings.values[PEAK] == 400.0


@pytest.mark.parametrize("said", [b"hello\n", b"{}\n", b'{"id": "one"}\n', b'{"id": 999}\n'])
def test_junk_on_the_monitors_connection_costs_its_figures(script, stand_in_nvml, monkeypatch, said):
    ours, theirs = Wire.pair()
    theirs._socket.sendall(said)
    monkeypatch.setattr(Wire, "pair", lambda: (ours, theirs))
    driver = open_driver({**os.environ, **script.environ(stand_in_nvml)})
    assert isinstance(driver, NoDriver)
    assert driver.reason.code is Code.MONITOR_DIED
    assert "something other than answers" in driver.reason.text


def test_samples_that_cannot_be_kept_cost_no_figure(gpu_case, tmp_path):
    (tmp_path / "gpu").write_text("in the way")
    case = gpu_case()
    seen = case.run(lambda: case.uses(300), keep=tmp_path / "gpu" / "case.jsonl.gz")
    assert seen.not_kept is not None
    assert str(tmp_path / "gpu") in seen.not_kept
    assert seen.findings.values[PEAK] == 300.0


def test_driver_that_keeps_crashing_is_not_restarted(gpu_case):
    case = gpu_case()
    case.script.crash(MEMORY_V2)
    reasons = [case.run().findings.unavailable[PEAK] for _ in range(4)]
    assert {reason.code for reason in reasons} == {Code.MONITOR_DIED}
    assert "not started again" in reasons[-1].text
    assert isinstance(case.driver, Driver)


def test_reading_that_fails_intermittently(gpu_case):
    case = gpu_case()
    case.script.fail(MEMORY_V2, 999, times=3).fail("nvmlDeviceGetTemperatureV", 999, times=3)
    seen = case.run(lambda: (time.sleep(0.4), case.uses(300)), lambda: time.sleep(0.1))
    assert seen.findings.values[PEAK] == 300.0
    assert seen.findings.values["gpu_temperature_c_max"] == 35.0


def test_without_a_gpu_every_column_has_a_reason(stand_in_nvml, tmp_path):
    case = GpuCase(Script(tmp_path / "nvml.txt"), stand_in_nvml, visible="")
    try:
        seen = case.run()
    finally:
        case.close()
    assert case.device.kind == "cpu"
    columns = set(measured_columns(source=Source.MONITOR))
    assert columns <= set(seen.findings.unavailable)
    assert not columns & set(seen.findings.values)
