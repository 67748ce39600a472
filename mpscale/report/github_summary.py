"""The summary of a run for a GitHub workflow: the report's most important parts, which always fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mpscale.analysis.summary import summary_of
from mpscale.core.invocation import for_reader
from mpscale.core.record import Record
from mpscale.core.runs import Run
from mpscale.report import sections, trouble
from mpscale.report.about import device_kind, device_name
from mpscale.report.findings import findings
from mpscale.report.first_screen import first_screen, markdown
from mpscale.report.pieces import text as html
from mpscale.report.table import Table, escape, plural, without_references
from mpscale.terminal.streams import on_one_line

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
    bad = trouble.trouble_table(run)
    bad = Table(bad.headers, [[_cut(cell, _CELL) for cell in row] for row in bad.rows])
    results = (sections.results(run).markdown(), sections.doubts_note(summary_of(run)))
    parts = [f"# mpscale: {escape(_cut(where or run.name, _NAME))}"]
    parts += [escape(run.note)] if run.note else []
    parts += [_head(markdown(first_screen(run))), _head(for_reader(findings(run), run.info))]
    for title, part in (
        ("What could not be read", trouble.unread(run)),
        ("Results", "\n\n".join(filter(None, results))),
        ("Cases that did not end well", bad.markdown()),
    ):
        if part:
            parts.append(f"## {title}\n\n{_head(for_reader(part, run.info))}")
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
    name = without_references(html(_cut(on_one_line(str(record["case_id"])), _NAME)))
    summary = f"<summary>The last lines of {name}</summary>"
    return f"<details>\n{summary}\n\n{trouble.fenced(tail)}\n\n</details>"


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
        f"The run is {escape(_cut(run.shown, _NAME))}{where}: {there}. The report has the rest, and the limits of "
        "these numbers."
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
