"""The nightly workflows: files that GitHub takes, and nights that end as they should."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.runfolder import CPU, GPU, finished, record, write_run
from support.workflow_job import BASH, ROOT, WORKFLOWS, Night, artifact, evaluate, filled, load

from mpscale import config as project_settings
from mpscale.analysis.gates import parse_gates, parse_share
from mpscale.cli import _parser
from mpscale.core.device import find_device
from mpscale.telemetry import host
from mpscale.telemetry.client import NoDriver
from mpscale.telemetry.fingerprint import environment

FILES = sorted(WORKFLOWS.glob("*.yml"))
STEPS = load("nightly.yml")["jobs"]["run"]["steps"]
SHELL_STEPS = [step for step in STEPS if "run" in step]
CALLERS = ("nightly-cpu.yml", "nightly-gpu.yml")
needs_tools = pytest.mark.skipif(not (shutil.which("make") and shutil.which("curl")), reason="needs make and curl")


def check_schema(*paths):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *paths]
    # The schema is one of the package's own files: nothing is fetched, and this proxy would fetch nothing.
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, timeout=60)


def check_bash(script):
    return subprocess.run([*BASH, "-n"], input=script, capture_output=True, text=True, timeout=60)


def test_workflows_fit_githubs_schema():
    done = check_schema(*FILES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("nightly.yml", "    runs-on:", "    run-on:"),
        ("nightly.yml", "        type: number", "        type: minutes"),
        ("nightly-gpu.yml", "    - cron:", "    - crom:"),
        ("nightly-gpu.yml", "contents: read", "contents: some"),
        ("nightly-cpu.yml", "    uses: ./.github", "    run: ./.github"),
    ],
)
def test_a_broken_workflow_is_refused(tmp_path, name, right, wrong):
    text = (WORKFLOWS / name).read_text()
    assert right in text
    (tmp_path / name).write_text(text.replace(right, wrong, 1))
    assert check_schema(tmp_path / name).returncode == 1


@pytest.mark.parametrize("step", SHELL_STEPS, ids=lambda step: step["name"])
def test_every_step_is_bash(step):
    assert check_bash(step["run"]).stderr == ""


def test_a_step_that_is_no_bash_is_refused():
    assert check_bash("if true; then echo\n").returncode != 0


@pytest.mark.parametrize("step", SHELL_STEPS, ids=lambda step: step["name"])
def test_steps_run_by_hand_as_well(step):
    # An expression in a script is filled in by GitHub alone; and who names a branch could write shell with it.
    assert "${{" not in step["run"]


def test_expressions_name_only_what_there_is():
    called = load("nightly.yml")
    ids = {f"steps.{step['id']}" for step in STEPS if "id" in step}
    names = {f"inputs.{name}": "1" for name in called["on"]["workflow_call"]["inputs"]}
    names |= dict.fromkeys(("github.ref_name", "github.token", "github.event.repository.default_branch"), "x")
    names["runner.temp"] = "x"
    text = (WORKFLOWS / "nightly.yml").read_text()
    assert {name.rsplit(".", 2)[0] for name in re.findall(r"steps\.[\w-]+\.outputs\.[\w-]+", text)} <= ids
    assert filled(text, names).count("${{") == 0
    for step in STEPS:
        evaluate(step.get("if", "always()"), names)


@pytest.mark.parametrize("text", ["inputs.minutes + 15", "inputs.minuets"])
def test_an_expression_that_github_does_not_have_is_refused(text):
    with pytest.raises(AssertionError):
        evaluate(text, {"inputs.minutes": 1})


@pytest.mark.parametrize("name", CALLERS)
def test_the_called_workflow_is_given_what_it_declares(name):
    given = load(name)["jobs"]["nightly"]["with"]
    declared = load("nightly.yml")["on"]["workflow_call"]["inputs"]
    types = {"string": str, "number": int}
    assert given.keys() == declared.keys()
    for key, value in given.items():
        if declared[key]["type"] == "boolean":
            by_hand = load(name)["on"]["workflow_dispatch"]["inputs"][key]
            assert by_hand["type"] == "boolean"
            assert by_hand["default"] is False
            assert [evaluate(value[3:-2], {f"inputs.{key}": v}) for v in (None, False, True)] == [False, False, True]
        else:
            assert isinstance(value, types[declared[key]["type"]])
    assert given["job_minutes"] > given["bench_minutes"]


@pytest.mark.parametrize("name", CALLERS)
def test_nights_begin_off_the_hour_with_no_rights_to_write_and_one_at_a_time(name):
    workflow = load(name)
    minute, hour, *rest = workflow["on"]["schedule"][0]["cron"].split()
    assert int(minute) % 2 == 1
    assert int(minute) not in (15, 45)
    assert hour.isdigit()
    assert rest == ["*", "*", "*"]
    assert set(workflow["permissions"].values()) == set(load("nightly.yml")["permissions"].values()) == {"read"}
    assert workflow["permissions"].keys() == load("nightly.yml")["permissions"].keys()
    assert workflow["concurrency"]["cancel-in-progress"] is False
    groups = {load(each)["concurrency"]["group"] for each in CALLERS}
    assert len(groups) == len(CALLERS)


def test_what_is_reported_is_reported_after_a_failure_too():
    after = [step for step in STEPS if "always()" in step.get("if", "")]
    shown = [step.get("name", step.get("uses")) for step in after]
    assert shown == [
        "See that it was this kind of device",
        "Summary",
        "Comparison with the baseline",
        "actions/upload-artifact@v4",
    ]


@pytest.mark.parametrize("name", CALLERS)
def test_options_and_gates_exist(name, pytester):
    given = load(name)["jobs"]["nightly"]["with"]
    gates = given["gates"]
    assert [str(gate) for gate in parse_gates([gates])] == gates.split(",")
    pytester.parseconfig(*shlex.split(given["options"]), "--mp-fail-on", gates)


def series(mode, time, **more):
    return [record(mode, 0, r, step_time_ms_median=time + r / 100, series_key=f"toy/{mode}", **more) for r in range(3)]


@pytest.fixture
def runs(tmp_path):
    """Runs by name, of a night and of the past, each of a GPU and of a CPU."""
    found = {}
    for kind, device in (("gpu", GPU), ("cpu", CPU)):
        for name, time in (("old", 2.0), ("new", 2.1)):
            number = {"old": 1, "new": 2}[name]
            path = write_run(
                tmp_path / "made",
                finished(series("fp32", time, device=kind)),
                name=f"2026010{number}T000000Z-test-{kind}-abcd",
                device=device,
                environment={"device": device, "nvml": "works"},
            )
            (path / "steps").mkdir()
            (path / "steps" / "case.csv.gz").write_bytes(b"1")
            found[name, kind] = path
    return found


@pytest.fixture
def night(tmp_path, runs):
    """Runs a night; by default one in which a GPU was measured and all went well."""

    def run(**how):
        kind = how.setdefault("kind", "gpu")
        how.setdefault("measured", runs["new", kind])
        (tmp_path / "night").mkdir()
        return Night(tmp_path / "night", **how).run()

    return run


@needs_tools
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_a_night_with_a_baseline_is_gated_and_compared(night, runs, kind):
    done = night(kind=kind, kept=(runs["old", kind],))
    assert done.failed == [], done.log
    given = done.measuring
    assert Path(given[given.index("--mp-baseline") + 1]).name == runs["old", kind].name
    # A ">" that no quotes hold would be lost, and a file with the name of the threshold be there.
    gates = load(f"nightly-{kind}.yml")["jobs"]["nightly"]["with"]["gates"]
    assert given[given.index("--mp-fail-on") + 1] == gates
    assert sorted(path.name for path in done.workspace.iterdir()) == [
        ".venv", "Makefile", "constraints.txt", "pyproject.toml", "results",
    ]  # fmt: skip
    assert "toy was run in fp32" in done.summary
    assert "https://github.test/some/one/actions/runs/77#artifacts" in done.summary
    assert "## B against A: step time" in done.summary
    assert done.uploads.keys() == {f"mpscale-run-{kind}"}
    assert done.downloads[0]["run-id"] == "11"
    assert done.requests == [
        (f"/repos/some/one/actions/artifacts?name=mpscale-baseline-{kind}&per_page=100", "Bearer the-token")
    ]


@needs_tools
def test_the_runs_own_comparison_is_shown_where_there_is_one(night, runs):
    (runs["new", "gpu"] / "comparison.md").write_text("what the gates found\n")
    done = night(kept=(runs["old", "gpu"],))
    assert done.summary.endswith("what the gates found\n")


@needs_tools
def test_a_gate_that_fires_fails_the_night_which_is_reported_all_the_same(night, runs):
    done = night(kept=(runs["old", "gpu"],), exit_status=1)
    assert done.failed == ["Measure"]
    assert "toy was run in fp32" in done.summary
    assert "## B against A: step time" in done.summary
    assert done.uploads.keys() == {"mpscale-run-gpu"}


@needs_tools
@pytest.mark.parametrize("kept", [False, True])
def test_without_a_baseline_that_serves_nothing_is_gated_and_the_summary_says_so(night, runs, kept):
    old = runs["old", "gpu"]
    done = night(kept=(old,) if kept else (), refused=(old.name,))
    assert done.failed == [], done.log
    assert not any(option in done.measuring for option in ("--mp-baseline", "--mp-fail-on"))
    assert "nothing is gated tonight" in done.summary
    assert "Actions, *nightly-gpu*, *Run workflow*" in done.summary
    assert (f"- {old.name}: ERROR: baseline is of another machine" in done.summary) == kept
    assert "against" not in done.summary


@needs_tools
@pytest.mark.parametrize(
    ("more", "chosen"),
    [
        ((), "abcd"),
        (("20260101T000000Z-test-gpu-abcd",), "aaaa"),
        (("20260101T000000Z-test-gpu-abcd", "20260101T000000Z-test-gpu-aaaa"), "zzzz"),
    ],
)
def test_the_newest_run_that_serves_is_the_baseline_and_one_that_was_kept_before_one_in_git(
    night, runs, tmp_path, more, chosen
):
    oldest, reference = tmp_path / "20260101T000000Z-test-gpu-aaaa", tmp_path / "20260109T000000Z-test-gpu-zzzz"
    shutil.copytree(runs["old", "gpu"], oldest)
    shutil.copytree(runs["old", "gpu"], reference)
    other, old = runs["old", "cpu"], runs["old", "gpu"]
    done = night(kept=(oldest, old, other), reference=(reference,), refused=(other.name, *more), last="Measure")
    assert Path(done.measuring[done.measuring.index("--mp-baseline") + 1]).name[-4:] == chosen


@needs_tools
def test_a_run_in_git_is_the_baseline_where_none_was_ever_kept(night, runs):
    done = night(reference=(runs["old", "gpu"],), last="Measure")
    assert Path(done.measuring[done.measuring.index("--mp-baseline") + 1]).name == runs["old", "gpu"].name


@needs_tools
def test_a_gpu_night_that_lands_on_the_cpu_fails(night, runs):
    done = night(measured=runs["new", "cpu"])
    assert done.failed == ["See that it was this kind of device"]
    assert "::error::Measured was a cpu, Test CPU, and not a gpu." in done.log
    assert "# mpscale: Test CPU (CPU)" in done.summary


@needs_tools
@pytest.mark.parametrize("how", [{"measured": None}, {"broken": True}])
def test_a_night_that_measures_nothing_fails_and_says_so(night, how):
    done = night(**how)
    assert "See that it was this kind of device" in done.failed
    assert "There is nothing to show: mpscale: error: there is no run in results/runs" in done.summary
    assert done.uploads == {}


@needs_tools
def test_refreshing_keeps_the_runs_beside_those_of_before_and_gates_nothing(night, runs):
    old, new = runs["old", "gpu"].name, runs["new", "gpu"].name
    done = night(kept=(runs["old", "gpu"],), refresh=True)
    assert done.failed == [], done.log
    assert "--mp-fail-on" not in done.measuring
    assert sorted(done.uploads["mpscale-baseline-gpu"]) == sorted(
        f"{name}/{file}"
        for name in (old, new, *(f"{new}-{number}" for number in range(1, 5)))
        for file in ("journal.jsonl", "run.json")
    )
    assert "## B against A: step time" in done.summary
    assert done.summary.endswith("how much runs of its code differ is known from 5.\n")


@needs_tools
@pytest.mark.parametrize("how", [{"exit_status": 1}, {"branch": "topic"}])
def test_only_a_run_of_the_main_branch_that_went_well_becomes_the_baseline(night, how):
    done = night(refresh=True, **how)
    assert done.failed
    assert "mpscale-baseline-gpu" not in done.uploads


@needs_tools
@pytest.mark.parametrize(
    ("listed", "run_id"),
    [
        ([], None),
        ([artifact(11), artifact(13), artifact(12)], "13"),
        ([artifact(11), artifact(13, expired=True)], "11"),
        ([artifact(11), artifact(13, head_branch="topic")], "11"),
        # A branch of a fork may be called main as well.
        ([artifact(11), artifact(13, head_repository_id=6)], "11"),
    ],
)
def test_only_artifacts_of_this_repositorys_main_branch_are_taken(night, listed, run_id):
    done = night(artifacts=listed, last="Choose the baseline")
    assert [given["run-id"] for given in done.downloads] == ([] if run_id is None else [run_id])


@needs_tools
@pytest.mark.parametrize("how", [{}, {"refresh": True}])
def test_every_command_is_understood(night, runs, pytester, how):
    done = night(kept=(runs["old", "gpu"],), **how)
    for program, *given in done.commands:
        if program == "pytest":
            pytester.parseconfig(*given)
        else:
            *arguments, status = given
            assert _parser().parse_args(arguments)
            assert status == 0
    assert {command[0] for command in done.commands} == {"pytest", "mpscale"}


def guide(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_the_guides_settings_are_taken(tmp_path):
    (tmp_path / "pyproject.toml").write_text(guide("toml"))
    found = project_settings.load(tmp_path)
    assert len(parse_gates(found.fail_on)) == 4
    assert found.baseline
    assert parse_share(found.threshold) == 0.05


@needs_tools
@pytest.mark.parametrize(("kind", "status", "code"), [("gpu", 0, 0), ("gpu", 1, 2), ("cpu", 0, 1)])
def test_the_guides_script_for_any_other_ci(tmp_path, runs, pytester, kind, status, code):
    world = Night(tmp_path / "night", measured=runs["new", kind], exit_status=status)
    world.folder.mkdir()
    world.prepare()
    (world.folder / "artifacts").mkdir()
    more = {"BASELINE": "some/folder", "ARTIFACTS": str(world.folder / "artifacts")}
    done = world.shell(["sh", "-c", guide("sh")], more)
    assert done.returncode == code, done.stderr
    pytester.parseconfig(*world.measuring)
    assert world.measuring[-1] == "step_time>5%,gpu_memory>3%,metric,missing"


def test_pytest_says_which_run_serves_as_baseline_without_measuring(runs, tmp_path):
    """What the step that chooses the baseline relies on."""

    def collect(baseline):
        command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "--collect-only", "-q"]
        command += ["-p", "no:cacheprovider", "--mp-preset", "smoke", "--mp-baseline", str(baseline)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    refused = collect(runs["old", "gpu"])
    assert refused.returncode != 0
    assert re.search(rf"^ERROR: .*{runs['old', 'gpu'].name} is of Test GPU", refused.stdout + refused.stderr, re.M)
    no_driver = NoDriver("not looked for")
    device = find_device(no_driver.devices, {}, host.cpu())
    here = environment(device, no_driver, ROOT)
    served = collect(write_run(tmp_path, finished(series("fp32", 2.0)), device=device.to_json(), environment=here))
    assert served.returncode == 0, served.stdout + served.stderr
