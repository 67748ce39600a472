"""Cases that report unusable values, fail inside TensorFlow, or delete the run's folder."""

import pytest

from mpscale.terminal.streams import visible

SUITE = """
import shutil
from pathlib import Path

import suite_workloads as s


def test_training(mp_case, benchmark):
    mp_case.measure(benchmark)


def printing_loss(labels, outputs):
    import tensorflow as tf

    tf.print(labels)
    return s.squared_loss(labels, outputs)


def refusing_model():
    import keras

    class Refusing(keras.layers.Layer):
        def call(self, x):
            if not self.built_once:
                self.built_once = True
                return x
            raise ValueError("the way\\x1b[2J\\x9b1m\\u202e\\r is long; " * 100 + "my layer wants three columns")

        built_once = False

    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), Refusing()])


def remove_the_run():
    shutil.rmtree(Path(__file__).parent / "results", ignore_errors=True)


prints = s.make("prints", loss=printing_loss)
refuses = s.mpscale.workload("refuses", data=s.blobs, optimizer=s.sgd)(refusing_model)
misnamed = s.make("misnamed")
object.__setattr__(misnamed, "metric_name", 5)
misdirected = s.make("misdirected")
object.__setattr__(misdirected, "metric_higher_is_better", 0)
removes = s.interrupted("removes", remove_the_run)


def block_its_steps():
    (run,) = (Path(__file__).parent / "results" / "runs").iterdir()
    (run / "steps" / "test_suite+unkept--fp32--s0--r0.csv.gz" / "in the way").mkdir(parents=True, exist_ok=True)


unkept = s.interrupted("unkept", block_its_steps)
"""
CASES = {
    "suite_workloads:fine": ("ok", ""),
    "test_suite:misnamed": ("error", "TypeError: metric_name should be str, not 5"),
    "test_suite:misdirected": ("error", "TypeError: metric_higher_is_better should be bool, not 0"),
    "test_suite:prints": ("ok", ""),
    "test_suite:refuses": ("error", "my layer wants three columns"),
    "test_suite:removes": ("ok", ""),
    "test_suite:unkept": ("ok", ""),
}


@pytest.fixture(scope="module")
def done(run_suite):
    return run_suite(
        "--mp-workloads", ",".join(CASES), "--mp-modes", "fp32", "--mp-seeds", "1", "--mp-timing", "0.05", suite=SUITE
    )  # fmt: skip


def test_each_case_has_its_row_and_its_reason(done):
    rows = {record["workload"]: (record["status"], record["status_reason"] or "") for record in done.run.records}
    assert list(rows) == list(CASES), done.output
    for workload, (status, end) in CASES.items():
        assert rows[workload][0] == status, done.output
        assert rows[workload][1].endswith(end)


def test_a_lost_folder_is_reported_at_the_end_and_the_report_exists(done):
    assert done.code == 1
    assert "4 failed, 4 passed" in done.output
    assert "was deleted, moved or changed while the run went on" in done.output.rpartition("= mpscale =")[2]
    assert done.run.problems == []
    assert "TypeError: metric_name should be str, not 5" in (done.path / "report.html").read_text()


def test_an_error_sends_no_command_to_the_terminal(done):
    said = done.output.encode("latin-1").decode("utf-8")  # it was read byte by byte
    assert "\\x1b[2J\\x9b1m\\u202e" in said
    assert [c for c in said if visible(c) != c] == []


def test_the_whole_traceback_is_kept(done):
    (row,) = (record for record in done.run.records if record["workload"] == "test_suite:refuses")
    assert "Traceback" in row["output_tail"] or "Arguments received by" in row["output_tail"]


def test_a_finished_training_whose_steps_cannot_be_written_keeps_its_figures(done):
    (row,) = (record for record in done.run.records if record["workload"] == "test_suite:unkept")
    assert row["note"].startswith("its steps could not be kept: ")
    assert "it is a folder and not a file" in row["note"]
    assert row["metric_value"] is not None
    assert row["step_time_ms_median"] > 0
    assert f"{row['case_id']}: its steps could not be kept" in done.output.rpartition("= mpscale =")[2]
    assert "its steps could not be kept" in (done.path / "report.md").read_text()
