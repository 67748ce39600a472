"""The picture of what modes buy and cost, read back from its SVG."""

from __future__ import annotations

import pytest
from support.runfolder import GPU, record
from support.svg import SVG, groups, pair, path_of, place_of, root_of, run_of, texts, timed, trained

from mpscale.analysis.claim import Doubt
from mpscale.report.figures import looks
from mpscale.report.gains_figure import gains
from mpscale.report.tradeoff_figure import tradeoff
from mpscale.report.training_figure import training


def neutral(root, name):
    return path_of(root, name)[0][0]


@pytest.mark.parametrize(("ms", "side"), [(4.0, 1), (8.0, 0), (16.0, -1)])
def test_faster_is_right_of_the_line(tmp_path, ms, side):
    root = root_of(gains(run_of(tmp_path, *pair("fp32", 8.0), *pair("mixed-static", ms))))
    found = place_of(root, "gain-1-1") - neutral(root, "neutral-1-1")
    assert found == pytest.approx(0, abs=0.02) if side == 0 else found * side > 1


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize(("value", "side"), [(0.92, 1), (0.88, -1)])
def test_better_is_right_of_the_line_whatever_the_direction_of_the_metric(tmp_path, higher, value, side):
    records = [
        trained(mode, v, seed, higher) for mode, v in (("fp32", 0.9), ("mixed-static", value)) for seed in (0, 1)
    ]
    root = root_of(gains(run_of(tmp_path, *records)))
    assert (place_of(root, "gain-1-1") - neutral(root, "neutral-1-1")) * side * (1 if higher else -1) > 1


def test_a_difference_of_metrics_is_in_points_with_the_margin_of_its_workload_as_a_band(tmp_path):
    records = [
        trained(mode, value, seed, workload=workload, metric_margin=margin, metric_name=name)
        for workload, name, margin, change in (("toy", "accuracy", 0.02, 0.01), ("other", "r2_score", 0.5, -0.25))
        for mode, value in (("fp32", 0.9), ("mixed-static", 0.9 + change))
        for seed in (0, 1)
    ]
    picture = gains(run_of(tmp_path, *records))
    root = root_of(picture)
    shown = texts(root)
    assert {"accuracy, points ±2", "R² ±0.5", "+2", "+0.5"} <= set(shown)
    assert not any("margins" in text for text in shown)
    for workload, where in ((1, 0.75), (2, 0.25)):
        edges = [x for x, _ in path_of(root, f"margin-{workload}")]
        # Half of the margin above fp32, or below.
        share = (place_of(root, f"gain-1-{workload}") - min(edges)) / (max(edges) - min(edges))
        assert share == pytest.approx(where, abs=0.005)


def test_only_known_quantities_have_a_panel(tmp_path):
    run = run_of(tmp_path, *pair("fp32", 8.0), *pair("mixed-static", 4.0))
    found = " ".join(texts(root_of(gains(run))))
    assert found.count(" over fp32") == found.count("speed-up over fp32") == 1
    known = {"gpu_memory_nvml_peak_mib": 1000.0, "gpu_energy_j_per_step": 0.5}
    run = run_of(tmp_path / "gpu", *pair("fp32", 8.0, **known), *pair("mixed-static", 4.0, **known), device=GPU)
    found = " ".join(texts(root_of(gains(run))))
    titles = ("speed-up over fp32", "peak GPU memory over float32", "GPU energy over fp32")
    assert all(title in found for title in titles)
    assert "metric" not in found


def test_the_baseline_of_the_speed_up_is_the_users_default(tmp_path):
    run = run_of(tmp_path, *pair("fp32", 8.0), *pair("tf32", 4.0), *pair("mixed-static", 4.0), device=GPU)
    root = root_of(gains(run))
    assert "speed-up over tf32" in texts(root)
    assert not groups(root, "gain-1-1")
    assert place_of(root, "gain-1-2") == pytest.approx(neutral(root, "neutral-1-1"), abs=0.02)


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
    assert "by GPU time alone" in " ".join(texts(root))
    assert place_of(root, "gain-1-1") > neutral(root, "neutral-1-1") + 1
    assert not groups(root, "gain-1-2") + groups(root, "neutral-2-1")
    for mode in ("mixed-static", "mixed-bf16"):
        assert f"No speed-up drawn for toy {mode}: {Doubt.IDLE.text}" in picture.caption


