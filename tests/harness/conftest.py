"""A run whose workers do without TensorFlow: each does what the name of its workload says, in Python."""

from __future__ import annotations

import json
import sys
import tempfile

import pytest

from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.harness import conversation, launch
from mpscale.harness.run import BenchmarkRun
from mpscale.harness.supervisor import Options
from mpscale.telemetry.client import NoDriver

CPU, NO_DRIVER = Device("cpu", "CPU"), NoDriver(Reason(Code.NO_GPU, "no driver"))
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from mpscale.core.processes.events import Channel, Failed, Finished, NotKept
from mpscale.core.processes.wire import Wire
from mpscale.worker.errors import cause

wire = Wire.inherited(int(sys.argv[2]))
channel, request = Channel(wire), wire.receive()

# Of several workers, which one this is.
alone = '{"cluster": {"worker": ["here:1"]}, "task": {"index": 0}}'
task = json.loads(os.environ.get("TF_CONFIG", alone))
place, addresses = task["task"]["index"], task["cluster"]["worker"]

def meet():
    # As in a step that all take together.
    folder = Path(sys.argv[0]).with_name(f"met-{addresses[0]}-{request['case']['seed']}")
    folder.mkdir(exist_ok=True)
    (folder / str(place)).touch()
    while len(list(folder.iterdir())) < len(addresses):
        time.sleep(0.01)

PHASES = ("idle", "context-ready", "compiled", "steps-synchronised", "steps-queued", "trained", "timing-start")
PHASES += ("timing-end", "done")

def junk(data):
    wire._socket.sendall(data)

def began():
    channel.values({"parameters": 10, "has_metric": False})
    channel.phase("idle")

def on_gpu():
    # The phases of a training, with time for samples after the first three.
    peak = 200.0 + place
    channel.values({"has_metric": False, "gpu_memory_allocator_peak_mib": peak, "gpu_allocator": "cuda_malloc_async"})
    for phase in PHASES:
        channel.phase(phase)
        time.sleep({"idle": 0.05, "context-ready": 0.05, "compiled": 0.25}.get(phase, 0.0))
    finish()

def finish(status="ok", reason=None):
    channel.send(Finished(status, reason, {}))

try:
    exec(request["case"]["workload"])
except Exception as error:
    channel.send(cause(error))
    sys.exit(1)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a case whose workload's name is what the worker does; return its attempts, and the run."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(launch, "_WORKER", (sys.executable, "-P", str(tmp_path / "worker.py")))
    monkeypatch.setattr(conversation, "GRACE_S", 0.3)
    runs = []

    def start(*acts, results=tmp_path / "results", device=CPU, driver=NO_DRIVER, method="fresh", workers=0, **options):
        strategy = "multiworker" if workers else "none"
        options = {"timeout_s": 20.0, "retries": 0, "strategy": strategy, **options}
        settings = Settings(energy_s=0.0, strategy=strategy, replicas=workers or 1)
        cases = [Case(act, "fp32", seed, 0, 0, settings) for seed, act in enumerate(acts)]
        heard = []
        options = Options(results, tmp_path, method, asked={}, **options)
        made = BenchmarkRun(cases, device, driver, options, lambda _, event: heard.append(event))
        runs.append(made)
        return made, cases, heard

    yield start
    for made in runs:
        if made._supervisor is not None:
            made.finish(1)


@pytest.fixture
def attempts():
    """The records of all attempts in the journal of a run."""

    def read(made):
        lines = (made.path / "journal.jsonl").read_text().splitlines()
        return [event["record"] for event in map(json.loads, lines) if event["event"] == "case_finished"]

    return read
