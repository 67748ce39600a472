"""Readings that fail within a case, with synthetic samples; and samples of a real GPU, in which none fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gpu_case import kept_samples

from mpscale.core.columns import Source, measured_columns
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.gpu_energy import energy_columns
from mpscale.telemetry.gpu_memory import AllocatorFacts, memory_columns
from mpscale.telemetry.gpu_state import state_columns, suspicions
from mpscale.telemetry.samples import ClockEvent, Reading, Sample, Samples

DATA = Path(__file__).parent / "data"
PEAK, METHOD = "gpu_memory_nvml_peak_mib", "gpu_memory_method"
STAGES = {PEAK, "gpu_memory_queued_peak_mib", "gpu_memory_evaluation_peak_mib"}
PHASES = {
    10: "idle",
    20: "context-ready",
    45: "steps-synchronised",
    50: "timing-start",
    90: "timing-end",
    160: "energy-end",
    165: "done",
}
BROKEN = Reason(Code.OTHER, "broken", "repair it")


def samples(failed=None, phases=PHASES, **readings):
    """A case of 17 s at 200 W, sampled every 0.1 s.

    Args:
        failed: {reading: (first, last)}, the samples in which it failed.
        phases: {number of the sample: phase}.
        readings: {column: {number of the sample: value}}.
    """
    rows = []
    for n in range(170):
        row = Sample(
            n / 10,
            phases.get(n, ""),
            looks=10,
            gap_s=0.01,
            listed=n > 10,
            process_memory_mib=300.0 if n > 10 else None,
            device_memory_mib=750.0 if n > 10 else 450.0,
            processes=int(n > 10),
            other_pids=(),
            graphics_pids=(),
            energy_j=1000.0 + 20.0 * n,
            power_w=200.0,
            sm_clock_mhz=1400.0,
            memory_clock_mhz=1200.0,
            temperature_c=60.0,
            utilization=90.0,
            clock_events=(),
        )
        for column, values in readings.items():
            if n in values:
                setattr(row, column, values[n])
        for reading, (first, last) in (failed or {}).items():
            if first <= n <= last:
                row.failed = (*row.failed, reading)
                setattr(row, reading, None)
                if reading is Reading.PROCESSES:
                    row.listed = row.process_memory_mib = row.other_pids = None
        rows.append(row)
    return Samples(rows, dict.fromkeys([Reading.MEMORY, Reading.PROCESSES, *(failed or {})], BROKEN))


def energy(taken):
    return energy_columns(taken, 100, 100, "instant", None)


@pytest.mark.parametrize(
    ("failed", "process", "rise"),
    [
        pytest.param({}, True, True, id="nothing fails"),
        pytest.param({Reading.MEMORY: (2, 6)}, True, True, id="before the worker touched the GPU"),
        pytest.param({Reading.MEMORY: (167, 169)}, True, True, id="after its last phase"),
        pytest.param({Reading.MEMORY: (30, 40)}, True, False, id="memory, for a second"),
        pytest.param({Reading.PROCESSES: (30, 40)}, False, True, id="the list, for a second"),
        pytest.param(
            {Reading.MEMORY: (55, 57)}, True, True, id="no longer than between two looks while steps are timed"
        ),
        pytest.param({Reading.MEMORY: (55, 75)}, True, False, id="for longer"),
        pytest.param({Reading.MEMORY: (100, 169), Reading.PROCESSES: (100, 169)}, False, False, id="both to the end"),
        pytest.param({Reading.MEMORY: (10, 10)}, True, False, id="at idle itself"),
    ],
)
def test_a_peak_with_a_gap_is_empty(failed, process, rise):
    found = memory_columns(samples(failed))
    assert found.values.get("gpu_memory_process_peak_mib") == (300.0 if process else None)
    assert found.values.get("gpu_memory_device_rise_mib") == (300.0 if rise else None)
    # These two are known from the synchronised steps on.
    early = max((last for _, last in (failed or {}).values()), default=0) < 50
    assert early or (found.values[PEAK], found.values[METHOD]) == (300.0, "process")
    if early:
        assert found.values.get(METHOD) == ("process" if process else "device-minus-idle" if rise else None)
    for column in ("gpu_memory_process_peak_mib", "gpu_memory_device_rise_mib"):
        if column not in found.values:
            assert found.unavailable[column].code in (Code.TOO_FEW_SAMPLES, BROKEN.code)
            assert found.unavailable[column].cure == BROKEN.cure


def test_a_tolerated_gap_is_reported():
    found = memory_columns(samples({Reading.MEMORY: (55, 57)})).values
    assert found["gpu_sample_gap_ms"] == pytest.approx(310, abs=1)


@pytest.mark.parametrize(
    ("readings", "known"),
    [
        ({"listed": dict.fromkeys(range(60, 80), False)}, False),
        ({"process_memory_mib": dict.fromkeys(range(60, 80))}, False),
        ({"listed": dict.fromkeys(range(166, 170), False)}, True),
    ],
    ids=["the worker vanishes from the list", "its memory vanishes from the entry", "the worker has ended"],
)
def test_a_list_that_loses_the_worker(readings, known):
    if "listed" in readings:
        readings["process_memory_mib"] = dict.fromkeys(readings["listed"])
    found = memory_columns(samples(**readings))
    if known:
        assert found.values["gpu_memory_process_peak_mib"] == 300.0
    else:
        assert found.unavailable["gpu_memory_process_peak_mib"].code is Code.TOO_FEW_SAMPLES


@pytest.mark.parametrize(("first", "last", "value"), [(60, 62, 60.0), (60, 75, None), (160, 169, None)])
def test_the_highest_temperature(first, last, value):
    found = state_columns(samples({Reading.TEMPERATURE: (first, last)}))
    assert found.values.get("gpu_temperature_c_max") == value


@pytest.mark.parametrize(
    ("failed", "known"), [((60, 60), True), ((60, 68), True), ((60, 90), False), ((50, 160), False)]
)
def test_a_median_stands_while_few_readings_failed(failed, known):
    found = state_columns(samples({Reading.SM_CLOCK: failed}))
    assert found.values.get("gpu_sm_clock_mhz_median") == (1400.0 if known else None)
    if not known:
        assert found.unavailable["gpu_sm_clock_mhz_median"].cure == BROKEN.cure


def test_throttling_that_may_have_been_missed():
    found = state_columns(samples({Reading.CLOCK_EVENTS: (60, 120)}))
    for column in ("gpu_event_reasons", "gpu_throttled_share", "gpu_power_capped_share"):
        assert found.unavailable[column].code is Code.TOO_FEW_SAMPLES
    # What was seen still counts as evidence.
    throttled = samples(
        {Reading.CLOCK_EVENTS: (60, 90)}, clock_events=dict.fromkeys(range(100, 130), (ClockEvent.HARDWARE_THERMAL,))
    )
    assert "throttled" in suspicions(throttled, ({}, {}), {}, None)[0].reason


def test_other_processes_that_may_have_been_missed():
    found = state_columns(samples({Reading.PROCESSES: (60, 90)}, other_pids={100: (7,)}))
    assert found.unavailable["gpu_other_processes"].code is Code.TOO_FEW_SAMPLES


@pytest.mark.parametrize(
    ("taken", "method", "counter", "power"),
    [
        pytest.param(samples(), "counter", None, None, id="nothing fails"),
        pytest.param(
            samples({Reading.ENERGY: (80, 120)}), "counter", None, None, id="the counter is not read in between"
        ),
        pytest.param(
            samples({Reading.ENERGY: (45, 60)}),
            "power",
            Code.TOO_FEW_SAMPLES,
            None,
            id="nor at the start of the window",
        ),
        pytest.param(samples({Reading.ENERGY: (140, 169)}), "power", Code.TOO_FEW_SAMPLES, None, id="nor at its end"),
        pytest.param(
            samples(energy_j=dict.fromkeys(range(100, 170), 3000.0)),
            "power",
            Code.IMPLAUSIBLE,
            None,
            id="the counter stops",
        ),
        pytest.param(
            samples(energy_j={n: 1000.0 + 20.0 * (n - 40 if n > 110 else min(n, 70)) for n in range(170)}),
            "power",
            Code.IMPLAUSIBLE,
            None,
            id="it stops for a while",
        ),
        pytest.param(
            samples(energy_j={n: 20.0 * (n - 100) for n in range(100, 170)}),
            "power",
            Code.IMPLAUSIBLE,
            None,
            id="it is reset",
        ),
        pytest.param(
            samples(energy_j={n: 4.29e6 + 20.0 * n for n in range(100, 170)}),
            "power",
            Code.IMPLAUSIBLE,
            None,
            id="it leaps",
        ),
        pytest.param(
            samples({Reading.ENERGY: (140, 169), Reading.POWER: (100, 120)}),
            None,
            Code.TOO_FEW_SAMPLES,
            Code.TOO_FEW_SAMPLES,
            id="both fail",
        ),
        pytest.param(
            samples({Reading.ENERGY: (0, 169), Reading.POWER: (80, 85)}),
            "power",
            BROKEN.code,
            None,
            id="a short hole in power",
        ),
    ],
)
def test_energy_when_the_counter_fails(taken, method, counter, power):
    found = energy(taken)
    assert found.values.get("gpu_energy_method") == method
    if method is not None:
        assert found.values["gpu_energy_j_per_step"] == pytest.approx(22.0, rel=0.01)
    for column, code in (("gpu_energy_counter_j", counter), ("gpu_energy_power_j", power)):
        reason = found.unavailable.get(column)
        assert (reason and reason.code) == code


def test_idle_power_when_readings_failed():
    assert "gpu_idle_power_w" in energy(samples({Reading.POWER: (3, 3)})).values
    found = energy(samples({Reading.POWER: (0, 4)}))
    for column in ("gpu_idle_power_w", "gpu_energy_net_j_per_step"):
        assert found.unavailable[column].code is Code.TOO_FEW_SAMPLES


def test_a_monitor_that_ended_leaves_no_peak_of_anything():
    taken = Samples(samples().rows[:120], silent=Reason(Code.MONITOR_DIED, "it died"))
    found = memory_columns(taken)
    found.add(state_columns(taken))
    found.add(energy(taken))
    assert found.values[PEAK] == 300.0  # which had been measured by then
    for column in (
        "gpu_memory_process_peak_mib",
        "gpu_temperature_c_max",
        "gpu_other_processes",
        "gpu_graphics_processes",
    ):
        assert found.unavailable[column].code is Code.MONITOR_DIED


@pytest.mark.parametrize("phase", ["timing-start", "energy-end"])
def test_a_window_whose_end_came_late_has_no_energy(phase):
    found = energy(Samples(samples().rows, late=(phase,)))
    assert found.values == {}
    assert found.unavailable["gpu_energy_j_per_step"].code is Code.DRIVER_SILENT


def test_samples_of_a_real_gpu_lose_nothing():
    """An NVIDIA H200 with driver 580.159.04, and its columns at that time."""
    taken = kept_samples(DATA / "h200-wide-mixed-dynamic.jsonl.gz")
    found = memory_columns(taken, AllocatorFacts(3542.651))
    found.add(energy_columns(taken, 1040, 1040, "instant", None))
    found.add(state_columns(taken))
    # They were taken before the phases that tell these peaks apart.
    assert set(found.unavailable) == STAGES
    assert set(found.values) | STAGES == set(measured_columns(source=Source.MONITOR))
    assert "5252 MiB was the peak of the whole case" in found.unavailable[PEAK].text
    assert found.values["gpu_memory_process_peak_mib"] == 5252.0
    assert found.values["gpu_memory_device_rise_mib"] == 5257.562
    assert found.values["gpu_memory_idle_mib"] == 3.25
    assert found.values["gpu_memory_reserved_mib"] == 615.062
    assert found.values["gpu_sample_gap_ms"] == 125.0
    assert found.values["gpu_energy_counter_j"] == pytest.approx(6885.117, abs=1e-3)
    assert found.values["gpu_energy_power_j"] == pytest.approx(6842.742, abs=1e-3)
    assert found.values["gpu_idle_power_w"] == pytest.approx(77.11975)
    assert found.values["gpu_temperature_c_max"] == 57.0
    assert found.values["gpu_sm_clock_mhz_median"] == 1680.0
    assert found.values["gpu_event_reasons"] == "software power cap"
    assert found.values["gpu_other_processes"] == 0
    assert suspicions(taken, ({}, {}), {}, 89.0) == []


def test_samples_of_a_short_case_on_a_real_gpu_lose_nothing():
    taken = kept_samples(DATA / "h200-mnist1d-mlp-fp32.jsonl.gz")
    found = memory_columns(taken, AllocatorFacts(49.0))
    found.add(state_columns(taken))
    assert set(found.unavailable) == STAGES
    assert (found.values["gpu_memory_process_peak_mib"], found.values["gpu_memory_device_rise_mib"]) == (674.0, 679.562)
