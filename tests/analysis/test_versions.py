"""Versions of a model: which rows are compared and followed although the model changed, and what is told of it."""

import json

import pytest
from support.runfolder import finished, record, write_run

from mpscale.analysis.compare import compare
from mpscale.analysis.gates import judge_gates, parse_gates
from mpscale.analysis.history import make_history
from mpscale.analysis.neighbours import Neighbours
from mpscale.analysis.pairs import NotComparable, State
from mpscale.analysis.quantities import Verdict
from mpscale.analysis.versions import in_words, model_changes
from mpscale.core.case import Settings, series_key
from mpscale.core.mode import MODES
from mpscale.core.runs import RunError, read_run
from mpscale.report.comparison import render
from mpscale.report.comparison_page import comparison_page
from mpscale.report.history import render as render_history
from mpscale.report.history_page import history_page

QUIET = (1.0, 1.002, 0.998, 1.001, 0.999)
SGD = json.dumps({"class": "keras.src.optimizers.sgd.SGD", "learning_rate": 0.1, "momentum": 0.9})
ADAM = json.dumps({"class": "keras.src.optimizers.adam.Adam", "learning_rate": 0.001, "beta_1": 0.9})


def version(number, ms=2.0, workload="toy", mode="fp32", series="s", steps=30, batch=20, jit=True, **values):
    """The cases of one version of a model."""
    digest = f"sha256:{number}"
    key = series_key(MODES[mode], workload, digest, batch, steps, Settings(jit=jit))
    facts = {
        "series_key": key, "series": series, "workload_digest": digest, "model_digest": digest, "batch_size": batch,
        "parameters": 1_200_000 + 200_000 * number, "layers": f"Conv2D 2, Dense {number}", **values,
    }  # fmt: skip
    return [record(mode, seed, workload=workload, step_time_ms_median=ms * factor, metric_value=0.9, metric_margin=0.01,
                   metric_name="accuracy", metric_higher_is_better=True, **facts)
            for seed, factor in enumerate(QUIET)]  # fmt: skip


@pytest.fixture
def run_of(tmp_path):
    days = iter(range(1, 28))

    def write(*groups):
        day = next(days)
        cases = [one for group in groups for one in group]
        started = f"2026-01-{day:02d}T00:00:00+00:00"
        return read_run(write_run(tmp_path, finished(cases), name=f"202601{day:02d}T000000Z-x", started=started))

    return write


@pytest.mark.parametrize(
    ("before", "after", "by_name", "state", "why"),
    [
        pytest.param(version(1), version(2), False, "paired", None, id="a named series"),
        pytest.param(version(1), version(2, workload="toy2"), False, "paired", None, id="and another workload"),
        pytest.param(version(1), version(2, batch=40), False, "paired", None, id="another batch"),
        pytest.param(version(1, series=None), version(2, series=None), True, "paired", None, id="by name"),
        pytest.param(version(1, series=None), version(2), True, "paired", None, id="by name, with a series since"),
        pytest.param(version(1, series=None), version(2), False, None, "parameters 1.4 M to 1.6 M", id="no series yet"),
        pytest.param(version(1), version(2, series="t"), True, None, "parameters", id="another series"),
        pytest.param(version(1), version(2, steps=40), False, None, "steps 30 against steps 40", id="other steps"),
        pytest.param(version(1), version(2, jit=False), True, None, "jit on against jit off", id="another jit"),
        pytest.param(version(1), version(1, series="t"), False, "paired", None, id="the same model anyway"),
    ],
)
def test_which_versions_are_compared(run_of, before, after, by_name, state, why):
    runs = run_of(before), run_of(after)
    if state is None:
        with pytest.raises(NotComparable, match=why) as caught:
            compare(*runs, by_name=by_name)
        offered = "--compare-by name" in caught.value.with_cure()
        assert offered == (not by_name and "steps" not in why)
        assert "--mp-force" in caught.value.with_cure("mp-")
        return
    (row,) = compare(*runs, by_name=by_name).rows
    assert (row.pair.state, row.changes["step_time"].verdict) == (State.PAIRED, Verdict.SAME)
    assert bool(row.pair.versions) == (before[0]["series_key"] != after[0]["series_key"])


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"parameters": 1_234_567}, {"parameters": 14_000}, "parameters 1.235 M to 14 k"),
        ({"parameters": 1_234_567}, {"parameters": 1_234_568}, "parameters 1,234,567 to 1,234,568"),
        ({"layers": "Conv2D 2, Dense 1"}, {"layers": "Dense 2, Dropout 1"},
         "layers Conv2D 2 to none; layers Dense 1 to 2; layers Dropout none to 1"),
        ({"layers": "A 1, B 1, C 1, D 1, E 1"}, {"layers": "A 2, B 2, C 2, D 2, E 2"}, "2 more kinds of layers"),
        ({"optimizer_config": SGD}, {"optimizer_config": ADAM},
         "optimizer SGD to Adam; optimizer's learning rate 0.1 to 0.001"),
        ({"optimizer_config": SGD}, {"optimizer_config": SGD.replace("0.9", "0.8")}, "optimizer's momentum 0.9 to 0.8"),
        ({"optimizer_config": '{"learning_rate": {"step 0": 0.1, "step 9": 0.01}}'},
         {"optimizer_config": '{"learning_rate": 0.1}'}, "optimizer's learning rate 0.1 ... 0.01 to 0.1"),
        ({"optimizer_config": '{"class": "a.Adam"}'}, {"optimizer_config": '{"class": "b.Adam"}'},
         "optimizer a.Adam to b.Adam"),
        ({"optimizer_config": "{"}, {"optimizer_config": "[]"}, "optimizer"),
        ({"optimizer_config": "[" * 100_000}, {"optimizer_config": SGD}, "optimizer"),
        ({"optimizer_config": SGD}, {"optimizer_config": SGD.replace("0.9", "9" * 400)}, "momentum 0.9 to a number"),
        ({"layers": "Dense 1"}, {"layers": f"Dense {'9' * 5000}, \x1b"}, "layers \x1b none to 1"),
        ({"loss_name": "mse"}, {"loss_name": "mae"}, "loss mse to mae"),
        ({"batch_size": 20}, {"batch_size": 40}, "batch 20 to 40"),
        ({"data_digest": "a", "test_examples": 100}, {"data_digest": "b", "test_examples": 200},
         "test examples 100 to 200; examples or labels"),
        ({"metric_margin": 0.01}, {"metric_margin": 0.02}, "margin 0.01 to 0.02"),
        ({"model_digest": "a", "workload_digest": "a"}, {"model_digest": "b", "workload_digest": "b"},
         "settings of layers"),
        ({"workload_digest": "a"}, {"workload_digest": "b"}, "model, training or data"),
        ({"loss_name": None}, {"loss_name": "mae"}, ""),
    ],
)  # fmt: skip
def test_what_changed_is_told_in_words(before, after, said):
    assert said in in_words(model_changes([record(**before)], [record(**after)]))
    assert not said or model_changes([record(**before)], [record(**before)]) == []


