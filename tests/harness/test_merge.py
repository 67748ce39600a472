"""Runs that are merged: what the new run has of each, what is refused, and what a stranger's files or a kill can do."""

import json
import os
import shutil

import pytest
from support.runfolder import CPU, GPU, finished, record, started, write_run, write_steps

from mpscale.analysis.compare import compare
from mpscale.analysis.history import read_folder
from mpscale.analysis.noise_floor import runs_of_the_same_code
from mpscale.analysis.pairs import NotComparable
from mpscale.analysis.summary import summary_of
from mpscale.cli import main
from mpscale.core.files.reading import RunError
from mpscale.core.machines import hardware
from mpscale.core.run_folder import gpu_path, steps_path
from mpscale.core.runs import read_run, resolve_run
from mpscale.core.shard import Shard, Share
from mpscale.harness import merged_folder
from mpscale.harness.merge import COSTS, Merger
from mpscale.harness.merged_folder import write_merged
from mpscale.harness.resume import refuse_other_versions
from mpscale.report.document import document, render
from mpscale.report.missing import lacks

PLAN = [f"toy--{mode}--s{seed}--r0" for seed in range(4) for mode in ("fp32", "mixed-dynamic")]
ENVIRONMENT = {
    "packages": {"mpscale": "0.3.0", "tensorflow": "2.21.0", "keras": "3.15.1"},
    "cpu": {"model": "Test CPU", "logical_cores": 2},
    "device": CPU,
    "git": {"commit": "a" * 40, "dirty": False},
    "variables": {},
    "load_average_at_start": [0.5],
}
SETTINGS = {"jit": True, "workloads": ["toy"], "modes": ["fp32", "mixed-dynamic"], "seeds": [0], "set_apart": None}


def toy(mode, seed, ms=2.0, **values):
    known = {"metric_value": 0.9 + seed / 100, "metric_name": "accuracy", "metric_margin": 0.01}
    known |= {"metric_higher_is_better": True, "workload_digest": "d", "device_name": "Test CPU", "method_version": 6}
    key = f"toy/d/{mode}/batch=8/method=6"
    return record(mode, seed, **{**known, "series_key": key, "step_time_ms_median": ms, "attempts": 1, **values})


def part(results, number, of=2, records=None, plan=PLAN, name=None, **info):
    """Write a part of the plan; return its folder."""
    share = Share(Shard(number, of), plan)
    own = [case for case in plan if case in share.own()]
    if records is None:
        records = [toy(case.split("--")[1], int(case.split("--s")[1][0]), ms=1.0 + number) for case in own]
    about = {"environment": ENVIRONMENT, "settings": SETTINGS, "shard": share.to_json(), "planned": own}
    about |= {"started": f"2026-01-02T03:04:0{number}+00:00"}
    name = name or f"20260102T03040{number}Z-test-cpu-000{number}"
    return write_run(results, finished(records), name=name, **{**about, **info})


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("mpscale.report.files._page", lambda run, report: "a page")
    return tmp_path / "results"


@pytest.fixture
def parts(results):
    return [part(results, 1), part(results, 2)]


def merge(paths, results, **how):
    return write_merged(Merger.of(paths, **how), results)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def test_the_run_has_the_cases_of_all_parts_in_the_order_of_the_plan(parts, results):
    write_steps(parts[0], PLAN[0], "step,loss,loss_scale,overflow\n0,1.5,,0\n")
    gpu_path(parts[1], PLAN[2], 1).parent.mkdir()
    gpu_path(parts[1], PLAN[2], 1).write_bytes(b"samples")
    before = content(results)
    path = merge(parts[::-1], results)
    run = read_run(path)
    assert [one["case_id"] for one in run.records] == run.info["planned"] == PLAN
    assert (run.finished, run.not_started, run.problems) == (True, [], [])
    assert run.step_columns(PLAN[0])["loss"] == [1.5]
    assert gpu_path(path, PLAN[2], 1).read_bytes() == b"samples"
    told = {one["run"]: (one["shard"]["part"], one["cases"], one["environment"]) for one in run.merged}
    assert told == {
        parts[0].name: (1, [PLAN[n] for n in (0, 1, 4, 5)], ENVIRONMENT),
        parts[1].name: (2, [PLAN[n] for n in (2, 3, 6, 7)], ENVIRONMENT),
    }
    assert {file: data for file, data in content(results).items() if not file.is_relative_to(path)} == before
    assert read_run(path).info["settings"]["seeds"] == [0, 1, 2, 3]


