"""One row per workload and mode, from cases whose figures are easy to check."""

from __future__ import annotations

import pandas as pd
import pytest
from support.runfolder import record

from mpscale.analysis.summary import SUMMARY_COLUMNS, summarise, summary_csv


def rows_of(*records):
    return {(row["workload"], row["mode"]): row for row in summarise(list(records))}


def row_of(mode, *records):
    return rows_of(*records)["toy", mode]


def test_workloads_are_in_order_of_appearance_and_modes_in_their_own_order():
    found = rows_of(
        record("mixed-bf16", workload="b"),
        record("fp32", workload="b"),
        record("other", workload="a"),
        record("tf32", workload="a"),
    )
    assert list(found) == [("b", "fp32"), ("b", "mixed-bf16"), ("a", "tf32"), ("a", "other")]


def test_step_time_is_the_geometric_mean_over_processes():
    row = row_of("fp32", record(step_time_ms_median=1.0), record(repeat=1, step_time_ms_median=4.0))
    assert row["step_time_ms"] == pytest.approx(2.0)
    assert row["step_time_ms_low"] < 2.0 < row["step_time_ms_high"]
    assert (row["processes"], row["seeds"]) == (2, 1)


def test_speedup_is_paired_by_seed_and_repeat():
    row = row_of(
        "mixed-static",
        record(step_time_ms_median=10.0),
        record(seed=1, step_time_ms_median=40.0),
        record("mixed-static", step_time_ms_median=5.0),
        record("mixed-static", seed=1, step_time_ms_median=20.0),
        record("mixed-static", repeat=1, step_time_ms_median=1000.0),
    )
    assert [row[f"speedup_fp32{end}"] for end in ("", "_low", "_high")] == [pytest.approx(2.0)] * 3


def test_a_baseline_over_itself_is_1_without_an_interval():
    row = row_of("fp32", record(step_time_ms_median=3.0), record(seed=1, step_time_ms_median=4.0))
    assert (row["speedup_fp32"], row["speedup_fp32_low"], row["speedup_fp32_high"]) == (1.0, None, None)


def test_the_headline_baseline_is_tf32_if_it_was_timed():
    timed = [
        record(mode, step_time_ms_median=time) for mode, time in (("fp32", 8.0), ("tf32", 4.0), ("mixed-bf16", 2.0))
    ]
    row = row_of("mixed-bf16", *timed)
    assert (row["speedup_fp32"], row["speedup_tf32"], row["headline_baseline"]) == (
        pytest.approx(4.0),
        pytest.approx(2.0),
        "tf32",
    )
    row = row_of("mixed-bf16", timed[0], record("tf32", status="unsupported"), timed[2])
    assert (row["speedup_tf32"], row["headline_baseline"]) == (None, "fp32")


@pytest.mark.parametrize("status", ["diverged", "stalled"])
def test_a_lost_training_has_a_metric_and_no_step_time_and_its_repeats_do_not_count(status):
    fp32 = [record(repeat=repeat, step_time_ms_median=1.0, metric_value=0.9) for repeat in (0, 1)]
    lost = record("mixed-static", status=status, step_time_ms_median=2.0, metric_value=0.1)
    lost = [lost, record("mixed-static", repeat=1, step_time_ms_median=2.0)]
    row = row_of("mixed-static", *fp32, *lost)
    assert (row["step_time_ms"], row["speedup_fp32"], row["processes"]) == (None, None, 0)
    assert (row["metric_mean"], row["cases"], row["ok"]) == (0.1, 2, 1)
    good = record("mixed-static", seed=1, step_time_ms_median=8.0, metric_value=0.9)
    row = row_of("mixed-static", *fp32, *lost, good)
    assert (row["step_time_ms"], row["processes"]) == (pytest.approx(8.0), 1)


@pytest.mark.parametrize("status", ["oom", "timeout", "crashed", "error", "unsupported", "invalid", "interrupted"])
def test_the_figures_of_a_case_that_failed_do_not_count(status):
    figures = {
        "step_time_ms_median": 99.0,
        "metric_value": 0.1,
        "overflow_steps": 7,
        "attempted_steps": 9,
        "host_memory_peak_mib": 9999.0,
        "gpu_memory_nvml_peak_mib": 9999.0,
        "dispatch_bound": True,
    }
    good = {name: type(value)(1) for name, value in figures.items()} | {"dispatch_bound": False}
    row = row_of("fp32", record(**good), record(seed=1, status=status, **figures))
    assert (row["step_time_ms"], row["metric_mean"], row["overflow_steps"], row["attempted_steps"]) == (1.0, 1.0, 1, 1)
    assert (row["host_memory_mib"], row["gpu_memory_mib"], row["dispatch_bound"]) == (1.0, 1.0, False)
    assert (row["processes"], row["seeds"], row["cases"], row["ok"]) == (1, 1, 2, 1)
    assert row["statuses"] == f"ok 1, {status} 1"


