"""The environment of a run: everything outside its settings that can change a figure.

Reports get published, so host names, paths and other environment variables are left out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from mpscale.core.device import VENDORS, Device
from mpscale.telemetry import host
from mpscale.telemetry.client import Driver, SilentDriver

PACKAGES = (
    "mpscale",
    "tensorflow",
    "keras",
    "numpy",
    "nvidia-ml-py",
    "pytest-benchmark",
    "pandas",
    "mnist1d",
)

VARIABLES = (
    "CI",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    *(vendor.visible for vendor in VENDORS.values()),
    "KERAS_BACKEND",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TF_CUDNN_DETERMINISTIC",
    "TF_CUDNN_USE_AUTOTUNE",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_GPU_ALLOCATOR",
    "TF_GPU_THREAD_COUNT",
    "TF_GPU_THREAD_MODE",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)
"""Environment variables that change results. No others are recorded."""

_OTHER_TENSORFLOWS = ("tensorflow-cpu", "tensorflow-cpu-aws", "tf-nightly", "tf-nightly-cpu")
_GIT_TIMEOUT_S = 5.0


def environment(device: Device, driver: Driver, project_dir: Path) -> dict[str, Any]:
    """The software and the machine, for ``run.json``: plain values, None for what is unknown.

    Args:
        device: where the run trains.
        driver: of the GPU.
        project_dir: a directory in the git repository whose commit is recorded.
    """
    return {
        "packages": packages(),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": platform.platform(),
        "kernel": platform.release(),
        "libc": " ".join(filter(None, platform.libc_ver())) or None,
        "cpu": host.cpu_facts(),
        "memory_mib": host.memory_mib(),
        "load_average_at_start": host.load_average(),
        "device": device.to_json(),
        "nvml": "works" if driver.reason is None else str(driver.reason),
        "nvidia_driver": driver.driver_version,
        "cuda_driver": driver.cuda_version,
        "gpu": _gpu(device, driver),
        "git": _git(project_dir),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def run_slug(device: Device) -> str:
    """The device's name as part of a folder's name: at most 40 lower-case letters, digits and single dashes."""
    without_marks = re.sub(r"\((?:r|tm|c)\)", " ", device.name.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", without_marks).strip("-")
    return slug[:40].rstrip("-") or device.kind


def _gpu(device: Device, driver: Driver) -> dict[str, Any] | None:
    """The GPU's facts, how its readings are taken and why some are not; None on a CPU."""
    if device.kind != "gpu":
        return None
    try:
        told = driver.facts(device)
    except SilentDriver as error:
        return {"reason": str(error)}
    # The device is recorded beside it.
    known = {*device.to_json(), "driver", "cuda_driver"} - {"mig"}
    return {
        "facts": {name: value for name, value in told["facts"].items() if name not in known},
        "ways": told["ways"],
        "reasons": {reading: reason.to_json() for reading, reason in told["reasons"].items()},
    }


def packages() -> dict[str, str | None]:
    """Versions of :data:`PACKAGES`, None for those that are not installed, and of all of NVIDIA's packages.

    TensorFlow is distributed under several names; the installed one is added.
    """
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for distribution in metadata.distributions():
        # A broken installation may have no name. Of two with the same name, the first is the one that is imported.
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        wanted = name in versions or name in _OTHER_TENSORFLOWS or name.startswith("nvidia-")
        if wanted and versions.get(name) is None:
            versions[name] = distribution.version
    return versions


def _git(directory: Path) -> dict[str, Any] | None:
    """The commit, whether any file differs from it or is new, and a digest of these changes.

    The digest covers only the names of new files. None without git or outside a repository.
    """
    changes = _run_git(directory, "status", "--porcelain")
    if changes is None:
        return None
    found: dict[str, Any] = {"commit": _run_git(directory, "rev-parse", "--verify", "HEAD"), "dirty": changes != ""}
    if changes:
        difference = _run_git(directory, "diff", "--binary", "HEAD") or ""
        found["changes_digest"] = hashlib.sha256(f"{changes}\n{difference}".encode()).hexdigest()[:16]
    return found


def _run_git(directory: Path, *arguments: str) -> str | None:
    # Inside a git hook, GIT_DIR and related variables point to another repository than the directory's. Without
    # optional locks, reading the status does not disturb a commit made at the same time.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            env={**variables, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
