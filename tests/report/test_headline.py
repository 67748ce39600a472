"""No claim about speed where the step time shows none: in words, tables and pictures alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.runfolder import GPU, finished, record, write_run

from mpscale.analysis.claim import Doubt
from mpscale.core.runs import read_run
from mpscale.report.document import document, render
from mpscale.report.findings import findings
from mpscale.report.gains_figure import gains
from mpscale.report.github_summary import github_summary
from mpscale.report.sections import doubts_note, results
from mpscale.report.table import Table
from mpscale.report.words import DOUBTS

RECORDED = Path(__file__).parents[1] / "data" / "20261126T153730Z-nvidia-h200-1b51"
CLAIM = re.compile(r"times the speed|(?<!\()\b(?!1\.00x)\d+\.\d\dx")
"""A sentence about speed, or a ratio outside of parentheses other than that of a mode over itself."""


@pytest.fixture(scope="module")
def recorded():
    """Five modes on an H200 that idled for most of each step, a process each. Its first report claimed 0.43 times."""
    return read_run(RECORDED)


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(findings, id="words"),
        pytest.param(lambda run: results(run).text(), id="terminal"),
        pytest.param(lambda run: render(document(run)), id="report"),
        pytest.param(github_summary, id="GitHub"),
    ],
)
def test_an_idle_gpu_gives_no_claim_anywhere(recorded, written):
    text = written(recorded)
    assert CLAIM.findall(text) == []
    if written is not findings:
        assert "(0.43x)" in text
        assert f"no claim: {DOUBTS[Doubt.IDLE]}, {DOUBTS[Doubt.DISPATCH]}, {DOUBTS[Doubt.ONE_PAIR]}" in text


def test_the_words_say_how_busy_the_gpu_was_and_what_to_do(recorded):
    (line,) = [line for line in findings(recorded).splitlines() if line.startswith("- **mnist1d-mlp**")]
    assert re.search(r"no claim about the speed of [^;.]*mixed-dynamic[^;.]*: the GPU was busy 10 % of a step", line)
    assert "use a larger batch, or --mp-steps-per-call" in github_summary(recorded)


def test_no_speed_is_drawn(recorded):
    picture = gains(recorded)
    assert "speed-up over" not in picture.svg
    assert "No speed-up drawn for 4 rows (" in picture.caption
    assert picture.caption.count(Doubt.IDLE.text) == 1


def test_blocks_in_two_groups_are_said_also_of_a_run_that_had_no_columns_for_them(recorded):
    assert "1 process jumped between two levels" in findings(recorded)
    assert "mnist1d-mlp--fp32--s0--r0 (0.220 and 0.456 ms)" in render(document(recorded))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("20261126T191040Z-nvidia-h200-32b6", True),
        ("20261126T191258Z-nvidia-h200-fc37", False),
        ("20261127T062509Z-amd-epyc-e954", False),
    ],
    ids=["GPU without XLA", "GPU with XLA", "CPU"],
)
def test_a_gpu_run_without_xla_says_what_that_does(run, said):
    read = read_run(RECORDED.parents[2] / "results" / "reference" / run)
    timing = " ".join(part for part in document(read).parts_of("Timing quality") if isinstance(part, str))
    assert ("Steps were not compiled with XLA" in findings(read), "a kernel of its own" in timing) == (said, said)


def gpu_run(tmp_path, number=2, **values):
    records = [
        record(
            mode, seed, device="gpu", step_time_ms_median=ms, device_busy_ms_per_step=busy, device_busy_share=busy / ms
        )
        for mode, ms, busy in (("fp32", 1.0, 0.3), ("mixed-static", 1.25, 0.15))
        for seed in range(number)
    ]
    for one in records:
        one.update(values)
    return read_run(write_run(tmp_path, finished(records), device=GPU))


def test_the_speed_up_by_gpu_time_is_given_as_such(tmp_path):
    run = gpu_run(tmp_path)
    assert "the GPU was busy 12 % of a step" in findings(run)
    assert "; by GPU time alone mixed-static is 2.00 times the speed of fp32." in findings(run)
    (timing,) = [part for part in document(run).parts_of("Timing quality") if isinstance(part, Table)]
    cells = dict(zip(timing.headers, timing.rows[1], strict=True))
    names = ("GPU ms per step", "GPU busy", "GPU time: fp32 / mode")
    assert [cells[name] for name in names] == ["0.150", "12 %", "2.00"]


def test_a_busy_gpu_and_several_processes_make_a_claim(tmp_path):
    run = gpu_run(tmp_path, device_busy_share=0.95)
    assert "- **toy**: mixed-static is slower than fp32 (0.80 times the speed)." in findings(run)
    assert (results(run).rows[1][3:5], doubts_note([])) == (["0.80x [0.80, 0.80]", "slower than fp32"], "")
    assert "speed-up over fp32" in gains(run).svg


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"dispatch_bound": True, "dispatch_share": 0.63},
            "dispatch in Python and TensorFlow took 63 % of a step",
        ),
        ({"host_other_cpu_share": 0.34}, "other processes took 34 % of the machine's CPU time"),
    ],
)
def test_other_doubts_are_said_with_their_figures(tmp_path, values, said):
    words = findings(gpu_run(tmp_path, device_busy_share=0.9, **values))
    assert f"no claim about the speed of mixed-static: {said}" in words
    assert "only one pair" not in words
