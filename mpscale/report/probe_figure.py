"""The picture of a probe: gradients by power of two, over what float16 can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpscale.analysis.probe import ALL, Probe
from mpscale.core.magnitudes import Of, power_of_two
from mpscale.core.mode import MODES
from mpscale.report.figures import SOFT, TINTS, Picture, as_text, empty_figure, house_style
from mpscale.report.probe_tables import percent, shown_scale
from mpscale.report.table import loss_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ZERO, _NORMAL, _INFINITE = -25, -14, 16
"""Powers of two at which float16 begins to hold numbers, holds them with all bits, and overflows."""
_WIDEST = 48
"""Most powers of two to draw below the largest: what is smaller is in the first bar."""


def picture(probe: Probe) -> Picture | None:
    """Draw the gradients of activations and weights without and with the scale; None if there are none.

    In the SVG, the bars of a panel are in the group ``bars-activations-1`` or ``bars-weights-1``, or with a 2 if they
    are scaled.
    """
    scale = shown_scale(probe)
    counts = {of: found for of in ALL if (found := probe.all(of).by_power())}
    if scale is None or not counts:
        return None
    with house_style("probe"):
        svg = as_text(_figure(probe, counts, scale), "Gradients by power of two, over what float16 can hold")
    least, _ = _ends(counts)
    caption = (
        "Shares of the gradients that are not zero, by power of two. In float16, those in the red range on the left "
        "become zero, those in the yellow range lose precision, and those in the red range on the right become "
        "infinite."
    )
    if scale != 1.0:
        caption += f" A loss scale moves all of them: {loss_scale(scale)} is 2^{power_of_two(scale)}."
    if any(min(found) < least for found in counts.values()):
        caption += " The first bar also has what is smaller."
    return Picture("Gradients by power of two", caption, svg)


def _ends(counts: Mapping[Of, Mapping[int, int]]) -> tuple[int, int]:
    """The powers of two of the first and the last bar."""
    most = max(max(found) for found in counts.values())
    return max(min(min(found) for found in counts.values()), most - _WIDEST), most


def _figure(probe: Probe, counts: Mapping[Of, Mapping[int, int]], scale: float) -> Figure:
    shifts = [0] if scale == 1.0 else [0, power_of_two(scale)]
    least, most = _ends(counts)
    limits = (min(least + min(shifts), _ZERO - 4) - 0.5, max(most + max(shifts), _INFINITE) + 2.5)
    figure = empty_figure(0.6 + 2.3 * len(counts))
    grid = figure.subplots(len(counts), len(shifts), sharex=True, sharey="row", squeeze=False)
    for axes_row, (of, found) in zip(grid, counts.items(), strict=True):
        for number, (axes, shift) in enumerate(zip(axes_row, shifts, strict=True), 1):
            _ranges(axes, limits)
            total = sum(found.values())
            shown = dict.fromkeys(range(least, most + 1), 0.0)
            for power, count in found.items():
                shown[max(power, least)] += 100 * count / total
            colour = MODES["mixed-static" if number == 2 else "mixed-unscaled"].colour
            # A bar covers the numbers of its power of two, from 2**n to below 2**(n + 1).
            places = [power + shift + 0.5 for power in shown]
            bars = axes.bar(places, list(shown.values()), width=0.86, color=colour)
            axes.margins(y=0.16)  # room for the names of the ranges
            for bar in bars:
                bar.set_gid(f"bars-{of}-{number}")
            fate = probe.all(of).in_float16(2.0**shift)
            what = "without a scale" if shift == 0 else f"times {loss_scale(scale)}"
            lost = percent(fate.share("vanished"))
            axes.set_title(f"{of}, {what}: {lost} vanish", loc="left", size=10)
    for axes in grid[-1]:
        axes.set_xlim(*limits)
        axes.set_xlabel("magnitude of the gradient")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter(lambda power, _: f"2^{power:.0f}")
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the gradients")
    return figure


def _ranges(axes: Axes, limits: tuple[float, float]) -> None:
    """Shade what float16 loses."""
    axes.axvspan(limits[0], _ZERO, color=TINTS["lost"][0], linewidth=0, zorder=0)
    axes.axvspan(_ZERO, _NORMAL, color=TINTS["rough"][0], linewidth=0, zorder=0)
    axes.axvspan(_INFINITE, limits[1], color=TINTS["lost"][0], linewidth=0, zorder=0)
    for place, text in (
        ((limits[0] + _ZERO) / 2, "zero"),
        ((_ZERO + _NORMAL) / 2, "subnormal"),
        ((_INFINITE + limits[1]) / 2, "inf"),
    ):
        axes.text(place, 0.97, text, transform=axes.get_xaxis_transform(), ha="center", va="top", color=SOFT, size=8)
