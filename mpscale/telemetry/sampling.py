"""The sampling of one case, in the monitor's process.

Memory is read every 10 ms, processes whenever it has changed, the energy counter every 20 ms, and everything every
100 ms and at every phase. While steps are timed, everything is read every 500 ms and nothing in between: waking up
costs a processor that the training may need, and the same steps have been watched closely before.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mpscale.core.reason import Reason
from mpscale.telemetry.backend import Gpu
from mpscale.telemetry.readings import Memory, Reading
from mpscale.telemetry.samples import CALM_FROM, CALM_S, CALM_UNTIL, STATE, Sample, SampleFile

FAST_S = 0.01
ENERGY_S = 0.019
SLOW_S = 0.1


class Family:
    """The worker and the processes that it has started.

    Args:
        pid: the worker.
    """

    def __init__(self, pid: int) -> None:
        self._known = {pid: True}
        self._pid = pid

    def __contains__(self, pid: int) -> bool:
        # Looked up once per process: walking /proc a hundred times a second would cost more than the driver.
        if pid not in self._known:
            self._known[pid] = self._descends(pid)
        return self._known[pid]

    def _descends(self, pid: int) -> bool:
        while pid > 1:
            try:
                stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            except OSError:
                return False
            # The name, in parentheses, may hold anything: the fields count from its end.
            _, parent, _, session = stat.rpartition(")")[2].split()[:4]
            # The worker leads a session of its own, which also holds what it left behind.
            if int(session) == self._pid or int(parent) == self._pid:
                return True
            pid = int(parent)
        return False


class SamplingLoop:
    """Takes the samples of one case.

    Args:
        gpu: the GPU to read.
        pid: the worker.
        file: takes the samples.
        epoch: the time that samples count from, on the monotonic clock.
    """

    def __init__(self, gpu: Gpu, pid: int, file: SampleFile, epoch: float) -> None:
        self._gpu, self._family, self._file, self._epoch = gpu, Family(pid), file, epoch
        self._lists = [Reading.PROCESSES]
        self._last: Sample | None = None
        self._energy_j: float | None = None
        self._looks, self._gap, self._looked = 0, 0.0, time.monotonic()
        self._slow_due = self._energy_due = 0.0
        self._failed: list[str] = []
        self._broken = False
        """Whether a reading that has answered before has just failed."""
        self.calm = False

    @property
    def pause_s(self) -> float:
        """Time to the next look; while steps are timed, what has failed is retried soon."""
        if not self.calm:
            return FAST_S
        return SLOW_S if self._broken else CALM_S

    def sample(self, phase: str = "") -> None:
        """Read memory and energy, and everything else if that is due or a phase was reached.

        Args:
            phase: what the worker has just reached.
        """
        now = time.monotonic()
        self.calm = phase == CALM_FROM or (self.calm and phase != CALM_UNTIL)
        slow = bool(phase) or self.calm or now >= self._slow_due
        self._looks += 1
        self._gap = max(self._gap, now - self._looked)
        self._looked = now
        sample = Sample(round(now - self._epoch, 4), phase, self._looks, self._gap)
        failed_before, self._failed = self._failed, []
        broken_before, self._broken = self._broken, False
        memory, last = self._read(Reading.MEMORY), self._last
        if isinstance(memory, Memory):
            sample.device_memory_mib, sample.reserved_memory_mib = memory
        if slow:
            self._read_other_lists(sample)
        # The driver rebuilds its list of processes each time, which is expensive, so not while memory stands still.
        moved = last is None or memory is None or sample.device_memory_mib != last.device_memory_mib
        if slow or moved or broken_before:
            self._read_processes(sample)
        energy_due = slow or now >= self._energy_due
        if energy_due:
            self._energy_due = now + ENERGY_S
            sample.energy_j = self._read(Reading.ENERGY)
        if slow:
            self._slow_due = now + SLOW_S
            for reading in STATE:
                setattr(sample, reading, self._read(reading))
        sample.failed = tuple(self._failed)
        turned = self._failed != failed_before
        if slow or moved or turned or (energy_due and sample.energy_j != self._energy_j):
            self._energy_j = sample.energy_j if energy_due else self._energy_j
            self._file.write(sample)
            self._last = sample
            self._looks, self._gap = 0, 0.0
        if slow:
            self._file.tell(self._gpu.reasons)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, reading: Reading) -> Any:
        """The value of a reading, numbers as float; None if it has none, which is noted."""
        value = self._gpu.read(reading)
        if isinstance(value, Reason):
            self._note(reading, reading, value)
            return None
        return value if reading.range is None else float(value)

    def _note(self, reading: Reading, source: Reading, reason: Reason) -> None:
        """Note that a reading failed, unless it was never there or the GPU is gone, and the case with it."""
        if self._gpu.asks(source) and not self._gpu.lost:
            self._failed.append(reading)
            self._broken = self._broken or source in self._gpu.ways
        self._file.tell({reading: reason})

    def _read_processes(self, sample: Sample) -> None:
        listed = self._gpu.processes(self._lists)
        if isinstance(listed, Reason):
            source = next((each for each in self._lists if each in self._gpu.reasons), Reading.PROCESSES)
            self._note(Reading.PROCESSES, source, listed)
            return
        sample.processes = listed.number
        if isinstance(listed.by_pid, Reason):
            self._file.tell({Reading.PROCESSES: listed.by_pid})
            return
        ours = [used for pid, used in listed.by_pid.items() if pid in self._family]
        sample.listed = bool(ours)
        sample.other_pids = tuple(pid for pid in listed.by_pid if pid not in self._family)
        known = [used for used in ours if used is not None]
        # Some of them would pass for all.
        sample.process_memory_mib = sum(known) if known and len(known) == len(ours) else None

    def _read_other_lists(self, sample: Sample) -> None:
        """A worker that shares the GPU through a service is in a list of its own, and one that draws in another."""
        for reading in (Reading.GRAPHICS_PROCESSES, Reading.SERVICE_PROCESSES):
            listed = self._gpu.processes([reading])
            if isinstance(listed, Reason):
                if reading is Reading.GRAPHICS_PROCESSES:
                    self._note(reading, reading, listed)
                continue
            if isinstance(listed.by_pid, Reason):
                continue
            if reading not in self._lists and any(pid in self._family for pid in listed.by_pid):
                self._lists.append(reading)
            if reading is Reading.GRAPHICS_PROCESSES:
                sample.graphics_pids = tuple(pid for pid in listed.by_pid if pid not in self._family)
