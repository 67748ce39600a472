"""The files of a report: report.html, report.md, summary.csv and cases.csv, all made from the run's journal."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path

from mpscale.analysis.noise_floor import floors_of
from mpscale.analysis.probe import probes_of
from mpscale.analysis.summary import summary_csv, summary_of
from mpscale.core.cases_csv import read_cases
from mpscale.core.files.reading import CASES, REPORT, read_bytes, read_text
from mpscale.core.files.writing import write
from mpscale.core.record import Record, to_csv
from mpscale.core.run_lock import NAME, RunIsHeld, RunLock
from mpscale.core.runs import Run, RunError, read_run
from mpscale.report.document import Document, document, render
from mpscale.report.gains_figure import gains
from mpscale.report.memory_figure import MEMORY_OVER_TIME, memory_over_time
from mpscale.report.page import anchor_of, page
from mpscale.report.sweep_figure import over_batch
from mpscale.report.table import listed, plural
from mpscale.report.tradeoff_figure import tradeoff
from mpscale.report.training_figure import HOW_TRAINING_WENT, training

WRITTEN = ("report.html", "report.md", "summary.csv", "cases.csv")
"""Names of the files; the one to look at comes first."""


def rebuild(run_dir: str | Path, results: Path | None = None) -> Run:
    """Write the files of :data:`WRITTEN` again, from the journal of the run in ``run_dir`` and the steps beside it.

    A file that says more than what would replace it stays as it is, and :attr:`Run.problems` says so: the journal may
    have lost cases since, or the steps be gone.

    Args:
        run_dir: the folder of the run.
        results: the results folder. A run in it must not be a link that leads out of it; any other may be a link.

    Raises:
        RunError: the folder is not a run, is a link out of the results folder, or a file that they are made from is
            broken.
        OSError: the folder cannot be written.
    """
    run = read_run(run_dir)
    found = results is not None and run.path.parent.parent == results and run.path.is_symlink()
    if found and results is not None and not run.path.resolve().is_relative_to(results.resolve()):
        raise RunError(
            f"{run.path}: is a link to {run.path.resolve()}, and mpscale writes no report through a link that leads "
            "out of the results folder; name that folder instead"
        )
    if run.path.is_file():
        raise RunError(f"{run.path}: a report is made from a run's journal, and this is a cases.csv alone")
    if (run.path / NAME).is_file():
        # A process that was killed has left it. If another one writes the run, it stays.
        with contextlib.suppress(OSError, RunIsHeld):
            RunLock.take(run.path).free()
    cases = to_csv(run.records)
    kept: list[str] = []
    if why := _lost_from_the_journal(run, cases):
        kept = [name for name in WRITTEN if (run.path / name).is_file()]
        run.problems.append(
            f"{why}; {listed(kept, len(kept))} {'is' if len(kept) == 1 else 'are'} left as before. "
            "To make them from the journal all the same, move cases.csv away"
        )
    write_reports(run, cases, kept, keep_more=True)
    return run


def write_reports(run: Run, cases: str, kept: Container[str] = (), keep_more: bool = False) -> None:
    """Write the files of :data:`WRITTEN` into the folder of a run.

    Args:
        run: the run.
        cases: the content of cases.csv.
        kept: names of files to leave as they are.
        keep_more: whether to leave a report.html that shows more figures; :attr:`Run.problems` then says so.

    Raises:
        OSError: one of them cannot be written; the others are written all the same.
    """
    failures: list[OSError] = []

    def written(name: str, content: Callable[[], str]) -> None:
        if name not in kept:
            try:
                write(run.path / name, content())
            except OSError as error:
                failures.append(error)

    written("cases.csv", lambda: cases)
    written("summary.csv", lambda: summary_csv(summary_of(run)))
    report = document(run, floors_of(run), probes_of(run))
    written("report.md", lambda: render(report))
    if "report.html" not in kept:
        # Pictures come last: they take longest, and if they fail, everything else is written.
        html = _page(run, report)
        if keep_more and (why := _fewer_figures(run.path / "report.html", html)):
            run.problems.append(why)
        else:
            written("report.html", lambda: html)
    if failures:
        raise failures[0]


_FIGURE = re.compile(r'<figure id="([^"]+)"(?: data-unread="(\d+)")?>')


def _fewer_figures(path: Path, html: str) -> str | None:
    """Why a report.html stays as it is: a picture or lines of one are in it that cannot be drawn again."""
    if path.is_symlink():
        return None  # what it leads to stays as it is
    try:
        before = dict(_FIGURE.findall(read_text(path, REPORT)))
    except RunError:
        return None
    now = dict(_FIGURE.findall(html))
    # Figures of another version of mpscale, and those made from the journal alone, are no loss.
    gone = [
        name for name in map(anchor_of, (HOW_TRAINING_WENT, MEMORY_OVER_TIME)) if name in before and name not in now
    ]
    less = [name for name in before.keys() & now.keys() if int(now[name] or 0) > int(before[name] or 0)]
    if not (gone or less):
        return None
    what = f"the figures {listed(gone, len(gone))}" if gone else "more lines in its figures"
    return (
        f"report.html shows {what}, which can no longer be drawn, since files in steps or gpu are missing or broken; "
        "it is left as before. To make it without them, move it away"
    )


def report_page(run: Run) -> str:
    """Return the content of report.html."""
    return _page(run, document(run, floors_of(run), probes_of(run)))


def _page(run: Run, report: Document) -> str:
    if report.screen is not None:
        report = replace(report, screen=replace(report.screen, picture=tradeoff(run)))
    drawn = (gains(run), over_batch(run), training(run), memory_over_time(run))
    return page(report, [picture for picture in drawn if picture is not None])


def _lost_from_the_journal(run: Run, cases: str) -> str | None:
    """Why the journal knows less than cases.csv, which is written after it; None if it does not.

    Args:
        run: as its journal has it.
        cases: the content that cases.csv should have.
    """
    path = run.path / "cases.csv"
    if not path.is_file():
        return None  # a pipe or a device has no rows
    try:
        if read_bytes(path, CASES) == cases.encode():
            return None  # the usual case, without parsing a large file
        written = read_cases(path, only=["attempts", *_FIGURES])
    except RunError as error:
        # Made anew, unless it may be all that is left.
        whole = run.finished and not run.problems and not run.not_started
        return None if whole else f"the run is not whole, and cases.csv, which may have more of it, is broken: {error}"
    known = {record["case_id"]: record for record in run.records}

    def is_lost(row: Record) -> bool:
        here = known.get(row["case_id"])
        if here is None:
            return True
        is_later = (here["attempts"] or 1) > (row["attempts"] or 1)
        if row["status"] == "interrupted" or is_later:
            return False  # another attempt was made, and the last one counts
        if row["status"] == here["status"]:
            return any(row[name] is not None and here[name] is None for name in _FIGURES)
        return here["status"] in ("interrupted", "invalid")

    if lost := [row["case_id"] for row in written if is_lost(row)]:
        return (
            f"journal.jsonl lacks results of {plural(len(lost), 'case')} that cases.csv has, such as {lost[0]}: it was "
            "cut off or changed"
        )
    return None


_FIGURES = ("step_time_ms_median", "metric_value", "gpu_memory_nvml_peak_mib")
"""What a record must not have lost."""


def write_whole(folder: Path, files: Mapping[str, str]) -> None:
    """Write files by name, each whole or not at all: the process may be killed at any time.

    Raises:
        OSError: the folder cannot be written.
    """
    for name, text in files.items():
        write(folder / name, text)