def test_a_caption_counts_rows_that_lack_a_speed_up_for_the_same_reason(tmp_path):
    records = [
        one
        for workload in "abcdef"
        for mode, ms in (("fp32", 2.0), ("mixed-static", 1.0))
        for one in pair(mode, ms, workload=workload, device_busy_share=0.1, metric_value=0.9, metric_name="accuracy",
                        metric_higher_is_better=True, metric_margin=0.01)
    ]  # fmt: skip
    caption = gains(run_of(tmp_path, *records)).caption
    assert "No speed-up drawn for 6 rows (a mixed-static, b mixed-static, c mixed-static and 3 more): " in caption
    assert caption.count(Doubt.IDLE.text) == 1


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


def test_a_workload_without_figures_says_so(tmp_path):
    records = [*pair("fp32", 8.0), *pair("mixed-static", 9.0), record("mixed-static", workload="other")]
    assert "nothing to compare" in texts(root_of(gains(run_of(tmp_path, *records))))


def test_an_interval_of_two_processes_is_cut_and_does_not_flatten_the_rest(tmp_path):
    pairs = [("fp32", (1.0, 1.0)), ("mixed-static", (0.1, 10.0)), ("mixed-dynamic", (0.5, 0.5))]
    records = [timed(mode, ms, seed) for mode, times in pairs for seed, ms in enumerate(times)]
    picture = gains(run_of(tmp_path, *records))
    root = root_of(picture)
    # Twice the speed is visible as such, although the other interval reaches into the millions.
    assert place_of(root, "gain-1-2") - neutral(root, "neutral-1-1") > 50
    assert "An arrow: it goes on." in picture.caption


def test_a_lost_training_does_not_flatten_the_rest(tmp_path):
    values = {"fp32": 0.9, "mixed-static": 0.1, "mixed-dynamic": 0.91}
    records = [trained(mode, value, seed) for mode, value in values.items() for seed in (0, 1)]
    root = root_of(gains(run_of(tmp_path, *records)))
    assert not groups(root, "gain-1-1")
    assert "-80" in texts(root)
    assert place_of(root, "gain-1-2") - neutral(root, "neutral-1-1") > 50


@pytest.mark.parametrize("records", [[], [timed("fp32", 1.0)], [record("mixed-static", status="crashed")]])
def test_nothing_is_drawn_if_nothing_can_be_compared(tmp_path, records):
    run = run_of(tmp_path, *records)
    assert [picture(run) for picture in (gains, training, tradeoff)] == [None, None, None]


def test_names_stay_text(tmp_path):
    name = "<b>&\x07$x$"
    records = [one for mode in ("fp32", "mixed-static") for one in pair(mode, 1.0, workload=name)]
    assert r"<b>&\x07$x$" in texts(root_of(gains(run_of(tmp_path, *records))))


@pytest.mark.parametrize("mode", ["mixed-static", "mode-of-tomorrow"])
def test_a_mode_has_the_same_colour_in_all_pictures(tmp_path, mode):
    steps = {f"toy--{name}--s0--r0": [(1.0, 8, 0)] * 3 for name in ("fp32", mode)}
    metric = {"metric_value": 0.9, "metric_name": "accuracy", "metric_higher_is_better": True, "metric_margin": 0.01}
    run = run_of(tmp_path, *pair("fp32", 2.0, **metric), *pair(mode, 1.0, **metric), steps=steps)
    colour = f"stroke: {looks([mode])[mode].colour.lower()}"
    for draw, name in ((gains, "gain-1-1"), (training, "loss-1-1"), (tradeoff, "tradeoff-1-1")):
        (group,) = groups(root_of(draw(run)), name)
        assert any(colour in (part.get("style") or "") for part in group.iter() if part.tag != f"{SVG}defs")
