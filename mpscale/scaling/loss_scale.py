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
from dataclasses import dataclass
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


# A loss scale from the statistics of the largest gradient, which need not overflow to learn where the limit is.

_TARGET = 16.0
"""log2 of what the largest scaled gradient is to stay below: 2**16, the first power of two beyond float16."""

_OVERFLOW = math.log2(65504)
"""What a step with non-finite gradients counts as: log2 of the largest finite float16 value."""

_OVERFLOW_FLOOR = 1.001
"""Overflow after overflow ends at 2**_TARGET / 65504 = 1.0005, even if less is allowed; the rest is for rounding."""

_SMALLEST = 2.0**-126
"""Devices flush what is smaller in float32 to zero, whose logarithm would be minus infinity."""


@keras.saving.register_keras_serializable(package="mpscale")
@dataclass(frozen=True)
class LogMaxLossScale(LossScale):
    """A loss scale that leaves the largest gradient a margin measured in standard deviations.

    With x = log2 of the largest absolute value of the step's unscaled gradients, and moving averages corrected for
    their start as in Adam::

        m = average(x, mean_decay)
        sigma = sqrt(average(x**2, deviation_decay) - average(x, deviation_decay)**2)
        S = 2**(16 - (m + deviations * sigma)), within minimum and maximum

    Were x normally distributed, the default of 3.09 deviations would let one step in a thousand exceed 2**16.

    - A step with non-finite gradients is skipped and counts as x = log2(65504), whatever ``largest`` says.
    - A step whose largest gradient is zero, or so small that devices flush it to zero, has no logarithm. It says
      nothing, and changes nothing.

    This is ``LogMaxScaler`` of NVIDIA's OpenSeq2Seq (``open_seq2seq/optimizers/automatic_loss_scaler.py``), mended:
    there an overflow feeds the value 2**16 where its logarithm belongs, so that a single one lets sigma explode and
    pins S at ``minimum`` for more than 10,000 steps; and a zero feeds minus infinity, which no average forgets.

    Args:
        initial: scale until the first step that says something; after that step only the statistics count. It is high
            by default, because of the two possible errors one mends itself: too high a scale overflows and falls
            with the next step, while under too low a one gradients that flush to zero say nothing, again and again.
        mean_decay: decay of the average m per step, above 0 and below 1; 0.99 remembers about 100 steps.
        deviation_decay: the same for the two averages in sigma; 0.999 remembers about 1,000 steps.
        deviations: margin in standard deviations, 0 to 100.
        minimum: the scale never falls below it. Below 1 it hardly matters: overflow after overflow ends at 1.0005.
        maximum: the scale never grows above it; at most 2**126.

    Raises:
        ValueError: an argument is out of range, or ``minimum <= initial <= maximum`` does not hold.
    """

    initial: float = 2.0**14
    mean_decay: float = 0.99
    deviation_decay: float = 0.999
    deviations: float = 3.09
    minimum: float = 1.0
    maximum: float = 2.0**14

    needs_largest = True

    def __post_init__(self) -> None:
        check_bounds(self.initial, self.minimum, self.maximum)
        for name in ("mean_decay", "deviation_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, not {value!r}")
        value = self.deviations
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise ValueError(f"deviations must be a number from 0 to 100, not {value!r}")

    @property
    def at_least_one(self) -> bool:
        return self.minimum >= 1

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": float(self.initial), "mean": 0.0, "slow_mean": 0.0, "variance": 0.0, "samples": 0}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        before = {
            name: tf.convert_to_tensor(state[name], tf.int64 if name == "samples" else tf.float32)
            for name in ("scale", "mean", "slow_mean", "variance", "samples")
        }
        largest = tf.convert_to_tensor(largest, tf.float32)
        # A float64 gradient may be finite and its float32 value not.
        finite = tf.logical_and(finite, tf.math.is_finite(largest))
        # False for NaN, too; what has no logarithm is replaced before it is taken.
        has_logarithm = tf.logical_and(finite, largest >= _SMALLEST)
        logarithm = tf.math.log(tf.where(has_logarithm, largest, 1.0)) / math.log(2)
        x = tf.where(finite, logarithm, _OVERFLOW)

        # The averages of the docstring, bias correction included, but with the variance updated as such instead of
        # being the difference of two large squares: at x = 10 and sigma = 0.05, float32 rounds that into 10 % of the
        # scale. So a constant x has a sigma of exactly 0.
        samples = before["samples"] + 1
        fast = _weight_of_newest(self.mean_decay, samples)
        slow = _weight_of_newest(self.deviation_decay, samples)
        away = x - before["slow_mean"]
        mean = before["mean"] + fast * (x - before["mean"])
        variance = (1 - slow) * (before["variance"] + slow * away * away)
        exponent = _TARGET - (mean + self.deviations * tf.sqrt(variance))
        after = {
            "scale": tf.clip_by_value(tf.pow(2.0, exponent), self.minimum, self.maximum),
            "mean": mean,
            "slow_mean": before["slow_mean"] + slow * away,
            "variance": variance,
            "samples": samples,
        }
        says_something = tf.logical_or(has_logarithm, tf.logical_not(finite))
        return {name: tf.where(says_something, after[name], before[name]) for name in after}

    def at_floor(self, state: State) -> Any:
        return tf.convert_to_tensor(state["scale"], tf.float32) <= max(self.minimum, _OVERFLOW_FLOOR)


def _weight_of_newest(decay: float, samples: Any) -> Any:
    """The weight (1 - decay) / (1 - decay**samples) of the newest sample in a bias-corrected moving average."""
    # expm1, because in float32 the difference 1 - 0.999 is off by 1.3e-5.
    weight = math.expm1(math.log(decay)) / tf.math.expm1(tf.cast(samples, tf.float32) * math.log(decay))
    # Exactly: rounding would give a first sample a variance.
    return tf.where(samples == 1, 1.0, weight)


# The rule of the article that mpscale began with, its feedback restored, kept to show by measurement what it does.


@dataclass(frozen=True)
class ArticleLossScale:
    """Compares the scaled loss with the scale.

    With loss L and scale S, starting at 1::

        L * S > S:      S = S * 0.9
        L * S < S / 2:  S = S * 1.1

    Since both sides carry S, this compares the loss with 1 and with 0.5: once the loss is below 0.5, S grows by a
    tenth with every step and without bound. Gradients are neither divided by S nor checked, so S multiplies the
    update of an optimizer that is not invariant to it, and overflow reaches the weights.

    It is no :class:`~mpscale.scaling.LossScale`: that contract is about gradients, which this rule never looks at.
    """

    initial: float = 1.0

    def initial_state(self) -> dict[str, float | int]:
        """The state before the first step."""
        return {"scale": float(self.initial)}

    def next_state(self, state: dict[str, Any], scaled_loss: Any) -> dict[str, Any]:
        """The state after a step whose scaled loss, a float32 scalar, was ``scaled_loss``."""
        scale = tf.convert_to_tensor(state["scale"], tf.float32)
        lower = tf.where(scaled_loss < scale / 2, scale * 1.1, scale)
        return {"scale": tf.where(scaled_loss > scale, scale * 0.9, lower)}
