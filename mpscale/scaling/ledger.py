"""What became of each step, counted on the device so that counting costs no synchronisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import tensorflow as tf

TRAJECTORY = 256
"""Changes of the scale that are kept; older ones make room for newer."""

_COUNTERS = (
    "attempted",
    "applied",
    "overflow",
    "skip_run",
    "longest_skip_run",
    "first_overflow",
    "last_overflow",
    "floor_overflow",
    "scale_changes",
)
_NEVER = -1


class Ledger:
    """Counters, the steps at which the scale changed and, if wanted, the overflows of every variable.

    Steps are numbered from 0 in the order in which they were attempted.

    All counters share one int64 vector: every further variable of a compiled step costs time when it is called.

    Args:
        add_variable: makes a variable from name, dtype and initial value, a vector; the optimizer passes its own maker,
            so that the ledger is saved and restored with it.
        scale: the scale of the first step.
    """

    def __init__(self, add_variable: Callable[[str, str, Sequence[float]], Any], scale: float) -> None:
        self._add_variable = add_variable
        start = [_NEVER if name in ("first_overflow", "last_overflow") else 0 for name in _COUNTERS]
        self._counters = add_variable("steps", "int64", start)
        self._change_steps = add_variable("scale_change_steps", "int64", [0] * TRAJECTORY)
        self._change_scales = add_variable("scale_changes", "float32", [scale] + [0.0] * (TRAJECTORY - 1))
        self._blamed: list[str] = []
        self._blame: Any = None

    def record(self, finite: Any, applied: Any, at_floor: Any, scale: Any, next_scale: Any) -> None:
        """Counts one step.

        Args:
            finite: boolean scalar, whether its gradients were finite (True where nobody looked).
            applied: boolean scalar, whether its update was applied.
            at_floor: boolean scalar, whether its scale could not have been lower.
            scale: float32 scalar, the scale it was taken with.
            next_scale: float32 scalar, the scale of the next one.
        """
        old = dict(zip(_COUNTERS, tf.unstack(self._counters.value), strict=True))
        overflow = tf.logical_not(finite)
        run = tf.where(applied, tf.constant(0, tf.int64), old["skip_run"] + 1)
        changes = old["scale_changes"] + tf.cast(tf.not_equal(next_scale, scale), tf.int64)
        new = {
            "attempted": old["attempted"] + 1,
            "applied": old["applied"] + tf.cast(applied, tf.int64),
            "overflow": old["overflow"] + tf.cast(overflow, tf.int64),
            "skip_run": run,
            "longest_skip_run": tf.maximum(old["longest_skip_run"], run),
            "first_overflow": tf.where(
                tf.logical_and(overflow, tf.equal(old["first_overflow"], _NEVER)),
                old["attempted"],
                old["first_overflow"],
            ),
            "last_overflow": tf.where(overflow, old["attempted"], old["last_overflow"]),
            "floor_overflow": old["floor_overflow"] + tf.cast(tf.logical_and(overflow, at_floor), tf.int64),
            "scale_changes": changes,
        }
        self._counters.assign(tf.stack([new[name] for name in _COUNTERS]))
        # Where the scale stays, its slot is written anew with what it holds already.
        here = tf.equal(tf.range(TRAJECTORY, dtype=tf.int64), changes % TRAJECTORY)
        since = self._change_steps.value
        moved = tf.logical_and(here, tf.not_equal(next_scale, scale))
        self._change_steps.assign(tf.where(moved, new["attempted"], since))
        self._change_scales.assign(tf.where(here, next_scale, self._change_scales.value))

    def blame_one_by_one(self, variables: Sequence[Any]) -> None:
        """From here on counts the overflows of each of ``variables`` by itself."""
        paths = [path_of(variable) for variable in variables]
        for place, path in enumerate(paths):  # Layers of one name have variables of one path.
            earlier = paths[:place].count(path)
            self._blamed.append(f"{path} ({earlier + 1})" if earlier else path)
        self._blame = self._add_variable("overflows_by_variable", "int64", [0] * len(paths))

    def blame(self, flags: Any, places: Sequence[int]) -> None:
        """Adds 1 for each variable whose gradient was not finite.

        Args:
            flags: 1 for a gradient that was not finite, int64 (gradients,).
            places: for each gradient, the place of its variable among those that are blamed one by one.
        """
        if list(places) != list(range(len(self._blamed))):
            found: list[Any] = [tf.constant(0, tf.int64)] * len(self._blamed)
            for place, flag in zip(places, tf.unstack(flags, num=len(places)), strict=True):
                found[place] = tf.maximum(found[place], flag)
            flags = tf.stack(found)
        self._blame.assign(self._blame.value + flags)

    def counters(self) -> dict[str, Any]:
        """The counters as Python values; waits for the device."""
        values: dict[str, Any] = dict(zip(_COUNTERS, self._counters.numpy().tolist(), strict=True))
        for name in ("first_overflow", "last_overflow"):
            if values[name] == _NEVER:
                values[name] = None
        by_variable = (
            None
            if self._blame is None
            else {path: n for path, n in zip(self._blamed, self._blame.numpy().tolist(), strict=True) if n}
        )
        return {
            "attempted": values["attempted"],
            "applied": values["applied"],
            "skipped": values["attempted"] - values["applied"],
            "overflow": values["overflow"],
            "longest_skip_run": values["longest_skip_run"],
            "first_overflow": values["first_overflow"],
            "last_overflow": values["last_overflow"],
            "floor_overflow": values["floor_overflow"],
            "by_variable": by_variable,
        }

    def trajectory(self) -> list[tuple[int, float]]:
        """Pairs of a step and the scale from that step on, in order; waits for the device."""
        changes = int(self._counters.numpy()[_COUNTERS.index("scale_changes")])
        steps, scales = self._change_steps.numpy(), self._change_scales.numpy()
        kept = range(max(changes - TRAJECTORY + 1, 0), changes + 1)
        return [(int(steps[i % TRAJECTORY]), float(scales[i % TRAJECTORY])) for i in kept]


def path_of(variable: Any) -> str:
    """The path of a Keras variable, such as "dense/kernel"; the name of one of TensorFlow's."""
    return str(getattr(variable, "path", None) or variable.name).removesuffix(":0")


