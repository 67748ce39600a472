"""The picture of a history, read back from its SVG, and measured where texts could overlap."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import datetime, timedelta

import pytest
from support.runfolder import CPU, GPU, finished, record, write_run
from support.svg import SVG, texts

from mpscale.analysis.history import make_history
from mpscale.core.mode import MODES
from mpscale.core.runs import read_run
from mpscale.report import figures
from mpscale.report import history as history_figure
from mpscale.report.figures import FigureError
from mpscale.report.history import draw_history

START = datetime(2026, 1, 2, 3, 4)


def case(workload, mode, seed, time, **values):
    key = f"{workload}/abc/{mode}/batch=1,steps=2/method=1"
    return record(mode, seed, workload=workload, **{"series_key": key, "step_time_ms_median": time, **values})


def runs_of(folder, number, workloads=("toy",), modes=("fp32", "mixed-static"), hours=24, seeds=2, **info):
    """Runs with slightly different times, a day apart by default."""
    runs = []
    for day in range(number):
        at = START + timedelta(hours=hours * day)
        cases = [
            case(w, m, seed, 1.0 + 0.1 * seed + 0.01 * day + 0.2 * place)
            for w in workloads
            for place, m in enumerate(modes)
            for seed in range(seeds)
        ]
        named = {"name": f"run-{day}", "started": at.isoformat(), **info}
        runs.append(read_run(write_run(folder, finished(cases), **named)))
    return runs


def svg_of(history, tmp_path):
    draw_history(history, tmp_path / "h.svg")
    return ET.parse(tmp_path / "h.svg").getroot()


def groups(root, start):
    return {g.get("id"): g for g in root.iter(f"{SVG}g") if (g.get("id") or "").startswith(start)}


def points_of(group):
    """The path of the line in a group: commands and coordinates. A gap starts a new segment."""
    return group.find(f"{SVG}path").get("d").split()


def laid_out(history):
    """The figure after layout, and every drawn text with its box in pixels."""
    from matplotlib.text import Text

    with figures.house_style():
        figure = history_figure._history_figure(history)
        figure.canvas.draw()
        found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        return figure, [(text.get_text(), text.get_window_extent()) for text in found]


def test_one_panel_for_each_workload_and_one_line_for_each_series(tmp_path):
    root = svg_of(make_history(runs_of(tmp_path, 3, workloads=("a", "b"), modes=("fp32", "tf32", "article"))), tmp_path)
    assert list(groups(root, "panel-")) == ["panel-1", "panel-2"]
    assert list(groups(root, "line-")) == [f"line-{panel}-{line}" for panel in (1, 2) for line in (1, 2, 3)]
    for panel, name in (("panel-1", "a"), ("panel-2", "b")):
        shown = texts(groups(root, panel)[panel])
        assert name in shown
        assert "step time (ms)" in shown
        assert [text for text in shown if text.startswith("2026")] == ["2026-01-02", "2026-01-03", "2026-01-04"]
    for name, line in groups(root, "line-").items():
        mode = ("fp32", "tf32", "article")[int(name[-1]) - 1]
        assert f"stroke: {MODES[mode].colour.lower()}" in ET.tostring(line, "unicode")
    legend = texts(groups(root, "legend")["legend"])
    assert [text for text in legend if text in MODES] == ["fp32", "tf32", "article"]


def test_a_line_has_a_point_for_each_run_and_a_gap_for_a_missing_value(tmp_path):
    runs = runs_of(tmp_path, 2)
    lost = [case("toy", "fp32", 0, 1.0, status="diverged")]
    runs.append(read_run(write_run(tmp_path, finished(lost), name="lost", started="2026-01-05T00:00:00")))
    for name, day in (("x", 6), ("y", 7)):
        cases = finished([case("toy", "fp32", 0, 1.0)])
        runs.append(read_run(write_run(tmp_path, cases, name=name, started=f"2026-01-{day:02d}T00:00:00")))
    (line,) = groups(svg_of(make_history(runs, modes=["fp32"]), tmp_path), "line-").values()
    # M starts a stretch and L goes on with it: two runs, the gap, two runs.
    assert [step for step in points_of(line) if step.isalpha()] == ["M", "L", "M", "L"]
    assert len(list(line.iter(f"{SVG}use"))) == 4


def test_runs_of_two_machines_are_two_distinct_lines(tmp_path):
    gpu = finished([case("toy", "fp32", 0, 0.5)])
    runs = [*runs_of(tmp_path, 2), read_run(write_run(tmp_path, gpu, name="gpu", device=GPU))]
    root = svg_of(make_history(runs, modes=["fp32"]), tmp_path)
    assert list(groups(root, "line-")) == ["line-1-1", "line-1-2"]
    legend = texts(groups(root, "legend")["legend"])
    assert {"fp32 (Test CPU)", "fp32 (Test GPU)"} <= set(legend)


def test_a_single_run_is_drawn_as_points(tmp_path):
    lines = groups(svg_of(make_history(runs_of(tmp_path, 1)), tmp_path), "line-")
    assert len(lines) == 2
    for line in lines.values():
        assert len(list(line.iter(f"{SVG}use"))) == 1


@pytest.mark.parametrize(
    ("workloads", "number", "hours"),
    [("a", 1, 24), ("abc", 3, 24), ("abc", 50, 24), ("abcde", 3, 1), ("abcde", 50, 1)],
)
def test_no_text_touches_another_or_leaves_the_picture(tmp_path, workloads, number, hours):
    modes = ("fp32", "tf32", "mixed-static", "mixed-dynamic", "mixed-bf16")
    figure, boxes = laid_out(make_history(runs_of(tmp_path, number, workloads, modes, hours=hours, seeds=1)))
    width, height = figure.get_size_inches() * figure.dpi
    assert width == 1000
    for place, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        for other, with_box in boxes[:place]:
            assert not box.overlaps(with_box), (text, other)


def test_long_labels_stay_inside_the_picture(tmp_path):
    device = "Processor of a Name That Goes On and On (R) with Every Feature It Was Ever Sold For, Revision 2"
    cases = finished([case("toy", "mixed-dynamic", 0, 1.0)])
    runs = [
        read_run(write_run(tmp_path, cases, name=name, device={**CPU, "name": text}))
        for name, text in (("x", device), ("y", device + " and Yet Another Forty Characters of It"))
    ]
    _, boxes = laid_out(make_history(runs))
    assert max(box.x1 for _, box in boxes) <= 1000
    assert sum("Processor" in text for text, _ in boxes) == 2


def test_dates_thin_out_and_the_newest_run_keeps_its_own(tmp_path):
    root = svg_of(make_history(runs_of(tmp_path, 50, seeds=1)), tmp_path)
    dates = [text for text in texts(groups(root, "panel-")["panel-1"]) if text.startswith("2026")]
    assert 5 <= len(dates) <= 12
    assert dates[-1] == "2026-02-20"


def test_runs_of_one_day_show_the_time(tmp_path):
    root = svg_of(make_history(runs_of(tmp_path, 2, hours=2)), tmp_path)
    assert [text for text in texts(root) if ":" in text and len(text) == 5] == ["03:04", "05:04"]


def test_a_run_of_unknown_age_shows_the_end_of_its_name(tmp_path):
    name = "somewhere/in/a/folder/cases"
    root = svg_of(make_history(runs_of(tmp_path, 1, started=None, run=name)), tmp_path)
    assert f"…{name[-17:]}" in texts(root)


def test_names_are_not_read_as_formulas(tmp_path):
    assert "$x_1$ & <y>" in texts(svg_of(make_history(runs_of(tmp_path, 1, workloads=("$x_1$ & <y>",))), tmp_path))


@pytest.mark.parametrize(
    ("quantity", "values", "bottom", "top"),
    [
        ("step_time", {"step_time_ms_median": 5.0}, 0.0, 5.4),
        ("host_memory", {"host_memory_peak_mib": 500.0}, 0.0, 540.0),
        ("overflow_rate", {"attempted_steps": 10, "overflow_steps": 0}, -0.0003, 0.01),
        ("metric", {"metric_name": "accuracy", "metric_value": 0.8}, 0.76, 0.84),
        ("metric", {"metric_name": "loss", "metric_value": 0.0}, -1.0, 1.0),
    ],
)
def test_axes_start_at_0_except_for_a_metric(tmp_path, quantity, values, bottom, top):
    one = record(series_key="toy/abc/fp32/batch=1,steps=2/method=1", **values)
    figure, _ = laid_out(make_history([read_run(write_run(tmp_path, finished([one])))], quantity))
    assert figure.axes[0].get_ylim() == pytest.approx((bottom, top))


def test_an_interval_of_two_processes_that_disagree_does_not_flatten_the_rest(tmp_path):
    cases = [case("toy", "fp32", seed, time) for seed, time in enumerate((1.0, 1e12))]
    cases += [case("toy", "tf32", seed, time) for seed, time in enumerate((1e-12, 1e12))]
    figure, _ = laid_out(make_history([read_run(write_run(tmp_path, finished(cases)))]))
    assert figure.axes[0].get_ylim()[1] == pytest.approx(2.16e6)


def test_the_same_history_gives_the_same_file(tmp_path):
    history = make_history(runs_of(tmp_path, 3))
    for name in ("one.svg", "two.svg"):
        draw_history(history, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"<dc:date>" not in (tmp_path / "one.svg").read_bytes()


def test_a_png_is_1000_pixels_wide_on_white(tmp_path):
    from matplotlib.image import imread

    draw_history(make_history(runs_of(tmp_path, 3)), tmp_path / "h.PNG")
    pixels = imread(tmp_path / "h.PNG", format="png")
    assert pixels.shape[1] == 1000
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["h.pdf", "h.svg.gz", "h", ".png"])
def test_other_kinds_of_files_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(FigureError, match=r"end it in \.svg or \.png"):
        draw_history(make_history(runs_of(tmp_path, 1)), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_matplotlib_is_not_imported_until_something_is_drawn():
    modules = "mpscale.report.history, mpscale.report.files"
    code = f"import sys, {modules}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
