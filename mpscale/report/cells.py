"""Numbers as text, the same in every table. None is unknown and becomes a dash."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

DASH = "–"  # noqa: RUF001
_PERCENT_METRICS = ("accuracy",)


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, without an exponent where that stays readable."""
    if value is None:
        return DASH
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    return f"{value:.{_decimals(value, digits)}f}"


def interval(
    estimate: float | None, low: float | None, high: float | None, unit: str, decimals: int | None = None
) -> str:
    """``7.91 [7.80, 8.02] ms``: the ends to the decimals of the estimate, left out where they are unknown.

    Args:
        estimate: the number itself.
        low: lower end of its interval, None where one process cannot give it.
        high: upper end, likewise.
        unit: put behind; give it a leading space if one belongs there.
        decimals: fixed; without, as many as show three digits of the estimate.
    """
    if estimate is None:
        return DASH
    places = _decimals(estimate, 3) if decimals is None else decimals
    if low is None or high is None:
        return f"{estimate:.{places}f}{unit}"
    ends = f"[{low:.{places}f}, {high:.{places}f}]"
    # "7.91 [7.80, 8.02] ms", but "0.98x [0.95, 1.01]".
    return f"{estimate:.{places}f} {ends}{unit}" if unit.startswith(" ") else f"{estimate:.{places}f}{unit} {ends}"


def count(value: float | None) -> str:
    """A whole number."""
    return DASH if value is None else f"{value:.0f}"


def share(value: float | None, decimals: int = 0) -> str:
    """A share of 1 as percent."""
    return DASH if value is None else f"{100 * value:.{decimals}f} %"


def metric(value: float | None, name: str | None) -> str:
    """A workload's metric, as percent where it is an accuracy."""
    return share(value, 2) if name in _PERCENT_METRICS else number(value, 4)


def metric_change(difference: float, name: str | None) -> str:
    """A difference between two values of a metric, in words."""
    if name in _PERCENT_METRICS:
        size, rounded = f"{abs(100 * difference):.2f} points", round(100 * difference, 2)
    else:
        size, rounded = number(abs(difference), 3), difference
    return "no different from" if rounded == 0 else f"{size} {'above' if difference > 0 else 'below'}"


def difference(value: float | None, low: float | None, high: float | None, name: str | None) -> str:
    """A difference between two values of a metric, with its interval; in points where it is an accuracy."""
    if value is None:
        return DASH
    factor, unit = (100, " points") if name in _PERCENT_METRICS else (1, "")

    def text(number: float) -> str:
        return f"{factor * number:+.2f}" if unit else f"{number:+.3g}"

    ends = "" if low is None or high is None else f" [{text(low)}, {text(high)}]"
    return f"{text(value)}{ends}{unit}"


def size(value: float | None, name: str | None) -> str:
    """The size of a difference between two values of a metric, in points where it is an accuracy."""
    if value is None:
        return DASH
    if name not in _PERCENT_METRICS:
        return number(value)
    return f"{100 * value:g} point{'' if 100 * value == 1 else 's'}"


def loss_scale(value: float | None) -> str:
    """A loss scale: mostly a power of two, and then in full."""
    if value is None:
        return DASH
    return f"{value:.0f}" if abs(value) < 1e9 and value == int(value) else f"{value:.6g}"


def span(texts: Iterable[str]) -> str:
    """The first and the last of some texts in order, or the one there is."""
    seen = [text for text in texts if text != DASH]
    if not seen:
        return DASH
    return seen[0] if seen[0] == seen[-1] else f"{seen[0]} to {seen[-1]}"


def statuses(row: Mapping[str, Any]) -> str:
    """What became of the cases of a row of the summary: how many ended how, and how many were not started."""
    waiting = f"not started {row['not_started']}" if row["not_started"] else ""
    return ", ".join(filter(None, (row["statuses"], waiting)))


def of_seeds(known: int, row: Mapping[str, Any]) -> str:
    """`` (4 of 5 seeds)`` behind a figure that not all seeds of a row of the summary are in, else nothing."""
    return f" ({known} of {row['seeds_planned']} seeds)" if known < row["seeds_planned"] else ""


def of_processes(known: int, row: Mapping[str, Any]) -> str:
    """The same for processes."""
    there = row["cases"] + row["not_started"]
    return f" ({known} of {there} processes)" if known < there else ""


def _decimals(value: float, digits: int) -> int:
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
