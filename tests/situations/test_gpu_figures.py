"""The columns of a case when GPU, driver or virtual machine report less than they seem to."""

from __future__ import annotations

import time

import pytest
from support.gpu_case import GpuCase, kept_samples
from support.nvml_stand_in import Script

from mpscale.core.columns import Source, measured_columns
from mpscale.core.reason import Code
from mpscale.telemetry.samples import Reading
from mpscale.telemetry.watch import WorkerFacts

PEAK, METHOD = "gpu_memory_nvml_peak_mib", "gpu_memory_method"
PROCESS, RISE = "gpu_memory_process_peak_mib", "gpu_memory_device_rise_mib"
MEMORY = "nvmlDeviceGetMemoryInfo_v2"
LIST = "nvmlDeviceGetComputeRunningProcesses_v3"
MEASURED = {
    "power_w": "gpu_power_source",
    "temperature_c": "gpu_temperature_c_max",
    "sm_clock_mhz": "gpu_sm_clock_mhz_median",
    "mem_clock_mhz": "gpu_memory_clock_mhz_median",
    "utilization": "gpu_utilization_median",
    "event_reasons": "gpu_event_reasons",
}
"""Lines of the stand-in's script and the column that each fills."""


@pytest.fixture
def gpu_case(tmp_path, stand_in_nvml):
    """Makes a case on a GPU with these lines in its script."""
    made = []

    def make(**lines):
        script = Script(tmp_path / "nvml.txt")
        script.set(**lines)
        made.append(GpuCase(script, stand_in_nvml))
        return made[-1]

    yield make
    for case in made:
        case.close()


@pytest.fixture(scope="module")
def only_case(tmp_path_factory, stand_in_nvml):
    case = GpuCase(Script(tmp_path_factory.mktemp("gpu") / "nvml.txt"), stand_in_nvml)
    yield case
    case.close()


@pytest.fixture
def case(only_case):
    """A GPU that reports everything; the tests share its monitor."""
    only_case.script.heal().no_processes()
    lines = {"used_mib": 450, "temperature_c": 35, "sm_clock_mhz": 1410, "mem_clock_mhz": 1215, "event_reasons": 0}
    only_case.script.set(**lines)
    return only_case


def run(case, *, timed=lambda: None, **steps):
    """Run a case of 300 MiB that counts energy."""
    worker = WorkerFacts(energy_steps=10, energy_applied_steps=10)
    return case.run(lambda: case.uses(300), timed, worker=worker, **steps).findings


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(dict.fromkeys(MEASURED, "n/a"), id="NVML answers with all bits one"),
        pytest.param(
            dict.fromkeys(set(MEASURED) - {"utilization", "event_reasons"}, 0),
            id="a virtual machine sees 0 W, 0 MHz and 0 degrees",
        ),
        pytest.param(
            {
                "power_w": 50_000, "temperature_c": 900, "sm_clock_mhz": 4e6, "mem_clock_mhz": 4e6, "utilization": 101,
                "event_reasons": "0x80000000",
            },
            id="NVML answers what no GPU can have",
        ),
        pytest.param({"power_w": -0.005, "temperature_c": -5}, id="a negative number without its sign"),
    ],
)  # fmt: skip
def test_implausible_readings_leave_columns_empty_with_a_reason(gpu_case, lines):
    case = gpu_case(**lines)
    found = run(case)
    for line in lines:
        assert MEASURED[line] not in found.values, line
        assert found.unavailable[MEASURED[line]].code is Code.IMPLAUSIBLE, line
    assert not {Reading.POWER, Reading.TEMPERATURE} & set(case.driver.facts(case.device)["ways"])
    # The other readings are unaffected: an idle GPU is 0 % busy.
    assert found.values[PEAK] == 300.0
    assert {"utilization", "event_reasons"} & set(lines) or found.values["gpu_utilization_median"] == 0.0


@pytest.mark.parametrize("energy", ["n/a", "0:1"], ids=["all bits one", "a counter of 0"])
def test_energy_comes_from_power_if_there_is_no_counter(gpu_case, energy):
    case = gpu_case(energy=energy, energy_start_j=0, energy_tick=1e9)
    facts = case.driver.facts(case.device)
    assert Reading.ENERGY not in facts["ways"]
    assert facts["reasons"][Reading.ENERGY].code is Code.IMPLAUSIBLE
    assert facts["ways"][Reading.POWER] == "instant"


