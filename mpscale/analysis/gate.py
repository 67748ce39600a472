"""What a gate is, and how its text is read: ``step_time>5%``, ``speedup[mixed-*]>=1.5``, ``metric``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mpscale.analysis.quantities import COSTS
from mpscale.core.case import Place
from mpscale.core.mode import MODES

METRIC, ACCURACY, MISSING, RATE, SPEEDUP = "metric", "accuracy", "missing", "overflow_rate", "speedup"
_OTHERS = (SPEEDUP, METRIC, ACCURACY, RATE, MISSING)
"""What a gate can be about, besides a cost."""

_NUMBER = r"[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30}"
_SHARE = rf"({_NUMBER})\s*(%?)"
_MOST = 100.0
"""The largest threshold, 10,000 %: a gate that can never fire is a mistake."""
_LONGEST, _SHOWN, _MOST_GATES = 300, 80, 1000
_GATE = re.compile(
    rf"\s*([a-z_]+)\s*(?:\[([^\[\]]*)\])?\s*(?:(>=|<=|>|<)\s*([+-]?(?:{_NUMBER})(?:e[+-]?[0-9]{{1,3}})?)\s*([a-z%]*))?\s*",
    re.IGNORECASE | re.ASCII,
)

_UNITS: dict[str, dict[str, float]] = {
    "ms": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "s": {"ms": 1e-3, "s": 1.0, "min": 60.0},
    "MiB": {"MiB": 1.0, "GiB": 1024.0},
    "J": {"mJ": 1e-3, "J": 1.0},
}
"""Units in which a limit can be written, by the unit of the quantity, with their size in it."""
_EXAMPLES = {"ms": "12ms", "s": "60s", "MiB": "8000MiB", "J": "2.5J"}


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition.

    The limit of a quantity can be written from either side: ``speedup>=1.5`` says what must hold and ``speedup<1.5``
    what must not, and both are the same gate, since it is known which direction is worse.

    Args:
        name: of a cost, or one of the names above.
        operator: ``>``, ``>=``, ``<`` or ``<=``; empty if there is no number.
        number: as it was written.
        unit: as it was written: of a cost, ``%`` is relative to the baseline; else empty, or a unit of the quantity.
        rows: pattern of the rows that it is about, see :meth:`covers`; empty for all.
    """

    name: str
    operator: str = ""
    number: float | None = None
    unit: str = ""
    rows: str = ""

    def __str__(self) -> str:
        number = "" if self.number is None else f"{self.operator}{self.number:.10g}{self.unit}"
        return f"{self.name}{f'[{self.rows}]' if self.rows else ''}{number}"

    @property
    def needs_baseline(self) -> bool:
        """Whether it judges a change; else it judges the figures of a run alone."""
        return self.number is None or (self.name in COSTS and self.unit == "%")

    @property
    def threshold(self) -> float:
        """Of a gate on a change: the share of the baseline's value."""
        return (self.number or 0.0) / 100

    @property
    def limit(self) -> float:
        """Of other gates, in the unit of the quantity."""
        number = self.number or 0.0
        if self.unit == "%":
            return number / 100
        return number * _units(self.name)[self.unit] if self.name in COSTS else number

    def holds(self, value: float, higher_is_better: bool) -> bool:
        """Whether a value is on the good side of the limit; whether the limit itself is good, the operator says."""
        if higher_is_better:
            return value > self.limit if self.operator in (">", "<=") else value >= self.limit
        return value < self.limit if self.operator in ("<", ">=") else value <= self.limit

    def covers(self, place: Place) -> bool:
        """Whether it is about a row: ``WORKLOAD/MODE``, or one of them, each with ``*`` for any characters."""
        workload, mode = _parts(self.rows)
        return _fits(place[0], workload) and _fits(place[1], mode)


def parse_gates(texts: Iterable[str]) -> list[Gate]:
    """Parse gates such as ``step_time>5%`` or ``metric``; a text may hold several, separated by commas.

    Raises:
        ValueError: a text is not a gate; the message lists the gates.
    """
    parts = [part for text in texts for part in text.split(",")]
    if len(parts) > _MOST_GATES:
        raise ValueError(f"expected at most {_MOST_GATES} gates, not {len(parts):,}")
    return list(dict.fromkeys(_parse(part) for part in parts))


def parse_share(text: str) -> float:
    """Parse a share such as ``5%``. A number without a unit is refused, as in a gate: 5 could be 5 % or 500 %.

    Raises:
        ValueError: the text is not a percentage above 0.
    """
    match = re.fullmatch(rf"\s*{_SHARE}\s*", text)
    if match is None or not 0 < float(match[1]) <= 100 * _MOST:
        given = text.strip()[:_SHOWN]
        raise ValueError(f"{given!r} is not a percentage above 0 and at most {100 * _MOST:g}%; write one such as 5%")
    if not match[2]:
        raise ValueError(f"{text.strip()!r} has no unit: the threshold is a percentage; write {_percent(match[1])}")
    return float(match[1]) / 100


def _percent(number: str) -> str:
    """Suggest what a number without a unit was meant to be."""
    value = float(number)
    return f"{value:g}%" if value >= 1 else f"{100 * value:g}%, or {value:g}% if you mean that"


