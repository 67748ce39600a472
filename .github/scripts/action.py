"""The first steps of action.yml: `python3 action.py install`, then `measure` with the Python that this installed.

Inputs come from the environment that action.yml sets, so a step also runs by hand, with GITHUB_OUTPUT set to a file and
RUNNER_TEMP to a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def install() -> None:
    """Make an environment with the mpscale that this action belongs to, and with what the project requires."""
    folder = Path(os.environ["RUNNER_TEMP"], "mpscale-environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # The extra `gpu` has TensorFlow's CUDA libraries: gigabytes, so only if there is a driver.
    extras = "bench,gpu" if shutil.which("nvidia-smi") else "bench"
    source = Path(os.environ["GITHUB_ACTION_PATH"]).resolve()
    required = os.environ["REQUIREMENTS"]
    # The project's own versions, or else those that mpscale was tested with.
    versions = ["--requirement", required] if required else ["--constraint", source / "constraints.txt"]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"{source}[{extras}]", *versions]
    subprocess.run(pip, check=True)
    _append("GITHUB_PATH", folder / "bin")


def measure() -> None:
    """Run the suite, gated against the baseline if there is one of this machine."""
    from mpscale.analysis.gates import parse_gates
    from mpscale.config import load

    options = _options()
    named, gates = os.environ["BASELINE"], os.environ["FAIL_ON"]
    baseline = _chosen(Path(named), options) if named else None
    if baseline is not None:
        options.append(f"--mp-baseline={baseline}")
    judged = gates
    if gates and baseline is None and (named or not load(Path.cwd()).baseline):
        # Limits need none.
        try:
            judged = ",".join(str(gate) for gate in parse_gates([gates]) if not gate.needs_baseline)
            unjudged = ", ".join(str(gate) for gate in parse_gates([gates]) if gate.needs_baseline)
        except ValueError as error:
            sys.exit(f"::error title=mpscale::fail-on: {error}")
        if unjudged:
            _warn(f"no gate on a change was judged ({unjudged}): there is no baseline to compare with")
    if judged:
        options.append(f"--mp-fail-on={judged}")
    before = _runs()
    status = _mpscale([*options, "--junitxml=results/mpscale-junit.xml"]).returncode
    _append("GITHUB_OUTPUT", f"run={max(_runs() - before, default='')}")
    sys.exit(status)


def _options() -> list[str]:
    given = {name: os.environ[name.upper()] for name in ("preset", "workloads", "modes")}
    # The steps of action.yml look there, wherever the project has its results.
    fixed = "--mp-results=results"
    return [
        fixed,
        *(f"--mp-{name}={value}" for name, value in given.items() if value),
        *shlex.split(os.environ["ARGS"]),
    ]


def _chosen(baseline: Path, options: list[str]) -> Path | None:
    """Return the baseline, or the newest run in a folder of several, if mpscale accepts it here.

    It refuses runs of other machines, and GitHub's machines are of several kinds.
    """
    if not baseline.exists():
        sys.exit(f"::error title=mpscale::the baseline {baseline} does not exist in this checkout")
    inside = sorted((info.parent for info in baseline.rglob("run.json")), key=_age, reverse=True)
    # A folder is a run, or holds some; a file is the cases.csv of one.
    runs = inside if baseline.is_dir() else [baseline]
    for run in runs:
        done = _mpscale([*options, "--collect-only", "-q", f"--mp-baseline={run}"], quiet=True)
        if done.returncode == 0:
            return run
        why = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or [done.stdout]
        _warn(f"{run.name} is not the baseline here: {why[0]}")
    return None


def _age(run: Path) -> tuple[str, str]:
    """Sort key: names have the second in which a run started, and run.json has microseconds."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return run.name[:16], str(json.loads((run / "run.json").read_text(encoding="utf-8")).get("started"))
    return run.name[:16], ""


def _mpscale(arguments: list[str], quiet: bool = False) -> subprocess.CompletedProcess[str]:
    stdout, stderr = (subprocess.PIPE, subprocess.STDOUT) if quiet else (None, None)
    # Installed by the first step, which put its folder on PATH.
    return subprocess.run(["mpscale", "run", *arguments], stdout=stdout, stderr=stderr, text=True)


def _runs() -> set[Path]:
    return {info.parent for info in Path("results", "runs").glob("*/run.json")}


def _warn(text: str) -> None:
    print(f"::warning title=mpscale::{text.replace('%', '%25').replace(chr(13), '%0D').replace(chr(10), '%0A')}")


def _append(variable: str, line: object) -> None:
    with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    {"install": install, "measure": measure}[sys.argv[1]]()
