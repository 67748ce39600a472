"""What to do about a reason for which NVML gives nothing; None where nobody can do anything."""

from __future__ import annotations

_CURES = (
    ("garbled", "update the NVIDIA driver: 535.86 is the last with this fault"),
    ("driver is too old", "update the NVIDIA driver"),
    ("nvidia-ml-py does not know", "pip install --upgrade nvidia-ml-py"),
    ("nvidia-ml-py cannot be imported", "pip install --force-reinstall nvidia-ml-py"),
    (
        "no permission",
        "give this user access to /dev/nvidiactl and /dev/nvidia0; a container is started with --gpus all",
    ),
    ("of different versions", "reboot, or load the driver's kernel module anew"),
    ("is lost", "reset the GPU with nvidia-smi --gpu-reset, or reboot"),
    ("driver is not loaded", "load the driver with modprobe nvidia; nvidia-smi then shows the GPU"),
    (
        "no NVIDIA driver library",
        "install the driver's library libnvidia-ml.so.1; a container is started with --gpus all and "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    ),
    ("did not answer", "see whether nvidia-smi answers; if not, reboot"),
    ("NVML's process", "see whether nvidia-smi works; if not, install the NVIDIA driver anew"),
)


def cure(reason: str | None) -> str | None:
    """What to do about a reason.

    Args:
        reason: one of telemetry's, in its plain words.
    """
    return next((do for words, do in _CURES if words in (reason or "")), None)
