"""The environment in which workers are started."""

from dataclasses import replace

import pytest

from mpscale.core.device import Device
from mpscale.harness.launch import allocators, worker_environment

GPU = Device("gpu", "NVIDIA H200", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (9, 0))
MIG = Device("gpu", "NVIDIA H200 MIG 1g.18gb", "MIG-57fdd0f8-4e2e-5b0c-8e5c-0a5d1a2b3c4d", (9, 0), parent_uuid=GPU.uuid)
STAND_IN = Device("gpu", "mpscale stand-in A100", "GPU-1", (8, 0))
CPU = Device("cpu", "Intel")


@pytest.mark.parametrize(
    ("device", "allocator", "visible", "pool"),
    [
        (GPU, "cuda_malloc_async", GPU.uuid, "cuda_malloc_async"),
        (GPU, "bfc", GPU.uuid, None),
        (GPU, None, GPU.uuid, "mine"),
        (MIG, "cuda_malloc_async", MIG.uuid, "cuda_malloc_async"),
        (replace(GPU, beside=("GPU-2", "GPU-3")), "bfc", f"{GPU.uuid},GPU-2,GPU-3", None),
        (STAND_IN, "cuda_malloc_async", "-1", "cuda_malloc_async"),
        (CPU, "cuda_malloc_async", "-1", None),
    ],
)
def test_worker_sees_its_devices_alone_and_has_one_allocator(device, allocator, visible, pool):
    found = worker_environment({"TF_GPU_ALLOCATOR": "mine", "HOME": "/x"}, device, allocator)
    assert found["CUDA_VISIBLE_DEVICES"] == visible
    assert found.get("TF_GPU_ALLOCATOR") == pool
    assert found["HOME"] == "/x"
    assert found["KERAS_BACKEND"] == "tensorflow"


@pytest.mark.parametrize(
    ("asked", "environ", "cuda", "expected"),
    [
        ("auto", {}, "12.8", ["cuda_malloc_async", "bfc"]),
        ("auto", {}, None, ["cuda_malloc_async", "bfc"]),
        ("auto", {}, "11.2", ["cuda_malloc_async", "bfc"]),
        ("auto", {}, "11.1", ["bfc"]),
        ("auto", {"TF_GPU_ALLOCATOR": "cuda_malloc"}, "12.8", [None]),
        ("bfc", {"TF_GPU_ALLOCATOR": "cuda_malloc_async"}, "12.8", ["bfc"]),
        ("cuda_malloc_async", {}, "11.1", ["cuda_malloc_async"]),
    ],
)
def test_allocators_to_try(asked, environ, cuda, expected):
    assert allocators(asked, environ, cuda) == expected
