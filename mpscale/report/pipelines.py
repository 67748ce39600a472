"""The section of a report about workloads that take their batches from a pipeline."""

from __future__ import annotations

from mpscale.analysis.answer import is_input_bound
from mpscale.analysis.claim import doubts_of
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.columns import Passes
from mpscale.core.record import place_of, values_of
from mpscale.core.runs import Run
from mpscale.report.sections import PLACE, measured, speedup
from mpscale.report.table import DASH, Cell, Heading, Table, escape, interval, listed, number, plural, share

_NAMED = 5
_MANY = 5  # shapes: more than an incomplete last batch, or a few buckets
_DEVICE = Heading(
    "ms on the device", "Step time with the first batches, which lie on the device: the step time of all other tables."
)
_INPUT = Heading("ms with input", "Mean step time with batches from the pipeline, in steady state.")
_WAITS = Heading("waits for input", "Share of a step in which the device waits for its batch.")


def pipelines(run: Run) -> list[Table | str]:
    """Show the two step times of each mode, and what a user gains; empty if all data is arrays."""
    rows = [row for row in summary_of(run) if row["step_time_ms_with_input"] is not None]
    table = Table(
        [*PLACE, _DEVICE, _INPUT, _WAITS, "speed-up on the device", "speed-up with input"],
        [
            [
                *place_of(row),
                number(row["step_time_ms"]),
                number(row["step_time_ms_with_input"]),
                share(row["input_wait_share"]),
                speedup(row, row["headline_baseline"]),
                _with_input(row, row["headline_baseline"]),
            ]
            for row in rows
        ],
    )
    parts: list[Table | str] = [table if rows else ""]
    if bound := [" ".join(place_of(row)) for row in rows if is_input_bound(row)]:
        parts.append(
            f"Input-bound: {escape(listed(bound, _NAMED))}. The device is faster, and then waits for its batch: mixed "
            "precision cannot help until the pipeline is faster (more num_parallel_calls, prefetch, cache, smaller "
            "files, or decoding once and for all)."
        )
    return [*parts, *_told(run)]


def _with_input(row: Row, baseline: str) -> Cell:
    """Write the speed-up with input; in parentheses where that on the device is no claim either."""
    estimate, low, high = (row[f"speedup_with_input_{baseline}{end}"] for end in ("", "_low", "_high"))
    written = interval(estimate, low, high, "x")
    return Cell(f"({written})", "weak") if doubts_of(row, baseline) and written != DASH else Cell(written)


def _told(run: Run) -> list[str]:
    """What else to know about the batches."""
    cases = [(workload, record) for workload, _, records in measured(run) for record in records]
    told = []
    shapes = {w: max(values_of([r for v, r in cases if v == w], "input_shapes"), default=1) for w, _ in cases}
    if several := [f"{workload} ({plural(count, 'shape')})" for workload, count in shapes.items() if count > 1]:
        many = "" if max(shapes.values()) < _MANY else " Pad variable lengths to one length, or to a few."
        named = escape(listed(several, _NAMED))
        told.append(f"Batches of several shapes: {named}. With XLA, a step was compiled for each.{many}")
    words = {
        Passes.DIFFER: "two passes over the first batches differed, which the pipeline allows",
        Passes.ALLOWED: "the pipeline allows its passes to differ",
        Passes.RESHUFFLED: "the pipeline is one object, so only the digest shows that modes saw the same batches",
    }
    for passes, text in words.items():
        if names := list(dict.fromkeys(w for w, record in cases if record["input_passes"] == passes)):
            told.append(f"{escape(listed(names, _NAMED))}: {text}.")
    return told
