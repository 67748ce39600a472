"""Readings that failed within a case, from samples written by hand; and a real GPU's, in which none did."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mpscale.telemetry.gpu_memory import memory_columns
from mpscale.telemetry.gpu_state import energy_columns, state_columns, suspicions
from mpscale.telemetry.samples import Sample, SampleFile, Samples, read_samples

DATA = Path(__file__).parent / "data"
PEAK, METHOD = "gpu_memory_nvml_peak_mib", "gpu_memory_method"
PHASES = {10: "idle", 20: "context-ready", 50: "timing-start", 90: "timing-end", 160: "energy-end", 165: "done"}
NAMES = {
    "memory": "device_memory_mib",
    "processes": "processes",
    "energy_mj": "energy_j",
    "power_mw": "power_w",
    "temperature_c": "temperature_c",
    "sm_clock_mhz": "sm_clock_mhz",
    "event_reasons": "event_reasons",
}


def samples(failed=None, reasons=None, phases=PHASES, **readings):
    """A case of 17 s at 200 W, looked at every 0.1 s.

    Args:
        failed: {reading: (first, last)}, the samples in which it failed.
        reasons: of the samples.
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
            event_reasons=0,
        )
        for column, values in readings.items():
            if n in values:
                setattr(row, column, values[n])
        for reading, (first, last) in (failed or {}).items():
            if first <= n <= last:
                row.failed = (*row.failed, reading)
                setattr(row, NAMES[reading], None)
                if reading == "processes":
                    row.listed = row.process_memory_mib = row.other_pids = None
        rows.append(row)
    return Samples(rows, {"memory": "broken", "processes": "broken", **(reasons or {})})


def energy(taken):
    return energy_columns(taken, 100, 100, "instant", None)


# Peaks.


@pytest.mark.parametrize(
    ("failed", "process", "rise"),
    [
        pytest.param({}, True, True, id="nothing fails"),
        pytest.param({"memory": (2, 6)}, True, True, id="before the worker touched the GPU"),
        pytest.param({"memory": (167, 169)}, True, True, id="after its last phase"),
        pytest.param({"memory": (30, 40)}, True, False, id="memory, for a second"),
        pytest.param({"processes": (30, 40)}, False, True, id="the list, for a second"),
        pytest.param({"memory": (55, 57)}, True, True, id="no longer than a look takes while steps are timed"),
        pytest.param({"memory": (55, 75)}, True, False, id="for longer"),
        pytest.param({"memory": (100, 169), "processes": (100, 169)}, False, False, id="both to the end"),
        pytest.param({"memory": (10, 10)}, True, False, id="at idle itself"),
    ],
)
def test_a_peak_with_a_gap_is_none(failed, process, rise):
    found = memory_columns(samples(failed), None)
    assert found.values.get("gpu_memory_process_peak_mib") == (300.0 if process else None)
    assert found.values.get("gpu_memory_device_rise_mib") == (300.0 if rise else None)
    assert found.values.get(METHOD) == ("process" if process else "device-minus-idle" if rise else None)
    for column in ("gpu_memory_process_peak_mib", "gpu_memory_device_rise_mib"):
        assert column in found.values or "broken" in found.unavailable[column]


def test_a_gap_that_is_tolerated_is_told():
    found = memory_columns(samples({"memory": (55, 57)}), None).values
    assert found["gpu_sample_gap_ms"] == pytest.approx(310, abs=1)


@pytest.mark.parametrize(
    ("readings", "words"),
    [
        ({"listed": dict.fromkeys(range(60, 80), False)}, "NVML failed to tell"),
        ({"process_memory_mib": dict.fromkeys(range(60, 80))}, "NVML failed to tell"),
        ({"listed": dict.fromkeys(range(166, 170), False)}, None),
    ],
    ids=["the worker vanishes from the list", "its memory vanishes from the entry", "the worker has ended"],
)
def test_a_list_that_no_longer_tells_of_the_worker(readings, words):
    if "listed" in readings:
        readings["process_memory_mib"] = dict.fromkeys(readings["listed"])
    found = memory_columns(samples(**readings), None)
    if words is None:
        assert found.values["gpu_memory_process_peak_mib"] == 300.0
    else:
        assert words in found.unavailable["gpu_memory_process_peak_mib"]


@pytest.mark.parametrize(("first", "last", "value"), [(60, 62, 60.0), (60, 75, None), (160, 169, None)])
def test_the_highest_temperature(first, last, value):
    found = state_columns(samples({"temperature_c": (first, last)}))
    assert found.values.get("gpu_temperature_c_max") == value


@pytest.mark.parametrize(
    ("failed", "known"), [((60, 60), True), ((60, 68), True), ((60, 90), False), ((50, 160), False)]
)
def test_a_median_stands_while_few_readings_failed(failed, known):
    found = state_columns(samples({"sm_clock_mhz": failed}, {"sm_clock_mhz": "broken"}))
    assert found.values.get("gpu_sm_clock_mhz_median") == (1400.0 if known else None)
    if not known:
        assert "broken" in found.unavailable["gpu_sm_clock_mhz_median"]


