"""Seeds that ended without a metric, died or never ran: no verdict, gate, sentence or picture may treat them as good.

Over equal seeds the differences to fp32 are 0, so the verdict is `non-inferior` if all seeds are known, and whatever a
missing or lost seed makes of it otherwise.
"""

from __future__ import annotations

import json
import math

import pytest
from support.runfolder import GPU, finished, record, write_run, write_steps

from mpscale.analysis.compare import compare
from mpscale.analysis.gates import exit_code, judge_gates, parse_gates
from mpscale.analysis.history import make_history
from mpscale.analysis.summary import summarise
from mpscale.cli import main
from mpscale.core.case import Settings, series_key
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.core.record import to_csv
from mpscale.core.runs import cases_frame, read_run
from mpscale.report import findings as words
from mpscale.report import github_summary
from mpscale.report.document import document, render
from mpscale.report.files import rebuild
from mpscale.report.gains_figure import gains
from mpscale.report.history import render as render_history
from mpscale.report.training_figure import training

NAN = math.nan
GOOD = (0.9, 0.9, 0.9, 0.9, 0.9)
MARGIN = {"metric_name": "accuracy", "metric_margin": 0.01, "metric_higher_is_better": True}


def trainings(mode, values, workload="toy", **more):
    """One training per value: a number, NaN or infinity as from an evaluation, or the status of a case that died."""
    key = series_key(MODES[mode], workload, "sha256:1", 20, 30, Settings())
    found = []
    for seed, value in enumerate(values):
        facts = {**MARGIN, "series_key": key, "method_version": METHOD_VERSION, "device_name": "Test CPU"}
        facts |= {"step_time_ms_median": 2.0 + seed / 1000}
        if isinstance(value, str):
            facts |= {"status": value, "status_reason": "it broke"}
            del facts["step_time_ms_median"]
        one = record(mode, seed, workload=workload, **{**facts, **more})
        if not isinstance(value, str):
            one.update({"metric_value": value})
            one.miss("metric_value", Reason(Code.OTHER, "not finite"))
        found.append(one)
    return found


def run_of(tmp_path, *records, name="a", **options):
    return read_run(write_run(tmp_path, finished(records), name=name, **options))


def row_of(records, mode="mixed-dynamic"):
    return {row["mode"]: row for row in summarise(records)}[mode]


LOST_OR_NOT = [
    pytest.param(GOOD, GOOD, "non-inferior", None, id="all seeds are known"),
    pytest.param(GOOD, (*GOOD[:4], NAN), "worse", "seed 4: diverged", id="the fifth is NaN"),
    pytest.param(GOOD, (math.inf, *GOOD[1:]), "worse", "seed 0: diverged", id="the first is inf"),
    pytest.param(GOOD, (*GOOD[:4], -math.inf), "worse", "seed 4: diverged", id="the fifth is -inf"),
    pytest.param(GOOD, (NAN,) * 5, "worse", "seeds 0, 1, 2, 3, 4: diverged", id="all are NaN"),
    pytest.param((NAN, *GOOD[1:]), GOOD, "non-inferior", "seed 0: diverged in the baseline", id="fp32's first is NaN"),
    pytest.param((NAN,) * 5, GOOD, "inconclusive", "in the baseline", id="all of fp32's are NaN"),
    pytest.param((NAN, *GOOD[1:]), (NAN, *GOOD[1:]), "non-inferior", "seed 0: diverged in both", id="NaN in both"),
    pytest.param((NAN,) * 5, (NAN,) * 5, "inconclusive", "diverged in both", id="nothing but NaN in both"),
    pytest.param(GOOD, (*GOOD[:4], "oom"), "inconclusive", "4 of 5 seeds; seed 4: oom", id="the fifth is oom"),
    pytest.param(GOOD, (*GOOD[:3], "timeout", "timeout"), "inconclusive", "seeds 3, 4: timeout", id="two timed out"),
    pytest.param(GOOD, (*GOOD[:4], "invalid"), "inconclusive", "seed 4: invalid", id="the fifth is invalid"),
    pytest.param(GOOD, ("interrupted",) * 5, "inconclusive", "0 of 5 seeds", id="none came to its end"),
    pytest.param((*GOOD[:4], "crashed"), GOOD, "inconclusive", "crashed in the baseline", id="fp32's fifth crashed"),
    pytest.param(("error",) * 5, GOOD, "inconclusive", "error in the baseline", id="all of fp32's failed"),
    pytest.param(GOOD, GOOD[:3], "inconclusive", "seeds 3, 4: no such row", id="two have no row"),
    pytest.param(GOOD, (0.5, 0.5, 0.5, "oom", NAN), "worse", "seed 3: oom; seed 4: diverged", id="of everything one"),
]  # fmt: skip


