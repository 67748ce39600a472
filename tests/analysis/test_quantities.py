"""The table of quantities, and verdicts: how often they are wrong if nothing changed, and right if something did."""

from __future__ import annotations

import numpy as np
import pytest
from support.runfolder import finished, record, write_run

from mpscale.analysis.change import Change, measure_change, with_verdicts
from mpscale.analysis.compare import ComparedRow, Comparison, compare
from mpscale.analysis.gates import judge_gates, parse_gates
from mpscale.analysis.history import make_history
from mpscale.analysis.pairs import Pair, State
from mpscale.analysis.quantities import COSTS, QUANTITIES, Cost, Outcome, Verdict
from mpscale.analysis.stats import log_change
from mpscale.core.reason import Code, Reason
from mpscale.core.runs import read_run
from mpscale.report.comparison import render
from mpscale.report.words import AGAINST_RUN

TIME, MEMORY = COSTS["step_time"], COSTS["host_memory"]


def processes(random, noise, number=4, slower=1.0):
    times = slower * np.exp(random.normal(0.0, noise, number))
    return [record(repeat=n, step_time_ms_median=time) for n, time in enumerate(times)]


def verdicts(random, noise, rows, slower=1.0):
    """The verdicts of a comparison in which only the first row has changed."""
    changes = [
        measure_change(processes(random, noise), processes(random, noise, slower=1.0 if row else slower), TIME)
        for row in range(rows)
    ]
    return [change.verdict for change in with_verdicts(changes)]


@pytest.mark.parametrize("noise", [0.005, 0.03, 0.1])
def test_runs_of_the_same_code_rarely_get_a_verdict(noise):
    random = np.random.default_rng(3)
    found = [verdicts(random, noise, rows=12) for _ in range(60)]
    # One in a hundred by design, and fewer if the noise is below the threshold.
    assert sum(bool({"slower", "faster"} & set(one)) for one in found) <= 1
    if noise == 0.005:
        assert all(set(one) == {"same"} for one in found)


@pytest.mark.parametrize(("slower", "verdict"), [(1.3, "slower"), (1 / 1.3, "faster"), (1.02, "same")])
def test_a_change_is_found_among_rows_that_have_none(slower, verdict):
    random = np.random.default_rng(4)
    found = [verdicts(random, 0.006, rows=12, slower=slower) for _ in range(20)]
    assert [one[0] for one in found].count(verdict) >= 19
    assert all(set(one[1:]) <= {"same", "cannot-tell"} for one in found)


def timed(ms, **identity):
    return record(step_time_ms_median=ms, **identity)


@pytest.mark.parametrize(
    ("quantity", "cases", "expected"),
    [
        pytest.param(TIME, [timed(1.0), timed(2.0, repeat=1)], [1.0, 2.0], id="repeats"),
        pytest.param(
            MEMORY,
            [record(host_memory_peak_mib=1.0), record(repeat=1, host_memory_peak_mib=2.0)],
            [1.0],
            id="memory of trainings only",
        ),
        pytest.param(TIME, [timed(1.0, status="crashed"), timed(2.0, seed=1)], [2.0], id="crashed"),
        pytest.param(
            TIME,
            [record(status="diverged"), timed(1.0, repeat=1), timed(2.0, seed=1)],
            [2.0],
            id="repeats of a lost training",
        ),
        pytest.param(TIME, [record()], [], id="not timed"),
    ],
)
def test_which_processes_count(quantity, cases, expected):
    assert quantity.sample(cases) == expected


def test_the_detectable_change_uses_the_error_rate_of_the_verdict():
    random = np.random.default_rng(5)
    sides = processes(random, 0.03), processes(random, 0.03)
    found = log_change(*(TIME.sample(side) for side in sides))
    for rows in (1, 12):
        assert measure_change(*sides, TIME, rows).detectable == found.detectable(1 - 0.01 / rows)


def test_a_figure_that_one_side_lacks_is_named_with_the_reason():
    known = record(gpu_memory_nvml_peak_mib=9.0)
    lacking = record()
    lacking.miss("gpu_memory_nvml_peak_mib", Reason(Code.NOT_TOLD, "the driver gave no process memory"))
    rows = [[one] for one in (known, lacking)]
    change = measure_change(*rows, COSTS["gpu_memory"])
    assert (change.baseline, change.other, change.change) == (pytest.approx(9.0), None, None)
    assert change.reason == "unknown for the run: the driver gave no process memory"
    assert with_verdicts([change])[0].verdict is Verdict.CANNOT_TELL


