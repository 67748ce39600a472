"""Watch a case that uses several GPUs, in one process or in one for each: a watch of each GPU, one set of columns."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpscale.core.columns import COLUMNS, Source, Topic, measured_columns
from mpscale.core.device import Device
from mpscale.core.reason import Reason
from mpscale.core.record import Findings
from mpscale.telemetry.client import Driver
from mpscale.telemetry.gpu_memory import HEADLINE
from mpscale.telemetry.gpu_state import Suspicion
from mpscale.telemetry.watch import CaseWatch, WatchResult, WorkerFacts

_LOWEST = ("gpu_sm_clock_mhz_median", "gpu_memory_clock_mhz_median", "gpu_utilization_median")
"""What replicas wait for: the GPU with the least of it."""


class ReplicaWatch:
    """Watches one process after another on all GPUs of a run, with the methods of :class:`CaseWatch`.

    Each GPU has a monitor of its own, since a monitor watches one at a time.

    Args:
        driver: of the GPUs; it watches the first.
        device: the first GPU, which names those beside it.
        pair: as of :class:`CaseWatch`.
    """

    def __init__(self, driver: Driver, device: Device, pair: str | None = None) -> None:
        self._more = [driver.another() for _ in device.beside]
        drivers = [driver, *self._more]
        self._watches = [CaseWatch(*each, pair) for each in zip(drivers, device.apart(driver.devices), strict=True)]

    def start(
        self, pid: int, epoch: float, keeper: int | None = None, beside: Sequence[tuple[int, int | None]] = ()
    ) -> None:
        """Begin to watch a process on all GPUs, or one process on each; arguments as of :meth:`CaseWatch.start`."""
        each = dict(enumerate([(pid, keeper), *beside] if beside else []))
        for place, watch in enumerate(self._watches):
            own, parent = each.get(place, (pid, keeper))
            # Memory and time of the host are those of the first watch.
            watch.start(own, epoch, parent, [] if place else beside)

    def mark(self, phase: str) -> None:
        """Take a sample of each GPU now."""
        for watch in self._watches:
            watch.mark(phase)

    def stop(self, worker: WorkerFacts, keep: Path | None) -> WatchResult:
        """End the watch. The samples of further GPUs are stored beside those of the first.

        Args:
            worker: what the worker contributes, also on how many of the GPUs it used.
            keep: where to store the samples of the first GPU; None discards them all.
        """
        paths = [keep, *(keep and _beside(keep, number) for number in range(1, len(self._watches)))]
        seen = [watch.stop(worker, path) for watch, path in zip(self._watches, paths, strict=True)][: worker.replicas]
        if len(seen) == 1:
            return seen[0]
        result = WatchResult(
            Findings(dict(seen[0].findings.values), dict(seen[0].findings.unavailable)),
            list({one.reason: one for each in seen for one in each.suspicions}.values()),
            any(each.lost for each in seen),
            next((each.not_kept for each in seen if each.not_kept is not None), None),
        )
        _put_together(result.findings, [each.findings for each in seen])
        return result

    def has_power(self) -> bool:
        """Whether every GPU reports energy or power."""
        return all(watch.has_power() for watch in self._watches)

    def cool_down(self, seconds: float) -> None:
        """Wait until all GPUs are fit for measurements, for at most ``seconds`` each."""
        for watch in self._watches:
            watch.cool_down(seconds)

    def close(self) -> None:
        """Remove temporary files and notes, and end the monitors of the further GPUs."""
        with contextlib.ExitStack() as stack:
            for watch in self._watches:
                stack.callback(watch.close)
            for driver in self._more:
                stack.callback(driver.close)


def with_other_machines(seen: WatchResult, others: Sequence[tuple[Findings, str | None]]) -> WatchResult:
    """Add what was seen of the GPUs of other machines during the same case.

    Args:
        seen: on this machine.
        others: on each other one, and why its figures must not be used.
    """
    findings = Findings(dict(seen.findings.values), dict(seen.findings.unavailable))
    _put_together(findings, [seen.findings, *(found for found, _ in others)])
    suspicions = [*seen.suspicions, *(Suspicion(why, True) for _, why in others if why is not None)]
    return WatchResult(findings, suspicions, seen.lost, seen.not_kept)


def _put_together(result: Findings, found: Sequence[Findings]) -> None:
    """Replace the monitor's columns by those of several GPUs as one set."""
    joined = together(found)
    for column in measured_columns(source=Source.MONITOR):
        result.values.pop(column, None)
        result.unavailable.pop(column, None)
    result.add(joined)


def _beside(path: Path, number: int) -> Path:
    return path.with_name(path.name.replace(".jsonl.gz", f"--gpu{number}.jsonl.gz"))


def together(found: Sequence[Findings]) -> Findings:
    """The monitor's columns of several GPUs as one set.

    Energy and power are sums. Memory is that of the GPU with the largest peak, whose figures belong together. Clocks
    and utilization are the lowest of any GPU, other numbers the highest; texts are listed. A column that one of them
    lacks has its reason.
    """
    result = Findings()
    peaks = [each.values.get(HEADLINE) for each in found]
    told = {column for each in found for column in (*each.values, *each.unavailable)}
    for column in measured_columns(source=Source.MONITOR):
        if column not in told:
            continue
        missing = next((each.unavailable[column] for each in found if column in each.unavailable), None)
        if missing is not None and column not in measured_columns(Topic.MEMORY):
            result.put(column, missing)
        elif column in measured_columns(Topic.MEMORY):
            result.put(column, _of_the_largest(column, found, peaks))
        elif values := [each.values[column] for each in found if column in each.values]:
            result.put(column, _one_of(column, values))
    return result


def _of_the_largest(column: str, found: Sequence[Findings], peaks: Sequence[float | None]) -> Any | Reason:
    unknown = next((each.unavailable[HEADLINE] for each, peak in zip(found, peaks, strict=True) if peak is None), None)
    if unknown is not None:
        return unknown.worded(f"which GPU has the largest peak is unknown: {unknown}")
    largest = found[max(range(len(found)), key=lambda place: peaks[place] or 0.0)]
    return largest.values[column] if column in largest.values else largest.unavailable[column]


def _one_of(column: str, values: Sequence[Any]) -> Any:
    if not isinstance(values[0], int | float) or isinstance(values[0], bool):
        return ", ".join(dict.fromkeys(map(str, values)))
    if COLUMNS[column].unit in ("J", "W"):
        return sum(values)
    return min(values) if column in _LOWEST else max(values)
