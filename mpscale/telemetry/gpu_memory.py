"""Memory of a case on a GPU: the headline figure, where it comes from, and whether the figures agree.

A process keeps what it has once taken from the driver, so peaks are taken up to a phase, and a stage of the case has a
peak of its own only if it needed more than the stages before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.telemetry.samples import Reading, Sample, Samples, known

HEADLINE = "gpu_memory_nvml_peak_mib"
_PROCESS, _DEVICE = "process", "device-minus-idle"
_WHOLE = {_PROCESS: "gpu_memory_process_peak_mib", _DEVICE: "gpu_memory_device_rise_mib"}
"""The column with the peak of the whole case, by method."""

Peak = Callable[[str], float | Reason]
"""The largest memory up to a phase."""

_TOLERATED_S = 0.1
"""How long a reading may fail within a peak: no longer than one look can take anyway. Reported as a gap."""

_NO_RESERVED = Reason(Code.NOT_TOLD, "this driver does not report reserved memory")
_WITHOUT_MEMORY = Reason(
    Code.NOT_TOLD, "the driver lists the process but not its memory, as under WSL2 and in some containers"
)
_NOT_LISTED = Reason(
    Code.NOT_TOLD,
    "the driver does not list the process: it held no GPU memory, or this runs in a container with a PID namespace of "
    "its own and the driver uses the host's process ids",
)
_FOREIGN_PID = Reason(
    Code.NOT_TOLD,
    "the driver listed the worker's process id before the worker used the GPU: this runs in a container with a PID "
    "namespace of its own, and the id is another process's",
)
_INCOMPLETE = Reason(
    Code.NOT_TOLD, "needs the largest peak, the context's memory and the allocator's peak, and one of them is unknown"
)

_EXPLAINED = 0.1
"""A part that neither context nor allocator explains is named if it is a larger share of the largest peak."""

_MOSTLY = 0.5
"""The share of that part which a cause must account for."""


class Cause(StrEnum):
    """The likely cause of memory that neither context nor allocator explains."""

    POOL = "pool"
    """The allocator is bfc, whose pool grows by doubling and holds more than is in use."""
    FIRST_STEP = "first-step"
    """It was there after the first step: scratch of autotuning in XLA or cuDNN, libraries, compiled programs."""
    QUEUED_STEPS = "queued-steps"
    """It came when steps were queued: a step gets its buffers before the step before it has returned its own."""
    UNCLEAR = "unclear"
    """None of these accounts for half of it."""


@dataclass(frozen=True, slots=True)
class AllocatorFacts:
    """TensorFlow's allocator, for the reconciliation.

    Args:
        peak_mib: its peak in the whole process.
        synchronised_peak_mib: its peak up to the end of the synchronised steps.
        kind: ``cuda_malloc_async`` or ``bfc``.
    """

    peak_mib: float | None = None
    synchronised_peak_mib: float | None = None
    kind: str | None = None


def memory_columns(samples: Samples, allocator: AllocatorFacts = AllocatorFacts()) -> Findings:
    """The columns on memory, except those of TensorFlow's allocator.

    Args:
        samples: of the whole case.
        allocator: what the worker knows of it.
    """
    found = Findings()
    idle = samples.at("idle")
    whole = _whole(samples)
    process, rise = _process_peak(whole, idle), _device_rise(whole, idle)
    found.put("gpu_memory_process_peak_mib", process)
    found.put("gpu_memory_device_rise_mib", rise)
    found.put("gpu_memory_idle_mib", _at(samples, Reading.MEMORY, "idle"))
    found.put("gpu_memory_reserved_mib", _reserved(samples))
    training = _until(samples, "steps-synchronised")
    if training is not None:
        process, rise = _process_peak(training, idle), _device_rise(training, idle)
    most, method = _headline(samples, process, rise)

    def peak(phase: str) -> float | Reason:
        """The largest memory up to a phase, by the headline's method."""
        if isinstance(method, Reason):
            return method
        of = _process_peak if method == _PROCESS else _device_rise
        found = _peak_until(samples, phase, lambda some: of(some, idle))
        return _unmarked(samples, phase) if found is None else found

    headline = peak("steps-synchronised")
    if training is None and not isinstance(most, Reason) and isinstance(headline, Reason):
        headline = headline.worded(f"{headline}; {most:.0f} MiB was the peak of the whole case")
    found.put(HEADLINE, headline)
    found.put("gpu_memory_method", method)
    queued = _queued_peak(samples, peak)
    found.put("gpu_memory_queued_peak_mib", queued)
    found.put("gpu_memory_evaluation_peak_mib", _evaluation_peak(samples, peak))
    context = _context(samples, method)
    found.put("gpu_memory_context_mib", context)
    largest = found.values.get(_WHOLE[method]) if isinstance(method, str) else None
    if largest is None or isinstance(context, Reason) or allocator.peak_mib is None:
        found.miss(("gpu_memory_unexplained_mib", "gpu_memory_unexplained_cause"), _INCOMPLETE)
    else:
        unexplained = largest - context - allocator.peak_mib
        found.put("gpu_memory_unexplained_mib", unexplained)
        first = _minus(peak("compiled"), context + (allocator.synchronised_peak_mib or allocator.peak_mib))
        came_queued = _minus(queued, headline)
        cause = _cause(unexplained, largest, first, came_queued, allocator.kind)
        found.put("gpu_memory_unexplained_cause", cause if isinstance(cause, Reason) else cause.value)
    often = samples.often()
    if not often:
        once = Reason(Code.NOT_REACHED, "the case ended before a second sample")
        found.miss(("gpu_sample_interval_ms", "gpu_sample_gap_ms"), once)
        return found
    seconds, looks = sum(since_s for _, since_s in often), sum(row.looks for row, _ in often)
    found.put("gpu_sample_interval_ms", seconds / looks * 1e3)
    # What was tolerated above is reported here.
    first_s, last_s = _window(whole, idle)
    blind = [*samples.gaps(Reading.MEMORY), *samples.gaps(Reading.PROCESSES, _unlisted(samples))]
    blind_s = [min(gap.to_s, last_s) - gap.from_s for gap in blind if gap.from_s < last_s and gap.to_s > first_s]
    found.put("gpu_sample_gap_ms", max([row.gap_s for row, _ in often] + blind_s) * 1e3)
    return found


