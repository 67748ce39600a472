"""A run that was stopped anywhere goes on in its folder: nothing lost, nothing twice, nothing of another machine."""

import dataclasses
import json
import shutil

import pytest
from support.no_training import CASES, CPU, ENVIRONMENT, figures, go_on, new_run, options, replace_trainings

from mpscale.core.cause import Cause
from mpscale.core.record import Record
from mpscale.core.run_lock import NAME
from mpscale.core.runs import RunError, read_run
from mpscale.harness.resume import refuse_other_versions, with_allocator
from mpscale.report.findings import findings

IDS = [case.id for case in CASES]


@pytest.fixture
def trainings(monkeypatch):
    def replace(happen=lambda case: {}, **environment):
        replace_trainings(monkeypatch, happen, ENVIRONMENT | environment)

    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # no power fails here
    replace()
    return replace


@pytest.fixture
def whole(trainings, tmp_path):
    """A run that nobody stopped."""
    return new_run(tmp_path / "results")


def stopped(whole, folder, size=None):
    """Return a copy of a run as it is if it is killed once its journal has ``size`` bytes."""
    path = folder / "runs" / whole.name
    shutil.copytree(whole, path)
    if size is not None:
        journal = path / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:size])
    return path


def rows(path):
    """What must not depend on an interruption."""
    names = ("case_id", "status", *figures(CASES[0]))
    return [{name: one[name] for name in names} for one in read_run(path).records]


def events(path):
    return [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]


def ended(lines):
    """The ids of the cases with a result."""
    told = [json.loads(line) for line in lines]
    return [event["case_id"] for event in told if event["event"] == "case_finished"]


def place_of_result(whole, number):
    """Return how many bytes a journal has with so many results."""
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    return sum(map(len, lines[: 1 + 2 * number]))


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_killed_anywhere_and_resumed_it_is_the_run_that_nobody_stopped(whole, tmp_path):
    data = (whole / "journal.jsonl").read_bytes()
    ends = [place for place, byte in enumerate(data) if byte == ord("\n")]
    # Before, within and after the last byte of each line, and within the next one.
    sizes = [size for end in ends for size in (end - 1, end, end + 1, end + 9) if size <= len(data)]
    for size in sizes[1:]:
        path = stopped(whole, tmp_path / str(size), size)
        kept = data[: max(end + 1 for end in ends if end <= size)][:size]
        there = ended(kept.splitlines())
        assert go_on(path) == [case_id for case_id in IDS if case_id not in there]
        assert (path / "journal.jsonl").read_bytes().startswith(kept)
        assert rows(path) == rows(whole)
        assert sorted(ended((path / "journal.jsonl").read_bytes().splitlines())) == sorted(IDS)
        run = read_run(path)
        assert (run.finished, run.problems, run.not_started) == (True, [], [])
        assert not (path / NAME).exists()


