"""The GPU monitor, ``python -m mpscale.telemetry.__main__ DESCRIPTOR``: the only process that talks to the driver.

It is apart from the training, which it must not slow down, and from pytest, which must survive a driver that hangs or
dies. The descriptor is its end of a wire, on which it answers orders; each answer has the ``id`` of its order.

- ``{"do": "describe"}``: the driver and its GPUs, or the reason why there are none;
- ``{"do": "facts", "device": ...}``: what is known of a GPU and how each reading is taken, or why it is not;
- ``{"do": "start", "device": ..., "pid": ..., "file": ..., "epoch": ...}``: begins to watch a process, into a file of
  samples with times from ``epoch`` on (of the monotonic clock);
- ``{"do": "mark", "phase": ...}``: a sample of everything, now; answered when it is on disk;
- ``{"do": "stop"}``: ends the watch;
- ``{"do": "look", "device": ...}``: what the GPU is like at this moment.

Memory is looked at every 10 ms, processes whenever it has changed, the energy counter every 20 ms, and everything every
100 ms and at every phase. While steps are timed, everything every 500 ms and nothing in between: waking up costs a
processor that the training may need, and the same steps have been watched closely before.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from mpscale.core.device import Device
from mpscale.core.process import die_with_parent
from mpscale.core.wire import Wire
from mpscale.telemetry.nvidia import GARBLED, PROCESS_KINDS, Gpu, NoNvml, Nvml, open_nvml
from mpscale.telemetry.samples import CALM_FROM, CALM_S, CALM_UNTIL, Sample, SampleFile

FAST_S = 0.01
ENERGY_S = 0.019
SLOW_S = 0.1


class Family:
    """Tells whether a process is the worker or was started by it.

    Args:
        pid: the worker.
    """

    def __init__(self, pid: int) -> None:
        self._known = {pid: True}
        self._pid = pid

    def __contains__(self, pid: int) -> bool:
        # Asked once a process: walking /proc a hundred times a second would cost more than NVML.
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


class Watch:
    """Takes the samples of one case.

    Args:
        gpu: asked for readings.
        pid: the worker.
        file: takes the samples.
        epoch: the time from which samples count, of the monotonic clock.
    """

    def __init__(self, gpu: Gpu, pid: int, file: SampleFile, epoch: float) -> None:
        self._gpu, self._family, self._file, self._epoch = gpu, Family(pid), file, epoch
        self._kinds = ["Compute"]
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
        """From one look to the next; what fails while steps are timed is asked for again soon."""
        if not self.calm:
            return FAST_S
        return SLOW_S if self._broken else CALM_S

    def sample(self, phase: str = "") -> None:
        """Takes a sample: of memory and energy, and of all else where that is due or a phase was reached.

        Args:
            phase: what the worker has just reached.
        """
        gpu, now = self._gpu, time.monotonic()
        self.calm = phase == CALM_FROM or (self.calm and phase != CALM_UNTIL)
        slow = bool(phase) or self.calm or now >= self._slow_due
        self._looks += 1
        self._gap = max(self._gap, now - self._looked)
        self._looked = now
        sample = Sample(round(now - self._epoch, 4), phase, self._looks, self._gap)
        failed_before, self._failed = self._failed, []
        broken_before, self._broken = self._broken, False
        memory, last = self._read("memory"), self._last
        if memory is not None:
            sample.device_memory_mib, sample.reserved_memory_mib = memory
        if slow:
            self._find_other_kinds(sample)
        # The driver makes its list of processes anew each time, which costs; while memory stands still so does that.
        moved = last is None or memory is None or sample.device_memory_mib != last.device_memory_mib
        if slow or moved or broken_before:
            self._read_processes(sample)
        energy_due = slow or now >= self._energy_due
        if energy_due:
            self._energy_due = now + ENERGY_S
            energy = self._read("energy_mj")
            sample.energy_j = None if energy is None else energy / 1e3
        if slow:
            self._slow_due = now + SLOW_S
            self._read_state(sample)
        sample.failed = tuple(self._failed)
        turned = self._failed != failed_before
        if slow or moved or turned or (energy_due and sample.energy_j != self._energy_j):
            self._energy_j = sample.energy_j if energy_due else self._energy_j
            self._file.write(sample)
            self._last = sample
            self._looks, self._gap = 0, 0.0
        if slow:
            self._file.tell(gpu.reasons)
            self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _read(self, name: str) -> Any:
        """One reading; one that fails is noted, unless the GPU is gone, and the case with it."""
        value = self._gpu.read(name)
        if value is None:
            self._note(name, name)
        return value

    def _note(self, reading: str, asked: str) -> None:
        if self._gpu.asks(asked) and not self._gpu.lost:
            self._failed.append(reading)
            self._broken = self._broken or asked in self._gpu.ways
            self._file.tell({reading: self._gpu.reasons.get(asked, "NVML gave no value")})

    def _read_processes(self, sample: Sample) -> None:
        listed = self._gpu.processes(self._kinds)
        if listed is None:
            kind = next((kind for kind in self._kinds if kind in self._gpu.reasons), "Compute")
            self._note("processes", kind)
            self._file.tell({"processes": f"NVML gives no list of processes: {self._gpu.reasons.get(kind)}"})
            return
        sample.processes = listed.number
        if listed.by_pid is None:
            self._file.tell({"processes": GARBLED})
            return
        ours = [used for pid, used in listed.by_pid.items() if pid in self._family]
        sample.listed = bool(ours)
        sample.other_pids = tuple(pid for pid in listed.by_pid if pid not in self._family)
        told = [used for used in ours if used is not None]
        # A part of them would pass for all.
        sample.process_memory_mib = sum(told) if told and len(told) == len(ours) else None

    def _find_other_kinds(self, sample: Sample) -> None:
        """A worker under CUDA's multi-process service is in a list of its own, and one that draws in another."""
        for kind in PROCESS_KINDS[1:]:
            listed = self._gpu.processes([kind])
            if listed is None and kind == "Graphics":
                self._note(kind, kind)
            if listed is None or listed.by_pid is None:
                continue
            if kind not in self._kinds and any(pid in self._family for pid in listed.by_pid):
                self._kinds.append(kind)
            if kind == "Graphics":
                sample.graphics_pids = tuple(pid for pid in listed.by_pid if pid not in self._family)

    def _read_state(self, sample: Sample) -> None:
        power = self._read("power_mw")
        sample.power_w = None if power is None else power / 1e3
        for name in ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "utilization", "event_reasons"):
            setattr(sample, name, self._read(name))