@pytest.mark.parametrize(("fp32", "mixed", "verdict", "said"), LOST_OR_NOT)
def test_the_verdict_against_fp32(fp32, mixed, verdict, said):
    row = row_of([*trainings("fp32", fp32), *trainings("mixed-dynamic", mixed)])
    assert row["metric_verdict"] == verdict
    assert (row["metric_left_out"] is None) == (said is None)
    assert (said or "") in (row["metric_left_out"] or "")


CODES = {"non-inferior": 0, "worse": 1, "inconclusive": 3}


@pytest.mark.parametrize(("before", "after", "verdict", "said"), LOST_OR_NOT)
@pytest.mark.parametrize("table", [False, True], ids=["runs", "tables alone"])
def test_the_gate_on_the_metric_of_a_later_run(tmp_path, capsys, before, after, verdict, said, table):
    """A second row that is all well must not cover for the first."""
    well = trainings("fp32", GOOD, workload="well")
    paths = []
    for name, values in (("a", before), ("b", after)):
        path = write_run(tmp_path, finished([*trainings("mixed-dynamic", values), *well]), name=name)
        if table:
            (tmp_path / f"{name}.csv").write_text(to_csv(read_run(path).records))
            path = tmp_path / f"{name}.csv"
        paths.append(str(path))
    died = all(isinstance(value, str) for value in after) or all(isinstance(value, str) for value in before)
    fewer = len(after) < len(before) and not table  # its plan says that no more were meant to run
    code = main(["compare", *paths, "--fail-on", "metric"])
    printed = capsys.readouterr().out
    assert code == (0 if fewer else CODES[verdict]), printed
    if said and not died and not fewer:
        assert said in printed
    assert not fewer or "3 of 5 seeds; seeds 3, 4: not planned" in printed


@pytest.mark.parametrize("gate", ["missing", "metric"])
def test_a_seed_that_was_planned_and_not_started_did_not_do_well(tmp_path, gate):
    before = run_of(tmp_path, *trainings("fp32", GOOD), name="before")
    planned = [one["case_id"] for one in trainings("fp32", GOOD)]
    after = run_of(tmp_path, *trainings("fp32", GOOD[:3]), name="after", planned=planned, finish=False)
    findings = judge_gates(compare(before, after), parse_gates([gate]))
    assert exit_code(findings) == {"missing": 1, "metric": 3}[gate]
    assert "planned, but not started" in findings[0].text


@pytest.mark.parametrize("workload", ["c++", "module:attribute"])
def test_a_workload_of_which_nothing_was_started_was_planned_all_the_same(tmp_path, workload):
    cases = trainings("fp32", GOOD[:1], workload=workload)
    before = run_of(tmp_path, *cases, *trainings("fp32", GOOD), name="before")
    planned = [f"{workload.replace(':', '+')}--fp32--s0--r0"]
    after = run_of(tmp_path, *trainings("fp32", GOOD), name="after", planned=planned, finish=False)
    row = compare(before, after).rows[0]
    assert (row.pair.reason, row.pair.not_started[1]) == ("planned, but not started", [(0, 0)])


def test_a_table_alone_does_not_say_whether_a_seed_was_planned(tmp_path):
    runs = []
    for name, values in (("a", GOOD), ("b", GOOD[:3])):
        path = tmp_path / f"{name}.csv"
        path.write_text(to_csv(trainings("fp32", values)))
        runs.append(read_run(path))
    (finding,) = judge_gates(compare(*runs), parse_gates(["missing"]))
    assert (finding.outcome, "seeds 3, 4 have no row" in finding.text) == ("cannot-tell", True)


