"""Whether a ratio of step times may be called a speed-up. Words, tables and pictures all ask here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from mpscale.core.columns import COLUMNS
from mpscale.core.record import Record, values_of

MOSTLY_IDLE = 0.5
"""The share of a step for which the GPU must compute, the counterpart of the limit of ``dispatch_bound``.

What a mode changes is the time of the kernels. If they fill half of a step and get twice as fast, the step gets 1.33
times as fast at most, so over half of the gain is hidden; and if the host is what the GPU waits for, all of it is.
"""

_BUSY = COLUMNS["host_other_cpu_share"]


class Doubt(StrEnum):
    """Why a ratio of step times does not show what a mode does. The text is for people."""

    text: str

    IDLE = "device-idle", "the GPU was idle for most of a step"
    DISPATCH = "dispatch-bound", "dispatch in Python and TensorFlow took over half of a step"
    BUSY = "busy-machine", "other processes kept the machine busy"
    ONE_PAIR = "one-pair", "there is only one pair of processes"

    def __new__(cls, code: str, text: str) -> Doubt:
        member = str.__new__(cls, code)
        member._value_ = code
        member.text = text
        return member


TOO_SMALL = frozenset({Doubt.IDLE, Doubt.DISPATCH})
"""Doubts that a larger batch removes, or several steps per call."""


def mostly(flags: Sequence[bool]) -> bool:
    """Whether more than half are set: one disturbed process says nothing about the mode."""
    return 2 * sum(flags) > len(flags)


def conditions(cases: Iterable[Record]) -> dict[str, Any]:
    """The conditions under which a mode was timed, as columns of the summary: medians over processes, None if unknown.

    Args:
        cases: of one workload and mode, without lost trainings.
    """
    cases = list(cases)

    def median(column: str) -> float | None:
        known = values_of(cases, column)
        return statistics.median(known) if known else None

    bound = values_of(cases, "dispatch_bound")
    return {
        "device_busy_share": median("device_busy_share"),
        "gpu_utilization": median("gpu_utilization_median"),
        "dispatch_share": median("dispatch_share"),
        "dispatch_bound": mostly(bound) if bound else None,
        "host_other_cpu_share": median(_BUSY.name),
        "input_wait_share": median("input_wait_share"),
    }


def busy_share(row: Mapping[str, Any]) -> float | None:
    """The share of a step for which the GPU computed; without a profile, what the driver says of the timed window.

    Args:
        row: has the :func:`conditions`.
    """
    share, percent = row["device_busy_share"], row["gpu_utilization"]
    if share is not None:
        return float(share)
    return None if percent is None else percent / 100


def find_doubts(own: Mapping[str, Any], baseline: Mapping[str, Any], pairs: int) -> list[Doubt]:
    """Return what speaks against a claim about the speed of a mode; empty if it may be claimed.

    Args:
        own: the mode's :func:`conditions`.
        baseline: those of the mode that it is compared with, which count as much.
        pairs: of processes.
    """
    sides, limit = (own, baseline), _BUSY.warn_above or 1.0
    found = {
        Doubt.IDLE: any((share := busy_share(side)) is not None and share < MOSTLY_IDLE for side in sides),
        Doubt.DISPATCH: any(side["dispatch_bound"] for side in sides),
        Doubt.BUSY: any((side[_BUSY.name] or 0.0) > limit for side in sides),
        Doubt.ONE_PAIR: pairs == 1,
    }
    return [doubt for doubt, there in found.items() if there]


def doubts_of(row: Mapping[str, Any], baseline: str) -> list[Doubt]:
    """Return the doubts that a row of the summary has noted about its speed-up over ``baseline``."""
    codes = (row[f"speedup_{baseline}_doubts"] or "").split()
    return [doubt for doubt in Doubt if doubt in codes]