def test_throttling_that_may_have_gone_unseen():
    found = state_columns(samples({"event_reasons": (60, 120)}))
    for column in ("gpu_event_reasons", "gpu_throttled_share", "gpu_power_capped_share"):
        assert "failed to tell" in found.unavailable[column]
    # What was seen is evidence all the same.
    throttled = samples({"event_reasons": (60, 90)}, event_reasons=dict.fromkeys(range(100, 130), 0x40))
    assert "throttled" in suspicions(throttled, ({}, {}), {}, None)[0].reason


def test_company_that_may_have_gone_unseen():
    found = state_columns(samples({"processes": (60, 90)}, other_pids={100: (7,)}))
    assert "1 were seen" in found.unavailable["gpu_other_processes"]


# Energy.


@pytest.mark.parametrize(
    ("taken", "method", "words"),
    [
        pytest.param(samples(), "counter", None, id="nothing fails"),
        pytest.param(samples({"energy_mj": (80, 120)}), "counter", None, id="the counter is not read in between"),
        pytest.param(samples({"energy_mj": (45, 60)}), "power", "at an end of the window", id="nor at the start"),
        pytest.param(samples({"energy_mj": (140, 169)}), "power", "at an end of the window", id="nor at the end"),
        pytest.param(
            samples(energy_j=dict.fromkeys(range(100, 170), 3000.0)), "power", "stood still", id="the counter stops"
        ),
        pytest.param(
            samples(energy_j={n: 1000.0 + 20.0 * (n - 40 if n > 110 else min(n, 70)) for n in range(170)}),
            "power",
            "stood still",
            id="it stops for a while",
        ),
        pytest.param(
            samples(energy_j={n: 20.0 * (n - 100) for n in range(100, 170)}), "power", "backwards", id="it is reset"
        ),
        pytest.param(
            samples(energy_j={n: 4.29e6 + 20.0 * n for n in range(100, 170)}), "power", "as no GPU draws", id="it leaps"
        ),
        pytest.param(
            samples({"energy_mj": (140, 169), "power_mw": (100, 120)}), None, "power was not read", id="both fail"
        ),
        pytest.param(samples({"energy_mj": (0, 169), "power_mw": (80, 85)}), "power", None, id="a short hole in power"),
    ],
)
def test_energy_that_the_counter_does_not_tell(taken, method, words):
    found = energy(taken)
    assert found.values.get("gpu_energy_method") == method
    if method is not None:
        assert found.values["gpu_energy_j_per_step"] == pytest.approx(22.0, rel=0.01)
    said = found.unavailable.get("gpu_energy_counter_j", "") + found.unavailable.get("gpu_energy_power_j", "")
    assert words is None or words in said


def test_idle_power_of_readings_that_failed():
    assert "gpu_idle_power_w" in energy(samples({"power_mw": (3, 3)})).values
    found = energy(samples({"power_mw": (0, 4)}, {"power_mw": "broken"}))
    assert "broken" in found.unavailable["gpu_idle_power_w"]
    assert "broken" in found.unavailable["gpu_energy_net_j_per_step"]


# A sampler that ended, or came late.


def test_a_sampler_that_ended_leaves_no_peak_of_anything():
    taken = samples(reasons={"silent": "NVML stopped answering after timing-end (it died)"})
    taken = Samples(taken.rows[:120], taken.reasons)
    found = memory_columns(taken, None)
    found.add(state_columns(taken))
    found.add(energy(taken))
    for column in (PEAK, "gpu_temperature_c_max", "gpu_other_processes", "gpu_graphics_processes"):
        assert found.unavailable[column].startswith("NVML stopped answering after timing-end (it died)")


@pytest.mark.parametrize("phase", ["timing-start", "energy-end"])
def test_a_window_whose_end_came_late_has_no_energy(phase):
    found = energy(samples(reasons={"late": phase}))
    assert found.values == {}
    assert f"before it had answered at {phase}" in found.unavailable["gpu_energy_j_per_step"]


def test_what_failed_is_in_the_file(tmp_path):
    file = SampleFile(tmp_path / "samples.csv")
    file.write(Sample(0.5, failed=("memory", "power_mw")))
    file.close()
    read = read_samples((tmp_path / "samples.csv").read_text().splitlines(keepends=True))
    assert read.rows[0].failed == ("memory", "power_mw")


# A real GPU: one NVIDIA H200, driver 580.159.04, and what its columns were.


def test_samples_of_a_real_gpu_lose_nothing():
    taken = real("h200-wide-mixed-dynamic")
    found = memory_columns(taken, 3542.651)
    found.add(energy_columns(taken, 1040, 1040, "instant", None))
    found.add(state_columns(taken))
    assert found.unavailable == {}
    assert found.values[PEAK] == 5252.0
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
    taken = real("h200-mnist1d-mlp-fp32")
    found = memory_columns(taken, 49.0)
    found.add(state_columns(taken))
    assert found.unavailable == {}
    assert (found.values[PEAK], found.values["gpu_memory_device_rise_mib"]) == (674.0, 679.562)


def real(name):
    text = gzip.decompress((DATA / f"{name}.csv.gz").read_bytes()).decode()
    return read_samples(text.splitlines(keepends=True))
