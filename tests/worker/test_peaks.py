"""Peaks of GPUs: which names match, which do not, and what follows from a peak."""

import pytest
import tensorflow as tf

from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.worker.peaks import known_gpus, peak_of
from mpscale.worker.throughput import Throughput

# As NVML reports them.
NAMES = {
    "NVIDIA H100 80GB HBM3": (67, 494.5, 989.5, 989.5),
    "NVIDIA H100 PCIe": (51, 378, 756.5, 756.5),
    "NVIDIA H100 NVL": (60, 417.5, 835.5, 835.5),
    "NVIDIA H200": (67, 494.5, 989.5, 989.5),
    "NVIDIA B200": (None, 1100, 2250, 2250),
    "NVIDIA A100-SXM4-40GB": (19.5, 156, 312, 312),
    "A100-SXM4-40GB": (19.5, 156, 312, 312),
    "NVIDIA A100-SXM4-80GB": (19.5, 156, 312, 312),
    "NVIDIA A100 80GB PCIe": (19.5, 156, 312, 312),
    "NVIDIA A100-PCIE-40GB": (19.5, 156, 312, 312),
    "NVIDIA A30": (10.3, 82, 165, 165),
    "NVIDIA A10": (31.2, 62.5, 125, 125),
    "NVIDIA L4": (30.3, 60, 121, 121),
    "NVIDIA L40": (90.5, 90.5, 181.05, 181.05),
    "NVIDIA L40S": (91.6, 183, 362.05, 362.05),
    "Tesla V100-SXM2-16GB": (15.7, None, 125, None),
    "Tesla V100-PCIE-32GB": (14, None, 112, None),
    "Tesla V100S-PCIE-32GB": (16.4, None, 130, None),
    "Tesla T4": (8.1, None, 65, None),
    "NVIDIA T4": (8.1, None, 65, None),
    "Tesla P100-PCIE-16GB": (9.3, None, 18.7, None),
    "NVIDIA RTX A6000": (38.7, 77.4, 154.8, 154.8),
    "NVIDIA GeForce RTX 3090": (35.6, 35.6, 71.2, 71.2),
    "GeForce RTX 3090": (35.6, 35.6, 71.2, 71.2),
    "NVIDIA GeForce RTX 4090": (82.6, 82.6, 165.2, 165.2),
    "NVIDIA GeForce RTX 5090": (104.8, None, 209.5, 209.5),
    "NVIDIA RTX 6000 Ada Generation": (91.1, None, None, 364),
}

OTHERS = (
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA RTX A6000 Laptop GPU",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100X",
    "NVIDIA A10G",
    "NVIDIA H20",
    "NVIDIA H200 NVL",
    "NVIDIA H800 PCIe",
    "NVIDIA GH200 480GB",
    "GRID V100D-8Q",
    "NVIDIA L4-24Q",
    "Tesla V100-SXM3-32GB",
    "NVIDIA Tesla",
    "mpscale stand-in GPU",
    "",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_nvml_find_the_dense_peak_of_each_precision(name):
    found = [peak_of(Device("gpu", name), precision) for precision in ("fp32", "tf32", "fp16", "bf16")]
    assert tuple(None if isinstance(peak, Reason) else peak for peak in found) == NAMES[name]
    assert all(peak.code is Code.NO_PEAK and peak.cure for peak in found if isinstance(peak, Reason))


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_gpus_do_not_match(name):
    why = peak_of(Device("gpu", name), "fp16")
    assert (why.code, name in why.text, bool(why.cure)) == (Code.NO_PEAK, True, True)


def test_peaks_have_a_source_and_grow_as_the_precision_falls():
    for name, peak in known_gpus().items():
        assert "https://" in peak.source, name
        rates = [peak.tflops[p] for p in ("fp32", "tf32", "fp16", "fp8") if p in peak.tflops]
        assert rates == sorted(rates), name
        # Dense: Tensor Cores double at each halving of the width, to the rounding of the datasheets.
        for wide, narrow in (("tf32", "fp16"), ("tf32", "bf16"), ("fp16", "fp8"), ("bf16", "fp8")):
            if {wide, narrow} <= peak.tflops.keys():
                assert peak.tflops[narrow] / peak.tflops[wide] == pytest.approx(2, rel=0.03), name


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("fp32", "fp32"), ("tf32", "tf32"), ("mixed-static", "fp16"), ("mixed-bf16", "bf16"), ("graph-rewrite", "fp16")],
)
def test_a_mode_is_measured_by_the_peak_of_its_precision(mode, precision):
    assert MODES[mode].products == precision


