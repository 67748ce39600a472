"""Which process of a run tunes XLA's kernels, and which ones reuse the results."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpscale.core.case import Case, Settings
from mpscale.harness.autotuning import SharedTuning

CASE = Case("module:workload", "fp32", 0, 0, 0, Settings(autotune="shared"))
LATER = replace(CASE, seed=1)


def play(tuning, case, status, writes="results"):
    """Run a case that saves results, if it is to save any, and ends like this; return what it does with results."""
    flag = tuning.flag(case)
    if flag is None:
        return None
    what, file = re.fullmatch(r"--xla_gpu_(dump|load)_autotune_results_(?:to|from)='(.*)'", flag).groups()
    if what == "dump" and writes is not None:
        Path(file).write_text(writes)
    tuning.ended(case, status)
    return what


@pytest.mark.parametrize("status", ["ok", "diverged", "stalled"])
def test_results_of_a_case_that_ran_to_its_end_are_reused(tmp_path, status):
    tuning = SharedTuning(SimpleNamespace(path=tmp_path))
    cases = [CASE, LATER, replace(CASE, repeat=1), replace(CASE, mode="mixed-bf16"), replace(CASE, workload="other")]
    assert [play(tuning, case, status) for case in cases] == ["dump", "load", "load", "dump", "dump"]


@pytest.mark.parametrize("status", ["invalid", "error", "crashed", "oom", "timeout", "interrupted"])
def test_results_of_any_other_case_are_not(tmp_path, status):
    tuning = SharedTuning(SimpleNamespace(path=tmp_path))
    assert [play(tuning, CASE, status), play(tuning, CASE, "ok"), play(tuning, LATER, "ok")] == ["dump", "dump", "load"]


@pytest.mark.parametrize("writes", [None, ""], ids=["missing", "empty"])
def test_without_results_the_next_process_tunes(tmp_path, writes):
    tuning = SharedTuning(SimpleNamespace(path=tmp_path))
    # The second case must not find what an earlier one has left.
    play(tuning, CASE, "timeout")
    assert [play(tuning, case, "ok", writes) for case in (CASE, LATER)] == ["dump", "dump"]


def test_results_that_a_case_failed_with_are_forgotten(tmp_path):
    tuning = SharedTuning(SimpleNamespace(path=tmp_path))
    found = [play(tuning, CASE, status) for status in ("ok", "invalid", "error", "ok", "ok")]
    assert found == ["dump", "load", "load", "dump", "load"]


@pytest.mark.parametrize("change", [{"autotune": "fresh"}, {"jit": False}])
def test_nothing_is_shared_unless_asked_for(tmp_path, change):
    assert (
        play(
            SharedTuning(SimpleNamespace(path=tmp_path)), replace(CASE, settings=replace(CASE.settings, **change)), "ok"
        )
        is None
    )


@pytest.mark.parametrize("name", ["größe", "it's", "a/b", "a" * 250, "\udcc3"])
def test_a_workload_may_have_any_name(tmp_path, name):
    tuning, case = SharedTuning(SimpleNamespace(path=tmp_path)), replace(CASE, workload=name)
    assert [play(tuning, case, "ok"), play(tuning, case, "ok")] == ["dump", "load"]
    assert all(path.name.isascii() and len(path.name) < 50 for path in tmp_path.iterdir())
