"""Which figures must not be used, with synthetic samples."""

from __future__ import annotations

import pytest

from mpscale.telemetry.gpu_state import state_columns, suspicions
from mpscale.telemetry.samples import ClockEvent, Sample, Samples

CAP, SLOWDOWN, BRAKE = ClockEvent.POWER_CAP, ClockEvent.HARDWARE_SLOWDOWN, ClockEvent.POWER_BRAKE
HOT, HOT_HARDWARE = ClockEvent.SOFTWARE_THERMAL, ClockEvent.HARDWARE_THERMAL
HARMLESS = tuple(event for event in ClockEvent if event not in (SLOWDOWN, BRAKE, HOT, HOT_HARDWARE))
SETTINGS = {"power_limit_w": 400.0, "ecc": True, "persistence": True}


def samples(**readings):
    """Samples of 20 s, timed from 5 s to 19 s; a reading is one value for all samples, or a list."""
    rows = []
    for n in range(200):
        phase = {10: "idle", 50: "timing-start", 190: "timing-end"}.get(n, "")
        row = Sample(n / 10, phase, clock_events=(), sm_clock_mhz=1400.0, temperature_c=60.0)
        for name, value in readings.items():
            setattr(row, name, value[n] if isinstance(value, list) else value)
        rows.append(row)
    return Samples(rows)


def in_window(value, other, first=100, last=130):
    return [value if first <= n < last else other for n in range(200)]


def reasons(taken, before=SETTINGS, after=SETTINGS, first=SETTINGS, slowdown_c=92.0):
    return suspicions(taken, (before, after), first, slowdown_c)


@pytest.mark.parametrize(
    ("readings", "words"),
    [
        ({}, None),
        ({"clock_events": in_window((SLOWDOWN,), ())}, "hardware slowdown"),
        ({"clock_events": in_window((HOT,), ())}, "software thermal slowdown"),
        ({"clock_events": in_window((HOT_HARDWARE,), ())}, "hardware thermal slowdown"),
        ({"clock_events": in_window((BRAKE,), ())}, "hardware power brake"),
        ({"clock_events": in_window((HOT_HARDWARE, SLOWDOWN), ("idle",))}, "hardware slowdown, hardware thermal slow"),
        ({"clock_events": in_window((CAP,), ())}, None),  # a power cap is how a GPU runs under full load
        ({"clock_events": HARMLESS}, None),
        ({"clock_events": in_window((HOT_HARDWARE,), (), 100, 101)}, None),  # one sample is not sustained
        ({"clock_events": in_window((HOT_HARDWARE,), (), 0, 45)}, None),  # before anything was timed
        ({"clock_events": None}, None),
        ({"temperature_c": in_window(92.0, 80.0)}, "92 °C"),
        ({"temperature_c": 91.0}, None),
        ({"sm_clock_mhz": in_window(1100.0, 1400.0, 120, 200)}, "fell from 1400 to 1100 MHz"),
        ({"sm_clock_mhz": in_window(1300.0, 1400.0, 120, 200)}, None),
        ({"sm_clock_mhz": in_window(1100.0, 1400.0, 0, 120)}, None),  # it rose
        ({"sm_clock_mhz": in_window(1100.0, 1400.0, 120, 200), "clock_events": (CAP,)}, None),
        ({"listed": in_window(True, False, 40, 200), "other_pids": in_window((77,), ())}, "process ids 77"),
        ({"listed": in_window(True, False, 40, 200), "other_pids": ()}, None),
        ({"listed": False, "processes": in_window(1, 0, 60, 190), "other_pids": in_window((7,), (), 60, 190)}, None),
        ({"listed": False, "processes": 2, "other_pids": (7, 8)}, "process ids 7, 8"),
    ],
)
def test_suspicious_states(readings, words):
    found = reasons(samples(**readings))
    if words is None:
        assert found == []
    else:
        assert words in found[0].reason
        assert found[0].passes


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("power_limit_w", 300.0, "the power limit (W) was changed {}: 400 to 300"),
        ("ecc", False, "ECC was changed {}: on to off"),
        ("persistence", False, "persistence mode was changed {}: on to off"),
    ],
)
def test_changed_settings_are_not_cured_by_waiting(setting, value, words):
    changed = {**SETTINGS, setting: value}
    (since,) = reasons(samples(), before=changed, after=changed)
    (during,) = reasons(samples(), after=changed)
    assert (since.reason, since.passes) == (words.format("since the first case"), False)
    assert (during.reason, during.passes) == (words.format("during the case"), False)


def test_unknown_settings_are_no_change():
    unknown = dict.fromkeys(SETTINGS)
    assert reasons(samples(), before=unknown, after=unknown) == []
    assert reasons(samples(), first=unknown) == []


def test_state_of_the_timed_window():
    values = state_columns(
        samples(
            clock_events=in_window((CAP, HOT_HARDWARE), ("idle",)),
            utilization=97.0,
            memory_clock_mhz=1215.0,
            listed=True,
            other_pids=(),
        )
    ).values
    assert values["gpu_event_reasons"] == "idle, software power cap, hardware thermal slowdown"
    assert values["gpu_throttled_share"] == pytest.approx(30 / 141)
    assert values["gpu_power_capped_share"] == pytest.approx(30 / 141)
    assert values["gpu_utilization_median"] == 97.0
    assert values["gpu_sm_clock_mhz_median"] == 1400.0
    assert values["gpu_other_processes"] == 0
