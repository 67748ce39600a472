"""Which device a run uses."""

from __future__ import annotations

import json

import pytest

from mpscale.core.device import Device, NoSuchDevice, find_device, find_replicas
from mpscale.core.reason import Code
from mpscale.telemetry import host

GPUS = [
    Device("gpu", "NVIDIA H200", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (9, 0), 143_771.0),
    Device("gpu", "Tesla V100", "GPU-8932aaaa-0000-0000-0000-000000000001", (7, 0), 16_384.0),
    Device("gpu", "GPU 2, which does not answer"),
]


A100 = Device("gpu", "NVIDIA A100", "GPU-aaaa0000-0000-0000-0000-000000000000", (8, 0), 40_960.0, "0000:07", mig=True)
MIG = [
    Device("gpu", f"NVIDIA A100 MIG {size}", f"MIG-bbbb{n}000-0000-0000-0000-000000000000").part_of(A100)
    for n, size in enumerate(("3g.20gb", "1g.5gb"))
]


def find(visible: str | None, devices: list[Device] = GPUS) -> Device:
    return find_device(devices, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, host.cpu())


@pytest.mark.parametrize(
    ("visible", "index"),
    [
        (None, 0),
        ("0", 0),
        ("1", 1),
        (" 1 ", 1),
        ("1,0", 1),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 0),
        ("GPU-8932a", 1),
        ("gpu-8932AAAA", 1),
        ("GPU-8932a,7", 1),
    ],
)
def test_the_first_visible_gpu(visible: str | None, index: int) -> None:
    assert find(visible) is GPUS[index]


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "NoDevFiles"])
def test_hidden_gpus_leave_the_cpu(visible: str) -> None:
    assert find(visible).kind == "cpu"


@pytest.mark.parametrize("visible", [None, "0", "GPU-8932a", "MIG-57fdd0f8", ""])
def test_the_cpu_if_the_driver_knows_no_gpu(visible: str | None) -> None:
    device = find(visible, [])
    assert (device.kind, device.uuid, device.compute_capability, device.has_tf32) == ("cpu", None, None, False)
    assert device.name
    assert device.memory_mib is None or device.memory_mib > 0


@pytest.mark.parametrize(
    ("visible", "words"),
    [
        ("3", "matches no GPU"),
        ("-2", "matches no GPU"),
        ("cuda:0", "matches no GPU"),
        ("8932f937", "matches no GPU"),
        ("GPU-ffff", "matches no GPU"),
        ("GPU-8932", "matches several GPUs"),
    ],
)
def test_an_ambiguous_or_unknown_gpu_is_refused_with_a_list(visible: str, words: str) -> None:
    with pytest.raises(NoSuchDevice, match=words) as caught:
        find(visible)
    reason = caught.value.reason
    assert reason.code is Code.NO_DEVICE
    assert repr(visible) in reason.text
    assert "0: NVIDIA H200, GPU-8932f937" in reason.cure
    assert "1: Tesla V100, GPU-8932aaaa" in reason.cure


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, MIG[0]),
        ("0", MIG[0]),
        ("1", GPUS[0]),
        ("GPU-aaaa", MIG[0]),
        ("MIG-bbbb1", MIG[1]),
        ("MIG-bbbb1000-0000-0000-0000-000000000000,0", MIG[1]),
    ],
)
def test_an_instance_of_a_gpu_in_mig_mode(visible: str | None, expected: Device) -> None:
    found = find(visible, [A100, *MIG, *GPUS])
    assert found == expected
    if expected in MIG:
        assert (found.parent_uuid, found.compute_capability) == (A100.uuid, (8, 0))


@pytest.mark.parametrize(
    ("visible", "devices", "words"),
    [
        ("0", [A100], "has no instance"),
        ("MIG-bbbb", [A100, *MIG], "matches several"),
        ("MIG-cccc", [A100, *MIG], "matches no GPU"),
    ],
)
def test_missing_mig_instance(visible: str, devices: list[Device], words: str) -> None:
    with pytest.raises(NoSuchDevice, match=words):
        find(visible, devices)


def test_a_gpu_without_uuid_is_refused() -> None:
    with pytest.raises(NoSuchDevice, match="no UUID for GPU 2, which does not answer"):
        find("2")


@pytest.mark.parametrize("device", [*GPUS, A100, *MIG, Device("cpu", "Intel", memory_mib=1.5)])
def test_json_and_back(device: Device) -> None:
    assert Device.from_json(device.to_json()) == device


SAME = [Device("gpu", "NVIDIA A100", f"GPU-{n}000") for n in range(3)]


@pytest.mark.parametrize(
    ("visible", "wanted", "used"),
    [
        (None, None, (0, 1, 2)),
        (None, 2, (0, 1)),
        ("2,0", None, (2, 0)),
        ("GPU-1, GPU-0", 1, (1,)),
        ("1", None, (1,)),
    ],
)
def test_replicas_use_the_visible_gpus_in_their_order(
    visible: str | None, wanted: int | None, used: tuple[int]
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    device, number = find_replicas(SAME, environ, host.cpu(), wanted)
    assert number == len(used)
    assert (device.uuid, *device.beside) == tuple(SAME[place].uuid for place in used)
    assert Device.from_json(json.loads(json.dumps(device.to_json()))) == device


@pytest.mark.parametrize(
    ("devices", "visible", "wanted", "message"),
    [
        (SAME, "0,1", 3, "3 replicas need as many GPUs, and CUDA_VISIBLE_DEVICES leaves 2"),
        (SAME, "0,7", None, "'7' matches no GPU"),
        (SAME, "0,0", None, "a GPU is named twice"),
        (GPUS[:2], None, None, "the GPUs differ: NVIDIA H200, Tesla V100"),
        ([*SAME[:1], A100, *MIG], "0,1", None, "MIG"),
        (SAME, "-1", None, "a CPU is one device; say how many replicas"),
        ([], None, None, "a CPU is one device; say how many replicas"),
    ],
)
def test_replicas_that_there_are_no_gpus_for(
    devices: list[Device], visible: str | None, wanted: int | None, message: str
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with pytest.raises(NoSuchDevice, match=message):
        find_replicas(devices, environ, host.cpu(), wanted)


def test_replicas_of_a_cpu_are_as_many_as_asked_for() -> None:
    device, number = find_replicas([], {}, host.cpu(), 4)
    assert (device.kind, device.beside, number) == ("cpu", (), 4)
