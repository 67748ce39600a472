"""One run: its cases through the supervisor, into the journal."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpscale.core.case import Case
from mpscale.core.columns import FAILED, Topic, measured_columns
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.record import Record
from mpscale.core.run_folder import Journal
from mpscale.harness.supervisor import Listener, Options, Outcome, Supervisor
from mpscale.telemetry.client import Driver, NoDriver
from mpscale.telemetry.fingerprint import environment, run_slug


class BenchmarkRun:
    """Makes the run's folder and its first process when the first case is run, so that nothing is left of a run
    that had none.

    Args:
        cases: the plan, for the record; cases are run one by one by :meth:`run`.
        device: where they run.
        driver: tells of the GPU.
        options: how.
        listener: told of phases and progress.
    """

    def __init__(
        self, cases: Sequence[Case], device: Device, driver: Driver | NoDriver, options: Options, listener: Listener
    ) -> None:
        self._cases, self._device, self._driver = list(cases), device, driver
        self._options, self._listener = options, listener
        self._journal: Journal | None = None
        self._supervisor: Supervisor | None = None
        self._same_start = SameStart()
        self._outcomes: dict[str, Outcome] = {}
        self._runtime_known = False
        self._started = 0
        self._gpu_lost_in: str | None = None

    @property
    def path(self) -> Path | None:
        """The run's folder, None before the first case."""
        return None if self._journal is None else self._journal.path

    @property
    def troubles(self) -> list[str]:
        """What went wrong with the run's files so far, each once: with any, the run is no success."""
        return [] if self._journal is None else list(self._journal.troubles)

    def measured(self, case: Case) -> Outcome | None:
        """The outcome of a case that has been run already and did not fail."""
        outcome = self._outcomes.get(case.id)
        return None if outcome is None or outcome.record["status"] in FAILED else outcome

    def run(self, case: Case) -> Outcome:
        """Runs one case and writes it down; one that has been run before gets another attempt.

        So does one that the state of the GPU has spoilt, after a pause: every attempt is in the journal.
        """
        retries = 0
        while True:
            outcome = self._attempt(case)
            if outcome.again is None or (outcome.again == "cooled" and retries >= self._options.gpu_retries):
                return outcome
            reason = str(outcome.record["status_reason"])
            if outcome.again == "cooled":
                retries += 1
                self._listener(case, "again", {"reason": f"invalid, {reason}"})
                self._open()[1].cool_down(self._options.cool_down_s)
            elif outcome.again == "allocator":
                now = self._open()[1].allocator
                said = f"TensorFlow failed with cuda_malloc_async twice ({reason}), and is tried with {now}"
                self._listener(case, "again", {"reason": said})
            else:
                self._listener(case, "again", {"reason": f"failed on touching the GPU ({reason})"})

    def _attempt(self, case: Case) -> Outcome:
        journal, supervisor = self._open()
        earlier = self._outcomes.get(case.id)
        attempt = 1 if earlier is None else earlier.record["attempts"] + 1
        # Its place in what was run, which is not that in the plan where a test was left out or run again.
        case = dataclasses.replace(case, order=self._started)
        self._started += 1
        journal.case_started(case, attempt)
        outcome = Outcome(Record(case.identity()))
        if self._gpu_lost_in is not None:
            reason = f"not started: the GPU was lost in {self._gpu_lost_in}"
            supervisor.describe(case, outcome.record, attempt)
            outcome.record.update({"status": "error", "status_reason": reason})
            self._finish_case(journal, case, outcome)
            return outcome
        steps_path = journal.steps_path(case) if case.trains else None
        gpu_path = journal.gpu_path(case, attempt) if self._device.kind == "gpu" else None
        try:
            supervisor.run(case, steps_path, gpu_path, outcome, attempt)
        except BaseException as error:
            outcome.record.update({"status": "interrupted", "status_reason": f"stopped by {type(error).__name__}"})
            self._finish_case(journal, case, outcome)
            raise
        difference = self._same_start.difference(case, outcome.record)
        if outcome.gpu_lost:
            self._gpu_lost_in = case.id
        if difference is not None:
            outcome.again = None
            known = outcome.record["status_reason"] if outcome.record["status"] == "invalid" else None
            reason = f"{known}; {difference}" if known else difference
            outcome.record.update({"status": "invalid", "status_reason": reason})
        self._finish_case(journal, case, outcome)
        if outcome.runtime and not self._runtime_known:
            journal.add_environment({"runtime": outcome.runtime})
            self._runtime_known = True
        return outcome

    def finish(self, exit_status: int) -> None:
        """Ends the processes and closes the journal.

        Args:
            exit_status: that of the whole run, 0 where all went well.
        """
        if self._supervisor is not None:
            self._supervisor.close()
        if self._journal is not None:
            self._journal.finish(exit_status)
        self._supervisor = None

    def _finish_case(self, journal: Journal, case: Case, outcome: Outcome) -> None:
        # Now, and not when the run is read: what no reader could take is told while its case is on the screen.
        misfits = outcome.record.drop_misfits()
        if misfits:
            outcome.record.update(case.identity())
            outcome.record.invalidate("; ".join(misfits))
        explain(outcome.record, case)
        self._outcomes[case.id] = outcome
        journal.case_finished(case, outcome.record, outcome.step_s, outcome.phases)

    def _open(self) -> tuple[Journal, Supervisor]:
        if self._journal is None:
            self._journal = Journal(
                self._options.results,
                run_slug(self._device),
                environment(self._device, self._driver, self._options.project),
                self._options.asked,
                self._cases,
                self._options.interleaved,
            )
        if self._supervisor is None:
            self._supervisor = Supervisor(self._device, self._driver, self._options, self._listener)
        return self._journal, self._supervisor


