"""Installed versions, whether they fit mpscale and the GPU, and environment variables that affect figures."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.core.variables import recorded
from mpscale.doctor.finding import Caution
from mpscale.telemetry.client import Driver
from mpscale.telemetry.host import packages

_SHOWN = ("mpscale", "tensorflow", "keras", "nvidia-ml-py")
_INSTALL_CUDA = "pip install 'tensorflow[and-cuda]'"
_NVCC = "nvidia-cuda-nvcc-cu12"
_GOOD_PTXAS = (12, 6, 85)
"""The ptxas of CUDA 12.6.3. XLA warns that those of CUDA 12 before it miscompile some cases of clamping."""
_DATA_DIR = "--xla_gpu_cuda_data_dir="
_FALSE = ("", "0", "false", "False", "FALSE")
_MEANING = {
    "CUDA_VISIBLE_DEVICES": "the first GPU that it names is used; -1 selects the CPU",
    "KERAS_BACKEND": "ignored: a run always uses tensorflow",
    "NVIDIA_TF32_OVERRIDE": "overrides for NVIDIA's libraries what the modes fp32 and tf32 ask for",
    "ONEDNN_MAX_CPU_ISA": "oneDNN uses no newer instructions than these",
    "TF_CUDNN_DETERMINISTIC": "restricts cuDNN to deterministic kernels, which may be slower",
    "TF_DETERMINISTIC_OPS": "restricts TensorFlow to deterministic kernels, which may be slower",
    "TF_ENABLE_ONEDNN_OPTS": "0 turns off oneDNN's kernels, including those for bfloat16",
    "TF_FORCE_GPU_ALLOW_GROWTH": "overrides that a run lets TensorFlow's memory grow",
    "TF_GPU_ALLOCATOR": "used by --mp-gpu-allocator auto",
    "TF_XLA_FLAGS": "may make XLA compile what --mp-jit off leaves alone",
    "XLA_FLAGS": "changes what XLA compiles, in every mode",
}
_WITHOUT_EFFECT = {
    "TF_ENABLE_XLA_JIT": "TensorFlow does not read it; steps are compiled with XLA unless --mp-jit off",
    "TF_ENABLE_AUTO_MIXED_PRECISION": "TensorFlow 2 does not read it; its rewrite to float16 is the mode graph-rewrite",
}


def versions(driver: Driver) -> dict[str, Any]:
    """Return the versions of Python, packages and driver."""
    installed = packages()
    cuda = {name: version for name, version in installed.items() if name.startswith("nvidia-") and name not in _SHOWN}
    return {
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in _SHOWN},
        "cuda_libraries": cuda,
        "nvml": str(driver.reason or "works"),
        "nvidia_driver": driver.driver_version,
        "cuda_driver": driver.cuda_version,
    }


def check_versions() -> Iterator[Reason]:
    """Find packages that a run requires and that are missing or of another version."""
    installed = packages()
    for wanted in _requirements("mpscale"):
        name = canonicalize_name(wanted.name)
        if name not in _SHOWN or (wanted.marker and not wanted.marker.evaluate({"extra": "bench"})):
            continue
        wanted.marker = None  # not in the cure
        version = installed[name]
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            what = "is not installed" if version is None else f"{version} is installed"
            text = f"{name} {what}, but mpscale needs {wanted.specifier}"
            yield Reason(Code.SOFTWARE_MISFIT, text, f"pip install '{wanted}'")


def check_cuda(device: Device, cuda_driver: str | None) -> Iterator[Reason | str]:
    """Check whether the installed TensorFlow can use a GPU, as far as its files show.

    Args:
        device: the GPU.
        cuda_driver: the newest CUDA version that its driver supports, None if unknown.
    """
    build = build_info()
    if build and not build.get("is_cuda_build") and not device.is_stand_in:
        text = "the installed TensorFlow was built without CUDA, so it uses no NVIDIA GPU"
        yield Reason(Code.SOFTWARE_MISFIT, text, _INSTALL_CUDA)
        return
    needed = str(build.get("cuda_version") or "")
    major = needed.partition(".")[0]
    if cuda_driver and needed and int(cuda_driver.partition(".")[0]) < int(major):
        text = f"the driver supports CUDA up to {cuda_driver}, but the installed TensorFlow needs {needed}"
        yield Reason(Code.DRIVER_TOO_OLD, text, f"update the driver to one that supports CUDA {major}")
    if device.compute_capability:
        yield from _check_kernels(device.compute_capability, build.get("cuda_compute_capabilities") or [])
    missing = _missing_libraries()
    if not missing or device.is_stand_in:
        return
    if _loads(f"libcudnn.so.{build.get('cudnn_version') or 9}"):
        yield (
            "TensorFlow's CUDA libraries are not all installed with pip, so it searches the system for them; "
            "`mpscale doctor --gpu` shows whether it finds them"
        )
        return
    text = f"TensorFlow's CUDA libraries are not installed ({', '.join(missing)}), so it sees no GPU"
    yield Reason(Code.SOFTWARE_MISFIT, text, _INSTALL_CUDA)


def check_ptxas(environ: Mapping[str, str]) -> Iterator[Reason | str]:
    """Check the version of ptxas, the assembler that XLA makes a GPU's programs with.

    Args:
        environ: environment variables.
    """
    for path in _ptxas(environ):
        version = _ptxas_version(path)
        if version is None:
            continue
        if version < _GOOD_PTXAS:
            shown = ".".join(map(str, version))
            yield Caution(
                Code.MISCOMPILES,
                f"ptxas {shown} ({path}) makes the programs that XLA compiles. XLA says that CUDA up to 12.6.2 "
                "miscompiles some cases of clamping, so a result may be wrong",
                f"pip install '{_NVCC}>={'.'.join(map(str, _GOOD_PTXAS))},<13', or make the ptxas of CUDA 12.6.3 or "
                "newer the first one that is found",
            )
        return
    built = build_info().get("cuda_version") or "unknown"
    yield (
        "no ptxas was found (in XLA_FLAGS, PATH, pip's packages, /usr/local/cuda), so it is not known which one XLA "
        f"would compile with; TensorFlow was built with CUDA {built}"
    )


def _ptxas(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield where a ptxas may be, in the order in which XLA looks for one."""
    flags = environ.get("XLA_FLAGS", "")
    with contextlib.suppress(ValueError):
        folders = [flag.removeprefix(_DATA_DIR) for flag in shlex.split(flags) if flag.startswith(_DATA_DIR)]
        yield from (Path(folder, "bin", "ptxas") for folder in folders[-1:])
    on_path = shutil.which("ptxas", path=environ.get("PATH", os.defpath))
    if on_path is not None:
        yield Path(on_path)
    spec = importlib.util.find_spec("tensorflow")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent.parent / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    yield Path("/usr/local/cuda/bin/ptxas")


