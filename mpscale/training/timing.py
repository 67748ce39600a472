"""Steady-state step time of one process."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscale.training.step import TrainStep

DISPATCH_BOUND = 0.5
"""Share of dispatch above which a step time says more about Python and TensorFlow than about the device."""

_WARM_UP_S = 0.4
_WARM_UP_BLOCK = 10
_DISPATCH_BLOCKS = 7
_DISPATCH_CALLS = 40


@dataclass(frozen=True)
class Timing:
    """Blocks of steps, each with one synchronisation at its end.

    Args:
        block_s: seconds of each block (blocks,).
        steps_per_block: steps in each.
        overflow_steps: steps with a non-finite gradient among them, None where the mode does not know.
    """

    block_s: npt.NDArray[np.float64]
    steps_per_block: int
    overflow_steps: int | None

    @property
    def step_s(self) -> npt.NDArray[np.float64]:
        """Seconds per step, of each block."""
        return self.block_s / self.steps_per_block

    @property
    def steps(self) -> int:
        """Steps in all blocks."""
        return len(self.block_s) * self.steps_per_block

    def values(self, batch_size: int, empty_call_s: float) -> dict[str, Any]:
        """The columns of a record that follow from it.

        Args:
            batch_size: examples per step.
            empty_call_s: seconds of a call that does no work, as :func:`time_empty_call` says.
        """
        step_ms = self.step_s * 1e3
        median = float(np.median(step_ms))
        steps = self.steps
        share = min(empty_call_s * 1e3 / median, 1.0)
        values: dict[str, Any] = {
            "step_time_ms_median": median,
            "step_time_ms_p10": float(np.percentile(step_ms, 10)),
            "step_time_ms_p90": float(np.percentile(step_ms, 90)),
            "examples_per_s": batch_size / median * 1e3,
            "timed_blocks": len(step_ms),
            "timed_steps": steps,
            "dispatch_share": share,
            "dispatch_bound": share > DISPATCH_BOUND,
        }
        if self.overflow_steps is not None:
            applied = steps - self.overflow_steps
            values["timed_overflow_steps"] = self.overflow_steps
            values["step_time_ms_per_applied"] = float(self.block_s.sum()) * 1e3 / applied if applied else None
        return values


def warm_up(step: TrainStep) -> float:
    """Takes steps until caches and clocks have settled; returns when the device is done.

    Returns:
        About how many seconds a step takes: the median over the second half of the steps taken.
    """
    end = time.perf_counter() + _WARM_UP_S
    times: list[float] = []
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        step.block(_WARM_UP_BLOCK)
        times.append((time.perf_counter() - start) / _WARM_UP_BLOCK)
    return float(np.median(times[len(times) // 2 :]))


def time_steps(step: TrainStep, about_s: float, seconds: float, min_blocks: int) -> Timing:
    """Times steps for ``seconds`` and at least ``min_blocks`` blocks.

    Args:
        step: the train step, warm.
        about_s: about how many seconds it takes, as :func:`warm_up` says.
        seconds: how long to time.
        min_blocks: fewest blocks.

    Blocks are as long as ``seconds / min_blocks`` where steps are quick, and one step where they are slow. Each ends
    with one synchronisation, and nothing but the clock is between two of them: the first steps after anything else find
    the processor's caches cold.
    """
    per_block = max(1, round(seconds / min_blocks / about_s))
    blocks: list[float] = []
    overflows = step.overflow_steps()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(blocks) < min_blocks or time.perf_counter() < end:
            start = time.perf_counter_ns()
            step.block(per_block)
            blocks.append((time.perf_counter_ns() - start) / 1e9)
    finally:
        if collecting:
            gc.enable()
    return Timing(np.array(blocks), per_block, _more_than(overflows, step))


def keep_going(step: TrainStep, per_block: int, seconds: float) -> tuple[int, int | None]:
    """Takes steps as :func:`time_steps` does for ``seconds``, so that the energy of many can be counted.

    Returns:
        How many were taken, and with a non-finite gradient among them; None for that where the mode does not know.
    """
    steps = 0
    overflows = step.overflow_steps()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        step.block(per_block)
        steps += per_block
    return steps, _more_than(overflows, step)


def _more_than(overflows: int | None, step: TrainStep) -> int | None:
    """Overflow steps since there were ``overflows`` of them, None where the mode does not know."""
    now = step.overflow_steps()
    return None if overflows is None or now is None else now - overflows


def time_empty_call(step: TrainStep) -> float:
    """Seconds of an empty call, the median over blocks of calls."""
    step.empty()
    step.synchronise()
    times = []
    for _ in range(_DISPATCH_BLOCKS):
        start = time.perf_counter()
        for _ in range(_DISPATCH_CALLS):
            step.empty()
        step.synchronise()
        times.append((time.perf_counter() - start) / _DISPATCH_CALLS)
    return float(np.median(times))
