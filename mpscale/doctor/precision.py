"""Which arithmetic of mixed precision is fast on a device. What a model gains from it, only a run can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpscale.core.device import Device

Answer = Literal["yes", "in part", "no"]

_ADVICE = (
    "For Tensor Cores choose batch, units and channels in multiples of 8.",
    "mpscale compiles steps with XLA; your own program needs jit_compile=True for the same speed.",
    "Small steps wait for Python, not for the GPU: if a report says dispatch_bound, use a larger batch.",
)
_NO_SPEED = (
    "Figures here show whether training works (overflow, loss scale, accuracy), but not the speed of another device."
)


@dataclass(frozen=True, slots=True)
class Precision:
    """Which arithmetic is fast on a device; None if unknown.

    Args:
        float16: products of float16.
        bfloat16: products of bfloat16.
        tf32: whether the device can round float32 products to TF32.
        words: what that means for a run, one sentence each.
    """

    float16: Answer | None
    bfloat16: Answer | None
    tf32: bool
    words: tuple[str, ...]


def of_gpu(device: Device) -> Precision:
    """Return what a GPU computes fast, by its generation."""
    capability = device.compute_capability
    if capability is None:
        return Precision(None, None, False, ("The driver does not tell the compute capability, so nothing is known.",))
    mine = f"Compute capability {'.'.join(map(str, capability))}"
    if device.has_tf32:
        fast = f"{mine}: float16, bfloat16 and TF32 run on Tensor Cores."
        baseline = (
            "By default TensorFlow rounds float32 products to TF32 here. Compare mixed modes with tf32, and fp32 with "
            "tf32 to see what TF32 alone gives."
        )
        return Precision("yes", "yes", True, (fast, baseline, *_ADVICE))
    converted = "bfloat16 is converted to float32 and back, and TF32 needs 8.0."
    if capability >= (7, 0) and not _lacks_tensor_cores(device):
        return Precision("yes", "no", False, (f"{mine}: float16 runs on Tensor Cores. {converted}", *_ADVICE))
    if capability in ((5, 3), (6, 0), (6, 2), (7, 5)):
        twice = f"{mine}, no Tensor Cores: float16 is up to twice as fast as float32. {converted}"
        return Precision("in part", "no", False, (twice, *_ADVICE[1:]))
    slow = "float16 is far slower than float32" if capability == (6, 1) else "there is no arithmetic for float16"
    nothing = f"{mine}: {slow}, so mixed precision saves memory at most. {converted}"
    return Precision("no", "no", False, (nothing, _NO_SPEED))


def of_cpu(flags: Sequence[str] | None) -> Precision:
    """Return what a CPU computes fast.

    Args:
        flags: its instruction sets that matter for precision, None if unknown.
    """
    if flags is None:
        unknown = "This system does not tell which instructions its CPU has for float16 and bfloat16."
        return Precision(None, None, False, (unknown, _NO_SPEED))
    float16: Answer = "yes" if "amx_fp16" in flags else "in part" if "avx512_fp16" in flags else "no"
    bfloat16: Answer = "yes" if "amx_bf16" in flags else "in part" if "avx512_bf16" in flags else "no"
    fast = [name for name, answer in (("bfloat16", bfloat16), ("float16", float16)) if answer != "no"]
    words = ["This CPU has no instructions for float16 or bfloat16, so mixed precision saves no time here."]
    if fast:
        words = [
            f"This CPU has instructions for {' and '.join(fast)}. TensorFlow uses them through oneDNN, which XLA does "
            "not call: try --mp-jit off."
        ]
    if float16 == "no":
        words.append("float16 is emulated; without XLA it may be many times slower than float32.")
    return Precision(float16, bfloat16, False, (*words, _NO_SPEED))


def _lacks_tensor_cores(device: Device) -> bool:
    # Compute capability 7.5 is Turing both with and without Tensor Cores; only the name tells them apart.
    return device.compute_capability == (7, 5) and "GTX 16" in device.name
