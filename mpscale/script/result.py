"""What :func:`mpscale.compare` returns: the run, as tables, as a page and in words."""

from __future__ import annotations

import html
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mpscale.analysis.summary import summary_of
from mpscale.core.columns import FAILED
from mpscale.core.invocation import as_arguments
from mpscale.core.runs import Run, read_run, summary_frame
from mpscale.report.files import WRITTEN, report_page
from mpscale.report.first_screen import first_screen, plain
from mpscale.report.page import read_page
from mpscale.report.table import plural
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    import pandas as pd

_REASON = 200
"""Characters of a reason that a sentence repeats."""
_BAD = (*FAILED, "diverged", "stalled")


class Comparison:
    """A training in several precisions, compared. In a notebook it is shown as the page of its report.

    Args:
        folder: of the run, whose files are described in docs/reports.md.
        exit_code: of ``mpscale run``: 0 if every case went well and no gate fired, else 1.
    """

    def __init__(self, folder: Path, exit_code: int) -> None:
        self.folder, self.exit_code = folder, exit_code

    @cached_property
    def run(self) -> Run:
        """The run, as :func:`mpscale.read_run` returns it; its ``steps`` are the log of each step."""
        return read_run(self.folder)

    @property
    def cases(self) -> pd.DataFrame:
        """One row per case, with a column for each figure; see docs/metrics.md."""
        return self.run.cases

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per mode, with speed-up, memory and verdicts; the same as summary.csv."""
        return summary_frame(summary_of(self.run))

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of :attr:`cases` that did not end well: they failed, diverged or stalled. Empty if all did."""
        return self.cases[self.cases["status"].isin(_BAD)]

    @property
    def report(self) -> Path:
        """The page with the report, complete in itself."""
        return self.folder / WRITTEN[0]

    def __repr__(self) -> str:
        """The answer in words."""
        said = [*filter(None, [self.trouble]), plain(first_screen(self.run)), f"report: {self.report}"]
        return visible("\n".join(said))

    def _repr_html_(self) -> str:
        """The page, within a frame, so that neither its style nor the notebook's reaches the other."""
        page = read_page(self.report) or report_page(self.run)
        # The address of what is in the frame; without it, links within the page would lead to the notebook.
        page = page.replace('href="#', 'href="about:srcdoc#')
        return (
            f"<p>{html.escape(f'{self.trouble} ' if self.trouble else '')}<code>{html.escape(str(self.report))}"
            f'</code></p>\n<iframe srcdoc="{html.escape(page)}" sandbox="" title="Report of mpscale" '
            'style="width: 100%; height: 85vh; min-height: 30em; border: 1px solid #8888"></iframe>'
        )

    @property
    def trouble(self) -> str:
        """Which cases did not end well, as a sentence; empty if all did."""
        bad = [record for record in self.run.records if record["status"] in _BAD]
        if not bad:
            return ""
        first = bad[0]
        why = f" ({as_arguments(str(first['status_reason'])):.{_REASON}})" if first["status_reason"] else ""
        return (
            f"{plural(len(bad), 'case')} of {max(len(self.run.info['planned']), len(bad))} did not end well, the first "
            f"is {first['case_id']}: {first['status']}{why}."
        )
