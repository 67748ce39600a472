"""The steps of nightly.yml: `python3 .github/scripts/nightly.py STEP`.

Standard library only, since the first steps run before anything is installed. Inputs come from the environment that
nightly.yml sets, so a step also runs by hand, with GITHUB_OUTPUT and GITHUB_STEP_SUMMARY set to files and RUNNER_TEMP
to a folder.
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

RUNS, REFERENCE = Path("results/runs"), Path("results/reference")
MPSCALE = ".venv/bin/mpscale"


def bench(*arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Install what is needed, and run pytest on the benchmarks. Your own project calls pytest in its own way."""
    command = ["make", "--silent", "bench", f"ARGS={os.environ['OPTIONS']} {shlex.join(arguments)}"]
    stdout, stderr = (subprocess.PIPE, subprocess.STDOUT) if quiet else (None, None)
    return subprocess.run(command, stdout=stdout, stderr=stderr, text=True)


def check_branch() -> None:
    """Refuse to refresh the baseline from a side branch."""
    branch, default = os.environ["BRANCH"], os.environ["DEFAULT_BRANCH"]
    if os.environ["REFRESH"] == "true" and branch != default:
        sys.exit(f"::error::A baseline must come from {default}. Run this workflow on that branch, not on {branch}.")


def install() -> None:
    """Install, and list what will run."""
    sys.exit(bench("--collect-only", "-q").returncode)


def find_baseline() -> None:
    """Find the newest artifact with a baseline in GitHub's list, which is on standard input.

    The list includes artifacts of pull requests, and those of forks may contain anything.
    """
    runs = [
        (artifact["created_at"], run["id"])
        for artifact in json.load(sys.stdin)["artifacts"]
        if not artifact["expired"]
        and (run := artifact["workflow_run"])["head_repository_id"] == run["repository_id"]
        and run["head_branch"] == os.environ["DEFAULT_BRANCH"]
    ]
    _output("run-id", str(max(runs)[1]) if runs else "")


def _age(info: Path) -> tuple[str, str]:
    """Sort key: names have the second in which a run started, and run.json has microseconds."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return info.parent.name[:16], str(json.loads(info.read_text(encoding="utf-8")).get("started"))
    return info.parent.name[:16], ""


def choose_baseline() -> None:
    """Choose the newest run that pytest accepts: one of this device, measured with this method."""
    refused = []
    for folder in (_baselines(), REFERENCE):
        for info in sorted(folder.rglob("run.json"), key=_age, reverse=True):
            done = bench("--collect-only", "-q", "--mp-baseline", str(info.parent), quiet=True)
            if done.returncode == 0:
                print(f"baseline: {info.parent}")
                return _output("run", str(info.parent))
            print(done.stdout)
            error = next((line for line in done.stdout.splitlines() if line.startswith("ERROR")), "see the log")
            refused.append(f"- {_code(f'{info.parent.name}: {error}')}")
    _output("run", "")
    if os.environ["REFRESH"] == "true":
        return _summary("There was no baseline yet. If all goes well, this run is the first.")
    print("::warning::There is no baseline for this machine: nothing is gated tonight")
    _summary(
        "**There is no baseline for this machine, so nothing is gated tonight:** the run fails only if a case does.",
        f"To make one, run this workflow by hand (Actions, *{os.environ['GITHUB_WORKFLOW']}*, *Run workflow*) with "
        "*refresh_baseline*.",
        *(["", "These runs cannot serve:", "", *refused] if refused else []),
    )


def measure() -> None:
    """Run the benchmarks: gated against the baseline, or several times to make a new one."""
    runs = 1
    arguments: list[str] = []
    if os.environ["REFRESH"] == "true":
        # A baseline is refreshed because the old one no longer applies, so nothing is gated.
        runs = int(os.environ["BASELINE_RUNS"])
    elif os.environ["BASELINE"]:
        arguments = ["--mp-baseline", os.environ["BASELINE"], "--mp-fail-on", os.environ["GATES"]]
    for _ in range(runs):
        status = bench(*arguments).returncode
        if status:
            sys.exit(status)


def check_device() -> None:
    """Fail if another kind of device was measured: nvidia-smi may show a GPU that is hidden from the run."""
    run, kind = _latest(), os.environ["KIND"]
    if run is None:
        sys.exit("::error::No run was made.")
    environment = json.loads((run / "run.json").read_text(encoding="utf-8"))["environment"]
    device = environment["device"]
    print(f"{run.name}: {device['name']} ({device['kind']}), GPU driver: {environment['nvml']}")
    if device["kind"] != kind:
        sys.exit(f"::error::A {device['kind']} was measured, {device['name']}, not a {kind}.")


def report() -> None:
    """Put the report of the run into the summary."""
    done = _mpscale("report", "latest", "--format", "github-summary")
    why = done.stderr.strip().rpartition("\n")[2]
    _summary(done.stdout if done.returncode == 0 else f"There is nothing to show: {_code(why)}")


def compare() -> None:
    """Put the comparison with the baseline into the summary: the run's own, which shows the gates, or a new one."""
    run = _latest()
    if run is None:
        return
    if (run / "comparison.md").is_file():
        text = (run / "comparison.md").read_text(encoding="utf-8")
    else:
        done = _mpscale("compare", os.environ["BASELINE"], "latest", "--format", "markdown")
        text = "\n\n".join([done.stdout, *map(_code, done.stderr.splitlines())])
    # GitHub shows at most 1 MiB of summary a step.
    _summary(text.encode()[:1_000_000].decode(errors="ignore"))


def keep_baseline() -> None:
    """Add the runs to the earlier baselines: hosted machines differ, and the newest run of each device counts."""
    # The steps are most of a run's size, and no comparison reads them.
    shutil.copytree(RUNS, _baselines(), dirs_exist_ok=True, ignore=shutil.ignore_patterns("steps"))
    _summary(
        "This run is now the baseline of its device. How much runs of the same code differ is known from "
        f"{os.environ['BASELINE_RUNS']} run(s)."
    )


def _mpscale(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MPSCALE, *arguments], capture_output=True, text=True)


def _latest() -> Path | None:
    return max((info.parent for info in RUNS.glob("*/run.json")), default=None)


def _baselines() -> Path:
    return Path(os.environ["RUNNER_TEMP"], "mpscale-baseline")


def _code(text: str) -> str:
    """Show a message that may hold anything, so that markdown and GitHub see no more than text in it."""
    return f"`{text.replace('`', chr(39))}`"


def _output(name: str, value: str) -> None:
    if "\n" in value:
        sys.exit(f"::error::{name} cannot be {value!r}: a line end would begin another output")
    _append("GITHUB_OUTPUT", f"{name}={value}\n")


def _summary(*lines: str) -> None:
    _append("GITHUB_STEP_SUMMARY", "\n".join(lines).rstrip("\n") + "\n")


def _append(variable: str, text: str) -> None:
    with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
        file.write(text)


STEPS = {
    "check-branch": check_branch,
    "install": install,
    "find-baseline": find_baseline,
    "choose-baseline": choose_baseline,
    "measure": measure,
    "check-device": check_device,
    "report": report,
    "compare": compare,
    "keep-baseline": keep_baseline,
}

if __name__ == "__main__":
    STEPS[sys.argv[1]]()
