"""Whether this process holds the GPU on which cases are about to be measured."""

from __future__ import annotations

import os
from pathlib import Path

from mpscale.core.device import NoSuchDevice, find_device, gpu_files_of
from mpscale.telemetry import host
from mpscale.telemetry.client import SilentDriver, open_driver


def held(process: Path = Path("/proc/self")) -> str | None:
    """Why no case can be measured beside this process, and what to do; None if it holds nothing of the GPU.

    Nothing here touches the GPU. A process that has only looked for it, by ``tf.config.list_physical_devices``, has
    its files open and takes none of its memory, so the driver decides: rows are invalid if it lists another process.
    """
    try:
        if not gpu_files_of(process):
            return None
    except OSError:
        return None  # not Linux: a run notices it in the first case
    driver = open_driver()
    try:
        device = find_device(driver.devices, os.environ, host.cpu())
        listed = driver.look(device)["pids"] if device.kind == "gpu" else []
    except (NoSuchDevice, SilentDriver):
        return None  # the session will say so
    finally:
        driver.close()
    # In a container the driver may number processes otherwise.
    strange = [pid for pid in listed if not Path("/proc", str(pid)).exists()]
    if os.getpid() not in listed and not strange:
        return None
    return (
        f"this process has used {device.name} and still holds its memory, so no case could be measured beside it. "
        "Restart the script or the kernel, and before anything else call tf.config.set_visible_devices([], 'GPU'), or "
        "make the data in functions, which are called in the processes of the cases"
    )
