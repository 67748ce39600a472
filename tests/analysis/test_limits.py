"""Gates on the figures of a run alone."""

import pytest
from support.runfolder import finished, record, write_run

from mpscale.analysis.compare import compare
from mpscale.analysis.gates import exit_code, judge_alone, judge_gates, parse_gates
from mpscale.core.runs import read_run

STEADY = (10.0, 10.1, 9.9)


def rows(mode="fp32", times=STEADY, metrics=(0.9, 0.91, 0.92), workload="toy", metric="accuracy", **values):
    """One training for each time; a metric may be the status of a case that died or was lost."""
    found = []
    for seed, (time, value) in enumerate(zip(times, metrics, strict=True)):
        facts = {"step_time_ms_median": time, "metric_name": metric, "metric_higher_is_better": True, **values}
        if isinstance(value, str):
            facts = {"status": value, "status_reason": "it broke", "metric_name": metric}
        elif metric is None:
            facts |= {"has_metric": False}
        else:
            facts |= {"metric_value": value}
        found.append(record(mode, seed, workload=workload, **facts))
    return found


def judged(tmp_path, cases, gate, **info):
    run = read_run(write_run(tmp_path, finished(cases), **info))
    return {" ".join(found.row or ("no row",)): found for found in judge_alone(run, parse_gates([gate]))}


@pytest.mark.parametrize(
    ("cases", "gate", "outcome", "said"),
    [
        pytest.param(rows(), "step_time<=12ms", "passed", "10 ms (3 processes, 95 % interval 9.754 to", id="below"),
        pytest.param(rows(), "step_time<=9ms", "fired", "10 ms", id="above"),
        pytest.param(rows(), "step_time<=10.1ms", "cannot-tell", "the limit is in the interval", id="in the interval"),
        pytest.param(rows(times=(10.0,), metrics=(0.9,)), "step_time<=12ms", "passed", "1 process)", id="one process"),
        pytest.param(rows(times=(13.0,), metrics=(0.9,)), "step_time<=12ms", "fired", "13 ms", id="one slow process"),
        pytest.param(
            rows(metrics=(0.9, 0.9, "timeout")), "step_time<=99ms", "cannot-tell", "seed 2: timeout", id="one is gone"
        ),
        pytest.param(
            rows(metrics=(0.9, 0.9, "timeout")), "step_time<=1ms", "fired", "seed 2: timeout", id="and the rest is slow"
        ),
        pytest.param(
            rows(metrics=("oom",) * 3), "step_time<=12ms", "cannot-tell", "unknown: oom: it broke", id="all failed"
        ),
        pytest.param(
            rows(metrics=("diverged",) * 3), "step_time<=12ms", "cannot-tell", "no row of the run has such", id="lost"
        ),
        pytest.param(rows(), "gpu_memory<=8GiB", "cannot-tell", "no row of the run has such a figure", id="no GPU"),
        pytest.param(
            rows(host_memory_peak_mib=4000.0), "host_memory<=4GiB", "passed", "4000 MiB (3 processes, the largest)",
            id="memory",
        ),
        pytest.param(rows(first_step_s=61.0), "compile_time<=1min", "fired", "61 s", id="compile time"),
        pytest.param(rows(), "accuracy>=85%", "passed", "0.91 (3 seeds, 95 % interval 0.8852", id="accuracy"),
        pytest.param(rows(), "accuracy>=0.95", "fired", "0.91", id="a bad accuracy"),
        pytest.param(
            rows(times=(1.0,), metrics=(0.9,)), "accuracy>=0.95", "fired", "0.9 (1 seed)", id="one bad seed"
        ),
        pytest.param(rows(), "accuracy>=0.91", "cannot-tell", "the limit is in the interval", id="an unclear accuracy"),
        pytest.param(rows(), "accuracy<0.85", "passed", "0.91", id="written from the other side"),
        pytest.param(
            rows(metrics=(0.9, 0.91, "diverged")), "accuracy>=0.1", "fired", "a training was lost: seed 2: diverged",
            id="a lost seed is a bad one",
        ),
        pytest.param(
            rows(metrics=(0.9, 0.91, "crashed")), "accuracy>=0.1", "cannot-tell", "seed 2: crashed", id="a seed died"
        ),
        pytest.param(
            rows(metric="mae", metric_higher_is_better=False), "metric<=1", "passed", "mae 0.91 (3 seeds", id="an error"
        ),
        pytest.param(
            rows(metric="mae", metric_higher_is_better=False), "metric<=0.5", "fired", "0.91", id="a large error"
        ),
        pytest.param(
            rows(metric_higher_is_better=None), "metric>=0.1", "cannot-tell", "not known whether", id="no direction"
        ),
        pytest.param(rows(), "speedup>=1.5", "cannot-tell", "no row of the run has such a figure", id="only fp32"),
        pytest.param(rows(), "overflow_rate<=0.01", "cannot-tell", "no row of the run has such", id="nothing checks"),
        pytest.param(rows(), "step_time[other]<=12ms", "cannot-tell", "no row that fits other", id="no such row"),
    ],
)  # fmt: skip
def test_a_limit_of_one_row(tmp_path, cases, gate, outcome, said):
    (found,) = judged(tmp_path, cases, gate).values()
    assert (found.outcome, found.baseline) == (outcome, ""), found
    assert said in str(found)
    assert "(baseline" not in str(found)


