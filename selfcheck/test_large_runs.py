"""Seconds and memory that `mpscale report` and `mpscale compare` need for runs of ten thousand cases.

    pytest selfcheck/test_large_runs.py

The runs are synthetic: 1,250 seeds of eight modes, each record with as many columns and reasons as a real one on a CPU.
`report` is measured with and without its figures. Nothing is asserted about times.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from mpscale.core.case import CaseId, Settings, series_key
from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.mode import MODES
from mpscale.core.record import Record

REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "20261127T062010Z-amd-epyc-b176"
SEEDS = 1250
USED = ("fp32", "tf32", "mixed-static", "mixed-dynamic", "mixed-bf16", "mixed-logmax", "mixed-keras", "mixed-unscaled")
COMMAND = "import sys; from mpscale.cli import main; sys.exit(main(sys.argv[1:]))"
NO_FIGURES = f"from mpscale.report import files; files.gains = files.training = lambda run: None; {COMMAND}"


def template():
    """Return the event of a real training with a loss scale, in today's format."""
    with (REFERENCE / "journal.jsonl").open() as file:
        events = map(json.loads, file)
        event = next(e for e in events if e["event"] == "case_finished" and e["record"]["mode"] == "mixed-dynamic")
    return {**event, "record": Record.from_json(event["record"]).to_json()}


def write_run(results, name, slower=1.0):
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    event = template()
    chance = random.Random(name)
    planned = []
    with (folder / "journal.jsonl").open("w") as journal:
        journal.write(json.dumps({"event": "run_started", "run": name}) + "\n")
        for order, (seed, mode) in enumerate((seed, mode) for seed in range(SEEDS) for mode in USED):
            case_id = str(CaseId("toy", mode, seed, 0))
            planned.append(case_id)
            identity = {"workload": "toy", "mode": mode, "seed": seed, "repeat": 0, "order": order}
            times = {"step_time_ms_median": slower * chance.lognormvariate(0.0, 0.05)}
            key = series_key(MODES[mode], "toy", "sha256:1", 100, 2000, Settings())
            metric = {"metric_value": chance.gauss(0.67, 0.01), "host_memory_peak_mib": chance.gauss(567.0, 5.0)}
            record = {**event["record"], "case_id": case_id, **identity, **times, **metric, "series_key": key}
            for line in (
                {"event": "case_started", "case_id": case_id, "attempt": 1, "case": identity},
                {**event, "case_id": case_id, "record": record},
            ):
                journal.write(json.dumps(line) + "\n")
        journal.write(json.dumps({"event": "run_finished"}) + "\n")
    info = json.loads((REFERENCE / "run.json").read_text())
    versions = {"schema_version": SCHEMA_VERSION, "method_version": METHOD_VERSION}
    (folder / "run.json").write_text(json.dumps({**info, **versions, "run": name, "planned": planned}))
    return folder


def measured(program, *arguments):
    """Return the seconds and the peak resident memory, in MiB, of a process with its children."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.monotonic()
    command = [sys.executable, "-c", code, sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - start
    status, peak = done.stdout.split()
    assert status == "0", done.stderr
    return seconds, int(peak) / 1024


def test_large_runs(tmp_path, capsys):
    before, after = (write_run(tmp_path / name, name, slower) for name, slower in (("before", 1.0), ("after", 1.02)))
    table = [
        ["report, first", *measured(COMMAND, "report", before)],
        ["report, again", *measured(COMMAND, "report", before)],
        ["report without figures", *measured(NO_FIGURES, "report", after)],
        ["compare", *measured(COMMAND, "compare", before, after)],
    ]
    with capsys.disabled():
        print()
        print(tabulate(table, ["10,000 cases", "s", "MiB"], floatfmt=".1f"))
