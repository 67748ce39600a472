"""Memory of a case on a GPU: which figure is the headline, and whether the figures agree."""

from __future__ import annotations

import math
from collections.abc import Callable

from mpscale.core.record import Findings
from mpscale.core.wire import Phase
from mpscale.telemetry.samples import Sample, Samples

HEADLINE = "gpu_memory_nvml_peak_mib"
COLUMNS = (
    HEADLINE,
    "gpu_memory_method",
    "gpu_memory_process_peak_mib",
    "gpu_memory_device_rise_mib",
    "gpu_memory_idle_mib",
    "gpu_memory_context_mib",
    "gpu_memory_reserved_mib",
    "gpu_memory_unexplained_mib",
    "gpu_sample_interval_ms",
    "gpu_sample_gap_ms",
)
PROCESS, DEVICE = "process", "device-minus-idle"

_TOLERATED_S = 0.1
"""How long a reading may fail within a peak: no longer than a look may take anyway. It counts as a gap."""


def memory_columns(samples: Samples, allocator_peak_mib: float | None) -> Findings:
    """The columns on memory, but for those of TensorFlow's allocator.

    Args:
        samples: of the whole case.
        allocator_peak_mib: the peak of TensorFlow's allocator, for the reconciliation.
    """
    found = Findings()
    idle, context = samples.at(Phase.IDLE), samples.at(Phase.CONTEXT_READY)
    process, process_reason = _process_peak(samples, idle)
    rise, rise_reason = _device_rise(samples, idle)
    found.put("gpu_memory_process_peak_mib", process, process_reason)
    found.put("gpu_memory_device_rise_mib", rise, rise_reason)
    found.put("gpu_memory_idle_mib", idle and idle.device_memory_mib, _why_not_at(samples, "memory", Phase.IDLE))
    few = samples.why_few("memory", samples.rows)
    reserved = None if few else max(samples.known("reserved_memory_mib"), default=None)
    apart = _why(samples, "memory", "this driver does not tell reserved memory apart")
    found.put("gpu_memory_reserved_mib", reserved, few or apart)
    headline, method, reason = _headline(samples, process, process_reason, rise, rise_reason)
    found.put(HEADLINE, headline, reason)
    found.put("gpu_memory_method", method, reason)
    at_context = _at_context(idle, context, method)
    found.put("gpu_memory_context_mib", at_context, reason if method is None else _context_reason(samples, method))
    unexplained = None
    if headline is not None and at_context is not None and allocator_peak_mib is not None:
        unexplained = headline - at_context - allocator_peak_mib
    missing = "needs a peak by NVML, the context's memory and the allocator's peak, and one of them is unknown"
    found.put("gpu_memory_unexplained_mib", unexplained, missing)
    often = samples.often()
    looks = sum(row.looks for row, _ in often)
    few = "the case ended before a second sample"
    found.put("gpu_sample_interval_ms", sum(since_s for _, since_s in often) / looks * 1e3 if looks else None, few)
    # What was tolerated above is told here.
    first_s, last_s = _window(samples, idle)
    blind = [*samples.gaps("memory"), *samples.gaps("processes", _unlisted(samples))]
    blind_s = [min(gap.to_s, last_s) - gap.from_s for gap in blind if gap.from_s < last_s and gap.to_s > first_s]
    gap_s = max([row.gap_s for row, _ in often] + blind_s) if looks else None
    found.put("gpu_sample_gap_ms", None if gap_s is None else gap_s * 1e3, few)
    return found


def _window(samples: Samples, idle: Sample | None) -> tuple[float, float]:
    """The time in which the case can have used the GPU: from ``idle`` to ``done``, as far as it came."""
    done = samples.at(Phase.DONE) or (samples.rows[-1] if samples.rows else None)
    return idle.time_s if idle is not None else -math.inf, done.time_s if done is not None else math.inf


def _tolerated_s(samples: Samples) -> float:
    return max([_TOLERATED_S, *(row.gap_s for row, _ in samples.often())])


def _unlisted(samples: Samples) -> Callable[[Sample], bool]:
    """Whether a sample fails to tell the memory of the worker.

    Besides a list that could not be had, that is one which names the worker without its memory, or, up to the last
    phase, no longer names it: a worker holds memory to its end.
    """
    told = [row.time_s for row in samples.rows if row.process_memory_mib is not None]
    phases = [row.time_s for row in samples.rows if row.phase not in ("", "end")]
    if not told or not phases:
        return lambda row: "processes" in row.failed
    first_s, last_s = told[0], phases[-1]

    def failed(row: Sample) -> bool:
        vanished = row.listed is False and first_s < row.time_s <= last_s
        return "processes" in row.failed or vanished or (row.listed is True and row.process_memory_mib is None)

    return failed


