"""The nightly workflows, with steps run as on GitHub and a pytest that copies a run instead of measuring.

`make lint` checks the files against their schema.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.runfolder import CPU, GPU, finished, record, write_run
from support.small_suite import pytest_here

from mpscale import config as project_settings
from mpscale.analysis.gates import parse_gates, parse_share
from mpscale.core.device import NVIDIA, find_device
from mpscale.telemetry import host
from mpscale.telemetry.client import NoDriver
from mpscale.telemetry.host import environment

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github" / "scripts" / "nightly.py"
TEXT = (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
NIGHTLY = YAML(typ="safe").load(TEXT)
STEPS = NIGHTLY["jobs"]["run"]["steps"]
GATES = "step_time>5%,metric,missing"
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")

_PYTEST = """#!{python}
import json, os, pathlib, shutil, sys
given = sys.argv[1:]
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(given) + "\\n")
if "--collect-only" in given:
    baseline = given[given.index("--mp-baseline") + 1] if "--mp-baseline" in given else ""
    if baseline and pathlib.Path(baseline).name in os.environ["REFUSED"].split():
        sys.exit("some lines\\nERROR: baseline is of another machine\\n")
elif os.environ["MEASURED"]:
    run = pathlib.Path(os.environ["MEASURED"])
    number = len(os.listdir("results/runs")) if os.path.isdir("results/runs") else 0
    shutil.copytree(run, pathlib.Path("results/runs", run.name + ("" if number == 0 else f"-{{number}}")))
    sys.exit(int(os.environ["EXIT"]))
