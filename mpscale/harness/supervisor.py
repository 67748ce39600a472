"""Starts the process of a case, listens to it, times it out, and makes a record of whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpscale.core.case import Case, StartMethod
from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.reason import Reason
from mpscale.core.record import Record
from mpscale.harness.launch import (
    Allocator,
    ForkLauncher,
    FreshLauncher,
    Launcher,
    LaunchError,
    Process,
    worker_environment,
)
from mpscale.telemetry.watch import CaseWatch, Seen, Told

Listener = Callable[[Case, str, Mapping[str, Any]], None]
"""Called with a case, an event (``phase``, ``progress`` or ``again``) and the event's fields."""

_OWN_SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
"""Signals by which a program fails; all others come from a person, the kernel's out-of-memory killer or a limit."""

_TAIL_BYTES = 4000
_REASON, _BEGINNING = 500, 120
"""Characters of a reason, and how many of them are its beginning."""
_GRACE_S = 15.0


@dataclass
class Outcome:
    """What became of a case.

    Args:
        record: its row.
        step_s: step time of each timed block, in seconds.
        phases: when each phase was reached, in seconds from the start of the process.
        runtime: what the worker knows about TensorFlow and its device.
        again: why another attempt may end better: on a GPU that has ``cooled``, with another ``allocator``, or for all
            one knows with the same, after a failure when the GPU was first ``touched``.
        gpu_lost: whether the GPU was lost in it.
        signal: what killed the worker, None where nothing did.
    """

    record: Record
    step_s: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    again: Literal["cooled", "allocator", "touched"] | None = None
    gpu_lost: bool = False
    signal: int | None = None


