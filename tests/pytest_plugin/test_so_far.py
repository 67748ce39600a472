"""The word on a mode's speed while a run goes on."""

from __future__ import annotations

import pytest
from support.runfolder import record

from mpscale.pytest_plugin.so_far import SoFar


@pytest.mark.parametrize(
    ("ratio", "values", "words"),
    [
        (0.5, {}, ["", "faster so far", "faster so far"]),
        (2.0, {}, ["", "slower so far", "slower so far"]),
        (1.0, {}, ["", "", ""]),
        (0.5, {"host_other_cpu_share": 0.9}, ["", "", ""]),
        (0.5, {"dispatch_bound": True}, ["", "", ""]),
    ],
)
def test_a_word_needs_several_pairs_and_no_doubts(ratio, values, words):
    judge, found = SoFar(), []
    for seed, noise in enumerate((1.0, 1.01, 0.99)):
        assert judge(record("fp32", seed, step_time_ms_median=2.0 * noise)) == ("", "")
        found.append(judge(record("mixed-bf16", seed, step_time_ms_median=2.0 * ratio, **values))[0])
    assert found == words


def test_workloads_are_judged_apart():
    judge = SoFar()
    for seed in range(3):
        judge(record("fp32", seed, workload="one", step_time_ms_median=2.0 + 0.01 * seed))
        other = judge(record("mixed-bf16", seed, workload="two", step_time_ms_median=1.0))
        assert other == ("", "")


def test_a_mode_without_xla_is_not_judged_by_a_baseline_with_it():
    judge = SoFar()
    for seed in range(3):
        judge(record("fp32", seed, step_time_ms_median=2.0 + 0.01 * seed, jit=True))
    words = [judge(record("mixed-bf16", seed, step_time_ms_median=20.0, jit=False)) for seed in range(3)]
    assert words == [("", "")] * 3
    for seed in range(3):  # the baseline again
        judge(record("fp32", seed, step_time_ms_median=40.0 + 0.2 * seed, jit=False))
    assert judge(record("mixed-bf16", 0, step_time_ms_median=20.0, jit=False)) == ("faster so far", "good")
