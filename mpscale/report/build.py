"""Makes everything in a run's folder that follows from its journal."""

from __future__ import annotations

from pathlib import Path

from mpscale.analysis.runs import Run, RunError, read_run
from mpscale.analysis.summary import write_summary_csv
from mpscale.records import to_csv
from mpscale.report import markdown


def rebuild(run_dir: str | Path) -> Run:
    """Writes cases.csv, summary.csv and report.md anew from the journal of the run in ``run_dir``.

    Raises:
        RunError: the folder is no run, or a file that the three are made from is broken.
        OSError: the folder cannot be written.
    """
    run = read_run(run_dir)
    if run.path.is_file():
        raise RunError(f"{run.path}: a report is made from a run's journal, which a cases.csv by itself does not have")
    (run.path / "cases.csv").write_text(to_csv(run.records), encoding="utf-8")
    write_summary_csv(run.summary, run.path / "summary.csv")
    markdown.write(run)
    return run