def test_a_new_row_with_only_nan_is_not_skipped(tmp_path):
    before = run_of(tmp_path, *trainings("fp32", GOOD), name="before")
    after = run_of(tmp_path, *trainings("fp32", GOOD), *trainings("mixed-dynamic", (NAN,) * 5), name="after")
    outcomes = {f.row[1]: f.outcome for f in judge_gates(compare(before, after), parse_gates(["metric"]))}
    assert outcomes == {"fp32": "passed", "mixed-dynamic": "cannot-tell"}


@pytest.mark.parametrize("gate", ["metric", "step_time>5%", "overflow_rate>0.01"])
def test_a_row_that_failed_in_the_baseline_is_not_skipped(tmp_path, gate):
    known = {"overflow_steps": 0, "attempted_steps": 10}
    fp32 = [*trainings("mixed-static", GOOD, **known)]
    before = run_of(tmp_path, *fp32, *trainings("mixed-dynamic", ("oom",) * 5), name="before")
    after = run_of(tmp_path, *fp32, *trainings("mixed-dynamic", GOOD, **known), name="after")
    outcomes = {f.row[1]: f.outcome for f in judge_gates(compare(before, after), parse_gates([gate]))}
    # The overflow rate is about the run alone.
    judged = "passed" if gate.startswith("overflow") else "cannot-tell"
    assert outcomes == {"mixed-static": "passed", "mixed-dynamic": judged}


@pytest.mark.parametrize(
    ("more", "there", "verdict", "said"),
    [
        pytest.param({"metric_higher_is_better": None}, {}, "inconclusive", "direction is unknown", id="no way"),
        pytest.param({"metric_margin": 0.5}, {}, "inconclusive", "the metric's margin: 0.01, 0.5", id="a wider margin"),
        pytest.param({"metric_name": "loss"}, {}, "inconclusive", "name: accuracy, loss", id="another metric"),
        pytest.param({"metric_higher_is_better": False}, {}, "inconclusive", "direction: True, False", id="turned"),
        pytest.param({"metric_margin": None}, {}, "inconclusive", "margin is unknown for seed 4", id="no margin"),
        pytest.param(
            {"metric_higher_is_better": None}, {"metric_higher_is_better": None}, "inconclusive", "whether a higher",
            id="nobody says which way is better",
        ),
    ],
)  # fmt: skip
def test_facts_on_which_rows_disagree_are_not_taken_from_the_first(more, there, verdict, said):
    mixed = trainings("mixed-dynamic", GOOD, **there)
    mixed[4] = trainings("mixed-dynamic", GOOD, **more)[4]
    row = row_of([*trainings("fp32", GOOD, **there), *mixed])
    assert row["metric_verdict"] == verdict
    assert said in row["metric_reason"]


def test_lost_trainings_do_not_lower_the_cost_of_a_mode():
    quick = {"gpu_energy_j_per_step": 0.1, "gpu_memory_nvml_peak_mib": 10.0, "step_time_ms_median": 0.1}
    usual = {"gpu_energy_j_per_step": 4.0, "gpu_memory_nvml_peak_mib": 900.0, "step_time_ms_median": 3.0}
    records = [*trainings("fp32", GOOD[:2], **usual), *trainings("mixed-dynamic", (0.9, NAN), **usual)]
    records[3].update(quick)
    row = row_of(records)
    assert (row["step_time_ms"], row["processes"]) == (pytest.approx(3.0), 1)
    assert (row["gpu_energy_j_per_step"], row["gpu_memory_mib"]) == (pytest.approx(4.0), 900.0)
    assert row["speedup_fp32"] == pytest.approx(1.0)
    row = row_of([*trainings("fp32", (NAN, NAN), **quick), *trainings("mixed-dynamic", (0.9, 0.9), **usual)])
    assert (row["speedup_fp32"], row["gpu_energy_ratio"], row["gpu_memory_ratio"]) == (None, None, None)


