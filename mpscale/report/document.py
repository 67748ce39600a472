"""What a report says, section by section, whatever file it goes into."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpscale.analysis.noise_floor import NO_FLOORS, Floors
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.device import STAND_IN
from mpscale.core.mode import is_mixed
from mpscale.core.record import Record
from mpscale.core.runs import Run
from mpscale.report import sections
from mpscale.report import sections as gpu_sections
from mpscale.report import sections as noise_section
from mpscale.report import table as cells
from mpscale.report.table import Cells, escape, markdown_table, metric_why, result_cells


@dataclass(frozen=True)
class Document:
    """A report in parts, all but the title in markdown.

    Args:
        title: plain text.
        when: when the run was started, and by which versions it is to be read; may be empty.
        findings: the run in words.
        sections: by title, in order; those with nothing to say are left out.
    """

    title: str
    when: str
    findings: str
    sections: dict[str, str]


def document(run: Run, floors: Floors = NO_FLOORS) -> Document:
    """The report of a run.

    Args:
        run: the run.
        floors: how much runs of its code differ, where that is known.
    """
    headers, rows = result_cells(run)
    parts = {
        "Results": markdown_table(headers, rows) if rows else "",
        "Cases that did not end well": sections.troubles(run),
        "What could not be read": sections.unread(run, floors.left_out),
        "Overflow and loss scale": sections.overflow(run),
        "Accuracy": sections.accuracy(run),
        "Accuracy against fp32": sections.against_fp32(run),
        "Timing quality": sections.timing(run),
        "Noise of the step time": noise_section.noise(run, floors),
        "Memory": sections.memory(run),
        "GPU memory in parts (MiB)": gpu_sections.memory_parts(run),
        "Energy of the GPU": gpu_sections.energy(run),
        "State of the GPU while steps were timed": gpu_sections.state(run),
        "How to read this": how_to_read(run),
        "Environment": _facts(run.info.get("environment")),
        "Settings": _facts(run.info.get("settings")),
        "What is empty and why": sections.empty(run),
    }
    said = {title: text for title, text in parts.items() if text}
    return Document(f"mpscale: {run.name}", _when(run), findings(run), said)


def _when(run: Run) -> str:
    names = {"started": "Started", "schema_version": "schema version", "method_version": "method version"}
    known = [f"{label} {escape(run.info[name])}" for name, label in names.items() if run.info.get(name) is not None]
    return ", ".join(known) + "." if known else ""


def _facts(facts: Any) -> str:
    rows = [[name, value] for name, value in _flat(facts)] if isinstance(facts, Mapping) else []
    return markdown_table(["what", "value"], rows) if rows else ""


def _flat(facts: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts one a row, named by the way to them; None is unknown."""
    for key, value in facts.items():
        name = f"{above} {key}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, list | tuple):
            yield name, ", ".join(_fact(item) for item in value) or cells.DASH
        else:
            yield name, _fact(value)


def _fact(value: Any) -> str:
    if value is None:
        return cells.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# What a run found, in plain words made from its numbers, and what those numbers do not say.


def findings(run: Run) -> str:
    """A paragraph on the run as a whole and, for each mixed mode of each workload, a line with its result."""
    rows = summary_of(run)
    lines = [f"- {_finding(row, rows)}" for row in rows if is_mixed(row["mode"])]
    return "\n\n".join([_overview(run, rows), *(["\n".join(lines)] if lines else [])])


