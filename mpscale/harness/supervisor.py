"""Starts the process of a case, listens to it, times it out, and makes a record of whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpscale.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.harness.case import Case, StartMethod
from mpscale.harness.launch import ForkLauncher, FreshLauncher, Launcher, LaunchError, Process
from mpscale.modes import MODES
from mpscale.records import Record
from mpscale.telemetry.device import Device
from mpscale.telemetry.sampler import MemorySampler

Listener = Callable[[Case, str, Mapping[str, Any]], None]
"""Called with a case, an event (``phase`` or ``progress``) and the event's fields."""

_TAIL_BYTES = 4000
_GRACE_S = 15.0


@dataclass
class Outcome:
    """What became of a case.

    Args:
        record: its row.
        step_s: step time of each timed block, in seconds.
        phases: when each phase was reached, in seconds from the start of the process.
        runtime: what the worker knows about TensorFlow and its device.
    """

    record: Record
    step_s: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)


class Supervisor:
    """Runs cases one at a time.

    Args:
        device: where they run.
        sampler: looks at the worker's memory from outside.
        start_method: ``fork`` or ``fresh``; see launch.py.
        timeout_s: seconds that a case may take.
        environ: the environment to start workers in; what mpscale has to set is added.
        sys_path: where workloads named by ``module:attribute`` are looked for.
        listener: told of phases and progress.
    """

    def __init__(
        self,
        device: Device,
        sampler: MemorySampler,
        start_method: StartMethod,
        timeout_s: float,
        environ: Mapping[str, str],
        sys_path: Sequence[str],
        listener: Listener,
    ) -> None:
        self._device, self._sampler, self._start_method = device, sampler, start_method
        self._timeout_s, self._sys_path, self._listener = timeout_s, list(sys_path), listener
        self._logs = tempfile.TemporaryDirectory(prefix="mpscale-")
        environment = worker_environment(environ, device)
        self._launcher: Launcher = (
            ForkLauncher(environment, Path(self._logs.name) / "parent.log")
            if start_method == "fork"
            else FreshLauncher(environment)
        )

    def run(self, case: Case, steps_path: Path | None, outcome: Outcome, attempt: int = 1) -> None:
        """Runs a case to its end, whatever that is.

        Args:
            case: what to run.
            steps_path: where its log of steps goes, None for a case that does not train.
            outcome: is filled in as the case goes on, so that it holds what was known if this ends in an exception,
                which only the user's interrupt and the like do.
            attempt: how often it has been started, this time included.
        """
        mode = MODES[case.mode]
        outcome.record.update(
            {
                "attempts": attempt,
                "schema_version": SCHEMA_VERSION,
                "method_version": METHOD_VERSION,
                "device": self._device.kind,
                "device_name": self._device.name,
                "jit": case.settings.jit,
                "policy": mode.policy,
            }
        )
        unsupported = mode.unsupported_reason(self._device, case.settings.jit)
        if unsupported:
            outcome.record.update({"status": "unsupported", "status_reason": unsupported})
        else:
            self._run_process(case, steps_path, outcome)

    def close(self) -> None:
        """Ends what outlives a case."""
        self._launcher.close()
        self._logs.cleanup()

    def _run_process(self, case: Case, steps_path: Path | None, outcome: Outcome) -> None:
        record = outcome.record
        log = Path(self._logs.name) / "case.log"
        try:
            self._launcher.prepare()
            start = time.monotonic()
            process = self._launcher.start(log)
        except (LaunchError, OSError) as error:
            record.update({"status": "error", "status_reason": str(error), "start_method": self._start_method})
            return
        self._sampler.start(process.pid)
        record.update({"status": "interrupted", "start_method": self._start_method})
        try:
            status, reason = self._converse(process, case, steps_path, outcome, start)
            record.update({"status": status, "status_reason": reason})
        finally:
            # Also on the user's interrupt: neither the worker nor a process that it left behind outlives its case.
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            if record["status"] not in ("timeout", "interrupted"):
                process.wait(_GRACE_S)
            process.kill()
            process.wait(_GRACE_S)
            memory = self._sampler.stop()
            record.update({"case_wall_time_s": time.monotonic() - start, **memory["values"]})
            for column, why in memory["unavailable"].items():
                record.miss(column, why)
        if status not in ("ok", "diverged", "stalled"):
            record.update({"output_tail": _tail(log) or None})

    def _converse(
        self, process: Process, case: Case, steps_path: Path | None, outcome: Outcome, start: float
    ) -> tuple[str, str | None]:
        """Talks to a worker until it ends; its status and why."""
        deadline = start + self._timeout_s
        request = {
            "case": case.to_json(),
            "device": self._device.to_json(),
            "steps_path": None if steps_path is None else str(steps_path),
            "sys_path": self._sys_path,
        }
        last: dict[str, Any] = {}
        phase = "start"
        try:
            _answer(process, json.dumps(request))
            for event in _events(process, deadline):
                name = event["event"]
                if name == "values":
                    outcome.record.update(event["values"])
                elif name == "miss":
                    outcome.record.miss(event["columns"], event["reason"])
                elif name == "blocks":
                    outcome.step_s = event["step_s"]
                elif name in ("done", "error"):
                    last = event
                    outcome.runtime = event.get("runtime", {})
                elif name == "phase":
                    phase = event["phase"]
                    outcome.phases[phase] = round(time.monotonic() - start, 4)
                    self._sampler.mark(phase)
                    _answer(process, "")
                    self._listener(case, name, event)
                elif name == "progress":
                    self._listener(case, name, event)
        except TimeoutError:
            if last.get("event") != "done":
                return (
                    "timeout",
                    f"not finished after {self._timeout_s:g} s, killed in or after phase {phase!r}",
                )
        if last.get("event") == "done":
            # What was measured stands, even if the process then stumbles on its way out.
            return last["status"], last["reason"]
        if last.get("event") == "error":
            return ("oom" if last["oom"] else "error"), _one_line(f"{last['type']}: {last['message']}")
        code = process.wait(max(min(_GRACE_S, deadline - time.monotonic()), 0.1))
        return _ended_silently(code, phase)