def test_memory_has_no_ratio_if_a_process_ran_out_of_it():
    some = {"gpu_memory_nvml_peak_mib": 900.0}
    for fp32, mixed in (((0.9, "oom"), GOOD[:2]), (GOOD[:2], (0.9, "oom"))):
        row = row_of([*trainings("fp32", fp32, **some), *trainings("mixed-dynamic", mixed, **some)])
        assert row["gpu_memory_mib"] == 900.0
        assert row["gpu_memory_ratio"] is None


def test_figures_of_some_processes_say_how_many(tmp_path):
    """Memory, energy and overflow that the driver or a case did not report, beside those that are known."""
    known = {
        "gpu_memory_nvml_peak_mib": 900.0, "gpu_energy_j_per_step": 4.0, "overflow_steps": 0, "attempted_steps": 100,
    }  # fmt: skip
    mixed = trainings("mixed-dynamic", GOOD[:3], **known)
    mixed[2] = trainings("mixed-dynamic", GOOD[:3], attempted_steps=100)[2]
    run = run_of(tmp_path, *trainings("fp32", GOOD[:3], **known), *mixed, device=GPU)
    text = render(document(run))
    assert "times that of float32 in mixed-dynamic (2 of 3 processes)" in text
    assert "900.0 MiB (2 of 3 processes)" in text
    assert "0/200 (2 of 3 seeds)" in text
    assert "| 4.00 (2 of 3 processes)" in text


def test_runs_of_two_machines_side_by_side_say_how_many_processes_a_figure_has(tmp_path, capsys):
    known = {"gpu_memory_nvml_peak_mib": 900.0}
    paths = []
    for name, device in (("a", "One GPU"), ("b", "Another GPU")):
        facts = {"device": "gpu", "device_name": device, **known}
        cases = [*trainings("fp32", GOOD, **facts), *trainings("mixed-dynamic", (0.9, NAN, "error", 0.9, 0.9), **facts)]
        paths.append(str(write_run(tmp_path, finished(cases), name=name, device={**GPU, "name": device})))
    assert main(["compare", *paths]) == 0
    text = capsys.readouterr().out
    for title in ("Speed-up over fp32", "GPU memory over fp32", "Step time", "Peak GPU memory"):
        assert "(3 of 5 processes)" in text.split(title)[1].split("\n\n")[1], title


@pytest.mark.parametrize(
    ("there", "code"), [((0, 0, 0), 0), ((0, None, 0), 3), ((9, None, 9), 1), ((0, "timeout", 0), 3), ((0, 0, 9), 1)]
)
def test_an_overflow_rate_of_some_seeds_does_not_pass_for_that_of_all(tmp_path, there, code):
    before = run_of(tmp_path, *trainings("mixed-static", GOOD[:3], overflow_steps=0, attempted_steps=100), name="a")
    cases = []
    for seed, steps in enumerate(there):
        value = steps if isinstance(steps, str) else 0.9
        facts = {} if isinstance(steps, str) else {"overflow_steps": steps, "attempted_steps": 100}
        cases.append(trainings("mixed-static", (0.9,) * seed + (value,), **facts)[seed])
    findings = judge_gates(compare(before, run_of(tmp_path, *cases, name="b")), parse_gates(["overflow_rate>0.01"]))
    assert exit_code(findings) == code


def five(column, values, statuses=("ok",) * 5):
    """Five trainings with one figure each."""
    cases = trainings("fp32", [0.9 if status == "ok" else status for status in statuses])
    for one, value in zip(cases, values, strict=True):
        one.update({"step_time_ms_median": None, column: value})
    return cases


QUIET = (2.0, 2.001, 2.002, 1.999, 1.998)