# What happens when the scale sits at its floor and steps still overflow: no rule can help that training any more.

Alarm = Literal["warn", "stop", "ignore"]

_NAMED = 5
"""Variables that a message names."""


class FloorOverflowWarning(UserWarning):
    """Steps overflow although the loss scale is at its floor."""


class FloorOverflowError(RuntimeError):
    """Steps overflow although the loss scale is at its floor, and the policy is to stop."""


def check_policy(policy: str) -> None:
    """Raises ValueError where ``policy`` is no alarm policy."""
    if policy not in get_args(Alarm):
        raise ValueError(f"alarm must be one of {', '.join(map(repr, get_args(Alarm)))}, not {policy!r}")


def raise_alarm(policy: Alarm, counters: Mapping[str, Any], scale: float) -> None:
    """Does what ``policy`` says about overflow at the floor.

    Args:
        policy: ``"warn"``, ``"stop"`` or ``"ignore"``.
        counters: of the optimizer; ``floor_overflow`` above 0.
        scale: the loss scale.

    Raises:
        FloorOverflowError: the policy is ``"stop"``.
    """
    if policy == "ignore":
        return
    message = (
        f"{counters['floor_overflow']} of {counters['attempted']} steps had gradients that were not finite although "
        f"the loss scale was at its floor ({scale:g}); the last one was step {counters['last_overflow']}. "
        f"{_culprits(counters['by_variable'])} "
        "A lower scale cannot help: look for a learning rate that is too high, bad inputs, or a layer that "
        "overflows by itself and should compute in float32"
    )
    if policy == "stop":
        raise FloorOverflowError(message)
    warnings.warn(message, FloorOverflowWarning, stacklevel=3)


def _culprits(by_variable: Mapping[str, int] | None) -> str:
    if by_variable is None:
        return "LossScaleOptimizer(..., blame=True) would tell which variables they belong to."
    worst = sorted(by_variable.items(), key=lambda item: -item[1])
    named = ", ".join(f"{path} ({count} steps)" for path, count in worst[:_NAMED])
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return f"Not finite were the gradients of {named}{more}."