def _whole(samples: Samples) -> Samples:
    """The samples of the time in which the case can have used the GPU: up to ``done``, or to the last one.

    Steps that are profiled do not count, since the profiler takes memory of its own.
    """
    profiled = any(row.phase == "profiled" for row in samples.rows)
    ends = ("energy-end", "timing-end", "done") if profiled else ("done",)
    end = next((phase for phase in ends if samples.at(phase) is not None), None)
    return (None if end is None else _until(samples, end)) or samples


def _until(samples: Samples, phase: str) -> Samples | None:
    """The samples up to the one at a phase, even if that came late; None if there is none."""
    for number, row in enumerate(samples.rows, 1):
        if row.phase == phase:
            # A monitor that died later was there until then.
            silent = samples.silent if number == len(samples.rows) else None
            return replace(samples, rows=samples.rows[:number], silent=silent)
    return None


def _peak_until(samples: Samples, phase: str, peak: Callable[[Samples], float | Reason]) -> float | Reason | None:
    """The peak of the samples up to a phase; None if it is not known.

    If the sample at the phase came late, the peak lies between that up to the phase before and that up to the late
    sample, so it is known if the two are equal.
    """
    some = _until(samples, phase)
    if some is None:
        return None
    found = peak(some)
    if phase not in samples.late:
        return found
    before = next((row.phase for row in reversed(some.rows) if row.phase and row.phase not in samples.late), None)
    earlier = None if before is None else _until(samples, before)
    return found if earlier is not None and peak(earlier) == found else None


def _unmarked(samples: Samples, phase: str) -> Reason:
    """Why there is no peak up to a phase."""
    why = samples.not_at(phase)
    if why.code is not Code.NOT_REACHED or samples.at("done") is None:
        return why
    return why.worded(f"the case has no phase {phase}, as in versions of mpscale before it, or if it did not train")


