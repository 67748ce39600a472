"""What around a run changes its figures: environment variables, and who else keeps the machine busy."""

from __future__ import annotations

from collections.abc import Mapping

from mpscale.doctor.findings import Examination, Problem
from mpscale.telemetry.device import Device
from mpscale.telemetry.fingerprint import VARIABLES
from mpscale.telemetry.host_noise import busy_words

_OFF = ("", "0", "false", "False", "FALSE")
_WORDS = {
    "CUDA_VISIBLE_DEVICES": "the first GPU that it names is used; -1 is the CPU",
    "KERAS_BACKEND": "a run uses tensorflow whatever this says",
    "NVIDIA_TF32_OVERRIDE": "NVIDIA's libraries follow it, and not what the modes fp32 and tf32 ask for",
    "ONEDNN_MAX_CPU_ISA": "oneDNN uses no newer instructions than these",
    "TF_CUDNN_DETERMINISTIC": "cuDNN is kept to deterministic kernels, which may be slower",
    "TF_DETERMINISTIC_OPS": "TensorFlow is kept to deterministic kernels, which may be slower",
    "TF_ENABLE_ONEDNN_OPTS": "0 turns oneDNN's kernels off, those for bfloat16 among them",
    "TF_FORCE_GPU_ALLOW_GROWTH": "overrides that a run lets TensorFlow's memory grow",
    "TF_GPU_ALLOCATOR": "--mp-gpu-allocator auto keeps to it",
    "TF_XLA_FLAGS": "may have XLA compile what --mp-jit off leaves alone",
    "XLA_FLAGS": "changes what XLA compiles, in every mode",
}
_IDLE = {
    "TF_ENABLE_XLA_JIT": "TensorFlow does not read it; steps are compiled with XLA unless --mp-jit off",
    "TF_ENABLE_AUTO_MIXED_PRECISION": "TensorFlow 2 does not read it; its rewrite to float16 is the mode graph-rewrite",
}


def examine(found: Examination, device: Device | None, environ: Mapping[str, str]) -> None:
    """Notes on variables that are set and on the load, and a problem for what makes figures wrong.

    Args:
        found: takes problems and notes.
        device: where a run would train, None where that is unknown.
        environ: the environment to look in.
    """
    wrong = {name: problem for name, problem in _wrong(device, environ).items() if name in environ}
    found.problems += [Problem(f"{name}={environ[name]}: {words}", f"unset {name}") for name, words in wrong.items()]
    for name in VARIABLES:
        if name in environ and name not in wrong:
            words = f" ({_WORDS[name]})" if name in _WORDS else ""
            found.notes.append(f"{name}={environ[name]} is set and written down with each run{words}")
    found.notes += [f"{name} does nothing: {words}" for name, words in _IDLE.items() if name in environ]
    busy = busy_words()
    found.notes += [busy] if busy else []


def _wrong(device: Device | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables under which figures on a GPU are not what their columns say."""
    if device is None or device.kind != "gpu":
        return {}
    wrong = {}
    if environ.get("CUDA_LAUNCH_BLOCKING") not in _OFF:
        wrong["CUDA_LAUNCH_BLOCKING"] = "every kernel is waited for, so step times are those of another program"
    if environ.get("TF_FORCE_GPU_ALLOW_GROWTH") in _OFF:
        wrong["TF_FORCE_GPU_ALLOW_GROWTH"] = "TensorFlow takes the GPU's memory at once, so its peak says nothing"
    if device.has_tf32:
        wrong["NVIDIA_TF32_OVERRIDE"] = "one of the modes fp32 and tf32 is then not what its name says"
    return wrong
