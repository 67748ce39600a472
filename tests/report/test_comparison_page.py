"""What the page of a comparison says, as text; tests/report/test_pages_in_browser.py looks at it."""

from __future__ import annotations

import re
from html import unescape

import pytest
from support.nightly import night, row
from support.runfolder import GPU

from mpscale.analysis.compare import compare_all
from mpscale.cli import main
from mpscale.core.runs import read_run
from mpscale.report.comparison_page import comparison_page

STATIC = "mixed-static"


def words_of(html):
    body = re.sub(r"<style>.*?</style>|<title>.*?</title>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def page_of(tmp_path, *runs, **how):
    """The page of runs, each given as a list of rows and more entries of run.json."""
    folders = [night(tmp_path, day, *rows, **info) for day, (rows, info) in enumerate(runs, 1)]
    return words_of(comparison_page(compare_all([read_run(folder) for folder in folders], **how)))


@pytest.mark.parametrize(
    ("after", "info", "said"),
    [
        ([row(ms=2.0), row(STATIC, 1.0)], {}, "Is B as good as A? ✓ Yes: the same in all 2 rows"),
        ([row(ms=1.0), row(STATIC, 1.0)], {}, "Is B as good as A? ✓ Yes: better in 1 of 2 rows, worse in none"),
        ([row(ms=1.0), row(STATIC, 2.0)], {}, "Is B as good as A? ✗ No: worse in 1 of 2 rows, better in 1"),
        ([row(ms=2.0)], {}, "Is B as good as A? ? No difference shown in 1 of 2 rows"),
        ([row(ms=2.0, digest="x"), row("mixed-bf16", 1.0)], {"force": True}, "measured in different ways"),
        ([row("mixed-bf16", 1.0)], {}, "Is B as good as A? ? Cannot tell: no row of the two runs can be compared"),
        ([row("mixed-bf16", 1.0)], {}, "Not compared: 3 rows toy fp32, toy mixed-static: only in the baseline"),
        ([], {}, "Is B as good as A? ? Cannot tell: no row of the two runs can be compared"),
        ([row(ms=2.0, host_other_cpu_share=0.8)], {}, "! other processes kept the machine busy in 1 of 1 row"),
        ([row(ms=2.0)], {"finish": False}, "! the run did not finish"),
        ([row(ms=2.0)], {}, "! single-run baseline: how much runs of this code differ is assumed"),
        ([row(ms=2.0, spread=(1.0,))], {}, "! one process on a side in 1 row: no interval"),
        ([row(ms=2.0, status="crashed", status_reason="signal 11")], {}, "toy fp32: ✗ 5 cases failed"),
    ],
)  # fmt: skip
def test_the_first_screen(tmp_path, after, info, said):
    how = {"force": info.pop("force")} if "force" in info else {}
    info.setdefault("commit", "01" * 20)
    assert said in page_of(tmp_path, ([row(ms=2.0), row(STATIC, 1.0)], {}), (after, info), **how)


def test_another_device_shows_ratios_within_each_run(tmp_path):
    gpu = {"device": "gpu", "device_name": "Test GPU"}
    after = [row(ms=9.0, **gpu), row("tf32", 6.0, **gpu), row(STATIC, 3.0, **gpu)]
    said = page_of(tmp_path, ([row(ms=2.0), row(STATIC, 1.0)], {}), (after, {"device": GPU}))
    assert (
        "Cannot tell: another device, so only ratios within each run are shown; metric as good in 2 of 3 rows" in said
    )
    assert "A 2.00x ✓ faster B 2.00x over tf32 ✓ faster" in said
    assert "! other device: times, memory and energy are not judged" in said


def test_six_runs_have_an_answer_each(tmp_path):
    said = page_of(tmp_path, *(([row(ms=2.0 + (day == 3))], {}) for day in range(6)))
    answers = re.findall(r"\b([B-F]) [✓✗?] (Yes|No)", said)
    assert answers == [("B", "Yes"), ("C", "Yes"), ("D", "No"), ("E", "Yes"), ("F", "Yes")]


def test_it_has_the_tables_of_the_command(tmp_path, capsys):
    folders = [str(night(tmp_path, day, row(ms=2.0 * day), row(STATIC, 1.0))) for day in (1, 2)]
    command = ["compare", *folders, "--results", str(tmp_path), "--fail-on", "step_time>5%"]
    assert main(command) == 1
    without = capsys.readouterr().out
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().out == without
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<code>mpscale ab</code>") == 1
    said = words_of(re.sub("</?code>", "`", page))
    cells = [cell for line in without.splitlines() for cell in re.split(r" {2,}", line) if cell.strip("- ")]
    assert [cell for cell in cells if " ".join(cell.split()) not in said] == []
    assert "Gates 1 of 2 checks fired ✗ fired: step_time>5%, toy fp32" in said
