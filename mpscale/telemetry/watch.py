"""Watch the process of a case from outside: its memory on the host, and what the GPU did meanwhile."""

from __future__ import annotations

import gzip
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mpscale.core.columns import Source, measured_columns
from mpscale.core.device import Device
from mpscale.core.files.errors import in_words
from mpscale.core.files.temporary import NoTemporaryFile, TemporaryFolder
from mpscale.core.files.writing import write
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.telemetry import gpu_memory, presence
from mpscale.telemetry.client import Driver, SilentDriver
from mpscale.telemetry.gpu_energy import energy_columns
from mpscale.telemetry.gpu_state import Suspicion, state_columns, suspicions
from mpscale.telemetry.host import HostNoise, peak_resident_mib
from mpscale.telemetry.samples import START, THROTTLING, Reading, Samples, line_of, read_samples

HOST_COLUMN = "host_memory_peak_mib"
_COOL_BY_C = 20.0
"""How far below its slowdown temperature a GPU has to be before a case is run again."""

_NOT_WATCHED = Reason(Code.NOT_REACHED, "no process was watched")
_ENDED = Reason(Code.HOST_SILENT, "the process ended before its memory could be read, or the system has no /proc")


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the worker contributes to the columns on the GPU.

    Args:
        allocator: of TensorFlow.
        energy_steps: steps taken while energy was counted.
        energy_applied_steps: those of them that were not skipped; None if the mode does not count them.
        energy_off: why energy was not to be measured; None if it was.
        replicas: how many GPUs the process used, see :class:`~mpscale.telemetry.replicas.ReplicaWatch`.
    """

    allocator: gpu_memory.AllocatorFacts = field(default_factory=gpu_memory.AllocatorFacts)
    energy_steps: int | None = None
    energy_applied_steps: int | None = None
    energy_off: Reason | None = None
    replicas: int = 1


@dataclass(slots=True)
class WatchResult:
    """The columns of a case, why its figures must not be used, and whether the GPU was lost.

    ``not_kept`` is why the samples could not be stored; None if they were, or were not to be.
    """

    findings: Findings = field(default_factory=Findings)
    suspicions: list[Suspicion] = field(default_factory=list)
    lost: bool = False
    not_kept: str | None = None


class CaseWatch:
    """Watches one process after another.

    Args:
        driver: of the GPU.
        device: where the processes train.
        pair: the id that two sessions share that take turns; None if there is no other.
    """

    def __init__(self, driver: Driver, device: Device, pair: str | None = None) -> None:
        self._driver, self._device = driver, device
        self._presence = presence.Presence(device, pair)
        self._beside: dict[presence.Other, None] = {}
        """Other runs that were seen on the GPU at the beginning or the end of the case."""
        self._folder = TemporaryFolder("gpu")
        self._file: IO[bytes] | None = None
        """The samples of the present case. It stays open, so that they can be read even if somebody removes it."""
        self._pid: int | None = None
        self._host_peaks_mib: dict[int, float | None] = {}
        """The largest memory of each process of the case that was seen."""
        self._noise: HostNoise | None = None
        self._blind: Reason | None = _NOT_WATCHED
        """Why the GPU cannot be watched; None if it can."""
        self._silent_after: str | None = None
        self._last_phase = START
        self._late: list[str] = []
        self._settings: dict[str, Any] = {}
        self._first_settings: Mapping[str, Any] | None = None
        self._ways: Mapping[str, str] = {}
        self._slowdown_c: float | None = None
        self._lost = False

    def start(
        self, pid: int, epoch: float, keeper: int | None = None, beside: Sequence[tuple[int, int | None]] = ()
    ) -> None:
        """Begin to watch a process, and forget the previous one.

        Args:
            pid: the process.
            epoch: when it was started, on the monotonic clock.
            keeper: its parent, if that has no other children than this process and what it leaves behind.
            beside: further processes of the case and their keepers, whose memory and time on the host count with its.
        """
        pids = [pid, *(other for other, _ in beside)]
        self._pid, self._host_peaks_mib, self._noise = pid, dict.fromkeys(pids), HostNoise(*pids)
        self._silent_after, self._last_phase, self._lost = None, START, False
        self._late = []
        self._beside = dict.fromkeys(self._presence.others())
        self._blind = self._begin(pid, epoch, keeper)

    def mark(self, phase: str) -> None:
        """Take a sample now; returns once it is taken, or after 0.2 s if the driver does not answer.

        Args:
            phase: what the process has just reached.
        """
        self._read_host()
        if self._noise is not None:
            self._noise.mark(phase)
        if self._blind is not None:
            return
        if self._driver.mark(phase):
            self._last_phase, self._silent_after = phase, None
        else:
            self._late.append(phase)
            self._silent_after = self._silent_after or self._last_phase

    def stop(self, worker: WorkerFacts, keep: Path | None) -> WatchResult:
        """End the watch, within about two seconds whatever the driver does.

        Args:
            worker: what the worker contributes to the columns.
            keep: where to store the gzipped samples; None discards them.
        """
        self._read_host()
        result = WatchResult()
        findings = result.findings
        unknown = _NOT_WATCHED if self._pid is None else _ENDED
        peaks = [peak for peak in self._host_peaks_mib.values() if peak is not None]
        all_known = bool(peaks) and len(peaks) == len(self._host_peaks_mib)
        findings.put(HOST_COLUMN, sum(peaks) if all_known else unknown)
        if self._noise is not None:
            findings.add(self._noise.columns())
        self._beside |= dict.fromkeys(self._presence.others())
        if beside := presence.beside(list(self._beside)):
            result.suspicions = [Suspicion(f"{beside}: figures may be of both", True)]
        if self._blind is not None:
            blind = self._blind
            findings.miss(measured_columns(source=Source.MONITOR), blind)
            why = self._driver.reason
            if why is not None:
                findings.put(gpu_memory.HEADLINE, why if why == blind else why.worded(f"{blind}: {why}"))
            return result
        after = self._settings
        # Also of a driver that is silent by now: a sample that it took late is not of its phase.
        notes: list[dict[str, Any]] = [{"late": self._late}] if self._late else []
        try:
            answer = self._driver.stop()
            after, self._lost = answer["settings"], self._lost or answer["lost"]
            self._ways = answer["ways"]
        except SilentDriver as error:
            since = self._silent_after or self._last_phase
            silent = error.reason.worded(f"the GPU driver stopped answering after {since} ({error})")
            notes.append({"silent": silent.to_json()})
        result.lost = self._lost
        samples, result.not_kept = self._read_samples(keep, notes)
        findings.add(gpu_memory.memory_columns(samples, worker.allocator))
        steps, applied, off = worker.energy_steps, worker.energy_applied_steps, worker.energy_off
        findings.add(energy_columns(samples, steps, applied, self._ways.get(Reading.POWER), off))
        findings.add(state_columns(samples))
        result.suspicions += suspicions(samples, (self._settings, after), self._first_settings or {}, self._slowdown_c)
        return result

    def has_power(self) -> bool:
        """Whether the GPU reports energy or power, so that a longer window pays off."""
        return Reading.ENERGY in self._ways or Reading.POWER in self._ways

    def cool_down(self, seconds: float) -> None:
        """Wait until the GPU is neither hot nor throttled and nobody else computes on it.

        Args:
            seconds: the longest wait.
        """
        end = time.monotonic() + seconds
        warmest_c = math.inf if self._slowdown_c is None else self._slowdown_c - _COOL_BY_C
        while time.monotonic() < end:
            try:
                now = self._driver.look(self._device)
            except SilentDriver:
                return
            hot = (now["temperature_c"] or 0.0) > warmest_c
            alone = not now["processes"] and not self._presence.others()
            if not hot and not THROTTLING & set(now["clock_events"]) and alone:
                return
            time.sleep(min(1.0, max(end - time.monotonic(), 0.0)))

    def close(self) -> None:
        """Remove temporary files and the note on the GPU. The driver stays open: it belongs to the caller."""
        self._presence.close()
        if self._file is not None:
            self._file.close()
        self._folder.close()

    def _begin(self, pid: int, epoch: float, keeper: int | None) -> Reason | None:
        """Have the monitor watch a process; return the reason if it cannot."""
        if self._device.kind != "gpu":
            return Reason(Code.NO_GPU, "no GPU")
        try:
            if self._first_settings is None:
                self._slowdown_c = self._driver.facts(self._device)["facts"].get("slowdown_c")
            if self._file is not None:
                self._file.close()
            file = self._folder.path / "samples.jsonl"
            # A new file, because a monitor that hangs may still write to the one before.
            file.unlink(missing_ok=True)
            self._file = file.open("w+b")
            answer = self._driver.start(self._device, pid, file, epoch, keeper)
        except SilentDriver as error:
            return error.reason
        except NoTemporaryFile as error:
            return Reason(Code.MONITOR_DIED, f"there is no place for the monitor's file: {error}")
        except OSError as error:
            return Reason(Code.MONITOR_DIED, f"the monitor cannot be started: {error}")
        self._settings, self._ways, self._lost = answer["settings"], answer["ways"], answer["lost"]
        if self._first_settings is None:
            self._first_settings = self._settings
        return None

    def _read_samples(self, keep: Path | None, notes: Sequence[Mapping[str, Any]]) -> tuple[Samples, str | None]:
        """The samples of the case, and why they could not be stored; None if they were."""
        text = ""
        if self._file is not None:
            self._file.seek(0)
            text = self._file.read().decode("utf-8")
        if notes:
            # The last line may have been cut off when the monitor died.
            text = text[: text.rfind("\n") + 1] + "".join(map(line_of, notes))
        not_kept = None
        if keep is not None and text:
            try:
                write(keep, gzip.compress(text.encode(), 6), keep.parent.parent)
            except OSError as error:
                # Losing this file must not fail the case, whose figures are known.
                not_kept = in_words(error)
        return read_samples(text.splitlines(keepends=True)), not_kept

    def _read_host(self) -> None:
        # The newest reading is the largest, since the kernel keeps the maximum. It also corrects an early reading that
        # caught the child before exec, when its memory was still that of its parent.
        for pid in self._host_peaks_mib:
            if (peak := peak_resident_mib(pid)) is not None:
                self._host_peaks_mib[pid] = peak
