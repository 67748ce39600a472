"""What the page of a history shows, and that it stays light."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html import unescape

import pytest
from support.nightly import night, row
from support.runfolder import GPU

from mpscale.analysis.history import History, Point, RunFacts, Series, make_history
from mpscale.analysis.neighbours import Neighbours
from mpscale.analysis.quantities import QUANTITIES, Verdict
from mpscale.analysis.stats import Between
from mpscale.cli import main
from mpscale.core.runs import read_run
from mpscale.report.history_page import history_page
from mpscale.report.history_panel import Step, band_of, panel_svg, worst_of

STATIC = "mixed-static"


def page_of(folders, quantity="step_time", **how):
    runs = [read_run(folder) for folder in folders]
    return history_page([make_history(runs, quantity)], Neighbours(runs), **how)


def panels_of(page):
    """The text of each panel, by its title."""
    found = re.findall(r'<article class="panel[^"]*"><h4>(.*?)</h4>(.*?)</article>', page, re.S)
    return {plain(title): plain(re.sub(r"<svg.*?</svg>", "", inside, flags=re.S)) for title, inside in found}


def plain(html):
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_a_panel_has_its_last_value_change_and_verdict(tmp_path):
    folders = [night(tmp_path, day, row(ms=2.0), row(STATIC, 1.0 + (day > 2))) for day in (1, 2, 3, 4)]
    page = page_of(folders)
    assert panels_of(page) == {
        "fp32": "2.00 [2.00, 2.00] ms 2026-01-04 0404040 +0.0 % [-0.2, +0.2] since the run before: ✓ the same "
        "noise floor unknown",
        STATIC: "2.00 [2.00, 2.00] ms 2026-01-04 0404040 +0.0 % [-0.2, +0.2] since the run before: ✓ the same "
        "✗ slower +100.0 % [+99.5, +100.5] 2026-01-03 0303030 noise floor unknown",
    }
    assert len(re.findall('<path class="step bad"', page)) == 1
    assert "The last run shows no change in 2 rows" in page


def test_what_was_measured_differently_or_elsewhere_is_not_joined(tmp_path):
    gpu = {"device": "gpu", "device_name": "Test GPU"}
    folders = [
        *(night(tmp_path, day, row(ms=2.0), device={"kind": "cpu", "name": "Test CPU"}) for day in (1, 2)),
        *(night(tmp_path, day, row(ms=4.0, **gpu), device=GPU) for day in (3, 4)),
        *(night(tmp_path, day, row(ms=8.0, digest="sha256:2"), device={"kind": "cpu", "name": "Test CPU"})
          for day in (5, 6)),
        night(tmp_path, 7, row(ms=9.0, workload="new")),
    ]  # fmt: skip
    page = page_of(folders)
    assert len(panels_of(page)) == 3
    assert len(re.findall('<path class="step', page)) == 0
    assert [len(re.findall('class="dot"', panel)) for panel in page.split("<article")[1:]] == [2, 2, 2]
    assert "Measured once: 1 series" in page


@pytest.mark.parametrize(
    ("quantity", "words"),
    [
        ("metric", "since the run before: ✗ worse worst"),
        ("overflow_rate", "since the run before: not judged"),
        ("speedup", "since the run before: not judged"),
        ("host_memory", "since the run before: ✓ the same"),
    ],
)
def test_every_quantity_has_a_page(tmp_path, quantity, words):
    rows = [([row(ms=2.0), row(STATIC, 1.0, metric=0.9 - day / 10)]) for day in (1, 2, 3)]
    folders = [night(tmp_path, day, *some) for day, some in enumerate(rows, 1)]
    assert words.removesuffix(" worst") in panels_of(page_of(folders, quantity))[STATIC]


def series_of(values, spread=0.01):
    start = datetime(2024, 1, 1, tzinfo=UTC)
    points = [
        Point(
            RunFacts(f"run-{day}", start + timedelta(days=day), True, f"{day:040x}", False, "2.21.0"),
            value, value and value * (1 - spread), value and value * (1 + spread), 5, 0.01, -0.02, 0.04,
        )
        for day, value in enumerate(values)
    ]  # fmt: skip
    return Series("toy", "fp32", "key", {"kind": "cpu", "name": "Test CPU"}, "", "accuracy", points)


def test_a_thousand_runs_are_drawn_as_few_bars_that_hold_all_values():
    values = [1.0 + day % 7 / 100 for day in range(1000)]
    values[500] = 3.0
    svg = panel_svg(QUANTITIES["step_time"], series_of(values), [Step(500, Verdict.SLOWER)], None)
    assert len(svg) < 40_000
    bars = re.findall(r"<title>(\d+) runs, [^<]*: ([\d.]+) ms to ([\d.]+) ms", svg)
    assert sum(int(number) for number, _, _ in bars) == 1000 and len(bars) <= 75
    assert max(float(high) for _, _, high in bars) == 3.0
    assert len(re.findall('class="step bad"', svg)) == 1 and len(re.findall('class="dot"', svg)) == 1


def test_every_run_of_a_short_history_has_a_dot_with_its_commit():
    svg = panel_svg(QUANTITIES["step_time"], series_of([1.0, None, 2.0]), [], None)
    titles = re.findall(r'<circle class="dot"[^>]*><title>([^<]*)', svg)
    assert titles == [
        "2024-01-01 00:00 · run-0 · 0000000 · 1.00 [0.99, 1.01] ms · +1.0 % [-2.0, +4.0] against the value before",
        "2024-01-03 00:00 · run-2 · 0000000 · 2.00 [1.98, 2.02] ms · +1.0 % [-2.0, +4.0] against the value before",
    ]


def test_small_noise_does_not_fill_the_panel():
    svg = panel_svg(QUANTITIES["step_time"], series_of([1.0, 1.001, 0.999], spread=0.0), [], None)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    assert max(heights) - min(heights) < 5


def test_the_noise_band_is_around_runs_of_the_code_that_its_floor_is_from():
    points = series_of([1.0, 1.0, 4.0]).points
    band = band_of(points, ["run-0", "run-1"], Between(0.01, 4.0, 5))
    assert band is not None
    assert (band.low, band.high) == pytest.approx((0.822, 1.2165), rel=1e-3)  # exp(1.96 * 0.1)
    assert band_of(points, ["run-0", "run-1"], None) is None
    assert band_of(points, ["run-0", "run-1"], Between(0.01, 4.0, 0)) is None


@pytest.mark.parametrize(
    ("quantity", "higher_is_better", "place"),
    [("step_time", None, 1), ("speedup", None, 2), ("metric", True, 2), ("metric", False, 1), ("metric", None, None)],
)
def test_the_worst_value_depends_on_the_direction(quantity, higher_is_better, place):
    points = series_of([2.0, 3.0, 1.0]).points
    assert worst_of(QUANTITIES[quantity], points, higher_is_better) == place


def test_the_option_leaves_the_other_output_as_it_is(tmp_path, capsys):
    for day in (1, 2):
        night(tmp_path, day, row(ms=2.0))
    command = ["history", "--results", str(tmp_path), "--format", "json"]
    assert main(command) == 0
    without = capsys.readouterr().out
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == without
    assert "History of the step time" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_was_left_out_is_on_the_page(tmp_path):
    runs = [read_run(night(tmp_path, day, row(ms=2.0))) for day in (1, 2)]
    history = make_history(runs, skipped=[("results/runs/torn", "not <readable>")])
    assert isinstance(history, History)
    page = history_page([history], Neighbours(runs), links={runs[1].name: "runs/b.html"})
    assert "results/runs/torn: not &lt;readable&gt;" in page and 'href="runs/b.html"' in page
