"""Whether mpscale reports the step time that you would have without it.

    pytest selfcheck/test_fidelity.py --restarts 20

For each workload of the default preset, in float32 and with a dynamic loss scale, with and without XLA, these loops are
timed against each other:

- mpscale's worker, from the idle process through its own time_steps;
- the same with steps that return only their loss, without loss scale and overflow;
- a tf.function training loop written by hand, whose step finds its batch by a counter on the device, as mpscale's does;
- the same, called with its batches as in TensorFlow's guide. They are on the device already.

All start from the same weights and see the same batches; blocks have the same number of steps and one synchronisation.
They are interleaved in turns of two blocks, and only the second counts, because in mpscale's timing a block follows a
block. A restart is a process that builds all four in random order. Its ratio is the median over rounds of the ratio of
two blocks of one round. The geometric mean over restarts is printed with its 95 % t interval on logarithms, and in the
end the same over everything measured. The test fails only if the ratio is shown to exceed 1.01. On one core
(`taskset -c 0 pytest ...`) restarts differ much less.
"""

from __future__ import annotations

import math
import os
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from interleave import Contestant
from scipy.special import stdtrit
from tabulate import tabulate

from mpscale.analysis.stats import Interval, geometric_interval
from mpscale.core.device import Device, find_device
from mpscale.harness.launch import worker_environment
from mpscale.presets import DEFAULT_PRESET, PRESETS
from mpscale.telemetry import host
from mpscale.telemetry.client import open_driver

CONTESTANT = Path(__file__).with_name("fidelity_contestant.py")
TARGET = 1.01
PRESET = PRESETS[DEFAULT_PRESET]
BLOCK_S = PRESET.timing_s / PRESET.timing_blocks

FIDELITY = {"mpscale / by hand": ("mpscale", "by hand"), "mpscale / handed its batches": ("mpscale", "handed")}
RECORDING = {"recording on / off": ("mpscale", "unrecorded")}

Blocks = dict[str, list[float]]


@pytest.mark.parametrize("jit", ["on", "off"])
@pytest.mark.parametrize("mode", ["fp32", "mixed-dynamic"])
@pytest.mark.parametrize("workload", PRESET.workloads)
def test_fidelity(workload, mode, jit, device, request, tmp_path, capsys, everything):
    restarts, rounds = request.config.getoption("restarts"), request.config.getoption("rounds")
    asked = {"workload": workload, "mode": mode, "jit": jit == "on", "device": device.to_json(), "block_s": BLOCK_S}
    asked["rounds"] = rounds
    taken = [race({**asked, "seed": random.randrange(2**31)}, device, tmp_path / "log") for _ in range(restarts)]
    rows = [row(name, ratios(taken, *pair), taken, pair) for name, pair in (FIDELITY | RECORDING).items()]
    everything.setdefault(jit, []).append(taken)
    with capsys.disabled():
        title = f"{workload}, {mode}, XLA {jit}; {restarts} restarts of {rounds} blocks"
        print(f"\n\n{title}\n\n{tabulate(rows, headers='keys', tablefmt='github', stralign='right')}")
    for name, pair in FIDELITY.items():
        found = geometric_interval(ratios(taken, *pair))
        assert verdict(found) != "not met", f"{name}: {found.estimate:.3f}, at least {found.low:.3f}"


@pytest.fixture(scope="module")
def everything(request):
    """Collect what was measured, by XLA on or off, and print the results over all workloads and modes in the end."""
    found: dict[str, list[list[Blocks]]] = {}
    yield found
    rows = [
        {"XLA": jit, "": name, "ratio": f"{mean:.4f}", "95 %": f"{low:.4f} to {high:.4f}"}
        for jit, measured in found.items()
        if len(measured) > 1
        for name, pair in (FIDELITY | RECORDING).items()
        for mean, low, high in [over_all([ratios(taken, *pair) for taken in measured])]
    ]
    if rows:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\nover all\n\n{tabulate(rows, headers='keys', tablefmt='github', stralign='right')}")


def over_all(found: list[list[float]]) -> tuple[float, float, float]:
    """Return the geometric mean over samples of their geometric means, and the ends of its 95 % t interval."""
    logs = [[math.log(ratio) for ratio in sample] for sample in found]
    mean = statistics.fmean(statistics.fmean(sample) for sample in logs)
    if min(map(len, logs)) < 2:
        return math.exp(mean), math.nan, math.nan
    error = math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in logs)) / len(logs)
    half = float(stdtrit(sum(len(sample) - 1 for sample in logs), 0.975)) * error
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


@pytest.fixture(scope="module")
def device() -> Device:
    driver = open_driver()
    try:
        return find_device(driver.devices, os.environ, host.cpu())
    finally:
        driver.close()


def race(asked: dict[str, Any], device: Device, log: Path) -> Blocks:
    """Return the seconds per step of each block of each loop, from one process."""
    environment = worker_environment(os.environ, device, "cuda_malloc_async")
    with log.open("ab") as end:
        try:
            contestant = Contestant([str(CONTESTANT)], None, environment, asked, end)
        except RuntimeError as error:
            error.add_note("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
            raise
    contestant.kill()
    check_same_training(contestant.ready["facts"])
    return contestant.ready["blocks"]


def check_same_training(ready: dict[str, dict[str, Any]]) -> None:
    """Check that weights and batches have equal digests, and losses differ only as compilers round."""
    expected = ready["mpscale"]
    for loop, facts in ready.items():
        assert (facts["weights"], facts["order"]) == (expected["weights"], expected["order"]), loop
        assert facts["losses"] == pytest.approx(expected["losses"], rel=0.02), loop


def ratios(taken: list[Blocks], loop: str, other: str) -> list[float]:
    """Return the ratio of each restart. Neighbouring blocks are compared, so that a slow moment affects both."""
    return [statistics.median(a / b for a, b in zip(blocks[loop], blocks[other], strict=True)) for blocks in taken]


def row(name: str, found: list[float], taken: list[Blocks], pair: tuple[str, str]) -> dict[str, str]:
    interval = geometric_interval(found)
    medians = [[statistics.median(blocks[loop]) for blocks in taken] for loop in pair]
    return {
        "": name,
        "ms a step": " / ".join(f"{statistics.geometric_mean(side) * 1e3:.3f}" for side in medians),
        "ratio": f"{interval.estimate:.4f}",
        "95 %": "-" if interval.low is None else f"{interval.low:.4f} to {interval.high:.4f}",
        "median": f"{statistics.median(found):.4f}",
        "one restart": "-" if interval.low is None else f"±{statistics.stdev(map(math.log, found)):.1%}",
        f"at most {TARGET}": verdict(interval) if name in FIDELITY else "-",
    }


def verdict(found: Interval) -> str:
    if found.low is None or found.low <= TARGET < found.high:
        return "cannot tell"
    return "met" if found.high <= TARGET else "not met"
