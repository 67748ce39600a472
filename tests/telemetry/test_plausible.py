"""Which answers count as measured, on numbers; and that a real GPU's do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpscale.telemetry.nvidia import WAYS, NoNvml, Nvml, _Field, ask, open_nvml, split_memory
from mpscale.telemetry.plausible import RANGES, Doubt, Implausible, checked, checked_memory, checked_process

MIB = 2**20

ON_AN_H200 = {
    "energy_mj": 144_833_679,
    "power_mw": 77_438,
    "power_limit_mw": 700_000,
    "sm_clock_mhz": 345,
    "memory_clock_mhz": 3201,
    "temperature_c": 34,
    "slowdown_c": 89,
    "utilization": 0,
    "event_reasons": 0x1,
    "ecc": 1,
    "persistence": 1,
    "mig": 0,
    "total_bytes": 150_754_820_096,
    "bytes": 0,
    "pcie_generation": 5,
    "pcie_width": 16,
    "compute_capability": 9,
    "minor_capability": 0,
    "cuda_version": 13_000,
    "devices": 1,
}
"""What NVML answers on an idle one, driver 580.159.04."""


def doubt(name, value):
    try:
        assert checked(name, value) == value
    except Implausible as error:
        return error.doubt
    return None


@pytest.mark.parametrize("name", RANGES)
def test_what_a_real_gpu_answers_is_a_measurement(name):
    assert doubt(name, ON_AN_H200[name]) is None


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [2**32 - 1, 2**64 - 1, -1, None, float("nan"), float("inf")])
def test_no_reading_takes_not_available_for_a_value(name, value):
    assert doubt(name, value) is Doubt.NOT_AVAILABLE


@pytest.mark.parametrize("name", RANGES)
def test_a_small_negative_number_without_its_sign_is_out_of_range(name):
    assert doubt(name, 2**32 - 5) in (
        (None,) if name in ("energy_mj", "bytes", "total_bytes") else (Doubt.OUT_OF_RANGE,)
    )
    assert doubt(name, 2**64 - 5) is Doubt.OUT_OF_RANGE


@pytest.mark.parametrize("name", RANGES)
def test_zero_counts_only_where_there_can_be_nothing(name):
    real = {"utilization", "event_reasons", "ecc", "persistence", "mig", "bytes", "minor_capability", "devices"}
    assert doubt(name, 0) is (None if name in real else Doubt.ZERO)


@pytest.mark.parametrize(
    ("name", "most"),
    [("power_mw", 1_400_000), ("memory_clock_mhz", 14_001), ("sm_clock_mhz", 3_105), ("temperature_c", 105)],
    ids=["a B300 at its limit", "an RTX 5090's memory", "an RTX 4090's boost", "a hot GPU"],
)
def test_ranges_leave_room_for_other_gpus(name, most):
    assert doubt(name, most) is None


def test_every_number_that_is_read_over_and_over_has_a_range():
    assert set(WAYS) - set(RANGES) == {"memory", "Compute", "Graphics", "MPSCompute"}


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ((1000, 0, 1000), None),
        ((1000, 400, 600), None),
        ((1000, 1001, 0), Doubt.INCONSISTENT),
        ((1000, 0, 1001), Doubt.INCONSISTENT),
        ((0, 0, 0), Doubt.ZERO),
        ((2**64 - 1, 0, 0), Doubt.NOT_AVAILABLE),
        ((1000, 2**64 - 1, 0), Doubt.NOT_AVAILABLE),
    ],
)
def test_memory_in_use_is_a_part_of_all(memory, expected):
    _, failure = ask(checked_memory, *memory)
    assert (None if failure is None else failure.doubt) is expected


def test_what_is_reserved_is_a_part_of_what_is_used():
    with pytest.raises(Implausible, match="reserved"):
        split_memory(1000.0, 100.0, 900.0, 500.0)


@pytest.mark.parametrize(
    ("used", "expected"),
    [(300 * MIB, 300.0), (None, None), (2**64 - 1, None), (0, None), (50_000 * MIB, None), (40_960 * MIB, 40_960.0)],
)
def test_memory_of_a_process(used, expected):
    """Some versions of nvidia-ml-py hand all bits one on as a number."""
    assert checked_process(used, 40_960.0) == expected
    assert checked_process(300 * MIB, None) == 300.0


class Fields:
    """nvidia-ml-py with one field."""

    NVMLError = RuntimeError

    def __init__(self, kind, value, stamp=0):
        self.answer = SimpleNamespace(nvmlReturn=0, valueType=kind, value=SimpleNamespace(**value), timestamp=stamp)

    def nvmlDeviceGetFieldValues(self, handle, fields):
        return [self.answer]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (0, {"dVal": 77_438.0}, 77_438.0),
        (1, {"uiVal": 77_438}, 77_438),
        (6, {"usVal": 60_000}, 60_000),
        (0, {"dVal": float("nan")}, Doubt.NOT_AVAILABLE),
        (1, {"uiVal": 2**32 - 1}, Doubt.NOT_AVAILABLE),
        (4, {"sllVal": -1}, Doubt.NOT_AVAILABLE),
        (6, {"usVal": 2**16 - 1}, Doubt.NOT_AVAILABLE),
        (7, {}, Doubt.UNKNOWN_TYPE),
        (2**31, {}, Doubt.UNKNOWN_TYPE),
    ],
)
def test_value_of_a_field_by_its_type(kind, value, expected):
    field = _Field(186)
    found, failure = ask(lambda: checked("power_mw", field(Fields(kind, value), "handle")))
    assert (found if failure is None else failure.doubt) == expected
    if failure is not None:
        # An answer that is none is asked for again: the call is there.
        assert not failure.absent


def test_field_that_stands_still_is_stale(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mpscale.telemetry.nvidia.time.monotonic", lambda: now[0])
    field, library, handle = _Field(186), Fields(1, {"uiVal": 5000}, stamp=7), object()
    assert field(library, handle) == 5000
    now[0] += 0.9
    assert field(library, handle) == 5000
    now[0] += 0.2
    with pytest.raises(Implausible) as caught:
        field(library, handle)
    assert caught.value.doubt is Doubt.STALE
    library.answer.timestamp = 8
    assert field(library, handle) == 5000
    # A driver that stamps nothing is not held against itself.
    library.answer.timestamp = 0
    field(library, handle)
    now[0] += 60.0
    assert field(library, handle) == 5000


class Library:
    """nvidia-ml-py, for what is asked when it is opened."""

    def __init__(self, **answers):
        self._answers = answers

    def __getattr__(self, name):
        answers = {"nvmlInit": None, "nvmlShutdown": None, **self._answers}
        if name not in answers:
            raise AttributeError(name)
        return lambda *arguments: answers[name]


@pytest.mark.parametrize("count", [2**32 - 1, -1, 5000])
def test_a_number_of_gpus_that_cannot_be(monkeypatch, count):
    library = Library(nvmlDeviceGetCount=count)
    monkeypatch.setattr("mpscale.telemetry.nvidia.importlib.import_module", lambda name: library)
    found = open_nvml()
    assert isinstance(found, NoNvml)
    assert "NVML answers" in found.reason


@pytest.mark.parametrize(("number", "version"), [(12_080, "12.8"), (0, None), (-1, None), (2**31 - 1, None)])
def test_version_of_cuda_is_known_or_none(number, version):
    assert Nvml(Library(nvmlSystemGetCudaDriverVersion=number), 0).cuda_driver_version() == version


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), (9, 0)), ((-1, -1), None), ((0, 0), None), ((8, -1), None), ((2**31 - 1, 0), None)],
)
def test_compute_capability_is_known_or_none(capability, expected):
    library = Library(nvmlDeviceGetHandleByIndex="handle", nvmlDeviceGetCudaComputeCapability=capability)
    (device,) = Nvml(library, 1).devices()
    assert device.compute_capability == expected
    assert device.has_tf32 == (expected is not None)
