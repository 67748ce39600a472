"""Gates at the end of a pytest run: what they report if evidence is missing, and whether the run fails."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from support.runfolder import CPU, finished, record, write_run

from mpscale import config
from mpscale.core.case import Settings, series_key
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.mode import MODES
from mpscale.core.record import to_csv
from mpscale.pytest_plugin.baseline import BaselineCheck, further_cases
from mpscale.telemetry import host

BEFORE, AFTER = "20260101T000000Z-before", "20260102T000000Z-after"
QUIET = (2.0, 2.001, 2.002, 1.999, 1.998)


def cases(values=(0.9,) * 5, times=QUIET, mode="fp32", digest="sha256:1", more=()):
    """One training per value (a metric, or the status of a case that died), then timing-only processes of seed 0."""
    key = series_key(MODES[mode], "toy", digest, 20, 30, Settings())
    common = {"series_key": key, "method_version": METHOD_VERSION, "device_name": "Test CPU"}
    trained = []
    for seed, (value, time) in enumerate(zip(values, times, strict=True)):
        facts = {"metric_name": "accuracy", "metric_margin": 0.01, "metric_higher_is_better": True, **common}
        died = isinstance(value, str)
        facts |= {"status": value, "status_reason": "it broke"} if died else {"step_time_ms_median": time}
        trained.append(record(mode, seed, **facts))
        if not died:
            trained[-1].update({"metric_value": value})
    return trained + [record(mode, 0, repeat, step_time_ms_median=ms, **common) for repeat, ms in enumerate(more, 1)]


def check(tmp_path, after, gates="metric,step_time>5%", named=True, strict=False, further=(), before=None):
    """Compare a run of the cases ``after``; ``further`` is measured for rows that look worse."""
    environment = {"device": CPU, "cpu": host.cpu_facts(), "variables": {}}
    write_run(tmp_path, finished(before or cases()), name=BEFORE, environment=environment)
    path = write_run(tmp_path, finished(after), name=AFTER, environment=environment)
    settings = "" if named else f'baseline = "{BEFORE}"\nfail-on = {gates.split(",")!r}\n'
    (tmp_path / "pyproject.toml").write_text(f"[tool.mpscale]\n{settings}")
    options = {"mp_baseline": BEFORE if named else None, "mp_fail_on": [gates] if named else None, "mp_strict": strict}
    found = BaselineCheck(SimpleNamespace(getoption=options.get, rootpath=tmp_path))
    found.open(tmp_path, SimpleNamespace(kind="cpu", name="Test CPU"))

    def run_more(_):
        lines = [*finished(after), *finished(further)]
        (path / "journal.jsonl").unlink()
        (path / "run.json").unlink()
        path.rmdir()
        write_run(tmp_path, lines, name=AFTER, environment=environment)

    found.judge(path, run_more, lambda workload: Settings())
    return found


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("after", "outcome", "said"),
    [
        pytest.param(cases(), "passed", "2 of 2 gated figures passed", id="all is well"),
        pytest.param(cases((0.9,) * 4 + (math.nan,)), "fired", "worse: +0", id="one seed is NaN"),
        pytest.param(cases((math.nan,) * 5), "fired", "lost seeds 0, 1, 2, 3, 4", id="nothing but NaN"),
        pytest.param(cases((0.9,) * 4 + ("oom",)), "untold", "seed 4: oom", id="one seed is oom"),
        pytest.param(cases((0.9,) * 3 + ("timeout", "crashed")), "untold", "seed 3: timeout", id="two seeds died"),
    ],
)
def test_which_outcomes_fail_a_run_and_how_they_are_reported(tmp_path, after, outcome, said, strict):
    found = check(tmp_path, after, strict=strict)
    text = "\n".join(found.lines())
    assert said in text
    assert found.fails == (outcome == "fired" or (strict and outcome == "untold")), text
    if outcome == "untold":
        assert f"could not be judged, which fails {'the run' if strict else 'a run with --mp-strict only'}" in text


@pytest.mark.parametrize("named", [True, False])
def test_a_run_without_comparable_rows_fails_whoever_named_the_baseline(tmp_path, named):
    found = check(tmp_path, cases(digest="sha256:2"), named=named)
    assert "was not measured as" in found.lines()[0]
    assert found.fails


@pytest.mark.parametrize(
    ("further", "fails"),
    [
        pytest.param(QUIET * 2, False, id="it was slow by chance"),
        pytest.param([3 * time for time in QUIET * 2], True, id="it is slow"),
    ],
)
def test_rows_that_look_slower_are_judged_only_by_what_was_measured_again(tmp_path, further, fails):
    slow = [3 * time for time in QUIET]
    again = cases(values=(), times=(), more=further)
    found = check(tmp_path, cases(times=slow), "step_time>5%", further=again)
    assert found.fails == fails, found.lines()
    assert "5 and 10 processes" in found.findings[0].text


def test_rows_are_measured_again_from_a_seed_that_was_not_lost(tmp_path):
    from mpscale.core.runs import read_run

    run = read_run(write_run(tmp_path, finished(cases((math.nan, math.nan, 0.9, 0.9, 0.9)))))
    further = further_cases(run, {("toy", "fp32"): 1}, lambda workload: Settings())
    assert {(case.seed, case.trains) for case in further} == {(2, False)}
    assert len(further) == 6


def test_a_row_of_a_sweep_is_measured_again_with_its_batch_and_scale(tmp_path):
    from mpscale.core.runs import read_run

    swept = [
        record("mixed-static", seed, case_id=f"{batch}-{seed}", swept_batch=batch, swept_scale=8.0,
               step_time_ms_median=1.0)
        for batch in (64, 256)
        for seed in (0, 1)
    ]  # fmt: skip
    run = read_run(write_run(tmp_path, finished(swept)))
    further = further_cases(run, {("toy @256", "mixed-static @8"): 1}, lambda workload: Settings(train_steps=7))
    assert [case.id for case in further] == [f"toy--mixed-static--batch256--scale8--s0--r{n}" for n in (1, 2, 3, 4)]
    assert {(c.settings.batch_size, c.settings.static_scale, c.settings.train_steps) for c in further} == {
        (256, 8.0, 7)
    }


def opened(tmp_path, baseline, named=False, gates="metric"):
    """Open a baseline on a machine called Test CPU."""
    (tmp_path / "pyproject.toml").write_text(f'[tool.mpscale]\nbaseline = "{baseline}"\nfail-on = ["{gates}"]\n')
    options = {"mp_baseline": baseline if named else None}
    found = BaselineCheck(SimpleNamespace(getoption=options.get, rootpath=tmp_path))
    found.open(tmp_path / "results", SimpleNamespace(kind="cpu", name="Test CPU"))
    return found


def table(tmp_path, **changes):
    """A cases.csv of this machine with changes in its first row, or in all rows if a change is None."""
    made = cases()
    for one in made if None in changes.values() else made[:1]:
        one.update(changes)
    path = tmp_path / "table.csv"
    path.write_text(to_csv(made))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_name": "Other CPU"}, "baseline: .*holds cases of .*Other CPU.*; compare runs of one device each"),
        ({"device_name": "Other \x1b[31mCPU"}, r"holds cases of .*Other \\x1b\[31mCPU"),
        ({"device": None, "device_name": None}, "does not name its machine"),
        ({"method_version": METHOD_VERSION - 1}, f"measured by method {METHOD_VERSION - 1}, and this is method"),
    ],
    ids=["two machines", "a machine with a command for the terminal", "no machine", "another method"],
)
def test_an_unusable_table_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(pytest.UsageError, match=message):
        opened(tmp_path, table(tmp_path, **changes))


@pytest.mark.parametrize("method", [METHOD_VERSION, METHOD_VERSION - 1])
@pytest.mark.parametrize("named", [False, True])
def test_a_baseline_of_another_machine_in_a_shared_file_does_not_stop_a_run(tmp_path, method, named):
    device = {**CPU, "name": "Another CPU"}
    write_run(tmp_path / "results", finished(cases()), name=BEFORE, device=device, method_version=method)
    if named:
        with pytest.raises(pytest.UsageError, match="was made on Another CPU"):
            opened(tmp_path, BEFORE, named=True)
        return
    found = opened(tmp_path, BEFORE)
    (line,) = found.lines()
    assert "was made on Another CPU (cpu)" in line and line.endswith("not compared")
    assert not found.fails


def test_the_latest_run_as_baseline_does_not_stop_the_first_run(tmp_path):
    found = opened(tmp_path, "latest")
    assert found.lines() == [f"baseline: there is no run in {tmp_path}/results/runs yet: not compared"]
    assert not found.fails
    with pytest.raises(pytest.UsageError, match="there is no run"):
        opened(tmp_path, "latest", named=True)
    broken = tmp_path / "results" / "runs" / BEFORE
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    with pytest.raises(pytest.UsageError, match="the only run: "):
        opened(tmp_path, "latest")


def test_a_path_in_pyproject_is_relative_to_its_folder(tmp_path, monkeypatch):
    inner = tmp_path / "bench"
    inner.mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nbaseline = "kept/table.csv"\n')
    for folder in (tmp_path, inner):
        (folder / "kept").mkdir()
        (folder / "kept" / "table.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert config.load(tmp_path).baseline == "kept/table.csv"
    monkeypatch.chdir(inner)
    assert config.load(inner).baseline == str(tmp_path / "kept" / "table.csv")
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nbaseline = "latest"\n')
    assert config.load(inner).baseline == "latest"