@pytest.mark.parametrize("lines", [{"power_instant_w": "n/a"}, {"field_type": 7}], ids=["all bits one", "unknown type"])
def test_power_is_a_mean_if_momentary_power_is_not_available(gpu_case, lines):
    case = gpu_case(**lines)
    assert case.driver.facts(case.device)["ways"][Reading.POWER] == "mean of up to a second"
    assert run(case).values["gpu_power_source"] == "mean of up to a second"


def test_facts_and_settings_that_a_gpu_does_not_report(gpu_case):
    lines = {
        "power_limit_w": "n/a", "ecc": "n/a", "persistence": "n/a", "slowdown_c": 0, "max_sm_clock_mhz": 0,
        "max_mem_clock_mhz": "n/a", "pcie_generation": 0, "pcie_width": "n/a", "capability": (-1, -1),
        "power_limits_w": (-0.001, 0, -0.001),
    }  # fmt: skip
    case = gpu_case(**lines)
    facts = case.driver.facts(case.device)["facts"]
    empty = [
        "power_limit_w", "ecc", "persistence", "slowdown_c", "max_sm_clock_mhz", "max_memory_clock_mhz",
        "pcie_generation", "pcie_width", "power_limits_w", "power_limit_default_w",
    ]  # fmt: skip
    assert {name: facts[name] for name in empty} == dict.fromkeys(empty)
    assert {facts["unknown"][name]["code"] for name in empty} == {Code.IMPLAUSIBLE}
    assert case.device.compute_capability is None
    assert not case.device.has_tf32
    assert facts["mig"] is False
    seen = case.run(lambda: case.uses(300))
    assert seen.suspicions == []


@pytest.mark.parametrize(
    "lines", [{"memory_mib": "n/a"}, {"memory_mib": 0}, {"used_mib": "n/a"}, {"used_mib": 90_000}, {"memory_mib": 100}]
)
def test_implausible_memory_is_not_used(gpu_case, lines):
    case = gpu_case(**lines)
    found = run(case)
    assert RISE not in found.values
    assert "gpu_memory_idle_mib" not in found.values
    assert found.unavailable[RISE].code is Code.IMPLAUSIBLE
    if lines.get("memory_mib") in ("n/a", 0):
        assert case.device.memory_mib is None
    # The list of processes is another call; only values above the GPU's memory are rejected there.
    assert found.values.get(PROCESS) == (None if lines.get("memory_mib") == 100 else 300.0)


def test_driver_that_repeats_an_old_value(gpu_case):
    case = gpu_case(field_stamp_s=1_700_000_000)
    run(case, timed=lambda: time.sleep(1.1))
    assert case.driver.facts(case.device)["reasons"][Reading.POWER].code is Code.IMPLAUSIBLE


BEGIN = {
    MEMORY: {RISE, "gpu_memory_reserved_mib"},
    LIST: {PROCESS, "gpu_memory_queued_peak_mib", "gpu_other_processes"},
    "nvmlDeviceGetGraphicsRunningProcesses_v3": {"gpu_graphics_processes"},
    "nvmlDeviceGetTemperatureV": {"gpu_temperature_c_max"},
    "nvmlDeviceGetClockInfo": {"gpu_sm_clock_mhz_median", "gpu_memory_clock_mhz_median"},
    "nvmlDeviceGetUtilizationRates": {"gpu_utilization_median"},
    "nvmlDeviceGetCurrentClocksEventReasons": {
        "gpu_event_reasons", "gpu_throttled_share", "gpu_power_capped_share",
    },
}  # fmt: skip


def always(case):
    """The columns that a case without failures fills."""
    return {*run(case, added=lambda: time.sleep(0.3)).values} & set(measured_columns(source=Source.MONITOR))


def test_a_failing_call_empties_only_its_own_columns(case):
    sound = always(case)
    for symbol, columns in BEGIN.items():
        case.script.heal()
        case.uses(None)
        found = run(
            case,
            train=lambda symbol=symbol: (time.sleep(0.05), case.script.fail(symbol, 999)),
            added=lambda: time.sleep(0.75),
        )
        assert columns <= set(found.unavailable), symbol
        assert sound - set(found.values) <= columns, symbol
        for column in columns:
            assert found.unavailable[column].code in (Code.TOO_FEW_SAMPLES, Code.OTHER), symbol
        # It had been measured before the call failed.
        assert (found.values[METHOD], found.values[PEAK]) == ("process", 300.0)