def test_the_report_says_beside_the_verdicts_that_the_model_changed(run_of):
    runs = (
        run_of(version(1), version(1, mode="mixed-bf16")),
        run_of(version(2, 4.0), version(2, 4.0, mode="mixed-bf16")),
    )
    comparison = compare(*runs)
    findings = judge_gates(comparison, parse_gates(["step_time>5%", "step_time<=3ms", "missing"]))
    words = "parameters 1.4 M to 1.6 M; layers Dense 1 to 2"
    assert [each.text.endswith("; the model changed") for each in findings] == [True] * 4 + [False] * 2
    text = render([comparison], findings, "table")
    assert "2 rows; step time 2 slower; metric 2 as good; another version of the model in 2 rows" in text
    assert "B against A: what changed in the model" in text
    assert next(line.split() for line in text.splitlines() if "parameters" in line and "toy" in line) == [
        "toy", "all", "parameters", "1.4", "M", "1.6", "M",
    ]  # fmt: skip
    assert "the model changed" in text.lower()
    (row, _) = json.loads(render([comparison], [], "json"))["comparisons"][0]["rows"]
    assert row["model_changes"][0] == {"what": "parameters", "before": "1.4 M", "after": "1.6 M"}
    assert words in render([comparison], [], "csv")
    assert f"toy: the model changed: {words}" in comparison_page([comparison])


def test_two_workloads_of_one_series_are_not_mixed_up(run_of):
    before, after = run_of(version(1)), run_of(version(2, workload="one"), version(3, workload="two"))
    with pytest.raises(RunError, match="the series s has the workloads one and two; give each a series of its own"):
        compare(before, after)
    history = make_history([before, after])
    (skipped,) = [reason for _, reason in history.skipped]
    assert skipped == "another workload of the run has the series s, too"


@pytest.mark.parametrize("named", [True, False])
def test_a_history_follows_a_series_over_versions_and_marks_them(run_of, named):
    series = "s" if named else None
    runs = [run_of(version(number, ms, series=series)) for number, ms in ((1, 2.0), (1, 2.0), (2, 4.0), (2, 4.0))]
    history = make_history(runs, by_name=not named)
    (one,) = history.series
    assert [in_words(point.versions) for point in one.points] == [
        "", "", "parameters 1.4 M to 1.6 M; layers Dense 1 to 2", "",
    ]  # fmt: skip
    assert "another version of the model: parameters" in render_history(history, "table")
    neighbours = Neighbours(runs, by_name=not named)
    page = history_page([history], neighbours)
    assert page.count("stroke-dasharray") == 1
    assert neighbours.verdict(one, "step_time", runs[1].name, runs[2].name) == "slower"
    assert neighbours.before(runs[2].name) == runs[1].name
    if not named:
        assert len(make_history(runs).series) == 2
        assert neighbours.verdict(one, "step_time", runs[2].name, runs[3].name) == "same"


def test_a_series_that_got_its_name_later_is_told_apart(run_of):
    history = make_history([run_of(version(1, series=None)), run_of(version(1)), run_of(version(2))])
    assert [(len(one.points), one.apart) for one in history.series] == [
        (1, "digest sha256:1, batch=20"), (2, "all versions, any batch"),
    ]  # fmt: skip
