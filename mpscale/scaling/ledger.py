"""What became of each step, and the alarm if the loss scale cannot help.

Steps are counted on the device, so counting needs no synchronisation.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import tensorflow as tf

from mpscale.scaling.guard import Unscaling, origins, within_reach

TRAJECTORY = 256
"""Changes of the scale that are kept; newer ones replace the oldest."""

Alarm = Literal["warn", "stop", "ignore"]

AddVariable = Callable[[str, str, Sequence[float]], Any]
"""Makes a variable from name, dtype and initial value (a vector)."""

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


class FloorOverflowWarning(UserWarning):
    """Steps overflow although the loss scale is at its floor."""


class FloorOverflowError(RuntimeError):
    """Steps overflow although the loss scale is at its floor, and the policy is to stop."""


class Ledger:
    """Counts steps and records when the scale changed. Steps are numbered from 0 in the order they were attempted.

    All counters share one int64 vector, because every further variable of a compiled step costs time at each call.

    Args:
        add_variable: the optimizer's own maker of variables, so that the ledger is saved and restored with it.
        scale: the scale of the first step.
    """

    def __init__(self, add_variable: AddVariable, scale: float) -> None:
        start = [_NEVER if name in ("first_overflow", "last_overflow") else 0 for name in _COUNTERS]
        self._counters = add_variable("steps", "int64", start)
        self._change_steps = add_variable("scale_change_steps", "int64", [0] * TRAJECTORY)
        self._change_scales = add_variable("scale_changes", "float32", [scale] + [0.0] * (TRAJECTORY - 1))

    def record(self, finite: Any, applied: Any, at_floor: Any, scale: Any, next_scale: Any) -> None:
        """Count one step.

        Args:
            finite: boolean scalar, whether its gradients were finite; True if they were not checked.
            applied: boolean scalar, whether its update was applied.
            at_floor: boolean scalar, whether its scale could not have been lower.
            scale: float32 scalar, the scale of this step.
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
        # If the scale stays, its slot is overwritten with the value it already has.
        here = tf.equal(tf.range(TRAJECTORY, dtype=tf.int64), changes % TRAJECTORY)
        since = self._change_steps.value
        moved = tf.logical_and(here, tf.not_equal(next_scale, scale))
        self._change_steps.assign(tf.where(moved, new["attempted"], since))
        self._change_scales.assign(tf.where(here, next_scale, self._change_scales.value))

    def counters(self) -> dict[str, Any]:
        """Return the counters as Python values, None for a step number that does not exist. Waits for the device."""
        values = dict(zip(_COUNTERS, self._counters.numpy().tolist(), strict=True))
        values["skipped"] = values["attempted"] - values["applied"]
        values = {name: None if value == _NEVER else value for name, value in values.items()}
        shown = ("attempted", "applied", "skipped", "overflow", "longest_skip_run")
        return {name: values[name] for name in (*shown, "first_overflow", "last_overflow", "floor_overflow")}

    def trajectory(self) -> list[tuple[int, float]]:
        """Return pairs of a step and the scale from that step on, in order. Waits for the device."""
        changes = int(self._counters.numpy()[_COUNTERS.index("scale_changes")])
        steps, scales = self._change_steps.numpy(), self._change_scales.numpy()
        kept = range(max(changes - TRAJECTORY + 1, 0), changes + 1)
        return [(int(steps[i % TRAJECTORY]), float(scales[i % TRAJECTORY])) for i in kept]


class Blame:
    """Counts for every variable the steps in which its gradient was not finite.

    Gradients are counted in ``unscale``, or in ``apply`` if the variables are not known before.

    Args:
        add_variable: as for :class:`Ledger`.
        key_of: Keras' ``Optimizer._var_key``, which returns the same hashable key for the same variable.
    """

    def __init__(self, add_variable: AddVariable, key_of: Callable[[Any], Any]) -> None:
        self._add_variable, self._key_of = add_variable, key_of
        self._places: dict[Any, int] = {}
        self._names: list[str] = []
        self._counts: Any = None
        self.in_unscale = False  # whether unscale was ever given the variables

    def build(self, variables: Sequence[Any]) -> None:
        """Make the counters, one for each of ``variables``."""
        self._places = {self._key_of(variable): place for place, variable in enumerate(variables)}
        paths = [path_of(variable) for variable in variables]
        for place, path in enumerate(paths):  # Layers of the same name have variables of the same path.
            earlier = paths[:place].count(path)
            self._names.append(f"{path} ({earlier + 1})" if earlier else path)
        self._counts = self._add_variable("overflows_by_variable", "int64", [0] * len(paths))

    def count(self, flags: tf.Tensor, variables: Sequence[Any]) -> None:
        """Count ``flags``, 1 for a non-finite gradient, int64 (variables,).

        Raises:
            ValueError: the optimizer was not built with one of ``variables``, or there are not as many as flags.
        """
        unknown = [path_of(variable) for variable in variables if self._key_of(variable) not in self._places]
        if unknown:
            raise ValueError(
                f"the optimizer was not built with {', '.join(unknown)}; give build all variables that will be updated"
            )
        if flags.shape[0] != len(variables):
            raise ValueError(
                f"{flags.shape[0]} gradients cannot be blamed on the {len(variables)} variables that came with them; "
                "pass one for each to unscale: grads, finite = optimizer.unscale(grads, variables)"
            )
        places = [self._places[self._key_of(variable)] for variable in variables]
        if places != list(range(len(self._names))):
            by_place: list[Any] = [tf.constant(0, tf.int64)] * len(self._names)
            for place, flag in zip(places, tf.unstack(flags, num=len(places)), strict=True):
                by_place[place] = tf.maximum(by_place[place], flag)
            flags = tf.stack(by_place)
        self._counts.assign(self._counts.value + flags)

    def count_later(self, finite: Any, variables: Sequence[Any]) -> None:
        """Count for ``variables`` what was found in the calls of ``unscale`` that ``finite`` was computed from.

        Raises:
            ValueError: as for :meth:`count`, or ``finite`` comes from no known call.
        """
        sources: frozenset[Any] = frozenset().union(*origins([finite]))
        calls = [source for source in sources if isinstance(source, Unscaling)]
        if not (calls or self.in_unscale) or not all(within_reach(call.flags) for call in calls):
            raise ValueError(
                "blame does not know whose gradients were not finite: finite comes from another function or is not "
                "what unscale returned; pass the variables to unscale: "
                "grads, finite = optimizer.unscale(grads, variables)"
            )
        flags = [call.flags for call in calls if call.flags is not None]
        if flags:
            self.count(functools.reduce(tf.maximum, flags), variables)

    def counts(self) -> dict[str, int]:
        """Return path and number of steps for every variable that had a non-finite gradient. Waits for the device."""
        if self._counts is None:
            return {}
        return {name: count for name, count in zip(self._names, self._counts.numpy().tolist(), strict=True) if count}


