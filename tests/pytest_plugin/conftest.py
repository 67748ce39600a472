"""Sessions in which nothing is trained."""

import pytest
from support.no_training import replace_trainings
from support.small_suite import SUITE


@pytest.fixture
def trainings(monkeypatch):
    def replace(happen=lambda case: {}):
        replace_trainings(monkeypatch, happen)

    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    # A session is about the journal here; pictures take longer than all the rest.
    monkeypatch.setattr("mpscale.report.files._page", lambda run, report: "a page")
    monkeypatch.setattr("sys.argv", ["pytest"])
    replace()
    return replace


@pytest.fixture
def session(trainings, pytester):
    """Run pytest on a suite; return its exit code and output."""
    pytester.makepyfile(test_it=SUITE)
    pytester.makeini("[pytest]")

    def run(*options):
        switched_off = [f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest", "unraisableexception")]
        result = pytester.runpytest_inprocess(*switched_off, *options, no_reraise_ctrlc=True)
        return int(result.ret), result.stdout.str() + result.stderr.str()

    return run