def test_every_attempt_of_a_case_is_kept(results):
    first, second = toy("fp32", 0, status="crashed"), toy("fp32", 0, attempts=2)
    others = [toy("mixed-dynamic", 0), toy("fp32", 2), toy("mixed-dynamic", 2)]
    one = part(results, 1, records=[first, second, *others])
    path = merge([one, part(results, 2)], results)
    assert read_run(path).records[0].to_json() == second.to_json()
    lines = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    assert [event["event"] for event in lines if event.get("case_id") == PLAN[0]].count("case_finished") == 2


@pytest.mark.parametrize("also", [{}, {"cores": [0]}])
def test_runs_with_other_cases_can_be_one(results, also):
    def run(name, workload, **settings):
        records = [toy(mode, 0, workload=workload, case_id=f"{workload}--{mode}--s0--r0") for mode in ("fp32", "tf32")]
        settings = {**SETTINGS, "workloads": [workload], **settings}
        return write_run(results, finished(records), name=name, environment=ENVIRONMENT, settings=settings)

    path = merge([run("one", "toy"), run("two", "other:net", **also)], results)
    read = read_run(path)
    assert [one["workload"] for one in read.records] == ["toy", "toy", "other:net", "other:net"]
    assert read.info["settings"]["workloads"] == ["toy", "other:net"]
    assert [row["speedup_fp32"] for row in summary_of(read) if row["mode"] == "tf32"] == [1.0, 1.0]


def settings(**changes):
    return {"settings": {**SETTINGS, **changes}}


def environment(**changes):
    return {"environment": {**ENVIRONMENT, **changes}}


OTHER = [case.replace("toy", "other") for case in PLAN]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (settings(jit=False), "the setting jit is true and false"),
        (settings(preset="full"), 'the setting preset is not set and "full"'),
        (settings(set_apart={"toy": {"autotune": "shared"}}), "what is set for toy alone is not set and"),
        ({"method_version": 5}, "method version is 6 and 5"),
        ({"schema_version": 0}, "schema version is 1 and 0"),
        (environment(packages={**ENVIRONMENT["packages"], "mpscale": "0.4.0"}), "mpscale is 0.3.0 and 0.4.0"),
        (environment(packages={**ENVIRONMENT["packages"], "tf-nightly": "2.22"}), "tf-nightly is missing and 2.22"),
        (environment(git={"commit": "b" * 40}), f"the git commit is {'a' * 40} and {'b' * 40}"),
        (environment(git=None), "the git commit is"),
        (environment(variables={"NVIDIA_TF32_OVERRIDE": "0"}), "NVIDIA_TF32_OVERRIDE is not set"),
        (environment(device={**CPU, "name": "Other CPU"}), "measured on different devices"),
        (environment(device=GPU), "measured on different devices"),
        (environment(cpu={"logical_cores": 4}), "4 cores"),
        ({"of": 3}, "is part 1/2 of a plan, and"),
        ({"plan": [*PLAN, *OTHER]}, "parts of different plans: only one plans other--fp32--s0--r0"),
        ({"plan": PLAN[2:] + PLAN[:2]}, "parts of different plans: their order differs"),
        ({"number": 1, "name": "again"}, f"{PLAN[0]} is in "),
        ({"number": 1}, "is named twice"),
        ({"shard": {"part": 9, "of": 2}}, "does not say which part of which plan it is"),
        ({"shard": {"part": 2, "of": 2, "plan": [1]}}, "does not say which part of which plan it is"),
        ({"planned": []}, "has no plan"),
        ({"settings": None}, "has no plan, settings or environment"),
        ({"interleaved": {"id": "x"}}, "was made by `mpscale ab`"),
        ({"merged": {"parts": [{"run": "a"}]}}, "was merged itself; name what it was merged from: a"),
        ({"records": [toy("fp32", 1, workload_digest="e")]}, "toy is not the same in"),
        ({"records": [toy("fp32", 1, jit=False)]}, "toy was compiled with XLA in"),
        ({"records": [toy("fp32", 1)]}, "has no result of toy--mixed-dynamic--s1--r0"),
        ({"records": [toy("fp32", 1, status="interrupted")]}, "go on with it, --mp-resume"),
    ],
)
def test_what_would_make_figures_wrong_is_refused_by_name_and_nothing_is_written(results, tmp_path, change, said):
    change = dict(change)
    elsewhere = tmp_path / "elsewhere"  # where a second part may have the name of the first
    paths = [part(results, 1), part(elsewhere, change.pop("number", 2), change.pop("of", 2), **change)]
    before = content(tmp_path)
    with pytest.raises(RunError) as refused:
        merge(paths, results)
    assert said in str(refused.value)
    assert content(tmp_path) == before