INSTANCE = Device("gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid="MIG-1", parent_uuid="GPU-1")


@pytest.mark.parametrize(
    ("device", "code"), [(INSTANCE, Code.SHARED), (Device("cpu", "AMD EPYC"), Code.NO_GPU)], ids=["MIG", "CPU"]
)
def test_a_part_of_a_gpu_and_a_cpu_have_no_peak(device, code):
    assert peak_of(device, "fp16").code is code


def product(size):
    """The graph of one product of matrices: 2 size^3 FLOPs."""
    spec = tf.TensorSpec((size, size))
    return tf.function(tf.matmul).get_concrete_function(spec, spec).graph


GPU = Device("gpu", "NVIDIA H200", uuid="GPU-1")
CPU = Device("cpu", "AMD EPYC")
IDLE = Reason(Code.PROFILER_SILENT, "no profile")


def columns(device, mode="mixed-dynamic", step_ms=1.0, busy_ms=0.5, size=5000):
    throughput = Throughput(product(size), MODES[mode], device)
    known, timed = throughput.columns(), throughput.timed(step_ms, busy_ms)
    known.add(timed)
    missing = {name: why.code for name, why in known.unavailable.items()}
    assert {*known.values, *missing} == {
        *("flops_per_step", "tflops", "tflops_while_busy", "tflops_peak", "peak_share", "peak_share_while_busy")
    }
    return known.values, missing


def test_the_share_is_that_of_the_step_and_that_of_the_time_in_which_the_gpu_computes():
    values, missing = columns(GPU)
    assert values == {
        "flops_per_step": 250_000_000_000,
        "tflops": 250.0,
        "tflops_while_busy": 500.0,
        "tflops_peak": 989.5,
        "peak_share": pytest.approx(250 / 989.5),
        "peak_share_while_busy": pytest.approx(500 / 989.5),
    }
    assert not missing


def test_a_share_above_1_is_refused_and_the_other_one_kept():
    values, missing = columns(GPU, busy_ms=0.2)
    assert values["peak_share"] == pytest.approx(250 / 989.5)
    assert values["tflops_while_busy"] == 1250.0
    assert missing == {"peak_share_while_busy": Code.IMPLAUSIBLE}


def test_what_is_missing_has_the_reason_of_what_it_is_made_of():
    assert columns(GPU, busy_ms=IDLE)[1] == dict.fromkeys(
        ("tflops_while_busy", "peak_share_while_busy"), Code.PROFILER_SILENT
    )
    values, missing = columns(Device("gpu", "NVIDIA A100X"))
    assert values["tflops"] == 250.0
    assert set(missing.values()) == {Code.NO_PEAK}
    values, missing = columns(GPU, size=0)
    assert not values.keys() - {"tflops_peak"}
    assert set(missing.values()) == {Code.NEVER_HAPPENED}


def test_a_cpu_has_rates_only_in_float32_which_it_does_not_emulate():
    assert columns(CPU, "fp32", busy_ms=IDLE)[0] == {"flops_per_step": 250_000_000_000, "tflops": 250.0}
    values, missing = columns(CPU, "mixed-bf16", busy_ms=IDLE)
    assert values == {"flops_per_step": 250_000_000_000}
    assert missing["tflops"] is Code.NOT_COMPARABLE
