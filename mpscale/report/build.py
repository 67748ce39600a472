"""Makes everything in a run's folder that follows from its journal."""

from __future__ import annotations

from pathlib import Path

from mpscale.analysis.noise_floor import find_floors, runs_of_the_same_code
from mpscale.analysis.runs import Run, RunError, read_run
from mpscale.analysis.summary import write_summary_csv
from mpscale.records import to_csv
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
    (run.path / "cases.csv").write_text(to_csv(run.records), encoding="utf-8", errors="backslashreplace")
    write_summary_csv(run.summary, run.path / "summary.csv")
    said = document(run, find_floors(runs_of_the_same_code(run)))
    (run.path / "report.md").write_text(markdown.render(said), encoding="utf-8", errors="backslashreplace")
    # Last: pictures take longest, and nothing else should wait for them or be lost with them.
    pictures = [picture for picture in (gains(run), training(run)) if picture is not None]
    (run.path / "report.html").write_text(html.render(said, pictures), encoding="utf-8", errors="backslashreplace")
    return run