def _queued_peak(samples: Samples, peak: Peak) -> float | Reason:
    """The largest memory while steps were queued.

    The process keeps what it once took, so of the stages in which steps are queued the last one that needed more than
    was there counts: what an evaluation took before it is not mistaken for theirs.
    """
    stages = [("steps-synchronised", "steps-queued")]
    if _has(samples, "metric-tried"):
        stages.append(("metric-tried", "trained"))
    if _has(samples, "timing-start"):
        end = "energy-end" if _has(samples, "energy-end") else "timing-end"
        # Where nothing is evaluated, the steps of the training and of the timing are one stage.
        stages.append(("evaluated" if _has(samples, "evaluated") else "steps-queued", end))
    found: float | Reason = peak(stages[0][1])
    for before, after in ((peak(start), peak(end)) for start, end in stages):
        if isinstance(before, Reason) or isinstance(after, Reason):
            return before if isinstance(before, Reason) else after
        found = after if after > before else found
    return found


def _evaluation_peak(samples: Samples, peak: Peak) -> float | Reason:
    """The largest memory while the model was evaluated, if that needed more than was there."""
    over = _has(samples, "timing-start") or samples.at("done") is not None
    # A case of an older version has none of the three phases, although it evaluated.
    unscored = _has(samples, "steps-queued") and not any(
        _has(samples, phase) for phase in ("metric-tried", "evaluated")
    )
    if over and (unscored or not _has(samples, "trained")):
        return Reason(Code.NOT_ASKED_FOR, "this process evaluated nothing")
    sufficient, found = math.inf, None
    for start, end in (("steps-queued", "metric-tried"), ("trained", "evaluated")):
        before, after = peak(start), peak(end)
        if isinstance(before, Reason) or isinstance(after, Reason):
            return before if isinstance(before, Reason) else after
        if after > before:
            found = after
        sufficient = min(sufficient, before)
    text = f"it needed no more than the {sufficient:.0f} MiB that the process had taken before it"
    return Reason(Code.NEVER_HAPPENED, text) if found is None else found


def _cause(unexplained: float, largest: float, first: float, queued: float, allocator: str | None) -> Cause | Reason:
    """Name the likely cause of the unexplained part of the ``largest`` peak.

    Args:
        unexplained: MiB.
        largest: MiB.
        first: unexplained after the first step already, in MiB.
        queued: came when steps were queued, in MiB.
        allocator: ``cuda_malloc_async`` or ``bfc``.
    """
    if unexplained <= _EXPLAINED * largest:
        text = f"context and allocator explain all but {max(unexplained, 0.0) / largest:.0%} of the largest peak"
        return Reason(Code.NEVER_HAPPENED, text)
    if allocator == "bfc":
        return Cause.POOL
    most, cause = max((first, Cause.FIRST_STEP), (queued, Cause.QUEUED_STEPS))
    return cause if most >= _MOSTLY * unexplained else Cause.UNCLEAR


def _minus(value: float | Reason, other: float | Reason) -> float:
    """The difference of two figures; 0 if one is unknown."""
    return 0.0 if isinstance(value, Reason) or isinstance(other, Reason) else value - other


def _has(samples: Samples, phase: str) -> bool:
    """Whether the worker came to a phase, even if the sample at it was late."""
    return phase in samples.late or samples.at(phase) is not None


def _window(samples: Samples, idle: Sample | None) -> tuple[float, float]:
    """The time from ``idle`` to the last sample."""
    return -math.inf if idle is None else idle.time_s, samples.rows[-1].time_s if samples.rows else math.inf


def _tolerated_s(samples: Samples) -> float:
    return max([_TOLERATED_S, *(row.gap_s for row, _ in samples.often())])


def _unlisted(samples: Samples) -> Callable[[Sample], bool]:
    """Return a predicate: whether a sample lacks the worker's memory.

    That is so if there is no list of processes, if the list names the worker without its memory or if, up to the last
    phase, it no longer names the worker: a worker holds memory until it ends.
    """
    known_s = [row.time_s for row in samples.rows if row.process_memory_mib is not None]
    phases = [row.time_s for row in samples.rows if row.phase not in ("", "end")]
    if not known_s or not phases:
        return lambda row: Reading.PROCESSES in row.failed
    first_s, last_s = known_s[0], phases[-1]

    def failed(row: Sample) -> bool:
        vanished = row.listed is False and first_s < row.time_s <= last_s
        return Reading.PROCESSES in row.failed or vanished or (row.listed is True and row.process_memory_mib is None)

    return failed


