"""Trains a case to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mpscale.training.evaluation import Evaluator
from mpscale.training.step import MOST_UNREAD, UNKNOWN, TrainStep
from mpscale.workloads import Data, Workload

FINAL_LOSSES = 100
"""Steps over which the final training loss is averaged, and that tell a diverged training."""

STALLED_SHARE = 0.95
"""Share of skipped steps from which on a training counts as stalled."""


@dataclass(frozen=True)
class Training:
    """What a training left behind.

    ``log`` is loss, loss scale and overflow of every step (steps, 3), with UNKNOWN where the mode has none.
    """

    log: npt.NDArray[np.float32]
    wall_time_s: float
    steps_to_target: int | None
    time_to_target_s: float | None
    weights_finite: bool

    @property
    def status(self) -> tuple[str, str | None]:
        """``ok``, ``stalled`` or ``diverged``, and why."""
        losses, overflow = self.log[:, 0], self.log[:, 2]
        skipped = float(np.mean(overflow == 1.0))
        if not self.weights_finite:
            return "diverged", f"the weights were not finite after {len(self.log)} steps"
        if skipped >= STALLED_SHARE:
            return (
                "stalled",
                f"{np.sum(overflow == 1.0)} of {len(self.log)} steps overflowed and were skipped",
            )
        if not np.isfinite(losses[-FINAL_LOSSES:]).any():
            return (
                "diverged",
                f"the loss was not finite in any of the last {min(FINAL_LOSSES, len(losses))} steps",
            )
        return "ok", None

    def values(self) -> dict[str, Any]:
        """The columns of a record that follow from the log."""
        loss, scale, overflow = self.log.T.astype(float)
        last = loss[-FINAL_LOSSES:]
        values: dict[str, Any] = {
            "attempted_steps": len(loss),
            "nonfinite_loss_steps": int(np.sum(~np.isfinite(loss))),
            "train_loss_first": float(loss[0]),
            "train_loss_final": float(np.mean(last)),
            "train_wall_time_s": self.wall_time_s,
            "steps_to_target": self.steps_to_target,
            "time_to_target_s": self.time_to_target_s,
        }
        if scale[0] != UNKNOWN:
            values |= {
                "loss_scale_initial": scale[0],
                "loss_scale_final": scale[-1],
                "loss_scale_min": np.min(scale),
                "loss_scale_max": np.max(scale),
            }
        if overflow[0] != UNKNOWN:
            bad = overflow == 1.0
            where = np.flatnonzero(bad)
            values |= {
                "overflow_steps": int(bad.sum()),
                "skipped_steps": int(bad.sum()),
                "applied_steps": int((~bad).sum()),
                "longest_skip_run": _longest_run(bad),
                "first_overflow_step": int(where[0]) if len(where) else None,
                "last_overflow_step": int(where[-1]) if len(where) else None,
            }
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def train(
    step: TrainStep,
    model: keras.Model,
    evaluate: Evaluator,
    workload: Workload,
    data: Data,
    steps: int,
    progress: Callable[[int], None],
) -> Training:
    """Takes ``steps`` steps, the first of which has been taken already.

    Ends early where the weights are no longer finite: nothing can bring them back.

    Args:
        step: the train step.
        model: the model it trains.
        evaluate: the model's metric.
        workload: says when to look at the metric and which value is its target.
        data: says on which examples.
        steps: how many steps the training has.
        progress: called with the number of steps taken, every ``workload.evaluate_every`` of them.
    """
    log = [step.read_log()]
    taken, wall = 1, 0.0
    reached: tuple[int, float] | None = None
    while taken < steps:
        start = time.perf_counter()
        block = min(workload.evaluate_every - taken % workload.evaluate_every, steps - taken, MOST_UNREAD)
        for _ in range(block):
            step()
        log.append(step.read_log())
        wall += time.perf_counter() - start
        taken += block
        if not np.isfinite(log[-1][-1, 0]) and not weights_finite(model):
            break
        if reached is None and workload.target is not None and taken % workload.evaluate_every == 0:
            if workload.reached(evaluate(*data.progress)):
                reached = (taken, wall)
        progress(taken)
    return Training(
        np.concatenate(log),
        wall,
        reached[0] if reached else None,
        reached[1] if reached else None,
        weights_finite(model),
    )


def weights_finite(model: keras.Model) -> bool:
    """Whether every weight of the model is finite, statistics that are not trained included."""
    return all(bool(np.isfinite(v.numpy()).all()) for v in model.variables)


def _longest_run(flags: npt.NDArray[np.bool_]) -> int:
    """Length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int(max(edges[1::2] - edges[::2], default=0))