class Supervisor:
    """Runs cases one at a time.

    Args:
        device: where they run.
        watch: looks at the worker and its GPU from outside.
        start_method: ``fork`` or ``fresh``; see launch.py.
        timeout_s: seconds that a case may take.
        environ: the environment to start workers in; what mpscale has to set is added.
        sys_path: Python's path for workers: where workloads named by ``module:attribute`` are looked for.
        listener: told of phases and progress.
        allocators: of TensorFlow on a GPU, the best first; the next one is taken where one fails twice on touching the
            GPU, and never again once one has worked: figures of two allocators are not to stand in one run.
        keep_suspect: leaves a case its status where its figures are suspect.
    """

    def __init__(
        self,
        device: Device,
        watch: CaseWatch,
        start_method: StartMethod,
        timeout_s: float,
        environ: Mapping[str, str],
        sys_path: Sequence[str],
        listener: Listener,
        allocators: Sequence[Allocator | None] = (None,),
        keep_suspect: bool = False,
    ) -> None:
        self._device, self._watch, self._start_method = device, watch, start_method
        self._timeout_s, self._sys_path, self._listener = timeout_s, list(sys_path), listener
        self._logs = tempfile.TemporaryDirectory(prefix="mpscale-")
        self._scratch = Path(self._logs.name) / "scratch"
        self._environ, self._allocators, self._keep_suspect = dict(environ), list(allocators), keep_suspect
        self._left = list(allocators)
        self._allocator_works, self._failures = False, 0
        self._launcher = self._make_launcher()

    def run(
        self, case: Case, steps_path: Path | None, gpu_path: Path | None, outcome: Outcome, attempt: int = 1
    ) -> None:
        """Runs a case to its end, whatever that is.

        Args:
            case: what to run.
            steps_path: where its log of steps goes, None for a case that does not train.
            gpu_path: where the samples of the GPU go.
            outcome: is filled in as the case goes on, so that it holds what was known if this ends in an exception,
                which only the user's interrupt and the like do.
            attempt: how often it has been started, this time included.
        """
        mode = MODES[case.mode]
        self.describe(case, outcome.record, attempt)
        unsupported = mode.unsupported_reason(self._device, case.settings.jit)
        if unsupported:
            outcome.record.update({"status": "unsupported", "status_reason": unsupported})
        else:
            self._run_process(case, steps_path, gpu_path, outcome)
            self._judge_allocator(outcome)

    def describe(self, case: Case, record: Record, attempt: int) -> None:
        """Notes what is known of a case before it is started, and also if it never is."""
        record.update(
            {
                "attempts": attempt,
                "schema_version": SCHEMA_VERSION,
                "method_version": METHOD_VERSION,
                "device": self._device.kind,
                "device_name": self._device.name,
                "jit": case.settings.jit,
                "policy": MODES[case.mode].policy,
            }
        )

    def cool_down(self, seconds: float) -> None:
        """Waits until the GPU is fit to be measured on, for at most so long."""
        self._watch.cool_down(seconds)

    def close(self) -> None:
        """Ends what outlives a case."""
        self._launcher.close()
        self._watch.close()
        self._logs.cleanup()

    def _make_launcher(self) -> Launcher:
        environment = worker_environment(self._environ, self._device, self._left[0])
        if self._start_method == "fork":
            return ForkLauncher(environment, Path(self._logs.name) / "parent.log")
        return FreshLauncher(environment)

    @property
    def allocator(self) -> Allocator | None:
        """The one that workers are started with; None is the one that the environment names."""
        return self._left[0]

    def _judge_allocator(self, outcome: Outcome) -> None:
        """Has a case run again whose worker failed when it first touched the GPU: once as it was, then with the next
        allocator. Where that was the last one, the allocator was not to blame.
        """
        if "context-ready" in outcome.phases:
            self._allocator_works = True
        if self._allocator_works or len(self._allocators) == 1 or not self._may_be_the_allocator(outcome):
            return
        self._failures += 1
        if self._failures == 1 and len(self._left) > 1:
            outcome.again = "touched"
            return
        self._left, self._failures = self._left[1:], 0
        if self._left:
            outcome.again = "allocator"
        else:
            self._left = list(self._allocators)
        self._launcher.close()
        self._launcher = self._make_launcher()

    def _may_be_the_allocator(self, outcome: Outcome) -> bool:
        """Whether the worker failed on touching the GPU, and by itself: nobody killed it, and memory sufficed."""
        return (
            self._device.kind == "gpu"
            and "idle" in outcome.phases
            and outcome.record["status"] in ("crashed", "error")
            and (outcome.signal is None or outcome.signal in _OWN_SIGNALS)
            and not outcome.gpu_lost
        )

    def _run_process(self, case: Case, steps_path: Path | None, gpu_path: Path | None, outcome: Outcome) -> None:
        record = outcome.record
        log = Path(self._logs.name) / "case.log"
        self._scratch.mkdir(exist_ok=True)
        try:
            self._launcher.prepare()
            start = time.monotonic()
            process = self._launcher.start(log)
        except (LaunchError, OSError) as error:
            record.update({"status": "error", "status_reason": _one_line(str(error))})
            record.update({"start_method": self._start_method})
            return
        self._watch.start(process.pid, start)
        record.update({"status": "interrupted", "start_method": self._start_method})
        told = Told(energy_off=_energy_off(case))
        try:
            status, reason, told = self._converse(process, case, steps_path, outcome, start)
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
            record.update({"case_wall_time_s": time.monotonic() - start})
            shutil.rmtree(self._scratch, ignore_errors=True)
            seen = self._watch.stop(told, gpu_path)
            record.update(seen.findings.values)
            for column, why in seen.findings.unavailable.items():
                record.miss(column, why)
        self._judge(outcome, seen)
        if record["status"] not in ("ok", "diverged", "stalled"):
            record.update({"output_tail": _tail(log) or None})

    def _judge(self, outcome: Outcome, seen: Seen) -> None:
        """Takes what the GPU went through into account."""
        record = outcome.record
        if seen.lost:
            outcome.gpu_lost = True
            said = f" (the worker: {record['status_reason']})" if record["status_reason"] else ""
            reason = f"the GPU was lost during the case: it fell off the bus or was reset{said}"
            record.update({"status": "crashed", "status_reason": reason})
        elif seen.suspicions:
            reason = "; ".join(suspicion.reason for suspicion in seen.suspicions)
            record.update({"gpu_suspicion": reason})
            if record["status"] in ("ok", "diverged", "stalled") and not self._keep_suspect:
                record.update({"status": "invalid", "status_reason": reason})
                outcome.again = "cooled" if all(suspicion.passes for suspicion in seen.suspicions) else None

    def _converse(
        self, process: Process, case: Case, steps_path: Path | None, outcome: Outcome, start: float
    ) -> tuple[str, str | None, Told]:
        """Talks to a worker until it ends; its status, why, and what the columns on the GPU need of it."""
        deadline = start + self._timeout_s
        off = _energy_off(case)
        energy: dict[str, Any] = {}
        request = {
            "case": case.to_json(),
            "device": self._device.to_json(),
            "steps_path": None if steps_path is None else str(steps_path),
            "sys_path": self._sys_path,
            "scratch": str(self._scratch),
            "energy_s": case.settings.energy_s if off is None and self._watch.has_power() else 0.0,
        }

        def told() -> Told:
            steps, overflows = energy.get("steps"), energy.get("overflow_steps")
            applied = None if steps is None or overflows is None else steps - overflows
            return Told(outcome.record["gpu_memory_allocator_peak_mib"], steps, applied, off)

        last: dict[str, Any] = {}
        phase = "start"
        try:
            _answer(process, json.dumps(request))
            for event in _events(process, deadline):
                name = event["event"]
                if name == "values":
                    outcome.record.update(event["values"])
                elif name == "miss":
                    outcome.record.miss(event["columns"], Reason.from_json(event["reason"]))
                elif name == "energy":
                    energy = event
                elif name == "blocks":
                    outcome.step_s = event["step_s"]
                elif name in ("done", "error"):
                    last = event
                    outcome.runtime = event.get("runtime", {})
                elif name == "phase":
                    phase = event["phase"]
                    outcome.phases[phase] = round(time.monotonic() - start, 4)
                    self._watch.mark(phase)
                    _answer(process, "")
                    self._listener(case, name, event)
                elif name == "progress":
                    self._listener(case, name, event)
        except TimeoutError:
            if last.get("event") != "done":
                reason = f"not finished after {self._timeout_s:g} s, killed in or after phase {phase!r}"
                return "timeout", reason, told()
        if last.get("event") == "done":
            # What was measured stands, even if the process then stumbles on its way out.
            return last["status"], last["reason"], told()
        if last.get("event") == "error":
            return ("oom" if last["oom"] else "error"), _one_line(f"{last['type']}: {last['message']}"), told()
        code = process.wait(max(min(_GRACE_S, deadline - time.monotonic()), 0.1))
        outcome.signal = -code if code is not None and code < 0 else None
        return *_ended_silently(code, phase), told()


def _energy_off(case: Case) -> str | None:
    """Why no energy is counted in a case, None where it is."""
    if case.settings.timing_s == 0:
        return "timing was off"
    return "energy was off (--mp-energy 0, or the preset smoke)" if case.settings.energy_s == 0 else None


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
    """The text as one line; of a long one the beginning and more of the end, which is where it says what is wrong."""
    # A colour that a library gave its message would stay on the user's terminal.
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    line = "".join(c for c in " ".join(text.split()) if c.isprintable() or "\ud800" <= c <= "\udfff")
    return line if len(line) <= _REASON else f"{line[:_BEGINNING]} … {line[_BEGINNING - _REASON :]}"
