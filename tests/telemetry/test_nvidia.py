"""Which answers of NVML are measurements."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.backend import ABSENT, RANGES, Implausible
from mpscale.telemetry.nvidia import Field, Nvidia, check_memory, open_backend, process_memory, split_memory
from mpscale.telemetry.samples import Reading

MIB = 2**20
MILLI = (Reading.ENERGY, Reading.POWER, Reading.POWER_LIMIT)
NUMBERS = {
    Reading.ENERGY: 144_833_679,
    Reading.POWER: 77_438,
    Reading.POWER_LIMIT: 700_000,
    Reading.SM_CLOCK: 345,
    Reading.MEMORY_CLOCK: 3201,
    Reading.TEMPERATURE: 34,
    Reading.UTILIZATION: 0,
    Reading.ECC: 1,
    Reading.PERSISTENCE: 1,
}
"""What NVML answers on an idle H200, driver 580.159.04."""


class Library:
    """nvidia-ml-py whose functions all return one value, except for some.

    Args:
        value: what a function returns.
        answers: other answers, by function; an exception is raised.
    """

    nvmlMemory_v2 = 2
    NVMLError = RuntimeError

    def __init__(self, value=1, **answers):
        self._value, self._answers = value, answers

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments, **named):
            answer = self._answers.get(name, self._answer(name))
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def _answer(self, name):
        value = self._value
        return {
            "nvmlSystemGetDriverVersion": "580.159.04",
            "nvmlDeviceGetPowerManagementLimitConstraints": (10_000_000, 10_000_000),
            "nvmlDeviceGetEccMode": (value, value),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=value),
            "nvmlDeviceGetFieldValues": [
                SimpleNamespace(nvmlReturn=0, valueType=0, value=SimpleNamespace(dVal=value), timestamp=0)
            ],
        }.get(name, value)


def read(reading, value):
    return Nvidia(Library(value), 1).gpu(Device("gpu", "a GPU", "GPU-1")).read(reading)


def test_every_reading_that_is_a_number_has_a_range():
    others = {Reading.PROCESSES, Reading.GRAPHICS_PROCESSES, Reading.SERVICE_PROCESSES}
    others |= {Reading.MEMORY, Reading.RESERVED_MEMORY, Reading.CLOCK_EVENTS}
    assert set(RANGES) == set(NUMBERS) == {*Reading} - others


@pytest.mark.parametrize("reading", NUMBERS)
def test_what_a_real_gpu_answers_is_a_measurement(reading):
    raw = NUMBERS[reading]
    assert read(reading, raw) == (raw / 1e3 if reading in MILLI else raw)


@pytest.mark.parametrize("reading", NUMBERS)
@pytest.mark.parametrize("value", [2**32 - 1, 2**64 - 1, -1, None, float("nan"), float("inf")])
def test_no_reading_takes_not_available_for_a_value(reading, value):
    assert read(reading, value).code is Code.IMPLAUSIBLE


@pytest.mark.parametrize("reading", NUMBERS)
def test_a_small_negative_number_without_its_sign_is_implausible(reading):
    small = read(reading, 2**32 - 5)
    assert (reading is Reading.ENERGY) == (not isinstance(small, Reason))
    assert read(reading, 2**64 - 5).code is Code.IMPLAUSIBLE


@pytest.mark.parametrize("reading", NUMBERS)
def test_zero_counts_only_where_there_can_be_nothing(reading):
    can_be = reading in (Reading.UTILIZATION, Reading.ECC, Reading.PERSISTENCE)
    assert isinstance(read(reading, 0), Reason) != can_be


@pytest.mark.parametrize(
    ("reading", "most"),
    [
        (Reading.POWER, 1_400_000),
        (Reading.MEMORY_CLOCK, 14_001),
        (Reading.SM_CLOCK, 3_105),
        (Reading.TEMPERATURE, 105),
    ],
    ids=["a B300 at its limit", "an RTX 5090's memory", "an RTX 4090's boost", "a hot GPU"],
)
def test_ranges_leave_room_for_other_gpus(reading, most):
    assert not isinstance(read(reading, most), Reason)


@pytest.mark.parametrize(
    ("memory", "plausible"),
    [
        ((1000, 0, 1000), True),
        ((1000, 400, 600), True),
        ((1000, 1001, 0), False),
        ((1000, 0, 1001), False),
        ((0, 0, 0), False),
        ((2**64 - 1, 0, 0), False),
        ((1000, 2**64 - 1, 0), False),
    ],
)
def test_memory_in_use_is_part_of_all(memory, plausible):
    assert isinstance(Nvidia(None).ask(check_memory, *memory), Reason) != plausible


def test_reserved_memory_is_part_of_memory_in_use():
    with pytest.raises(Implausible):
        split_memory(1000.0, 100.0, 900.0, 500.0)


@pytest.mark.parametrize(
    ("used", "expected"),
    [(300 * MIB, 300.0), (None, None), (2**64 - 1, None), (0, None), (50_000 * MIB, None), (40_960 * MIB, 40_960.0)],
)
def test_memory_of_a_process(used, expected):
    """Some versions of nvidia-ml-py return all ones as a number."""
    assert process_memory(used, 40_960.0) == expected
    assert process_memory(300 * MIB, None) == 300.0


def field(kind, value, stamp=0):
    answer = SimpleNamespace(nvmlReturn=0, valueType=kind, value=SimpleNamespace(**value), timestamp=stamp)
    return Field(Nvidia(Library(nvmlDeviceGetFieldValues=[answer])), "handle", 186), answer


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (0, {"dVal": 77_438.0}, 77_438.0),
        (1, {"uiVal": 77_438}, 77_438),
        (6, {"usVal": 60_000}, 60_000),
        (6, {"usVal": 2**16 - 1}, -1),  # all ones, which no reading takes for a value
        (7, {}, Code.IMPLAUSIBLE),
        (2**31, {}, Code.IMPLAUSIBLE),
    ],
)
def test_value_of_a_field_by_its_type(kind, value, expected):
    found = Nvidia(None).ask(field(kind, value)[0])
    assert (found.code if isinstance(found, Reason) else found) == expected


def test_an_implausible_answer_is_asked_for_again():
    assert Code.IMPLAUSIBLE not in ABSENT


def test_field_that_stands_still_is_stale(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mpscale.telemetry.nvidia.time.monotonic", lambda: now[0])
    read_field, answer = field(1, {"uiVal": 5000}, stamp=7)
    assert read_field() == 5000
    now[0] += 0.9
    assert read_field() == 5000
    now[0] += 0.2
    with pytest.raises(Implausible):
        read_field()
    answer.timestamp = 8
    assert read_field() == 5000
    # A driver that gives no timestamps is not held against itself.
    answer.timestamp = 0
    read_field()
    now[0] += 60.0
    assert read_field() == 5000


@pytest.mark.parametrize("count", [2**32 - 1, -1, 5000])
def test_an_impossible_number_of_gpus(monkeypatch, count):
    library = Library(nvmlDeviceGetCount=count)
    monkeypatch.setattr("mpscale.telemetry.nvidia.importlib.import_module", lambda name: library)
    found = open_backend()
    assert isinstance(found, Reason)
    assert found.code is Code.IMPLAUSIBLE


def test_a_function_that_nvidia_ml_py_lacks():
    found = Nvidia(SimpleNamespace()).ask(Nvidia(SimpleNamespace()).call, "nvmlInit")
    assert found.code is Code.BINDING_TOO_OLD
    assert found.cure


@pytest.mark.parametrize(("number", "version"), [(12_080, "12.8"), (0, None), (-1, None), (2**31 - 1, None)])
def test_version_of_cuda_is_known_or_none(number, version):
    assert Nvidia(Library(nvmlSystemGetCudaDriverVersion=number)).runtime_version() == version


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), (9, 0)), ((-1, -1), None), ((0, 0), None), ((8, -1), None), ((2**31 - 1, 0), None)],
)
def test_compute_capability_is_known_or_none(capability, expected):
    missing = dict.fromkeys(
        ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetPciInfo", "nvmlDeviceGetMigMode"), RuntimeError("no such call")
    )
    library = Library("text", nvmlDeviceGetCudaComputeCapability=capability, **missing)
    (device,) = Nvidia(library, 1).devices()
    assert device.compute_capability == expected
    assert device.has_tf32 == (expected is not None)
