"""A loss scale from the statistics of the largest gradient, which need not overflow to learn where the limit is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from mpscale.scaling.loss_scale import LossScale, State, check_bounds

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
