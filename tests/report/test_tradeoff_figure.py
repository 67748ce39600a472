"""The picture of speed-up against metric, read back from its SVG."""

from __future__ import annotations

import re

import pytest
from support.runfolder import GPU, record
from support.svg import groups, path_of, place_of, root_of, run_of, texts

from mpscale.report.tradeoff_figure import tradeoff


def cases(mode, ms, value, higher=True, seeds=(0, 1), workload="toy", **values):
    name = "accuracy" if higher else "mean_absolute_error"
    facts = {"metric_name": name, "metric_higher_is_better": higher, "metric_margin": 0.02}
    return [
        record(mode, seed, workload=workload, **{"step_time_ms_median": ms, "metric_value": value, **facts, **values})
        for seed in seeds
    ]


def axes_of(root):
    return path_of(root, "tradeoff-speed-1")[0][0], path_of(root, "tradeoff-metric-1")[0][1]


@pytest.mark.parametrize("higher", [True, False])
def test_right_is_faster_and_up_is_better_whatever_the_direction_of_the_metric(tmp_path, higher):
    better = 0.91 if higher else 0.89
    run = run_of(
        tmp_path, *cases("fp32", 8.0, 0.9, higher), *cases("mixed-static", 4.0, better, higher),
        *cases("mixed-bf16", 16.0, 1.8 - better, higher),
    )  # fmt: skip
    root = root_of(tradeoff(run))
    one, same = axes_of(root)
    assert place_of(root, "tradeoff-1-1") > one + 10 and place_of(root, "tradeoff-1-1", "y") < same - 10
    assert place_of(root, "tradeoff-1-2") < one - 10 and place_of(root, "tradeoff-1-2", "y") > same + 10
    heights = [y for _, y in path_of(root, "tradeoff-margin-1")]
    assert min(heights) < same < max(heights)


def filled(root, name):
    (group,) = groups(root, name)
    return not any("fill: #ffffff" in (part.get("style") or "") for part in group.iter())


@pytest.mark.parametrize(
    ("values", "seeds", "is_filled"),
    [({}, (0, 1), True), ({"device_busy_share": 0.1}, (0, 1), False), ({}, (0,), False)],
    ids=["claim", "idle GPU", "missing seed"],
)
def test_a_point_that_is_no_claim_is_hollow(tmp_path, values, seeds, is_filled):
    records = [*cases("fp32", 8.0, 0.9), *cases("mixed-static", 4.0, 0.9, seeds=seeds, **values)]
    records += [record("mixed-static", seed, status="crashed") for seed in {0, 1} - set(seeds)]
    picture = tradeoff(run_of(tmp_path, *records))
    assert filled(root_of(picture), "tradeoff-1-1") == is_filled
    assert ("Hollow" in picture.caption) != is_filled


def test_less_memory_is_a_smaller_point_and_the_legend_says_so(tmp_path):
    memory = {"fp32": 1000.0, "mixed-dynamic": 500.0, "mixed-bf16": 1000.0}  # two triangles
    run = run_of(
        tmp_path, *(one for mode, mib in memory.items() for one in cases(mode, 8.0, 0.9, gpu_memory_nvml_peak_mib=mib)),
        device=GPU,
    )  # fmt: skip
    picture = tradeoff(run)
    root = root_of(picture)
    heights = ([y for _, y in path_of(root, f"tradeoff-1-{which}")] for which in (1, 2))
    tall = [max(each) - min(each) for each in heights]
    assert tall[0] < tall[1]
    assert {"memory 0.5x", "memory 1x", "mixed-dynamic", "mixed-bf16"} <= set(texts(root))
    assert "memory" in picture.caption


def test_a_lost_metric_is_an_arrow_with_its_number(tmp_path):
    run = run_of(tmp_path, *cases("fp32", 8.0, 0.9), *cases("tf32", 8.0, 0.9), *cases("mixed-static", 4.0, 0.1))
    assert "↓ -80" in texts(root_of(tradeoff(run)))


def test_each_workload_has_a_panel_in_its_own_unit_and_no_more_than_twelve(tmp_path):
    records = [
        one
        for number in range(14)
        for mode, ms in (("fp32", 8.0), ("mixed-static", 4.0 + number))
        for one in cases(mode, ms, 0.9, number % 2 == 0, workload=f"a_workload_with_a_long_name_{number:02}")
    ]
    picture = tradeoff(run_of(tmp_path, *records))
    found = texts(root_of(picture))
    assert sum(text.endswith("points") for text in found) == sum("error" in text for text in found) == 6
    assert picture.caption.endswith("Not drawn: 2 further workloads.")


def test_it_is_narrow_and_may_grow_only_a_little(tmp_path):
    picture = tradeoff(run_of(tmp_path, *cases("fp32", 8.0, 0.9), *cases("mixed-static", 4.0, 0.9)))
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+) ', picture.svg)
    assert float(width) / 72 * 100 == pytest.approx(380, abs=1)
    assert 'style="min-width: 0; max-width: 608px"' in picture.svg


@pytest.mark.parametrize(
    "lacking", [{"step_time_ms_median": None}, {"metric_value": None}, {"metric_higher_is_better": None}]
)
def test_without_both_there_is_no_picture(tmp_path, lacking):
    assert tradeoff(run_of(tmp_path, *cases("fp32", 8.0, 0.9), *cases("mixed-static", 4.0, 0.9, **lacking))) is None
