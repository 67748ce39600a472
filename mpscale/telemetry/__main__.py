"""The GPU monitor, ``python -m mpscale.telemetry.__main__ DESCRIPTOR``: the only process that talks to the driver.

It is a process of its own so as not to slow down the training, and because pytest must survive a driver that hangs or
crashes. DESCRIPTOR is its end of a wire on which it answers orders; each answer has the ``id`` of its order.

- ``{"do": "describe"}``: describe the driver and its GPUs, or give the reason why there are none;
- ``{"do": "facts", "device": ...}``: return the properties of a GPU, and how each reading is taken or why it is not;
- ``{"do": "start", "device": ..., "pid": ..., "keeper": ..., "file": ..., "epoch": ...}``: begin to watch a process and
  write samples to a file, with times counted from ``epoch`` on the monotonic clock; see :class:`Family` for ``keeper``;
- ``{"do": "mark", "phase": ...}``: sample everything now; answered when it is on disk;
- ``{"do": "stop"}``: end the watch;
- ``{"do": "look", "device": ...}``: return the state of the GPU now.

Memory is read every 10 ms, processes whenever it has changed, the energy counter every 20 ms, and everything every
100 ms and at every phase. While steps are timed, everything is read every 500 ms and nothing in between: each
look wakes up a processor that the training may need, and the same steps have been watched closely before.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from mpscale.core.device import Device
from mpscale.core.processes.process import die_with_parent
from mpscale.core.processes.wire import Wire
from mpscale.core.reason import Reason
from mpscale.telemetry.backend import RANGES, Gpu, Memory, Processes, open_backend
from mpscale.telemetry.samples import CALM_FROM, CALM_S, CALM_UNTIL, Reading, Sample, SampleFile

_FAST_S = 0.01
_ENERGY_S = 0.019
_SLOW_S = 0.1

_STATE = (
    Reading.POWER,
    Reading.SM_CLOCK,
    Reading.MEMORY_CLOCK,
    Reading.TEMPERATURE,
    Reading.UTILIZATION,
    Reading.CLOCK_EVENTS,
)


class Family:
    """The worker and the processes that it has started.

    Args:
        pid: the worker.
        keeper: its parent, if that has no other children than the worker and what it leaves behind; else None.
    """

    def __init__(self, pid: int, keeper: int | None = None) -> None:
        self._known = {pid: True}
        self._pid, self._above = pid, {pid, keeper}

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
            if int(session) == self._pid or int(parent) in self._above:
                return True
            pid = int(parent)
        return False


class SamplingLoop:
    """Takes the samples of one case.

    Args:
        gpu: the GPU to read.
        family: the worker and its processes.
        file: takes the samples.
        epoch: the time that samples count from, on the monotonic clock.
    """

    def __init__(self, gpu: Gpu, family: Family, file: SampleFile, epoch: float) -> None:
        self.gpu, self._family, self.file, self._epoch = gpu, family, file, epoch
        self._lists = [Reading.PROCESSES]
        self._last: Sample | None = None
        self._energy_j: float | None = None
        self._looks, self._gap, self._looked = 0, 0.0, time.monotonic()
        self._slow_due = self._energy_due = 0.0
        self._failed: list[str] = []
        self._broken = False
        """Whether a reading that used to work has just failed."""
        self.calm = False

    @property
    def pause_s(self) -> float:
        """Time to the next look; while steps are timed, what has failed is retried soon."""
        if not self.calm:
            return _FAST_S
        return _SLOW_S if self._broken else CALM_S

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
            self._energy_due = now + _ENERGY_S
            sample.energy_j = self._read(Reading.ENERGY)
        if slow:
            self._slow_due = now + _SLOW_S
            for reading in _STATE:
                setattr(sample, reading, self._read(reading))
        sample.failed = tuple(self._failed)
        turned = self._failed != failed_before
        if slow or moved or turned or (energy_due and sample.energy_j != self._energy_j):
            self._energy_j = sample.energy_j if energy_due else self._energy_j
            self.file.write(sample)
            self._last = sample
            self._looks, self._gap = 0, 0.0
        if slow:
            self.file.explain(self.gpu.reasons)
            self.file.flush()

    def _read(self, reading: Reading) -> Any:
        """Return the value of a reading, numbers as float. If it has none, note that and return None."""
        value = self.gpu.read(reading)
        if isinstance(value, Reason):
            self._note(reading, reading, value)
            return None
        return float(value) if reading in RANGES else value

    def _note(self, reading: Reading, source: Reading, reason: Reason) -> None:
        """Note that a reading failed, unless it never worked. A lost GPU is no exception: its last peak is no peak."""
        if self.gpu.asks(source):
            self._failed.append(reading)
            self._broken = self._broken or source in self.gpu.ways
        self.file.explain({reading: reason})

    def _read_processes(self, sample: Sample) -> None:
        listed = self.gpu.processes(self._lists)
        if isinstance(listed, Reason):
            source = next((each for each in self._lists if each in self.gpu.reasons), Reading.PROCESSES)
            self._note(Reading.PROCESSES, source, listed)
            return
        sample.processes = listed.number
        if isinstance(listed.by_pid, Reason):
            self.file.explain({Reading.PROCESSES: listed.by_pid})
            return
        ours = [used for pid, used in listed.by_pid.items() if pid in self._family]
        sample.listed = bool(ours)
        sample.other_pids = tuple(pid for pid in listed.by_pid if pid not in self._family)
        known = [used for used in ours if used is not None]
        # The sum of only some would look like that of all.
        sample.process_memory_mib = sum(known) if known and len(known) == len(ours) else None

    def _read_other_lists(self, sample: Sample) -> None:
        """Find a worker that is in another list because it draws, or because it shares the GPU through a service."""
        for reading in (Reading.GRAPHICS_PROCESSES, Reading.SERVICE_PROCESSES):
            listed = self.gpu.processes([reading])
            if isinstance(listed, Reason):
                if reading is Reading.GRAPHICS_PROCESSES:
                    self._note(reading, reading, listed)
            elif not isinstance(listed.by_pid, Reason):
                others = tuple(pid for pid in listed.by_pid if pid not in self._family)
                if reading not in self._lists and len(others) < len(listed.by_pid):
                    self._lists.append(reading)
                if reading is Reading.GRAPHICS_PROCESSES:
                    sample.graphics_pids = others


class Sampler:
    """Carries out orders, and takes samples while a case is watched.

    Args:
        wire: brings orders and takes answers.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._backend = open_backend()
        self._gpus: dict[str, Gpu] = {}
        self._watch: SamplingLoop | None = None
        self._due = time.monotonic()

    def serve(self) -> None:
        """Answer orders until the wire is closed."""
        with contextlib.suppress(EOFError):
            while True:
                left_s = None if self._watch is None else max(self._due - time.monotonic(), 0.0)
                with contextlib.suppress(TimeoutError):
                    order = self._wire.receive(left_s)
                    self._wire.send({"id": order["id"], **getattr(self, f"_{order['do']}")(order)})
                if self._watch is not None and time.monotonic() >= self._due:
                    self._watch.sample()
                    # From now, not from when it was due, so that missed looks are not made up for in a burst.
                    pause_s = self._watch.pause_s
                    self._due = max(self._due + pause_s, time.monotonic() + pause_s / 2)

    def _describe(self, order: dict[str, Any]) -> dict[str, Any]:
        backend = self._backend
        if isinstance(backend, Reason):
            return {"reason": backend.to_json()}
        return {
            "reason": None,
            "driver": backend.driver_version(),
            "cuda_driver": backend.runtime_version(),
            "devices": [device.to_json() for device in backend.devices()],
        }

    def _facts(self, order: dict[str, Any]) -> dict[str, Any]:
        gpu = self._opened(order)
        facts, (ways, reasons) = gpu.facts(), gpu.how()
        return {"facts": facts, "ways": ways, "reasons": {name: why.to_json() for name, why in reasons.items()}}

    def _start(self, order: dict[str, Any]) -> dict[str, Any]:
        self._stop(order)
        gpu = self._opened(order)
        family = Family(order["pid"], order["keeper"])
        self._watch = SamplingLoop(gpu, family, SampleFile(Path(order["file"])), order["epoch"])
        self._watch.sample()
        return self._state(gpu)

    def _mark(self, order: dict[str, Any]) -> dict[str, Any]:
        if self._watch is not None:
            self._watch.sample(order["phase"])
            self._due = time.monotonic() + self._watch.pause_s
        return {}

    def _stop(self, order: dict[str, Any]) -> dict[str, Any]:
        if self._watch is None:
            return {}
        watch, self._watch = self._watch, None
        watch.sample("end")
        watch.file.close()
        return self._state(watch.gpu)

    def _state(self, gpu: Gpu) -> dict[str, Any]:
        return {"settings": gpu.settings(), "ways": gpu.ways, "lost": gpu.lost}

    def _look(self, order: dict[str, Any]) -> dict[str, Any]:
        gpu = self._opened(order)
        processes = gpu.processes([Reading.PROCESSES, Reading.SERVICE_PROCESSES])
        graphics = gpu.processes([Reading.GRAPHICS_PROCESSES])
        memory, temperature, events = map(gpu.read, (Reading.MEMORY, Reading.TEMPERATURE, Reading.CLOCK_EVENTS))
        clocks = {name.value: gpu.read(name) for name in (Reading.SM_CLOCK, Reading.MEMORY_CLOCK)}
        by_pid = processes.by_pid if isinstance(processes, Processes) else {}
        return {
            "temperature_c": None if isinstance(temperature, Reason) else temperature,
            "clock_events": [] if isinstance(events, Reason) else events,
            "processes": processes.number if isinstance(processes, Processes) else None,
            "graphics_processes": graphics.number if isinstance(graphics, Processes) else None,
            "pids": [] if isinstance(by_pid, Reason) else sorted(by_pid),
            "used_mib": memory.used_mib if isinstance(memory, Memory) else None,
            **{name: None if isinstance(clock, Reason) else clock for name, clock in clocks.items()},
            "lost": gpu.lost,
        }

    def _opened(self, order: dict[str, Any]) -> Gpu:
        assert not isinstance(self._backend, Reason)  # the session only asks for GPUs that were described
        device = Device.from_json(order["device"])
        if str(device.uuid) not in self._gpus:
            self._gpus[str(device.uuid)] = self._backend.gpu(device)
        return self._gpus[str(device.uuid)]


if __name__ == "__main__":
    die_with_parent()
    Sampler(Wire.inherited(int(sys.argv[1]))).serve()