def test_memory_is_the_largest_of_any_process():
    row = row_of(
        "mixed-static",
        record(gpu_memory_nvml_peak_mib=1000.0),
        record(repeat=1, gpu_memory_nvml_peak_mib=2000.0),
        record("mixed-static", gpu_memory_nvml_peak_mib=1500.0, host_memory_peak_mib=800.0),
    )
    assert (row["gpu_memory_mib"], row["gpu_memory_ratio"], row["host_memory_mib"]) == (1500.0, 0.75, 800.0)


@pytest.mark.parametrize(
    ("column", "ratio", "kind", "other"),
    [
        ("gpu_memory_nvml_peak_mib", "gpu_memory_ratio", {"gpu_allocator": "cuda_malloc_async"}, "bfc"),
        ("gpu_memory_nvml_peak_mib", "gpu_memory_ratio", {"gpu_memory_method": "process"}, "device-minus-idle"),
        ("gpu_energy_j_per_step", "gpu_energy_ratio", {"gpu_energy_method": "counter"}, "power"),
    ],
)
def test_figures_of_different_things_have_no_ratio(column, ratio, kind, other):
    name = next(iter(kind))
    same = [record(**{column: 1000.0}, **kind), record("mixed-static", **{column: 500.0}, **kind)]
    assert row_of("mixed-static", *same)[ratio] == pytest.approx(0.5)
    for differing in (other, None):
        mode = record("mixed-static", **{column: 500.0, name: differing})
        assert row_of("mixed-static", same[0], mode)[ratio] is None
        # One process among several is enough: the largest may be its.
        assert (
            row_of("mixed-static", *same, record("mixed-static", seed=1, **{column: 400.0, name: differing}))[ratio]
            is None
        )
    # A process without a figure does not count.
    assert row_of("mixed-static", *same, record("mixed-static", seed=1, **{name: other}))[ratio] == pytest.approx(0.5)


def test_metrics_are_compared_seed_by_seed():
    row = row_of(
        "mixed-dynamic",
        record(seed=0, metric_value=0.9, metric_name="accuracy"),
        record(seed=1, metric_value=0.5, metric_name="accuracy"),
        record("mixed-dynamic", seed=0, metric_value=0.8, metric_name="accuracy"),
        record("mixed-dynamic", seed=2, metric_value=0.2, metric_name="accuracy"),
    )
    assert (row["metric_mean"], row["metric_min"], row["metric_max"]) == (pytest.approx(0.5), 0.2, 0.8)
    assert row["metric_difference"] == pytest.approx(-0.1)
    assert (row["metric_seeds"], row["metric_pairs"], row["metric_name"]) == (2, 1, "accuracy")


def test_counts_are_sums_and_the_scale_is_a_median():
    group = [
        record(
            "mixed-dynamic", seed=seed, overflow_steps=n, skipped_steps=n, attempted_steps=100, loss_scale_final=2.0**n
        )
        for seed, n in enumerate([1, 2, 9])
    ]
    row = row_of("mixed-dynamic", *group)
    assert (row["overflow_steps"], row["skipped_steps"], row["attempted_steps"]) == (12, 12, 300)
    assert row["loss_scale_final"] == 4.0


def test_unknown_is_empty_and_never_0():
    row = row_of("mixed-bf16", record("mixed-bf16"))
    unknown = {"overflow_steps", "attempted_steps", "skipped_steps", "step_time_ms", "gpu_memory_mib", "metric_mean"}
    unknown |= {"dispatch_bound", "jit", "target_reached", "speedup_fp32", "speedup_tf32", "metric_difference"}
    assert {name for name in unknown if row[name] is not None} == set()


def test_a_workload_with_a_target_says_how_many_seeds_reached_it():
    with_target = {"metric_target": 0.9, "metric_value": 0.9}
    reached = [record(seed=seed, steps_to_target=s, **with_target) for seed, s in enumerate([300, 500, None])]
    found = rows_of(*reached, record("mixed-unscaled", **with_target), record("fp32", workload="other"))
    assert (found["toy", "fp32"]["target_reached"], found["toy", "fp32"]["steps_to_target"]) == (2, 400.0)
    assert (found["toy", "mixed-unscaled"]["target_reached"], found["toy", "mixed-unscaled"]["steps_to_target"]) == (
        0,
        None,
    )
    assert found["other", "fp32"]["target_reached"] is None


def test_no_cases_make_no_rows_but_all_columns():
    assert summarise([]) == []
    assert summary_csv([]) == ",".join(SUMMARY_COLUMNS) + "\n"


