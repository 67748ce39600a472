"""Runs a case: starts its process, listens to it, stops it when its time is up, and records how it ended."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mpscale.core.case import Case, StartMethod, Strategy
from mpscale.core.cause import Cause
from mpscale.core.columns import FAILED, MEASURED, METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.device import Device
from mpscale.core.files.errors import in_words, is_of_the_disk
from mpscale.core.files.temporary import TemporaryFolder, remove_left_behind, temporary_file
from mpscale.core.given import given
from mpscale.core.mode import MODES
from mpscale.core.out_of_memory import ran_out
from mpscale.core.processes import events, stopping
from mpscale.core.processes.events import Noted, Phase, PhaseReached
from mpscale.core.reason import Reason
from mpscale.core.record import Findings, Record
from mpscale.core.variables import without_secrets
from mpscale.harness import conversation
from mpscale.harness.autotuning import SharedTuning
from mpscale.harness.conversation import OWN_SIGNALS, Conversation, one_line
from mpscale.harness.launch import (
    Allocator,
    ForkLauncher,
    Launcher,
    LaunchError,
    UnsafeFork,
    allocators,
    tail,
    worker_environment,
)
from mpscale.harness.memory_limit import MemoryLimit
from mpscale.harness.oom_killer import OomKiller
from mpscale.harness.peers import PeerLauncher
from mpscale.telemetry.client import Driver
from mpscale.telemetry.replicas import ReplicaWatch, with_other_machines
from mpscale.telemetry.watch import HOST_COLUMN, CaseWatch, WatchResult

Listener = Callable[[Case, events.Progressed], None]
"""Called with a case and what has just happened in it."""

_OWN_FAILURES = (Cause.EXCEPTION, Cause.EXITED, Cause.FATAL_SIGNAL)
"""How a worker fails by itself, while memory suffices and nobody kills it."""

_JOINING = "the merge_call by which TensorFlow joins replicas"
"""What XLA cannot compile of any workload under a strategy."""
_TAIL_BYTES = 4000


class Machines(Protocol):
    """The other machines that train the same cases, as this one sees them: it leads them, or follows one of them."""

    def launcher(self, own: Launcher) -> Launcher:
        """Return a launcher that starts this machine's worker by ``own`` when the others start theirs."""

    def seen(self) -> Sequence[tuple[Findings, str | None]]:
        """What was seen of the GPUs of each other machine in the last case, and why it must not be used."""


@dataclass(frozen=True)
class Options:
    """How a run is made, as opposed to what is in it.

    Args:
        results: the results folder.
        project: the folder whose git commit is recorded.
        start_method: how workers are started.
        timeout_s: seconds that a case may take.
        asked: what the user asked for, for run.json.
        gpu_allocator: TensorFlow's allocator on a GPU.
        retries: how many times to retry a case that failed for another transient cause, see :class:`Cause`.
        gpu_retries: how many times to retry a case invalidated by a transient condition of the GPU.
        cool_down_s: the longest wait before such a retry.
        keep_suspect: do not invalidate such cases.
        interleaved: for run.json, the run with which this one is interleaved; None if there is none.
        invocation: for run.json, how the run was started; None if nobody can go on with it.
        jit_fallback: whether a workload that XLA refuses goes on without it.
        named: for run.json, name and note of the run, as far as it has them.
        memory_limit_mib: resident memory of a worker above which it is killed and the case is ``oom``.
        shard: for run.json, the part of a plan that this run has; None if it has the whole.
        strategy: that of all cases.
        machines: the others that train them, too; None if there is no other.
    """

    results: Path
    project: Path
    start_method: StartMethod
    timeout_s: float
    asked: dict[str, Any]
    gpu_allocator: Literal["auto", "cuda_malloc_async", "bfc"] = "auto"
    retries: int = 1
    gpu_retries: int = 2
    cool_down_s: float = 60.0
    keep_suspect: bool = False
    interleaved: Mapping[str, Any] | None = None
    invocation: Mapping[str, Any] | None = None
    jit_fallback: bool = False
    named: Mapping[str, str] | None = None
    memory_limit_mib: float | None = None
    shard: Mapping[str, Any] | None = None
    strategy: Strategy = "none"
    machines: Machines | None = None


