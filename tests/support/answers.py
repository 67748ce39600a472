"""Runs whose answers are known, for tests of the first screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from support.runfolder import record

from mpscale.core.record import Record


def case(mode: str, seed: int, ms: float | None, accuracy: float | None = 0.9, **values: Any) -> Record:
    """A training on a GPU that was timed, with a metric whose margin is one point."""
    checks = mode in ("mixed-static", "mixed-dynamic")
    facts = {
        "device": "gpu",
        "device_name": "Test GPU",
        "jit": True,
        "step_time_ms_median": ms,
        "has_metric": True,
        "metric_name": "accuracy",
        "metric_value": accuracy,
        "metric_higher_is_better": True,
        "metric_margin": 0.01,
        "attempted_steps": 400,
        "overflow_steps": 0 if checks else None,
    }
    return record(mode, seed, **{**facts, **values})


def compared(
    times: dict[str, float], seeds: int = 3, accuracy: dict[str, float] | None = None, **values: Any
) -> Iterator[Record]:
    """Some modes, each with its step time in ms, which varies by a few percent over seeds.

    Args:
        times: by mode, in ms.
        seeds: how many.
        accuracy: by mode; 0.9 where it is not given.
        values: of all cases.
    """
    for seed in range(seeds):
        for place, (mode, ms) in enumerate(times.items()):
            found = (accuracy or {}).get(mode, 0.9) + 0.001 * seed
            yield case(mode, seed, ms * (1 + 0.01 * ((seed + place) % 3)), found, **values)


def ended(status: str, mode: str, seeds: int = 3, **values: Any) -> Iterator[Record]:
    """A mode whose trainings all ended with a status, without a figure."""
    for seed in range(seeds):
        yield case(mode, seed, None, None, **{"status": status, "overflow_steps": None, **values})