@pytest.mark.parametrize(
    ("name", "odd"), [("time", "2026-01-01T00:00:00"), ("time", "0001-01-01T00:00:00+14:00"), ("step_s", [10**400])]
)
def test_odd_values_in_the_journal_of_a_stranger_break_nothing(whole, tmp_path, name, odd):
    path = stopped(whole, tmp_path, place_of_result(whole, 3))
    lines = [{**event, name: odd} if event["event"] == "case_finished" else event for event in events(path)]
    (path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # A line that cannot be read has lost its case, which runs again.
    assert go_on(path) == (IDS if name == "step_s" else IDS[3:])
    assert read_run(path).not_started == []


def test_the_torn_end_is_noted_and_attempts_count_on(whole, tmp_path):
    size = place_of_result(whole, 2)
    path = stopped(whole, tmp_path, size + len((whole / "journal.jsonl").read_bytes()[size:].splitlines()[0]) + 11)
    assert go_on(path) == IDS[2:]
    resumed = next(event for event in events(path) if event["event"] == "run_resumed")
    assert resumed["cut_bytes"] == 10
    assert [one["attempts"] for one in read_run(path).records] == [1, 1, 2, 1, 1, 1]
    assert [one["order"] for one in read_run(path).records] == [0, 1, 3, 4, 5, 6]
    assert read_run(path).info["resumed"] == [{name: value for name, value in resumed.items() if name != "event"}]


def test_resumed_twice_and_stopped_by_the_user(trainings, tmp_path):
    def stop_at(case_id):
        def happen(case):
            if case.id == case_id:
                raise KeyboardInterrupt

        return happen

    trainings(stop_at(IDS[1]))
    with pytest.raises(KeyboardInterrupt):
        new_run(tmp_path / "results")
    (path,) = (tmp_path / "results" / "runs").iterdir()
    trainings(stop_at(IDS[4]))
    with pytest.raises(KeyboardInterrupt):
        go_on(path)
    assert read_run(path).not_started == IDS[5:]
    trainings()
    assert go_on(path) == IDS[4:]
    assert {one["status"] for one in read_run(path).records} == {"ok"}
    assert [event["event"] for event in events(path)].count("run_resumed") == 2
    assert go_on(path) == []


@pytest.mark.parametrize("cause", Cause)
def test_what_failed_runs_again_if_that_may_pass(trainings, tmp_path, cause):
    trainings(lambda case: {"status": "crashed", "cause": cause.value} if case.id == IDS[3] else {})
    path = new_run(tmp_path / "results")
    trainings()
    # Once the GPU is lost, nothing more is started.
    failed = IDS[3:] if cause is Cause.GPU_LOST else [IDS[3]]
    assert go_on(path) == (failed if cause.transient else [])
    assert read_run(path).records[3]["status"] == ("ok" if cause.transient else "crashed")
    assert read_run(path).records[3]["attempts"] == (2 if cause.transient else 1)


def test_a_run_that_has_ended_is_left_as_it_is_if_nothing_is_missing(whole):
    before = content(whole)
    assert go_on(whole) == []
    assert content(whole) == before


def test_a_run_that_had_ended_has_not_ended_while_it_goes_on(whole):
    journal = whole / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    # Stopped by the user before its last two cases; then its next session is killed.
    journal.write_bytes(b"".join([*lines[:9], lines[-1]]))
    assert read_run(whole).finished
    assert go_on(whole) == IDS[4:]
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    assert not read_run(whole).finished


def test_a_run_that_was_killed_after_its_last_result_ends(whole, tmp_path):
    path = stopped(whole, tmp_path, place_of_result(whole, len(CASES)))
    assert not read_run(path).finished
    assert go_on(path) == []
    assert [event["event"] for event in events(path)][-2:] == ["run_resumed", "run_finished"]


@pytest.mark.parametrize(
    ("changed", "where", "said"),
    [
        ({"workload_digest": "sha256:other"}, IDS[2:], "not the workload that the run began with"),
        ({"optimizer_config": '{"learning_rate": 0.2}'}, [IDS[1]], "learning_rate 0.2, mixed-dynamic had 0.1"),
        ({"initial_weights_digest": "sha256:other"}, [IDS[1]], "other initial weights"),
        ({"data_order_digest": "sha256:other"}, [IDS[1]], "other order of the data"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_training_that_changed_in_between_is_invalid(whole, trainings, tmp_path, changed, where, said):
    """Within the seed that was interrupted by any digest, and in later ones by that of the workload."""
    path = stopped(whole, tmp_path, place_of_result(whole, 1))
    trainings(lambda case: changed)
    go_on(path)
    records = {one["case_id"]: one for one in read_run(path).records}
    assert records[IDS[0]]["status"] == "ok"
    assert all(records[case_id]["status"] == "invalid" for case_id in where)
    assert said in records[where[0]]["status_reason"]


PACKAGES = ENVIRONMENT["packages"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"packages": {**PACKAGES, "mpscale": "0.3.0"}}, "mpscale is 0.3.0, and was 0.2.0"),
        ({"packages": {**PACKAGES, "tensorflow": "2.22.0"}}, "tensorflow is 2.22.0, and was 2.21.0"),
        ({"packages": {**PACKAGES, "tensorflow-cpu": "2.21.0"}}, "tensorflow-cpu is 2.21.0, and was missing"),
        ({"packages": {**PACKAGES, "keras": None}}, "keras is missing, and was 3.15.1"),
        ({"cpu": {"model": "Test CPU", "logical_cores": 1}}, "Test CPU (cpu), 1 core, and was Test CPU (cpu), 2 cores"),
        ({"variables": {"XLA_FLAGS": "--x"}}, 'XLA_FLAGS is "--x", and was not set'),
        ({"variables": {"NVIDIA_TF32_OVERRIDE": "0"}}, "NVIDIA_TF32_OVERRIDE"),
    ],
)
def test_another_environment_is_refused_by_what_differs(whole, trainings, tmp_path, environment, said):
    path = stopped(whole, tmp_path, place_of_result(whole, 2))
    before = content(path)
    trainings(**environment)
    with pytest.raises(RunError, match="cannot go on here") as refused:
        go_on(path)
    assert said in str(refused.value)
    assert content(path) == before


@pytest.mark.parametrize(
    ("device", "asked", "said"),
    [
        (dataclasses.replace(CPU, name="Other CPU"), {}, "the machine is Other CPU (cpu), 2 cores, and was Test CPU"),
        (dataclasses.replace(CPU, kind="gpu", name="H100"), {}, "the machine is H100 (gpu), and was Test CPU (cpu)"),
        (CPU, {"jit": False}, "the setting jit is false, and was true"),
        (CPU, {"train_steps": 7}, "the setting train_steps is 7, and was not set"),
        (CPU, {"set_apart": {"toy": {"autotune": "shared"}}}, "what is set for toy alone is"),
    ],
)
def test_another_device_or_setting_is_refused_by_what_differs(whole, tmp_path, device, asked, said):
    path = stopped(whole, tmp_path, place_of_result(whole, 2))
    with pytest.raises(RunError) as refused:
        go_on(path, device=device, **asked)
    assert said in str(refused.value)


def test_what_may_differ_is_noted_and_told(whole, trainings, tmp_path):
    path = stopped(whole, tmp_path, place_of_result(whole, 3))
    there = {"commit": "b" * 40, "dirty": True}
    trainings(git=there, device={**CPU.to_json(), "uuid": "GPU-2"}, packages={**PACKAGES, "numpy": "2.5.0"})
    go_on(path)
    run = read_run(path)
    differs = run.info["resumed"][0]["differs"]
    assert differs["git commit"] == ["b" * 40, "a" * 40]
    assert differs["packages numpy"] == ["2.5.0", "2.4.6"]
    assert differs["device uuid"] == ["GPU-2", "None"]
    assert run.environment["git"] == ENVIRONMENT["git"]
    said = findings(run)
    assert "went on 1 time" in said
    assert "Not the same as before: git commit" in said or "git commit" in said


def test_modes_of_a_seed_with_an_interruption_between_them_are_told_with_its_length(whole, tmp_path):
    path = stopped(whole, tmp_path, place_of_result(whole, 3))
    journal = path / "journal.jsonl"
    told = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in told:
        event["time"] = event["time"].replace(event["time"][:4], "2020", 1)
    journal.write_text("".join(json.dumps(event) + "\n" for event in told))
    go_on(path)
    run = read_run(path)
    (apart,) = run.info["resumed"][0]["apart"]
    assert (apart["workload"], apart["seed"], apart["repeat"]) == ("toy", 1, 0)
    assert apart["seconds"] > 86400
    assert "days fell between the modes of toy, seed 1." in findings(run)


def test_a_selection_leaves_the_rest_missing(whole, tmp_path):
    path = stopped(whole, tmp_path, place_of_result(whole, 2))
    assert go_on(path, CASES[4:]) == IDS[4:]
    assert read_run(path).not_started == IDS[2:4]
    assert go_on(path) == IDS[2:4]
    assert rows(path) == rows(whole)


def test_a_run_that_is_going_on_is_refused(trainings, tmp_path):
    """Here both are one process, which holds the lock all the same."""
    refusals = []

    def happen(case):
        if case.id == IDS[2]:
            (path,) = (tmp_path / "results" / "runs").iterdir()
            with pytest.raises(RunError) as refused:
                go_on(path)
            refusals.append(str(refused.value))

    trainings(happen)
    path = new_run(tmp_path / "results")
    assert len(refusals) == 1
    assert "is still going on: process" in refusals[0]
    assert len(ended((path / "journal.jsonl").read_text().splitlines())) == len(IDS)


def without(*names):
    def change(info):
        for name in names[:-1]:
            info = info[name]
        del info[names[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("invocation"), "has no invocation, which a run needs to go on"),
        (without("planned"), "has no planned"),
        (without("settings"), "has no settings"),
        (without("environment", "packages"), "has no environment.packages"),
        (without("environment", "device"), "has no environment.device"),
        (without("environment"), "has no environment.packages, environment.device"),
        (lambda info: info.update(invocation={"program": 1}), "has no invocation"),
        (lambda info: info.update(method_version=1), "method version 1, and this mpscale has"),
        (lambda info: info.update(interleaved={"run": "other"}), "mpscale ab"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_with_what_is_missing(whole, change, said):
    info = json.loads((whole / "run.json").read_text())
    change(info)
    (whole / "run.json").write_text(json.dumps(info))
    with pytest.raises(RunError) as refused:
        refuse_other_versions(read_run(whole))
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["journal.jsonl", "run.json", "steps"])
def test_links_out_of_the_folder_are_refused(whole, tmp_path, name):
    path = stopped(whole, tmp_path, place_of_result(whole, 2))
    (tmp_path / "outside").mkdir()
    if (path / name).exists():
        shutil.move(path / name, tmp_path / "outside" / name)
    (path / name).symlink_to(tmp_path / "outside" / name)
    outside = content(tmp_path / "outside")
    with pytest.raises(RunError, match=f"{name} is a link"):
        go_on(path)
    assert content(tmp_path / "outside") == outside


def test_a_run_json_with_odd_facts_breaks_nothing(whole, tmp_path):
    path = stopped(whole, tmp_path, place_of_result(whole, 2))
    info = json.loads((path / "run.json").read_text())
    info |= {"resumed": 5}
    info["settings"] |= {"workloads": 7, "set_apart": [1]}
    info["environment"] |= {"variables": [], "git": [{}], "kernel": {"a": [1]}}
    (path / "run.json").write_text(json.dumps(info))
    assert go_on(path) == IDS[2:]
    assert len(read_run(path).info["resumed"]) == 1


def test_a_folder_that_cannot_be_written_is_refused(whole, tmp_path):
    path = stopped(whole, tmp_path, place_of_result(whole, 2))
    (path / NAME).mkdir()
    before = content(path)
    with pytest.raises(OSError, match="directory"):
        go_on(path)
    assert content(path) == before


@pytest.mark.parametrize(
    ("seen", "asked", "variable", "taken"),
    [
        (["bfc", "bfc"], "auto", None, "bfc"),
        (["cuda_malloc_async", None], "auto", None, "cuda_malloc_async"),
        ([None], "auto", None, "auto"),
        (["bfc", "cuda_malloc_async"], "auto", None, "auto"),
        (["bfc"], "cuda_malloc_async", None, "cuda_malloc_async"),
        (["bfc"], "auto", "bfc", "auto"),
    ],
)
def test_no_run_mixes_allocators(tmp_path, monkeypatch, seen, asked, variable, taken):
    """A run that had to take the second allocator does not begin with the first one again."""
    monkeypatch.delenv("TF_GPU_ALLOCATOR", raising=False)
    if variable:
        monkeypatch.setenv("TF_GPU_ALLOCATOR", variable)
    how = dataclasses.replace(options(tmp_path), gpu_allocator=asked)
    assert with_allocator(how, [Record({"gpu_allocator": one}) for one in seen]).gpu_allocator == taken


def test_a_run_in_reference_is_kept_as_it_is(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "reference" / whole.name)
    with pytest.raises(RunError, match="is not in a folder runs/"):
        refuse_other_versions(read_run(tmp_path / "reference" / whole.name))
