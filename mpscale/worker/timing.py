"""How long a step takes in the steady state: blocks of steps, each with one synchronisation at its end."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscale.worker.step import TrainStep

DISPATCH_BOUND = 0.5
"""Share of dispatch above which a step time depends more on Python and TensorFlow than on the device."""

_WARM_UP_S = 0.4
_WARM_UP_BLOCK = 10
_BUFFERED, _LONGEST_DRAIN = 64, 5
"""More batches than the buffers of most pipelines hold, and for how many times the timing they may be drained."""
_DISPATCH_BLOCKS = 7
_DISPATCH_CALLS = 40


@dataclass(frozen=True)
class Timing:
    """The time of blocks of steps, each with one synchronisation at its end.

    Args:
        block_s: seconds of each block (blocks,).
        steps_per_block: steps in each block.
        overflow_steps: how many of all these steps overflowed; None if the mode does not check.
        steps_per_call: steps in each call of the compiled program.
    """

    block_s: npt.NDArray[np.float64]
    steps_per_block: int
    overflow_steps: int | None
    steps_per_call: int = 1

    @property
    def step_s(self) -> npt.NDArray[np.float64]:
        """Seconds per step, by block."""
        return self.block_s / self.steps_per_block

    @property
    def steps(self) -> int:
        return len(self.block_s) * self.steps_per_block

    def values(self, batch_size: float, empty_call_s: float) -> dict[str, Any]:
        """The columns of a record that follow from the timing.

        Args:
            batch_size: examples per step.
            empty_call_s: seconds of a call that does no work, from :func:`time_empty_call`.
        """
        step_ms = self.step_s * 1e3
        median = float(np.median(step_ms))
        share = min(empty_call_s * 1e3 / (self.steps_per_call * median), 1.0)
        values: dict[str, Any] = {
            "step_time_ms_median": median,
            "step_time_ms_p10": float(np.percentile(step_ms, 10)),
            "step_time_ms_p90": float(np.percentile(step_ms, 90)),
            "examples_per_s": batch_size / median * 1e3,
            "timed_blocks": len(step_ms),
            "timed_steps": self.steps,
            "dispatch_share": share,
            "dispatch_bound": share > DISPATCH_BOUND,
        }
        if self.overflow_steps is not None:
            applied = self.steps - self.overflow_steps
            values["timed_overflow_steps"] = self.overflow_steps
            values["step_time_ms_per_applied"] = float(self.block_s.sum()) * 1e3 / applied if applied else None
        return values


def warm_up(step: TrainStep, one_per_call: bool = False) -> float:
    """Take steps until caches and clocks have settled; return about how many seconds a step takes.

    That is the median over the second half of the steps taken. ``one_per_call``: as in :meth:`TrainStep.block`.
    """
    steps = _WARM_UP_BLOCK if one_per_call else step.whole_calls(_WARM_UP_BLOCK)
    end = time.perf_counter() + _WARM_UP_S
    times: list[float] = []
    while len(times) < 2 or step.agreed(time.perf_counter() < end):
        start = time.perf_counter()
        step.block(steps, one_per_call)
        times.append((time.perf_counter() - start) / steps)
    return step.agreed(float(np.median(times[len(times) // 2 :])))


def time_steps(step: TrainStep, about_s: float, seconds: float, min_blocks: int, one_per_call: bool = False) -> Timing:
    """Time steps for ``seconds`` and at least ``min_blocks`` blocks.

    A block takes about ``seconds / min_blocks``, or one call if a call takes longer. It ends with one synchronisation,
    and only the clock is read between two blocks: the first steps after any other work find cold processor caches.

    Args:
        step: has been warmed up.
        about_s: about how many seconds it takes, from :func:`warm_up`.
        seconds: how long to time.
        min_blocks: fewest blocks.
        one_per_call: as in :meth:`TrainStep.block`.
    """
    per_block = max(1, round(seconds / min_blocks / about_s))
    per_block = per_block if one_per_call else step.whole_calls(per_block)
    blocks: list[float] = []
    overflows = step.overflow_steps()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(blocks) < min_blocks or step.agreed(time.perf_counter() < end):
            start = time.perf_counter_ns()
            step.block(per_block, one_per_call)
            blocks.append((time.perf_counter_ns() - start) / 1e9)
    finally:
        if collecting:
            gc.enable()
    steps_per_call = 1 if one_per_call else step.steps_per_call
    return Timing(np.array(blocks), per_block, _overflows_since(overflows, step), steps_per_call)


def time_one_per_call(step: TrainStep, seconds: float, min_blocks: int) -> float:
    """Milliseconds of a step when each is a call of its own: the median over blocks, as in :func:`time_steps`."""
    about_s = warm_up(step, one_per_call=True)
    return float(np.median(time_steps(step, about_s, seconds, min_blocks, one_per_call=True).step_s)) * 1e3


def time_with_input(step: TrainStep, seconds: float, min_blocks: int) -> float:
    """Milliseconds of a step that waits for the pipeline, the mean over blocks that take about ``seconds``.

    The mean and not the median, because the device waits in bursts: for a buffer that has run empty, or for the next
    epoch. Before that steps are taken for as long, and :data:`_BUFFERED` of them if that takes no longer than
    :data:`_LONGEST_DRAIN` times as much, since the buffers of the pipeline have filled up while other steps were timed.
    """
    start, taken = time.perf_counter(), 0
    while (spent := step.agreed(time.perf_counter() - start)) < seconds or (
        taken < _BUFFERED and spent < _LONGEST_DRAIN * seconds
    ):
        step.block(_WARM_UP_BLOCK)
        taken += _WARM_UP_BLOCK
    timing = time_steps(step, spent / taken, seconds, min_blocks)
    return float(timing.block_s.sum()) * 1e3 / timing.steps


def keep_going(step: TrainStep, per_block: int, seconds: float) -> tuple[int, int | None]:
    """Take steps for ``seconds`` as :func:`time_steps` does, so that the energy of many steps can be counted.

    Returns:
        How many steps were taken, and how many of them overflowed; None if the mode does not check.
    """
    steps = 0
    overflows = step.overflow_steps()
    end = time.perf_counter() + seconds
    while step.agreed(time.perf_counter() < end):
        step.block(per_block)
        steps += per_block
    return steps, _overflows_since(overflows, step)


def _overflows_since(before: int | None, step: TrainStep) -> int | None:
    """How many steps have overflowed since there were ``before`` of them; None if the mode does not check."""
    now = step.overflow_steps()
    return None if before is None or now is None else now - before


def time_empty_call(step: TrainStep) -> float:
    """Seconds of a call that does no work: the median over blocks of calls."""
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
