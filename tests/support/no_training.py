"""Runs whose cases train nothing: their figures depend on the case alone, as those of a deterministic training."""

from __future__ import annotations

from pathlib import Path

from mpscale.core.case import Case, Settings
from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.harness import resume as harness_resume
from mpscale.harness import run as harness_run
from mpscale.telemetry.client import NoDriver

CPU = Device("cpu", "Test CPU", None, None, None)
DRIVER = NoDriver(Reason(Code.NO_LIBRARY, "none here"))
CASES = [
    Case("toy", mode, seed, 0, 2 * seed + place, Settings(timing_s=0.05))
    for seed in range(3)
    for place, mode in enumerate(("mixed-dynamic", "fp32"))
]
ENVIRONMENT = {
    "packages": {"mpscale": "0.2.0", "tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6"},
    "cpu": {"model": "Test CPU", "logical_cores": 2},
    "device": CPU.to_json(),
    "git": {"commit": "a" * 40, "dirty": False},
    "variables": {},
}


def figures(case):
    """What the training of a case gives."""
    return {
        "status": "ok",
        "step_time_ms_median": 2.0 + case.seed,
        "metric_value": 0.9 + case.seed / 100,
        "metric_name": "accuracy",
        "initial_weights_digest": f"sha256:weights{case.seed}",
        "data_order_digest": f"sha256:order{case.seed}",
        "workload_digest": "sha256:workload",
        "series_key": f"{case.workload}/sha256:workload/{case.mode}/batch=20,steps=30/method={METHOD_VERSION}",
        "optimizer_config": '{"learning_rate": 0.1}',
    }


def replace_trainings(monkeypatch, happen=lambda case: {}, environment=None):
    """Make each case end at once, with its figures and what ``happen`` returns for it, or as that raises."""

    class Supervisor:
        why_not_forked = allocator = None

        def __init__(self, device, driver, options, listener):
            self.device, self.options = device, options

        def describe(self, case, record, attempt):
            record.update({"attempts": attempt, "device": "cpu", "device_name": self.device.name})
            record.update({"jit": case.settings.jit, "policy": MODES[case.mode].policy})
            record.update({"schema_version": SCHEMA_VERSION, "method_version": METHOD_VERSION})

        def run(self, case, steps_path, gpu_path, outcome, attempt=1):
            self.describe(case, outcome.record, attempt)
            outcome.record.update({**figures(case), **(happen(case) or {})})
            outcome.step_s = [0.002 + case.seed / 1000, 0.003]

        def close(self):
            pass

    monkeypatch.setattr(harness_run, "Supervisor", Supervisor)
    if environment is not None:
        for module in (harness_run, harness_resume):
            monkeypatch.setattr(module, "environment", lambda *_: environment)


def options(results: Path, jit_fallback=False, **asked):
    """Options of a run, which could be gone on with."""
    invocation = {"program": "pytest", "arguments": ["bench"], "folder": str(results.parent), "options": {}}
    asked = {"workloads": ["toy"], "jit": True, **asked}
    more = {"invocation": invocation, "retries": 0, "jit_fallback": jit_fallback}
    return harness_run.Options(results.resolve(), Path.cwd(), "fork", 10.0, asked, **more)


def new_run(results: Path, cases=CASES):
    """Make a run of the cases; return its folder."""
    run = harness_run.BenchmarkRun(cases, CPU, DRIVER, options(results), lambda *_: None)
    try:
        for case in cases:
            run.run(case)
    finally:
        run.finish(0)
    return run.path


def go_on(path: Path, cases=CASES, device=CPU, **asked):
    """Go on with a run; return the ids of the cases that ran."""
    how = options(path.parent.parent, **asked)
    resumed = harness_resume.resume(path, cases, device, DRIVER, how)
    run = harness_run.BenchmarkRun(cases, device, DRIVER, how, lambda *_: None, resumed)
    ran = []
    try:
        for case in cases:
            if run.measured(case) is None:
                ran.append(case.id)
                run.run(case)
    finally:
        run.finish(0)
    assert run.troubles == []
    return ran