@pytest.mark.parametrize(
    ("column", "gate"),
    [
        ("step_time_ms_median", "step_time>100%"),
        ("gpu_memory_nvml_peak_mib", "gpu_memory>100%"),
        ("gpu_energy_j_per_step", "energy>100%"),
        ("host_memory_peak_mib", "host_memory>100%"),
    ],
)
@pytest.mark.parametrize(
    ("values", "statuses", "code"),
    [
        pytest.param(QUIET, ("ok",) * 5, 0, id="all are known"),
        pytest.param((*QUIET[:4], None), ("ok",) * 5, 3, id="one is not known"),
        pytest.param((*QUIET[:4], None), (*("ok",) * 4, "timeout"), 3, id="one timed out"),
        pytest.param((1.0, 1.001, 1.002, None, None), (*("ok",) * 3, "oom", "crashed"), 3, id="better, of survivors"),
        pytest.param((8.0, 8.001, 8.002, 8.003, None), (*("ok",) * 4, "oom"), 1, id="worse although one is missing"),
    ],
)  # fmt: skip
def test_a_gate_on_a_cost_does_not_pass_on_the_survivors(tmp_path, column, gate, values, statuses, code):
    before = run_of(tmp_path, *five(column, QUIET), name="before")
    comparison = compare(before, run_of(tmp_path, *five(column, values, statuses), name="after"))
    findings = judge_gates(comparison, parse_gates([gate]))
    assert exit_code(findings) == code, findings
    change = comparison.rows[0].changes[parse_gates([gate])[0].name]
    assert (change.verdict in ("same", "less", "faster")) == (code == 0)
    assert bool(change.left_out) == (None in values)


