"""The largest batch of each mode, as a table and as the folder that `mpscale fit` leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mpscale.analysis.fit import ROW, Fit, Try, figures, memory_columns
from mpscale.core.reason import Reason
from mpscale.core.record import to_csv
from mpscale.report.about import facts, when, without_xla
from mpscale.report.document import Document, Section
from mpscale.report.document import render as as_markdown
from mpscale.report.files import write_whole
from mpscale.report.page import page
from mpscale.report.table import DASH, Table, escape, json_document, json_text, large, number
from mpscale.terminal.streams import PIPE, Surface

_CSV = ("workload", "mode", "device_name", "memory_limit_mib", *ROW, "baseline", "unavailable")

_NOTES = (
    "Each batch was tried in a process of its own, which took two dozen training steps and evaluated nothing. The "
    "largest power of two that fits was refined by eighths of it: a batch between the largest and the one that ran "
    "out may fit, too.",
    "A batch that is larger than the training set contains its examples several times.",
    "Step times are those of one process, taken for half a second. To judge a speed, make a run with that batch "
    "(--mp-batch-size), which has intervals.",
    "The ratios compare the largest batch of a mode with that of the baseline: what the saved memory buys.",
)
_NOTE_ON_CPU = (
    "On a CPU, memory is the resident memory of the process, TensorFlow and its compiler included, and a process that "
    "exceeds the limit is killed. The CPU emulates float16, so neither batches nor speeds say anything about a GPU."
)
_NOTE_ON_GPU = (
    "Memory is the peak of the whole process. Steps were queued, as in Keras' fit, so memory of more than one step may "
    "be in use at a time."
)


def table(fit: Fit) -> Table:
    """A row per mode, for people. The last column says what a reader has to know of the row."""
    over = f"vs {fit.baseline}" if fit.baseline else "ratio"
    headers = (
        "mode", "largest batch", "ran out at", "step time", "examples/s", "peak memory", f"batch {over}",
        f"examples/s {over}", "note",
    )  # fmt: skip
    rows = []
    for mode in fit.modes:
        known = figures(fit, mode).values
        cells = [_whole(known.get("largest_batch")), _whole(known.get("ran_out_at"))]
        step_ms = known.get("step_time_ms")
        cells += [DASH if step_ms is None else f"{number(step_ms)} ms", _whole(known.get("examples_per_s"))]
        cells += [large(known.get("peak_memory_mib"), "MiB")]
        cells += [_ratio(known.get("batch_ratio")), _ratio(known.get("examples_per_s_ratio"))]
        rows.append([mode, *cells, "; ".join(_remarks(fit, mode)) or DASH])
    return Table(headers, rows).without_blank("note")


def _remarks(fit: Fit, mode: str) -> Iterator[str]:
    """What has to be said of a row, each once: why it may not be the largest batch, and why figures are missing."""
    found, why_open, largest = figures(fit, mode), fit.why_open(mode), fit.largest(mode)
    if largest is None:
        yield str(why_open)
        return
    if why_open is not None:
        yield f"at least this: {why_open}{f' ({why_open.cure})' if why_open.cure else ''}"
    if largest.record["gpu_suspicion"] is not None:
        yield f"doubtful: {largest.record['gpu_suspicion']}"
    reasons = [found.unavailable[name] for name in ROW if name in found.unavailable and name != "ran_out_at"]
    ours = () if why_open is None else (why_open.worded(f"the largest batch of {mode} is not known: {why_open}"),)
    yield from dict.fromkeys(str(why) for why in reasons if why not in ours)


def _whole(value: float | None) -> str:
    if value is None:
        return DASH
    # A batch is an integer; examples per second may be a few.
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else number(value)


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}x"


def values(fit: Fit) -> list[dict[str, Any]]:
    """A row per mode, for programs: plain values, None if unknown, and the reasons under ``unavailable``."""
    rows = []
    for mode in fit.modes:
        found = figures(fit, mode)
        reasons = {name: str(found.unavailable[name]) for name in ROW if name in found.unavailable}
        row: dict[str, Any] = {"workload": fit.workload, "mode": mode, "device_name": fit.device.name}
        row |= {"memory_limit_mib": fit.limit_mib, "baseline": fit.baseline, **dict.fromkeys(ROW), **found.values}
        rows.append({**row, "unavailable": reasons or None})
    return rows


def render(fit: Fit, form: Literal["table", "markdown", "csv", "json"], surface: Surface = PIPE) -> str:
    """The result in one of the formats of the command."""
    if form == "json":
        return json_document("fit", {"workload": fit.workload, "modes": values(fit)})
    if form == "csv":
        rows = [{**row, "unavailable": row["unavailable"] and json.dumps(row["unavailable"])} for row in values(fit)]
        return Table.of(_CSV, rows).csv()
    return (table(fit).markdown() if form == "markdown" else table(fit).text(surface)) + "\n"


def document(fit: Fit, about: Mapping[str, Any]) -> Document:
    """The report of a search: the result, what it does not say, and every try.

    Args:
        fit: the search.
        about: as in :func:`write`.
    """
    on_device = _NOTE_ON_GPU if fit.device.kind == "gpu" else _NOTE_ON_CPU
    tries = Table(
        ("mode", "batch", "result", "step time", "peak memory", "seconds", "why"),
        [_tried(fit, each) for each in fit.tries],
    )
    parts = [
        Section("Largest batches", [table(fit)], sentences=True),
        Section("How to read this", ["\n".join(f"- {note}" for note in (*_NOTES, on_device, *_about_inputs(fit)))]),
        Section("Tries", [tries or "None."], sentences=True),
        Section("Environment", [facts(about.get("environment"))], folded=True, sentences=True),
        Section("Settings", [facts(about.get("settings"))], folded=True, sentences=True),
    ]
    said = f"{_findings(fit)}{without_xla(fit.xla_refused)}"
    return Document(f"mpscale fit: {fit.workload}", when(about), said, parts)


def _about_inputs(fit: Fit) -> Iterator[str]:
    if any(each.record["synthetic_inputs"] for each in fit.tries):
        yield "The inputs are synthetic: batches and speeds are those of real ones, but nothing is learned."


def _findings(fit: Fit) -> str:
    where = f"{escape(fit.device.name)} ({fit.device.kind.upper()})"
    limit = "" if fit.limit_mib is None else f", with up to {fit.limit_mib:,.0f} MiB of memory"
    lines = []
    for mode in fit.modes:
        largest, why_open, ratio = fit.largest(mode), fit.why_open(mode), figures(fit, mode).values.get("batch_ratio")
        if largest is None:
            text = "no batch trained"
        else:
            least = "" if why_open is None else "at least "
            times = "" if ratio is None or mode == fit.baseline else f", {ratio:.2f} times that of {fit.baseline}"
            text = f"the largest batch is {least}{largest.batch:,}{times}"
        lines.append(f"- **{mode}**: {text}")
    return f"{escape(fit.workload)} was tried on {where}{limit}.\n\n" + "\n".join(lines)


def _tried(fit: Fit, each: Try) -> list[str]:
    record, step_ms = each.record, each.record["step_time_ms_median"]
    memory = next((record[name] for name in memory_columns(fit.device) if record[name] is not None), None)
    return [
        each.mode,
        _whole(each.batch),
        each.verdict,
        DASH if step_ms is None else f"{number(step_ms)} ms",
        large(memory, "MiB"),
        number(record["case_wall_time_s"]),
        DASH if each.reason is None else each.reason.text,
    ]


def line(each: Try) -> str:
    """A try in one line, for the terminal."""
    record = each.record
    parts = [str(each.verdict) if each.reason is None else f"{each.verdict} ({each.reason})"]
    if each.reason is None and record["step_time_ms_median"] is not None:
        parts += [f"{number(record['step_time_ms_median'])} ms a step", f"{record['examples_per_s']:,.0f} examples/s"]
    wall_s = record["case_wall_time_s"]
    return f"{each.mode}, batch {each.batch:,}: {', '.join(parts)}" + ("" if wall_s is None else f" ({wall_s:.1f} s)")


def write(folder: Path, fit: Fit, about: Mapping[str, Any]) -> None:
    """Write the files of a search, finished or not: report.html, report.md, fit.csv, tries.csv and fit.json.

    Args:
        folder: exists.
        fit: the search.
        about: plain values for fit.json: when, where and what was asked for.

    Raises:
        OSError: the folder cannot be written.
    """
    ends = {mode: _end(why) for mode, why in fit.ends.items()}
    tries = [
        {"mode": each.mode, "batch": each.batch, "verdict": each.verdict, "reason": _end(each.reason)}
        for each in fit.tries
    ]
    content = {**about, "workload": fit.workload, "modes": list(fit.modes), "ends": ends, "tries": tries}
    content["xla_refused"] = fit.xla_refused
    report = document(fit, about)
    files = {
        "fit.json": json_text(content),
        "tries.csv": to_csv(each.record for each in fit.tries),
        "fit.csv": render(fit, "csv"),
        "report.md": as_markdown(report),
        "report.html": page(report),
    }
    write_whole(folder, files)


def _end(why: Reason | None) -> dict[str, str] | None:
    return None if why is None else why.to_json()