# Holds the modes of a seed to the same training: a difference between them has to come from the precision alone.

_COMPARED = {
    "initial_weights_digest": "initial weights",
    "data_order_digest": "order of the data",
    "data_digest": "data",
    "model_digest": "model",
    "optimizer_config": "optimizer",
    "loss_inputs": "labels or outputs",
    "loss_probe": "loss",
    "step_operations": "operations in the train step",
    "process_settings": "settings of the process",
}
"""What is compared, by column. Told one by one, so that a reason can name the part."""

_LAST = {"workload_digest": "workload digest"}
"""Made of the others: named where they do not show what differs."""

_SAME_LOSS = 1e-4
"""By how much, relatively, sums of one loss may differ that are taken in another order."""


class SameStart:
    """Remembers what the first case of each group trained and compares the others with it."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, int, int], dict[str, tuple[str, Any]]] = {}

    def difference(self, case: Case, record: Record) -> str | None:
        """What ``case`` trained that an earlier mode of its group did not; None where all is equal.

        A case that died early is judged by what it had until then.
        """
        first = self._first.setdefault(case.group, {})
        differing: dict[str, list[str]] = {}
        for columns in (_COMPARED, _LAST):
            if differing:
                break
            for name, what in columns.items():
                value = record[name]
                if value is None:
                    continue
                mode, other = first.setdefault(name, (case.mode, value))
                if not _equal(value, other):
                    differing.setdefault(mode, []).append(f"{what} ({_apart(name, value, other, mode)})")
        if not differing:
            return None
        said = "; ".join(
            f"not the same training as {mode}: other {', '.join(all_)}" for mode, all_ in differing.items()
        )
        return (
            f"{said}. Modes may differ in their precision alone: the workload must not ask for the mode or its policy"
        )


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=_SAME_LOSS, abs_tol=1e-6)
    return bool(value == other)


def _apart(name: str, value: Any, other: Any, mode: str) -> str:
    """What differs between two values of a column, in few words."""
    if name == "optimizer_config":
        ours, theirs = json.loads(value), json.loads(other)
    elif name == "step_operations":
        ours, theirs = (dict(part.split(" ") for part in text.split(", ")) for text in (value, other))
    elif isinstance(value, float):
        return f"{value:.6g} on the same labels and outputs, {mode} had {other:.6g}"
    else:
        return f"{value}, {mode} had {other}"
    keys = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} {ours.get(key, 'none')}, {mode} had {theirs.get(key, 'none')}" for key in keys)


# Why a column is empty although nothing went wrong: the mode has no such thing, or it was not asked for.

_TRAINING = (*measured_columns(Topic.TRAINING), "metric_value", "final_accuracy", "published_metric_value")
_TIMING = tuple(
    name for name in measured_columns(Topic.STEP_TIME) if name not in ("build_time_s", "trace_time_s", "first_step_s")
)
_LOSS_SCALE = tuple(name for name in _TRAINING if name.startswith("loss_scale_"))
_OVERFLOW = (
    "applied_steps",
    "skipped_steps",
    "overflow_steps",
    "longest_skip_run",
    "first_overflow_step",
    "last_overflow_step",
    "timed_overflow_steps",
    "step_time_ms_per_applied",
)


def explain(record: Record, case: Case) -> None:
    """Gives every empty measured column of a finished case its reason."""
    mode = MODES[case.mode]
    if record["status"] == "unsupported":
        record.complete(str(record["status_reason"]))
        return
    if not case.trains:
        record.miss(_TRAINING, "timing-only process")
    if case.settings.timing_s == 0:
        record.miss(_TIMING, "timing was off")
    if mode.scaling == "none":
        record.miss(_LOSS_SCALE, f"{mode.name} has no loss scale")
    if not mode.sees_overflow:
        record.miss(_OVERFLOW, f"{mode.name} checks no gradient")
    elif record["overflow_steps"] == 0:
        record.miss(("first_overflow_step", "last_overflow_step"), "no step overflowed")
    if record["attempted_steps"] is not None:
        record.miss(("train_loss_first", "train_loss_final", "loss_scale_final", "loss_scale_max"), "not finite")
    if record["timed_steps"] is not None:
        record.miss("step_time_ms_per_applied", "no timed step was applied")
    record.complete(f"the case ended before that ({record['status']})")
