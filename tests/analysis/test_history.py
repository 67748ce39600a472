"""Which runs form a series, in which order, and what each point holds."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
from support.runfolder import CPU, GPU, finished, record, write_run

from mpscale.analysis.history import make_history, read_folder, tell_apart
from mpscale.analysis.quantities import QUANTITIES
from mpscale.analysis.stats import geometric_interval, log_change
from mpscale.analysis.summary import summarise
from mpscale.core.case import Settings, series_key
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.core.runs import RunError, read_run


def key(mode="fp32", workload="toy", digest="abcdef0123456789", batch_size=100, train_steps=2000, **settings):
    return series_key(MODES[mode], workload, digest, batch_size, train_steps, Settings(**settings))


def timed(*times, mode="fp32", **values):
    """One process for each time in ms."""
    values = {"series_key": key(mode), **values}
    return [record(mode, seed, step_time_ms_median=time, **values) for seed, time in enumerate(times)]


def run_of(folder, day, records, device=CPU, cores=2, **info):
    """A run made on a day of January."""
    environment = {"device": dict(device), "cpu": {"logical_cores": cores}, **info.pop("environment", {})}
    info = {"name": f"202601{day:02d}T000000Z-x", "started": f"2026-01-{day:02d}T00:00:00+00:00", **info}
    return read_run(write_run(folder, finished(records), device=device, environment=environment, **info))


def csv_of(run, folder):
    """The same run as a cases.csv by itself."""
    folder.mkdir(parents=True)
    frame = run.cases.assign(unavailable=[json.dumps(reasons) for reasons in run.cases["unavailable"]])
    frame.to_csv(folder / "cases.csv", index=False)
    return read_run(folder / "cases.csv")


def only(history):
    (series,) = history.series
    return series


def days(series):
    return [point.run.started and point.run.started.day for point in series.points]


def test_runs_are_in_the_order_in_which_they_were_started_whatever_their_names(tmp_path):
    runs = [run_of(tmp_path, day, timed(1.0), name=name) for day, name in ((9, "a"), (2, "c"), (5, "b"))]
    assert [point.run.name for point in only(make_history(runs)).points] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("started", "name", "day"),
    [
        ("2026-01-03T23:30:00-01:00", "x", 4),
        ("2026-01-03T23:30:00", "x", 3),
        (None, "20260105T010203Z-x", 5),
        ("yesterday", "20260105T010203Z-x", 5),
        (None, "nightly", None),
        (None, "20269905T010203Z-x", None),
    ],
)
def test_when_a_run_was_started(tmp_path, started, name, day):
    assert days(only(make_history([run_of(tmp_path, 1, timed(1.0), started=started, name=name)]))) == [day]


def test_runs_of_unknown_age_come_last(tmp_path):
    runs = [run_of(tmp_path, day, timed(1.0), **info) for day, info in ((1, {"started": None, "name": "a"}), (2, {}))]
    assert days(only(make_history(runs))) == [2, None]


def test_a_point_is_the_geometric_mean_over_processes_with_its_interval(tmp_path):
    (point,) = only(make_history([run_of(tmp_path, 1, timed(1.0, 2.0, 4.0))])).points
    expected = geometric_interval([1.0, 2.0, 4.0])
    assert (point.value, point.low, point.high, point.n) == (expected.estimate, expected.low, expected.high, 3)
    assert point.value == pytest.approx(2.0)


def test_a_change_is_welchs_against_the_run_before(tmp_path):
    times = [(1.0, 1.1), (2.0, 2.1), (3.0, 3.3)]
    points = only(make_history([run_of(tmp_path, day, timed(*t)) for day, t in enumerate(times, 1)])).points
    assert (points[0].change, points[0].change_low, points[0].change_high) == (None, None, None)
    for before, after, point in zip(times, times[1:], points[1:], strict=False):
        expected = log_change(before, after)
        assert (point.change, (point.change_low, point.change_high)) == (expected.change, expected.interval())


def test_a_change_of_single_processes_has_no_interval(tmp_path):
    points = only(make_history([run_of(tmp_path, day, timed(float(day))) for day in (1, 2)])).points
    assert points[1].change == pytest.approx(1.0)
    assert (points[1].low, points[1].change_low, points[1].change_high) == (None, None, None)


def test_a_run_without_a_value_keeps_its_place_with_a_reason_and_changes_skip_it(tmp_path):
    lost = timed(9.0, 9.0, status="diverged", status_reason="the loss is nan")
    runs = [run_of(tmp_path, day, records) for day, records in ((1, timed(1.0)), (2, lost), (3, timed(2.0)))]
    points = only(make_history(runs)).points
    assert [point.value for point in points] == [1.0, None, 2.0]
    assert (points[1].reason, points[1].n) == ("diverged: the loss is nan", 0)
    assert points[2].change == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        ({"digest": "1234567890abcdef"}, ["digest abcdef01", "digest 12345678"]),
        ({"batch_size": 200}, ["batch=100", "batch=200"]),
        ({"train_steps": 50}, ["steps=2000", "steps=50"]),
        ({"jit": False}, ["jit=on", "jit=off"]),
        ({"timing_s": 5.0}, ["timing=2s/50", "timing=5s/50"]),
        ({"batch_size": 200, "jit": False}, ["batch=100, jit=on", "batch=200, jit=off"]),
    ],
)
def test_another_way_of_measuring_is_another_series(tmp_path, other, apart):
    runs = [run_of(tmp_path, 1, timed(1.0)), run_of(tmp_path, 2, timed(2.0, series_key=key(**other)))]
    series = make_history(runs).series
    assert [days(one) for one in series] == [[1], [2]]
    assert [one.apart for one in series] == apart
    assert [one.label for one in series] == [f"fp32 ({text})" for text in apart]
    assert all(point.change is None for one in series for point in one.points)


def test_a_setting_that_only_one_series_has_is_named_beside_its_default():
    keys = [key("mixed-dynamic"), key("mixed-dynamic", dynamic_scale={"growth_interval": 500})]
    assert tell_apart([(one, {}) for one in keys]) == ["growth_interval=2000", "growth_interval=500"]


def test_series_keys_of_another_form_are_shown_as_they_are():
    assert tell_apart([("old-1", {}), ("old-2", {})]) == ["series=old-1", "series=old-2"]


@pytest.mark.parametrize(
    ("one", "two", "apart"),
    [
        ({}, {"device": GPU}, ["Test CPU", "Test GPU"]),
        ({}, {"cores": 1}, ["2 cores", "1 core"]),
        ({}, {"environment": {"variables": {"OMP_NUM_THREADS": "1", "HOME": "/"}}}, ["", "OMP_NUM_THREADS=1"]),
        ({}, {"device": {**CPU, "kind": "gpu"}}, ["cpu, 2 cores", "gpu"]),
    ],
)
def test_another_machine_is_another_series(tmp_path, one, two, apart):
    runs = [run_of(tmp_path, day, timed(float(day)), **machine) for day, machine in ((1, one), (2, two), (3, one))]
    series = make_history(runs).series
    assert [days(each) for each in series] == [[1, 3], [2]]
    assert [each.apart for each in series] == apart
    # Against the first run, not the second, which ran elsewhere.
    assert series[0].points[1].change == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("machines", "joined"),
    [
        ([{}], [[1, 3]]),
        ([{}, {"cores": 64}], [[1], [2], [3]]),
        ([{"device": GPU}], [[1], [3]]),
    ],
)
def test_a_cases_csv_joins_the_only_machine_that_it_can_be_from(tmp_path, machines, joined):
    runs = [run_of(tmp_path, day, timed(1.0), **machine) for day, machine in enumerate(machines, 1)]
    named = timed(1.0, device="cpu", device_name="Test CPU")
    alone = csv_of(run_of(tmp_path / "other", 3, named), tmp_path / "artifacts" / "20260103T000000Z-x")
    assert sorted(days(series) for series in make_history([*runs, alone]).series) == joined


def test_series_come_by_workload_then_mode(tmp_path):
    def cases(workload, mode):
        return timed(1.0, mode=mode, workload=workload, series_key=key(mode, workload))

    runs = [
        run_of(tmp_path, 2, [*cases("a", "fp32"), *cases("b", "fp32")]),
        run_of(tmp_path, 1, [*cases("b", "mixed-bf16"), *cases("b", "tf32")]),
    ]
    found = [(series.workload, series.mode) for series in make_history(runs).series]
    assert found == [("b", "fp32"), ("b", "tf32"), ("b", "mixed-bf16"), ("a", "fp32")]


def test_only_requested_workloads_and_modes_are_shown(tmp_path):
    run = run_of(
        tmp_path, 1, [*timed(1.0), *timed(2.0, mode="tf32"), *timed(1.0, workload="b", series_key=key("tf32"))]
    )
    assert [series.mode for series in make_history([run], workloads=["toy"], modes=["tf32"]).series] == ["tf32"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workloads": ["toys"]}, "no run has the workload 'toys'; there are toy"),
        ({"modes": ["tf32"]}, "no run has the mode 'tf32'; there are fp32"),
        ({"quantity": "gpu_memory"}, "no run has a value of GPU memory: trained on a CPU; choose another quantity"),
        ({"quantity": "speedup"}, "no run has a value of speed-up over fp32: no mode but fp32 was measured"),
    ],
)
def test_an_empty_history_is_an_error_that_lists_what_there_is(tmp_path, options, message):
    one = record(series_key=key(), step_time_ms_median=1.0)
    one.miss("gpu_memory_nvml_peak_mib", Reason(Code.NO_GPU, "trained on a CPU"))
    run = run_of(tmp_path, 1, [one])
    with pytest.raises(RunError, match=message):
        make_history([run], **options)


def test_an_unknown_quantity_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no quantity 'speed'; there are step_time"):
        make_history([], "speed")


def test_the_metric_is_a_mean_over_seeds_with_its_range_and_no_change(tmp_path):
    def trained(*values):
        return [record(seed=s, series_key=key(), metric_name="accuracy", metric_value=v) for s, v in enumerate(values)]

    runs = [run_of(tmp_path, 1, trained(0.5, 0.7, 0.6)), run_of(tmp_path, 2, trained(0.9))]
    series = only(make_history(runs, "metric"))
    assert series.metric_name == "accuracy"
    assert [(p.value, p.low, p.high, p.n, p.change) for p in series.points] == [
        (pytest.approx(0.6), 0.5, 0.7, 3, None),
        (0.9, None, None, 1, None),
    ]


def test_the_overflow_rate_is_over_all_steps_and_unknown_without_a_check(tmp_path):
    checked = [
        record("mixed-static", s, series_key=key("mixed-static"), attempted_steps=n, overflow_steps=o)
        for s, (n, o) in enumerate([(100, 0), (300, 8)])
    ]
    history = make_history([run_of(tmp_path, 1, [*timed(1.0, attempted_steps=100), *checked])], "overflow_rate")
    series = only(history)
    (point,) = series.points
    assert (series.mode, point.value, point.low, point.high, point.n) == ("mixed-static", 0.02, 0.0, 8 / 300, 2)
    assert [what for what, _ in history.skipped] == ["toy fp32"]


def test_the_speedup_is_that_of_the_runs_summary(tmp_path):
    records = [
        *timed(10.0, 20.0, 30.0, 40.0),
        *timed(5.0, 11.0, 14.0, mode="tf32"),
        record("tf32", 3, series_key=key("tf32"), step_time_ms_median=1.0, status="diverged"),
        record("tf32", 7, series_key=key("tf32"), step_time_ms_median=1.0),
    ]
    (point,) = only(make_history([run_of(tmp_path, 1, records)], "speedup")).points
    row = summarise(records)[1]
    assert [point.value, point.low, point.high] == pytest.approx(
        [row["speedup_fp32"], row["speedup_fp32_low"], row["speedup_fp32_high"]]
    )
    assert point.n == 3


@pytest.mark.parametrize("name", QUANTITIES)
def test_every_quantity_is_taken_from_its_column(tmp_path, name):
    columns = {
        "step_time_ms_median": 2.0, "gpu_memory_nvml_peak_mib": 300.0, "gpu_energy_j_per_step": 0.5,
        "host_memory_peak_mib": 400.0, "metric_value": 0.75, "attempted_steps": 8, "overflow_steps": 2,
        "device_busy_ms_per_step": 1.5, "step_time_ms_with_input": 3.5,
    }  # fmt: skip
    expected = {
        "step_time": 2.0, "gpu_memory": 300.0, "energy": 0.5, "host_memory": 400.0, "metric": 0.75,
        "overflow_rate": 0.25, "speedup": 2.0, "device_time": 1.5,
        "step_time_with_input": 3.5,
    }  # fmt: skip
    records = [*timed(4.0, metric_value=0.7), record("mixed-static", series_key=key("mixed-static"), **columns)]
    history = make_history([run_of(tmp_path, 1, records)], name, modes=["mixed-static"])
    assert only(history).points[0].value == pytest.approx(expected[name])


def test_a_case_that_failed_early_joins_the_only_series(tmp_path):
    records = [*timed(1.0, 3.0), record(seed=2, status="crashed", status_reason="signal 11")]
    (point,) = only(make_history([run_of(tmp_path, 1, records)])).points
    assert (point.value, point.n) == (pytest.approx(statistics.geometric_mean([1.0, 3.0])), 2)


def test_a_mode_that_failed_without_a_series_is_mentioned_but_not_an_unsupported_one(tmp_path):
    broken = record("tf32", status="crashed", status_reason="signal 11")
    lacking = record("graph-rewrite", status="unsupported", status_reason="needs a GPU")
    run = run_of(tmp_path, 1, [*timed(1.0), broken, lacking])
    history = make_history([run])
    assert [series.mode for series in history.series] == ["fp32"]
    ((what, reason),) = history.skipped
    assert what == f"{run.name} toy tf32"
    assert reason.startswith("crashed: signal 11")


def test_the_facts_of_a_run(tmp_path):
    environment = {"git": {"commit": "83e8d7e262", "dirty": True}, "packages": {"tensorflow": "2.21.0"}}
    run = run_of(tmp_path, 1, timed(1.0), environment=environment, finish=False)
    facts = only(make_history([run])).points[0].run
    assert (facts.commit, facts.dirty, facts.tensorflow, facts.finished) == ("83e8d7e262", True, "2.21.0", False)


@pytest.mark.parametrize("environment", [{"git": "no git here"}, {"git": {"commit": None}, "packages": []}])
def test_unknown_facts_are_none(tmp_path, environment):
    facts = only(make_history([run_of(tmp_path, 1, timed(1.0), environment=environment)])).points[0].run
    assert (facts.commit, facts.dirty, facts.tensorflow) == (None, None, None)


def test_a_run_that_is_kept_in_both_folders_counts_once(tmp_path):
    run = run_of(tmp_path, 1, timed(1.0))
    shutil.copytree(run.path, tmp_path / "reference" / run.name)
    kept = run_of(tmp_path, 2, timed(1.0))
    shutil.move(kept.path, tmp_path / "reference")
    runs, skipped = read_folder(tmp_path)
    assert ([run.name for run in runs], skipped) == ([run.name, kept.name], [])
    assert days(only(make_history([*runs, *runs]))) == [1, 2]


def test_a_readable_copy_replaces_an_unreadable_one(tmp_path):
    run = run_of(tmp_path, 1, timed(1.0))
    shutil.copytree(run.path, tmp_path / "reference" / run.name)
    (run.path / "journal.jsonl").unlink()
    runs, skipped = read_folder(tmp_path)
    assert [found.path.parent.name for found in runs] == ["reference"]
    assert [folder for folder, _ in skipped] == [str(run.path)]


def test_folders_that_are_not_runs_are_skipped_with_the_reason(tmp_path):
    run = run_of(tmp_path, 1, timed(1.0))
    for name, text in (("torn", "{"), ("newer", '{"schema_version": 99}')):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_text(text)
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / ".hidden").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("not a folder")
    runs, skipped = read_folder(tmp_path)
    assert [found.name for found in runs] == [run.name]
    assert [folder.rpartition("/")[2] for folder, _ in skipped] == ["empty", "newer", "torn"]
    for (_, reason), expected in zip(skipped, ("no such file", "schema version 99", "not readable"), strict=True):
        assert expected in reason


def test_a_folder_without_runs_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(RunError, match=r"there is no run in .*; make one with"):
        read_folder(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(RunError, match=r"no run in .* can be read; the only run: .*no such file"):
        read_folder(tmp_path)


def test_a_row_of_a_sweep_continues_the_series_of_its_batch_and_its_speedup_is_over_fp32_of_that_batch(tmp_path):
    def rows(batch, fp32, mixed, **columns):
        return [
            record(
                mode, seed, step_time_ms_median=ms, series_key=key(mode, batch_size=batch),
                case_id=f"{mode}-{batch}-{seed}", **columns,
            )
            for mode, ms in (("fp32", fp32), ("mixed-dynamic", mixed))
            for seed in (0, 1)
        ]  # fmt: skip

    alone = run_of(tmp_path, 1, rows(100, 2.0, 1.0))
    sweep = run_of(tmp_path, 2, [*rows(100, 3.0, 1.0, swept_batch=100), *rows(400, 8.0, 1.0, swept_batch=400)])
    found = make_history([alone, sweep], "speedup", ["toy"], ["mixed-dynamic"])
    assert [(one.workload, one.mode, one.apart) for one in found.series] == [
        ("toy", "mixed-dynamic", "batch=100"),
        ("toy", "mixed-dynamic", "batch=400"),
    ]
    assert [[point.value for point in one.points] for one in found.series] == [
        pytest.approx([2.0, 3.0]),
        pytest.approx([8.0]),
    ]