@dataclass
class Outcome:
    """What became of a case.

    Args:
        record: its row.
        step_s: seconds per step of each timed block.
        phases: when each phase was reached, in seconds from the start of the process.
        runtime: what the worker knows about TensorFlow and its device.
        again: why to try again, None not to: the GPU has ``cooled``, there is another ``allocator``, or the case failed
            when it first ``touched`` the GPU, which may pass. The record's cause says whether anything else may pass.
        not_kept: files of the case that could not be written, and why.
    """

    record: Record
    step_s: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    again: Literal["cooled", "allocator", "touched"] | None = None
    not_kept: list[str] = field(default_factory=list)

    def note_not_kept(self, what: str, why: str) -> None:
        """Note that a file of the case could not be written."""
        text = f"{what} could not be kept: {why}"
        self.not_kept.append(text)
        self.record.note(text)


class Supervisor:
    """Runs cases one at a time, each in a process, or several, with this one's environment and Python path.

    On a GPU it may have several of TensorFlow's allocators to choose from. It takes the next one when a case fails
    twice on touching the GPU, but never after one has worked: a run must not mix figures of two allocators.

    Args:
        device: where cases run.
        driver: gives access to the GPU's driver.
        options: how they run.
        listener: called at each phase and with progress.
    """

    def __init__(self, device: Device, driver: Driver, options: Options, listener: Listener) -> None:
        self._device, self._options, self._listener = device, options, listener
        self._each = device.apart(driver.devices)
        watch = ReplicaWatch if device.beside else CaseWatch
        self._watch = watch(driver, device, (options.interleaved or {}).get("id"))
        remove_left_behind()
        self._folder = TemporaryFolder()
        self._forget = stopping.before_ending_at_once(self._remove)
        # It includes the folders in which the session has found workloads.
        parcel = given().parcel
        # A script's modules come first for it, and so must they for its functions.
        path = [*(() if parcel is None else parcel.python_path), *sys.path]
        self._sys_path = [str(Path(entry).absolute()) for entry in path]
        self._allocators = allocators(options.gpu_allocator, os.environ, driver.cuda_version)
        self._left = list(self._allocators)
        self._allocator_works, self._failures = False, 0
        self._launcher = self._make_launcher(options.start_method)
        self._tuning = SharedTuning(self._folder)
        self.why_not_forked: Reason | None = None
        """Why workers are fresh processes although forked ones were asked for."""

    def run(
        self, case: Case, steps_path: Path | None, gpu_path: Path | None, outcome: Outcome, attempt: int = 1
    ) -> None:
        """Run a case, however it ends.

        Args:
            case: what to run.
            steps_path: where its log of steps goes, None for a case that does not train.
            gpu_path: where the samples of the GPU go.
            outcome: filled in as the case goes on, so it holds what was known even if this ends in an exception, such
                as the user's interrupt.
            attempt: how many times the case has been started, including this time.
        """
        self.describe(case, outcome.record, attempt)
        settings = case.settings
        unsupported = MODES[case.mode].unsupported_reason(self._device, settings.jit, settings.strategy != "none")
        if unsupported:
            outcome.record.end("unsupported", unsupported)
        else:
            with stopping.held():
                self._run_process(case, steps_path, gpu_path, outcome)
            self._judge_allocator(outcome)

    def describe(self, case: Case, record: Record, attempt: int) -> None:
        """Record what is known of a case even if it never starts."""
        record.update(
            {
                "attempts": attempt,
                "schema_version": SCHEMA_VERSION,
                "method_version": METHOD_VERSION,
                "device": self._device.kind,
                "device_name": self._device.name,
                "jit": case.settings.jit,
                "steps_per_call": case.settings.steps_per_call,
                "strategy": case.settings.strategy,
                "replicas": case.settings.replicas,
                "machines": case.settings.machines,
                "policy": MODES[case.mode].policy,
            }
        )
        if case.settings.strategy != "none":
            record.update({"xla_refused": _JOINING})

    def warm_up(self) -> None:
        """Begin what the first case would wait for. If that fails, the case says so."""
        with contextlib.suppress(OSError):
            self._launcher.begin()

    def cool_down(self, seconds: float) -> None:
        """Wait until the GPU is fit for measurements, for at most ``seconds``."""
        self._watch.cool_down(seconds)

    def close(self) -> None:
        """End whatever outlives a case."""
        with stopping.held():
            self._launcher.close()
            self._watch.close()
            self._folder.close()
            self._forget()

    def _remove(self) -> None:
        """Remove the temporary folders, even if processes still write there, and the note on the GPU."""
        self._folder.close()
        self._watch.close()

    @property
    def allocator(self) -> Allocator | None:
        """The allocator that workers start with; None for the one that the environment names."""
        return self._left[0]

    def _make_launcher(self, method: StartMethod) -> Launcher:
        def make(environ: Mapping[str, str]) -> Launcher:
            on_gpu = self._device.kind == "gpu"
            return ForkLauncher(environ, on_gpu) if method == "fork" else Launcher(environ)

        environment = worker_environment(os.environ, self._device, self._left[0])
        if self._options.machines is not None:
            return self._options.machines.launcher(make(environment))
        if self._options.strategy == "multiworker":
            return PeerLauncher(make, environment, self._each)
        return make(environment)

    def _judge_allocator(self, outcome: Outcome) -> None:
        """Retry a case whose worker failed on first touching the GPU: once as it was, then with the next allocator.

        If the last one fails too, no allocator was to blame.
        """
        if Phase.CONTEXT_READY in outcome.phases:
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
        self._launcher.environ = worker_environment(os.environ, self._device, self._left[0])

    def _may_be_the_allocator(self, outcome: Outcome) -> bool:
        """Whether the worker failed on touching the GPU, and by itself: nobody killed it, and memory sufficed."""
        return self._device.kind == "gpu" and Phase.IDLE in outcome.phases and outcome.record.cause in _OWN_FAILURES

    def _run_process(self, case: Case, steps_path: Path | None, gpu_path: Path | None, outcome: Outcome) -> None:
        record = outcome.record
        try:
            log = temporary_file()
            folder = self._folder.path
            scratch = folder / "scratch"
            scratch.mkdir(exist_ok=True)
            self._prepare(case)
            record.update({"start_method": "fresh" if self.why_not_forked else self._options.start_method})
            start = time.monotonic()
            worker = self._launcher.start(log)
        except LaunchError as error:
            record.end("error", one_line(str(error)), error.cause)
            return
        except OSError as error:
            cause = Cause.FILE_SYSTEM if is_of_the_disk(error) else Cause.NOT_STARTED
            record.end("error", one_line(in_words(error, "its process could not be started")), cause)
            return
        self._watch.start(worker.pid, start, worker.keeper, [(each.pid, each.keeper) for each in worker.beside])
        record.end("interrupted", None, Cause.STOPPED)
        talk = Conversation(worker, case, outcome, start, scratch)
        pids = [worker.pid, *(each.pid for each in worker.beside)]
        limit = MemoryLimit(pids, self._options.memory_limit_mib)
        with OomKiller(*pids) as killer, log:
            try:
                with limit, stopping.opened():
                    self._converse(talk, steps_path)
            finally:
                # Also on the user's interrupt: neither the worker nor a process that it left behind outlives its case.
                worker.end(0.0 if record["status"] in ("timeout", "interrupted") else conversation.GRACE_S)
                record.update({"case_wall_time_s": time.monotonic() - start})
                shutil.rmtree(scratch, ignore_errors=True)
                seen = self._watch.stop(talk.facts(), gpu_path)
                if self._options.machines is not None and self._device.kind == "gpu":
                    seen = with_other_machines(seen, self._options.machines.seen())
                record.update(seen.findings.values)
                for column, why in seen.findings.unavailable.items():
                    record.miss(column, why)
            output = without_secrets(tail(worker.log or log, _TAIL_BYTES), os.environ)
            if talk.signal is not None:
                self._judge_signal(record, talk.signal, killer, output)
        if seen.not_kept is not None:
            outcome.note_not_kept("the samples of the GPU", seen.not_kept)
        self._judge(outcome, seen)
        if limit.problem is not None:
            record.end("oom", limit.problem, Cause.OUT_OF_MEMORY)
            record.update({HOST_COLUMN: limit.peak_mib})
        with contextlib.suppress(OSError):  # the next case then tunes its kernels itself
            self._tuning.ended(case, record["status"])
        if record["status"] in FAILED:
            record.update({"output_tail": output or None})
        if record["status"] in ("error", "crashed") and not folder.exists():
            reason = f"{record['status_reason']}; its temporary folder was removed"
            record.end(record["status"], reason, Cause.FILE_SYSTEM)

    def _judge_signal(self, record: Record, number: int, killer: OomKiller, output: str) -> None:
        """Find out why a signal ended the worker; the record says already that one did."""
        said = str(record["status_reason"])
        if number == signal.SIGKILL:
            if (seen := killer.evidence(record[HOST_COLUMN])) is not None:
                record.end("oom", f"{said}: {seen.text}", Cause.OOM_KILLER)
        elif number == signal.SIGABRT and ran_out(output):
            # An allocation failed where nothing catches that. Only what the libraries print shows it.
            record.end("oom", f"{said}: an allocation failed, see its output", Cause.OUT_OF_MEMORY)
        elif number in OWN_SIGNALS and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            hint = f"its address space is limited to {limit / 2**20:,.0f} MiB (ulimit -v), which may be the cause"
            record.update({"status_reason": f"{said}; {hint}"})

    def _prepare(self, case: Case) -> None:
        """Have the launcher ready. If no child of the warm parent could use the GPU, all workers will be fresh ones."""
        try:
            with stopping.opened():
                self._launcher.prepare(case.settings.replicas)
        except UnsafeFork as unsafe:
            self.why_not_forked = unsafe.reason
            self._launcher.close()
            self._launcher = self._make_launcher("fresh")
            self._launcher.prepare(case.settings.replicas)
            cure = f" To fork them, {unsafe.reason.cure}." if unsafe.reason.cure else ""
            text = f"each case imports TensorFlow, which takes longer than to fork its process: {unsafe.reason}.{cure}"
            self._listener(case, Noted(text))

    def _converse(self, talk: Conversation, steps_path: Path | None) -> None:
        """Have a worker run its case, and look at the machine at each phase."""
        case = talk.case
        request = {
            "case": case.to_json(),
            "device": self._device.to_json(),
            "steps_path": None if steps_path is None else str(steps_path),
            "sys_path": self._sys_path,
            "scratch": str(talk.scratch),
            "energy_s": case.settings.energy_s if talk.energy_off is None and self._watch.has_power() else 0.0,
            "autotuning": self._tuning.flag(case),
            "given": given().to_json(),
        }
        talk.worker.begin(request)
        for event in talk.events(self._options.timeout_s):
            if isinstance(event, PhaseReached):
                self._watch.mark(event.phase)
                talk.worker.send({})
            self._listener(case, event)

    def _judge(self, outcome: Outcome, seen: WatchResult) -> None:
        """Change the status if the GPU was lost, or if its state makes the figures suspect."""
        record = outcome.record
        if seen.lost:
            own = f" (the worker: {record['status_reason']})" if record["status_reason"] else ""
            reason = f"the GPU was lost during the case: it fell off the bus or was reset{own}"
            record.end("crashed", reason, Cause.GPU_LOST)
        elif seen.suspicions:
            reason = "; ".join(str(suspicion.reason) for suspicion in seen.suspicions)
            record.update({"gpu_suspicion": reason})
            if record["status"] in MEASURED and not self._options.keep_suspect:
                record.end("invalid", reason, Cause.GPU_STATE)
                outcome.again = "cooled" if all(suspicion.passes for suspicion in seen.suspicions) else None
