"""The GPU monitor, ``python -m mpscale.telemetry.__main__ DESCRIPTOR``: the only process that talks to the driver.

It is apart from the training, which it must not slow down, and from pytest, which must survive a driver that hangs or
dies. The descriptor is its end of a wire, on which it answers orders; each answer has the ``id`` of its order.

- ``{"do": "describe"}``: the driver and its GPUs, or the reason why there are none;
- ``{"do": "facts", "device": ...}``: properties of a GPU and how each reading is taken, or why it is not;
- ``{"do": "start", "device": ..., "pid": ..., "file": ..., "epoch": ...}``: begin to watch a process, into a file of
  samples with times from ``epoch`` on (of the monotonic clock);
- ``{"do": "mark", "phase": ...}``: sample everything now; answered when it is on disk;
- ``{"do": "stop"}``: end the watch;
- ``{"do": "look", "device": ...}``: the state of the GPU now.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from mpscale.core.device import Device
from mpscale.core.process import die_with_parent
from mpscale.core.reason import Reason
from mpscale.core.wire import Wire
from mpscale.telemetry.backend import Gpu, open_backend
from mpscale.telemetry.readings import Memory, Processes, Reading
from mpscale.telemetry.samples import SampleFile
from mpscale.telemetry.sampling import SamplingLoop


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
        facts = gpu.facts()
        ways, reasons = gpu.how()
        return {"facts": facts, "ways": ways, "reasons": {name: why.to_json() for name, why in reasons.items()}}

    def _start(self, order: dict[str, Any]) -> dict[str, Any]:
        self._stop(order)
        self._gpu = gpu = self._opened(order)
        self._watch = SamplingLoop(gpu, order["pid"], SampleFile(Path(order["file"])), order["epoch"])
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
        processes = gpu.processes([Reading.PROCESSES, Reading.SERVICE_PROCESSES])
        graphics = gpu.processes([Reading.GRAPHICS_PROCESSES])
        memory, temperature, events = map(gpu.read, (Reading.MEMORY, Reading.TEMPERATURE, Reading.CLOCK_EVENTS))
        return {
            "temperature_c": None if isinstance(temperature, Reason) else temperature,
            "clock_events": [] if isinstance(events, Reason) else events,
            "processes": processes.number if isinstance(processes, Processes) else None,
            "graphics_processes": graphics.number if isinstance(graphics, Processes) else None,
            "used_mib": memory.used_mib if isinstance(memory, Memory) else None,
            "lost": gpu.lost,
        }

    def _opened(self, order: dict[str, Any]) -> Gpu:
        assert not isinstance(self._backend, Reason)  # nobody asks for a GPU if none was described
        device = Device.from_json(order["device"])
        if str(device.uuid) not in self._gpus:
            self._gpus[str(device.uuid)] = self._backend.gpu(device)
        return self._gpus[str(device.uuid)]


if __name__ == "__main__":
    die_with_parent()
    Sampler(Wire.inherited(int(sys.argv[1]))).serve()
