"""The report of a run, as a document and as markdown; its findings in words; its summary for a GitHub workflow."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpscale.analysis.claim import Doubt, busy_share, doubts_of
from mpscale.analysis.noise_floor import NO_FLOORS, Floors
from mpscale.analysis.probe import Kept
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.device import Device
from mpscale.core.mode import MODES, is_mixed
from mpscale.core.record import Record, place_of
from mpscale.core.runs import Run
from mpscale.report import probe_tables, sections, sweep
from mpscale.report.float8 import float8
from mpscale.report.growth import growth
from mpscale.report.sections import metric_why, statuses
from mpscale.report.table import (
    DASH,
    Table,
    escape,
    metric,
    metric_change,
    number,
    of_processes,
    of_seeds,
    plural,
    share,
    text,
    yes_no,
)


@dataclass(frozen=True)
class Document:
    """A report in parts. All texts but the title are markdown.

    Args:
        title: plain text.
        when: start of the run, and the versions of schema and method; may be empty.
        findings: the run in words.
        sections: tables and texts by title, in order; empty sections are left out.
    """

    title: str
    when: str
    findings: str
    sections: dict[str, list[Table | str]]


def document(run: Run, floors: Floors = NO_FLOORS, probes: Sequence[Kept] = ()) -> Document:
    """Make the report of a run.

    Args:
        run: the run.
        floors: how much runs of the same code differ, if that is known.
        probes: of its workloads.
    """
    parts: dict[str, list[Table | str]] = {
        "Results": [sections.results(run), sections.doubts_note(summary_of(run))],
        "Speed-up over batch": sweep.by_batch(run),
        "Static loss scales": sweep.by_scale(run),
        "Cases that did not end well": sections.troubles(run),
        "What could not be read": [sections.unread(run, floors.left_out)],
        "Overflow and loss scale": [sections.overflow(run), growth(run)],
        "Scales of float8": float8(run),
        "Gradient range": probe_tables.section(probes),
        "Accuracy": sections.accuracy(run),
        "Accuracy against fp32": [sections.against_fp32(run)],
        "Workloads without a metric": sections.without_metric(run),
        "Timing quality": sections.timing(run),
        "Arithmetic": sections.arithmetic(run),
        "Step time noise": sections.noise(run, floors),
        "Memory": sections.memory(run),
        "GPU memory by part (MiB)": sections.memory_parts(run),
        "GPU energy": sections.energy(run),
        "GPU state while steps were timed": [sections.gpu_state(run)],
        "How to read this": [how_to_read(run)],
        "Environment": [facts(run.info.get("environment"))],
        "Settings": [facts(run.info.get("settings"))],
        "Missing values": [sections.missing(run)],
    }
    filled = {title: known for title, some in parts.items() if (known := [part for part in some if part])}
    return Document(f"mpscale: {run.name}", when(run.info), findings(run), filled)


def render(document: Document) -> str:
    """Return the report as markdown."""
    parts: list[Table | str] = [f"# {escape(document.title)}", document.when, document.findings]
    for title, section in document.sections.items():
        parts += [f"## {title}", *section]
    return "\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts if part) + "\n"


def when(info: Mapping[str, Any]) -> str:
    """Say when a run started, and by which versions of schema and method; empty if ``info`` has none of them."""
    names = {"started": "Started", "schema_version": "schema version", "method_version": "method version"}
    known = [f"{label} {escape(info[name])}" for name, label in names.items() if info.get(name) is not None]
    return ", ".join(known) + "." if known else ""


def facts(found: Any) -> Table:
    """Show nested facts, each named by its path; an empty table if they are not a mapping."""
    return Table(["what", "value"], list(_flat(found)) if isinstance(found, Mapping) else [])


def _flat(facts: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested facts as rows, each named by its path."""
    for key, value in facts.items():
        name = f"{above} {key}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, list | tuple):
            yield name, ", ".join(_fact(item) for item in value) or DASH
        else:
            yield name, _fact(value)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return yes_no(value)
    return f"{value:.6g}" if isinstance(value, float) else text(value)


def findings(run: Run) -> str:
    """Describe the run in a paragraph, and each mixed mode of each workload in a line of a list."""
    rows = summary_of(run)
    lines = [f"- {_finding(row, rows)}" for row in rows if is_mixed(row["mode"])]
    return "\n\n".join([_overview(run, rows), *(["\n".join(lines)] if lines else [])])


