"""Record what torch.amp.GradScaler does, so that test_same_decisions.py needs no torch.

To record anew, after ``pip install torch``::

    python tests/support/record_grad_scaler.py
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

STEPS = 10_000
# Growth interval and overflow rate: balanced, balanced, falling, and torch's default interval.
RUNS = [(50, 0.0138), (200, 0.0035), (50, 0.017), (2000, 0.0003)]
BAD = [math.inf, -math.inf, math.nan]


def record(interval: int, rate: float, seed: int) -> dict:
    """Return one run: the steps that overflowed, and log2 of the scale after each step that changed it."""
    overflows = np.flatnonzero(np.random.default_rng(seed).random(STEPS) < rate).tolist()
    gradients = torch.ones(STEPS, 2)
    for number, step in enumerate(overflows):
        gradients[step, 0] = BAD[number % len(BAD)]

    weights = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=interval)
    initial = before = scaler.get_scale()
    changes, skipped = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale((weights * gradients[step]).sum()).backward()
        weight = weights[1].item()
        scaler.step(optimizer)
        scaler.update()
        if weights[1].item() == weight:
            skipped.append(step)
        scale = scaler.get_scale()
        if scale != before:
            changes.append([step, exponent_of(scale)])
        before = scale
    if skipped != overflows:
        raise SystemExit("torch did not skip exactly the steps that overflowed")
    return {
        "growth_interval": interval,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "log2_initial": exponent_of(initial),
        "steps": STEPS,
        "overflows_skipped": overflows,
        "changes": changes,
    }


def exponent_of(scale: float) -> int:
    """Return log2 of a power of two."""
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        raise SystemExit(f"the scale {scale!r} is not a power of two")
    return exponent - 1


if __name__ == "__main__":
    head = {
        "what": "torch.amp.GradScaler('cpu'): [step, log2 of the scale after it] for each step that changed the scale",
        "recipe": "python tests/support/record_grad_scaler.py",
        "torch": torch.__version__,
    }
    runs = [record(interval, rate, seed) for seed, (interval, rate) in enumerate(RUNS)]
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines.append('"runs": [\n' + ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs) + "\n]")
    Path(__file__).parents[1].joinpath("scaling", "grad_scaler_trajectory.json").write_text(
        "{\n" + ",\n".join(lines) + "\n}\n"
    )
