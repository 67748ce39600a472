"""Small bars beside the numbers of a page's tables: lengths, ratios with their interval, differences with a margin.

They are drawn in the colour of the text and show nothing that the number beside them does not say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mpscale.report.pieces import text as escape

_WIDTH, _HEIGHT, _EDGE = 84, 14, 5
_MARGINS = 3
"""Margins to either side of no difference."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Places on an axis from 0 to 1. What lies beyond its ends is drawn as an arrow.

    Args:
        at: the figure.
        ends: of its interval; None if a single process cannot give it.
        line: where the figure says that nothing differs; None for a length, which begins at 0.
        band: what counts as no difference.
        says: what the axis is, in a sentence.
    """

    at: float
    ends: tuple[float, float] | None = None
    line: float | None = None
    band: tuple[float, float] | None = None
    says: str = ""

    def svg(self) -> str:
        """Return the picture."""
        parts = [f"<title>{escape(self.says)}</title>"] if self.says else []
        parts += self._length() if self.line is None else self._point(self.line)
        return (
            f'<svg class="inline" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">'
            f"{''.join(parts)}</svg>"
        )

    def _length(self) -> list[str]:
        end = _x(self.at)
        return [_rect(_x(0), _x(1), 4, 6, "track"), _rect(_x(0), max(end, _x(0) + 1), 4, 6, "fill")]

    def _point(self, line: float) -> list[str]:
        parts = [_rect(_x(0), _x(1), 6.5, 1, "track")]
        if self.band is not None:
            parts.append(_rect(_x(self.band[0]), _x(self.band[1]), 0, _HEIGHT, "band"))
        parts.append(_rect(_x(line) - 0.5, _x(line) + 0.5, 0, _HEIGHT, "line"))
        low, high = self.ends or (self.at, self.at)
        parts.append(_rect(_x(low), _x(high), 5, 4, "ends"))
        if 0 <= self.at <= 1:
            parts.append(_rect(_x(self.at) - 1.5, _x(self.at) + 1.5, 2, 10, "fill"))
        for is_beyond, tip, base in ((low < 0, 0, _EDGE), (high > 1, _WIDTH, _WIDTH - _EDGE)):
            if is_beyond:
                parts.append(f'<path d="M{tip} 7L{base} 2.5V11.5Z"/>')
        return parts


def _x(place: float) -> float:
    return round(_EDGE + min(1.0, max(0.0, place)) * (_WIDTH - 2 * _EDGE), 1)


def _rect(left: float, right: float, top: float, height: float, kind: str) -> str:
    width = round(max(0.0, right - left), 1)
    return f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"/>'


def length(value: float, longest: float, of: str) -> Bar | None:
    """Draw a figure as a bar from 0; None if it has no length.

    Args:
        value: not negative.
        longest: the value that fills the bar.
        of: what the longest bar is that of.
    """
    known = math.isfinite(value) and math.isfinite(longest) and longest > 0
    return Bar(value / longest, says=f"A full bar is {of}.") if known else None


def widest(ratios: Iterable[float]) -> float:
    """Return the ratio at the end of an axis for ratios: a power of two, at least 2 and at most 16."""
    logs = [abs(math.log2(ratio)) for ratio in ratios if ratio > 0 and math.isfinite(ratio)]
    return 2.0 ** min(4, max(1, math.ceil(max(logs, default=1) - 1e-9)))


def ratio(value: float, ends: tuple[float, float] | None, widest: float) -> Bar | None:
    """Draw a ratio with its interval on a logarithmic axis; None if it is not positive.

    Args:
        value: the ratio.
        ends: of its interval.
        widest: where the axis ends; see :func:`widest`.
    """
    if not (value > 0 and math.isfinite(value)):
        return None

    def place(number: float) -> float:
        return 0.5 + (math.log(number) / math.log(widest) / 2 if number > 0 else -math.inf)

    says = f"Logarithmic, from 1/{widest:g} to {widest:g}; the line is 1, as fast."
    return Bar(place(value), None if ends is None else (place(ends[0]), place(ends[1])), line=0.5, says=says)


def difference(value: float, ends: tuple[float, float] | None, margin: float, higher_is_better: bool) -> Bar | None:
    """Draw the difference between two values of a metric, worse to the left, with what the margin allows as a band.

    Args:
        value: the difference.
        ends: of its interval.
        margin: how much worse still counts as equal.
        higher_is_better: whether a positive difference is an improvement.
    """
    if not (margin > 0 and math.isfinite(value)):
        return None
    sign = 1 if higher_is_better else -1

    def place(number: float) -> float:
        return 0.5 + sign * number / margin / _MARGINS / 2

    low, high = (None, None) if ends is None else sorted(map(place, ends))
    says = (
        f"Worse than fp32 to the left, better to the right, up to {_MARGINS} margins; "
        "the shade is what counts as equal or better."
    )
    known = None if low is None or high is None else (low, high)
    return Bar(place(value), known, line=0.5, band=(place(-sign * margin), 1.0), says=says)
