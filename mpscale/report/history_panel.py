"""A small panel of a history: one series as a drawing in SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mpscale.analysis.history import Point, Series
from mpscale.analysis.quantities import Quantity, Verdict
from mpscale.analysis.stats import Between
from mpscale.analysis.versions import in_words
from mpscale.report.history import shown_change, shown_commit, shown_single, shown_value
from mpscale.report.pieces import text, tone_of
from mpscale.report.table import number, plural
from mpscale.report.words import AGAINST_RUN

_WIDTH, _TOP, _BOTTOM, _HEIGHT = 280.0, 8.0, 92.0, 110.0
_LEFT, _RIGHT = 62.0, 272.0
"""Of the drawing, in its own units."""

MOST_DOTS = 150
"""Above this, points are drawn as bars, each for several runs."""

_BARS = 75

_LEAST_RANGE = 0.1
"""An axis of a cost reaches at least this share above and below the median, so that noise does not look like news."""


@dataclass(frozen=True)
class Step:
    """A change against the run before it that is beyond noise.

    Args:
        place: of the point in the series' known points.
        verdict: of the comparison of the two runs.
    """

    place: int
    verdict: Verdict


@dataclass(frozen=True)
class Band:
    """Where 95 % of runs of the same code are expected.

    Args:
        low: lower end, in the unit of the quantity.
        high: upper end.
        limit: the noise floor, as :attr:`Between.limit`.
        runs: how many runs it was measured from.
    """

    low: float
    high: float
    limit: float
    runs: int


def band_of(points: Sequence[Point], names: Sequence[str], floor: Between | None) -> Band | None:
    """The noise band around the runs that a noise floor was measured from; None if there is no floor.

    Args:
        points: those with a value.
        names: of those runs.
        floor: the noise floor of the row.
    """
    values = [point.value for point in points if point.run.name in names and point.value]
    if floor is None or not floor.runs or not values:
        return None
    centre = statistics.geometric_mean(values)
    # The limit is on the difference of two runs, and one run differs less from their mean.
    factor = (1 + floor.limit) ** math.sqrt(0.5)
    return Band(centre / factor, centre * factor, floor.limit, floor.runs)


def panel_svg(measure: Quantity, series: Series, steps: Sequence[Step], band: Band | None) -> str:
    """Draw a series that has at least one value.

    Args:
        measure: the quantity.
        series: the series.
        steps: what to mark.
        band: the noise band; None if it is not known.
    """
    points = [point for point in series.points if point.value is not None]
    values = [point.value for point in points if point.value is not None]
    bottom, top = _limits(measure, points, band)
    shown = shown_single(measure, series) if measure.spread == "range" else _with_unit(measure)

    def x(place: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (place / (len(points) - 1) if len(points) > 1 else 0.5)

    def y(value: float) -> float:
        share = (min(max(value, bottom), top) - bottom) / (top - bottom)
        return _BOTTOM - (_BOTTOM - _TOP) * share

    parts = []
    if band is not None:
        high, low = y(band.high), y(band.low)
        parts.append(
            f'<rect class="floor" x="{_LEFT - 6:g}" y="{high:.1f}" width="{_WIDTH - _LEFT + 6:g}" '
            f'height="{max(low - high, 1):.1f}">'
            f"<title>{text(f'noise band: 95 % of runs of this code, from {band.runs} runs')}</title></rect>"
        )
    if len(points) <= MOST_DOTS:
        parts += _ribbon(points, x, y)
        path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in enumerate(values))
        parts.append(f'<polyline class="line" points="{path}"/>')
        dots: Iterator[int] = iter(range(len(points)))
    else:
        parts += _bars(points, shown, x, y)
        dots = iter([len(points) - 1])
    parts += [_version(x(place), point) for place, point in enumerate(points) if point.versions]
    marks = {step.place: step.verdict for step in steps}
    radius = 3.0 if len(points) <= 60 else 2.0
    for place in dots:
        if place not in marks:
            kind = "dot part" if points[place].is_incomplete else "dot"
            parts.append(_dot(kind, x(place), y(values[place]), radius, said(measure, series, points[place])))
    for place, verdict in marks.items():
        up = place > 0 and values[place] > values[place - 1]
        words = f"{said(measure, series, points[place])}: {AGAINST_RUN[verdict]}"
        parts.append(_triangle(x(place), y(values[place]), up, f"{tone_of(verdict)}", words))
    return (
        f'<svg class="series" role="img" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}"><title>{text(_summary(series, points))}'
        f'</title><path class="axis" d="M{_LEFT - 6:g} {_BOTTOM + 2:g}H{_WIDTH:g}"/>{"".join(parts)}'
        f'<text class="tick" x="0" y="{_TOP + 4:g}">{text(shown(top))}</text>'
        f'<text class="tick" x="0" y="{_BOTTOM + 4:g}">{text(shown(bottom))}</text>{_dates(points)}</svg>'
    )


def said(measure: Quantity, series: Series, point: Point) -> str:
    """A point in words."""
    facts = [when(point), point.run.shown, shown_commit(point.run), shown_value(measure, series, point)]
    if point.change is not None:
        facts.append(f"{shown_change(point)} against the value before")
    if point.versions:
        facts.append(f"another version of the model: {in_words(point.versions)}")
    if point.reason:
        facts.append(point.reason)
    return " · ".join(facts)


def when(point: Point) -> str:
    """The date of a point, UTC."""
    return f"{point.run.started:%Y-%m-%d %H:%M}" if point.run.started else "date unknown"


def _summary(series: Series, points: Sequence[Point]) -> str:
    return f"{series.workload} {series.label}: {plural(len(points), 'run')}"


def _with_unit(measure: Quantity) -> Callable[[float | None], str]:
    unit = measure.unit if measure.unit == "x" else f" {measure.unit}"
    return lambda value: f"{number(value)}{unit}"


def _limits(measure: Quantity, points: Sequence[Point], band: Band | None) -> tuple[float, float]:
    """Bottom and top of the axis: all values, and as much of the intervals as does not dwarf them."""
    values = [point.value for point in points if point.value is not None]
    ends = [end for point in points for end in (point.low, point.high) if end is not None and math.isfinite(end)]
    ends += [] if band is None else [band.low, band.high]
    low, high = min(values), max(values)
    if measure.spread == "interval":
        middle = statistics.median(values)
        low, high = min(low, middle * (1 - _LEAST_RANGE)), max(high, middle * (1 + _LEAST_RANGE))
        room = high - low
        return max(min([low, *ends]), low - room / 2, 0.0), min(max([high, *ends]), high + room / 2)
    low, high = min([low, *ends]), max([high, *ends])
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.01
    return low - margin if low else 0.0, high + margin


def _ribbon(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[str]:
    """The intervals as a band, broken where a run has none; a run between two without one has a bar."""
    group: list[tuple[float, float, float]] = []
    for place, point in enumerate([*points, None]):
        if point is not None and point.low is not None and point.high is not None:
            group.append((x(place), y(point.low), y(point.high)))
            continue
        if len(group) == 1:
            (at, low, high) = group[0]
            yield f'<path class="ribbon one" d="M{at:.1f} {low:.1f}V{high:.1f}"/>'
        elif group:
            upper = " ".join(f"{at:.1f},{high:.1f}" for at, _, high in group)
            lower = " ".join(f"{at:.1f},{low:.1f}" for at, low, _ in reversed(group))
            yield f'<polygon class="ribbon" points="{upper} {lower}"/>'
        group = []


def _bars(
    points: Sequence[Point],
    shown: Callable[[float | None], str],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> Iterator[str]:
    """A bar from the smallest to the largest value of several runs, with a mark at their median."""
    size = math.ceil(len(points) / _BARS)
    wide = max(1.0, (_RIGHT - _LEFT) / math.ceil(len(points) / size) - 1)
    for start in range(0, len(points), size):
        some = points[start : start + size]
        values = [point.value for point in some if point.value is not None]
        at = x(start + (len(some) - 1) / 2)
        low, high, middle = y(min(values)), y(max(values)), y(statistics.median(values))
        words = f"{plural(len(some), 'run')}, {when(some[0])} to {when(some[-1])}: {shown(min(values))} to "
        words += f"{shown(max(values))}, median {shown(statistics.median(values))}"
        yield (
            f'<g><title>{text(words)}</title><rect class="bin" x="{at - wide / 2:.1f}" y="{high:.1f}" '
            f'width="{wide:.1f}" height="{max(low - high, 1):.1f}"/>'
            f'<path class="line" d="M{at - wide / 2:.1f} {middle:.1f}h{wide:.1f}"/></g>'
        )


def _dot(kind: str, x: float, y: float, radius: float, words: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{text(words)}</title></circle>'


def _triangle(x: float, y: float, up: bool, tone: str, words: str) -> str:
    away = -9 if up else 9
    shape = f"M{x:.1f} {y + away / 2:.1f}l5 {-away}h-10z"
    return f'<path class="step {tone}" d="{shape}"><title>{text(words)}</title></path>'


def _version(x: float, point: Point) -> str:
    """A line from top to bottom where another version of the model begins."""
    words = f"another version of the model: {in_words(point.versions)}"
    line = f'<path class="axis" stroke-dasharray="2 2" d="M{x:.1f} {_TOP:g}V{_BOTTOM:g}">'
    return f"{line}<title>{text(words)}</title></path>"


def _dates(points: Sequence[Point]) -> str:
    days = [f"{point.run.started:%Y-%m-%d}" if point.run.started else "" for point in (points[0], points[-1])]
    y = f"{_HEIGHT - 4:g}"
    if len(points) == 1 or days[0] == days[1]:
        return f'<text class="tick" x="{_LEFT - 6:g}" y="{y}">{days[0]}</text>'
    return (
        f'<text class="tick" x="{_LEFT - 6:g}" y="{y}">{days[0]}</text>'
        f'<text class="tick" x="{_WIDTH:g}" y="{y}" text-anchor="end">{days[1]}</text>'
    )


def worst_of(measure: Quantity, points: Sequence[Point], higher_is_better: bool | None) -> int | None:
    """The place of the worst value; None if it is not known which direction is worse.

    Args:
        measure: the quantity.
        points: those with a value.
        higher_is_better: the direction of the metric; of no use for other quantities.
    """
    if measure.name == "metric":
        up: bool | None = None if higher_is_better is None else not higher_is_better
    else:
        up = measure.name != "speedup"
    if up is None:
        return None
    sign = 1 if up else -1
    return max(range(len(points)), key=lambda place: (sign * (points[place].value or 0.0), place))


def known(series: Series) -> list[Point]:
    """The points that have a value."""
    return [point for point in series.points if point.value is not None]