def _process_peak(samples: Samples, idle: Sample | None) -> tuple[float | None, str]:
    """The largest memory of worker and descendants, or why the driver's list of processes does not give it."""
    if idle is not None and idle.listed:
        return None, (
            "the driver's list held the worker's number before it used the GPU: this runs in a container with a PID "
            "namespace of its own, and the number is another process's"
        )
    peak = max(samples.known("process_memory_mib"), default=0.0)
    unseen = samples.unseen("processes", *_window(samples, idle), _tolerated_s(samples), _unlisted(samples))
    if samples.silent is not None and not peak:
        return None, f"{samples.silent}; nothing was seen"
    if peak > 0:
        return (peak, "") if unseen is None else (None, f"{unseen}; {peak:.0f} MiB was the most {_then(samples)}")
    listed = [row.listed for row in samples.rows if row.listed is not None]
    if not listed:
        return None, _why(samples, "processes", "the process ended before the first sample")
    if any(listed):
        return None, "NVML lists the process but not its memory, as under WSL2 and in some containers"
    return None, (
        "NVML does not list the process: it held no GPU memory, or this runs in a container with a PID namespace of "
        "its own and NVML numbers processes as the host does"
    )


def _then(samples: Samples) -> str:
    return "that was seen" if samples.silent is None else "until then"


def _device_rise(samples: Samples, idle: Sample | None) -> tuple[float | None, str]:
    """How far the memory in use on the GPU rose above what it was before the worker touched it."""
    if idle is None or idle.device_memory_mib is None:
        return None, _why_not_at(samples, "memory", Phase.IDLE)
    later = [row.device_memory_mib for row in samples.after(Phase.IDLE) if row.device_memory_mib is not None]
    rise = max(later, default=idle.device_memory_mib) - idle.device_memory_mib
    unseen = samples.unseen("memory", *_window(samples, idle), _tolerated_s(samples))
    if unseen is not None:
        return None, f"{unseen}; a rise by {rise:.0f} MiB was the most {_then(samples)}"
    return (rise, "") if rise > 0 else (None, "memory in use on the GPU did not rise during the case")


def _headline(
    samples: Samples, process: float | None, process_reason: str, rise: float | None, rise_reason: str
) -> tuple[float | None, str | None, str]:
    """The peak that counts, how it was found, and why there is none.

    The process's own figure where there is one. Else what the GPU's use rose by, if nobody else can have had a part in
    it.
    """
    if process is not None:
        return process, PROCESS, ""
    if rise is None:
        return None, None, process_reason if process_reason == rise_reason else f"{process_reason}; and {rise_reason}"
    if not alone(samples):
        return None, None, f"{process_reason}; and other processes used the GPU, so what it rose by is not the case's"
    return rise, DEVICE, ""


def alone(samples: Samples) -> bool:
    """Whether nobody but the case can have used the GPU, as far as the driver's list of processes tells.

    In a container the worker has another number in that list: the one process that appears after the case has begun
    is then taken for it.
    """
    idle = samples.at(Phase.IDLE)
    at_idle = idle.processes if idle is not None else 0
    most = max((row.processes or 0 for row in samples.rows), default=0)
    listed = any(row.listed for row in samples.rows) and not (idle is not None and idle.listed)
    if listed:
        return not any(row.other_pids for row in samples.rows)
    pids = {pid for row in samples.rows for pid in row.other_pids or ()}
    return not at_idle and most <= 1 and len(pids) <= 1


def _at_context(idle: Sample | None, context: Sample | None, method: str | None) -> float | None:
    """Memory that CUDA's context took before anything was built, by the headline's method."""
    if context is None:
        return None
    if method == PROCESS:
        return context.process_memory_mib
    if method == DEVICE and idle is not None and None not in (idle.device_memory_mib, context.device_memory_mib):
        assert context.device_memory_mib is not None and idle.device_memory_mib is not None
        return context.device_memory_mib - idle.device_memory_mib
    return None


def _context_reason(samples: Samples, method: str) -> str:
    return _why_not_at(samples, "processes" if method == PROCESS else "memory", Phase.CONTEXT_READY)


def _why_not_at(samples: Samples, reading: str, phase: str) -> str:
    """Why a reading has no value at a phase."""
    return samples.not_at(phase) if samples.at(phase) is None else _why(samples, reading, f"NVML told none at {phase}")


def _why(samples: Samples, reading: str, otherwise: str) -> str:
    return samples.reasons.get(reading, otherwise)
