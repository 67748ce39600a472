"""A run for the page of a GitHub workflow run: what ``$GITHUB_STEP_SUMMARY`` takes."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence

from mpscale.analysis.runs import Run
from mpscale.records import Record
from mpscale.report import sections, words
from mpscale.report.tables import Cells, escape, markdown_table, result_cells

LIMIT = 1_000_000
"""Bytes. GitHub shows nothing of a step that wrote more than 1 MiB; the rest is for what else the step writes."""

_LEAST_TAIL = 2_000
"""Bytes of a case's last output. Cases that this cannot be kept free for are left out."""
_NOTE = 300
"""Bytes that any note on what was left out stays below."""
_NAME = 200
"""Characters of a name: it is the only text here that nothing else bounds."""


def render(run: Run, limit: int = LIMIT, artifacts: str | None = None) -> str:
    """What a run found, as markdown.

    Args:
        run: finished or not.
        limit: bytes that the text stays below; at least 10,000. What does not fit is left out, and a note says so.
        artifacts: address of the page with the run's files, if there is one.
    """
    kind = words.device_kind(run)
    where = " ".join(filter(None, [words.device_name(run), f"({kind.upper()})" if kind else ""]))
    title = f"# mpscale: {_short(where or run.name)}"
    end = "\n\n".join(filter(None, [_duration(run), _files(run, artifacts)]))
    # A quarter for each of the three that grow with the run; output, which may be of any length, gets what is over.
    share = limit // 4
    parts = [title, _lines(words.findings(run), share)]
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
