"""Finds the largest batch that trains in each mode. Each try is a case that only times, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mpscale.analysis.fit import Fit, Try, Verdict
from mpscale.core.case import Case, Settings
from mpscale.core.cause import Cause
from mpscale.core.device import Device
from mpscale.core.out_of_memory import may_have_run_out, ran_out
from mpscale.core.reason import Code, Reason
from mpscale.harness.empty_columns import explain
from mpscale.harness.supervisor import Outcome
from mpscale.harness.trial import Runner, attempt
from mpscale.telemetry.host import available_mib

PARTS = 8
"""The largest power of two that fits is refined in steps of one such part of it."""

SETTINGS = Settings(train_steps=4, timing_s=0.5, timing_blocks=5, energy_s=0.0, repeat_data=True)
"""Of a try: two dozen steps, as many as it takes to warm up and to get a step time."""

_SHARE = 0.8
"""Of the memory that is free on a host, what a try may use unless the user says otherwise."""


def default_limit_mib(device: Device) -> float | None:
    """The memory in MiB that a try may use by default; None for any amount, as on a GPU, which has its own limit."""
    free = available_mib()
    return None if device.kind == "gpu" or free is None else _SHARE * free


def search(tries: Callable[[int], tuple[Verdict, Reason | None]], start: int, most: int) -> Reason | None:
    """Search for the largest batch that fits: first a power of two, which is then refined by eighths of it.

    The result is the largest of the tries that fit, so the caller keeps the tries: they also survive an exception.

    Args:
        tries: tries a batch; returns what became of it, and why it does not fit.
        start: where to begin; rounded down to a power of two.
        most: the largest batch to try.

    Returns:
        None if the limit was found; otherwise why it was not.
    """
    batch = _power_of_two(min(start, most))
    fits, too_large = 0, 0  # 0 as long as it is not known
    while not (fits and too_large):
        verdict, reason = tries(batch)
        match verdict:
            case Verdict.FAILED:
                return _failed(batch, reason)
            case Verdict.FITS if batch == most:
                return Reason(
                    Code.NOT_ASKED_FOR,
                    f"batches above {most:,} were not tried",
                    f"--max-batch {2 * most} goes on from there",
                )
            case Verdict.FITS:
                fits, batch = batch, min(2 * batch, most)
            case Verdict.OUT_OF_MEMORY if batch == 1:
                return Reason(Code.OUT_OF_MEMORY, f"not even a batch of 1 fits: {reason}")
            case Verdict.OUT_OF_MEMORY:
                too_large, batch = batch, _power_of_two(batch - 1)
    part = max(1, fits // PARTS)
    while too_large - fits > part:
        batch = fits + part * max(1, (too_large - fits) // part // 2)
        verdict, reason = tries(batch)
        match verdict:
            case Verdict.FAILED:
                return _failed(batch, reason)
            case Verdict.FITS:
                fits = batch
            case Verdict.OUT_OF_MEMORY:
                too_large = batch
    return None


def _failed(batch: int, reason: Reason | None) -> Reason:
    reason = reason or Reason(Code.OTHER, "no reason was given")
    return reason.worded(f"a batch of {batch:,} failed: {reason}")


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above ``number``."""
    return 1 << (number.bit_length() - 1)


def judge(outcome: Outcome, trained_smaller: bool) -> tuple[Verdict, Reason | None]:
    """What a try says about its batch.

    Args:
        outcome: of its case.
        trained_smaller: whether the mode has trained with a smaller batch, so that nothing but memory is new.
    """
    record, status = outcome.record, outcome.record["status"]
    if status in ("ok", "diverged", "stalled"):
        return Verdict.FITS, None
    text = str(record["status_reason"])
    if status == "oom":
        return Verdict.OUT_OF_MEMORY, Reason(Code.OUT_OF_MEMORY, text)
    # An allocation that fails where nothing catches it ends the process; only its output says why.
    said = f"{text} {record['output_tail'] or ''}" if status in ("error", "crashed") else ""
    if ran_out(said) or (trained_smaller and may_have_run_out(said)):
        return Verdict.OUT_OF_MEMORY, Reason(Code.OUT_OF_MEMORY, text)
    code = Code.UNSUPPORTED if status == "unsupported" else Code.OTHER
    return Verdict.FAILED, Reason(code, f"{status}: {text}")


@dataclass(frozen=True)
class Question:
    """What is searched for.

    Args:
        start: the first batch to try.
        most: the largest.
        settings: of each try, apart from the batch.
    """

    start: int
    most: int
    settings: Settings = SETTINGS


class Fitter:
    """Searches mode by mode. A mode begins where the one before it ended.

    Args:
        fit: takes the tries.
        question: what is searched for.
        runner: runs them.
        tried: called after each.
        fall_back: called with what XLA refuses, if it does: all modes are then searched without XLA, and tries with it
            are forgotten. None: such a try fails.
    """

    def __init__(
        self,
        fit: Fit,
        question: Question,
        runner: Runner,
        tried: Callable[[Try], None],
        fall_back: Callable[[str], None] | None = None,
    ) -> None:
        self._fit, self._question, self._runner, self._tried = fit, question, runner, tried
        self._fall_back = fall_back
        self._lost: Reason | None = None

    def run(self) -> None:
        """Search all modes. After an exception, such as the user's interrupt, ``fit`` holds what is known."""
        try:
            try:
                self._search()
            except _Refused:
                self._search()
        finally:
            self._runner.close()

    def _search(self) -> None:
        start = self._question.start
        for mode in self._fit.modes:
            self._fit.ends[mode] = search(partial(self._try, mode), start, self._question.most)
            largest = self._fit.largest(mode)
            start = start if largest is None else largest.batch

    def _try(self, mode: str, batch: int) -> tuple[Verdict, Reason | None]:
        if self._lost is not None:
            return Verdict.FAILED, self._lost
        case = Case(self._fit.workload, mode, 0, 1, len(self._fit.tries), self._settings(batch))
        outcome = attempt(self._runner, case, self._go_on_without_xla if self._fall_back else None)
        if outcome.record.cause is Cause.GPU_LOST:
            self._lost = Reason(Code.GPU_LOST, f"the GPU was lost when {mode} tried a batch of {batch:,}")
        outcome.record.update({"xla_refused": self._fit.xla_refused or outcome.record["xla_refused"]})
        explain(outcome.record, case)
        trained = self._fit.largest(mode)
        verdict, reason = judge(outcome, trained_smaller=trained is not None and trained.batch < batch)
        this = Try(mode, batch, verdict, reason, outcome.record)
        self._fit.tries.append(this)
        self._tried(this)
        return verdict, reason

    def _go_on_without_xla(self, what: str) -> None:
        """Note what XLA refuses; if there are tries with XLA, raise :class:`_Refused`, since all have to be alike."""
        assert self._fall_back is not None
        self._fit.xla_refused = what
        self._fall_back(what)
        if self._fit.tries:
            self._fit.tries.clear()
            self._fit.ends.clear()
            raise _Refused

    def _settings(self, batch: int) -> Settings:
        jit = self._question.settings.jit and self._fit.xla_refused is None
        return replace(self._question.settings, batch_size=batch, jit=jit)


class _Refused(Exception):
    """The search has to begin anew, without XLA."""