def test_a_part_and_a_run_that_is_none_are_refused(results):
    alone = write_run(results, finished([toy("fp32", 9)]), name="alone", environment=ENVIRONMENT, settings=SETTINGS)
    with pytest.raises(RunError, match=r"is a part of a plan \(--mp-shard\), and alone is not"):
        merge([part(results, 1), alone], results)


def test_modes_of_a_seed_in_two_runs_are_refused_also_on_one_machine(results):
    paths = [
        write_run(results, finished([toy(mode, 3)]), name=mode, environment=ENVIRONMENT, settings=SETTINGS)
        for mode in ("fp32", "mixed-bf16")
    ]
    with pytest.raises(RunError, match="toy, seed 3: some modes are in fp32 and others in mixed-bf16"):
        merge(paths, results)


def test_allocators_of_two_kinds_are_different_devices(results):
    def on_gpu(allocator, number):
        about = {"device": "gpu", "device_name": "Test GPU", "gpu_allocator": allocator}
        records = [toy(mode, seed, **about) for seed in (number - 1, number + 1) for mode in ("fp32", "mixed-dynamic")]
        return part(results, number, records=records, **environment(device=GPU))

    with pytest.raises(RunError, match=r"0001 with bfc, .*0002 with cuda_malloc_async"):
        merge([on_gpu("bfc", 1), on_gpu("cuda_malloc_async", 2)], results)


def test_missing_parts_are_named_and_allowed_by_option(results, capsys):
    paths = [part(results, 1, 3), part(results, 3, 3)]
    with pytest.raises(RunError, match="not complete: part 2 of 3 is missing: run it with --mp-shard 2/3"):
        merge(paths, results)
    assert main(["merge", *map(str, paths), "--results", str(results), "--allow-missing"]) == 0
    run = read_run(resolve_run("latest", results))
    assert run.not_started == PLAN[2:4]
    assert lacks(run) == "No result yet: 1 of toy in fp32, 1 of toy in mixed-dynamic."
    assert lacks(run) in capsys.readouterr().err
    report = (run.path / "report.md").read_text()
    assert "Part 2 is missing" in report and lacks(run) in report and "2 planned cases were not started" in report
    # What was missing comes, and then all parts are merged anew.
    whole = read_run(merge([*paths, part(results, 2, 3)], results))
    assert (whole.not_started, lacks(whole)) == ([], "")


def test_more_parts_than_groups_are_complete_without_the_empty_ones(results):
    paths = [part(results, number, 6) for number in (1, 2, 3, 4)]
    assert read_run(merge(paths, results)).info["merged"]["missing_parts"] == []


def test_a_part_that_was_stopped_is_merged_as_it_is_if_that_is_allowed(results):
    first, *_ = records = [toy("fp32", 1), toy("mixed-dynamic", 1)]
    torn = part(results, 2, records=records[:1], finish=False)
    with (torn / "journal.jsonl").open("a") as file:
        file.write(json.dumps(started(records[1])) + '\n{"event": "case_fini')
    run = read_run(merge([part(results, 1), torn], results, allow_missing=True))
    assert not run.finished
    statuses = {one["case_id"]: one["status"] for one in run.records}
    assert (statuses[PLAN[2]], statuses[PLAN[3]], run.not_started) == ("ok", "interrupted", PLAN[6:])
    assert first["case_id"] == PLAN[2]