@pytest.mark.parametrize("symbol", [MEMORY, LIST])
def test_growth_of_memory_while_a_call_fails_is_not_missed_silently(case, symbol):
    def train():
        case.script.fail(symbol, 999)
        time.sleep(0.05)
        case.uses(9000)
        time.sleep(0.4)
        case.uses(300)
        time.sleep(0.05)
        case.script.heal()
        time.sleep(0.1)

    found = run(case, train=train)
    column = RISE if symbol == MEMORY else PROCESS
    assert column not in found.values
    assert found.unavailable[column].code is Code.TOO_FEW_SAMPLES
    assert "from context-ready on" in found.unavailable[column].text
    assert "300 MiB was the most that was seen" in found.unavailable[column].text
    # The other reading saw it.
    assert found.values[PROCESS if symbol == MEMORY else RISE] == 9000.0
    assert found.values[PEAK] == 9000.0
    assert found.values["gpu_sample_gap_ms"] > 400


def test_both_readings_of_memory_fail(case):
    found = run(case, train=lambda: (case.script.fail(MEMORY, 999).fail(LIST, 999), time.sleep(0.3)))
    assert not {PEAK, METHOD, PROCESS, RISE} & set(found.values)
    for column in (PROCESS, RISE):
        assert found.unavailable[column].code is Code.TOO_FEW_SAMPLES
        assert found.unavailable[column].text in found.unavailable[PEAK].text


def test_one_failed_look_among_many_empties_nothing(gpu_case, tmp_path):
    case = gpu_case()
    readings = {
        Reading.MEMORY: (MEMORY, 30),
        Reading.PROCESSES: (LIST, 10),
        Reading.TEMPERATURE: ("nvmlDeviceGetTemperatureV", 5),
    }
    for symbol, after in (*readings.values(), ("nvmlDeviceGetClockInfo", 10)):
        # Each look tries twice, so a single failure would leave no gap at all.
        case.script.fail(symbol, 999, after=after, times=2)
    kept = tmp_path / "samples.jsonl.gz"
    found = run(case, train=lambda: time.sleep(0.6), keep=kept)
    rows = kept_samples(kept).rows
    assert {name for row in rows for name in row.failed} >= set(readings)
    assert found.values[PEAK] == 300.0
    assert found.values["gpu_temperature_c_max"] == 35.0
    assert found.values["gpu_sm_clock_mhz_median"] == 1410.0
    assert found.values["gpu_other_processes"] == 0


def test_readings_that_become_implausible_in_mid_case(case):
    lines = {"temperature_c": "n/a", "sm_clock_mhz": 0, "mem_clock_mhz": "n/a", "event_reasons": "n/a"}
    found = run(case, train=lambda: case.script.set(**lines), added=lambda: time.sleep(1.5))
    for line in lines:
        assert MEASURED[line] not in found.values
        # Too few samples if it was read before, the driver's answer if it never was.
        assert found.unavailable[MEASURED[line]].code in (Code.TOO_FEW_SAMPLES, Code.IMPLAUSIBLE)
    assert "35 °C was the most until then" in found.unavailable["gpu_temperature_c_max"].text


def test_call_that_fails_at_first_and_recovers(case):
    """What happened before it recovered is unknown."""
    case.script.fail(LIST, 999).fail(LIST.replace("_v3", "_v2"), 999)
    found = run(case, train=lambda: (case.uses(9000), time.sleep(0.3), case.uses(300), case.script.heal()))
    assert PROCESS not in found.values
    assert found.values[PEAK] == 9000.0


@pytest.mark.parametrize(("phase", "column"), [("timing", "gpu_energy_window_s"), ("idle", "gpu_memory_idle_mib")])
def test_sample_that_came_too_late(case, phase, column):
    """Steps are counted from timing-start: a window that began later would make them look cheap."""
    late = lambda: (case.script.latency("nvmlDeviceGetTemperatureV", 0.6, times=None), time.sleep(0.15))  # noqa: E731
    case.watch.start(case.pid, time.monotonic())
    if phase == "idle":
        late()
    case.watch.mark("idle")
    case.script.heal()
    time.sleep(0.7)
    case.watch.mark("context-ready")
    if phase == "timing":
        late()
    case.watch.mark("timing-start")
    case.script.heal()
    time.sleep(0.7)
    case.watch.mark("timing-end")
    case.watch.mark("done")
    found = case.watch.stop(WorkerFacts(energy_steps=10), None).findings
    assert column not in found.values
    assert found.unavailable[column].code is Code.DRIVER_SILENT
