"""Environment variables: which of them a run records, and how secrets in others are kept out of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from mpscale.core.device import VENDORS

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
"""Environment variables that change results. No others are recorded or shown, whatever they begin with."""

_LONGEST = 500
"""Most characters of a value."""
_PATH = re.compile(r"(?:(?<==)|(?<!\S))(?!MIG-)[^\s=]*/\S*")
"""A path; not the slice of a GPU, which may be called ``MIG-GPU-<uuid>/1/0``."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(?:API|ACCESS|PRIVATE|AUTH|ENCRYPTION|SIGNING)_?KEY|_KEY$", re.I)
_SHORTEST = 8
"""Fewest characters of a value that is taken for a secret: a shorter one is found in innocent words."""


def recorded(environ: Mapping[Any, Any]) -> dict[str, str]:
    """What a run records of an environment, and a report shows: :data:`VARIABLES`, without paths, and cut if long."""
    found = {name: environ[name] for name in VARIABLES if isinstance(environ.get(name), str)}
    return {name: _cut(_PATH.sub(_hidden, value)) for name, value in found.items()}


def _hidden(path: re.Match[str]) -> str:
    """Hide a path. Its checksum stays, so that two paths are not taken for equal."""
    return f"<path-{hashlib.sha256(path[0].encode('utf-8', 'surrogatepass')).hexdigest()[:8]}>"


def _cut(value: str) -> str:
    """Cut a long value. Its checksum stays, so that two values that differ behind the cut are not taken for equal."""
    if len(value) <= _LONGEST:
        return value
    checksum = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    rest = f"… ({len(value):,} characters, SHA-256 {checksum})"
    # No longer than allowed, so that it is not cut again when it is read.
    return value[: _LONGEST - len(rest)] + rest


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """Return what a program printed, without the values of variables whose names say that they are secrets.

    It finds a secret only as it stands in the variable: not in base64, nor one from a file.
    """
    secrets = {value for name, value in environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(secret, "<secret>")
    return text