class Sampler:
    """Carries out orders, and takes samples while a case is watched.

    Args:
        wire: brings orders and takes answers.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._nvml: Nvml | NoNvml = open_nvml()
        self._gpus: dict[str, Gpu] = {}
        self._watch: Watch | None = None
        self._gpu: Gpu | None = None
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
                    # From now on, not from when it was due: what was missed is not made up for in a burst.
                    pause_s = self._watch.pause_s
                    self._due = max(self._due + pause_s, time.monotonic() + pause_s / 2)

    def _describe(self, order: dict[str, Any]) -> dict[str, Any]:
        nvml = self._nvml
        if isinstance(nvml, NoNvml):
            return {"reason": nvml.reason}
        return {
            "reason": None,
            "driver": nvml.driver_version(),
            "cuda_driver": nvml.cuda_driver_version(),
            "devices": [device.to_json() for device in nvml.devices()],
        }

    def _facts(self, order: dict[str, Any]) -> dict[str, Any]:
        gpu = self._opened(order)
        return {"facts": gpu.facts(), "ways": gpu.ways, "reasons": self._reasons(gpu)}

    def _start(self, order: dict[str, Any]) -> dict[str, Any]:
        self._stop(order)
        self._gpu = gpu = self._opened(order)
        self._watch = Watch(gpu, order["pid"], SampleFile(Path(order["file"])), order["epoch"])
        self._watch.sample()
        return {"settings": gpu.settings(), "ways": gpu.ways, "lost": gpu.lost}

    def _mark(self, order: dict[str, Any]) -> dict[str, Any]:
        if self._watch is not None:
            self._watch.sample(order["phase"])
            self._due = time.monotonic() + self._watch.pause_s
        return {}

    def _stop(self, order: dict[str, Any]) -> dict[str, Any]:
        if self._watch is None or self._gpu is None:
            return {}
        self._watch.sample("end")
        self._watch.close()
        self._watch = None
        gpu = self._gpu
        return {"settings": gpu.settings(), "ways": gpu.ways, "lost": gpu.lost}

    def _look(self, order: dict[str, Any]) -> dict[str, Any]:
        gpu = self._opened(order)
        processes = gpu.processes(["Compute", "MPSCompute"])
        graphics = gpu.processes(["Graphics"])
        memory = gpu.read("memory")
        return {
            "temperature_c": gpu.read("temperature_c"),
            "event_reasons": gpu.read("event_reasons"),
            "processes": None if processes is None else processes.number,
            "graphics_processes": None if graphics is None else graphics.number,
            "used_mib": None if memory is None else memory.used_mib,
            "lost": gpu.lost,
        }

    def _opened(self, order: dict[str, Any]) -> Gpu:
        assert isinstance(self._nvml, Nvml)  # nobody asks for a GPU where none was described
        device = Device.from_json(order["device"])
        if str(device.uuid) not in self._gpus:
            self._gpus[str(device.uuid)] = Gpu(self._nvml, device)
        return self._gpus[str(device.uuid)]

    def _reasons(self, gpu: Gpu) -> dict[str, str]:
        garbled = {} if gpu.entries_fit else dict.fromkeys(PROCESS_KINDS, GARBLED)
        return {**gpu.reasons, **garbled}


if __name__ == "__main__":
    die_with_parent()
    Sampler(Wire.inherited(int(sys.argv[1]))).serve()
