"""pytest plug-ins switched off: a run works without them, or names the one it needs."""

from __future__ import annotations

import functools

import pytest
from support.small_suite import SUITE, pytest_here, write


@pytest.fixture
def called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, suite___test_it=SUITE + "\n\ndef test_plain():\n    pass\n")
    return functools.partial(pytest_here, tmp_path, "suite")


@pytest.mark.parametrize(
    "options",
    [
        ("-p", "no:benchmark"),
        ("-p", "no:benchmark", "--strict-markers"),
        ("-p", "no:benchmark", "--collect-only"),
        ("-p", "no:benchmark", "-p", "no:cacheprovider", "-k", "training"),
    ],
    ids=" ".join,
)
def test_without_pytest_benchmark_a_case_is_refused_with_advice(called, options):
    code, said = called(*options)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "switched off: leave out `-p no:benchmark`" in said
    assert "INTERNALERROR" not in said and "Traceback" not in said


@pytest.mark.parametrize(
    "options",
    [
        ("-p", "no:benchmark", "-k", "plain"),
        ("--benchmark-skip",),
        ("-p", "no:terminal", "--benchmark-skip"),
        ("-p", "no:terminal", "-k", "plain"),
        ("-p", "no:cacheprovider", "-k", "plain"),
        ("-p", "no:xdist", "-k", "plain"),
        ("-p", "no:capture", "-k", "plain"),
    ],
    ids=" ".join,
)
def test_if_no_case_runs_no_plug_in_is_needed(called, options):
    code, said = called(*options)
    assert code == pytest.ExitCode.OK, said
    assert "INTERNALERROR" not in said
