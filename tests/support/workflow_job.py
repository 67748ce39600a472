"""Runs the job of .github/workflows/nightly.yml here: its shell steps as GitHub would, its actions by stand-ins.

Just as much of GitHub's expressions as the workflows use; what is not known here is an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
BASH = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]  # what `shell: bash` stands for
_TOKEN = re.compile(r"\s*(?:('[^']*')|(always|fromJSON)\(|([a-z][\w-]*(?:\.[\w-]+)+)|(==|!=|&&|\|\||[()]|true|false))")
_PYTHON = {"&&": " and ", "||": " or ", "true": "True", "false": "False"}

_PYTEST = """#!{python}
import json, os, pathlib, shutil, sys
given = sys.argv[1:]
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(["pytest", *given]) + "\\n")
if "--collect-only" in given:
    baseline = given[given.index("--mp-baseline") + 1] if "--mp-baseline" in given else ""
    if os.environ.get("BROKEN") or (baseline and pathlib.Path(baseline).name in os.environ["REFUSED"].split()):
        sys.exit("some lines\\nERROR: baseline is of another machine\\n")
elif os.environ["RUN"]:
    run = pathlib.Path(os.environ["RUN"])
    number = len(os.listdir("results/runs")) if os.path.isdir("results/runs") else 0
    shutil.copytree(run, pathlib.Path("results/runs", run.name + ("" if number == 0 else f"-{{number}}")))
    sys.exit(int(os.environ["EXIT"]))