"""


def test_expressions_use_only_what_exists():
    used = set(re.findall(r"\b(?:inputs|steps)\.[\w.-]+", TEXT))
    outputs = {"kept": "run-id", "baseline": "run"}
    assert {step["id"] for step in STEPS if "id" in step} == outputs.keys()
    declared = {f"inputs.{name}" for name in NIGHTLY["on"]["workflow_call"]["inputs"]}
    assert used == declared | {f"steps.{step}.outputs.{name}" for step, name in outputs.items()}


def test_no_script_contains_an_expression():
    # GitHub expands expressions before the shell reads the script, and a branch may have any name.
    assert not [step["run"] for step in STEPS if "${{" in step.get("run", "")]


def test_whatever_fails_the_night_is_reported():
    after = STEPS[[step.get("name") for step in STEPS].index("Measure") + 1 :]
    refreshing = [step for step in after if step.get("if") == "inputs.refresh_baseline"]
    assert len(refreshing) == 2
    assert all(step["if"].startswith("always()") for step in after if step not in refreshing)


@pytest.mark.parametrize("name", ["nightly-cpu.yml", "nightly-gpu.yml"])
def test_the_nights_pass_the_declared_inputs_and_disturb_nobody(name, pytester):
    caller = YAML(typ="safe").load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    given, declared = caller["jobs"]["nightly"]["with"], NIGHTLY["on"]["workflow_call"]["inputs"]
    assert given.keys() == declared.keys()
    types = {"string": str, "number": int, "boolean": str}
    assert all(isinstance(value, types[declared[key]["type"]]) for key, value in given.items())
    assert given["refresh_baseline"] == "${{ inputs.refresh_baseline || false }}"  # A schedule has no inputs.
    assert given["job_minutes"] > given["bench_minutes"]
    assert caller["permissions"] == NIGHTLY["permissions"] == dict.fromkeys(("contents", "actions"), "read")
    assert caller["concurrency"]["cancel-in-progress"] is False
    assert given["kind"] in caller["concurrency"]["group"]
    assert int(caller["on"]["schedule"][0]["cron"].split()[0]) % 15
    assert [str(gate) for gate in parse_gates([given["gates"]])] == given["gates"].split(",")
    pytester.parseconfig(*shlex.split(given["options"]), "--mp-fail-on", given["gates"])


def series(mode, time, **more):
    return [record(mode, 0, r, step_time_ms_median=time + r / 100, series_key=f"toy/{mode}", **more) for r in range(3)]


@pytest.fixture
def runs(tmp_path):
    """Runs of tonight and of the past, on a GPU and on a CPU."""
    found = {}
    for kind, device in (("gpu", GPU), ("cpu", CPU)):
        for number, (name, time) in enumerate((("old", 2.0), ("new", 2.1)), 1):
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


class Job:
    """A checkout in which steps run."""

    def __init__(self, folder, measured):
        self.folder, self.workspace, self.summary_path = folder, folder / "workspace", folder / "summary.md"
        self.baselines = folder / "temp" / "mpscale-baseline"
        programs = self.workspace / ".venv" / "bin"
        programs.mkdir(parents=True)
        self.summary_path.touch()
        for name in ("pyproject.toml", "constraints.txt"):
            (self.workspace / name).touch()
        shutil.copy(ROOT / "Makefile", self.workspace)
        for name in (".installed-dev", ".installed-dev-gpu"):
            (programs.parent / name).touch()  # so that make installs nothing
        self.program(programs / "pytest", _PYTEST.format(python=sys.executable))
        self.program(programs / "mpscale", f'#!/bin/sh\nexec {sys.executable} -m mpscale.cli "$@"\n')
        # The environment of these tests stays out: make would obey a VENV or MAKEFLAGS.
        self.environ = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "LOG": str(folder / "log"),
            "MEASURED": str(measured or ""),
            "EXIT": "0",
            "REFUSED": "",
            "RUNNER_TEMP": str(folder / "temp"),
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(self.summary_path),
            "GITHUB_WORKFLOW": "nightly-gpu",
            "GITHUB_SERVER_URL": "https://github.test",
            "GITHUB_REPOSITORY": "some/one",
            "GITHUB_RUN_ID": "77",
            "KIND": "gpu",
            "OPTIONS": "--mp-preset small --mp-repeats 2",
            "GATES": GATES,
            "REFRESH": "false",
            "BASELINE_RUNS": "5",
            "BRANCH": "main",
            "DEFAULT_BRANCH": "main",
        }

    @staticmethod
    def program(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def shell(self, command, given="", **environ):
        environ = {**self.environ, **environ}
        return subprocess.run(
            command, cwd=self.workspace, env=environ, input=given, capture_output=True, text=True, timeout=60
        )

    def run(self, step, given="", **environ):
        """Run a step with the environment that nightly.yml gives it, and return its exit code, output and messages."""
        (found,) = [each for each in STEPS if each.get("run", "").rstrip().endswith(f"nightly.py {step}")]
        missing = found.get("env", {}).keys() - environ.keys() - {"GITHUB_TOKEN"}
        assert not missing
        allowed = {*NIGHTLY["jobs"]["run"]["env"], *found.get("env", {}), "EXIT", "REFUSED"}
        assert environ.keys() <= allowed
        return self.shell([sys.executable, str(SCRIPT), step], given, **environ)

    def output(self):
        """The last output of a step."""
        return (self.folder / "output").read_text().splitlines()[-1].partition("=")[2]

    @property
    def summary(self):
        return self.summary_path.read_text(encoding="utf-8")

    @property
    def pytests(self):
        """The arguments of each call of pytest."""
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]


@pytest.fixture
def job(tmp_path, runs):
    return Job(tmp_path / "job", runs["new", "gpu"])


@needs_make
def test_a_night_with_a_baseline_is_gated_reported_and_compared(job, runs, pytester):
    shutil.copytree(runs["old", "gpu"], job.baselines / runs["old", "gpu"].name)
    for step in ("check-branch", "install", "choose-baseline"):
        done = job.run(step)
        assert done.returncode == 0, done.stdout + done.stderr
    baseline = job.output()
    assert baseline == str(job.baselines / runs["old", "gpu"].name)
    for step, more in (("measure", {"BASELINE": baseline}), ("check-device", {}), ("report", {})):
        done = job.run(step, **more)
        assert done.returncode == 0, done.stdout + done.stderr
    assert job.run("compare", BASELINE=baseline).returncode == 0
    # Without quotes the shell would take ">" for a redirection and make a file with the name of the threshold.
    assert job.pytests[-1][-4:] == ["--mp-baseline", baseline, "--mp-fail-on", GATES]
    assert sorted(path.name for path in job.workspace.iterdir()) == [
        ".venv", "Makefile", "constraints.txt", "pyproject.toml", "results",
    ]  # fmt: skip
    for arguments in job.pytests:
        pytester.parseconfig(*arguments)
    for words in ("toy was run in fp32", "https://github.test/some/one/actions/runs/77#artifacts", "B against A"):
        assert words in job.summary


@needs_make
def test_a_failing_gate_fails_the_step_and_its_comparison_is_shown(job, runs):
    (runs["new", "gpu"] / "comparison.md").write_text("what the gates found\n")
    assert job.run("measure", BASELINE="old", EXIT="1").returncode != 0
    assert job.run("compare", BASELINE="old").returncode == 0
    assert job.summary == "what the gates found\n"


@needs_make
@pytest.mark.parametrize("there", [False, True])
def test_without_a_baseline_nothing_is_gated_and_the_summary_says_so(job, runs, there):
    old = runs["old", "gpu"]
    if there:
        shutil.copytree(old, job.baselines / old.name)
    assert job.run("choose-baseline", REFUSED=old.name).returncode == 0
    assert job.output() == ""
    assert "nothing is gated tonight" in job.summary
    assert "Actions, *nightly-gpu*, *Run workflow*" in job.summary
    assert (f"- `{old.name}: ERROR: baseline is of another machine" in job.summary) == there
    assert job.run("measure", BASELINE="").returncode == 0
    assert job.pytests[-1] == ["bench/", "--benchmark-only", "--mp-preset", "small", "--mp-repeats", "2"]


@needs_make
@pytest.mark.parametrize(("refused", "chosen"), [("c", "b"), ("c b", "a"), ("c b a", "z"), ("c b a z", "")])
def test_the_newest_accepted_run_is_the_baseline_and_artifacts_come_before_git(job, runs, refused, chosen):
    for path in (*(job.baselines / name for name in "abc"), job.workspace / "results" / "reference" / "z"):
        shutil.copytree(runs["old", "gpu"], path)
    assert job.run("choose-baseline", REFUSED=refused).returncode == 0
    assert Path(job.output()).name == chosen


@needs_make
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_a_gpu_night_that_lands_on_the_cpu_fails(tmp_path, runs, kind):
    job = Job(tmp_path / "job", runs["new", kind])
    assert job.run("measure", BASELINE="").returncode == 0
    done = job.run("check-device")
    assert done.returncode == (kind == "cpu")
    assert done.stderr == ("::error::A cpu was measured, Test CPU, not a gpu.\n" if kind == "cpu" else "")


def test_a_night_that_measured_nothing_fails_and_says_so(job):
    assert job.run("check-device").returncode == 1
    assert job.run("report").returncode == job.run("compare", BASELINE="old").returncode == 0
    assert job.summary.startswith("There is nothing to show: `mpscale: error: there is no run in results/runs")


@needs_make
def test_refreshing_adds_the_runs_to_the_earlier_baselines_and_gates_nothing(job, runs):
    old, new = runs["old", "gpu"].name, runs["new", "gpu"].name
    shutil.copytree(runs["old", "gpu"], job.baselines / old, ignore=shutil.ignore_patterns("steps"))
    assert job.run("measure", REFRESH="true", BASELINE=str(job.baselines / old)).returncode == 0
    assert not any("--mp-fail-on" in arguments for arguments in job.pytests)
    assert job.run("keep-baseline").returncode == 0
    kept = sorted(str(path.relative_to(job.baselines)) for path in job.baselines.rglob("*") if path.is_file())
    names = (old, new, *(f"{new}-{number}" for number in range(1, 5)))
    assert kept == sorted(f"{name}/{file}" for name in names for file in ("journal.jsonl", "run.json"))


@needs_make
def test_a_refresh_that_fails_stops_at_the_first_failure(job):
    assert job.run("measure", REFRESH="true", BASELINE="", EXIT="1").returncode != 0
    assert len(job.pytests) == 1


@pytest.mark.parametrize(
    ("branch", "refresh", "code"), [("main", "true", 0), ("topic", "false", 0), ("topic", "true", 1)]
)
def test_only_the_default_branch_refreshes_the_baseline(job, branch, refresh, code):
    assert job.run("check-branch", BRANCH=branch, REFRESH=refresh).returncode == code


def artifact(run, expired=False, **more):
    """An entry of GitHub's list."""
    of_run = {"id": run, "repository_id": 5, "head_repository_id": 5, "head_branch": "main", **more}
    return {"expired": expired, "created_at": f"2026-01-{run:02}T00:00:00Z", "workflow_run": of_run}


