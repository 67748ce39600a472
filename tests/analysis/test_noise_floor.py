"""The noise floor: which runs are of the same code, how much they differ, and what that means for verdicts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.runfolder import CPU, finished, record, write_run

from mpscale.analysis.compare import compare, floors_for
from mpscale.analysis.noise_floor import floors_from_samples, moderated, runs_of_the_same_code
from mpscale.analysis.stats import Between, holm, log_change
from mpscale.core.runs import read_run

ROWS = [("toy", str(number), "key") for number in range(20)]
FEW = ROWS[:3]


def simulated(random, common, own, within, processes=3, rows=ROWS):
    """A run: by row, times with an effect of the machine, an effect of the row, and noise of the processes."""
    shift = random.normal(0.0, common)
    return {
        row: np.exp(shift + random.normal(0.0, own) + random.normal(0.0, within, processes)).tolist() for row in rows
    }


def slower_rows(baseline, other, floors, threshold):
    """Indices of the rows that a gate would fire on."""
    changes = [log_change(baseline[row], other[row], floors[row[:2]]) for row in baseline]
    adjusted = holm([change.p_increase() for change in changes])
    return [
        place
        for place, (p_value, change) in enumerate(zip(adjusted, changes, strict=True))
        if p_value <= 0.01 and change.change >= threshold
    ]


@pytest.mark.parametrize(
    ("common", "own", "within"),
    [
        pytest.param(0.002, 0.001, 0.004, id="quiet"),
        pytest.param(0.10, 0.02, 0.02, id="a machine that changes between runs"),
        pytest.param(0.0, 0.03, 0.005, id="rows that change independently"),
        pytest.param(0.0, 0.0, 0.04, id="only processes differ"),
    ],
)
@pytest.mark.parametrize("rows", [FEW, ROWS], ids=len)
def test_same_code_rarely_looks_slower(common, own, within, rows):
    random = np.random.default_rng(1)
    false, trials = 0, 120
    for _ in range(trials):
        runs = [simulated(random, common, own, within, rows=rows) for _ in range(6)]
        false += bool(slower_rows(runs[4], runs[5], floors_from_samples(runs[:5]), threshold=0.0))
    # 1 % by design: five or more of 120 happen once in two hundred such tests.
    assert false <= 4


def test_a_change_of_five_percent_is_found_above_a_floor_of_one():
    random = np.random.default_rng(2)
    found, limits = 0, []
    for _ in range(60):
        runs = [simulated(random, 0.002, 0.001, 0.004) for _ in range(6)]
        floors = floors_from_samples(runs[:5])
        limits.append(np.median([floor.limit for floor in floors.values()]))
        runs[5][ROWS[7]] = [1.05 * value for value in runs[5][ROWS[7]]]
        found += slower_rows(runs[4], runs[5], floors, threshold=0.025) == [7]
    assert np.median(limits) == pytest.approx(0.009, abs=0.002)
    assert found >= 57


def test_two_runs_of_the_same_code_differ_by_less_than_the_floor():
    random = np.random.default_rng(3)
    limits, differences = [], []
    for _ in range(200):
        runs = [simulated(random, 0.02, 0.01, 0.01, rows=FEW) for _ in range(8)]
        limits.append(floors_from_samples(runs[:6])[FEW[0][:2]].limit)
        differences.append(abs(np.mean(np.log(runs[6][FEW[0]])) - np.mean(np.log(runs[7][FEW[0]]))))
    assert np.mean(np.array(differences) < np.log1p(np.median(limits))) == pytest.approx(0.95, abs=0.05)


def test_a_single_process_is_enough_if_the_floor_is_known():
    random = np.random.default_rng(4)
    runs = [simulated(random, 0.002, 0.002, 0.002, processes=1) for _ in range(6)]
    floors = floors_from_samples(runs[:5])
    assert slower_rows(runs[4], runs[5], floors, 0.0) == []
    runs[5][ROWS[3]] = [1.1 * value for value in runs[5][ROWS[3]]]
    assert slower_rows(runs[4], runs[5], floors, 0.0) == [3]


def test_a_run_with_unusually_noisy_processes_is_trusted_less():
    between = Between(variance=0.001**2, degrees=20.0, runs=6, within=0.001**2, within_degrees=12)
    quiet = log_change([1.0, 1.001, 0.999], [1.10, 1.101, 1.099], between)
    wild = log_change([1.0, 1.001, 0.999], [1.00, 1.10, 1.20], between)
    assert quiet.p_increase() < 1e-6
    assert wild.p_increase() > 0.05


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_variances_of_rows_are_shrunk_as_far_as_they_are_similar(spread):
    random = np.random.default_rng(5)
    truth = np.exp(random.normal(0.0, spread, 400))
    seen = truth * random.chisquare(4, 400) / 4
    drawn, degrees = moderated(seen, np.full(400, 4))
    assert np.mean((np.log(drawn) - np.log(truth)) ** 2) < 0.5 * np.mean((np.log(seen) - np.log(truth)) ** 2)
    assert min(degrees) > 8


@pytest.mark.parametrize(
    "variances", [[0.0, 0.0, 0.0], [0.0, 1.0], [1.0]], ids=["memory that never moves", "one moves", "one row"]
)
def test_too_few_variances_are_not_shrunk(variances):
    found, degrees = moderated(np.array(variances), np.full(len(variances), 4))
    assert found.tolist() == variances
    assert set(degrees.tolist()) == {4.0}


ENVIRONMENT = {
    "device": CPU,
    "packages": {"tensorflow": "2.21.0"},
    "git": {"commit": "abc", "dirty": False},
    "load_average_at_start": [0.1, 0.1, 0.1],
}


def kept(results, number, ms=2.0, *, finish=True, series_key="key", **environment):
    """A run of two timed rows, named after a day of January."""
    name = f"202601{number:02}T000000Z-test-cpu-abcd"
    cases = [
        record(mode, repeat=repeat, series_key=series_key, step_time_ms_median=ms * factor, device_name="Test CPU")
        for mode in ("fp32", "mixed-static")
        for repeat, factor in enumerate((0.999, 1.001))
    ]
    info = {**ENVIRONMENT, "load_average_at_start": [number, 0.0, 0.0], **environment}
    return write_run(results, finished(cases), name=name, finish=finish, environment=info)


def test_runs_of_the_same_code_agree_in_everything_but_the_time(tmp_path):
    alike = [kept(tmp_path, number) for number in range(1, 6)]
    kept(tmp_path, 11, packages={"tensorflow": "2.20.0"})
    kept(tmp_path, 12, git={"commit": "def", "dirty": False})
    kept(tmp_path, 13, git={"commit": "abc", "dirty": True, "changes_digest": "1"})
    kept(tmp_path, 14, device={**CPU, "name": "Other CPU"})
    kept(tmp_path, 15, finish=False)
    (tmp_path / "runs" / "20260116T000000Z-broken").mkdir()
    (tmp_path / "runs" / "20260116T000000Z-broken" / "run.json").write_text("{")
    found = runs_of_the_same_code(read_run(alike[2]))
    assert [run.path for run in found] == alike
    named = read_run(alike[0]).name
    assert [run.path for run in runs_of_the_same_code(read_run(alike[2]), leave_out=[named])] == alike[1:]


def test_runs_are_also_looked_for_in_the_results_folder(tmp_path):
    baseline = kept(tmp_path / "artifact", 1)
    others = [kept(tmp_path / "results", number) for number in range(2, 6)]
    found = runs_of_the_same_code(read_run(baseline), tmp_path / "results")
    assert [run.path for run in found] == [baseline, *others]


def changes_of(tmp_path, known, ms):
    """Changes of step time against the last of some runs of the same code, whose times differ by ``known`` factors."""
    before = [kept(tmp_path, number, 2.0 * factor) for number, factor in enumerate(known, 1)][-1]
    after = kept(tmp_path, 20, ms, packages={"tensorflow": "2.22.0"})
    baseline, other = read_run(before), read_run(after)
    comparison = compare(baseline, other, floors=floors_for(baseline, other))
    return [row.changes["step_time"] for row in comparison.rows]


@pytest.mark.parametrize(
    ("known", "ms", "verdict", "runs"),
    [
        pytest.param([1.0], 2.6, "slower", 0, id="a single run does not show how the machine changes"),
        pytest.param([1.0, 1.08, 0.93, 1.05, 0.95, 1.0], 2.16, "cannot-tell", 6, id="the machine changes as much"),
        pytest.param([1.0, 1.001, 0.999, 1.001, 0.999, 1.0], 2.16, "slower", 6, id="the machine hardly changes"),
        pytest.param([1.0, 1.001, 0.999, 1.0], 2.6, "slower", 0, id="four runs are too few to know"),
        pytest.param([1.0, 1.001, 0.999, 1.001, 1.0], 2.01, "same", 5, id="the same"),
    ],
)
def test_verdicts_depend_on_what_is_known_about_the_machine(tmp_path, known, ms, verdict, runs):
    for change in changes_of(tmp_path, known, ms):
        assert (change.verdict, change.floor_runs) == (verdict, runs)


def test_a_row_of_another_series_has_no_floor(tmp_path):
    for number in range(1, 6):
        kept(tmp_path, number, series_key="key" if number < 5 else "another")
    baseline = read_run(tmp_path / "runs" / "20260105T000000Z-test-cpu-abcd")
    other = read_run(kept(tmp_path, 20, series_key="another"))
    changes = [row.changes["step_time"] for row in compare(baseline, other, floors=floors_for(baseline, other)).rows]
    assert {change.floor_runs for change in changes} == {0}


def test_interleaved_runs_are_compared_pair_by_pair(tmp_path):
    """Both processes of a pair see the same state of the machine, whatever that is."""
    paths = []
    for number, slower in ((1, 1.0), (2, 1.06)):
        states = np.random.default_rng(6).uniform(0.5, 2.0, 8)
        small = np.random.default_rng(number).normal(1.0, 0.002, 8)
        cases = [
            record("fp32", repeat=repeat, series_key="key", step_time_ms_median=slower * state * luck)
            for repeat, (state, luck) in enumerate(zip(states, small, strict=True))
        ]
        name = f"2026010{number}T000000Z-test-cpu-abcd"
        turns = {"id": "f00d", "side": "AB"[number - 1], "python": "python"}
        paths.append(write_run(tmp_path, finished(cases), name=name, interleaved=turns))
    (row,) = compare(*map(read_run, paths)).rows
    change = row.changes["step_time"]
    assert (change.verdict, change.noise_floor) == ("slower", None)
    assert change.change == pytest.approx(0.06, abs=0.005)
    info = json.loads((paths[1] / "run.json").read_text())
    (paths[1] / "run.json").write_text(json.dumps({**info, "interleaved": {**info["interleaved"], "id": "another"}}))
    (row,) = compare(*map(read_run, paths)).rows
    assert row.changes["step_time"].verdict == "cannot-tell"
