"""A record: unknown stays empty and has a reason."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import mpscale
from mpscale.core.case import Case, Settings
from mpscale.core.columns import COLUMNS, SECTIONS, data_dictionary
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Record, from_cell, to_csv
from mpscale.harness.empty_columns import explain

REASON = Reason(Code.NOT_REACHED, "a reason")


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_unknown_is_empty_and_never_zero(value):
    record = Record({"train_loss_final": value})
    assert record["train_loss_final"] is None
    record.complete(REASON)
    assert record.why_empty("train_loss_final") is REASON


def test_zero_is_a_value():
    record = Record({"overflow_steps": 0})
    record.complete(REASON)
    assert record["overflow_steps"] == 0
    assert "overflow_steps" not in record.unavailable


def test_a_value_replaces_a_reason_and_the_first_reason_stays():
    record = Record()
    record.miss("final_accuracy", REASON)
    record.miss(["final_accuracy"], Reason(Code.OTHER, "second"))
    assert record.unavailable == {"final_accuracy": REASON}
    record.update({"final_accuracy": 0.5})
    assert record.unavailable == {}
    record.miss("final_accuracy", Reason(Code.OTHER, "third"))
    assert record.unavailable == {}


@pytest.mark.parametrize(
    "act", [lambda r: r.update({"loss": 1}), lambda r: r.miss("loss", REASON), lambda r: r["loss"]]
)
def test_unknown_columns_are_refused(act):
    with pytest.raises(KeyError, match="is not a column of a case"):
        act(Record())


def test_json_and_csv_keep_everything():
    record = Record({"case_id": 'a,"b"\nc', "jit": True, "loss_scale_final": 2.0**40, "seed": 0})
    record.miss("final_accuracy", Reason(Code.NO_GPU, 'because of "x", and é', "buy one"))
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert (again.to_json(), again.unavailable) == (record.to_json(), record.unavailable)
    (row,) = csv.DictReader(io.StringIO(to_csv([record])))
    assert list(row) == list(COLUMNS)
    assert (row["case_id"], row["seed"], row["workload"]) == ('a,"b"\nc', "0", "")
    assert json.loads(row["unavailable"]) == {"final_accuracy": 'because of "x", and é'}


@pytest.mark.parametrize("text", ["a\nb", "a,b", 'a"b', "a\rb", "a\r\nb", '50%\r100%\r\nend, "quoted"', " ", "\n"])
@pytest.mark.parametrize("reason", [None, "a\nb", 'because of "x", and é', "a,b"])
def test_csv_stays_intact_whatever_a_text_contains(text, reason):
    first, second = Record({"case_id": "a", "output_tail": text}), Record({"case_id": "b"})
    if reason is not None:
        first.miss("final_accuracy", Reason(Code.NO_GPU, reason))
    rows = list(csv.DictReader(io.StringIO(to_csv([first, second]), newline="")))
    assert [row["case_id"] for row in rows] == ["a", "b"]
    assert from_cell(rows[0]["output_tail"]) == text.replace("\r\n", "\n").replace("\r", "\n")
    assert rows[0]["unavailable"] == (
        "" if reason is None else json.dumps({"final_accuracy": reason}, ensure_ascii=False)
    )
    assert rows[1]["unavailable"] == ""


@pytest.mark.parametrize("mode", ["fp32", "mixed-dynamic", "mixed-logmax", "article"])
@pytest.mark.parametrize("repeat", [0, 1])
@pytest.mark.parametrize("status", ["ok", "crashed", "unsupported"])
def test_every_measured_column_of_a_finished_case_has_a_value_or_a_reason(mode, repeat, status):
    case = Case("w", mode, 0, repeat, 0, Settings(timing_s=0))
    record = Record({"status": status, "status_reason": "why", "attempted_steps": 3, "overflow_steps": 0})
    explain(record, case)
    for column in COLUMNS.values():
        assert not column.measured or (record[column.name] is None) == (column.name in record.unavailable)


def test_columns_are_named_once_and_described():
    names = [column.name for section in SECTIONS for column in section.columns]
    assert len(names) == len(set(names))
    assert all(column.made and column.empty for column in COLUMNS.values())


def test_docs_hold_the_data_dictionary_of_the_code():
    committed = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert committed.read_text() == data_dictionary(), "run `make docs`"


@pytest.mark.parametrize(
    "module",
    [
        "mpscale",
        "mpscale.pytest_plugin",
        "mpscale.harness.run",
        "mpscale.cli",
        "mpscale.core.runs",
        "mpscale.analysis.gates",
        "mpscale.report.files",
    ],
)
def test_supervising_and_judging_import_neither_tensorflow_nor_pandas(module):
    code = f"import sys, {module}; print([m for m in ('tensorflow', 'keras', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_exist_and_others_do_not():
    for name in mpscale.__all__:
        assert getattr(mpscale, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'LossScale'"):
        mpscale.LossScale  # noqa: B018
