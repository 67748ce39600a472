"""A plug-in for sessions whose page nobody opens, ``-p support.no_page``: its pictures take longer than a short run.

tests/system/test_main_job.py, test_sweep_run.py, test_bad_cases.py and test_interrupt.py have sessions with pages.
"""

from __future__ import annotations

from mpscale.report import files


def pytest_configure(config):
    files._page = lambda run, report: "a page"