def _overview(run: Run, rows: Sequence[Row]) -> str:
    kind, name = device_kind(run), device_name(run)
    where = (f" on {escape(name)}" if name else "") + (f" ({kind.upper()})" if kind else "")
    if not rows:
        return f"No case was started{where}, so there is nothing to report."
    workloads = list(dict.fromkeys(escape(row["workload"]) for row in rows))
    modes = list(dict.fromkeys(escape(row["mode"]) for row in rows))
    swept, ok, cases = sweep.sentence(rows), sum(row["ok"] for row in rows), len(run.records)
    sentences = [f"{_and(workloads)} {'was' if len(workloads) == 1 else 'were'} run in {_and(modes)}{where}."]
    sentences += [swept] if swept else []
    started = "" if run.finished and not run.not_started else " that was started"
    sentences.append(
        f"Every case{started} ended well." if ok == cases else f"{cases - ok} of {cases} cases did not end well."
    )
    if run.not_started:
        left = len(run.not_started)
        sentences.append(f"{plural(left, 'planned case')} {'was' if left == 1 else 'were'} not started.")
    if not run.finished:
        sentences.append("The run was stopped or is still going on: this is what there is so far.")
    sentences += _no_metric(rows)
    if jumped := sum(row["two_level_processes"] for row in rows):
        whose = plural(jumped, "process")
        sentences.append(f"The step time of {whose} jumped between two levels (see Timing quality).")
    if sections.without_xla(run):
        sentences.append(
            "Steps were not compiled with XLA, which on a GPU can change more than the mode does (see Timing quality)."
        )
    if kind == "cpu":
        sentences.append("It ran on a CPU: the speeds below say nothing about a GPU.")
    return " ".join(sentences)


def _no_metric(rows: Sequence[Row]) -> Iterator[str]:
    """Say which workloads have no metric, and why."""
    without = [row for row in rows if row["has_metric"] is False]
    for synthetic, why in (
        (True, "synthetic inputs, so no accuracy is given"),
        (False, "no metric, so nothing was evaluated"),
    ):
        names = list(dict.fromkeys(escape(row["workload"]) for row in without if row["synthetic_inputs"] is synthetic))
        if names:
            yield f"{_and(names)} {'has' if len(names) == 1 else 'have'} {why}."


def _finding(row: Row, rows: Sequence[Row]) -> str:
    parts = [part for part in (_speed(row, rows), _quality(row), _overflow(row), _memory(row)) if part]
    # A verdict on the metric already names the seeds that were left out.
    if row["left_out"] and row["metric_verdict"] is None:
        parts.append(escape(row["left_out"]))
    if row["ok"] != row["cases"] or row["not_started"]:
        parts.append(f"cases: {statuses(row)}")
    workload, mode = place_of(row)
    return f"{escape(workload)}, **{escape(mode)}**: {'; '.join(parts) or 'nothing was measured'}."


def _speed(row: Row, rows: Sequence[Row]) -> str | None:
    if row["step_time_ms"] is None:
        # Seeds that were lost may have been timed all the same.
        return "no training ended well, so no step time counts" if row["seeds"] and not row["ok"] else None
    baseline = row["headline_baseline"]
    there = (place_of(row)[0], baseline)
    if row[f"speedup_{baseline}"] is None:
        beside = any(place_of(other) == there for other in rows)
        why = f"with no {baseline}{' that ended well' if beside else ''} to compare it with"
        return f"{number(row['step_time_ms'])} ms per step, {why}"
    if doubts := doubts_of(row, baseline):
        other = next((one for one in rows if place_of(one) == there), row)
        return "; ".join(filter(None, [_no_claim(row, other, doubts), _by_device_time(row, baseline)]))
    return _times("the speed", row, f"speedup_{baseline}", baseline)


def _times(what: str, row: Row, name: str, baseline: str) -> str:
    """Write a ratio of speeds with its interval."""
    ratio, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    written = f"{ratio:.2f} times {what} of {baseline}{of_processes(row[f'{name}_pairs'], row)}"
    if low is None or high is None:
        return f"{written} (one pair of processes, so no interval)"
    verdict = ", so no difference is shown" if low <= 1.0 <= high else ""
    return f"{written} (95 % interval {low:.2f} to {high:.2f}{verdict})"