@pytest.mark.parametrize(
    ("quantity", "column", "differing"),
    [
        ("gpu_memory", "gpu_memory_nvml_peak_mib", {"gpu_allocator": ("cuda_malloc_async", "bfc")}),
        ("gpu_memory", "gpu_memory_nvml_peak_mib", {"gpu_memory_method": ("process", "device-minus-idle")}),
        ("energy", "gpu_energy_j_per_step", {"gpu_energy_method": ("counter", "power")}),
        ("gpu_memory", "gpu_memory_nvml_peak_mib", {"gpu_allocator": ("bfc", None)}),
    ],
)
def test_figures_of_different_things_are_not_compared(quantity, column, differing):
    ((name, kinds),) = differing.items()
    sides = [
        [record(seed=seed, **{column: 100.0 * (1 + side) + seed, name: kind}) for seed in range(3)]
        for side, kind in enumerate(kinds)
    ]
    (change,) = with_verdicts([measure_change(*sides, COSTS[quantity])])
    assert (change.change, change.verdict) == (None, Verdict.CANNOT_TELL)
    assert name in change.reason
    assert all((kind or "unknown") in change.reason for kind in kinds)
    (alike,) = with_verdicts([measure_change(sides[0], sides[0], COSTS[quantity])])
    assert alike.verdict is Verdict.SAME


def run_of(tmp_path, name, mib):
    cases = [record(seed=n, series_key="k", host_memory_peak_mib=mib + n) for n in range(3)]
    return read_run(write_run(tmp_path, finished(cases), name=name))


def test_a_quantity_is_one_entry(tmp_path, monkeypatch):
    new = Cost("resident", "resident memory", "host_memory_peak_mib", threshold=0.2)
    monkeypatch.setitem(QUANTITIES, new.name, new)
    monkeypatch.setitem(COSTS, new.name, new)
    runs = run_of(tmp_path, "a", 100.0), run_of(tmp_path, "b", 300.0)
    found = compare(*runs)
    assert found.rows[0].changes["resident"].verdict is Verdict.MORE
    (gate,) = judge_gates(found, parse_gates(["resident>20%"]))
    assert gate.outcome is Outcome.FIRED
    assert "B against A: resident memory" in render([found], [gate], "table")
    assert len(make_history(runs, "resident").series[0].points) == 2


def test_a_ratio_needs_a_column_that_is_never_0():
    with pytest.raises(ValueError, match="overflow_steps may be 0"):
        Cost("overflow", "overflow", "overflow_steps", threshold=0.1)


def test_every_verdict_and_state_is_counted(tmp_path):
    run, other = run_of(tmp_path, "a", 100.0), run_of(tmp_path, "b", 100.0)
    verdicts = [verdict for verdict in Verdict if verdict is not Verdict.NOT_COMPARABLE]
    rows = [
        ComparedRow(
            Pair("toy", f"{verdict}", state, None, run.records, run.records),
            {TIME.name: Change(TIME.name, 1.0, 1.0, verdict=verdict)},
            None,
            (None, None),
        )
        for verdict, state in [*((each, State.PAIRED) for each in verdicts), *((Verdict.SAME, each) for each in State)]
    ]
    text = render([Comparison(run, other, True, ({}, {}), [], rows=rows)], [], "table")
    line = next(line for line in text.splitlines() if line.startswith("B against A: "))
    for word in (*verdicts, *(state for state in State if state is not State.PAIRED)):
        said = AGAINST_RUN[word] if isinstance(word, Verdict) else word
        assert f"{1 + len(State) if word is Verdict.SAME else 1} {said}" in line


def test_the_worst_comes_first():
    assert sorted(Verdict, key=lambda verdict: verdict.rank) == list(Verdict)
    assert [str(outcome) for outcome in Outcome] == ["fired", "cannot-tell", "passed", "not-applicable"]
    assert {v for v in Verdict if v.outcome is Outcome.FIRED} == {Verdict.SLOWER, Verdict.MORE, Verdict.WORSE}
