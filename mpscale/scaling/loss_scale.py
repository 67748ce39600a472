"""The loss scales: immutable descriptions with pure functions of state.

A loss scale holds no variable. It says what its state starts as and what follows from a step with finite or
non-finite gradients, so its whole algorithm can be tested, or traced, without a model. ``LossScaleOptimizer`` keeps
the state in variables.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

State = Mapping[str, Any]
"""Scalars by name: float32 (``scale``) and int64 (counters); Python numbers, NumPy scalars or tensors."""

LARGEST_SCALE = 2.0**126
"""Above it the float32 reciprocal of the scale is subnormal, and devices that flush those to zero lose the gradient."""


class LossScale(ABC):
    """What every loss scale offers."""

    #: Whether the loss is multiplied, and gradients divided, by the scale at all.
    scales: bool = True
    #: Whether gradients have to be looked at: False means that no finite check is made.
    checks_finite: bool = True
    #: Whether a step with a non-finite gradient is left out.
    skip_nonfinite: bool = True
    #: Whether :meth:`next_state` wants the largest gradient too.
    needs_largest: bool = False

    @property
    def at_least_one(self) -> bool:
        """Whether the scale is never below 1, so that a division by it cannot overflow."""
        return False

    @abstractmethod
    def initial_state(self) -> dict[str, float | int]:
        """The state before the first step; ``"scale"`` is always in it."""

    @abstractmethod
    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        """The state after a step.

        Args:
            state: the state that the step began with.
            finite: boolean scalar, whether every gradient of the step was finite.
            largest: float32 scalar, the largest absolute value of all unscaled gradients; given where
                ``needs_largest`` is set, and without meaning where ``finite`` is False.
        """

    def at_floor(self, state: State) -> Any:
        """Whether the scale cannot fall any further, a boolean scalar: an overflow then has no remedy left."""
        return False

    def get_config(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_config` makes an equal loss scale."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LossScale:
        """The inverse of :meth:`get_config`."""
        return cls(**config)


def state_dtype(initial: float | int) -> tf.DType:
    """The dtype of an entry of a state that starts as ``initial``: float32, or int64 for counters.

    Not int32: such variables cannot be updated on a GPU.
    """
    return tf.float32 if isinstance(initial, float) else tf.int64


@keras.saving.register_keras_serializable(package="mpscale")
@dataclasses.dataclass(frozen=True)
class NoLossScale(LossScale):
    """No scaling and no check: what float32 and bfloat16 need, and float16 does not get away with for long."""

    scales = False
    checks_finite = False
    skip_nonfinite = False

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": 1.0}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        return dict(state)


@keras.saving.register_keras_serializable(package="mpscale")
@dataclasses.dataclass(frozen=True)
class StaticLossScale(LossScale):
    """A constant loss scale.

    NVIDIA's guide to mixed precision: choose it so that the largest gradient times the scale stays below 65,504;
    8 to 32,768 are in use.

    Args:
        scale: the factor, above 0 and at most 2**126.
        skip_nonfinite: leave out steps with a non-finite gradient. Without it they reach the weights.

    Raises:
        ValueError: ``scale`` is out of range.
    """

    scale: float = 128.0
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)

    @property
    def at_least_one(self) -> bool:
        return self.scale >= 1

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": float(self.scale)}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        return dict(state)


@keras.saving.register_keras_serializable(package="mpscale")
@dataclasses.dataclass(frozen=True)
class DynamicLossScale(LossScale):
    """A loss scale that grows while all goes well and backs off on overflow.

    With scale S, good steps in a row c, and h overflows still tolerated (it starts at ``hysteresis``)::

        finite:      c += 1;  h = hysteresis
                     c == growth_interval:  S = min(S * growth_factor, maximum);  c = 0
        not finite:  c = 0;   h -= 1;  the step is skipped
                     h <= 0:                S = max(S * backoff_factor, minimum)

    With ``hysteresis=1`` this is the rule of TensorFlow, Keras and ``torch.amp.GradScaler``; above 1 it is Apex's
    (``update_scale_hysteresis``): only that many overflows in direct succession lower the scale, and each further
    one in the same row lowers it again.

    Args:
        initial: scale of the first step.
        growth_factor: above 1.
        backoff_factor: between 0 and 1.
        growth_interval: finite steps in a row before the scale grows, at least 1.
        hysteresis: overflows in a row before the scale falls, at least 1.
        minimum: the scale never falls below it.
        maximum: the scale never grows above it; at most 2**126.

    Raises:
        ValueError: an argument is out of range, or ``minimum <= initial <= maximum`` does not hold.
    """

    initial: float = 2.0**15
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    minimum: float = 1.0
    maximum: float = 2.0**24

    def __post_init__(self) -> None:
        check_bounds(self.initial, self.minimum, self.maximum)
        if not (math.isfinite(self.growth_factor) and self.growth_factor > 1):
            raise ValueError(f"growth_factor must be finite and above 1, not {self.growth_factor!r}")
        if not 0 < self.backoff_factor < 1:
            raise ValueError(f"backoff_factor must be between 0 and 1, not {self.backoff_factor!r}")
        for name in ("growth_interval", "hysteresis"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")

    @property
    def at_least_one(self) -> bool:
        return self.minimum >= 1

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": float(self.initial), "good_steps": 0, "tolerance": self.hysteresis}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        scale = tf.convert_to_tensor(state["scale"], tf.float32)
        good = tf.convert_to_tensor(state["good_steps"], tf.int64) + 1
        left = tf.maximum(tf.convert_to_tensor(state["tolerance"], tf.int64) - 1, 0)
        grows = good >= self.growth_interval
        after_good = tf.where(grows, tf.minimum(scale * self.growth_factor, self.maximum), scale)
        after_bad = tf.where(left <= 0, tf.maximum(scale * self.backoff_factor, self.minimum), scale)
        zero = tf.constant(0, tf.int64)
        return {
            "scale": tf.where(finite, after_good, after_bad),
            "good_steps": tf.where(finite, tf.where(grows, zero, good), zero),
            "tolerance": tf.where(finite, tf.constant(self.hysteresis, tf.int64), left),
        }

    def at_floor(self, state: State) -> Any:
        return tf.convert_to_tensor(state["scale"], tf.float32) <= self.minimum


def check_scale(name: str, value: float) -> None:
    """Raises ValueError where ``value``, called ``name`` in the message, cannot be a loss scale."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_SCALE:
        raise ValueError(
            f"{name} must be a number above 0 and at most 2**126, not {value!r}; "
            "above that the reciprocal of the scale flushes to zero, and every gradient with it"
        )


def check_bounds(initial: float, minimum: float, maximum: float) -> None:
    """Raises ValueError where one cannot be a loss scale, or ``minimum <= initial <= maximum`` does not hold."""
    for name, value in (("initial", initial), ("minimum", minimum), ("maximum", maximum)):
        check_scale(name, value)
    if not minimum <= initial <= maximum:
        raise ValueError(
            f"the initial loss scale {initial:g} is not within minimum {minimum:g} and maximum {maximum:g}; "
            "choose it between them or widen them"
        )