def _process_peak(samples: Samples, idle: Sample | None) -> float | Reason:
    """The largest memory of worker and descendants in the driver's list of processes."""
    if idle is not None and idle.listed:
        return _FOREIGN_PID
    peak: float = max(known(samples.rows, "process_memory_mib"), default=0.0)
    if samples.silent is not None and not peak:
        return samples.silent.worded(f"{samples.silent}; nothing was seen")
    if peak > 0:
        unseen = samples.unseen(Reading.PROCESSES, *_window(samples, idle), _tolerated_s(samples), _unlisted(samples))
        return peak if unseen is None else unseen.worded(f"{unseen}; {peak:.0f} MiB was the most {_then(samples)}")
    listed = known(samples.rows, "listed")
    if not listed:
        why = samples.reasons.get(Reading.PROCESSES)
        if why is None:
            return Reason(Code.NOT_REACHED, "the process ended before the first sample")
        return why.worded(f"no list of processes can be read: {why}")
    return _WITHOUT_MEMORY if any(listed) else _NOT_LISTED


def _then(samples: Samples) -> str:
    return "that was seen" if samples.silent is None else "until then"


def _device_rise(samples: Samples, idle: Sample | None) -> float | Reason:
    """How far the memory in use on the GPU rose above what it was before the worker touched it."""
    before = _at(samples, Reading.MEMORY, "idle")
    if idle is None or isinstance(before, Reason):
        return before
    later = known((row for row in samples.rows if row.time_s > idle.time_s), Reading.MEMORY)
    rise: float = max(later, default=before) - before
    unseen = samples.unseen(Reading.MEMORY, *_window(samples, idle), _tolerated_s(samples))
    if unseen is not None:
        return unseen.worded(f"{unseen}; a rise by {rise:.0f} MiB was the most {_then(samples)}")
    no_rise = Reason(Code.NEVER_HAPPENED, "memory in use on the GPU did not rise during the case")
    return rise if rise > 0 else no_rise


def _reserved(samples: Samples) -> float | Reason:
    reasons = samples.reasons
    missing = reasons.get(Reading.MEMORY, reasons.get(Reading.RESERVED_MEMORY, _NO_RESERVED))
    largest: float | Reason = max(known(samples.rows, Reading.RESERVED_MEMORY), default=missing)
    return samples.why_few(Reading.MEMORY, samples.rows) or largest


def _headline(samples: Samples, process: float | Reason, rise: float | Reason) -> tuple[float | Reason, str | Reason]:
    """The peak that counts and how it was found.

    That is the process's own figure, else the rise in the GPU's use if nobody else can have contributed to it.
    """
    if not isinstance(process, Reason):
        return process, _PROCESS
    if isinstance(rise, Reason):
        reason = process if process == rise else process.worded(f"{process}; and {rise}")
        return reason, reason
    if samples.alone():
        return rise, _DEVICE
    text = f"{process}; and other processes used the GPU, so the rise in its memory is not the case's alone"
    reason = Reason(Code.SHARED, text, process.cure)
    return reason, reason


def _context(samples: Samples, method: str | Reason) -> float | Reason:
    """Memory that CUDA's context took before anything was built, by the headline's method."""
    if isinstance(method, Reason):
        return method
    if method == _PROCESS:
        return _at(samples, Reading.PROCESSES, "context-ready", "process_memory_mib")
    before, after = (_at(samples, Reading.MEMORY, phase) for phase in ("idle", "context-ready"))
    if isinstance(before, Reason) or isinstance(after, Reason):
        return before if isinstance(before, Reason) else after
    return after - before


def _at(samples: Samples, reading: Reading, phase: str, name: str | None = None) -> float | Reason:
    """A field of the sample at a phase, by default that of the reading."""
    sample = samples.at(phase)
    if sample is None:
        return samples.not_at(phase)
    value: float | None = getattr(sample, name or reading)
    if value is None:
        return samples.reasons.get(reading, Reason(Code.NOT_TOLD, f"the driver gave no value at {phase}"))
    return value
