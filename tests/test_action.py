"""action.yml, with its scripts run as on GitHub, a stand-in for pip and `mpscale run`, and one for GitHub's API."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.runfolder import CPU, finished, record, write_run

from mpscale.analysis.compare import compare
from mpscale.analysis.gates import judge_gates, parse_gates
from mpscale.core.runs import read_run
from mpscale.report.comparison import of_a_run

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / ".github" / "scripts"
ACTION = YAML(typ="safe").load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = ACTION["runs"]["steps"]
MARKER = "<!-- mpscale: mpscale -->"
BOT = {"user": {"type": "Bot"}, "author_association": "NONE"}

_MPSCALE = """#!{python}
import json, os, pathlib, shutil, sys
given = sys.argv[1:]
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(given) + "\\n")
if "--collect-only" in given:
    if any(f"/{{name}}" in given[-1] for name in os.environ["REFUSED"].split()):
        sys.exit("some lines\\nERROR: baseline was made on\\nanother machine")
else:
    pathlib.Path("results/runs/20260101T000000Z-new/run.json").parent.mkdir(parents=True)
    pathlib.Path("results/runs/20260101T000000Z-new/run.json").touch()
    sys.exit(int(os.environ["EXIT"]))
"""


def test_expressions_use_only_what_exists_and_stay_out_of_scripts():
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"\binputs\.([\w-]+)", text)) == ACTION["inputs"].keys()
    assert set(re.findall(r"\bsteps\.([\w.]+)", text)) == {"measure.outputs.run", "measure.conclusion"}
    assert not [step["run"] for step in STEPS if "${{" in step.get("run", "")]
    for step in STEPS:
        if "run" in step:
            script = re.search(r"scripts/(\w+\.py)", step["run"])[1]
            # Each variable that the script reads is one of GitHub's or is set by a step.
            read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", (SCRIPTS / script).read_text(encoding="utf-8")))
            given = {name for each in STEPS if script in each.get("run", "") for name in each.get("env", {})}
            assert {name for name in read - given if not name.startswith(("GITHUB_", "RUNNER_", "MPSCALE_"))} == set()


class Job:
    """A checkout in which steps run."""

    def __init__(self, folder):
        self.folder, self.workspace = folder, folder / "workspace"
        self.workspace.mkdir()
        program = folder / "bin" / "mpscale"
        program.parent.mkdir()
        program.write_text(_MPSCALE.format(python=sys.executable))
        program.chmod(0o755)
        (folder / "event.json").write_text(json.dumps({"pull_request": {"number": 7}}))
        self.environ = {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "LOG": str(folder / "log"),
            "REFUSED": "",
            "EXIT": "0",
            "RUNNER_TEMP": str(folder),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            "GITHUB_EVENT_PATH": str(folder / "event.json"),
            "GITHUB_REPOSITORY": "some/one",
            "MPSCALE_PATIENCE": "0",
        }

    def run(self, step, *arguments, **environ):
        """Run a script with the defaults of the action's inputs, and return its exit code and output."""
        (found,) = (each for each in STEPS if each.get("name") == step)
        given = {name: self._default(value) for name, value in found.get("env", {}).items()}
        script = re.search(r"scripts/(\w+\.py)", found["run"])[1]
        return subprocess.run(
            [sys.executable, "-P", str(SCRIPTS / script), *map(str, arguments)],
            cwd=self.workspace,
            env={**self.environ, **given, **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @staticmethod
    def _default(expression):
        name = re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", expression)
        return "" if name is None else ACTION["inputs"][name[1]]["default"].replace("${{ github.token }}", "secret")

    def report(self, run, **environ):
        """Run the last step in this process, which has imported what is slow to import; return what it printed."""
        (found,) = (each for each in STEPS if each.get("name") == "Report")
        given = {name: self._default(value) for name, value in found["env"].items()}
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.syspath_prepend(SCRIPTS)
            for name, value in {**self.environ, **given, **environ}.items():
                patch.setenv(name, value)
            importlib.import_module("verdicts").main(str(run))
        return printed.getvalue()

    def measure(self, **environ):
        return self.run("Measure", "measure", **environ)

    @property
    def calls(self):
        """The arguments of each call of `mpscale run`."""
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_inputs_become_options(job):
    done = job.measure(
        WORKLOADS="mine:w,padded-gru", MODES="fp32,mixed-bf16", PRESET="small", ARGS="--mp-seeds 5 -k 'a b'", EXIT="1"
    )
    assert done.returncode == 1
    assert job.calls == [
        [
            "run", "--mp-results=results", "--mp-preset=small", "--mp-workloads=mine:w,padded-gru",
            "--mp-modes=fp32,mixed-bf16", "--mp-seeds", "5", "-k", "a b", "--junitxml=results/mpscale-junit.xml",
        ]
    ]  # fmt: skip
    assert (job.folder / "output").read_text() == "run=results/runs/20260101T000000Z-new\n"
    assert "::" not in done.stdout


@pytest.mark.parametrize(
    ("refused", "chosen"), [("", "20260103T000000Z-c"), ("20260103", "20260102T000000Z-b"), ("2026", None)]
)
def test_the_newest_run_that_mpscale_accepts_is_the_baseline(job, refused, chosen):
    for place in ("x/20260101T000000Z-a", "20260103T000000Z-c", "y/20260102T000000Z-b"):
        folder = job.workspace / "baselines" / place
        folder.mkdir(parents=True)
        (folder / "run.json").touch()
    names = [f"{name}" for name in ("20260103T000000Z-c", "20260102T000000Z-b", "20260101T000000Z-a")]
    gone = [name for name in names if refused and name.startswith(refused)]
    done = job.measure(BASELINE="baselines", FAIL_ON="step_time>5%,metric", REFUSED=" ".join(gone))
    assert done.returncode == 0, done.stderr
    measured = job.calls[-1]
    if chosen is None:
        assert not [option for option in measured if option.startswith(("--mp-baseline", "--mp-fail-on"))]
        said = "no gate on a change was judged (step_time>5%25, metric): there is no baseline"
        assert f"::warning title=mpscale::{said}" in done.stdout
    else:
        assert measured[-3].endswith(chosen)
        assert measured[-2] == "--mp-fail-on=step_time>5%,metric"
    assert done.stdout.count("is not the baseline here: ERROR: baseline was made on\n") == len(gone)


def test_limits_are_judged_without_a_baseline(job):
    done = job.measure(FAIL_ON="speedup[mixed-*]>=1.5,metric,accuracy>=95%")
    assert "--mp-fail-on=speedup[mixed-*]>=1.5,accuracy>=95%" in job.calls[-1]
    assert "(metric): there is no baseline" in done.stdout
    done = job.measure(FAIL_ON="speed>=1.5")
    assert (done.returncode, done.stderr.partition(" is not")[0]) == (1, "::error title=mpscale::fail-on: 'speed'")


def test_a_baseline_that_does_not_exist_fails_the_job(job):
    done = job.measure(BASELINE="nowhere")
    assert done.returncode == 1
    assert done.stderr == "::error title=mpscale::the baseline nowhere does not exist in this checkout\n"


def test_gates_go_with_the_baseline_of_pyproject(job):
    (job.workspace / "pyproject.toml").write_text('[tool.mpscale]\nbaseline = "results/reference/x"\n')
    assert job.measure(FAIL_ON="metric").returncode == 0
    assert "--mp-fail-on=metric" in job.calls[0]


def rows(time, metric, workload="toy", **more):
    return [
        record(
            mode, seed, 0, workload, step_time_ms_median=(time if mode != "fp32" else 2.0) + seed / 100,
            series_key=f"{workload}/x/{mode}/batch=1/method=6", metric_value=metric, metric_name="accuracy",
            metric_margin=0.01, metric_higher_is_better=True, has_metric=True, synthetic_inputs=False, **more,
        )
        for mode in ("fp32", "mixed-dynamic")
        for seed in range(5)
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run that is slower than its baseline, as pytest leaves it."""
    hostile = "a|b<!--@team"
    sides = []
    for name, time in (("20260101T000000Z-old", 1.0), ("20260102T000000Z-new", 1.5)):
        cases = [*rows(time, 0.9), *rows(1.0, 0.9, hostile)]
        path = write_run(tmp_path, finished(cases), name=name, environment={"device": CPU})
        sides.append(read_run(path))
    comparison = compare(*sides)
    findings = judge_gates(comparison, parse_gates(["step_time>5%,metric"]))
    (sides[1].path / "comparison.json").write_text(of_a_run([comparison], findings, None, True))
    (sides[1].path / "comparison.md").write_text("what the gates found\n")
    return sides[1].path


class GitHub(http.server.BaseHTTPRequestHandler):
    """Comments of one pull request."""

    def answer(self, method):
        server = self.server
        length = int(self.headers.get("Content-Length") or 0)
        content = json.loads(self.rfile.read(length)) if length else None
        server.asked.append((method, self.path, content))
        status = server.statuses.pop(0) if server.statuses else server.status
        if status != 200:
            return self.reply(status, {"message": "no"})
        assert self.headers["Authorization"] == "Bearer secret"
        if method == "GET":
            page = int(re.search(r"&page=(\d+)", self.path)[1])
            return self.reply(200, server.comments[100 * (page - 1) : 100 * page])
        return self.reply(200, {"html_url": "https://github.test/comment"})

    def reply(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def do_PATCH(self):
        self.answer("PATCH")

    def log_message(self, *_):
        pass


@pytest.fixture
def github(job):
    server = http.server.HTTPServer(("127.0.0.1", 0), GitHub)
    server.asked, server.statuses, server.status, server.comments = [], [], 200, []
    job.environ["GITHUB_API_URL"] = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_the_gates_found_is_said_in_all_places(job, github, run):
    done = job.run("Report", run)
    assert done.returncode == 0, done.stderr
    error, *_, notice, commented = done.stdout.splitlines()
    start = "::error title=mpscale step_time>5%25::fired: toy mixed-dynamic: +4"
    assert error.startswith(start)
    assert ", 95 %25 interval +" in error
    assert notice.startswith("::notice title=mpscale::gates against 20260101T000000Z-old: 1 fired, ")
    assert commented == "::notice title=mpscale::commented: https://github.test/comment"
    (_, _, listed), (method, path, posted) = github.asked
    assert (listed, method, path) == (None, "POST", "/repos/some/one/issues/7/comments")
    text = posted["body"]
    assert text.startswith(f"{MARKER}\n### ❌ mpscale: a gate fired\n")
    changed, within = (" ".join(part.split()) for part in text.split("**Is mixed precision worth it here?"))
    assert re.search(r"\| toy \| \S+ no difference shown \+0\.0% · ✅ trains as well \| ❌ slower \+4\d", changed)
    assert re.search(r"\| toy \| ✅ 1\.3\dx faster · ✅ accuracy [+-]\d\.\d\d pt, as good \|", within)
    assert "a\\|b&lt;!--@<!-- -->team" in text
    assert not re.search(r"@\w", text)
    summary = (job.folder / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith(text)
    assert "## Results" in summary and summary.endswith("what the gates found\n")


def test_the_comment_of_an_earlier_run_is_updated(job, github, run):
    others = [{"id": n, "body": "other", **BOT} for n in range(100)]
    stranger = {"id": 1, "body": f"{MARKER} mine", "user": {"type": "User"}, "author_association": "NONE"}
    github.comments = [*others, stranger, {"id": 5, "body": f"{MARKER}\nold", **BOT}]
    printed = job.report(run)
    assert [(method, path) for method, path, _ in github.asked] == [
        ("GET", "/repos/some/one/issues/7/comments?per_page=100&page=1"),
        ("GET", "/repos/some/one/issues/7/comments?per_page=100&page=2"),
        ("PATCH", "/repos/some/one/issues/comments/5"),
    ]
    assert printed.endswith("comment updated: https://github.test/comment\n")


@pytest.mark.parametrize(
    ("statuses", "status", "environ", "event", "calls", "said"),
    [
        ([502, 503], 200, {}, 7, 4, "commented: "),
        ([], 500, {}, 7, 4, "no comment: GitHub answered 500 Internal Server Error, 4 times"),
        (
            [200],
            403,
            {},
            7,
            2,
            "403 Forbidden. The token of this job may not write to the pull request: that of a fork",
        ),
        ([], 200, {"GITHUB_TOKEN": ""}, 7, 0, "no comment: the job has no token"),
        ([], 200, {}, None, 0, "no comment: this is not the job of a pull request"),
        ([], 200, {"GITHUB_API_URL": "http://127.0.0.1:9"}, 7, 0, "GitHub could not be reached"),
    ],
)
def test_what_prevents_a_comment_is_said_and_fails_nothing(
    job, github, run, statuses, status, environ, event, calls, said
):
    github.statuses, github.status = statuses, status
    (job.folder / "event.json").write_text(json.dumps({"pull_request": {"number": event}} if event else {}))
    assert said in job.report(run, **environ).splitlines()[-1]
    assert len(github.asked) == calls
    assert "a gate fired" in (job.folder / "summary.md").read_text(encoding="utf-8")


def test_a_job_that_made_no_run_says_so(job, github):
    job.report("")
    assert github.asked[-1][2]["body"].startswith(f"{MARKER}\n### ❌ mpscale made no run\n")


def test_a_run_without_a_baseline_is_reported_and_a_comment_is_not_forced(job, run):
    (run / "comparison.json").unlink()
    assert job.report(run, COMMENT="false") == ""
    assert "### ❔ mpscale: no gate was judged" in (job.folder / "summary.md").read_text(encoding="utf-8")


def test_the_comment_says_what_changed_in_a_model(run, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("GITHUB_RUN_ID", "")
    verdicts = importlib.import_module("verdicts")
    found = json.loads((run / "comparison.json").read_text())
    found["comparisons"][0]["rows"][0]["model_changes"] = [{"what": "layers Dense", "before": "", "after": "1"}]
    text = verdicts.body(read_run(run), found, "<!-- x -->")
    assert "- toy: the model changed: layers Dense none to 1\n" in text
    assert text.count("the model changed") == 2  # and in its row


def test_github_shows_ten_errors_so_the_last_counts_the_others(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    verdicts = importlib.import_module("verdicts")
    gate = {"gate": "missing", "row": ["toy", "fp32"], "outcome": "fired", "text": "gone", "baseline": "old"}
    found = {"note": None, "fails": True, "baseline": "old", "gates": [gate] * 12, "comparisons": []}
    lines = verdicts.annotations(found)
    assert lines[:9] == ["::error title=mpscale missing::fired: toy fp32: gone (baseline old)"] * 9
    assert lines[9:] == [
        "::error title=mpscale::and 3 more: see the job summary",
        "::notice title=mpscale::gates against old: 12 fired",
    ]
    note = verdicts.annotations({"note": "another\nmachine, 5 %", "fails": False, "gates": []})
    assert note == ["::warning title=mpscale::another%0Amachine, 5 %25"]
    assert verdicts.command("error", "a:b,c%", "x:y,z") == "::error title=a%3Ab%2Cc%25::x:y,z"


def test_the_workflow_in_the_guide_uses_inputs_that_exist():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.DOTALL)
    workflow = YAML(typ="safe").load(block)
    (job,) = workflow["jobs"].values()
    given = job["steps"][1]["with"]
    assert given.keys() <= ACTION["inputs"].keys()
    assert [str(gate) for gate in parse_gates([given["fail-on"]])] == given["fail-on"].split(",")
    assert workflow["permissions"]["pull-requests"] == "write"