def test_the_sentences_of_a_run_that_lost_seeds(tmp_path):
    fp32 = trainings("fp32", GOOD)
    run = run_of(tmp_path, *fp32, *trainings("mixed-dynamic", (*GOOD[:4], NAN)), *trainings("mixed-static", (NAN,) * 5))
    for text in (words.findings(run), github_summary.github_summary(run)):
        assert "ran to the end" not in text
        assert "6 of 15 cases did not end well (mixed-static on toy: diverged 5; mixed-dynamic on toy: ok 4," in text
        assert "mixed-static and mixed-dynamic on toy are worse than fp32." in text
        assert "mixed-dynamic (no different from fp32 over 4 seeds) is worse than fp32: lost seed 4" in text
        assert "mixed-static is worse than fp32: lost seeds 0, 1, 2, 3, 4" in text
        assert "no training in mixed-static ended well, so no step time counts" in text
        assert "as good as" not in text.replace("0 of 2 rows as good as fp32", "")
    assert "| toy--mixed-dynamic--s4--r0 | diverged" in github_summary.github_summary(run)
    report = render(document(run))
    assert "90.00 % (4 of 5 seeds)" in report
    assert "trained to the end, and has no accuracy: not finite" in report
    row = next(line for line in report.splitlines() if line.startswith("| toy") and "| 4      |" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")[3:]] == ["90.00 %", "diverged", "diverged"]


def test_the_sentences_of_a_run_that_was_stopped(tmp_path):
    cases = [*trainings("fp32", GOOD), *trainings("mixed-dynamic", GOOD)]
    planned = [one["case_id"] for one in cases]
    run = run_of(tmp_path, *cases[:8], planned=planned, finish=False)
    text = words.findings(run)
    assert "All 8 cases that were started ran to the end. 2 planned cases were not started." in text
    assert "cannot tell for mixed-dynamic (no different from fp32 over 3 seeds): a loss is ruled out over 3" in text
    assert "but the outcome of seeds 3, 4 is unknown" in text
    assert "seeds 3, 4: planned, but not started" in text
    assert "Cases of mixed-dynamic: ok 3, not started 2" in text
    assert "| ok 3, not started 2 |" in render(document(run))


def test_a_speed_over_what_is_left_of_the_baseline_says_so(tmp_path):
    run = run_of(tmp_path, *trainings("fp32", (*GOOD[:4], "timeout")), *trainings("mixed-dynamic", GOOD))
    assert row_of(run.records)["speedup_fp32_pairs"] == 4
    assert "no difference in speed is shown for mixed-dynamic (4 of 5 processes)" in words.findings(run)


def test_seeds_that_reached_a_target_are_counted_out_of_all_planned(tmp_path):
    cases = trainings("fp32", (0.9, 0.9, "oom", NAN), metric_target=0.8)
    for one in (*cases[:2], cases[3]):  # the last one passed it on its way to NaN
        one.update({"steps_to_target": 10})
    assert "| 2 of 4" in render(document(run_of(tmp_path, *cases)))


def test_pictures_say_what_is_missing(tmp_path):
    cases = [
        *trainings("fp32", (*GOOD[:4], "oom")),
        *trainings("mixed-dynamic", (*GOOD[:4], NAN)),
        *trainings("mixed-static", (NAN,) * 5),
        *trainings("mixed-bf16", GOOD, metric_higher_is_better=None),
    ]
    path = write_run(tmp_path, finished(cases))
    write_steps(path, "toy--mixed-dynamic--s0--r0", "step,loss,loss_scale,overflow\n0,4,,\n1,2,,\n2,1,,\n")
    write_steps(path, "toy--mixed-dynamic--s4--r0", "step,loss,loss_scale,overflow\n0,4,,\n1,nan,,\n2,nan,,\n")
    run = read_run(path)
    picture = gains(run)
    assert "Compared with what is left of toy fp32: ok 4, oom 1." in picture.caption
    assert "No metric drawn for toy mixed-static: lost seeds 0, 1, 2, 3, 4" in picture.caption
    assert "No metric drawn for toy mixed-bf16" in picture.caption
    assert "Hollow: some seeds or processes are not in it" in picture.caption
    drawn = training(run)
    assert "A star is the last finite loss of a seed (1 of them)" in drawn.caption
    assert "Failed or not started, and so not in it: 1 training." in drawn.caption
    assert 'id="lost-1-1"' in drawn.svg


def test_a_history_says_which_seeds_a_value_lacks(tmp_path):
    values = {"1": GOOD, "2": (*GOOD[:4], NAN), "3": (*GOOD[:4], "oom"), "4": (NAN,) * 5}
    runs = [
        run_of(tmp_path, *trainings("mixed-dynamic", seeds), name=f"2026010{day}T000000Z-x", started=f"2026-01-0{day}")
        for day, seeds in values.items()
    ]
    history = make_history(runs, "metric")
    points = history.series[0].points
    assert [point.n for point in points] == [5, 4, 4, 0]
    assert [point.reason for point in points] == [None, "seed 4: diverged", "seed 4: oom", "not finite"]
    assert [point.is_incomplete for point in points] == [False, True, True, False]
    text = render_history(history, "json")
    assert [point["reason"] for point in json.loads(text)["series"][0]["points"]][1:3] == [
        "seed 4: diverged", "seed 4: oom",
    ]  # fmt: skip
    assert "seed 4: oom" in render_history(history, "table")


@pytest.mark.parametrize("quantity", ["step_time", "speedup", "overflow_rate"])
def test_a_history_of_costs_says_so_too(tmp_path, quantity):
    known = {"overflow_steps": 1, "attempted_steps": 10}
    cases = [*trainings("fp32", GOOD), *trainings("mixed-dynamic", (*GOOD[:3], "timeout", NAN), **known)]
    cases[8].update({"overflow_steps": None})
    (point,) = make_history([run_of(tmp_path, *cases)], quantity, modes=["mixed-dynamic"]).series[0].points
    assert "seed 3: timeout" in point.reason
    assert ("seed 4: diverged" in point.reason) == (quantity != "overflow_rate")


def test_a_lost_training_is_diverged_in_the_table_that_others_read(tmp_path):
    path = write_run(tmp_path, finished([*trainings("fp32", GOOD), *trainings("mixed-dynamic", (*GOOD[:4], NAN))]))
    rebuild(path)
    assert [one["status"] for one in read_run(path / "cases.csv").records][-2:] == ["ok", "diverged"]


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([record(step_time_ms_median=2.0)], id="of no case a metric is known"),
        pytest.param([*trainings("fp32", GOOD), record(repeat=1, step_time_ms_median=2.0)], id="a timing process"),
        pytest.param([*trainings("fp32", GOOD), record(seed=9, status="oom")], id="a case that failed"),
    ],
)  # fmt: skip
def test_trainings_that_are_not_lost(records):
    assert "diverged" not in list(cases_frame(records)["status"])
