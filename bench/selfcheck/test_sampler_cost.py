"""What watching a GPU costs the training: the same process with the sampler running and stopped, in turns.

    pytest bench/selfcheck/test_sampler_cost.py --restarts 3 --rounds 400

The driver's library is the stand-in of the tests, which answers in microseconds: what a real driver takes for a call
comes on top, in the sampler's own process. Printed are the share of a core that the sampler uses, and the ratio of
step times, where the training has all cores to itself but for the sampler, and where a core is free, as beside a
GPU.
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

from mpscale.telemetry.driver import Driver

TESTS = Path(__file__).parents[2] / "tests"
CONTESTANT = Path(__file__).with_name("scaling_contestant.py")
BLOCK_S = 0.1


@pytest.mark.parametrize("cores", ["all", "one"])
def test_sampler_cost(cores, request, tmp_path, capsys):
    sys.path.insert(0, str(TESTS))
    from nvml_stand_in import Script, build

    allowed = sorted(os.sched_getaffinity(0))
    if cores == "one" and len(allowed) < 2:
        pytest.skip("needs a core for the sampler beside that of the training")
    used = set(allowed) if cores == "all" else {allowed[0]}
    script = Script(tmp_path / "nvml.txt")
    library = build(tmp_path / "lib")
    ratios, shares = [], []
    for _ in range(request.config.getoption("restarts")):
        driver = Driver({**os.environ, **script.environ(library)})
        contestant = Contestant([str(CONTESTANT), "cnn", "unscaled", "on"], used)
        try:
            script.process("compute", contestant.pid, 500)
            if cores == "one":
                os.sched_setaffinity(driver.pid, set(allowed) - used)
            driver.start(driver.devices[0], contestant.pid, tmp_path / "samples.csv", time.monotonic())
            shares.append(core_share(driver.pid))
            ratios.append(on_over_off(contestant, driver.pid, request.config.getoption("rounds")))
        finally:
            os.kill(driver.pid, signal.SIGCONT)
            driver.close()
            contestant.kill()
    rows = [[cores, f"{statistics.median(shares):.2%}", *spread([r for each in ratios for r in each])]]
    with capsys.disabled():
        print(
            "\n\n"
            + tabulate(rows, ["cores of the training", "sampler, of a core", "step time on / off", "95 %"], "github")
        )
    assert all(share < 0.05 for share in shares), "a sampler that spins"


def core_share(pid, seconds=5.0):
    """Share of a core that a process uses."""

    def used():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before, start = used(), time.monotonic()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - start)


def on_over_off(contestant, sampler, rounds):
    """Ratios of neighbouring blocks, the sampler running in one and stopped in the other."""
    steps = max(2, round(BLOCK_S / statistics.median(contestant.block(5) for _ in range(9))))
    ratios = []
    for _ in range(rounds):
        taken = {}
        for how in random.sample(("on", "off"), 2):
            os.kill(sampler, signal.SIGCONT if how == "on" else signal.SIGSTOP)
            taken[how] = contestant.block(steps)
        ratios.append(taken["on"] / taken["off"])
    return ratios


def spread(ratios):
    """The median of the ratios and its 95 % interval, by ranks (binomial)."""
    ordered = sorted(ratios)
    reach = 0.98 * math.sqrt(len(ordered))
    low, high = (ordered[max(0, min(len(ordered) - 1, round(len(ordered) / 2 + side * reach)))] for side in (-1, 1))
    return f"{statistics.median(ordered):.4f}", f"{low:.4f} to {high:.4f}"
