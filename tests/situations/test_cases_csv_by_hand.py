"""A cases.csv that data frames and spreadsheets have written again: the same figures, or a refusal that says why."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest
from support.runfolder import record

from mpscale.core.cases_csv import read_cases
from mpscale.core.columns import COLUMNS
from mpscale.core.reason import Code, Reason
from mpscale.core.record import to_csv
from mpscale.core.runs import RunError, cases_frame, read_run


def records(**values):
    common = {"jit": True, "attempted_steps": 30, "metric_value": 0.5, "metric_name": "none", "batch_size": 2**60 + 1}
    one = record(step_time_ms_median=0.1234567890123, **{**common, **values})
    two = record(seed=1, output_tail="a, b;\n\tc\u2028d", **{**common, **values})
    two.miss(["step_time_ms_median", "gpu_memory_nvml_peak_mib"], Reason(Code.OTHER, "no GPU"))
    one.miss("gpu_memory_nvml_peak_mib", Reason(Code.OTHER, 'a "reason", with commas'))
    return [one, two]


def plain(found):
    return [each.to_json() for each in found]


def rewritten(text, change):
    """The file with each cell changed by ``change(column, cell)``."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: change(name, cell) for name, cell in row.items()} for row in rows])
    return out.getvalue()


def frame(text):
    """The cells as they are, as texts."""
    return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)


def of_a_run(_):
    """As a user writes ``mpscale.read_run(...).cases``."""
    return cases_frame(records()).to_csv(index=False)


WRITERS = {
    "as it was": lambda text: text,
    **{
        f"{word} for unknown": lambda text, word=word: rewritten(text, lambda _, cell: cell or word)
        for word in ("NA", "NaN", "nan", "null", "NULL", "None", "N/A", "n/a", "<NA>", "#N/A", "nil")
    },
    "a quoted empty cell": lambda text: text.replace(",,", ',"",'),
    "a blank for unknown numbers": lambda text: rewritten(
        text, lambda name, cell: cell or ("" if COLUMNS[name].kind == "str" else " ")
    ),
    "TRUE": lambda text: rewritten(text, lambda name, cell: cell.upper() if COLUMNS[name].kind == "bool" else cell),
    "T": lambda text: rewritten(text, lambda name, cell: cell[:1] if COLUMNS[name].kind == "bool" else cell),
    "1.0 for true": lambda text: rewritten(
        text, lambda name, cell: "1.0" if COLUMNS[name].kind == "bool" and cell else cell
    ),
    "3.0 for 3": lambda text: rewritten(
        text, lambda name, cell: f"{cell}.0" if COLUMNS[name].kind == "int" and len(cell) < 15 and cell else cell
    ),
    "every cell quoted": lambda text: frame(text).to_csv(index=False, quoting=csv.QUOTE_ALL),
    "CRLF": lambda text: frame(text).to_csv(
        index=False, lineterminator="\r\n"
    ),
    "a BOM": lambda text: "\ufeff" + text,
    "an index without a name": lambda text: frame(text).to_csv(),
    "an index with a name": lambda text: frame(text).to_csv(
        index_label="Unnamed: 0"
    ),
    "columns in another order": lambda text: frame(text)[
        list(COLUMNS)[::-1]
    ].to_csv(index=False),
    "blank lines and rows of empty cells behind": lambda text: text + "\n" + "," * (len(COLUMNS) - 1) + "\n\n",
    "blanks about the names of columns": lambda text: text.replace(",workload,", ", workload ,", 1),
    "further columns": lambda text: frame(text)
    .assign(remark="NA").to_csv(index=False),
    "reasons as Python shows a dict": of_a_run,
}  # fmt: skip


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_files_rewritten_by_other_tools_are_read_as_they_were(tmp_path, write):
    path = tmp_path / "cases.csv"
    path.write_bytes(write(to_csv(records())).encode("utf-8"))
    assert plain(read_cases(path)) == plain(records())


@pytest.mark.parametrize("word", ["NA", "NaN", "null", "None", "N/A"])
def test_a_round_trip_through_pandas_keeps_every_figure(tmp_path, word):
    path = tmp_path / "cases.csv"
    made = records(batch_size=20, metric_name="accuracy")
    frame = pd.read_csv(io.StringIO(to_csv(made)))
    frame.to_csv(path, index=False, na_rep=word)
    assert plain(read_run(path).records) == plain(made)


@pytest.mark.parametrize("name", ["NA", "none", "nan", "null"])
def test_a_workload_may_have_a_name_that_means_unknown_elsewhere(tmp_path, name):
    path = tmp_path / "cases.csv"
    made = [record(workload=name, status_reason=None)]
    path.write_text(rewritten(to_csv(made), lambda _, cell: cell or name))
    (found,) = read_cases(path)
    assert found["workload"] == name
    assert found["status_reason"] is None


def test_a_missing_workload_is_not_a_workload_called_na(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text(rewritten(to_csv(records()), lambda name, cell: "NA" if name == "workload" else cell or "NA"))
    with pytest.raises(RunError, match=r"line 2: the record of .* has no workload"):
        read_cases(path)


def test_words_for_unknown_are_text_if_unknown_cells_are_empty(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text(to_csv([record(metric_name="NA", optimizer="None")]))
    (found,) = read_cases(path)
    assert (found["metric_name"], found["optimizer"]) == ("NA", "None")


REFUSED = {
    "semicolons": (lambda text: text.replace(",", ";").encode(), "separated by semicolons"),
    "tabs": (lambda text: text.replace(",", "\t").encode(), "separated by tabs"),
    "UTF-16": (lambda text: text.encode("utf-16"), "is not UTF-8 but UTF-16"),
    "UTF-16 without a mark": (lambda text: text.encode("utf-16-be"), "holds zero bytes"),
    "Latin-1": (lambda text: text.replace("toy", "töy").encode("latin-1", "replace"), "line 2: .*with the byte 0xf6"),
    "a spreadsheet": (lambda _: b"PK\x03\x04", "a zip archive, as spreadsheets"),
    "gzip": (lambda _: b"\x1f\x8b\x08", "compressed with gzip"),
    "a column twice": (lambda text: text.replace(",seed,", ",mode,", 1).encode(), "several columns mode"),
    "a decimal comma": (lambda text: text.replace("0.1234567890123", '"0,1234"').encode(), "a number such as 1234.5"),
    "a thousands comma": (lambda text: text.replace("0.1234567890123", '"1,234"').encode(), "a number such as 1234.5"),
    "underscores": (lambda text: text.replace("0.1234567890123", "1_0").encode(), "a number such as 1234.5, not '1_0'"),
    "a date": (lambda text: text.replace("0.1234567890123", "1. Feb").encode(), "in the column step_time_ms_median"),
    "reasons that are no texts": (
        lambda text: rewritten(text, lambda name, cell: "{'a': 3}" if name == "unavailable" else cell).encode(),
        "a JSON object of texts",
    ),
    "half a step": (
        lambda text: rewritten(text, lambda name, cell: "2.5" if name == "attempted_steps" else cell).encode(),
        "a whole number, not '2.5', in the column attempted_steps",
    ),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_files_in_which_a_figure_may_have_changed_are_refused(tmp_path, write, message):
    path = tmp_path / "cases.csv"
    path.write_bytes(write(to_csv(records())))
    with pytest.raises(RunError, match=f"(?s)cases.csv.*{message}"):
        read_cases(path)