def _no_claim(row: Row, baseline: Row, doubts: Sequence[Doubt]) -> str:
    """Say why nothing is said about the speed of a mode, with the figures of the side to which it applies most."""
    reasons = []
    if Doubt.IDLE in doubts:
        least, of = min((known, one["mode"]) for one in (row, baseline) if (known := busy_share(one)) is not None)
        whose = "" if of == row["mode"] else f" of {escape(of)}"
        reasons.append(f"the GPU was busy {share(least)} of a step{whose} ({sections.TOO_SMALL_CURE})")
    elif Doubt.DISPATCH in doubts:
        most, of = max((one["dispatch_share"] or 0.0, one["mode"]) for one in (row, baseline) if one["dispatch_bound"])
        whose = "" if of == row["mode"] else f" of {escape(of)}"
        took = f"dispatch in Python and TensorFlow took {share(most)} of a step{whose}"
        reasons.append(f"{took} ({sections.TOO_SMALL_CURE})")
    if Doubt.BUSY in doubts:
        busiest = max(one["host_other_cpu_share"] or 0.0 for one in (row, baseline))
        reasons.append(f"other processes took {share(busiest)} of the machine's CPU time (run again when it is idle)")
    if Doubt.ONE_PAIR in doubts:
        reasons.append(f"there is only one pair of processes ({sections.ONE_PAIR_CURE})")
    return f"no claim about speed: {', and '.join(reasons)}"


def _by_device_time(row: Row, baseline: str) -> str | None:
    name = f"speedup_device_{baseline}"
    return None if row[name] is None else f"by GPU time alone {_times('the speed', row, name, baseline)}"


def _quality(row: Row) -> str | None:
    name = row["metric_name"]
    label, verdict = escape(name or "metric"), row["metric_verdict"]
    if row["metric_mean"] is None:
        return None if verdict is None else f"no {label}, {verdict}: {escape(metric_why(row))}"
    written = f"{label} {metric(row['metric_mean'], name)}"
    if row["metric_seeds"] < row["seeds_planned"]:
        written += f" over {row['metric_seeds']} of {row['seeds_planned']} seeds"
    judged = ""
    if verdict:
        # The reason is worth the space only if seeds were lost or left out.
        why = f": {escape(metric_why(row))}" if row["left_out"] or row["metric_left_out"] else ""
        judged = f", {verdict}{why}"
    if row["metric_difference"] is None:
        return written + judged
    seeds = plural(row["metric_pairs"], "seed")
    return f"{written}, {metric_change(row['metric_difference'], name)} fp32 ({seeds}{judged})"


def _overflow(row: Row) -> str | None:
    if row["overflow_steps"] is None or row["attempted_steps"] is None:
        return None
    written = f"{row['overflow_steps'] or 'none'} of {row['attempted_steps']} steps overflowed"
    return written + of_seeds(row["overflow_seeds"], row)


def _memory(row: Row) -> str | None:
    ratio = row["gpu_memory_ratio"]
    if ratio is None:
        return None
    return f"peak GPU memory {ratio:.2f} times fp32's{of_processes(row['gpu_memory_processes'], row)}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def device_kind(run: Run) -> str | None:
    """Return ``cpu`` or ``gpu``; None if neither run.json nor a record has it."""
    return _of_device(run, "kind", "device")


def device_name(run: Run) -> str | None:
    """Return the name of the device; None if neither run.json nor a record has it."""
    return _of_device(run, "name", "device_name")


def _of_device(run: Run, key: str, column: str) -> str | None:
    known = (value for value in (run.device.get(key), *(record[column] for record in run.records)) if value is not None)
    return next(map(str, known), None)