def test_the_csv_holds_the_columns_and_leaves_unknown_empty(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text(summary_csv(summarise([record(step_time_ms_median=2.5)])))
    found = pd.read_csv(path)
    assert list(found.columns) == list(SUMMARY_COLUMNS)
    assert found.loc[0, "step_time_ms"] == 2.5
    assert pd.isna(found.loc[0, "overflow_steps"])


def test_one_disturbed_process_does_not_make_a_mode_dispatch_bound():
    bound = [
        record(seed=seed, dispatch_share=share, dispatch_bound=share > 0.5)
        for seed, share in enumerate([0.2, 0.3, 0.9])
    ]
    row = row_of("fp32", *bound)
    assert (row["dispatch_share"], row["dispatch_bound"]) == (0.3, False)


TRAINED = {"metric_margin": 0.01, "metric_higher_is_better": True, "metric_name": "accuracy"}


def trainings(mode, values, **more):
    return [record(mode, seed, metric_value=value, **{**TRAINED, **more}) for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "more", "verdict", "needed"),
    [
        pytest.param((0.905, 0.915, 0.925), {}, "non-inferior", None, id="better in every seed"),
        pytest.param((0.80, 0.81, 0.82), {}, "worse", None, id="worse in every seed"),
        # Mean -0.02 and spread 0.0721: 1.687 x 0.0721 / sqrt(38) is the first below 0.02.
        pytest.param((0.80, 0.95, 0.92), {}, "inconclusive", 38, id="better or worse, depending on the seed"),
        pytest.param((0.80, 0.81, 0.82), {"metric_higher_is_better": False}, "non-inferior", None, id="less is better"),
        pytest.param((0.9,), {}, "inconclusive", None, id="one seed of three"),
    ],
)
def test_the_verdict_on_the_metric(values, more, verdict, needed):
    fp32 = trainings("fp32", (0.90, 0.91, 0.92), **more)
    row = row_of("mixed-static", *fp32, *trainings("mixed-static", values, **more))
    assert (row["metric_verdict"], row["metric_seeds_needed"]) == (verdict, needed)


@pytest.mark.parametrize(("there", "verdict"), [("ok", "worse"), ("diverged", "non-inferior")])
def test_a_seed_that_only_the_mode_lost_makes_it_worse(there, verdict):
    fp32, mixed = (trainings(mode, (0.90, 0.91, 0.92)) for mode in ("fp32", "mixed-static"))
    mixed[2].update({"status": "diverged"})
    fp32[2].update({"status": there})
    assert row_of("mixed-static", *fp32, *mixed)["metric_verdict"] == verdict


def test_fp32_has_no_verdict_and_without_fp32_there_is_none():
    assert row_of("fp32", *trainings("fp32", (0.9, 0.9)))["metric_verdict"] is None
    assert row_of("mixed-static", *trainings("mixed-static", (0.9, 0.9)))["metric_verdict"] is None


@pytest.mark.parametrize(
    ("steps", "rate"),
    [([(1, 100), (3, 300)], 0.01), ([(0, 100)], 0.0), ([(None, 100)], None), ([(1, 100), (None, 900)], 0.01)],
)
def test_the_overflow_rate_is_over_trainings_that_know_it(steps, rate):
    cases = [
        record("mixed-static", seed, overflow_steps=overflow, attempted_steps=attempted)
        for seed, (overflow, attempted) in enumerate(steps)
    ]
    assert row_of("mixed-static", *cases)["overflow_rate"] == rate


def test_energy_is_a_ratio_to_fp32():
    row = row_of(
        "mixed-static",
        record("fp32", gpu_energy_j_per_step=4.0),
        record("mixed-static", gpu_energy_j_per_step=1.0),
        record("mixed-static", seed=1, gpu_energy_j_per_step=4.0),
    )
    assert (row["gpu_energy_j_per_step"], row["gpu_energy_ratio"]) == (pytest.approx(2.0), pytest.approx(0.5))


def test_rates_are_geometric_means_and_a_share_needs_that_of_every_process():
    known = {"flops_per_step": 8 * 10**12, "tflops_peak": 100.0}
    first = record(tflops=20.0, peak_share=0.2, tflops_while_busy=40.0, peak_share_while_busy=0.4, **known)
    second = {"tflops": 80.0, "peak_share": 0.8, "tflops_while_busy": 90.0, **known}
    row = row_of("fp32", first, record(repeat=1, **second))
    assert (row["flops_per_step"], row["tflops_peak"]) == (8 * 10**12, 100.0)
    assert (row["tflops"], row["peak_share"]) == (pytest.approx(40.0), pytest.approx(0.4))
    assert (row["tflops_while_busy"], row["peak_share_while_busy"]) == (pytest.approx(60.0), None)
