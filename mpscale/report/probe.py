"""A probe as text, and as the folder that `mpscale probe` leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mpscale.analysis.probe import ALL, HEADROOM, Look, Probe, advise
from mpscale.core.magnitudes import LARGEST_FLOAT16, Place
from mpscale.report.about import facts, when, without_xla
from mpscale.report.document import Document, Section
from mpscale.report.document import render as as_markdown
from mpscale.report.files import write_whole
from mpscale.report.page import page
from mpscale.report.probe_figure import picture
from mpscale.report.probe_tables import ROW, looks, percent, sentences, summary, table, values
from mpscale.report.table import Table, escape, json_document, json_text, number, plural
from mpscale.terminal.streams import PIPE, Surface

_CSV = ("workload", "device_name", "recommended_scale", *ROW, "unavailable")
_TERMINAL_LAYERS = 10

_NOTES = (
    "Gradients were computed in float32 and then rounded to float16 once, by count: to the nearest, in doubt to even, "
    "as NumPy does it. What is 2**-25 or less vanishes (becomes 0), what stays below 2**-14 is subnormal and loses "
    "bits, and 65,520 or more overflows. Shares are of the gradients that are not zero; a gradient that is zero in "
    "float32, as behind a ReLU that is off, is counted as zero and never as vanished.",
    f"The recommended scale S is the largest power of two for which the largest gradient times S times {HEADROOM:g} is "
    f"below {LARGEST_FLOAT16:,.0f}, but at least 1 and at most 2**24.",
    "A float16 training rounds at every operation, so more may be lost there than one rounding shows. Activations are "
    "the outputs of the innermost layers that a gradient reaches; what happens within a loop, as in a recurrent layer, "
    "or between two layers is not seen. Later steps may have other gradients: a short training does not see the end.",
    "A layer that is marked (float32) asks for float32 by itself, so mixed precision does not round its gradients to "
    "float16. They are left out of all totals and of the recommendation.",
    "A share says nothing about accuracy: the gradients that vanish are the smallest. A run with mixed-unscaled shows "
    "what their loss costs.",
    "A layer that is called several times has the gradients of all calls together, for each optimizer apart.",
)


def render(probe: Probe, form: Literal["table", "markdown", "csv", "json"], surface: Surface = PIPE) -> str:
    """The result in one of the formats of the command."""
    advice = advise(probe)
    about: dict[str, Any] = {"workload": probe.workload, "device_name": probe.device.name}
    about["recommended_scale"] = None if advice is None else advice.scale
    if form == "json":
        about |= {"verdict": None if advice is None else advice.verdict, "looks": len(probe.finite)}
        about["problem"] = None if probe.problem is None else probe.problem.to_json()
        return json_document("probe", {**about, "gradients": values(probe)})
    if form == "csv":
        rows = (
            {**about, **row, "unavailable": row["unavailable"] and json.dumps(row["unavailable"])}
            for row in values(probe)
        )
        return Table.of(_CSV, rows).csv()
    said = list(sentences(probe))
    if form == "markdown":
        return "\n\n".join(filter(None, [" ".join(map(escape, said)), table(probe).markdown()])) + "\n"
    shown = table(probe, _TERMINAL_LAYERS)
    whole_table = table(probe)
    left_out = len(whole_table.rows) - len(shown.rows)
    note = (
        f"Layers are those of which most vanishes; the report has {plural(left_out, 'more row')}." if left_out else ""
    )
    texts = (surface.wrapped("\n".join(said)), shown.text(surface), surface.wrapped(note))
    return "\n\n".join(filter(None, texts)) + "\n"


def line(look: Look) -> str:
    """A look in one line, for the terminal."""
    largest = max((each.largest for each in look.in_float16.values()), default=0.0)
    lost = " and ".join(f"{percent(look.all(of).in_float16(1.0).share('vanished'))} of {of}" for of in ALL)
    return f"step {look.step}: loss {number(look.loss, 4)}, largest gradient {number(largest)}, {lost} would vanish"


def document(probe: Probe, about: Mapping[str, Any]) -> Document:
    """The report of a probe.

    Args:
        probe: finished or not.
        about: as in :func:`write`.
    """
    parts = [
        Section("Results", [table(probe)]),
        Section("Looks", [looks(probe)]),
        Section("How to read this", ["\n".join(f"- {escape(note)}" for note in _NOTES)]),
        Section("Environment", [facts(about.get("environment"))], folded=True, sentences=True),
        Section("Settings", [facts(about.get("settings"))], folded=True, sentences=True),
    ]
    where = f"{escape(probe.device.name)} ({probe.device.kind.upper()})"
    said = "\n".join(f"- {escape(sentence)}" for sentence in sentences(probe))
    begin = f"{escape(probe.workload)} was trained in float32 on {where}, and its gradients were looked at."
    begin += without_xla(about.get("xla_refused"))
    return Document(f"mpscale probe: {probe.workload}", when(about), f"{begin}\n\n{said}", parts)


def _counts(probe: Probe) -> Iterator[list[Any]]:
    for place, counted in probe.by_layer().items():
        if counted.zero:
            yield [*place, "zero", None, counted.zero]
        for power, count in counted.by_power().items():
            yield [*place, "number", power, count]


def write(folder: Path, probe: Probe, about: Mapping[str, Any]) -> None:
    """Write the files of a probe, finished or not: report.html, report.md, probe.csv, gradients.csv and probe.json.

    Args:
        folder: exists.
        probe: what was seen.
        about: plain values for probe.json: when, where and what was asked for.

    Raises:
        OSError: the folder cannot be written.
    """
    content = {**about, "workload": probe.workload, "workload_digest": probe.digest}
    content |= {"problem": None if probe.problem is None else probe.problem.to_json(), **summary(probe)}
    content["looks"] = [
        {
            "step": look.step,
            "loss": look.loss,
            "largest": {of: look.all(of).largest for of in ALL},
        }
        for look in probe.looks
    ]
    report, drawn = document(probe, about), picture(probe)
    files = {
        "probe.json": json_text(content),
        "probe.csv": render(probe, "csv"),
        "gradients.csv": Table((*Place._fields, "kind", "power_of_two", "count"), list(_counts(probe))).csv(),
        "report.md": as_markdown(report),
        "report.html": page(report, [] if drawn is None else [drawn]),
    }
    write_whole(folder, files)
