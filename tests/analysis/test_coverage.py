"""How often the intervals cover the truth, and how often verdicts are wrong, over thousands of simulated runs.

The noise is like the one that was measured: processes differ by some percent, and the blocks of a process by one
percent, each similar to the previous one (lag-1 autocorrelation 0.56).
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from mpscale.analysis import summary
from mpscale.analysis.stats import geometric_interval, log_change, paired_difference, paired_ratio
from mpscale.analysis.summary import judge

TRIALS = 2000
BLOCKS = 50
AUTOCORRELATION = 0.56
PROCESSES = [3, 4, 5, 7, 10]
NOISES = [(0.03, 0.01), (0.05, 0.005), (0.005, 0.02)]
"""Coefficients of variation: of processes, and of the blocks of a process."""


def block_times(random, shape, process_cv, block_cv, truth=1.0):
    """Block times of simulated processes, (*shape, blocks)."""
    fresh = random.normal(0.0, block_cv * np.sqrt(1 - AUTOCORRELATION**2), (*shape, BLOCKS + 50))
    blocks = lfilter([1.0], [1.0, -AUTOCORRELATION], fresh)[..., 50:]
    return truth * np.exp(random.normal(0.0, process_cv, (*shape, 1)) + blocks)


def medians(random, shape, noise, truth=1.0):
    return np.median(block_times(random, shape, *noise, truth), axis=-1)


def within(share, expected=0.95, allowed=0.02):
    assert expected - allowed <= share <= expected + allowed


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("processes", PROCESSES)
def test_interval_of_a_step_time_covers_the_truth(processes, noise):
    random = np.random.default_rng([processes, 1])
    found = [geometric_interval(row) for row in medians(random, (TRIALS, processes), noise, truth=2.5)]
    within(np.mean([interval.low <= 2.5 <= interval.high for interval in found]))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("processes", PROCESSES)
def test_interval_of_a_speed_up_covers_the_truth_whatever_the_machine_does(processes, noise):
    """Whatever slows both modes of a seed cancels out."""
    random = np.random.default_rng([processes, 2])
    drift = np.exp(random.normal(0.0, 0.2, (TRIALS, processes)))
    slow, fast = (drift * medians(random, (TRIALS, processes), noise, truth) for truth in (3.0, 2.0))
    found = [paired_ratio(dict(enumerate(a)), dict(enumerate(b))) for a, b in zip(slow, fast, strict=True)]
    within(np.mean([interval.low <= 1.5 <= interval.high for interval in found]))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("processes", [(3, 3), (5, 5), (10, 10), (3, 10)])
def test_interval_of_a_change_between_runs_covers_the_truth(processes, noise):
    random = np.random.default_rng([*processes, 3])
    before = medians(random, (TRIALS, processes[0]), noise)
    after = medians(random, (TRIALS, processes[1]), noise, truth=1.1)
    found = [log_change(a, b).interval() for a, b in zip(before, after, strict=True)]
    # Welch's degrees of freedom make the interval somewhat too wide for few processes, never too narrow.
    share = np.mean([low <= 0.1 <= high for low, high in found])
    assert 0.93 <= share <= 0.985


def test_an_interval_over_blocks_of_one_process_is_too_narrow():
    """Why intervals are not made from blocks: these do not show how processes differ."""
    random = np.random.default_rng(4)
    times = block_times(random, (TRIALS,), 0.03, 0.01)
    found = [geometric_interval(row) for row in times[:500]]
    assert np.mean([interval.low <= 1.0 <= interval.high for interval in found]) < 0.4


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize(
    ("truth", "wrong"), [(-0.02, "non-inferior"), (0.0, "worse"), (-0.05, "non-inferior"), (0.02, "worse")]
)
def test_verdict_on_accuracy_is_rarely_wrong(seeds, truth, wrong, monkeypatch):
    """At most 5 % of runs accept a loss of exactly the margin, and at most 5 % report a loss where there is none."""
    # No part of a verdict, and takes longer than all the rest.
    monkeypatch.setattr(summary, "pairs_that_would_tell", lambda *_: None)
    random = np.random.default_rng([seeds, 5])
    differences = random.normal(truth, 0.01, (TRIALS, seeds))
    share = np.mean([judge(row.tolist(), 0.02, True).verdict == wrong for row in differences])
    assert share <= 0.065


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_interval_of_a_difference_in_accuracy_covers_the_truth(seeds):
    random = np.random.default_rng([seeds, 6])
    found = [paired_difference(row.tolist()) for row in random.normal(-0.01, 0.01, (TRIALS, seeds))]
    within(np.mean([paired.low <= -0.01 <= paired.high for paired in found]), expected=0.9)