_NOTES = (
    "A step is one call of the compiled train step: one batch, one update. Step time is steady state, in ms; "
    "compilation and the first step are listed separately.",
    "Each process gives one number, the median of its blocks. Intervals are 95 % t intervals over processes, on "
    "logarithms. A speed-up is the geometric mean of baseline time / mode time over processes of the same seed "
    "and repeat, which ran side by side.",
    "What a mode costs (step time, memory, energy) and its speed-up cover seeds that ended well. A seed that was "
    "lost (it diverged, stalled or ended without a finite metric) makes the metric worse. A seed that failed or "
    "was not started is unknown, so no loss can be ruled out.",
    "Brackets hold the interval. Without brackets there was one process, and its noise is unknown. With two or three "
    "processes the interval is wide; it takes more of them (seeds or repeats) to show a speed-up. "
    "An interval that contains 1.00 shows no difference.",
)
_NOTE_ON_TF32 = (
    "This GPU has TF32, which TensorFlow uses by default, so tf32 is the baseline to look at. Over fp32, with TF32 "
    "off, a speed-up looks larger than what a user would see."
)
_NOTES_ON_METRIC = (
    "The metric is the mean over seeds, with minimum and maximum. Modes are compared seed by seed, from the same "
    "weights and with the same order of the data. non-inferior: a loss of more than the workload's margin is ruled out "
    "(one-sided, 95 %), in all seeds. worse: there is such a loss, or a seed was lost. inconclusive: these seeds show "
    "neither.",
    "Overflow steps have a non-finite gradient. A dash means that the mode does not check gradients: its overflow is "
    "unknown, not zero.",
)
_NOTE_ON_NO_METRIC = (
    "A workload without a metric shows speed, memory, energy and overflow, and whether its training diverges. It shows "
    "nothing about the accuracy of a mode. Synthetic inputs are drawn at random, so loss scaling is not tested by them "
    "as it is by real ones."
)
_NOTE_ON_SWEEP = (
    "@ after a workload is the batch of a sweep, and @ after a mode its constant loss scale. fp32 and tf32, with which "
    "a mode is compared, are always those of the same batch."
)
_NOTES_ON_CPU = (
    "This run is from a CPU, which emulates float16 by conversions that XLA compiles; without XLA it is slower still, "
    "on some CPUs many times. Step times of float16 modes say nothing about the speed-up on a GPU.",
    "The same goes for bfloat16: XLA on a CPU can make it several times slower than float32, whatever a GPU does with "
    "it.",
    "Host memory is the resident memory of the process and measures TensorFlow and its compiler more than the model. "
    "It says nothing about what mixed precision saves on a GPU, so no ratio is given.",
    "What a CPU run does show is whether training works: overflow, loss scale and final metric.",
)
_NOTE_ON_FLOAT8 = (
    "mixed-fp8 rounds to float8 what Dense and EinsumDense layers multiply. XLA decides for each product if the GPU "
    "multiplies in float8 or converts back to bfloat16 first: only the step time shows it."
)
_NOTE_ON_FLOAT8_ON_CPU = (
    "A CPU does not multiply in float8: mixed-fp8 rounds to float8 and multiplies in bfloat16. Training and metric are "
    "those of float8, and the step time says nothing about it."
)
_NOTE_ON_GPU_MEMORY = (
    "GPU memory is what the driver reports for the process, including context and libraries, so the ratio is that of "
    "whole processes. To compare modes, use the figure for training: steps were awaited one by one. To choose a GPU, "
    "use the largest figure of the row: a usual training loop queues steps, and evaluates. A process keeps what it "
    "took, so later figures contain earlier ones. Host memory is no substitute for any of them."
)
_NOTE_ON_ENERGY = (
    "Energy is that of the whole GPU and of nothing else in the machine; above idle is what it drew beyond its "
    "power before the process started. Values are medians over processes."
)
_NOTE_ON_STAND_IN = "The GPU is a stand-in for tests: the CPU trained, and a script supplied the GPU's figures."


def how_to_read(run: Run) -> str:
    """List what the figures mean and what they do not show."""
    rows = summary_of(run)
    notes = list(_NOTES)
    if sweep.sentence(rows):
        notes.append(_NOTE_ON_SWEEP)
    if any(row["headline_baseline"] == "tf32" for row in rows):
        notes.append(_NOTE_ON_TF32)
    metrics = [row["has_metric"] is not False for row in rows]
    notes += _NOTES_ON_METRIC if any(metrics) or not rows else _NOTES_ON_METRIC[1:]
    if not all(metrics):
        notes.append(_NOTE_ON_NO_METRIC)
    notes += _NOTES_ON_CPU if device_kind(run) == "cpu" else (_NOTE_ON_GPU_MEMORY,)
    if any(row["mode"] in MODES and MODES[row["mode"]].float8 for row in rows):
        notes.append(_NOTE_ON_FLOAT8_ON_CPU if device_kind(run) == "cpu" else _NOTE_ON_FLOAT8)
    if any(row["gpu_energy_j_per_step"] is not None for row in rows):
        notes.append(_NOTE_ON_ENERGY)
    if Device("gpu", device_name(run) or "").is_stand_in:
        notes.append(_NOTE_ON_STAND_IN)
    return "\n".join(f"- {note}" for note in notes)


