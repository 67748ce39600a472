"""The files of a report: report.html, report.md, summary.csv and cases.csv, all made from the run's journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from mpscale.analysis.noise_floor import floors_of
from mpscale.analysis.probe import probes_of
from mpscale.analysis.summary import summary_csv, summary_of
from mpscale.core.cases_csv import read_cases
from mpscale.core.record import Record, to_csv
from mpscale.core.run_folder import write_cases
from mpscale.core.runs import Run, RunError, read_run
from mpscale.core.writing import write
from mpscale.report.document import Document, document, render
from mpscale.report.gains_figure import gains
from mpscale.report.memory_figure import memory_over_time
from mpscale.report.page import page
from mpscale.report.sweep_figure import over_batch
from mpscale.report.table import plural
from mpscale.report.tradeoff_figure import tradeoff
from mpscale.report.training_figure import training

WRITTEN = ("report.html", "report.md", "summary.csv", "cases.csv")
"""Names of the files; the one to look at comes first."""


def rebuild(run_dir: str | Path, results: Path | None = None) -> Run:
    """Write the files of :data:`WRITTEN` again, from the journal of the run in ``run_dir`` and the steps beside it.

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
    cases = to_csv(run.records)
    if lost := _lost_from_the_journal(run, cases):
        run.problems.append(
            f"journal.jsonl lacks the results of {plural(len(lost), 'case')} that cases.csv has, such as {lost[0]}: "
            "it was cut off or changed; cases.csv is left as it was"
        )
    write_reports(run, None if lost else cases)
    return run


def write_reports(run: Run, cases: str | None) -> None:
    """Write the files of :data:`WRITTEN` into the folder of a run.

    Args:
        run: the run.
        cases: the content of cases.csv; None leaves that file as it is.

    Raises:
        OSError: one of them cannot be written; the others are written all the same.
    """
    failures: list[OSError] = []

    def written(write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            failures.append(error)

    if cases is not None:
        written(lambda: write_cases(run.path, cases))
    written(lambda: write(run.path / "summary.csv", summary_csv(summary_of(run))))
    report = document(run, floors_of(run), probes_of(run))
    written(lambda: write(run.path / "report.md", render(report)))
    # Pictures come last: they take longest, and if they fail, everything else is written.
    written(lambda: write(run.path / "report.html", _page(run, report)))
    if failures:
        raise failures[0]


def report_page(run: Run) -> str:
    """Return the content of report.html."""
    return _page(run, document(run, floors_of(run), probes_of(run)))


def _page(run: Run, report: Document) -> str:
    if report.screen is not None:
        report = replace(report, screen=replace(report.screen, picture=tradeoff(run)))
    drawn = (gains(run), over_batch(run), training(run), memory_over_time(run))
    return page(report, [picture for picture in drawn if picture is not None])


def _lost_from_the_journal(run: Run, cases: str) -> list[str]:
    """Cases whose result is in cases.csv, which is written after the journal, but no longer in the journal.

    Args:
        run: as its journal has it.
        cases: the content that cases.csv should have.
    """
    path = run.path / "cases.csv"
    try:
        if path.read_bytes() == cases.encode():
            return []  # the usual case, without parsing a large file
        written = read_cases(path, only=["attempts"])
    except (OSError, RunError):
        return []
    known = {record["case_id"]: record for record in run.records}

    def is_lost(row: Record) -> bool:
        here = known.get(row["case_id"])
        if here is None or here["status"] != "interrupted" or row["status"] == "interrupted":
            return here is None
        # cases.csv has no row of an attempt that was cut off, only of the attempt before.
        return (row["attempts"] or 1) >= (here["attempts"] or 1)

    return [row["case_id"] for row in written if is_lost(row)]


def write_whole(folder: Path, files: Mapping[str, str]) -> None:
    """Write files by name, each whole or not at all: the process may be killed at any time.

    Raises:
        OSError: the folder cannot be written.
    """
    for name, text in files.items():
        write(folder / name, text)
