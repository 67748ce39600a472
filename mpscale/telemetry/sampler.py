"""Peak memory of one worker process, watched from outside it.

The host's figure is a high-water mark kept by the kernel, so reading it at every phase is enough. NVML keeps no such
mark, so on a GPU a thread samples it. That thread alone talks to NVML: a driver call that hangs then costs a
figure, never a run.
"""

from __future__ import annotations

import threading
from typing import Any

from mpscale.telemetry import host
from mpscale.telemetry.device import Device
from mpscale.telemetry.nvml import NoNvml, Nvml

GPU_COLUMN = "gpu_memory_nvml_peak_mib"
HOST_COLUMN = "host_memory_peak_mib"

INTERVAL_S = 0.05
MARK_WAIT_S = 0.2
STOP_WAIT_S = 1.0
_MOST_REASONS = 3


class MemorySampler:
    """Watches one process after another; to be called from one thread.

    Args:
        nvml: asked for the memory of the process where ``device`` is a GPU.
        device: where the process trains.
    """

    def __init__(self, nvml: Nvml | NoNvml, device: Device) -> None:
        self._nvml = nvml
        self._device = device
        self._pid: int | None = None
        self._host_peak_mib: float | None = None
        self._gpu: _Watch | _NoWatch = _NoWatch("no process was watched")

    def start(self, pid: int) -> None:
        """Begins to watch the process ``pid``; what was seen of the one before is forgotten."""
        self._gpu.stop()
        self._pid = pid
        self._host_peak_mib = None
        self._gpu = self._watch(pid)

    def mark(self, phase: str) -> None:
        """Takes a sample now; returns once it is taken, or after 0.2 s where NVML does not answer.

        Args:
            phase: what the process has just reached; named in the reason should NVML stop answering after it.
        """
        self._read_host()
        self._gpu.mark(phase)

    def stop(self) -> dict[str, dict[str, Any]]:
        """Ends the watch, within about a second whatever NVML does.

        Returns:
            ``values``, {column: MiB} without the unknown ones, and ``unavailable``, {column: reason} for those.
        """
        self._read_host()
        gpu_peak_mib, gpu_reason = self._gpu.stop()
        host_reason = "the process ended before its memory could be read, or the system has no /proc"
        if self._pid is None:
            host_reason = gpu_reason
        values: dict[str, Any] = {}
        unavailable: dict[str, Any] = {}
        for column, value, reason in (
            (GPU_COLUMN, gpu_peak_mib, gpu_reason),
            (HOST_COLUMN, self._host_peak_mib, host_reason),
        ):
            if value is None:
                unavailable[column] = reason
            else:
                values[column] = value
        return {"values": values, "unavailable": unavailable}

    def _watch(self, pid: int) -> _Watch | _NoWatch:
        if self._device.kind != "gpu":
            return _NoWatch(
                f"trained on a CPU: {self._nvml.reason}" if isinstance(self._nvml, NoNvml) else "trained on a CPU"
            )
        if isinstance(self._nvml, NoNvml):
            return _NoWatch(self._nvml.reason)
        if self._device.uuid is None:
            return _NoWatch("NVML gives no UUID for the GPU")
        if self._gpu.alive:  # a second thread would hang like the first
            return _NoWatch("NVML did not answer in an earlier case and has not come back")
        try:
            return _Watch(self._nvml, self._device.uuid, pid)
        except RuntimeError as error:  # the host allows no further thread
            return _NoWatch(f"the sampler could not be started: {error}")

    def _read_host(self) -> None:
        # The newest reading is the largest, since the kernel keeps the mark. It is also the right one where an early
        # reading caught the child before exec, when its memory was still that of its parent.
        peak = host.peak_resident_mib(self._pid) if self._pid is not None else None
        if peak is not None:
            self._host_peak_mib = peak


class _NoWatch:
    """Stands in for :class:`_Watch` where there is nothing to sample."""

    alive = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def mark(self, phase: str) -> None:
        pass

    def stop(self) -> tuple[float | None, str]:
        return None, self._reason


class _Watch:
    """A thread that samples the GPU memory of one process until it is stopped.

    Its state is its own: a thread that comes back from a hanging call after its case cannot touch the next one.
    """

    def __init__(self, nvml: Nvml, uuid: str, pid: int) -> None:
        self._nvml, self._uuid, self._pid = nvml, uuid, pid
        self._peak_mib: float | None = None
        self._reasons: dict[str, None] = {}  # an ordered set
        self._phase = "the start"  # the last one that a sample answered
        self._asked_phase = self._phase
        self._asked = self._answered = 0  # numbers of marks
        self._stopping = False
        self._changed = threading.Condition()
        # A daemon: it may be inside a call that never returns when the interpreter ends.
        self._thread = threading.Thread(target=self._run, name="mpscale-memory-sampler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def mark(self, phase: str) -> None:
        with self._changed:
            behind = self._answered < self._asked
            self._asked += 1
            self._asked_phase = phase
            mine = self._asked
            self._changed.notify_all()
            if not behind:  # a driver that still owes the last mark its sample has been waited for already
                self._changed.wait_for(lambda: self._answered >= mine, MARK_WAIT_S)

    def stop(self) -> tuple[float | None, str]:
        with self._changed:
            waited_before, self._stopping = self._stopping, True
            self._changed.notify_all()
        self._thread.join(0 if waited_before else STOP_WAIT_S)
        with self._changed:
            peak_mib = self._peak_mib
            if self.alive:
                # Whatever came after is unseen, so the largest figure so far is no peak.
                seen = "nothing was seen" if peak_mib is None else f"{peak_mib:.0f} MiB was the most until then"
                return None, f"NVML stopped answering after {self._phase}; {seen}"
            return peak_mib, "; ".join(self._reasons) or "the process ended before the first sample"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._asked > self._answered, INTERVAL_S)
                if self._stopping:
                    return
                asked, phase = self._asked, self._asked_phase
            try:
                used_mib, reason = self._nvml.process_memory_mib(self._uuid, self._pid)
            except Exception as error:  # nothing that happens here may end the run
                used_mib, reason = None, f"the sampler failed: {type(error).__name__}: {error}"
            with self._changed:
                if used_mib is not None:
                    self._peak_mib = max(used_mib, self._peak_mib or 0.0)
                elif reason and len(self._reasons) < _MOST_REASONS:
                    self._reasons[reason] = None
                self._answered, self._phase = asked, phase
                self._changed.notify_all()