LIMIT = 1_000_000
"""Bytes. GitHub shows nothing of a step that wrote more than 1 MiB, and the step may write something else, too."""

_NAME, _CELL, _TAIL = 200, 1_000, 4_000
"""Most characters of a name, of a cell and of the last output of a case."""

_LINES = 500
"""Most lines of the findings and of each section, so that every section has room."""

_REST = "*The rest did not fit here; the report has all of it.*"


def github_summary(run: Run, limit: int = LIMIT, artifacts: str | None = None) -> str:
    """Summarise a run in markdown for ``$GITHUB_STEP_SUMMARY``, the most important part first.

    Args:
        run: finished or not.
        limit: most bytes of the text; at least 10,000. A note replaces what does not fit.
        artifacts: address of the page with the run's files, if there is one.
    """
    kind = device_kind(run)
    where = " ".join(filter(None, [device_name(run), f"({kind.upper()})" if kind else ""]))
    trouble = sections.trouble_table(run)
    trouble = Table(trouble.headers, [[_cut(cell, _CELL) for cell in row] for row in trouble.rows])
    results = (sections.results(run).markdown(), sections.doubts_note(summary_of(run)))
    parts = [f"# mpscale: {escape(_cut(where or run.name, _NAME))}", _head(findings(run))]
    for title, part in (
        ("What could not be read", sections.unread(run)),
        ("Results", "\n\n".join(filter(None, results))),
        ("Cases that did not end well", trouble.markdown()),
    ):
        if part:
            parts.append(f"## {title}\n\n{_head(part)}")
    parts += [_output(record) for record in run.records if record["status"] != "ok" and record["output_tail"]]
    end = "\n\n".join(filter(None, [_duration(run), _files(run, artifacts)]))
    return "\n\n".join([*_fitting(parts, limit - len(end.encode("utf-8", "replace"))), end]) + "\n"


def artifacts_page(environ: Mapping[str, str]) -> str | None:
    """Return the address of the workflow run's files; None outside of GitHub Actions."""
    parts = [environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID")]
    return "{}/{}/actions/runs/{}#artifacts".format(*parts) if all(parts) else None


def _head(part: str) -> str:
    """Return the first lines of a list or table, and the number of the others."""
    lines = part.split("\n")
    more = len(lines) - _LINES
    return part if more <= 0 else "\n".join([*lines[:_LINES], "", f"*{plural(more, 'more line')}: see the report.*"])


def _fitting(parts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield the parts up to the limit in bytes, and a note if there are more."""
    left = limit - len(_REST) - 10  # blank lines
    for part in parts:
        encoded = part.encode("utf-8", "replace")
        if len(encoded) > left:
            # A table or list can be cut after any line; the output of a case is left out as a whole.
            lines = b"" if part.startswith("<details>") else encoded[: max(0, left)].rpartition(b"\n")[0]
            yield from filter(None, [lines.decode(), _REST])
            return
        left -= len(encoded) + 2
        yield part


def _output(record: Record) -> str:
    """Return the last output of a case, folded."""
    tail = record["output_tail"]
    if len(tail) > _TAIL:
        tail = f"[the beginning is in the report]\n{tail[-_TAIL:]}"
    # Markdown is not read inside <summary>, so HTML's escapes are needed there; it is again after the blank line.
    summary = f"<summary>The last lines of {html.escape(_cut(str(record['case_id']), _NAME))}</summary>"
    return f"<details>\n{summary}\n\n{sections.fenced(tail)}\n\n</details>"


def _duration(run: Run) -> str:
    seconds = [record["case_wall_time_s"] for record in run.records if record["case_wall_time_s"] is not None]
    return f"{plural(len(seconds), 'case')} took {_clock(sum(seconds))}, one after the other." if seconds else ""


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _files(run: Run, artifacts: str | None) -> str:
    if run.path.is_file():
        return f"Made from {escape(_cut(run.path.name, _NAME))} by itself, which does not describe the environment."
    names = ("report.html", "report.md", "comparison.md", "cases.csv", "summary.csv", "run.json", "journal.jsonl")
    there = ", ".join(f"`{name}`" for name in names if (run.path / name).is_file())
    where = f" ([files]({artifacts}))" if artifacts else ""
    return (
        f"The run is {escape(_cut(run.name, _NAME))}{where}: {there}. The report has the rest, and the limits of these "
        "numbers."
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