def _parse(text: str) -> Gate:
    match, given = _GATE.fullmatch(text) if len(text) <= _LONGEST else None, repr(text.strip()[:_SHOWN])
    examples = ", ".join([*(f"{name}>5%" for name in COSTS), *(f"{name}{limit}" for name, limit in _LIMITS.items())])
    examples = f"{examples}, {METRIC}, {MISSING}; for some rows only, {SPEEDUP}[mixed-*]>=1.5"
    if match is None:
        raise ValueError(
            f"{given} is not a gate; the gates are {examples}. A limit has one of > >= < <=, a number and a unit"
        )
    name, rows, operator, number, unit = match.groups()
    if name not in (names := (*COSTS, *_OTHERS)):
        close = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name!r} is not a gate{hint}; the gates are {examples}")
    if rows is not None:
        rows = _checked_rows(rows.strip(), given)
    if number is None:
        if name not in (METRIC, MISSING):
            raise ValueError(f"{given} lacks a threshold; write {name}{'>5%' if name in COSTS else _LIMITS[name]}")
        return Gate(name, rows=rows or "")
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{given}: the number is too large")
    if name == MISSING:
        raise ValueError(f"{given}: {name} takes no threshold; write {name}")
    unit = _checked_cost(name, value, unit, given) if name in COSTS else _checked_number(name, value, unit, given)
    return Gate(name, operator, value, unit, rows or "")


_LIMITS = {
    "step_time": "<=12ms", "gpu_memory": "<=8000MiB", SPEEDUP: ">=1.5", METRIC: ">=0.95", ACCURACY: ">=95%",
    RATE: ">0.01",
}  # fmt: skip
"""Examples of limits."""


def _units(name: str) -> dict[str, float]:
    """The units in which a limit of a cost can be written."""
    unit = COSTS[name].unit
    return _UNITS.get(unit, {unit: 1.0})


def _checked_cost(name: str, value: float, unit: str, given: str) -> str:
    """Check the number of a gate on a cost; return its unit as it is spelled."""
    units = _units(name)
    limit = f"{name}<={_EXAMPLES.get(COSTS[name].unit, f'100{COSTS[name].unit}')}"
    if unit == "%":
        if value < 0:
            raise ValueError(f"{given}: a threshold is at least 0%; write {name}>5%")
        if value / 100 > _MOST:
            raise ValueError(f"{given}: a threshold is at most {100 * _MOST:g}%: such a gate would never fire")
        return unit
    if not unit:
        raise ValueError(
            f"{given} has no unit: for a percentage of the baseline, write {name}>{_percent(str(abs(value)))}; for a "
            f"limit, write one in {' or '.join(units)}, such as {limit}"
        )
    spelled = next((known for known in units if known.lower() == unit.lower()), None)
    if spelled is None:
        raise ValueError(f"{given}: {unit!r} is no unit of it; write %, {' or '.join(units)}, such as {limit}")
    if value <= 0:
        raise ValueError(f"{given}: a limit is above 0, such as {limit}")
    return spelled


def _checked_number(name: str, value: float, unit: str, given: str) -> str:
    """Check the number of a gate on anything else; return its unit."""
    allowed, why = {
        SPEEDUP: (("", "x"), "a speed-up is a ratio"),
        METRIC: (("",), f"a limit of a metric is in its own unit, and {METRIC} alone compares with the baseline"),
        ACCURACY: (("", "%"), "an accuracy is at most 1"),
        RATE: (("", "%"), "a rate is at most 1"),
    }[name]
    share = value / 100 if unit == "%" else value
    if unit not in allowed or (name in (ACCURACY, RATE) and share > 1):
        raise ValueError(f"{given}: {why}; write {name}{_LIMITS[name]}")
    if value < 0 if name == RATE else value <= 0 and name != METRIC:
        raise ValueError(f"{given}: such a gate would never fire; write {name}{_LIMITS[name]}")
    return unit


def _checked_rows(rows: str, given: str) -> str:
    """Check the pattern of rows; return it.

    Raises:
        ValueError: it is empty, or no mode fits.
    """
    workload, mode = _parts(rows) if rows else ("", "")
    if not workload or not mode:
        raise ValueError(
            f"{given}: between [ and ] goes a workload, a mode, or workload/mode, with * for any characters, such as "
            "[signs/mixed-*]"
        )
    if not _is_of_modes(mode):
        close: Sequence[str] = difflib.get_close_matches(mode, MODES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{given}: no mode is called {mode!r}{hint}; the modes are {', '.join(MODES)}")
    return rows


def _parts(rows: str) -> tuple[str, str]:
    """The patterns of the workload and of the mode. A single one is of the modes if a mode fits."""
    if not rows:
        return "*", "*"
    workload, slash, mode = rows.rpartition("/")
    if slash:
        return workload.strip(), mode.strip()
    return ("*", rows) if _is_of_modes(rows) else (rows, "*")


def _is_of_modes(pattern: str) -> bool:
    return any(fnmatchcase(name, pattern.partition(" @")[0]) for name in MODES)


def _fits(name: str, pattern: str) -> bool:
    """Whether a name fits; in a sweep also without the batch or the loss scale that tables add to it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition(" @")[0], pattern)
