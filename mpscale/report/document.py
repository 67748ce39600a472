"""The report of a run, as a document and as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpscale.analysis.noise_floor import NO_FLOORS, Floors
from mpscale.analysis.probe import Kept
from mpscale.analysis.summary import summary_of
from mpscale.core.invocation import for_reader
from mpscale.core.runs import Run
from mpscale.report import costs, lint, merged, pipelines, probe_tables, sections, sweep, trouble
from mpscale.report.about import facts, when
from mpscale.report.findings import findings
from mpscale.report.first_screen import Screen, first_screen, markdown
from mpscale.report.float8 import float8
from mpscale.report.growth import growth
from mpscale.report.notes import how_to_read
from mpscale.report.table import Table, escape


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report under a heading.

    Args:
        title: the heading, plain text.
        parts: tables, and texts in markdown. Empty parts are left out.
        group: if the first part is a table with a row per workload and mode: the name of its columns in the one wide
            table that a page makes of all of these.
        folded: whether it is for looking things up, so that a page shows only its heading at first.
        sentences: whether its tables have cells that are long enough to be broken into lines.
    """

    title: str
    parts: Sequence[Table | str]
    group: str = ""
    folded: bool = False
    sentences: bool = False

    def filled(self) -> Section | None:
        """Leave out empty parts; None if there are no others."""
        parts = [part for part in self.parts if part]
        return Section(self.title, parts, self.group, self.folded, self.sentences) if parts else None


@dataclass(frozen=True)
class Document:
    """A report in parts. All texts but the titles are markdown.

    Args:
        title: plain text.
        when: start of the run, and the versions of schema and method; may be empty.
        findings: the run in words.
        sections: in order; empty ones are left out.
        screen: the first screen; None if there is none.
        note: what somebody noted about the run, plain text; may be empty.
    """

    title: str
    when: str
    findings: str
    sections: Sequence[Section]
    screen: Screen | None = None
    note: str = ""

    def __post_init__(self) -> None:
        filled = [section for each in self.sections if (section := each.filled()) is not None]
        object.__setattr__(self, "sections", filled)

    def parts_of(self, title: str) -> Sequence[Table | str]:
        """Return what a section contains; nothing if it was left out."""
        return next((section.parts for section in self.sections if section.title == title), ())


def document(run: Run, floors: Floors = NO_FLOORS, probes: Sequence[Kept] = ()) -> Document:
    """Make the report of a run.

    Args:
        run: the run.
        floors: how much runs of the same code differ, if that is known.
        probes: of its workloads.
    """
    parts = [
        Section("Results", [sections.results(run), sections.doubts_note(summary_of(run))], group="In short"),
        Section("Speed-up over batch", sweep.by_batch(run)),
        Section("Scaling over replicas", sweep.by_replicas(run)),
        Section("Static loss scales", sweep.by_scale(run)),
        Section("Cases that did not end well", trouble.troubles(run), sentences=True),
        Section("Lint", lint.section(run), sentences=True),
        Section("Notes on cases", [trouble.notes(run)], sentences=True),
        Section("What could not be read", [trouble.unread(run, floors.left_out)]),
        Section("Accuracy against fp32", [sections.against_fp32(run)], group="Metric against fp32"),
        Section("Overflow and loss scale", [sections.overflow(run), growth(run)], group="Overflow and loss scale"),
        Section("Scales of float8", float8(run)),
        Section("Gradient range", probe_tables.section(probes)),
        Section("Workloads without a metric", sections.without_metric(run), group="Throughput and loss"),
        Section("Input pipelines", pipelines.pipelines(run), group="Input"),
        Section("Timing quality", costs.timing(run, floors), group="Timing"),
        Section("Memory", costs.memory(run), group="Memory"),
        Section("GPU memory by part (MiB)", costs.memory_parts(run), group="GPU memory by part (MiB)"),
        Section("GPU energy", costs.energy(run), group="GPU energy"),
        Section("Arithmetic", costs.arithmetic(run), group="Arithmetic"),
        Section("GPU state while steps were timed", [costs.gpu_state(run)], group="GPU while steps were timed"),
        Section("Metric of each seed", [sections.by_seed(run)], folded=True),
        Section("How to read this", [how_to_read(run)]),
        Section("Parts", [merged.parts(run)], sentences=True),
        Section("Environment", [facts(run.info.get("environment"))], folded=True, sentences=True),
        Section("Settings", [facts(run.info.get("settings"))], folded=True, sentences=True),
        Section("Missing values", [trouble.missing(run)], folded=True, sentences=True),
    ]
    parts = [replace(each, parts=[_worded(part, run) for part in each.parts]) for each in parts]
    said = for_reader(findings(run), run.info)
    return Document(f"mpscale: {run.shown}", when(run.info), said, parts, first_screen(run), run.note or "")


def _worded(part: Table | str, run: Run) -> Table | str:
    """A part in the words of who made the run, except for the output of a case."""
    if isinstance(part, Table):
        return part.worded(lambda text: for_reader(text, run.info))
    said, fence, output = part.partition("```")
    return f"{for_reader(said, run.info)}{fence}{output}"


def render(document: Document) -> str:
    """Return the report as markdown."""
    parts: list[Table | str] = [f"# {escape(document.title)}", escape(document.note)]
    parts += [] if document.screen is None else [markdown(document.screen)]
    parts += [document.when, document.findings]
    for section in document.sections:
        parts += [f"## {section.title}", *section.parts]
    return "\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts if part) + "\n"
