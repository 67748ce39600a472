"""Makes everything in a run's folder that follows from its journal."""

from __future__ import annotations

from pathlib import Path

from mpscale.analysis.cases_csv import read_cases
from mpscale.analysis.noise_floor import floors_of
from mpscale.analysis.runs import Run, RunError, read_run
from mpscale.analysis.summary import write_summary_csv
from mpscale.records import Record, to_csv
from mpscale.report import html, markdown
from mpscale.report.document import document
from mpscale.report.gains_figure import gains
from mpscale.report.training_figure import training

WRITTEN = ("report.html", "report.md", "summary.csv", "cases.csv")
"""Names of the files that are made, the one to look at first."""


def rebuild(run_dir: str | Path) -> Run:
    """Writes the files of :data:`WRITTEN` anew from the journal of the run in ``run_dir``, and the steps beside it.

    Raises:
        RunError: the folder is no run, or a file that they are made from is broken.
        OSError: the folder cannot be written.
    """
    run = read_run(run_dir)
    if run.path.is_file():
        raise RunError(f"{run.path}: a report is made from a run's journal, which a cases.csv by itself does not have")
    lost = _lost_from_the_journal(run)
    if lost:
        run.problems.append(
            f"journal.jsonl lacks the results of {len(lost)} case{'' if len(lost) == 1 else 's'} that cases.csv has, "
            f"such as {lost[0]}: it was cut off or changed; cases.csv is left as it was"
        )
    write_reports(run, cases=not lost)
    return run


def write_reports(run: Run, cases: bool = True) -> None:
    """Writes the files of :data:`WRITTEN` into the folder of a run that was read.

    Args:
        run: the run.
        cases: whether cases.csv is written too.

    Raises:
        OSError: the folder cannot be written.
    """
    if cases:
        _write(run.path / "cases.csv", to_csv(run.records))
    write_summary_csv(run.summary, run.path / "summary.csv")
    said = document(run, floors_of(run))
    _write(run.path / "report.md", markdown.render(said))
    # Last: pictures take longest, and nothing else should wait for them or be lost with them.
    pictures = [picture for picture in (gains(run), training(run)) if picture is not None]
    _write(run.path / "report.html", html.render(said, pictures))


def _lost_from_the_journal(run: Run) -> list[str]:
    """Cases whose result is in cases.csv, which is written after the journal, and no longer in the journal."""
    try:
        written = read_cases(run.path / "cases.csv")
    except RunError:
        return []
    known = {record["case_id"]: record for record in run.records}

    def is_lost(row: Record) -> bool:
        here = known.get(row["case_id"])
        if here is None or here["status"] != "interrupted" or row["status"] == "interrupted":
            return here is None
        # An attempt that was cut off has no row in cases.csv, where the one before it stands.
        return (row["attempts"] or 1) >= (here["attempts"] or 1)

    return [row["case_id"] for row in written if is_lost(row)]


def _write(path: Path, text: str) -> None:
    # run.json holds names of folders and variables, which need not be text.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
