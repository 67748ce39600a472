"""Watches the process of a case from outside: its memory on the host, and what the GPU did meanwhile."""

from __future__ import annotations

import contextlib
import gzip
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpscale.core.device import Device
from mpscale.core.reason import Reason
from mpscale.core.record import Findings
from mpscale.telemetry import gpu_memory, gpu_state, host
from mpscale.telemetry import gpu_state as gpu_energy
from mpscale.telemetry.client import Driver, SilentDriver
from mpscale.telemetry.gpu_state import Suspicion
from mpscale.telemetry.host import HostNoise
from mpscale.telemetry.samples import LATE, SILENT, START, Samples, read_samples

HOST_COLUMN = "host_memory_peak_mib"
_COOL_BY_C = 20.0
"""How far below the temperature at which it slows down a GPU has to be before a case is run again."""

GPU_COLUMNS = (*gpu_memory.COLUMNS, *gpu_energy.ENERGY_COLUMNS, *gpu_state.COLUMNS)


@dataclass(frozen=True, slots=True)
class Told:
    """What the worker tells of itself, and the columns on the GPU need.

    Args:
        allocator_peak_mib: peak of TensorFlow's allocator.
        energy_steps: steps taken while energy was counted.
        energy_applied_steps: of them, those that were not skipped; None where the mode does not tell.
        energy_off: why energy was not to be measured, None where it was.
    """

    allocator_peak_mib: float | None = None
    energy_steps: int | None = None
    energy_applied_steps: int | None = None
    energy_off: Reason | str | None = None


@dataclass(slots=True)
class Seen:
    """What was seen of a case.

    Args:
        findings: its columns.
        suspicions: why its figures must not be used.
        lost: whether the GPU was lost meanwhile.
    """

    findings: Findings = field(default_factory=Findings)
    suspicions: list[Suspicion] = field(default_factory=list)
    lost: bool = False


