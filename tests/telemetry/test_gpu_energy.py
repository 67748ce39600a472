"""Energy from samples written by hand."""

from __future__ import annotations

import pytest

from mpscale.core.columns import Source, Topic, measured_columns
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.gpu_energy import energy_columns
from mpscale.telemetry.samples import Sample, Samples


def samples(*, seconds=10.0, watt=200.0, joules=True, power=True, end="timing-end", tick=0.1, start_j=1000.0):
    """A GPU at constant power, sampled every 0.1 s; its counter moves every ``tick`` seconds."""
    rows = []
    for n in range(int(seconds * 10) + 31):
        at = n / 10
        phase = {20: "idle", 21: "timing-start", int(seconds * 10) + 21: end}.get(n, "")
        rows.append(
            Sample(
                at,
                phase,
                energy_j=start_j + watt * (at // tick) * tick if joules else None,
                power_w=watt if power else None,
            )
        )
    return Samples(rows)


def columns(found_in, steps=100, applied=100, off=None):
    return energy_columns(found_in, steps, applied, "instant", off)


@pytest.mark.parametrize(
    ("joules", "power", "method"), [(True, True, "counter"), (True, False, "counter"), (False, True, "power")]
)
def test_counter_is_preferred_to_power(joules, power, method):
    values = columns(samples(joules=joules, power=power)).values
    assert values["gpu_energy_method"] == method
    assert values["gpu_energy_j_per_step"] == pytest.approx(20.0, rel=0.01)
    assert values["gpu_power_w_mean"] == pytest.approx(200.0, rel=0.01)


def test_window_includes_the_added_steps():
    taken = samples(seconds=12.0, end="energy-end")
    taken.rows[60].phase = "timing-end"
    assert columns(taken).values["gpu_energy_window_s"] == pytest.approx(12.0)


@pytest.mark.parametrize("tick", [0.02, 0.1, 0.5])
def test_counter_is_interpolated_between_ticks(tick):
    assert columns(samples(tick=tick)).values["gpu_energy_counter_j"] == pytest.approx(2000.0, rel=0.01)


@pytest.mark.parametrize(
    ("taken", "code"),
    [
        (samples(seconds=9.0), Code.WINDOW_TOO_SHORT),
        (samples(joules=False, power=False), Code.NOT_TOLD),
        (samples(watt=0.0), Code.IMPLAUSIBLE),
        (Samples(), Code.NOT_REACHED),
    ],
)
def test_no_figure_without_a_reason_and_never_zero(taken, code):
    found = columns(taken)
    assert "gpu_energy_j_per_step" not in found.values
    assert found.unavailable["gpu_energy_j_per_step"].code is code
    assert set(found.values) | set(found.unavailable) == set(measured_columns(Topic.ENERGY, Source.MONITOR))
    assert 0 not in [value for value in found.values.values() if isinstance(value, float)]


@pytest.mark.parametrize(("applied", "code"), [(0, Code.NEVER_HAPPENED), (None, Code.NOT_IN_MODE)])
def test_no_energy_per_applied_step(applied, code):
    found = columns(samples(), applied=applied)
    assert found.unavailable["gpu_energy_j_per_applied_step"].code is code
    assert "gpu_energy_j_per_step" in found.values


def test_net_energy_is_never_negative():
    found = columns(samples())
    assert found.unavailable["gpu_energy_net_j_per_step"].code is Code.NEVER_HAPPENED


def test_reason_when_energy_is_off():
    off = Reason(Code.NOT_ASKED_FOR, "energy was off")
    assert set(columns(samples(), off=off).unavailable.values()) == {off}
