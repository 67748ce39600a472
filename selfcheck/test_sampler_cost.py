"""What watching a GPU costs the training: the same process with the monitor running and stopped, in turns.

    pytest selfcheck/test_sampler_cost.py --restarts 3 --rounds 400

The monitor samples rarely while steps are timed and often otherwise; both are measured. The driver's library is the
stand-in of the tests, which answers in microseconds; a real driver adds its own time, in the monitor's process. The
table shows the share of a core that the monitor uses, its share of the training's cores, and the ratio of step times:
with the training on all cores, and with one core free, as beside a GPU.
"""

from __future__ import annotations

import math
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
from interleave import Contestant
from tabulate import tabulate

from mpscale.telemetry.client import Driver

TESTS = Path(__file__).parents[1] / "tests"
CONTESTANT = Path(__file__).with_name("scaling_contestant.py")
BLOCK_S = 0.5
PHASES = {"often": "timing-end", "while timed": "timing-start"}
MOST = {"often": 0.05, "while timed": 0.001}
"""Largest accepted share of the training's cores."""


@pytest.mark.parametrize("cores", ["all", "one"])
def test_sampler_cost(cores, request, tmp_path, capsys):
    sys.path.insert(0, str(TESTS))
    from support.nvml_stand_in import Script, build

    allowed = sorted(os.sched_getaffinity(0))
    if cores == "one" and len(allowed) < 2:
        pytest.skip("needs one core for the monitor and one for the training")
    used = set(allowed) if cores == "all" else {allowed[0]}
    script = Script(tmp_path / "nvml.txt")
    library = build(tmp_path / "lib")
    ratios, shares = ({how: [] for how in PHASES} for _ in range(2))
    for _ in range(request.config.getoption("restarts")):
        driver = Driver({**os.environ, **script.environ(library)})
        contestant = Contestant([str(CONTESTANT), "cnn", "unscaled", "on"], used)
        try:
            script.process("compute", contestant.pid, 500)
            if cores == "one":
                os.sched_setaffinity(driver.pid, set(allowed) - used)
            driver.start(driver.devices[0], contestant.pid, tmp_path / "samples.jsonl", time.monotonic())
            for how, phase in PHASES.items():
                driver.mark(phase)
                shares[how].append(core_share(driver.pid))
            for how, found in on_over_off(contestant, driver, request.config.getoption("rounds")).items():
                ratios[how] += found
        finally:
            os.kill(driver.pid, signal.SIGCONT)
            driver.close()
            contestant.kill()
    rows = []
    for how in PHASES:
        share = statistics.median(shares[how])
        taken = share / len(used) if cores == "all" else 0.0
        rows.append([cores, how, f"{share:.2%}", f"{taken:.3%}", *spread(ratios[how])])
        assert taken < MOST[how]
    headers = ["cores of the training", "sampling", "share of a core", "of the training's", "step time on / off"]
    with capsys.disabled():
        print("\n\n" + tabulate(rows, [*headers, "95 %"], "github"))


def core_share(pid, seconds=10.0):
    """Return the share of a core that a process uses."""

    def used():
        # Nanoseconds; the clock ticks of /proc/PID/stat are too coarse for a process that mostly sleeps.
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9

    before, start = used(), time.monotonic()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - start)


def on_over_off(contestant, driver, rounds):
    """Return ratios of neighbouring blocks with the monitor running and stopped, by how often it samples."""
    steps = max(2, round(BLOCK_S / statistics.median(contestant.block(5) for _ in range(9))))
    ratios = {how: [] for how in PHASES}
    for _ in range(rounds):
        taken = {}
        for how in random.sample(("off", *PHASES), 1 + len(PHASES)):
            if how == "off":
                os.kill(driver.pid, signal.SIGSTOP)
            else:
                driver.mark(PHASES[how])
            taken[how] = contestant.block(steps)
            os.kill(driver.pid, signal.SIGCONT)
        for how, found in ratios.items():
            found.append(taken[how] / taken["off"])
    return ratios


def spread(ratios):
    """Return the median of the ratios and its 95 % interval, by ranks (binomial)."""
    ordered = sorted(ratios)
    reach = 0.98 * math.sqrt(len(ordered))
    low, high = (ordered[max(0, min(len(ordered) - 1, round(len(ordered) / 2 + side * reach)))] for side in (-1, 1))
    return f"{statistics.median(ordered):.4f}", f"{low:.4f} to {high:.4f}"
