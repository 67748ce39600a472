"""Workloads that go on without XLA because it refused one of their cases (`--mp-jit auto`): all modes alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mpscale.core.case import Case, Settings, Variant
from mpscale.core.cause import Cause
from mpscale.core.journal import SWEPT
from mpscale.core.mode import MODES
from mpscale.core.record import Record

SLOW_FLOAT16 = "float16 without XLA can take a hundred times as long on a CPU"


def without_xla(case: Case) -> Case:
    """The same case, compiled without XLA."""
    return replace(case, settings=replace(case.settings, jit=False))


def refused(case: Case, record: Record) -> bool:
    """Whether a case failed because XLA refuses it."""
    return case.settings.jit and record.cause is Cause.XLA_REFUSED


def is_slow(modes: Iterable[str], device: str) -> bool:
    """Whether one of the modes is emulated without XLA, at a great cost. ``device``: ``cpu`` or ``gpu``."""
    return device == "cpu" and any("float16" in MODES[mode].policy for mode in modes)


class WithoutXla:
    """Which workloads of a run go on without XLA.

    Args:
        allowed: whether any may; with `--mp-jit on` none may.
        interleaved: whether the run takes turns with another one. Cases that have had their turn cannot be measured
            again beside their partners, so a workload may then only go on without XLA if it has none yet.
        known: what XLA refused before the run was stopped, by workload.
    """

    def __init__(self, allowed: bool, interleaved: bool, known: Mapping[str, str]) -> None:
        self._allowed, self._interleaved = allowed, interleaved
        self._what = dict(known) if allowed else {}

    def what(self, case: Case) -> str | None:
        """What XLA refused of the case's workload, for the column ``xla_refused``; None if nothing."""
        return self._what.get(case.workload)

    def applied_to(self, case: Case) -> Case:
        """The case as it is to run."""
        return without_xla(case) if case.workload in self._what else case

    def begin(self, case: Case, record: Record, records: Iterable[Record]) -> bool:
        """Take a case that XLA refused; return whether its workload goes on without XLA.

        Args:
            case: that failed.
            record: its row, which gets a cure if the workload does not go on.
            records: of the run so far.
        """
        if not self._allowed:
            cure = "--mp-jit auto runs all modes of such a workload without XLA, and --mp-jit off all workloads"
        elif self._interleaved and any(is_outdated(other, case.workload) for other in records):
            cure = (
                "other cases of the workload have been measured with XLA beside those of the other run, which cannot "
                "be repeated in a turn: use --mp-jit off"
            )
        else:
            self._what[case.workload] = what_of(record)
            return True
        record.update({"status_reason": f"{record['status_reason']}. {cure}"})
        return False


def what_of(record: Record) -> str:
    """What XLA refused in a case, and in which mode it did so first, for all rows of the workload."""
    return f"{record['xla_refused'] or 'an operation'}, first in {record.place[1]}"


def is_outdated(record: Record, workload: str) -> bool:
    """Whether a case was run with XLA, so that it must run again if its workload goes on without XLA.

    Failures are no exception: without XLA it may run out of memory or of time elsewhere, or not at all.
    """
    done = record["status"] not in (None, "interrupted") and record.cause not in (Cause.OTHER_COMPILER, Cause.GPU_LOST)
    return bool(record["workload"] == workload and record["jit"] and done and record.cause is not Cause.XLA_REFUSED)


def outdated(record: Record, what: str) -> Record:
    """The record of a case that was measured with XLA and counts only if it is measured again."""
    found = record.copy()
    said = f"it was measured with XLA, which then refused its workload ({what}): it counts only without XLA"
    found.end("invalid", said, Cause.OTHER_COMPILER)
    return found


def case_of(record: Record, settings: Settings) -> Case:
    """The case of a record.

    Args:
        record: of the run.
        settings: of another case of its workload; what a sweep varies is replaced.
    """
    variant = Variant(*(record[name] for name in SWEPT))
    which = (record["workload"], record["mode"], record["seed"], record["repeat"], record["order"] or 0)
    return Case(*which, variant.applied_to(settings), variant)
