"""The result of `mpscale fit`: a row per mode; what is unknown is empty and has a reason."""

from __future__ import annotations

import csv
import io
import json

import pytest
from support.runfolder import record

from mpscale.analysis.fit import Fit, Try, Verdict
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.report.fit import render, table, write
from mpscale.report.table import DASH

FULL = Reason(Code.OUT_OF_MEMORY, "no room")


def tried(mode, batch, fits=True, **values):
    if fits:
        values = {"step_time_ms_median": 2.0, "examples_per_s": batch * 500.0, **values}
        values = {"gpu_memory_process_peak_mib": 900.0, **values}
    one = record(mode, repeat=1, batch_size=batch, status="ok" if fits else "oom", **values)
    return Try(mode, batch, Verdict.FITS if fits else Verdict.OUT_OF_MEMORY, None if fits else FULL, one)


@pytest.fixture
def fit():
    """On a GPU: a limit that was found, one that was not looked for, and a mode that failed."""
    cap = Reason(Code.NOT_ASKED_FOR, "batches above 4,096 were not tried", "--max-batch 8192 goes on from there")
    broken = Reason(Code.OTHER, "a batch of 64 failed: error: ValueError")
    tries = [
        tried("tf32", 1024),
        tried("tf32", 1152, fits=False),
        tried("mixed-bf16", 4096),
        tried("mixed-static", 1536),
    ]
    modes = ["tf32", "mixed-static", "mixed-bf16", "mixed-keras"]
    ends = {"tf32": None, "mixed-static": None, "mixed-bf16": cap, "mixed-keras": broken}
    return Fit("toy", modes, Device("gpu", "Test GPU"), None, tries, ends)


def test_the_table_shows_what_is_known_and_says_why_the_rest_is_not(fit):
    shown = table(fit)
    rows = {row[0]: dict(zip(shown.headers, row, strict=True)) for row in shown.rows}
    assert rows["tf32"]["largest batch"] == "1,024"
    assert rows["tf32"]["ran out at"] == "1,152"
    assert rows["mixed-static"]["batch vs tf32"] == "1.50x"
    assert rows["mixed-bf16"]["batch vs tf32"] == DASH
    assert rows["mixed-bf16"]["note"].startswith("at least this: batches above 4,096")
    assert rows["mixed-keras"]["note"] == "a batch of 64 failed: error: ValueError"


def test_a_small_batch_is_an_integer(fit):
    fit.tries[0] = tried("tf32", 7)
    fit.tries[1] = tried("tf32", 8, fits=False)
    assert table(fit).rows[0][1:3] == ["7", "8"]


def test_csv_and_json_have_reasons_for_empty_cells(fit):
    rows = {row["mode"]: row for row in csv.DictReader(io.StringIO(render(fit, "csv")))}
    assert rows["tf32"]["largest_batch"] == "1024"
    assert rows["mixed-bf16"]["batch_ratio"] == ""
    assert set(json.loads(rows["mixed-bf16"]["unavailable"])) == {"ran_out_at", "batch_ratio", "examples_per_s_ratio"}
    assert [row["peak_memory_mib"] for row in json.loads(render(fit, "json"))["modes"]] == [900.0, 900.0, 900.0, None]


@pytest.mark.parametrize("side", [0, 3])
@pytest.mark.parametrize(
    "condition",
    [
        {"dispatch_bound": True},
        {"device_busy_share": 0.1},
        {"gpu_utilization_median": 20},
        {"host_other_cpu_share": 0.9},
    ],
    ids=lambda condition: next(iter(condition)),
)
def test_a_step_time_that_says_nothing_about_the_mode_gives_no_ratio_of_speeds(fit, condition, side):
    fit.tries[side] = tried(fit.tries[side].mode, fit.tries[side].batch, **condition)
    rows = {row["mode"]: row for row in json.loads(render(fit, "json"))["modes"]}
    assert rows["mixed-static"]["batch_ratio"] == 1.5
    assert "examples_per_s_ratio" in rows["mixed-static"]["unavailable"]
    assert (rows["tf32"]["examples_per_s_ratio"], rows["tf32"]["unavailable"]) == (1.0, None)


def test_the_folder_has_a_report_the_table_and_every_try(fit, tmp_path):
    write(tmp_path, fit, {"fit": "name"})
    names = {"report.html", "report.md", "fit.csv", "tries.csv", "fit.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    written = (tmp_path / "report.md").read_text()
    assert table(fit).markdown() in written
    assert written.count("\n## ") == 3  # nothing is known of its environment and settings
    assert "- **mixed-static**: the largest batch is 1,536, 1.50 times that of tf32\n" in written
    assert "- **mixed-bf16**: the largest batch is at least 4,096\n" in written
    assert "- **mixed-keras**: no batch trained\n" in written
    html = (tmp_path / "report.html").read_text()
    assert all(f">{cell}</td>" in html for row in table(fit).rows for cell in row)
    assert len((tmp_path / "tries.csv").read_text().splitlines()) == 1 + len(fit.tries)
    assert json.loads((tmp_path / "fit.json").read_text())["tries"][1]["reason"]["code"] == "out-of-memory"
