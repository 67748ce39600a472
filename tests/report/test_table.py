"""Tables for people and programs, and numbers as text."""

from __future__ import annotations

import csv
import json
import math

import pytest

from mpscale.core.columns import COLUMNS, SUMMARY
from mpscale.report import table as cells
from mpscale.report.table import DASH, Table, json_text, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH),
        (0.0, "0"),
        (7.9149, "7.91"),
        (0.0123456, "0.0123"),
        (1557.4, "1557"),
        (1e9, "1e+09"),
        (1e-7, "1e-07"),
        (-2.5, "-2.50"),
        (math.inf, "inf"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert cells.number(value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((7.914, 7.8, 8.02, " ms"), "7.91 [7.80, 8.02] ms"),
        ((7.914, None, None, " ms"), "7.91 ms"),
        ((0.981, 0.95, 1.0149, "x"), "0.98x [0.95, 1.01]"),
        ((1.0, None, None, "x"), "1.00x"),
        ((None, None, None, " ms"), DASH),
    ],
)
def test_intervals_share_the_decimals_of_their_estimate(arguments, text):
    assert cells.interval(*arguments) == text


@pytest.mark.parametrize(
    ("value", "text"), [(32768.0, "32768"), (2.0**24, "16777216"), (2.0**126, "8.50706e+37"), (0.9, "0.9")]
)
def test_loss_scales_are_written_in_full_as_long_as_they_are_readable(value, text):
    assert cells.loss_scale(value) == text


@pytest.mark.parametrize(
    ("difference", "name", "text"),
    [
        (-0.0012, "accuracy", "0.12 points below"),
        (0.0034, "accuracy", "0.34 points above"),
        (0.00001, "accuracy", "no different from"),
        (0.25, "perplexity", "0.250 above"),
        (0.0, "perplexity", "no different from"),
    ],
)
def test_differences_of_a_metric_are_written_in_its_unit(difference, name, text):
    assert cells.metric_change(difference, name) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("host_memory_peak_mib", 1557.44, "1557"),
        ("gpu_sm_clock_mhz_median", 987.654, "987.7"),
        ("step_time_ms_median", 7.9149, "7.91"),
        ("dispatch_share", 0.254, "25 %"),
        ("timed_blocks", 50, "50"),
        ("loss_scale_final", 2.0**24, "16777216"),
        ("dispatch_bound", True, "yes"),
        ("gpu_memory_method", "process", "process"),
    ],
)
def test_a_value_is_written_as_its_column_says(name, value, text):
    assert shown(COLUMNS[name], value) == text


def test_every_format_writes_an_unknown_value_as_a_dash():
    assert {shown(column, None) for column in (*COLUMNS.values(), *SUMMARY)} == {DASH}


def test_programs_get_numbers_in_full_and_no_unknown_or_infinite_values():
    rows = [{"a": 0.1 + 0.2, "b": math.inf}, {"a": None, "b": "x, y"}, {}]
    assert list(csv.reader(Table.of(["a", "b"], rows).csv().splitlines())) == [
        ["a", "b"], ["0.30000000000000004", ""], ["", "x, y"], ["", ""],
    ]  # fmt: skip
    assert json.loads(json_text(rows)) == [{"a": 0.1 + 0.2, "b": None}, {"a": None, "b": "x, y"}, {}]


def test_a_table_without_rows_is_empty_for_people_and_a_header_for_programs():
    table = Table(["a", "b"], [])
    assert (table.text(), table.markdown(), table.csv()) == ("", "", "a,b\n")
