"""The largest batch of each mode, from the batches that were tried, and what it gains over the baseline's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mpscale.analysis.claim import Doubt, conditions, find_doubts
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings, Record

BASELINES = ("tf32", "fp32")
"""The first of these among the modes is what the others are compared with."""

_GPU_MEMORY = ("gpu_memory_process_peak_mib", "gpu_memory_device_rise_mib")
"""Columns with the peak of the whole process, which is what has to fit into the GPU. The first known one counts."""
_RUNNING = Reason(Code.NOT_REACHED, "the search was stopped before it had found the limit")
_NOT_STARTED = Reason(Code.NOT_REACHED, "no batch was tried in this mode")


class Verdict(StrEnum):
    """What became of a try."""

    FITS = "fits"
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"
    """For another reason, which says nothing about memory."""


@dataclass(frozen=True, slots=True)
class Try:
    """One batch size in one mode, tried in a process of its own.

    Args:
        mode: its name.
        batch: examples per step.
        verdict: what became of it.
        reason: why it does not fit; None if it does.
        record: the row of the case that tried it.
    """

    mode: str
    batch: int
    verdict: Verdict
    reason: Reason | None
    record: Record


@dataclass(slots=True)
class Fit:
    """A search for the largest batches, finished or not.

    Args:
        workload: its name.
        modes: names, in the order in which they are searched.
        device: where the tries train.
        limit_mib: memory that a try may use on a CPU; None on a GPU, whose own memory is the limit.
        tries: so far, in order.
        ends: how the search of a mode has ended: None if it found the limit, otherwise why it did not. A mode whose
            search has not ended is missing.
        xla_refused: what XLA cannot compile, because of which all modes are tried without it; None if it compiles them
            or was off.
    """

    workload: str
    modes: Sequence[str]
    device: Device
    limit_mib: float | None
    tries: list[Try] = field(default_factory=list)
    ends: dict[str, Reason | None] = field(default_factory=dict)
    xla_refused: str | None = None

    @property
    def baseline(self) -> str | None:
        """The mode that the others are compared with; None if there is none among them."""
        return next((mode for mode in BASELINES if mode in self.modes), None)

    def largest(self, mode: str) -> Try | None:
        """The largest batch that fits; None if none was found."""
        fitting = [each for each in self.tries if each.mode == mode and each.verdict is Verdict.FITS]
        return max(fitting, key=lambda each: each.batch, default=None)

    def why_open(self, mode: str) -> Reason | None:
        """Why a larger batch than :meth:`largest` may fit; None if the limit was found."""
        if mode in self.ends:
            return self.ends[mode]
        return _RUNNING if any(each.mode == mode for each in self.tries) else _NOT_STARTED


ROW = (
    "largest_batch",
    "ran_out_at",
    "step_time_ms",
    "examples_per_s",
    "peak_memory_mib",
    "batch_ratio",
    "examples_per_s_ratio",
)
"""The figures of a mode. Ratios are over the baseline; ``ran_out_at`` is the next larger batch that was tried."""


def figures(fit: Fit, mode: str) -> Findings:
    """The figures of :data:`ROW` for a mode: a value, or the reason why there is none."""
    found = Findings()
    largest, why_open = fit.largest(mode), fit.why_open(mode)
    if largest is None:
        found.miss(ROW, why_open or _NOT_STARTED)
        return found
    found.put("largest_batch", largest.batch)
    too_large = [
        each.batch
        for each in fit.tries
        if each.mode == mode and each.verdict is Verdict.OUT_OF_MEMORY and each.batch > largest.batch
    ]
    found.put("ran_out_at", min(too_large) if too_large else why_open or _RUNNING)
    found.put("step_time_ms", _of(largest.record, "step_time_ms_median"))
    found.put("examples_per_s", _of(largest.record, "examples_per_s"))
    found.put("peak_memory_mib", _of(largest.record, *memory_columns(fit.device)))
    _put_ratios(found, fit, mode, largest)
    return found


def memory_columns(device: Device) -> tuple[str, ...]:
    """The columns with the memory that limits the batch, the best first."""
    return _GPU_MEMORY if device.kind == "gpu" else ("host_memory_peak_mib",)


def _put_ratios(found: Findings, fit: Fit, mode: str, largest: Try) -> None:
    ratios = ("batch_ratio", "examples_per_s_ratio")
    if fit.baseline is None:
        found.miss(ratios, Reason(Code.NOT_ASKED_FOR, f"neither {' nor '.join(BASELINES)} is among the modes"))
        return
    baseline = fit.largest(fit.baseline)
    open_ends = {name: why for name in (mode, fit.baseline) if (why := fit.why_open(name)) is not None}
    if baseline is None or open_ends:
        name, why = next(iter(open_ends.items()), (fit.baseline, _NOT_STARTED))
        found.miss(ratios, why.worded(f"the largest batch of {name} is not known: {why}"))
        return
    found.put("batch_ratio", largest.batch / baseline.batch)
    found.put("examples_per_s_ratio", _speed_ratio(largest.record, baseline.record))


def _speed_ratio(ours: Record, theirs: Record) -> float | Reason:
    our_speed, their_speed = (_of(record, "examples_per_s") for record in (ours, theirs))
    for speed in (our_speed, their_speed):
        if isinstance(speed, Reason):
            return speed
    if ours is theirs:
        return 1.0
    # That each speed comes from one process is said once, of all of them.
    doubts = [doubt for doubt in find_doubts(conditions([ours]), conditions([theirs]), 1) if doubt != Doubt.ONE_PAIR]
    if doubts:
        text = f"no claim about speed: {', and '.join(doubt.text for doubt in doubts)}"
        return Reason(Code.NOT_COMPARABLE, text)
    return float(our_speed / their_speed)


def _of(record: Record, *columns: str) -> Any:
    """The value of the first of the columns that has one, or why the first has none."""
    known = next((record[name] for name in columns if record[name] is not None), None)
    unknown = Reason(Code.NOT_REACHED, "the try ended before that")
    return known if known is not None else record.why_empty(columns[0]) or unknown
