"""One case under the stand-in driver: a child in place of the worker, and a script for what the GPU does."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from support.nvml_stand_in import Script

from mpscale.core.device import Device, find_device, find_replicas
from mpscale.core.processes.events import Phase
from mpscale.core.reason import Code, Reason
from mpscale.telemetry import host
from mpscale.telemetry.client import Driver, open_driver
from mpscale.telemetry.replicas import ReplicaWatch
from mpscale.telemetry.samples import Samples, read_samples
from mpscale.telemetry.watch import CaseWatch, WatchResult, WorkerFacts

TRAINING = (
    Phase.COMPILED,
    Phase.STEPS_SYNCHRONISED,
    Phase.STEPS_QUEUED,
    Phase.METRIC_TRIED,
    Phase.TRAINED,
    Phase.EVALUATED,
)
ENERGY_OFF = Reason(Code.NOT_ASKED_FOR, "energy was off")
SLEEPER = "import sys; print(flush=True); sys.stdin.read()"


class GpuCase:
    """Watches one process of its own through a case.

    Args:
        script: what the GPU does.
        library: the folder of the stand-in.
        visible: CUDA_VISIBLE_DEVICES, None for none.
        several: whether to watch all GPUs.
    """

    def __init__(self, script: Script, library: Path, visible: str | None = None, several: bool = False) -> None:
        self.script = script
        self.child = subprocess.Popen(
            [sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.child.stdout is not None
        self.child.stdout.readline()
        self.pid = self.child.pid
        self.driver: Driver = open_driver({**os.environ, **script.environ(library)})
        environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        self.device: Device = find_device(self.driver.devices, environ, host.cpu())
        if several:
            self.device, _ = find_replicas(self.driver.devices, environ, host.cpu(), None)
        self.watch = (ReplicaWatch if several else CaseWatch)(self.driver, self.device)

    def run(
        self,
        context: Callable[[], object] = lambda: None,
        timed: Callable[[], object] = lambda: None,
        *,
        train: Callable[[], object] = lambda: None,
        steps: Mapping[Phase, Callable[[], object]] = MappingProxyType({}),
        added: Callable[[], object] | None = None,
        worker: WorkerFacts | None = None,
        keep: Path | None = None,
    ) -> WatchResult:
        """Run one case from its first phase to its last.

        Args:
            context: called between ``idle`` and ``context-ready``.
            timed: called between ``timing-start`` and ``timing-end``.
            train: called between ``context-ready`` and ``compiled``.
            steps: what to call before a phase from ``compiled`` to ``evaluated``.
            added: called between ``timing-end`` and ``energy-end``; None leaves that phase out.
            worker: what the worker contributes to the columns.
            keep: where to store the samples.
        """
        self.watch.start(self.pid, time.monotonic())
        self.watch.mark("idle")
        context()
        self.watch.mark("context-ready")
        train()
        for phase in TRAINING:
            steps.get(phase, lambda: None)()
            self.watch.mark(phase)
        self.watch.mark("timing-start")
        timed()
        self.watch.mark("timing-end")
        if added is not None:
            added()
            self.watch.mark("energy-end")
        self.watch.mark("done")
        return self.watch.stop(worker or WorkerFacts(energy_off=ENERGY_OFF), keep)

    def uses(self, memory_mib: object, kind: str = "compute") -> None:
        """Have the driver list the process with this much memory from now on."""
        self.script.process(kind, self.pid, memory_mib)

    def close(self) -> None:
        """End the child and the monitor."""
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                stream.close()
        self.watch.close()
        self.driver.close()


def kept_samples(path: Path) -> Samples:
    """Read the gzipped samples of a case."""
    return read_samples(gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True))
