"""The pictures of a run, read back from their SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from support.runfolder import GPU, finished, record, write_run, write_steps

from mpscale.analysis.claim import Doubt
from mpscale.core.mode import MODES
from mpscale.core.runs import read_run
from mpscale.report.figures import looks
from mpscale.report.gains_figure import gains
from mpscale.report.training_figure import training

SVG = "{http://www.w3.org/2000/svg}"


def run_of(tmp_path, *records, steps=None, **options):
    path = write_run(tmp_path, finished(records), **options)
    for case_id, rows in (steps or {}).items():
        lines = "".join(f"{step},{loss},{scale},{overflow}\n" for step, (loss, scale, overflow) in enumerate(rows))
        write_steps(path, case_id, "step,loss,loss_scale,overflow\n" + lines)
    return read_run(path)


def root_of(picture):
    return ET.fromstring(picture.svg)


def texts(root):
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def titles(root):
    """Titles of panels. A title of several lines is several texts."""
    return " ".join(texts(root))


def groups(root, name):
    return [group for group in root.iter(f"{SVG}g") if group.get("id") == name]


def x_of_point(root, name):
    (group,) = groups(root, name)
    return float(next(group.iter(f"{SVG}use")).get("x"))


def x_of_line(root, name):
    (group,) = groups(root, name)
    return float(next(group.iter(f"{SVG}path")).get("d").split()[1])


def timed(mode, ms, seed=0, **values):
    return record(mode, seed, step_time_ms_median=ms, **values)


def pair(mode, ms, **values):
    """Two processes: a single one shows no speed-up."""
    return [timed(mode, ms, seed, **values) for seed in (0, 1)]


def trained(mode, value, seed, higher=True, **values):
    metric = {"metric_value": value, "metric_name": "loss" if not higher else "accuracy"}
    return record(mode, seed, **metric, metric_higher_is_better=higher, metric_margin=0.01, **values)


@pytest.mark.parametrize(("ms", "side"), [(4.0, 1), (8.0, 0), (16.0, -1)])
def test_faster_is_right_of_the_line(tmp_path, ms, side):
    root = root_of(gains(run_of(tmp_path, *pair("fp32", 8.0), *pair("mixed-static", ms))))
    found = x_of_point(root, "gain-1-1") - x_of_line(root, "neutral-1")
    assert found == pytest.approx(0, abs=0.01) if side == 0 else found * side > 1


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize(("value", "side"), [(0.92, 1), (0.88, -1)])
def test_better_is_right_of_the_line_whatever_the_direction_of_the_metric(tmp_path, higher, value, side):
    records = [
        trained(mode, v, seed, higher) for mode, v in (("fp32", 0.9), ("mixed-static", value)) for seed in (0, 1)
    ]
    root = root_of(gains(run_of(tmp_path, *records)))
    assert (x_of_point(root, "gain-1-1") - x_of_line(root, "neutral-1")) * side * (1 if higher else -1) > 1


def test_only_known_quantities_have_a_panel(tmp_path):
    run = run_of(tmp_path, *pair("fp32", 8.0), *pair("mixed-static", 4.0))
    found = titles(root_of(gains(run)))
    assert found.count(" over fp32") == found.count("speed-up over fp32") == 1
    known = {"gpu_memory_nvml_peak_mib": 1000.0, "gpu_energy_j_per_step": 0.5}
    run = run_of(tmp_path / "gpu", *pair("fp32", 8.0, **known), *pair("mixed-static", 4.0, **known), device=GPU)
    found = titles(root_of(gains(run)))
    assert all(f"{name} over fp32" in found for name in ("speed-up", "peak GPU memory", "GPU energy"))
    assert "margins" not in found


def test_the_baseline_of_the_speed_up_is_the_users_default(tmp_path):
    run = run_of(tmp_path, *pair("fp32", 8.0), *pair("tf32", 4.0), *pair("mixed-static", 4.0), device=GPU)
    root = root_of(gains(run))
    assert "speed-up over tf32" in texts(root)
    assert not groups(root, "gain-1-1")
    assert x_of_point(root, "gain-1-2") == pytest.approx(x_of_line(root, "neutral-1"), abs=0.01)


def test_doubtful_speed_ups_are_not_drawn_but_those_by_gpu_time_are(tmp_path):
    idle = {"device_busy_share": 0.12}
    times = {"fp32": (8.0, 1.0), "mixed-static": (16.0, 0.5), "mixed-bf16": (4.0, 0.8)}
    records = [
        timed(mode, ms, seed, device_busy_ms_per_step=busy, **idle)
        for mode, (ms, busy) in times.items()
        for seed in ((0,) if mode == "mixed-bf16" else (0, 1))
    ]
    picture = gains(run_of(tmp_path, *records, device=GPU))
    root = root_of(picture)
    assert "by GPU time alone" in titles(root)
    assert x_of_point(root, "gain-1-1") > x_of_line(root, "neutral-1") + 1
    assert not groups(root, "gain-1-2") + groups(root, "neutral-2")
    for mode in ("mixed-static", "mixed-bf16"):
        assert f"No speed-up drawn for toy, {mode}: {Doubt.IDLE.text}" in picture.caption


def test_a_mode_without_figures_shows_its_statuses(tmp_path):
    lost = record("mixed-static", status="crashed")
    root = root_of(gains(run_of(tmp_path, *pair("fp32", 8.0), lost, *pair("mixed-dynamic", 9.0))))
    assert {"mixed-static (crashed 1)", "mixed-dynamic"} <= set(texts(root))


def test_a_mode_that_lost_a_seed_shows_it_next_to_the_figures_of_the_others(tmp_path):
    values = [("fp32", 0), ("fp32", 1), ("mixed-static", 0)]
    lost = record("mixed-static", 1, status="diverged", metric_margin=0.01)
    root = root_of(gains(run_of(tmp_path, *(trained(mode, 0.9, seed) for mode, seed in values), lost)))
    assert groups(root, "gain-1-1")
    assert "mixed-static (ok 1, diverged 1)" in texts(root)


def test_an_interval_of_two_processes_does_not_flatten_the_rest(tmp_path):
    pairs = [("fp32", (1.0, 1.0)), ("mixed-static", (0.1, 10.0)), ("mixed-dynamic", (0.5, 0.5))]
    records = [timed(mode, ms, seed) for mode, times in pairs for seed, ms in enumerate(times)]
    root = root_of(gains(run_of(tmp_path, *records)))
    # Twice the speed is visible as such, although the other interval reaches into the millions.
    assert x_of_point(root, "gain-1-2") - x_of_line(root, "neutral-1") > 50


def test_a_lost_training_does_not_flatten_the_rest(tmp_path):
    values = {"fp32": 0.9, "mixed-static": 0.1, "mixed-dynamic": 0.91}
    records = [trained(mode, value, seed) for mode, value in values.items() for seed in (0, 1)]
    root = root_of(gains(run_of(tmp_path, *records)))
    assert not groups(root, "gain-1-1")
    assert "-80" in texts(root)
    assert x_of_point(root, "gain-1-2") - x_of_line(root, "neutral-1") > 50


@pytest.mark.parametrize("records", [[], [timed("fp32", 1.0)], [record("mixed-static", status="crashed")]])
def test_nothing_is_drawn_if_nothing_can_be_compared(tmp_path, records):
    run = run_of(tmp_path, *records)
    assert gains(run) is None
    assert training(run) is None


def test_every_overflow_has_a_cross_at_its_step(tmp_path):
    rows = [(1.0, 64 if step < 3 else 32, int(step == 2)) for step in range(6)]
    steps = {"toy--mixed-dynamic--s0--r0": rows, "toy--fp32--s0--r0": [(1.0, "", "")] * 6}
    picture = training(run_of(tmp_path, record("fp32"), record("mixed-dynamic"), steps=steps))
    (group,) = groups(root_of(picture), "overflow-1")
    assert len(list(group.iter(f"{SVG}use"))) == 1
    assert "cross" in picture.caption
    assert {"toy: loss", "toy: loss scale", "fp32", "mixed-dynamic"} <= set(texts(root_of(picture)))


def test_without_a_loss_scale_there_is_no_panel_for_it(tmp_path):
    steps = {"toy--fp32--s0--r0": [(1.0, "", ""), (0.5, "", "")]}
    picture = training(run_of(tmp_path, record("fp32"), steps=steps))
    assert "toy: loss" in texts(root_of(picture))
    assert not any("loss scale" in text for text in texts(root_of(picture)))
    assert "scale" not in picture.caption


def segments(group):
    """The number of pieces and of points of a line."""
    path = (next(group.iter(f"{SVG}path")).get("d") or "").split()
    return path.count("M"), path.count("M") + path.count("L")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 0.5, 0.25], (1, 3)),
        ([1.0, 0.5, float("nan"), 0.25, 0.2], (2, 4)),
        ([1.0, 0.5, float("inf"), float("nan")], (1, 2)),
        ([1.0 / (1 + step) for step in range(1000)], (1, 100)),
    ],
)
def test_a_line_of_losses_breaks_where_none_is_finite_and_has_at_most_a_hundred_points(tmp_path, losses, expected):
    steps = {"toy--fp32--s0--r0": [(loss, "", "") for loss in losses]}
    picture = training(run_of(tmp_path, record("fp32"), steps=steps))
    (group,) = groups(root_of(picture), "loss-1")
    assert segments(group) == expected


@pytest.mark.parametrize(
    ("scales", "points"),
    [
        ([8.0] * 1000, 3),  # each but the first includes the corner before it
        ([8.0] * 500 + [4.0] * 500, 5),
        ([float("inf")] * 3 + [0.0] * 3, 0),
    ],
)
def test_a_loss_scale_is_a_line_of_steps(tmp_path, scales, points):
    steps = {"toy--mixed-keras--s0--r0": [(1.0, scale, 0) for scale in scales]}
    picture = training(run_of(tmp_path, record("mixed-keras"), steps=steps))
    (group,) = groups(root_of(picture), "scale-1")
    assert segments(group)[1] == points


def test_steps_that_always_overflow_do_not_swell_the_picture(tmp_path):
    steps = {"toy--mixed-static--s0--r0": [(1.0, 128, 1)] * 20_000}
    picture = training(run_of(tmp_path, record("mixed-static", status="stalled"), steps=steps))
    (group,) = groups(root_of(picture), "overflow-1")
    assert 100 < len(list(group.iter(f"{SVG}use"))) <= 150
    assert len(picture.svg) < 100_000


def test_seeds_of_unequal_length_and_unreadable_steps_do_not_prevent_the_picture(tmp_path):
    steps = {"toy--fp32--s0--r0": [(1.0, "", "")] * 3, "toy--fp32--s1--r0": [(0.5, "", "")] * 250}
    run = run_of(tmp_path, record("fp32", 0), record("fp32", 1), record("fp32", 2), steps=steps)
    (run.path / "steps" / "toy--fp32--s2--r0.csv.gz").write_bytes(b"no gzip")
    assert training(run).caption.endswith("Not drawn: 1 training whose steps cannot be read.")


def test_names_stay_text(tmp_path):
    name = "<b>&\x07$x$"
    records = [one for mode in ("fp32", "mixed-static") for one in pair(mode, 1.0, workload=name)]
    assert "<b>& $x$" in texts(root_of(gains(run_of(tmp_path, *records))))


def test_no_two_modes_look_alike_and_each_stands_out_from_white():
    found = looks([*MODES, "mode-of-tomorrow", "and-another"])
    assert len({look.colour for name, look in found.items() if name in MODES}) == len(MODES)
    assert len({look.marker for look in found.values()}) == len(found)
    for look in found.values():
        # WCAG 2.2 requires 3 for graphical objects.
        assert 1.05 / (luminance(*bytes.fromhex(look.colour[1:])) + 0.05) >= 3, look


def luminance(*channels):
    """Relative luminance of red, green and blue, each 0 to 255; WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in channels)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["mixed-static", "mode-of-tomorrow"])
def test_a_mode_has_the_same_colour_in_both_pictures(tmp_path, mode):
    steps = {f"toy--{name}--s0--r0": [(1.0, 8, 0)] * 3 for name in ("fp32", mode)}
    run = run_of(tmp_path, *pair("fp32", 2.0), *pair(mode, 1.0), steps=steps)
    colour = looks([mode])[mode].colour.lower()
    assert f"stroke: {colour}" in gains(run).svg
    assert f"stroke: {colour}" in training(run).svg


def test_only_the_first_ten_seeds_are_drawn_and_the_caption_says_so(tmp_path):
    records = [record("mixed-dynamic", seed) for seed in range(12)]
    steps = {one["case_id"]: [(1.0, 2.0 ** one["seed"], 0)] * 3 for one in records}
    picture = training(run_of(tmp_path, *records, steps=steps))
    assert len(groups(root_of(picture), "scale-1")) == 10
    assert "Drawn: the first 10 seeds of each mode." in picture.caption
    few = training(run_of(tmp_path / "few", *records[:10], steps=dict(list(steps.items())[:10])))
    assert "Drawn" not in few.caption
