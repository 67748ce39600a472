"""XLA's autotuning in this process: whether its kernels are timed here, or taken from what another process found."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings

_LOADS = "--xla_gpu_load_autotune_results_from="
_LEVEL = "--xla_gpu_autotune_level="

_added = _users = ""
"""What has been added to XLA_FLAGS, and the user's own value at that time."""


def begin(flag: str | None) -> None:
    """Add a flag to the user's own ones. XLA reads them when it is first used.

    Args:
        flag: it saves autotuning results to a file or loads them from one; None adds nothing.
    """
    global _added, _users
    if flag is not None:
        _added, _users = f" {flag}", os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = _written_out(_users) + _added


def users_variable(name: str) -> str:
    """An environment variable without what :func:`begin` has added; empty if it is not set."""
    value = os.environ.get(name, "")
    if name != "XLA_FLAGS" or not _added:
        return value
    # It may have changed since, for example when the workload's module was imported.
    return _users if value == _written_out(_users) + _added else value.replace(_added, "")


def columns(device: Device, jit: bool) -> Findings:
    """The column ``autotuning``, by the flags that XLA has got. ``jit``: whether XLA compiles the steps."""
    found = Findings()
    flags = _written_out(os.environ.get("XLA_FLAGS", ""))
    try:
        words = shlex.split(flags)
    except ValueError:
        words = flags.split()
    levels = [word.removeprefix(_LEVEL) for word in words if word.startswith(_LEVEL)]
    if device.kind != "gpu":
        found.miss(["autotuning"], Reason(Code.NO_GPU, "XLA times kernels only on a GPU"))
    elif not jit:
        found.miss(["autotuning"], Reason(Code.NOT_ASKED_FOR, "XLA does not compile the steps"))
    elif levels and levels[-1] == "0":
        found.miss(["autotuning"], Reason(Code.NOT_ASKED_FOR, "XLA_FLAGS turns autotuning off"))
    else:
        loaded = any(word.startswith(_LOADS) and word != _LOADS for word in words)
        found.values["autotuning"] = "reused" if loaded else "tuned"
    return found


def _written_out(flags: str) -> str:
    """Flags as XLA reads them: a value that does not begin with a dash is the name of a file that holds them."""
    name = flags.strip()
    if not name or name.startswith("-"):
        return flags
    try:
        return " ".join(Path(name).read_text(encoding="utf-8").split("\n"))
    except (OSError, ValueError):
        return ""
