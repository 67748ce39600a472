"""Timed blocks that fall into two groups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpscale.core.blocks import FASTER, SLOWER, group_columns, two_groups
from mpscale.core.reason import Code

ROOT = Path(__file__).parents[2]
ON_A_GPU = ROOT / "tests" / "data" / "20261126T153730Z-nvidia-h200-1b51"


def blocks_of(*runs):
    """The blocks of every process of some runs, in ms, by the end of the run's name and the case."""
    found = {}
    for run in runs:
        for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event.get("step_s"):
                found[run.name[-4:], event["case_id"]] = [1e3 * time for time in event["step_s"]]
    return found


def test_the_jump_within_a_process_on_an_h200_is_found_and_no_other():
    groups = {case: two_groups(times) for (_, case), times in blocks_of(ON_A_GPU).items()}
    assert groups.pop("mnist1d-mlp--fp32--s0--r0") == pytest.approx((0.22, 0.456), abs=0.001)
    assert set(groups.values()) == {None}


def test_alarms_are_rare_in_recorded_runs():
    recorded = blocks_of(*(ROOT / "results" / "reference").glob("*-*"))
    # These have two levels to the eye.
    seen = {("e964", "mnist1d-mlp--mixed-dynamic--s0--r0"), ("04e5", "article-mlp--mixed-bf16--s1--r0")}
    assert len(recorded) > 130
    assert {key for key, times in recorded.items() if two_groups(times)} == seen


NOISE = {
    "normal": lambda random, n: np.exp(0.2 * random.normal(size=n)),
    "uniform": lambda random, n: 1 + random.random(n),
    "outliers": lambda random, n: 1 + 0.5 * random.exponential(size=n),
    "long tail": lambda random, n: 1 + 0.2 * np.exp(random.normal(size=n)),
    "drift": lambda random, n: np.exp(np.cumsum(0.05 * random.normal(size=n))),
}


@pytest.mark.parametrize(("number", "most"), [(50, 0.005), (20, 0.01), (10, 0.09)])
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE.keys())
def test_false_alarms_are_rare_even_if_noise_is_strong(noise, number, most):
    random = np.random.default_rng(1)
    assert np.mean([two_groups(noise(random, number).tolist()) is not None for _ in range(400)]) <= most


@pytest.mark.parametrize(
    ("times", "groups"),
    [
        pytest.param([1.0, 1.1] * 5 + [2.0, 2.2] * 5, (1.05, 2.1), id="half and half"),
        pytest.param([2.0] * 6 + [1.5] + [1.0] * 23, (1.0, 2.0), id="one block in between"),
        pytest.param([3.0] * 5 + [1.0] * 45, (1.0, 3.0), id="a tenth"),
        pytest.param([3.0] * 4 + [1.0] * 46, None, id="less than a tenth"),
        pytest.param([9.0] * 2 + [1.0] * 8, None, id="two outliers of ten"),
        pytest.param([1.0] * 10 + [1.29] * 10, None, id="too close"),
        pytest.param([1.0] * 4 + [2.0] * 5, None, id="too few"),
        pytest.param([1.0] * 50, None, id="constant"),
        pytest.param([], None, id="none"),
        pytest.param([0.0] * 5 + [1.0] * 5, None, id="a clock that stands still"),
    ],
)
def test_groups_are_a_tenth_or_more_and_apart(times, groups):
    assert two_groups(times) == (None if groups is None else pytest.approx(groups))


def test_columns_are_in_ms_or_have_a_reason():
    assert group_columns([0.001] * 5 + [0.002] * 5).values == pytest.approx({FASTER: 1.0, SLOWER: 2.0})
    for times, code in (([0.001] * 10, Code.NEVER_HAPPENED), ([0.001] * 9, Code.TOO_FEW_SAMPLES)):
        found = group_columns(times)
        assert not found.values
        assert {name: why.code for name, why in found.unavailable.items()} == {FASTER: code, SLOWER: code}
