"""Which device a run uses."""

from __future__ import annotations

from typing import Any

import pytest

from mpscale.telemetry.device import Device, find_device
from mpscale.telemetry.nvml import NoNvml

GPUS = [
    Device("gpu", "NVIDIA H200", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (9, 0), 143_771.0),
    Device("gpu", "Tesla V100", "GPU-8932aaaa-0000-0000-0000-000000000001", (7, 0), 16_384.0),
    Device("gpu", "GPU 2, which does not answer"),
]


class FakeNvml:
    """Knows :data:`GPUS`, or those it is given."""

    def __init__(self, gpus: list[Device] = GPUS) -> None:
        self.gpus = gpus

    def devices(self) -> list[Device]:
        return self.gpus


def find(visible: str | None, nvml: Any = None) -> Device:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return find_device(nvml or FakeNvml(), environ)


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
def test_the_gpu_that_is_visible_first(visible: str | None, index: int) -> None:
    assert find(visible) is GPUS[index]


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "NoDevFiles"])
def test_hidden_gpus_leave_the_cpu(visible: str) -> None:
    assert find(visible).kind == "cpu"


@pytest.mark.parametrize("visible", [None, "0", "GPU-8932a", ""])
@pytest.mark.parametrize("nvml", [NoNvml("no driver"), FakeNvml([])], ids=["no NVML", "no GPU"])
def test_where_nvml_knows_no_gpu_it_is_the_cpu(visible: str | None, nvml: Any) -> None:
    device = find(visible, nvml)
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
def test_what_names_no_single_gpu_is_refused_with_a_list(visible: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        find(visible)
    message = str(caught.value)
    assert repr(visible) in message
    assert "0: NVIDIA H200, GPU-8932f937" in message
    assert "1: Tesla V100, GPU-8932aaaa" in message


@pytest.mark.parametrize("nvml", [FakeNvml(), NoNvml("no driver")])
def test_mig_is_refused_even_where_it_cannot_be_seen(nvml: Any) -> None:
    with pytest.raises(ValueError, match="MIG is not supported yet"):
        find("MIG-57fdd0f8-4e2e-5b0c-8e5c-0a5d1a2b3c4d", nvml)


def test_a_gpu_without_uuid_is_refused() -> None:
    with pytest.raises(ValueError, match="no UUID for GPU 2, which does not answer"):
        find("2")


@pytest.mark.parametrize("device", [*GPUS, Device("cpu", "Intel", memory_mib=1.5)])
def test_json_and_back(device: Device) -> None:
    assert Device.from_json(device.to_json()) == device
