"""What is found about a case, as columns of its record."""

from __future__ import annotations

from mpscale.core.columns import LARGEST
from mpscale.core.processes.events import Channel
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings


def put(found: Findings, column: str, value: float | None, missing: Reason) -> None:
    """Put a figure if it is finite, otherwise the reason why not; ``missing`` is the reason if there is no value."""
    if value is not None and is_finite(value):
        found.values[column] = value
    else:
        found.miss([column], missing if value is None else Reason(Code.NOT_FINITE, "not finite"))


def is_finite(value: float) -> bool:
    """Whether a column can hold it: a perplexity of 1e130 says no more than an infinite one."""
    return abs(value) <= LARGEST


def report(channel: Channel, found: Findings) -> None:
    """Report all of it, and the reasons of what is missing."""
    channel.values(found.values)
    for column, reason in found.unavailable.items():
        channel.miss([column], reason)
