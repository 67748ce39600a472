"""Seconds that `mpscale site` needs for a thousand runs.

    pytest selfcheck/test_site_speed.py

The runs are copies of a reference run of 32 cases with other names, days and step times, all of one code, so that each
comparison has a noise floor. They have a report already. Seconds of the processor, since others may use the machine.
"""

from __future__ import annotations

import json
import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mpscale.report.site import write_site

REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "20261127T062807Z-amd-epyc-abce"
RUNS = 1000


def write_run(results, info, events, day):
    at = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=day)
    name = f"{at:%Y%m%dT%H%M%SZ}-amd-epyc-{day:04x}"
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    chance = random.Random(day)
    night = chance.lognormvariate(0.0, 0.02)
    (folder / "run.json").write_text(json.dumps(info | {"run": name, "started": at.isoformat()}))
    with (folder / "journal.jsonl").open("w") as journal:
        for event in events:
            ms = event.get("record", {}).get("step_time_ms_median")
            if ms is not None:
                times = {"step_time_ms_median": ms * night * chance.lognormvariate(0.0, 0.02)}
                event = {**event, "record": event["record"] | times}
            journal.write(json.dumps(event) + "\n")
    (folder / "report.html").write_text("<!DOCTYPE html><title>a report</title>" + 100_000 * " ")


def test_site_of_a_thousand_runs(tmp_path, capsys):
    info = json.loads((REFERENCE / "run.json").read_text())
    events = [json.loads(line) for line in (REFERENCE / "journal.jsonl").read_text().splitlines()]
    for day in range(RUNS):
        write_run(tmp_path / "results", info, events, day)
    began = time.process_time()
    site = write_site(tmp_path / "site", [tmp_path / "results"])
    seconds = time.process_time() - began
    with capsys.disabled():
        print(f"\nmpscale site: {site.runs} runs in {seconds:.1f} s of one processor")
    assert (site.runs, site.broken) == (RUNS, [])
    assert seconds < 30
