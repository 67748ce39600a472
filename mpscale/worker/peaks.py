"""Peak throughput of GPUs, from NVIDIA's documents.

All figures are TFLOP/s of dense products, at the boost clock of the document. Datasheets of Hopper, Blackwell and the
L4 give figures with structured sparsity, which are twice as high; they are halved here. ``fp32`` is without Tensor
Cores. ``fp16`` accumulates in float32, as TensorFlow's products do; on a GeForce that is half of what float16
accumulation gives. On GPUs without Tensor Cores it is the rate of their ordinary units.

Most figures were taken from pages that quote the document named here, not from the document itself. A figure that was
not found so is left out, even if others suggest it. So are GPUs whose name covers several
clocks or power limits, such as those of laptops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mpscale.core.device import Device
from mpscale.core.mode import Products
from mpscale.core.reason import Code, Reason


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak of a model of GPU.

    Args:
        tflops: TFLOP/s by precision: ``fp32``, ``tf32``, ``fp16``, ``bf16``, ``fp8``.
        source: the document.
    """

    tflops: Mapping[str, float]
    source: str


_HOPPER = (
    "NVIDIA H100 Tensor Core GPU datasheet, "
    "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
)
_H200 = "NVIDIA H200 product page, https://www.nvidia.com/en-us/data-center/h200/"
_HGX_B200 = "NVIDIA Blackwell datasheet, HGX B200, https://resources.nvidia.com/en-us-blackwell-architecture"
_A100 = (
    "NVIDIA A100 datasheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-nvidia-us-2188504-web.pdf"
)
_A30 = (
    "NVIDIA A30 datasheet, "
    "https://www.nvidia.com/content/dam/en-zz/Solutions/data-center/products/a30-gpu/pdf/a30-datasheet.pdf"
)
_A10 = "NVIDIA A10 datasheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"
_A40 = (
    "NVIDIA A40 datasheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a40/"
    "proviz-print-nvidia-a40-datasheet-us-nvidia-1469711-r8-web.pdf"
)
_GA102 = (
    "NVIDIA Ampere GA102 GPU Architecture, v2, "
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)
_L4 = "NVIDIA L4 datasheet, https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet"
_L40 = (
    "NVIDIA L40 datasheet, https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/support-guide/"
    "NVIDIA-L40-Datasheet-January-2023.pdf"
)
_L40S = "NVIDIA L40S product page, https://www.nvidia.com/en-us/data-center/l40s/"
_V100 = (
    "NVIDIA V100 datasheet, "
    "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
)
_T4 = (
    "NVIDIA T4 datasheet, "
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
)
_GA100 = (
    "NVIDIA A100 Tensor Core GPU Architecture, comparison with P100 and V100, "
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
)
_P100_PCIE = (
    "NVIDIA's announcement of the P100 for PCIe, as reported in "
    "https://tech4gamers.com/nvidia-tesla-p100-will-be-available-in-two-variants-of-16gb-12gb-hbm2/"
)
_ADA = (
    "NVIDIA Ada GPU Architecture, v2.1, appendix A, "
    "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
)
_BLACKWELL = (
    "NVIDIA RTX Blackwell GPU Architecture, table 3, "
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_BLACKWELL_PRO = (
    "NVIDIA RTX PRO Blackwell GPU Architecture, v1.0, table 4, https://www.nvidia.com/content/dam/en-zz/Solutions/"
    "design-visualization/quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"
)
_GEFORCE_3090 = f"{_BLACKWELL}; for tf32 {_GA102}"
_RTX_6000_ADA = f"{_BLACKWELL_PRO}; for fp32 and fp8 the NVIDIA RTX 6000 Ada Generation datasheet"


def _peak(source: str, **tflops: float) -> Peak:
    return Peak(MappingProxyType(tflops), source)


_H100_SXM = {"fp32": 67.0, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5, "fp8": 1979.0}

_PEAKS: dict[str, Peak] = {
    "H100 80GB HBM3": _peak(_HOPPER, **_H100_SXM),
    "H100 PCIe": _peak(_HOPPER, fp32=51.0, tf32=378.0, fp16=756.5, bf16=756.5, fp8=1513.0),
    "H100 NVL": _peak(_HOPPER, fp32=60.0, tf32=417.5, fp16=835.5, bf16=835.5, fp8=1670.5),
    "H200": _peak(_H200, **_H100_SXM),
    # Editions of the datasheet disagree about fp32.
    "B200": _peak(_HGX_B200, tf32=1100.0, fp16=2250.0, bf16=2250.0, fp8=4500.0),
    **dict.fromkeys(
        ("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"),
        _peak(_A100, fp32=19.5, tf32=156.0, fp16=312.0, bf16=312.0),
    ),
    "A30": _peak(_A30, fp32=10.3, tf32=82.0, fp16=165.0, bf16=165.0),
    "A10": _peak(_A10, fp32=31.2, tf32=62.5, fp16=125.0, bf16=125.0),
    "A40": _peak(_A40, fp32=37.4, tf32=74.8, fp16=149.7, bf16=149.7),
    "RTX A6000": _peak(_GA102, fp32=38.7, tf32=77.4, fp16=154.8, bf16=154.8),
    "L4": _peak(_L4, fp32=30.3, tf32=60.0, fp16=121.0, bf16=121.0, fp8=242.5),
    "L40": _peak(_L40, fp32=90.5, tf32=90.5, fp16=181.05, bf16=181.05, fp8=362.0),
    "L40S": _peak(_L40S, fp32=91.6, tf32=183.0, fp16=362.05, bf16=362.05, fp8=733.0),
    **dict.fromkeys(("V100-SXM2-16GB", "V100-SXM2-32GB"), _peak(_V100, fp32=15.7, fp16=125.0)),
    **dict.fromkeys(("V100-PCIE-16GB", "V100-PCIE-32GB"), _peak(_V100, fp32=14.0, fp16=112.0)),
    "V100S-PCIE-32GB": _peak(_V100, fp32=16.4, fp16=130.0),
    "T4": _peak(_T4, fp32=8.1, fp16=65.0),
    "P100-SXM2-16GB": _peak(_GA100, fp32=10.6, fp16=21.2),
    **dict.fromkeys(("P100-PCIE-12GB", "P100-PCIE-16GB"), _peak(_P100_PCIE, fp32=9.3, fp16=18.7)),
    "GeForce RTX 3090": _peak(_GEFORCE_3090, fp32=35.6, tf32=35.6, fp16=71.2, bf16=71.2),
    "GeForce RTX 4090": _peak(_ADA, fp32=82.6, tf32=82.6, fp16=165.2, bf16=165.2, fp8=330.3),
    "GeForce RTX 5090": _peak(_BLACKWELL, fp32=104.8, fp16=209.5, bf16=209.5, fp8=419.0),
    "RTX 6000 Ada Generation": _peak(_RTX_6000_ADA, fp32=91.1, bf16=364.0, fp8=728.5),
    "RTX PRO 6000 Blackwell Workstation Edition": _peak(_BLACKWELL_PRO, bf16=503.8),
}
"""By the driver's name without the maker. A name must match as a whole: ``RTX 4090 D`` and ``RTX 4090 Laptop GPU`` are
other GPUs."""

_MAKER = re.compile(r"(?:NVIDIA )?(?:Tesla )?")
"""Drivers before 2021 leave out NVIDIA, and later ones Tesla."""


def peak_of(device: Device, precision: Products) -> float | Reason:
    """The peak of a device in TFLOP/s of dense products, or the reason why it is unknown.

    Args:
        device: a GPU whose name is the driver's.
        precision: of the products.
    """
    if device.kind != "gpu":
        return Reason(Code.NO_GPU, "peaks are known for GPUs only")
    if device.parent_uuid is not None or device.mig:
        return Reason(
            Code.SHARED,
            "a MIG instance has a part of its GPU, and NVIDIA publishes no peak of it",
            "use the whole GPU to see its share of peak",
        )
    found = _PEAKS.get(_MAKER.sub("", device.name, count=1))
    if found is None or precision not in found.tflops:
        known = "" if found is None else f" in {precision}"
        return Reason(
            Code.NO_PEAK,
            f"mpscale knows no peak of {device.name}{known}",
            "divide tflops by the dense peak in the maker's datasheet; a line in mpscale/worker/peaks.py adds the GPU",
        )
    return found.tflops[precision]


def known_gpus() -> Mapping[str, Peak]:
    """Every GPU whose peak is known, by the driver's name without the maker."""
    return MappingProxyType(_PEAKS)