class LossScaleMonitor(keras.callbacks.Callback):
    """Adds the loss scale to the logs of ``fit`` and checks the optimizer's alarm.

    At the end of every epoch, ``loss_scale`` and ``overflow_steps`` (those of the epoch) are added to the logs, for
    History and the callbacks after this one. Overflow at the floor of the scale warns; with
    ``LossScaleOptimizer(..., alarm="stop")`` it ends the training.

    Args:
        every: steps between two checks of the alarm. Each check waits for the device.

    Raises:
        ValueError: ``every`` is below 1.
        TypeError: when training begins, if the model's optimizer is not an ``mpscale.LossScaleOptimizer``.
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, not {every!r}")
        self._every = every
        self._steps = 0
        self._overflow = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check that there is a loss scale to watch."""
        # By its method, because the module of LossScaleOptimizer imports this one.
        if not hasattr(self.model.optimizer, "check_alarm"):
            raise TypeError(
                f"LossScaleMonitor watches an mpscale.LossScaleOptimizer, but the model was compiled with "
                f"{type(self.model.optimizer).__name__}; wrap the optimizer, or leave the callback out"
            )
        self._overflow = self.model.optimizer.counters()["overflow"]

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Check the alarm if ``every`` steps have passed."""
        self._steps += 1
        if self._steps % self._every == 0:
            self._check_alarm()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Check the alarm and add to the logs."""
        self._check_alarm()
        optimizer = self.model.optimizer
        overflow = optimizer.counters()["overflow"]
        if logs is not None:
            logs["loss_scale"] = float(optimizer.loss_scale_value)
            logs["overflow_steps"] = overflow - self._overflow
        self._overflow = overflow

    def _check_alarm(self) -> None:
        try:
            self.model.optimizer.check_alarm()
        except FloorOverflowError as error:
            # Not raised, so that what was trained so far and fit's History are kept.
            self.model.stop_training = True
            warnings.warn(f"training stops: {error}", FloorOverflowWarning, stacklevel=2)


def raise_alarm(policy: Alarm, counters: Mapping[str, Any], scale: float) -> None:
    """Warn, raise :class:`FloorOverflowError` ("stop") or do nothing ("ignore") about overflow at the floor."""
    if policy == "ignore":
        return
    message = (
        f"{counters['floor_overflow']} of {counters['attempted']} steps had non-finite gradients although the loss "
        f"scale was at its floor ({scale:g}); the last one was step {counters['last_overflow']}. "
        f"{_culprits(counters['by_variable'])}. "
        "A lower scale cannot help: look for a learning rate that is too high, bad inputs, or a layer that overflows "
        "by itself and should compute in float32"
    )
    if policy == "stop":
        raise FloorOverflowError(message)
    warnings.warn(message, FloorOverflowWarning, stacklevel=3)


def _culprits(by_variable: Mapping[str, int] | None, at_most: int = 5) -> str:
    if by_variable is None:
        return "LossScaleOptimizer(..., blame=True) shows which variables they belong to"
    worst = sorted(by_variable.items(), key=lambda item: -item[1])
    named = ", ".join(f"{path} ({count} steps)" for path, count in worst[:at_most])
    return f"Non-finite gradients: {named}" + (f" and {len(worst) - at_most} more" if len(worst) > at_most else "")


def path_of(variable: Any) -> str:
    """Return the path of a Keras variable, such as "dense/kernel", or the name of a TensorFlow variable."""
    return str(getattr(variable, "path", None) or variable.name).removesuffix(":0")