def worker_environment(environ: Mapping[str, str], device: Device) -> dict[str, str]:
    """``environ`` with what a worker needs: one visible device, and an allocator whose peak means something."""
    environment = {**environ, "KERAS_BACKEND": "tensorflow", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if device.uuid is None:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = device.uuid
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        # TensorFlow's default pool doubles when it grows, so that its peak says little about the model.
        environment.setdefault("TF_GPU_ALLOCATOR", "cuda_malloc_async")
    return environment


def _ended_silently(code: int | None, phase: str) -> tuple[str, str]:
    """Status of a worker that neither finished nor reported an exception."""
    where = f"in or after phase {phase!r}"
    if code is None:
        return "crashed", f"closed its output {where} and did not end"
    if code < 0:
        hint = ", which the kernel sends when memory runs out" if -code == signal.SIGKILL else ""
        names = {number.value: number.name for number in signal.Signals}
        return "crashed", f"killed by {names.get(-code, f'signal {-code}')} {where}{hint}"
    return "error", f"ended with exit code {code} {where} and without a result"


def _events(process: Process, deadline: float) -> Iterator[dict[str, Any]]:
    """The worker's events until it has ended or closed its output.

    The end of the output alone would not do: a process that the worker left behind holds it open.

    Raises:
        TimeoutError: the deadline passed.
    """
    buffer = b""
    output = process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        selector.register(process.ended, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            ready = {key.fd for key, _ in selector.select(left)} if left > 0 else set()
            if not ready:
                raise TimeoutError
            if output not in ready:
                return
            chunk = os.read(output, 65536)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                yield event
                if event["event"] in ("done", "error"):
                    return


def _answer(process: Process, line: str) -> None:
    """Sends a line; a worker that is gone is noticed when its output ends."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace").strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
