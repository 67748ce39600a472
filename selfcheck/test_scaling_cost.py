"""What loss scaling costs: step and compile time relative to the same float16 model without it.

    pytest selfcheck/test_scaling_cost.py

prints a table for each model, with and without XLA. docs/scaling-cost.md has the results and what they mean.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from interleave import Times, race
from tabulate import tabulate

CONTESTANT = Path(__file__).with_name("scaling_contestant.py")
MODELS = ("wide", "deep", "cnn")
BASELINE = "unscaled"
SCALINGS = (BASELINE, "keras", "static", "dynamic", "branch", "gate", "blame", "logmax")


@pytest.mark.parametrize("jit", ["on", "off"])
@pytest.mark.parametrize("model", MODELS)
def test_scaling_cost(model, jit, request, capsys):
    named = request.config.getoption("scalings")
    chosen = [BASELINE, *named.split(",")] if named else SCALINGS
    commands = {scaling: [str(CONTESTANT), model, scaling, jit] for scaling in dict.fromkeys(chosen)}
    times = race(commands, request.config.getoption("restarts"), request.config.getoption("rounds"))
    with capsys.disabled():
        print(f"\n\n{model}, XLA {jit}\n\n{table(times)}")
    # Speed gained by an incomplete skip is worth nothing.
    for scaling, taken in times.items():
        if scaling != BASELINE:
            assert all(facts["exact"] for facts in taken.facts), f"{scaling}: an overflow step changed something"


def table(times: dict[str, Times]) -> str:
    base = times[BASELINE]
    rows = []
    for scaling, taken in times.items():
        ratios = [step / other for step, other in zip(taken.step_s, base.step_s, strict=True)]
        compiles = [a / b for a, b in zip(taken.compile_s, base.compile_s, strict=True)]
        rows.append(
            {
                "loss scaling": scaling,
                "step ms": f"{statistics.median(taken.step_s) * 1e3:.2f}",
                "tax": f"{statistics.geometric_mean(ratios):.3f}",
                "lowest to highest": f"{min(ratios):.3f} to {max(ratios):.3f}",
                "trace and compile": f"{statistics.geometric_mean(compiles):.2f}",
                "compile s": f"{statistics.median(taken.compile_s):.1f}",
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", stralign="right")