def _ptxas_version(path: Path) -> tuple[int, ...] | None:
    """The version of a ptxas; None if there is none, or if it does not run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said)
    return None if found is None else tuple(map(int, found.groups()))


def check_variables(device: Device | None, environ: Mapping[str, str]) -> Iterator[Reason | str]:
    """Find environment variables that affect figures; those that falsify them are problems.

    Args:
        device: the device that a run would use, None if unknown.
        environ: environment variables.
    """
    harmful = _harmful(device, environ)
    for name, harm in harmful.items():
        yield Reason(Code.ENVIRONMENT, f"{name}={environ[name]}: {harm}", f"unset {name}")
    for name, value in recorded(environ).items():
        if name not in harmful:
            meaning = f" ({_MEANING[name]})" if name in _MEANING else ""
            yield f"{name}={value} is set and will be recorded with each run{meaning}"
    for name, why in _WITHOUT_EFFECT.items():
        if name in environ:
            yield f"{name} does nothing: {why}"


def _harmful(device: Device | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that falsify figures of a GPU, each with its effect."""
    if device is None or device.kind != "gpu":
        return {}
    found = {}
    if environ.get("CUDA_LAUNCH_BLOCKING", "") not in _FALSE:
        found["CUDA_LAUNCH_BLOCKING"] = "every kernel is waited for, so step times are those of another program"
    if environ.get("TF_FORCE_GPU_ALLOW_GROWTH", "true") in _FALSE:
        found["TF_FORCE_GPU_ALLOW_GROWTH"] = "TensorFlow takes the GPU's memory at once, so its peak is meaningless"
    if device.has_tf32 and "NVIDIA_TF32_OVERRIDE" in environ:
        found["NVIDIA_TF32_OVERRIDE"] = "one of the modes fp32 and tf32 then computes in the precision of the other"
    return found


def build_info() -> dict[str, Any]:
    """Return facts about TensorFlow's build, empty if unknown. Reads a file of the package and imports nothing."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or spec.origin is None:
        return {}
    try:
        tree = ast.parse((Path(spec.origin).parent / "python" / "platform" / "build_info.py").read_text("utf-8"))
        (call,) = [
            node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        ]
        return dict(ast.literal_eval(call.args[0]))
    except (OSError, SyntaxError, ValueError, IndexError):
        return {}


def _check_kernels(capability: tuple[int, int], built_for: list[str]) -> Iterator[Reason | str]:
    """Check whether TensorFlow's package has kernels for a GPU: machine code, or PTX that the driver compiles."""

    def built(prefix: str) -> list[tuple[int, int]]:
        digits = [each.removeprefix(prefix) for each in built_for if each.startswith(prefix)]
        return [(int(each[:-1]), int(each[-1])) for each in digits if each.isdecimal()]

    machine_code, ptx = built("sm_"), built("compute_")
    runs = any(major == capability[0] and (major, minor) <= capability for major, minor in machine_code)
    if not built_for or runs or capability in ptx:
        return
    mine = ".".join(map(str, capability))
    if any(each < capability for each in ptx):
        yield (
            f"TensorFlow's package has no machine code for compute capability {mine}: the driver compiles it when the "
            "GPU is first used, which may take many minutes (raise --mp-timeout if needed)"
        )
        return
    yield Reason(
        Code.SOFTWARE_MISFIT,
        f"TensorFlow's package has no kernels for compute capability {mine} (it has {', '.join(built_for)})",
        "use a TensorFlow that is built for this GPU, or measure the CPU with CUDA_VISIBLE_DEVICES=-1",
    )


def _missing_libraries() -> list[str]:
    """Return the CUDA libraries of TensorFlow's extra ``and-cuda`` that are not installed."""
    extra = {"extra": "and-cuda"}
    wanted = [each for each in _requirements("tensorflow") if each.marker is not None]
    asked = [each.name for each in wanted if each.marker and each.marker.evaluate(extra) and "nvidia" in each.name]
    installed = packages()
    return [name for name in asked if installed.get(canonicalize_name(name)) is None]


def _requirements(distribution: str) -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires(distribution) or ()]
    except (metadata.PackageNotFoundError, InvalidRequirement):
        return []


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
