"""What a report says, section by section, whatever file it goes into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpscale.analysis.noise_floor import NO_FLOORS, Floors
from mpscale.analysis.runs import Run
from mpscale.report import cells, gpu_sections, noise_section, sections, words
from mpscale.report.tables import escape, markdown_table, result_cells


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
        "How to read this": words.how_to_read(run),
        "Environment": _facts(run.info.get("environment")),
        "Settings": _facts(run.info.get("settings")),
        "What is empty and why": sections.empty(run),
    }
    said = {title: text for title, text in parts.items() if text}
    return Document(f"mpscale: {run.name}", _when(run), words.findings(run), said)


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