def how_to_read(run: Run) -> str:
    """The limits of the figures, as a list."""
    notes = [
        "A step is one call of the compiled train step: one batch, one update. Step time is steady state, in ms; "
        "compilation and the first step are apart.",
        "One process gives one number, the median of its blocks. Intervals are 95 % t intervals over processes, on "
        "logarithms; a speed-up is the geometric mean of baseline time / mode time over processes of the same seed "
        "and repeat, which ran side by side.",
        "What a mode costs (step time, memory, energy) and its speed-up are of seeds that ended well. A seed that was "
        "lost (it diverged, stalled or ended without a finite metric) makes the metric worse. A seed that failed or "
        "was not started says neither good nor bad, so that nothing is ruled out without it.",
        "Brackets hold the interval. Without brackets there was one process, and nothing is known of its noise; with "
        "two or three the interval is wide, and a speed-up needs several processes (more seeds or repeats) to be "
        "told from none. An interval that holds 1.00 shows no difference.",
    ]
    if any(row["headline_baseline"] == "tf32" for row in summary_of(run)):
        notes.append(
            "This GPU has TF32, which TensorFlow uses by default: the baseline to look at is tf32. Over fp32, with "
            "TF32 off, a speed-up looks larger than a user would see."
        )
    notes += [
        "The metric is the mean over seeds, with smallest and largest; modes are compared seed by seed, from the same "
        "weights and the same order of the data. non-inferior: a loss of more than the workload's margin is ruled out "
        "(one-sided, 95 %), in all seeds. worse: there is one, or a seed was lost. inconclusive: the seeds that there "
        "are show neither.",
        "Overflow steps are those with a non-finite gradient. A dash means that the mode checks no gradient, so that "
        "overflow is unknown there, and not that there was none.",
    ]
    if device_kind(run) == "cpu":
        notes += [
            "This run is from a CPU. There float16 is emulated, by conversions that XLA compiles; without XLA it is "
            "slower still, on some CPUs many times. Step times of float16 modes here say nothing about the speed-up on "
            "a GPU.",
            "The same goes for bfloat16: XLA on a CPU can make it several times slower than float32, whatever a GPU "
            "does with it.",
            "Host memory is the resident memory of the process and measures TensorFlow and its compiler more than "
            "the model. It says nothing about what mixed precision saves on a GPU, so no ratio is given.",
            "What a CPU run does show is whether training works: overflow, loss scale and final metric.",
        ]
    else:
        notes.append(
            "GPU memory is what the driver reports for the process, context and libraries included, so the ratio is "
            "that of whole processes. Host memory is no substitute for it."
        )
    if any(row["gpu_energy_j_per_step"] is not None for row in summary_of(run)):
        notes.append(
            "Energy is that of the whole GPU and of nothing else in the machine; above idle is what it drew more than "
            "before the process came. Medians over processes."
        )
    if (device_name(run) or "").startswith(STAND_IN):
        notes.append(
            "The GPU is a stand-in of the tests: the CPU trained, and the GPU's figures are those of a script."
        )
    return "\n".join(f"- {note}" for note in notes)


def device_kind(run: Run) -> str | None:
    """``cpu`` or ``gpu``, None where neither run.json nor a record says."""
    return _of_device(run, "kind", "device")


def device_name(run: Run) -> str | None:
    """The device's own name, None where neither run.json nor a record says."""
    return _of_device(run, "name", "device_name")


def _of_device(run: Run, key: str, column: str) -> str | None:
    known = [run.device.get(key), *(record[column] for record in run.records)]
    return next((str(value) for value in known if value is not None), None)


def _overview(run: Run, rows: Sequence[Row]) -> str:
    kind, name = device_kind(run), device_name(run)
    where = f" on {escape(name)}" if name else ""
    if kind:
        where += f" ({kind.upper()})"
    if not rows:
        return f"No case was started{where}, so there is nothing to report."
    workloads = list(dict.fromkeys(escape(row["workload"]) for row in rows))
    modes = list(dict.fromkeys(escape(row["mode"]) for row in rows))
    ok, cases = sum(row["ok"] for row in rows), len(run.records)
    sentences = [f"{_and(workloads)} {'was' if len(workloads) == 1 else 'were'} run in {_and(modes)}{where}."]
    started = "" if run.finished and not run.not_started else " that was started"
    sentences.append(
        f"Every case{started} ended well." if ok == cases else f"{cases - ok} of {cases} cases did not end well."
    )
    if run.not_started:
        left = len(run.not_started)
        sentences.append(f"{left} planned case{' was' if left == 1 else 's were'} not started.")
    if not run.finished:
        sentences.append("The run was stopped or is still going on: this is what there is so far.")
    if kind == "cpu":
        sentences.append("These are figures of a CPU: the speeds below say nothing about a GPU.")
    return " ".join(sentences)


def _finding(row: Row, rows: Sequence[Row]) -> str:
    parts = [part for part in (_speed(row, rows), _quality(row), _overflow(row), _memory(row)) if part]
    # The metric has its own word for seeds that are in no pair.
    if row["left_out"] and row["metric_verdict"] is None:
        parts.append(escape(row["left_out"]))
    if row["ok"] != row["cases"] or row["not_started"]:
        parts.append(f"cases: {cells.statuses(row)}")
    return f"{escape(row['workload'])}, **{escape(row['mode'])}**: {'; '.join(parts) or 'nothing was measured'}."


