"""Memory of a case on a GPU: the headline figure, where it comes from, and whether the figures agree."""

from __future__ import annotations

import math
from collections.abc import Callable

from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.telemetry.samples import Reading, Sample, Samples, known

HEADLINE = "gpu_memory_nvml_peak_mib"
_PROCESS, _DEVICE = "process", "device-minus-idle"

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
    Code.NOT_TOLD, "needs the peak, the context's memory and the allocator's peak, and one of them is unknown"
)


def memory_columns(samples: Samples, allocator_peak_mib: float | None) -> Findings:
    """The columns on memory, except those of TensorFlow's allocator.

    Args:
        samples: of the whole case.
        allocator_peak_mib: the peak of TensorFlow's allocator, for the reconciliation.
    """
    found = Findings()
    idle = samples.at("idle")
    process = _process_peak(samples, idle)
    rise = _device_rise(samples, idle)
    found.put("gpu_memory_process_peak_mib", process)
    found.put("gpu_memory_device_rise_mib", rise)
    found.put("gpu_memory_idle_mib", _at(samples, Reading.MEMORY, "idle"))
    found.put("gpu_memory_reserved_mib", _reserved(samples))
    headline, method = _headline(samples, process, rise)
    found.put(HEADLINE, headline)
    found.put("gpu_memory_method", method)
    context = _context(samples, method)
    found.put("gpu_memory_context_mib", context)
    if isinstance(headline, Reason) or isinstance(context, Reason) or allocator_peak_mib is None:
        found.put("gpu_memory_unexplained_mib", _INCOMPLETE)
    else:
        found.put("gpu_memory_unexplained_mib", headline - context - allocator_peak_mib)
    often = samples.often()
    if not often:
        once = Reason(Code.NOT_REACHED, "the case ended before a second sample")
        found.miss(("gpu_sample_interval_ms", "gpu_sample_gap_ms"), once)
        return found
    seconds, looks = sum(since_s for _, since_s in often), sum(row.looks for row, _ in often)
    found.put("gpu_sample_interval_ms", seconds / looks * 1e3)
    # What was tolerated above is reported here.
    first_s, last_s = _window(samples, idle)
    blind = [*samples.gaps(Reading.MEMORY), *samples.gaps(Reading.PROCESSES, _unlisted(samples))]
    blind_s = [min(gap.to_s, last_s) - gap.from_s for gap in blind if gap.from_s < last_s and gap.to_s > first_s]
    found.put("gpu_sample_gap_ms", max([row.gap_s for row, _ in often] + blind_s) * 1e3)
    return found


def _window(samples: Samples, idle: Sample | None) -> tuple[float, float]:
    """The time in which the case can have used the GPU: from ``idle`` to ``done``, or to the last sample."""
    done = samples.at("done") or (samples.rows[-1] if samples.rows else None)
    return idle.time_s if idle is not None else -math.inf, done.time_s if done is not None else math.inf


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