@pytest.mark.parametrize(
    ("fp32", "mixed", "gate", "outcome", "said"),
    [
        (STEADY, (5.0, 5.05, 4.95), "speedup>=1.5", "passed", "2x (3 pairs"),
        (STEADY, (5.0, 5.05, 4.95), "speedup>=3", "fired", "2x (3 pairs"),
        (STEADY, (5.0, 5.9, 4.0), "speedup>=1.9", "cannot-tell", "the limit is in the interval, and more pairs"),
        (STEADY[:1], (5.0,), "speedup>=1.5", "cannot-tell", "there is only one pair of processes"),
        (STEADY[:1], (50.0,), "speedup>=1.5", "cannot-tell", "there is only one pair of processes"),
        ((), STEADY, "speedup>=1.5", "cannot-tell", "there is no fp32 to compare with"),
    ],
)
def test_a_speed_up_is_over_fp32_and_one_in_doubt_neither_passes_nor_fires(tmp_path, fp32, mixed, gate, outcome, said):
    cases = [one for mode, times in (("fp32", fp32), ("mixed-bf16", mixed)) for one in
             rows(mode, times, (0.9,) * len(times))]  # fmt: skip
    found = judged(tmp_path, cases, gate)
    assert list(found) == ["toy mixed-bf16"]
    assert found["toy mixed-bf16"].outcome == outcome
    assert said in found["toy mixed-bf16"].text


@pytest.mark.parametrize(("metric", "gate"), [("f1", "accuracy>=0.1"), (None, "metric>=0.1"), (None, "accuracy<0.9")])
def test_a_limit_to_which_no_row_is_held_has_not_passed(tmp_path, metric, gate):
    alone = judged(tmp_path, rows(metric=metric), gate)
    assert [str(found.outcome) for found in alone.values()] == ["not-applicable", "cannot-tell"]
    assert "no row of the run has such a figure" in str(list(alone.values())[1])
    beside = judged(tmp_path / "beside", [*rows(metric=metric), *rows(workload="toi", metric="accuracy")], gate)
    assert len(beside) == 2 and "no row" not in str(beside)


def test_a_dispatch_bound_speed_up_cannot_tell(tmp_path):
    bound = {"dispatch_bound": True, "dispatch_share": 0.9}
    cases = [*rows(**bound), *rows("mixed-bf16", (1.0, 1.01, 0.99), **bound)]
    (found,) = judged(tmp_path, cases, "speedup>=1.5").values()
    assert found.outcome == "cannot-tell" and "dispatch" in found.text


def test_a_limit_on_metrics_of_both_directions_asks_which_are_meant(tmp_path):
    cases = [*rows(), *rows(workload="toi", metric="mae", metric_higher_is_better=False)]
    found = judged(tmp_path, cases, "metric>=0.5")
    assert {each.outcome for each in found.values()} == {"cannot-tell"}
    assert "for others a lower one; write metric[toy]" in found["toy fp32"].text
    run = read_run(tmp_path / "runs" / next((tmp_path / "runs").iterdir()).name)
    (one,) = judge_alone(run, parse_gates(["metric[toy]>=0.5"]))
    assert (one.row, one.outcome) == (("toy", "fp32"), "passed")


def test_a_row_of_which_no_case_was_started_cannot_tell(tmp_path):
    planned = [*(f"toy--fp32--s{seed}--r0" for seed in range(3)), "toy--mixed-bf16--s0--r0"]
    found = judged(tmp_path, rows(), "step_time<=12ms", planned=planned)
    assert {row: str(each.outcome) for row, each in found.items()} == {
        "toy fp32": "passed", "toy mixed-bf16": "cannot-tell",
    }  # fmt: skip
    assert "planned, but not started" in found["toy mixed-bf16"].text


def test_limits_beside_a_baseline_are_about_the_run_and_say_what_is_gone(tmp_path):
    before = [*rows("mixed-dynamic", overflow_steps=1, attempted_steps=100), *rows("mixed-static", overflow_steps=0,
              attempted_steps=100)]  # fmt: skip
    after = rows("mixed-dynamic", overflow_steps=5, attempted_steps=100)
    sides = [read_run(write_run(tmp_path, finished(cases), name=name)) for name, cases in (("a", before), ("b", after))]
    found = judge_gates(compare(*sides, force=True), parse_gates(["overflow_rate<=0.02", "speedup>=2"]))
    said = {(str(each.gate), " ".join(each.row or ())): each for each in found}
    overflow = said["overflow_rate<=0.02", "toy mixed-dynamic"]
    assert (overflow.outcome, overflow.text) == ("fired", "0.05 of the steps overflowed, 0.01 in the baseline")
    assert said["overflow_rate<=0.02", "toy mixed-static"].text == "missing: no such row"
    assert exit_code(found) == 1
