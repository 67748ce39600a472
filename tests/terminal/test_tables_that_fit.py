"""Tables on terminals of several widths."""

from __future__ import annotations

import re

import pytest
from support.pseudo_terminal import plain

from mpscale.report.table import Cell, Table
from mpscale.terminal.streams import PIPE, Surface

ROWS = [
    [
        "mnist1d-mlp",
        "fp32",
        "0.509 [0.483, 0.536] ms",
        "1.00x",
        "baseline",
        "526.3 MiB (host)",
        "66.2 % (65.4 % to 67.1 %)",
    ],
    [
        "mnist1d-mlp",
        "mixed-dynamic",
        "0.656 [0.575, 0.747] ms",
        Cell("(0.78x [0.67, 0.90])", "weak"),
        Cell("no claim: machine busy, one process", "weak"),
        "578.2 MiB (host)",
        "65.3 % (64.5 % to 66.4 %)",
    ],
    [
        "mnist1d-cnn",
        "mixed-bf16",
        "1.45 [1.31, 1.59] ms",
        "0.79x [0.70, 0.89]",
        Cell("slower than fp32", "bad"),
        "–",  # noqa: RUF001
        "92.1 % (91.1 % to 92.9 %)",
    ],
]
HEADERS = ["workload", "mode", "step time", "speed-up", "speed", "peak memory", "final accuracy"]
TABLE = Table(HEADERS, ROWS, spare=("peak memory", "step time"))
NUMBERS = sorted(number for row in ROWS for cell in row for number in re.findall(r"\d+\.\d+|\d+", cell))


def numbers_in(text):
    return sorted(re.findall(r"\d+\.\d+|\d+", text))


@pytest.mark.parametrize("columns", [200, 150, 120, 100, 80, 60])
def test_no_line_is_wider_than_the_terminal(columns):
    assert max(map(len, TABLE.text(Surface(columns)).split("\n"))) <= columns


@pytest.mark.parametrize("columns", [200, 150, 120, 100, 90, 80, 60, 50, 40, 20])
def test_numbers_and_intervals_stay_whole(columns):
    everything = Table(HEADERS, ROWS)
    text = everything.text(Surface(columns))
    assert numbers_in(text) == NUMBERS
    for interval in ("[0.483, 0.536] ms", "[0.67, 0.90]", "[1.31, 1.59] ms", "66.2 %"):
        assert interval in text


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [
        (200, []),
        (150, []),
        (115, []),
        (105, ["peak memory"]),
        (80, ["peak memory", "step time"]),
    ],
)
def test_a_narrow_terminal_leaves_out_columns_and_says_which(columns, left_out):
    table, _, note = TABLE.text(Surface(columns)).partition("\n\n")
    assert ("526.3" in table, "0.509" in table) == ("peak memory" not in left_out, "step time" not in left_out)
    if left_out:
        assert note.startswith(f"Left out for lack of width: {', '.join(left_out)}.")
        needed = int(re.search(r"terminal of\s(\d+)", note)[1])
        assert TABLE.text(Surface(needed)).count("\n") == 1 + len(ROWS)
        assert TABLE.text(Surface(needed - 1)).count("\n") > 1 + len(ROWS)
    else:
        assert note == ""


def test_what_nothing_can_be_left_out_of_becomes_a_list():
    text = Table(HEADERS, ROWS).text(Surface(40))
    first, second, third = text.split("\n\n")
    assert first.split("\n")[:3] == [
        "workload        mnist1d-mlp",
        "mode            fp32",
        "step time       0.509 [0.483, 0.536] ms",
    ]
    assert "mixed-dynamic" in second
    assert "mixed-bf16" in third


@pytest.mark.parametrize("columns", [24, 30, 40])
def test_a_list_folds_long_cells_and_stays_within_the_terminal(columns):
    series = ["steps=2000, timing=2s/50, method=5, gpu, NVIDIA H200", "0.509 [0.483, 0.536] ms", "-2.1 % [-9.7, +6.2]"]
    text = Table(["series", "step time", "change"], [series] * 2).text(Surface(columns))
    assert max(map(len, text.split("\n"))) <= columns
    assert [" ".join(block.split()) for block in text.split("\n\n")] == [
        f"series {series[0]} step time {series[1]} change {series[2]}"
    ] * 2


def test_a_long_name_folds_at_its_parts():
    name = "my_company.benchmarks.translation:transformer_large"
    text = Table(["workload", "change"], [[name, "+3.1% [+1.0%, +5.2%]"]]).text(Surface(40))
    first, second = [line.split("  ")[0] for line in text.split("\n")[2:4]]
    assert name.startswith(first + second)
    assert first[-1] in "._:"


def test_colours_carry_nothing_that_the_text_does_not_say():
    coloured, bare = TABLE.text(Surface(120, colour=True)), TABLE.text(Surface(120))
    assert plain(coloured) == bare
    (slower,) = re.findall(r"\x1b\[(\d+)mslower than fp32\x1b\[0m", coloured)
    assert slower == "31"
    assert "\x1b[2m(0.78x" in coloured  # dim, and in parentheses
    assert "\x1b[2m–" in coloured  # noqa: RUF001


def test_a_pipe_gets_every_column_on_one_line_a_row():
    lines = TABLE.text(PIPE).split("\n")
    assert len(lines) == 2 + len(ROWS)
    assert all(cell in line for row, line in zip(ROWS, lines[2:], strict=True) for cell in row)
    forced = TABLE.text(Surface(colour=True)).split("\n")
    assert len(forced) == len(lines)


def test_characters_that_the_terminal_lacks_do_not_shift_columns():
    table = Table(["a", "b"], [["1 … 2", "x"], ["12345678", "y"]])
    _, _, first, second = table.text(Surface(40, encoding="ascii")).split("\n")
    assert first.startswith("1 ... 2 ")
    assert first.index("x") == second.index("y")


def test_wide_characters_take_two_columns():
    _, _, first, second = Table(["a", "b"], [["模型", "x"], ["abcd", "y"]]).text(Surface(40)).split("\n")
    assert first.index("x") + 2 == second.index("y")
