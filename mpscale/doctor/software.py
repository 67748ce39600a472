"""The installed software: versions, whether they are those that mpscale is made for, and whether they fit the GPU."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mpscale.core.device import Device
from mpscale.doctor.findings import Examination, Problem
from mpscale.telemetry.client import Driver
from mpscale.telemetry.fingerprint import packages

SHOWN = ("mpscale", "tensorflow", "keras", "nvidia-ml-py")
_CUDA_DO = "pip install 'tensorflow[and-cuda]'"


def examine(found: Examination, driver: Driver) -> None:
    """Versions, and which of them are out of the ranges of ``pyproject.toml``."""
    installed = packages()
    cuda = {name: version for name, version in installed.items() if name.startswith("nvidia-") and name not in SHOWN}
    found.software = {
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in SHOWN},
        "cuda_libraries": cuda,
        "nvml": str(driver.reason or "works"),
        "nvidia_driver": driver.driver_version,
        "cuda_driver": driver.cuda_version,
    }
    for wanted in _requirements("mpscale"):
        name = canonicalize_name(wanted.name)
        if name not in SHOWN or wanted.marker is not None:
            continue
        there = installed[name]
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            what = "is not installed" if there is None else f"{there} is installed"
            found.problems.append(
                Problem(f"{name} {what}, and mpscale needs {wanted.specifier}", f"pip install '{wanted}'")
            )


def examine_for_gpu(found: Examination, device: Device, cuda_driver: str | None) -> None:
    """Whether the installed TensorFlow can use a GPU, as far as its files tell.

    Args:
        found: takes problems and notes.
        device: a GPU.
        cuda_driver: the newest CUDA that its driver supports.
    """
    build = build_info()
    if build and not build.get("is_cuda_build") and not device.is_stand_in:
        found.problems.append(
            Problem("the installed TensorFlow was built without CUDA, so it uses no NVIDIA GPU", _CUDA_DO)
        )
        return
    needed = str(build.get("cuda_version") or "")
    if cuda_driver and needed and int(cuda_driver.split(".")[0]) < int(needed.split(".")[0]):
        found.problems.append(
            Problem(
                f"the NVIDIA driver supports CUDA up to {cuda_driver}, and the installed TensorFlow needs {needed}",
                f"update the NVIDIA driver to one that supports CUDA {needed.split('.')[0]}",
            )
        )
    if device.compute_capability:
        _kernels(found, device.compute_capability, build.get("cuda_compute_capabilities") or [])
    missing = _missing_libraries()
    if not missing or device.is_stand_in:
        return
    if _loads(f"libcudnn.so.{build.get('cudnn_version') or 9}"):
        found.notes.append(
            "TensorFlow's CUDA libraries are not all installed through pip, so it looks for those of the system; "
            "`mpscale doctor --gpu` shows whether it finds them"
        )
        return
    found.problems.append(
        Problem(f"TensorFlow's CUDA libraries are not installed ({', '.join(missing)}), so it sees no GPU", _CUDA_DO)
    )


def build_info() -> dict[str, Any]:
    """What TensorFlow's package says of its build; empty where it does not. Reads a file and imports nothing."""
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


def _kernels(found: Examination, capability: tuple[int, int], built_for: list[str]) -> None:
    """Whether TensorFlow's package holds kernels for a GPU: machine code for its generation, or what makes it."""

    def versions(prefix: str) -> list[tuple[int, int]]:
        digits = [each.removeprefix(prefix) for each in built_for if each.startswith(prefix)]
        return [(int(each[:-1]), int(each[-1])) for each in digits if each.isdecimal()]

    ready, to_translate = versions("sm_"), versions("compute_")
    mine = ".".join(map(str, capability))
    if not built_for or any(major == capability[0] and (major, minor) <= capability for major, minor in ready):
        return
    if any(each == capability for each in to_translate):
        return
    if any(each < capability for each in to_translate):
        found.notes.append(
            f"TensorFlow's package holds no machine code for compute capability {mine}: the driver compiles it when "
            "the GPU is first used, which may take many minutes (a larger --mp-timeout lets it)"
        )
        return
    found.problems.append(
        Problem(
            f"TensorFlow's package holds no kernels for compute capability {mine} (it has {', '.join(built_for)})",
            "use a TensorFlow that is built for this GPU, or measure the CPU with CUDA_VISIBLE_DEVICES=-1",
        )
    )


def _missing_libraries() -> list[str]:
    """The CUDA libraries that TensorFlow's extra ``and-cuda`` would bring and that are not installed."""
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