"""
_MPSCALE = """#!{python}
import json, os, subprocess, sys
done = subprocess.run([sys.executable, "-m", "mpscale.cli", *sys.argv[1:]])
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(["mpscale", *sys.argv[1:], done.returncode]) + "\\n")
sys.exit(done.returncode)
"""


def load(name: str) -> dict[str, Any]:
    """A workflow by the name of its file."""
    return YAML(typ="safe").load(WORKFLOWS / name)


def evaluate(text: str, names: dict[str, Any]) -> Any:
    """The value of an expression. There is no arithmetic in them, as there is none on GitHub."""
    place, python = 0, ""
    while place < len(text.rstrip()):
        token = _TOKEN.match(text, place)
        assert token, f"GitHub has no such expression: {text!r} at {text[place:]!r}"
        string, function, name, operator = token.groups()
        if name:
            if not name.startswith("steps."):
                assert name in names, f"{text!r}: there is no {name}"
            python += repr(names.get(name, ""))
        else:
            python += string or (f"{function}(" if function else _PYTHON.get(operator, operator))
        place = token.end()
    return eval(python, {"always": lambda: True, "fromJSON": json.loads})


def filled(text: Any, names: dict[str, Any]) -> str:
    """``text`` with the values of its expressions in it."""

    def value(match: re.Match[str]) -> str:
        found = evaluate(match[1], names)
        return {True: "true", False: "false", None: ""}.get(found, str(found))

    return re.sub(r"\$\{\{(.*?)\}\}", value, str(text))


@dataclass
class Night:
    """What the world is like in which a job runs, and what came of it.

    Args:
        folder: empty; gets everything.
        kind: which of the two workflows.
        refresh: started by hand with refresh_baseline; otherwise on schedule.
        branch: that the workflow runs on.
        measured: folder of the run that measuring makes, None where it makes none.
        exit_status: of measuring.
        kept: runs in the newest artifact.
        reference: runs in results/reference/.
        artifacts: of GitHub's list; by default that artifact alone.
        refused: names of runs that pytest does not take as baseline.
        broken: pytest does not even collect.
        last: name of the step after which the job is left, None for its end.
    """

    folder: Path
    kind: str = "gpu"
    refresh: bool = False
    branch: str = "main"
    measured: Path | None = None
    exit_status: int = 0
    kept: tuple[Path, ...] = ()
    reference: tuple[Path, ...] = ()
    artifacts: list[dict[str, Any]] | None = None
    refused: tuple[str, ...] = ()
    broken: bool = False
    last: str | None = None
    log: str = field(default="", init=False)
    failed: list[str] = field(default_factory=list, init=False)
    uploads: dict[str, list[str]] = field(default_factory=dict, init=False)
    downloads: list[dict[str, Any]] = field(default_factory=list, init=False)
    requests: list[tuple[str, str | None]] = field(default_factory=list, init=False)

    @property
    def workspace(self) -> Path:
        """The checkout."""
        return self.folder / "workspace"

    @property
    def summary(self) -> str:
        """What the page of the workflow run shows."""
        return (self.folder / "summary.md").read_text(encoding="utf-8")

    @property
    def commands(self) -> list[list[Any]]:
        """Calls of pytest, and of mpscale with its exit code at the end, in order."""
        path = self.folder / "commands"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def measuring(self) -> list[str]:
        """The arguments with which pytest measured, each time if more than once."""
        (found,) = {tuple(c[1:]) for c in self.commands if c[0] == "pytest" and "--collect-only" not in c}
        return list(found)

    def run(self) -> Night:
        """Runs the job from its first step to its last."""
        self.prepare()
        called, caller = load("nightly.yml"), load(f"nightly-{self.kind}.yml")
        names = {
            "github.ref_name": self.branch,
            "github.token": "the-token",
            "github.event.repository.default_branch": "main",
            "runner.temp": str(self.folder / "temp"),
            "inputs.refresh_baseline": True if self.refresh else None,
        }
        given = {}
        for name, value in caller["jobs"]["nightly"]["with"].items():
            whole = re.fullmatch(r"\$\{\{(.*)\}\}", str(value))
            given[f"inputs.{name}"] = evaluate(whole[1], names) if whole else value
        names |= given
        job = called["jobs"]["run"]
        server = self._server()
        try:
            for step in job["steps"]:
                condition = evaluate(step["if"], names) if "if" in step else True
                if condition and (not self.failed or "always()" in step.get("if", "")):
                    self._step(step, {**job["env"], **step.get("env", {})}, names, server.server_port)
                if self.last is not None and step.get("name") == self.last:
                    break
        finally:
            server.shutdown()
            server.server_close()
        return self

    def prepare(self) -> None:
        """Makes the checkout and the machine."""
        (self.folder / "temp").mkdir()
        (self.folder / "summary.md").touch()
        programs = self.workspace / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt"):
            (self.workspace / name).touch()
        shutil.copy(ROOT / "Makefile", self.workspace)
        for run in self.reference:
            shutil.copytree(run, self.workspace / "results" / "reference" / run.name)
        for name in (".installed-test", ".installed-test-gpu"):
            (programs.parent / name).touch()  # so that make installs nothing
        texts = {"pytest": _PYTEST, "mpscale": _MPSCALE, "python": '#!/bin/sh\nexec {python} "$@"\n'}
        for name, text in texts.items():
            _program(programs / name, text.format(python=sys.executable))
        if self.kind == "gpu":
            _program(self.folder / "bin" / "nvidia-smi", "#!/bin/sh\necho 'Test GPU'\n")

    def _step(self, step: dict[str, Any], env: dict[str, Any], names: dict[str, Any], port: int) -> None:
        if "uses" in step:
            self._action(step["uses"], {name: filled(v, names) for name, v in step.get("with", {}).items()})
            return
        output = self.folder / "output"
        output.write_text("")
        more = {
            "GITHUB_API_URL": f"http://127.0.0.1:{port}",
            "GITHUB_SERVER_URL": "https://github.test",
            "GITHUB_REPOSITORY": "some/one",
            "GITHUB_RUN_ID": "77",
            "GITHUB_WORKFLOW": f"nightly-{self.kind}",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(self.folder / "summary.md"),
            "RUNNER_TEMP": str(self.folder / "temp"),
        }
        done = self.shell([*BASH, "-c", step["run"]], more | {n: filled(value, names) for n, value in env.items()})
        self.log += f"== {step['name']}: {done.returncode}\n{done.stdout}{done.stderr}"
        if done.returncode != 0:
            self.failed.append(step["name"])
        if "id" in step:
            for line in output.read_text().splitlines():
                name, _, value = line.partition("=")
                names[f"steps.{step['id']}.outputs.{name}"] = value

    def shell(self, command: list[str], more: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs a command in the checkout, with ``more`` in its environment."""
        # Nothing of the environment of these tests, in which a VENV or MAKEFLAGS would be heard.
        environ = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "LOG": str(self.folder / "commands"),
            "RUN": str(self.measured or ""),
            "EXIT": str(self.exit_status),
            "REFUSED": " ".join(self.refused),
            **({"BROKEN": "1"} if self.broken else {}),
            **more,
        }
        return subprocess.run(command, cwd=self.workspace, env=environ, capture_output=True, text=True, timeout=60)

    def _action(self, action: str, given: dict[str, str]) -> None:
        if action.startswith("actions/download-artifact@"):
            self.downloads.append(given)
            for run in self.kept:
                shutil.copytree(run, Path(given["path"], run.name))
        elif action.startswith("actions/upload-artifact@"):
            path = self.workspace / given["path"]
            files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
            if files:
                self.uploads[given["name"]] = files
        else:
            assert action.startswith(("actions/checkout@", "actions/setup-python@")), action

    def _server(self) -> HTTPServer:
        listed = self.artifacts
        if listed is None:
            listed = [artifact(11)] if self.kept else []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append((self.path, self.headers["Authorization"]))
                body = json.dumps({"total_count": len(listed), "artifacts": listed}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def artifact(run: int, **more: Any) -> dict[str, Any]:
    """An entry of GitHub's list of artifacts: of workflow run ``run``, and with ``more`` to it or its workflow run."""
    of_run = {"id": run, "repository_id": 5, "head_repository_id": 5, "head_branch": "main"}
    entry = {"name": "mpscale-baseline-gpu", "expired": False, "created_at": f"2026-01-{run:02}T00:00:00Z"}
    of_run |= {name: value for name, value in more.items() if name in of_run}
    return {**entry, **{name: value for name, value in more.items() if name in entry}, "workflow_run": of_run}


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