def _speed(row: Row, rows: Sequence[Row]) -> str | None:
    if row["step_time_ms"] is None:
        # Lost seeds may have been timed.
        return "no training ended well, so no step time counts" if row["seeds"] and not row["ok"] else None
    baseline = row["headline_baseline"]
    ratio, low, high = (row[f"speedup_{baseline}{end}"] for end in ("", "_low", "_high"))
    if ratio is None:
        beside = any((other["workload"], other["mode"]) == (row["workload"], baseline) for other in rows)
        why = f"with no {baseline}{' that ended well' if beside else ''} beside it to compare with"
        return f"{cells.number(row['step_time_ms'])} ms a step, {why}"
    of_some = cells.of_processes(row[f"speedup_{baseline}_pairs"], row)
    text = f"{ratio:.2f} times the speed of {baseline}{of_some}"
    if low is None or high is None:
        return f"{text} (one pair of processes, so no interval)"
    verdict = ", so no difference is shown" if low <= 1.0 <= high else ""
    return f"{text} (95 % interval {low:.2f} to {high:.2f}{verdict})"


def _quality(row: Row) -> str | None:
    name = row["metric_name"]
    if row["metric_mean"] is None:
        if row["metric_verdict"] is None:
            return None
        return f"no {escape(name or 'metric')}, {row['metric_verdict']}: {escape(metric_why(row))}"
    text = f"{escape(name or 'metric')} {cells.metric(row['metric_mean'], name)}"
    if row["metric_seeds"] < row["seeds_planned"]:
        text += f" over {row['metric_seeds']} of {row['seeds_planned']} seeds"
    if row["metric_difference"] is None:
        return text + (f", {row['metric_verdict']}{_because(row)}" if row["metric_verdict"] else "")
    seeds = f"{row['metric_pairs']} seed{'' if row['metric_pairs'] == 1 else 's'}"
    verdict = f", {row['metric_verdict']}{_because(row)}" if row["metric_verdict"] else ""
    return f"{text}, {cells.metric_change(row['metric_difference'], name)} fp32 ({seeds}{verdict})"


def _because(row: Row) -> str:
    """What seeds that were lost or left out have to do with the verdict; empty where all are in it."""
    if not row["left_out"] and not row["metric_left_out"]:
        return ""
    return f": {escape(metric_why(row))}"


def _overflow(row: Row) -> str | None:
    if row["overflow_steps"] is None or row["attempted_steps"] is None:
        return None
    text = f"{row['overflow_steps'] or 'none'} of {row['attempted_steps']} steps overflowed"
    return text + cells.of_seeds(row["overflow_seeds"], row)


def _memory(row: Row) -> str | None:
    ratio = row["gpu_memory_ratio"]
    if ratio is None:
        return None
    return f"peak GPU memory {ratio:.2f} times fp32's{cells.of_processes(row['gpu_memory_processes'], row)}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# report.md: what a run found, on what, and what its numbers do not say.


def render(document: Document) -> str:
    """The report as markdown."""
    head = [f"# {escape(document.title)}", document.when, document.findings]
    body = [f"## {title}\n\n{text}" for title, text in document.sections.items()]
    return "\n\n".join([part for part in head if part] + body) + "\n"


# A run for the page of a GitHub workflow run: what ``$GITHUB_STEP_SUMMARY`` takes.

LIMIT = 1_000_000
"""Bytes. GitHub shows nothing of a step that wrote more than 1 MiB; the rest is for what else the step writes."""

_LEAST_TAIL = 2_000
"""Bytes of a case's last output. Cases that this cannot be kept free for are left out."""
_NOTE = 300
"""Bytes that any note on what was left out stays below."""
_NAME = 200
"""Characters of a name: it is the only text here that nothing else bounds."""