@pytest.mark.parametrize(
    ("listed", "run_id"),
    [
        ([], ""),
        ([artifact(11), artifact(13), artifact(12)], "13"),
        ([artifact(11), artifact(13, expired=True)], "11"),
        ([artifact(11), artifact(13, head_branch="topic")], "11"),
        # A branch of a fork may be called main as well.
        ([artifact(11), artifact(13, head_repository_id=6)], "11"),
    ],
)
def test_only_artifacts_of_this_repositorys_default_branch_are_taken(job, listed, run_id):
    assert job.run("find-baseline", json.dumps({"artifacts": listed})).returncode == 0
    assert job.output() == run_id


def test_pytest_accepts_or_refuses_a_baseline_without_measuring(runs, tmp_path, monkeypatch):
    """`choose-baseline` relies on this."""
    monkeypatch.chdir(ROOT)

    def collect(baseline):
        # importlib: tests/worker has a test_training.py too, which this process may have imported.
        options = (
            "bench/",
            "--benchmark-only",
            "--collect-only",
            "-q",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
        )
        return pytest_here(ROOT / "bench", *options, "--mp-preset=smoke", f"--mp-baseline={baseline}")

    code, said = collect(runs["old", "gpu"])
    assert code == pytest.ExitCode.USAGE_ERROR
    assert re.search(rf"^ERROR: .*{runs['old', 'gpu'].name} was made on Test GPU", said, re.M)
    no_driver = NoDriver(NVIDIA.no_library)
    device = find_device(no_driver.devices, {}, host.cpu())
    here = environment(device, no_driver, ROOT)
    code, said = collect(write_run(tmp_path, finished(series("fp32", 2.0)), device=device.to_json(), environment=here))
    assert code == pytest.ExitCode.OK, said


def guide(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_the_settings_in_the_guide_are_valid(tmp_path):
    (tmp_path / "pyproject.toml").write_text(guide("toml"))
    found = project_settings.load(tmp_path)
    assert len(parse_gates(found.fail_on)) == 4
    assert found.baseline
    assert parse_share(found.threshold) == 0.05


@needs_make
@pytest.mark.parametrize(("kind", "status", "code"), [("gpu", 0, 0), ("gpu", 1, 2), ("cpu", 0, 1)])
def test_the_script_for_other_ci_in_the_guide(tmp_path, runs, kind, status, code):
    job = Job(tmp_path / "job", runs["new", kind])
    job.program(tmp_path / "job" / "bin" / "nvidia-smi", "#!/bin/sh\necho 'Test GPU'\n")
    (tmp_path / "artifacts").mkdir()
    more = {"BASELINE": "some/folder", "ARTIFACTS": str(tmp_path / "artifacts"), "EXIT": str(status)}
    done = job.shell(["sh", "-c", guide("sh")], **more)
    assert done.returncode == code, done.stderr
    assert job.pytests[-1][-1] == "step_time>5%,gpu_memory>3%,metric,missing"
