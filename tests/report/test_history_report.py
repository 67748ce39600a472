"""A history as text, in every format."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from support.runfolder import CPU, GPU, finished, record, write_run
from test_report_markdown import table

from mpscale.analysis.history import make_history
from mpscale.core.runs import read_run
from mpscale.report.history import FORMATS, render
from mpscale.report.table import DASH

KEYS = {mode: f"toy/abc/{mode}/batch=1,steps=2/method=1" for mode in ("fp32", "mixed-static")}
GIT = {"git": {"commit": "83e8d7e262337ee5", "dirty": True}, "packages": {"tensorflow": "2.21.0"}}


def run_of(folder, day, records, *, environment=GIT, device=CPU, **info):
    environment = {"device": dict(device), **environment}
    started = f"2026-01-{day:02d}T03:04:05+00:00"
    name = f"run-{day}"
    return read_run(write_run(folder, finished(records), name=name, started=started, environment=environment, **info))


def processes(*times, mode="fp32", **values):
    return [
        record(mode, seed, series_key=KEYS[mode], step_time_ms_median=time, **values) for seed, time in enumerate(times)
    ]


@pytest.fixture
def two_runs(tmp_path):
    lost = processes(9.0, mode="mixed-static", status="diverged", status_reason="the loss | is nan")
    return make_history(
        [
            run_of(tmp_path, 1, [*processes(2.0, 2.0), *processes(1.0, mode="mixed-static")]),
            run_of(tmp_path, 2, [*processes(4.0, 4.0), *lost], environment={}, finish=False),
        ],
        skipped=[("results/runs/torn", "not readable")],
    )


def test_one_row_per_series_and_run_with_dashes_for_unknowns(two_runs):
    first, second, third, fourth = table(render(two_runs, "markdown"))
    assert first == {
        "workload": "toy",
        "mode": "fp32",
        "when (UTC)": "2026-01-01 03:04",
        "run": "run-1",
        "step time": "2.00 [2.00, 2.00] ms",
        "n": "2",
        "change": DASH,
        "commit": "83e8d7e-dirty",
        "TensorFlow": "2.21.0",
        "note": DASH,
    }
    assert second == first | {
        "when (UTC)": "2026-01-02 03:04",
        "run": "run-2",
        "step time": "4.00 [4.00, 4.00] ms",
        "change": "+100.0 % [+100.0, +100.0]",
        "commit": DASH,
        "TensorFlow": DASH,
        "note": "the run did not finish",
    }
    assert (third["mode"], third["step time"], third["n"]) == ("mixed-static", "1.00 ms", "1")
    assert (fourth["step time"], fourth["n"], fourth["change"]) == (DASH, "0", DASH)
    assert fourth["note"] == r"diverged: the loss \| is nan; the run did not finish"


def test_the_table_for_a_terminal_holds_the_same_cells(two_runs):
    text = render(two_runs, "table")
    for row in table(render(two_runs, "markdown")):
        assert any(all(cell.replace("\\", "") in line for cell in row.values()) for line in text.splitlines())


def test_blank_columns_are_left_out(tmp_path):
    history = make_history([run_of(tmp_path, 1, processes(2.0))])
    headers = list(table(render(history, "markdown"))[0])
    assert headers == ["workload", "mode", "when (UTC)", "run", "step time", "n", "commit", "TensorFlow"]
    assert "Change" not in render(history, "table")


def test_series_of_several_machines_are_distinguished(tmp_path):
    runs = [run_of(tmp_path, day, processes(2.0), device=device) for day, device in ((1, CPU), (2, GPU))]
    assert [row["series"] for row in table(render(make_history(runs), "markdown"))] == ["Test CPU", "Test GPU"]


@pytest.mark.parametrize(
    ("quantity", "column", "expected"),
    [
        ("speedup", "speed-up over fp32", "2.00x [2.00, 2.00]"),
        ("gpu_memory", "GPU memory", "1200 [1200, 1200] MiB"),
        ("energy", "energy per step", "0.250 [0.250, 0.250] J"),
        ("metric", "final metric", "90.00 % [80.00 %, 100.00 %]"),
        ("overflow_rate", "overflow rate", "0.00 %"),
    ],
)
def test_every_quantity_has_its_unit(tmp_path, quantity, column, expected):
    values = {
        "gpu_memory_nvml_peak_mib": 1200.0, "gpu_energy_j_per_step": 0.25, "metric_name": "accuracy",
        "attempted_steps": 10, "overflow_steps": 0,
    }  # fmt: skip
    trained = processes(1.0, 2.0, mode="mixed-static", **values)
    for one, metric in zip(trained, (0.8, 1.0), strict=True):
        one.update({"metric_value": metric})
    records = [*processes(2.0, 4.0, metric_value=0.9), *trained]
    rows = table(render(make_history([run_of(tmp_path, 1, records)], quantity, modes=["mixed-static"]), "markdown"))
    assert [row[column] for row in rows] == [expected]


def test_csv_has_numbers_in_full_and_empty_cells_for_unknowns(two_runs):
    rows = list(csv.DictReader(io.StringIO(render(two_runs, "csv"))))
    assert [(row["run"], row["mode"], row["value"]) for row in rows] == [
        ("run-1", "fp32", "2.0"),
        ("run-2", "fp32", "4.0"),
        ("run-1", "mixed-static", "1.0"),
        ("run-2", "mixed-static", ""),
    ]
    assert float(rows[1]["change"]) == pytest.approx(1.0)
    assert (rows[0]["started"], rows[0]["unit"]) == ("2026-01-01T03:04:05+00:00", "ms")
    assert (rows[0]["git_commit"], rows[0]["git_dirty"], rows[1]["git_commit"]) == ("83e8d7e262337ee5", "True", "")
    assert json.loads(rows[0]["hardware"]) == {"kind": "cpu", "name": "Test CPU"}


def test_json_has_the_series_and_what_was_skipped(two_runs):
    content = json.loads(render(two_runs, "json"))
    assert (content["quantity"], content["unit"]) == ("step_time", "ms")
    assert content["skipped"] == [{"what": "results/runs/torn", "reason": "not readable"}]
    assert [(one["mode"], one["series_key"]) for one in content["series"]] == list(KEYS.items())
    assert [point["value"] for point in content["series"][1]["points"]] == [1.0, None]


def test_an_interval_that_no_float_can_hold_leaves_json_valid(tmp_path):
    history = make_history([run_of(tmp_path, 1, processes(1e-12, 1e12))])
    (point,) = history.series[0].points
    history.series[0].points[:] = [replace(point, high=math.inf)]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(render(history, "json"), parse_constant=refuse)
    assert content["series"][0]["points"][0]["high"] is None


@pytest.mark.parametrize("output", FORMATS)
def test_every_format_ends_in_one_newline(two_runs, output):
    text = render(two_runs, output)
    assert text.endswith("\n") and not text.endswith("\n\n")