def test_a_line_that_cannot_be_read_costs_its_case_as_in_the_part(parts, results):
    lines = (parts[1] / "journal.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2][:40] + "\n"
    (parts[1] / "journal.jsonl").write_text("".join(lines))
    in_part = {one["case_id"]: one.to_json() for one in read_run(parts[1]).records}
    run = read_run(merge(parts, results))
    assert in_part[PLAN[2]]["status"] == "invalid"
    assert {one["case_id"]: one.to_json() for one in run.records if one["case_id"] in in_part} == in_part
    assert run.problems == []


@pytest.mark.parametrize("name", ["run.json", "journal.jsonl", "steps", "gpu", f"steps/{PLAN[2]}.csv.gz"])
def test_links_are_not_followed(parts, results, tmp_path, name):
    secret = tmp_path / "secret"
    here = parts[1] / name
    here.parent.mkdir(exist_ok=True)
    if here.exists():
        here.rename(secret)
    else:
        secret.write_text("secret")
    here.symlink_to(secret)
    before = content(results)
    with pytest.raises(RunError, match="is a link, and a run is merged from the files of its own folder only"):
        merge(parts, results)
    assert content(results) == before


@pytest.mark.parametrize("name", ["journal.jsonl", "run.json", f"steps/{PLAN[2]}.csv.gz"])
def test_a_pipe_in_place_of_a_file_is_an_error(parts, results, name):
    here = parts[1] / name
    here.parent.mkdir(exist_ok=True)
    here.unlink(missing_ok=True)
    os.mkfifo(here)
    before = content(results)
    with pytest.raises(RunError, match="is a named pipe"):
        merge(parts, results)
    assert content(results) == before


@pytest.mark.parametrize("place", ["write", "write_new", "read_info", "_write_journal"])
def test_a_merge_that_fails_or_is_interrupted_leaves_nothing(parts, results, monkeypatch, place):
    def stop(*_, **__):
        raise KeyboardInterrupt

    write_steps(parts[0], PLAN[0], "step,loss,loss_scale,overflow\n0,1.5,,0\n")
    monkeypatch.setattr(merged_folder, place, stop)
    before = content(results)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, results)
    assert content(results) == before
    assert sorted((results / "runs").iterdir()) == parts


