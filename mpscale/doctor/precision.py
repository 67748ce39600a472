"""Whether the arithmetic of mixed precision is fast on a device. What a model gains from that only a run tells."""

from __future__ import annotations

from collections.abc import Sequence

from mpscale.doctor.findings import Answer, Precision
from mpscale.telemetry.device import Device

_ADVICE = (
    "For Tensor Cores choose batch, units and channels in multiples of 8.",
    "mpscale compiles steps with XLA; a user's own program needs jit_compile=True for the same speed.",
    "Small steps wait for Python and not for the GPU: where a report says dispatch_bound, take a larger batch.",
)
_CHECKS = (
    "Figures here show whether training works: overflow, loss scale, accuracy. They tell no speed of another device."
)


def on_gpu(device: Device) -> Precision:
    """What NVIDIA's generation of a GPU computes fast.

    Args:
        device: a GPU.
    """
    capability = device.compute_capability
    if capability is None:
        return Precision(None, None, False, ("NVML does not tell the compute capability, so nothing is known.",))
    mine = f"Compute capability {'.'.join(map(str, capability))}"
    if capability >= (8, 0):
        fast = f"{mine}: float16, bfloat16 and TF32 run on Tensor Cores."
        baseline = (
            "TensorFlow rounds float32 products to TF32 by default here, so compare mixed modes with tf32, and fp32 "
            "with tf32 to see what TF32 alone gives."
        )
        return Precision("yes", "yes", True, (fast, baseline, *_ADVICE))
    converted = "bfloat16 is converted to float32 and back, and TF32 does not exist before 8.0."
    if capability >= (7, 0) and not _without_tensor_cores(device):
        return Precision("yes", "no", False, (f"{mine}: float16 runs on Tensor Cores. {converted}", *_ADVICE))
    if capability in ((5, 3), (6, 0), (6, 2), (7, 5)):
        twice = f"{mine}, no Tensor Cores: float16 runs at up to twice the speed of float32. {converted}"
        return Precision("in part", "no", False, (twice, *_ADVICE[1:]))
    slow = "float16 is computed far slower than float32" if capability == (6, 1) else "float16 is not computed as such"
    nothing = f"{mine}: {slow}, so mixed precision saves memory at most. {converted}"
    return Precision("no", "no", False, (nothing, _CHECKS))


def on_cpu(flags: Sequence[str] | None) -> Precision:
    """What a CPU computes fast.

    Args:
        flags: its features that matter for precision, None where the system does not tell them.
    """
    if flags is None:
        unknown = "This system does not tell what its CPU computes in float16 and bfloat16."
        return Precision(None, None, False, (unknown, _CHECKS))
    float16: Answer = "yes" if "amx_fp16" in flags else "in part" if "avx512_fp16" in flags else "no"
    bfloat16: Answer = "yes" if "amx_bf16" in flags else "in part" if "avx512_bf16" in flags else "no"
    units = [name for name, there in (("bfloat16", bfloat16), ("float16", float16)) if there != "no"]
    words = []
    if units:
        words.append(
            f"This CPU has instructions for {' and '.join(units)}. TensorFlow uses them through oneDNN, so in what XLA "
            "does not compile: try --mp-jit off."
        )
    if not words:
        words.append("This CPU has no instructions for float16 or bfloat16, so mixed precision saves no time here.")
    if float16 == "no":
        words.append("float16 is emulated; without XLA it may be many times slower than float32.")
    return Precision(float16, bfloat16, False, (*words, _CHECKS))


def _without_tensor_cores(device: Device) -> bool:
    # The one generation in which the number does not tell: 7.5 is both Turing with and without them.
    return device.compute_capability == (7, 5) and "GTX 16" in device.name
