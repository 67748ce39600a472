"""When a ratio of step times may be called a speed-up."""

from __future__ import annotations

import pytest
from support.runfolder import record

from mpscale.analysis.claim import Doubt, busy_share, doubts_of
from mpscale.analysis.quantities import QUANTITIES
from mpscale.analysis.summary import summarise, summary_csv

WELL = {"device_busy_share": 0.9, "dispatch_bound": False, "host_other_cpu_share": 0.02}


def processes(mode, ms, number=2, **values):
    return [record(mode, seed, step_time_ms_median=ms, **WELL | values) for seed in range(number)]


def rows_of(own, baseline, number=2):
    records = [*processes("fp32", 2.0, **baseline), *processes("mixed-static", 1.0, number, **own)]
    return records, {row["mode"]: row for row in summarise(records)}


CASES = [
    pytest.param({}, [], id="all well"),
    pytest.param({"device_busy_share": 0.5}, [], id="busy for half of a step"),
    pytest.param({"device_busy_share": 0.49}, [Doubt.IDLE], id="idle"),
    pytest.param({"device_busy_share": None, "gpu_utilization_median": 49.0}, [Doubt.IDLE], id="idle, by the driver"),
    pytest.param({"gpu_utilization_median": 10.0}, [], id="the profile counts before the driver"),
    pytest.param({"device_busy_share": None}, [], id="unknown, as on a CPU"),
    pytest.param({"dispatch_bound": True}, [Doubt.DISPATCH], id="dispatch"),
    pytest.param({"host_other_cpu_share": 0.11}, [Doubt.BUSY], id="busy machine"),
    pytest.param({"host_other_cpu_share": 0.1}, [], id="at the limit"),
    pytest.param({"dispatch_bound": True, "device_busy_share": 0.1}, [Doubt.IDLE, Doubt.DISPATCH], id="both"),
]


@pytest.mark.parametrize("side", ["own", "baseline"])
@pytest.mark.parametrize(("conditions", "doubts"), CASES)
def test_both_sides_of_a_ratio_count(conditions, doubts, side):
    sides = {"own": {}, "baseline": {}, side: conditions}
    records, rows = rows_of(**sides)
    assert doubts_of(rows["mixed-static"], "fp32") == doubts
    assert doubts_of(rows["fp32"], "fp32") == []
    # The history of speed-ups asks the same place.
    speedup = QUANTITIES["speedup"]
    told = speedup.lacking(records[2:], records[:2])[-1]
    assert [doubt for doubt in Doubt if doubt.text in told] == doubts


def test_one_pair_is_no_claim_and_without_a_pair_there_is_nothing_to_doubt():
    _, rows = rows_of({}, {}, number=1)
    assert doubts_of(rows["mixed-static"], "fp32") == [Doubt.ONE_PAIR]
    assert doubts_of(rows["mixed-static"], "tf32") == []
    assert rows["mixed-static"]["speedup_fp32_doubts"] in summary_csv(rows.values())


def test_one_disturbed_process_of_three_is_no_doubt():
    records = [*processes("fp32", 2.0, 3), *processes("mixed-static", 1.0, 2)]
    records.append(record("mixed-static", 2, step_time_ms_median=1.0, device_busy_share=0.1, host_other_cpu_share=0.9))
    assert doubts_of(summarise(records)[1], "fp32") == []


def test_speed_ups_by_gpu_time_are_paired_and_shares_are_medians():
    records = [
        record(mode, seed, device_busy_ms_per_step=ms * (1 + seed), device_busy_share=0.1 * (1 + seed))
        for mode, times in {"fp32": (4.0, 4.0), "tf32": (3.0, 3.0), "mixed-static": (2.0, 2.0, 2.0)}.items()
        for seed, ms in enumerate(times)
    ]
    row = summarise(records)[2]
    names = [f"speedup_device_{mode}{end}" for mode in ("fp32", "tf32") for end in ("", "_low", "_high", "_pairs")]
    assert [row[name] for name in names] == pytest.approx([2.0, 2.0, 2.0, 2, 1.5, 1.5, 1.5, 2])
    assert (row["device_busy_ms_per_step"], busy_share(row)) == pytest.approx((4.0, 0.2))
    assert (row["speedup_fp32"], row["speedup_fp32_doubts"]) == (None, None)
