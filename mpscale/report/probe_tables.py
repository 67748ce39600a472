"""Tables and sentences of a probe: what float16 makes of the gradients of a workload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mpscale.analysis.probe import ALL, MOST_SCALE, Advice, Kept, Probe, Verdict, advise, worst
from mpscale.core.magnitudes import LARGEST_FLOAT16, Magnitudes, Place
from mpscale.core.reason import Code, Reason
from mpscale.report.table import DASH, Table, listed, loss_scale, number, plural

ROW = (
    "layer", "of", "optimizer", "dtype", "gradients", "zero", "largest", "vanish_share", "subnormal_share",
    "overflow_share", "scale", "scaled_vanish_share", "scaled_subnormal_share", "scaled_overflow_share",
)  # fmt: skip
"""The figures of the gradients of a layer. Shares are of those that are not zero; ``dtype`` is that of the layer in
mixed precision."""

Fate = Literal["vanished", "subnormal", "overflowed"]
_FATES: dict[str, Fate] = {"vanish_share": "vanished", "subnormal_share": "subnormal", "overflow_share": "overflowed"}
_NO_NUMBERS = Reason(Code.NEVER_HAPPENED, "no gradient in float16 other than zero was seen")
_IN_FLOAT32 = Reason(
    Code.NOT_IN_MODE, "the model asks for float32 here, so mixed precision has no float16 to lose it in"
)
_WORST = 3
"""Layers that are named in a sentence."""


def shown_scale(probe: Probe) -> float | None:
    """The scale that is compared with none: the one asked for, or the recommended one."""
    advice = advise(probe)
    return probe.scale if probe.scale is not None else None if advice is None else advice.scale


def values(probe: Probe) -> list[dict[str, Any]]:
    """A row for all activations in float16, for all such weights, and for those of each layer, by optimizer.

    What is unknown is None, with reasons under ``unavailable``.
    """
    scale, parts = shown_scale(probe), probe.by_optimizer()
    totals = {Place("all", of, "all"): probe.all(of) for of in ALL} if len(parts) > 1 else {}
    totals |= {Place("all", of, name): part.all(of) for name, part in parts.items() for of in ALL}
    return [
        _row(place, counted, scale, place.layer in probe.in_float32)
        for place, counted in (totals | probe.by_layer()).items()
        if counted.total
    ]


def _row(place: Place, counted: Magnitudes, scale: float | None, in_float32: bool) -> dict[str, Any]:
    row: dict[str, Any] = {**place._asdict(), "dtype": "float32" if in_float32 else "float16", "scale": scale}
    row |= {"gradients": counted.total, "zero": counted.zero, "largest": counted.largest}
    for before, by in (("", 1.0), ("scaled_", scale)):
        rounded = None if by is None or in_float32 else counted.in_float16(by)
        for name, fate in _FATES.items():
            row[f"{before}{name}"] = None if rounded is None else rounded.share(fate)
    why = str(_IN_FLOAT32 if in_float32 else _NO_NUMBERS)
    unavailable = {name: why for name in ROW if row[name] is None}
    return {name: row[name] for name in ROW} | {"unavailable": unavailable or None}


def table(probe: Probe, most: int | None = None) -> Table:
    """The rows of :func:`values` for people; of more than ``most`` layers, only those of which most vanishes."""
    rows, scale, several = values(probe), shown_scale(probe), len(probe.by_optimizer()) > 1
    layers = list(dict.fromkeys(place.layer for place in probe.by_layer()))
    if most is not None and len(layers) > most:
        by_loss = dict.fromkeys([*(place.layer for place, _ in worst(probe)), *layers])
        kept = {"all", *list(by_loss)[:most]}
        rows = [row for row in rows if row["layer"] in kept]
    headers = ["layer", "gradients of", *["optimizer"] * several, "largest", "zero", "vanish", "subnormal", "overflow"]
    if scale not in (None, 1.0):
        headers += [f"{fate} x {loss_scale(scale)}" for fate in headers[-3:]]
    shares = [name for name in ROW if name.endswith("_share")][: len(headers) - 4 - several]
    shown = []
    for row in rows:
        layer = f"{row['layer']} (float32)" if row["dtype"] == "float32" else row["layer"]
        cells = [
            layer,
            row["of"],
            *[row["optimizer"]] * several,
            number(row["largest"]),
            percent(row["zero"] / row["gradients"]),
        ]
        shown.append([*cells, *(percent(row[name]) for name in shares)])
    return Table(headers, shown)


def looks(probe: Probe) -> Table:
    """A row for each look."""
    rows = []
    for look in probe.looks:
        both = {of: look.all(of) for of in ALL}
        cells = [str(look.step), number(look.loss, 4)]
        for of in ALL:
            if both[of].not_finite:
                cells += [f"{plural(both[of].not_finite, 'gradient')} not finite", DASH]
            else:
                cells += [number(both[of].largest), percent(both[of].in_float16(1.0).share("vanished"))]
        rows.append(cells)
    return Table(("step", "loss", *(f"{what} {of}" for of in ALL for what in ("largest of", "vanish of"))), rows)


def percent(share: float | None) -> str:
    """Write a share of 1 as percent. One that is not zero never looks like zero."""
    if share is None:
        return DASH
    if share == 0:
        return "0 %"
    if share < 1e-4:
        return "< 0.01 %"
    return f"{100 * share:.{2 if share < 0.1 else 1}f} %"


def sentences(probe: Probe) -> Iterator[str]:
    """What the probe says, in words."""
    advice = advise(probe)
    if probe.problem is not None:
        cure = f" ({probe.problem.cure})" if probe.problem.cure else ""
        yield f"The probe is incomplete: {probe.problem}{cure}."
        if probe.finite:
            yield f"What follows is from {plural(len(probe.finite), 'look')} before that."
    if advice is None:
        yield f"There is no advice: {_NO_NUMBERS}."
        return
    if probe.unsure is not None:
        yield f"All layers are taken for float16, as it is not known which ask for float32: {probe.unsure}."
    if not probe.all("activations").total:
        yield "No layer's output has a gradient to look at, so this is about weights alone."
    yield from _verdict(probe, advice)
    yield from _by_optimizer(probe)
    yield (
        f"The largest gradient seen is {number(advice.largest)}, {_where(probe, advice.largest)}. Times "
        f"{loss_scale(advice.scale)} it may become {number(advice.headroom, 2)} times as large before it overflows."
    )
    several = len(probe.by_optimizer()) > 1
    if names := [
        f"{place.layer} ({place.of}, {f'{place.optimizer}, ' * several}{percent(share)})"
        for place, share in worst(probe)
    ]:
        yield f"Without a scale, most vanishes in {listed(names, _WORST)}."
    if probe.scale is not None:
        yield f"With the scale {loss_scale(probe.scale)}: {_fates(probe, probe.scale)}."


def _verdict(probe: Probe, advice: Advice) -> Iterator[str]:
    scale = loss_scale(advice.scale)
    without, with_it = _vanishing(probe, 1.0), _vanishing(probe, advice.scale)
    match advice.verdict:
        case Verdict.NOT_NEEDED:
            yield f"float16 needs no loss scale here: without one, {without} would vanish."
            if advice.scale > 1:
                yield f"A static loss scale of {scale} would do no harm: with it, {with_it} vanish."
        case Verdict.HELPS:
            yield f"Recommended static loss scale: {scale} (--mp-static-scale {scale})."
            yield f"Without a scale, {without} would vanish in float16; with this one, {with_it}."
        case Verdict.TOO_WIDE:
            why = "a larger one would leave too little room for larger gradients"
            if advice.scale == MOST_SCALE:
                why = "none larger is recommended"
            yield "No static loss scale keeps all gradients: they span a wider range than float16."
            yield f"The best is {scale}, as {why}; with it, {with_it} vanish all the same, and {without} without it."
            yield "Those are the smallest gradients; whether they are missed, only a run in mixed precision shows."
        case Verdict.OVERFLOWS:
            yield (
                f"float16 overflows without a loss scale, so none of at least 1 helps: {_fates(probe, 1.0)}. Make the "
                "loss smaller (a mean in place of a sum), or train in bfloat16."
            )


def _by_optimizer(probe: Probe) -> Iterator[str]:
    """What fits each of several optimizers."""
    parts = probe.by_optimizer()
    if len(parts) == 1:
        return
    fitting = []
    for name, part in parts.items():
        advice = advise(part)
        fits = "none other than zero" if advice is None else f"{number(advice.largest)} ({loss_scale(advice.scale)})"
        fitting.append(f"{fits} of {name}")
    yield (
        f"The largest gradients, and in parentheses the scale that fits them, are {' and '.join(fitting)}. "
        "mixed-static has one scale for all optimizers, which those with the largest gradients decide; the dynamic "
        "modes have one for each."
    )


def _vanishing(probe: Probe, scale: float) -> str:
    known = {of: probe.all(of).in_float16(scale).share("vanished") for of in ALL}
    shares = [f"{percent(share)} of the {of}' gradients" for of, share in known.items() if share is not None]
    return " and ".join(shares)


def _fates(probe: Probe, scale: float) -> str:
    parts = []
    for of in ALL:
        rounded = probe.all(of).in_float16(scale)
        if rounded.of:
            vanish, subnormal, overflow = (percent(rounded.share(fate)) for fate in _FATES.values())
            parts.append(f"of the {of}' gradients {vanish} vanish, {subnormal} are subnormal and {overflow} overflow")
    return "; ".join(parts)


def _where(probe: Probe, largest: float) -> str:
    found = (
        f"in the {place.of} of {place.layer} at step {look.step}"
        for look in probe.finite
        for place, counted in look.in_float16.items()
        if counted.largest == largest
    )
    return next(found)


def summary(probe: Probe) -> dict[str, Any]:
    """What the report of a run shows of a probe: plain values, None if unknown."""
    advice = advise(probe)
    found: dict[str, Any] = {"advice": None, "vanish_share": None, "scaled_vanish_share": None}
    if advice is not None:
        found["advice"] = {"verdict": str(advice.verdict), "scale": advice.scale, "largest": advice.largest}
        for name, scale in (("vanish_share", 1.0), ("scaled_vanish_share", advice.scale)):
            found[name] = {of: probe.all(of).in_float16(scale).share("vanished") for of in ALL}
    return found


def section(probes: Sequence[Kept]) -> list[Table | str]:
    """The section of a run's report: what probes of its workloads say; empty without any."""
    rows = [_kept_row(each) for each in probes if each.values["advice"] is not None]
    if not rows:
        return []
    vanish = [f"{of} that vanish{at}" for at in (" without a scale", " with it") for of in ALL]
    headers = ("workload", "largest gradient", *vanish[:2], "static loss scale", *vanish[2:], "probe")
    note = (
        "From `mpscale probe`, each the newest of the same workload in the folder probe/ of the results folder: short "
        "trainings in float32, apart from this run. The scale is recommended by their largest gradient; what this run "
        f"used is under Settings. A gradient vanishes if float16 makes zero of it; above {LARGEST_FLOAT16:,.0f} it "
        "overflows."
    )
    return [Table(headers, rows), note]


def _kept_row(kept: Kept) -> list[str]:
    values: Mapping[str, Any] = kept.values
    advice = values["advice"]
    scale = f"{loss_scale(advice['scale'])} ({_SHORT.get(advice['verdict'], advice['verdict'])})"
    without, with_it = ([percent(values[name][of]) for of in ALL] for name in ("vanish_share", "scaled_vanish_share"))
    return [kept.workload, number(advice["largest"]), *without, scale, *with_it, kept.name]


_SHORT = {
    Verdict.NOT_NEEDED: "none is needed",
    Verdict.HELPS: "it helps",
    Verdict.TOO_WIDE: "some vanish all the same",
    Verdict.OVERFLOWS: "overflows without one",
}