class CaseWatch:
    """Watches one process after another.

    Args:
        driver: tells of the GPU.
        device: where the processes train.
    """

    def __init__(self, driver: Driver, device: Device) -> None:
        self._driver, self._device = driver, device
        self._folder = tempfile.TemporaryDirectory(prefix="mpscale-gpu-")
        self._file = Path(self._folder.name) / "samples.csv"
        self._pid: int | None = None
        self._host_peak_mib: float | None = None
        self._noise: HostNoise | None = None
        self._blind = "no process was watched"
        self._silent_after: str | None = None
        self._last_phase = START
        self._late: list[str] = []
        self._settings: dict[str, Any] = {}
        self._first_settings: Mapping[str, Any] | None = None
        self._ways: Mapping[str, str] = {}
        self._facts: Mapping[str, Any] | None = None
        self._lost = False

    def start(self, pid: int, epoch: float) -> None:
        """Begins to watch a process; what was seen of the one before is forgotten.

        Args:
            pid: the process.
            epoch: when it was started, of the monotonic clock.
        """
        self._pid, self._host_peak_mib, self._noise = pid, None, HostNoise(pid)
        self._silent_after, self._last_phase, self._lost = None, START, False
        self._late = []
        self._blind = self._begin(pid, epoch)

    def mark(self, phase: str) -> None:
        """Takes a sample now; returns once it is taken, or after 0.2 s where NVML does not answer.

        Args:
            phase: what the process has just reached.
        """
        self._read_host()
        if self._noise is not None:
            self._noise.mark(phase)
        if self._blind:
            return
        if self._driver.mark(phase):
            self._last_phase, self._silent_after = phase, None
        else:
            self._late.append(phase)
            self._silent_after = self._silent_after or self._last_phase

    def stop(self, told: Told, keep: Path | None) -> Seen:
        """Ends the watch, within about two seconds whatever NVML does.

        Args:
            told: what the worker tells of itself.
            keep: where the samples go, gzipped; None keeps them not.
        """
        self._read_host()
        seen = Seen()
        ended = "the process ended before its memory could be read, or the system has no /proc"
        seen.findings.put(HOST_COLUMN, self._host_peak_mib, self._blind if self._pid is None else ended)
        if self._noise is not None:
            seen.findings.add(self._noise.columns())
        if self._blind:
            seen.findings.miss(GPU_COLUMNS, self._blind)
            if self._driver.reason:
                seen.findings.miss([gpu_memory.HEADLINE], f"{self._blind}: {self._driver.reason}")
            return seen
        after = self._settings
        try:
            answer = self._driver.stop()
            after, lost = answer["settings"], self._lost or answer["lost"]
            self._ways = answer["ways"]
            notes = {LATE: " ".join(self._late)} if self._late else {}
        except SilentDriver as error:
            notes = {SILENT: f"NVML stopped answering after {self._silent_after or self._last_phase} ({error})"}
            lost = self._lost
        samples = self._read_samples(keep, notes)
        seen.lost = lost
        seen.findings.add(gpu_memory.memory_columns(samples, told.allocator_peak_mib))
        seen.findings.add(
            gpu_energy.energy_columns(
                samples, told.energy_steps, told.energy_applied_steps, self._power_source(), told.energy_off
            )
        )
        seen.findings.add(gpu_state.state_columns(samples))
        seen.suspicions = gpu_state.suspicions(
            samples, (self._settings, after), self._first_settings or {}, self._fact("slowdown_c")
        )
        return seen

    def has_power(self) -> bool:
        """Whether the GPU tells its energy or its power, so that a longer window is worth its time."""
        return "energy_mj" in self._ways or "power_mw" in self._ways

    def cool_down(self, seconds: float) -> None:
        """Waits until the GPU is neither hot nor throttled and nobody else computes on it.

        Args:
            seconds: the longest wait.
        """
        end = time.monotonic() + seconds
        slowdown_c = self._fact("slowdown_c")
        below_c = None if slowdown_c is None else slowdown_c - _COOL_BY_C
        while time.monotonic() < end:
            try:
                now = self._driver.look(self._device)
            except SilentDriver:
                return
            hot = below_c is not None and now["temperature_c"] is not None and now["temperature_c"] > below_c
            if not hot and not (now["event_reasons"] or 0) & gpu_state.THROTTLED and not now["processes"]:
                return
            time.sleep(min(1.0, max(end - time.monotonic(), 0.0)))

    def close(self) -> None:
        """Removes what was only for the time of the run. The driver stays open: it is not ours."""
        self._folder.cleanup()

    def _begin(self, pid: int, epoch: float) -> str:
        """Starts the sampler on a process; why it sees nothing, or an empty text."""
        if self._device.kind != "gpu":
            return "no GPU"
        try:
            if self._facts is None:
                self._facts = self._driver.facts(self._device)["facts"]
            answer = self._driver.start(self._device, pid, self._file, epoch)
        except (SilentDriver, OSError) as error:
            return str(error)
        self._settings, self._ways, self._lost = answer["settings"], answer["ways"], answer["lost"]
        if self._first_settings is None:
            self._first_settings = self._settings
        return ""

    def _read_samples(self, keep: Path | None, notes: Mapping[str, str]) -> Samples:
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        if notes:
            # The last line may have been cut off, when the sampler died.
            text = text[: text.rfind("\n") + 1] + "".join(f"# {name}: {words}\n" for name, words in notes.items())
        if keep is not None and text:
            # The case is worth more than this file. If the run's folder cannot be written, the journal says so.
            with contextlib.suppress(OSError):
                keep.parent.mkdir(parents=True, exist_ok=True)
                keep.write_bytes(gzip.compress(text.encode(), 6))
        return read_samples(text.splitlines(keepends=True))

    def _power_source(self) -> str | None:
        way = self._ways.get("power_mw")
        return {"instant": "instant", "nvmlDeviceGetPowerUsage": "mean of up to a second"}.get(way or "")

    def _fact(self, name: str) -> Any:
        return None if self._facts is None else self._facts.get(name)

    def _read_host(self) -> None:
        # The newest reading is the largest, since the kernel keeps the mark. It is also the right one where an early
        # reading caught the child before exec, when its memory was still that of its parent.
        peak = host.peak_resident_mib(self._pid) if self._pid is not None else None
        if peak is not None:
            self._host_peak_mib = peak