def github_summary(run: Run, limit: int = LIMIT, artifacts: str | None = None) -> str:
    """What a run found, as markdown.

    Args:
        run: finished or not.
        limit: bytes that the text stays below; at least 10,000. What does not fit is left out, and a note says so.
        artifacts: address of the page with the run's files, if there is one.
    """
    kind = device_kind(run)
    where = " ".join(filter(None, [device_name(run), f"({kind.upper()})" if kind else ""]))
    title = f"# mpscale: {_short(where or run.name)}"
    end = "\n\n".join(filter(None, [_duration(run), _files(run, artifacts)]))
    # A quarter for each of the three that grow with the run; output, which may be of any length, gets what is over.
    share = limit // 4
    parts = [title, _lines(findings(run), share)]
    if run.problems:
        parts.append(f"## What could not be read\n\n{_lines(sections.unread(run), share // 4)}")
    headers, rows = result_cells(run)
    if rows:
        parts.append(f"## Results\n\n{_table(headers, rows, share)}")
    headers, rows = sections.trouble_cells(run)
    if rows:
        parts.append(f"## Cases that did not end well\n\n{_table(headers, rows, share - share // 4)}")
        left = limit - sum(_size(part) + 2 for part in (*parts, end)) - _NOTE
        parts += _outputs([record for record in run.records if record["status"] != "ok"], left)
    return "\n\n".join([*parts, end]) + "\n"


def artifacts_page(environ: Mapping[str, str]) -> str | None:
    """Where the files of the workflow run are that ``environ`` is of; None outside of GitHub Actions."""
    parts = [environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID")]
    return "{}/{}/actions/runs/{}#artifacts".format(*parts) if all(parts) else None


def _duration(run: Run) -> str:
    seconds = [record["case_wall_time_s"] for record in run.records if record["case_wall_time_s"] is not None]
    if not seconds:
        return ""
    number = f"{len(seconds)} case{'' if len(seconds) == 1 else 's'}"
    return f"{number} took {_clock(sum(seconds))}, one after the other."


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _files(run: Run, artifacts: str | None) -> str:
    if run.path.is_file():
        return f"Made from {_short(run.path.name)} by itself, which tells nothing of the environment."
    names = ("report.html", "report.md", "comparison.md", "cases.csv", "summary.csv", "run.json", "journal.jsonl")
    there = ", ".join(f"`{name}`" for name in names if (run.path / name).is_file())
    where = f" ([to the files]({artifacts}))" if artifacts else ""
    return f"The run is {_short(run.name)}{where}: {there}. The report has the rest, and what the numbers do not say."


def _table(headers: Sequence[str], rows: Cells, limit: int) -> str:
    def make(count: int) -> str:
        table = markdown_table(headers, rows[:count]) if count else ""
        return _with_note(table, len(rows) - count, "row")

    return make(_most(len(rows), lambda count: _size(make(count)) <= limit))


def _lines(text: str, limit: int) -> str:
    lines = text.split("\n")

    def make(count: int) -> str:
        return _with_note("\n".join(lines[:count]).rstrip("\n"), len(lines) - count, "line")

    return make(_most(len(lines), lambda count: _size(make(count)) <= limit))


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``count`` that fits, 0 if none does; less than what fits does so as well."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _with_note(text: str, left_out: int, what: str) -> str:
    if left_out == 0:
        return text
    note = f"*{left_out} more {what}{'' if left_out == 1 else 's'} did not fit in here; the report has all of them.*"
    return "\n\n".join(filter(None, [text, note]))


def _outputs(records: Sequence[Record], limit: int) -> Iterator[str]:
    """The last output of each case, folded; one that is long leaves room for those that are to come."""
    told = [record for record in records if record["output_tail"]]
    for place, record in enumerate(told):
        left_out = len(told) - place
        size = max(limit // left_out, _LEAST_TAIL)
        block = _output(record, size)
        if _size(block) + 2 > limit:
            yield f"*The last output of {left_out} more case{'' if left_out == 1 else 's'} did not fit in here.*"
            return
        limit -= _size(block) + 2
        yield block


def _output(record: Record, size: int) -> str:
    # Inside <summary> no markdown is read, so HTML's own escapes are the right ones; the blank line ends that.
    head = f"<details>\n<summary>The last lines of {html.escape(_cut(str(record['case_id'])))}</summary>\n\n"
    foot = "\n\n</details>"
    kept = record["output_tail"]
    text = sections.fenced(kept)
    # By halves, since the fence grows with what it has to hold.
    while _size(head + text + foot) > size and kept:
        kept = kept[(len(kept) + 1) // 2 :]
        text = sections.fenced(f"[the beginning did not fit in here]\n{kept}")
    return head + text + foot


def _short(text: str) -> str:
    return escape(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= _NAME else text[: _NAME - 1] + "…"


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))