def test_a_merge_that_was_killed_leaves_no_run_and_the_next_one_removes_the_rest(parts, results, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(merged_folder, "read_info", lambda path: 1 / 0)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            merge(parts, results)
    (left,) = (results / "runs").glob(".merging-*")
    (left / "run.json").unlink()  # the last that is written
    assert {path.name for path in parts} == {run.name for run in read_folder(results)[0]}
    assert resolve_run("latest", results) == parts[1]
    path = merge(parts, results)
    assert left.exists()  # it could be another merge that has just begun
    os.utime(left, (0, 0))
    shutil.rmtree(path)
    merge(parts, results)
    assert not left.exists()


def test_different_devices_give_accuracy_only(results):
    gpu = {"device": "gpu", "device_name": "Test GPU", "gpu_memory_nvml_peak_mib": 100.0}
    records = [toy(mode, seed, **gpu) for seed in (1, 3) for mode in ("fp32", "mixed-dynamic")]
    paths = [part(results, 1), part(results, 2, records=records, **environment(device=GPU))]
    gpu_path(paths[1], PLAN[2], 1).parent.mkdir()
    gpu_path(paths[1], PLAN[2], 1).write_bytes(b"samples")
    before = [read_run(path) for path in paths]
    run = read_run(merge(paths, results, accuracy_only=True))
    assert run.finished and run.problems == []
    for one in run.records:
        assert not COSTS & one.to_json().keys()
        assert "merged from different devices" in str(one.why_empty("step_time_ms_median"))
        assert one["metric_value"] == 0.9 + one["seed"] / 100
    (row,) = [row for row in summary_of(run) if row["mode"] == "mixed-dynamic"]
    assert (row["metric_pairs"], row["metric_verdict"], row["step_time_ms"], row["speedup_fp32"]) == (
        4,
        "non-inferior",
        None,
        None,
    )
    assert hardware(run)["name"] == "Test CPU and Test GPU"
    report = render(document(run))
    assert "on Test CPU and Test GPU" in report and "no step times, memory and energy" in report
    assert not (run.path / "gpu").exists()
    assert [one.to_json() for path in paths for one in read_run(path).records] == [
        one.to_json() for run in before for one in run.records
    ]
    assert read_folder(results)[0][0].name == run.name


def test_the_report_says_what_the_figures_are_of(parts, results, capsys):
    assert main(["merge", *(path.name for path in parts), "--results", str(results), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    run = read_run(told["path"])
    assert told["parts"] == [path.name for path in parts]
    assert (told["cases"], told["not_started"], told["missing_parts"]) == (8, 0, [])
    report = (run.path / "report.md").read_text()
    assert "The run was merged from 2 runs (see Parts)." in report
    # 2 ms in one part, 3 ms in the other.
    assert "Steps of the slowest part took 1.50 times as long as those of the fastest." in report
    (line,) = [line for line in report.splitlines() if line.startswith("| 2 of 2")]
    assert [cell.strip() for cell in line.split("|")[2:6]] == [parts[1].name, "2026-01-02 03:04", "4", "1.22"]
    assert "This run is part 2 of 2: 4 of 8 cases" in render(document(read_run(parts[1])))


def test_what_differs_between_the_machines_is_shown_beside_each_part(results):
    paths = [part(results, 1), part(results, 2, **environment(kernel="6.1", device={**CPU, "uuid": "u2"}))]
    run = read_run(merge(paths, results))
    report = render(document(run))
    (line,) = [line for line in report.splitlines() if line.startswith("| 2 of 2")]
    assert "kernel 6.1" in line and "device uuid u2" in line
    assert "kernel" not in run.environment and run.environment["git"]["commit"] == "a" * 40


@pytest.mark.parametrize(
    "odd",
    [
        {"parts": [1, {"run": 5, "cases": "all", "environment": [1], "shard": 7, "started": {}}], "missing_parts": "x"},
        {"parts": [{"environment": {"device": {"uuid": [1]}}, "cases": [[1]]}], "missing_parts": [[], "2"]},
        {"parts": {}},
        {"parts": [{"run": "[x](http://evil)", "shard": {"part": "<b>", "of": None}}]},
    ],
)
def test_what_a_stranger_wrote_about_parts_breaks_no_report(results, odd):
    path = write_run(results, finished([toy("fp32", 0)]), merged=odd)
    report = render(document(read_run(path)))
    assert "<b>" not in report
    assert "](http://" not in report


def test_measurements_count_once_beside_their_parts(parts, results):
    path = merge(parts, results)
    run, one = read_run(path), read_run(parts[0])
    assert resolve_run("latest", results) == path
    assert [found.name for found in read_folder(results)[0]] == [run.name]
    assert [found.name for found in runs_of_the_same_code(run)] == [run.name]
    assert run.name not in [found.name for found in runs_of_the_same_code(one)]
    for pair in ((run, one), (one, run)):
        with pytest.raises(NotComparable, match="hold the same measurements"):
            compare(*pair)
    assert compare(one, one).rows  # as before
    again = read_run(merge(parts, results))
    with pytest.raises(NotComparable, match="hold the same measurements"):
        compare(run, again)


def test_a_run_that_names_the_runs_of_others_as_its_parts_hides_none_of_them(parts, results):
    liar = {"parts": [{"run": parts[0].name}]}
    write_run(results, finished([toy("tf32", 0)]), name="liar", merged=liar)
    assert {found.name for found in read_folder(results)[0]} == {parts[0].name, parts[1].name, "liar"}


def test_a_merged_run_does_not_go_on_itself(parts, results):
    with pytest.raises(RunError, match="was merged; go on with the run that lacks something, then merge again"):
        refuse_other_versions(read_run(merge(parts, results)))


def test_messages_for_wrong_use(results, capsys, tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text("x")
    for names, said in ((["nothing"], "no run is called 'nothing'"), ([str(table)], "a cases.csv has no journal")):
        assert main(["merge", *names, "--results", str(results)]) == 2
        assert said in capsys.readouterr().err
    assert steps_path(results, PLAN[0]).name == f"{PLAN[0]}.csv.gz"
