"""Loss-scale rules: immutable, without variables, their algorithms pure functions of a state.

:class:`~mpscale.scaling.LossScaleOptimizer` keeps the state in variables. TensorFlow is imported only to compute a next
state, so the command line has the same defaults, checks and messages as the training without loading it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

State = Mapping[str, Any]
"""Scalars by name: float32 (``scale``) or int64 (counters), as Python numbers, NumPy scalars or tensors."""

LARGEST_SCALE = 2.0**126
"""The float32 reciprocal of a larger scale is subnormal; devices that flush subnormals to zero lose the gradient."""


class LossScale(ABC):
    """A rule for the loss scale. Subclasses are frozen dataclasses whose fields are the arguments of the rule."""

    scales: bool = True  # whether the loss is multiplied, and gradients are divided, by the scale
    checks_finite: bool = True  # whether gradients are checked for non-finite values
    skip_nonfinite: bool = True  # whether a step with a non-finite gradient is skipped
    needs_largest: bool = False  # whether next_state needs the largest gradient

    @property
    def at_least_one(self) -> bool:
        """Whether the scale is never below 1, so that dividing by it cannot overflow."""
        return False

    @abstractmethod
    def initial_state(self) -> dict[str, float | int]:
        """Return the state before the first step; it always has a ``"scale"``."""

    @abstractmethod
    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        """Return the state after a step.

        Args:
            state: the state at the beginning of the step.
            finite: boolean scalar, whether every gradient of the step was finite.
            largest: float32 scalar, the largest absolute value of the unscaled gradients. Given if ``needs_largest``
                is set; meaningless if ``finite`` is False.
        """

    def at_floor(self, state: State) -> Any:
        """Return whether the scale cannot fall any further (boolean scalar); no rule can cure an overflow then."""
        return False

    def get_config(self) -> dict[str, Any]:
        """Return plain values from which :meth:`from_config` makes an equal rule."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LossScale:
        """Make a rule from what :meth:`get_config` returned."""
        return cls(**config)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the arguments of this rule with their defaults, in order."""
        return {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """Parse ``key=value`` pairs separated by commas, such as ``"initial=2**20, hysteresis=2"``.

        Returns:
            The arguments given in ``text``; those of integer defaults are integers. ``cls(**arguments)`` is valid.

        Raises:
            ValueError: a key is not an argument of this rule, a value is not a number, or the constructor refuses them.
        """
        arguments: dict[str, Any] = {}
        defaults = cls.defaults()
        for pair in text.split(","):
            key, _, value = (part.strip() for part in pair.partition("="))
            if key not in defaults:
                raise ValueError(f"{key[:_LONGEST]!r} is not one of {', '.join(defaults)}")
            number = parse_number(value)
            arguments[key] = int(number) if type(defaults[key]) is int and number.is_integer() else number
        cls(**arguments)
        return arguments


_LONGEST = 60
"""Characters of a number."""


def parse_number(text: str) -> float:
    """Parse a number that may be written as a power, such as ``2**24`` or ``2^24``.

    Raises:
        ValueError: ``text`` is not a number, or too large for one.
    """
    power = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:\*\*|\^)\s*(-?\d+)\s*", text[:_LONGEST])
    try:
        if len(text) > _LONGEST or not text.isascii() or "_" in text:
            raise ValueError  # float would take 1_0 and digits of other scripts
        return float(power[1]) ** int(power[2]) if power else float(text)
    except (ValueError, ArithmeticError):
        raise ValueError(f"expected a number such as 1024 or 2**24, not {text[:_LONGEST]!r}") from None


@dataclass(frozen=True)
class NoLossScale(LossScale):
    """No scaling and no finite check: enough for float32 and bfloat16, rarely for float16."""

    scales = False
    checks_finite = False
    skip_nonfinite = False

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": 1.0}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        return dict(state)


@dataclass(frozen=True)
class StaticLossScale(LossScale):
    """A constant loss scale.

    Choose it so that the largest gradient times the scale stays below 65,504; 8 to 32,768 are in use (NVIDIA,
    "Training with Mixed Precision").

    Args:
        scale: the factor, above 0 and at most 2**126.
        skip_nonfinite: skip steps with a non-finite gradient. If False, such gradients reach the weights.

    Raises:
        ValueError: ``scale`` is out of range.
    """

    scale: float = 128.0
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        _check_scale(self, "scale")

    @property
    def at_least_one(self) -> bool:
        return self.scale >= 1

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": float(self.scale)}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        return dict(state)


@dataclass(frozen=True)
class DynamicLossScale(LossScale):
    """A loss scale that grows after many finite steps and backs off on overflow.

    With scale S, consecutive finite steps c, and remaining tolerance h, which starts at ``hysteresis``::

        finite:      c += 1;  h = hysteresis
                     if c == growth_interval:  S = min(S * growth_factor, maximum);  c = 0
        non-finite:  c = 0;   h -= 1;  skip the step
                     if h <= 0:                S = max(S * backoff_factor, minimum)

    With ``hysteresis=1`` this is the rule of TensorFlow, Keras and ``torch.amp.GradScaler``. Above 1 it is Apex's
    (``update_scale_hysteresis``): the scale falls at that many consecutive overflows, and again at each further one.

        >>> rule = DynamicLossScale(growth_interval=2)
        >>> state = rule.initial_state()
        >>> scales = []
        >>> for finite in (True, True, False):
        ...     state = rule.next_state(state, finite)
        ...     scales.append(float(state["scale"]))
        >>> scales
        [32768.0, 65536.0, 32768.0]

    Args:
        initial: scale of the first step.
        growth_factor: above 1.
        backoff_factor: between 0 and 1.
        growth_interval: consecutive finite steps before the scale grows, at least 1.
        hysteresis: consecutive overflows before the scale falls, at least 1.
        minimum: lower bound of the scale.
        maximum: upper bound of the scale, at most 2**126.

    Raises:
        ValueError: an argument is out of range, or not ``minimum <= initial <= maximum``.
    """

    initial: float = 2.0**15
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    minimum: float = 1.0
    maximum: float = 2.0**24

    def __post_init__(self) -> None:
        _check_bounds(self)
        _check(self, "growth_factor", "finite and above 1", lambda value: 1 < value < math.inf)
        _check(self, "backoff_factor", "between 0 and 1", lambda value: 0 < value < 1)
        for name in ("growth_interval", "hysteresis"):
            _check(self, name, "an integer of at least 1", lambda value: isinstance(value, int) and value >= 1)

    @property
    def at_least_one(self) -> bool:
        return self.minimum >= 1

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": float(self.initial), "good_steps": 0, "tolerance": self.hysteresis}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        import tensorflow as tf

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
        return state["scale"] <= self.minimum


@dataclass(frozen=True)
class LogMaxLossScale(LossScale):
    """A loss scale that keeps the largest gradient some standard deviations below the limit of float16.

    With x = log2 of the largest absolute value of the step's unscaled gradients, and moving averages with Adam's bias
    correction::

        m = average(x, mean_decay)
        sigma = sqrt(average(x**2, deviation_decay) - average(x, deviation_decay)**2)
        S = 2**(16 - (m + deviations * sigma)), clipped to minimum and maximum

    If x were normally distributed, one step in a thousand would exceed 2**16 at the default of 3.09 deviations.

    - The limit, 2**16, is the first power of two beyond float16.
    - A step with non-finite gradients is skipped and counts as x = log2(65504), the largest float16.
    - A step whose largest gradient is zero, or flushes to zero, has no logarithm and leaves the state as it is.

    This is ``LogMaxScaler`` of NVIDIA's OpenSeq2Seq (``open_seq2seq/optimizers/automatic_loss_scaler.py``) with two
    errors corrected. There an overflow enters the averages as 2**16 instead of its logarithm, so that a single one
    inflates sigma and keeps S at ``minimum`` for more than 10,000 steps; and a zero enters as minus infinity, which no
    average recovers from.

    Args:
        initial: scale until the first step with a logarithm; from then on only the statistics count. High by default,
            because a scale that is too high overflows and falls with the next step, whereas under one that is too low
            gradients are flushed to zero and the scale never learns.
        mean_decay: decay of the average m per step, between 0 and 1; 0.99 remembers about 100 steps.
        deviation_decay: decay of the two averages in sigma; 0.999 remembers about 1,000 steps.
        deviations: margin in standard deviations, 0 to 100.
        minimum: lower bound of the scale. Below 1 it has little effect: endless overflow ends at 1.0005.
        maximum: upper bound of the scale, at most 2**126.

    Raises:
        ValueError: an argument is out of range, or not ``minimum <= initial <= maximum``.
    """

    initial: float = 2.0**14
    mean_decay: float = 0.99
    deviation_decay: float = 0.999
    deviations: float = 3.09
    minimum: float = 1.0
    maximum: float = 2.0**14

    needs_largest = True

    def __post_init__(self) -> None:
        _check_bounds(self)
        for name in ("mean_decay", "deviation_decay"):
            _check(self, name, "between 0 and 1", lambda value: 0 < value < 1)
        _check(self, "deviations", "a number from 0 to 100", lambda value: 0 <= value <= 100)

    @property
    def at_least_one(self) -> bool:
        return self.minimum >= 1

    def initial_state(self) -> dict[str, float | int]:
        return {"scale": float(self.initial), "mean": 0.0, "slow_mean": 0.0, "variance": 0.0, "samples": 0}

    def next_state(self, state: State, finite: Any, largest: Any = None) -> dict[str, Any]:
        import tensorflow as tf

        before = {
            name: tf.convert_to_tensor(state[name], state_dtype(value)) for name, value in self.initial_state().items()
        }
        largest = tf.convert_to_tensor(largest, tf.float32)
        # A float64 gradient can be finite when its float32 value is not.
        finite = tf.logical_and(finite, tf.math.is_finite(largest))
        # From the smallest normal float32 on; False for NaN. Devices flush smaller values to zero. Values without a
        # logarithm are replaced first, so that no NaN ever appears.
        has_logarithm = tf.logical_and(finite, largest >= 2.0**-126)
        logarithm = tf.math.log(tf.where(has_logarithm, largest, 1.0)) / math.log(2)
        x = tf.where(finite, logarithm, math.log2(65504))

        # The variance is updated directly instead of as the difference of two large squares: at x = 10 and sigma =
        # 0.05, float32 would turn that into an error of 10 % in the scale. A constant x has a sigma of exactly 0.
        samples = before["samples"] + 1
        fast = _weight_of_newest(self.mean_decay, samples)
        slow = _weight_of_newest(self.deviation_decay, samples)
        away = x - before["slow_mean"]
        mean = before["mean"] + fast * (x - before["mean"])
        variance = (1 - slow) * (before["variance"] + slow * away * away)
        exponent = 16.0 - (mean + self.deviations * tf.sqrt(variance))
        after = {
            "scale": tf.clip_by_value(tf.pow(2.0, exponent), self.minimum, self.maximum),
            "mean": mean,
            "slow_mean": before["slow_mean"] + slow * away,
            "variance": variance,
            "samples": samples,
        }
        informative = tf.logical_or(has_logarithm, tf.logical_not(finite))
        return {name: tf.where(informative, after[name], before[name]) for name in after}

    def at_floor(self, state: State) -> Any:
        # Endless overflow ends at 2**16 / 65504 = 1.0005; the rest is a margin for rounding.
        return state["scale"] <= max(self.minimum, 1.001)


@dataclass(frozen=True)
class ArticleLossScale:
    """The rule of the article that mpscale began with, kept to measure what it does.

    With loss L and scale S, starting at ``initial``::

        L * S > S:      S = S * 0.9
        L * S < S / 2:  S = S * 1.1

    Both sides contain S, so this compares the loss with 1 and with 0.5: once the loss is below 0.5, S grows by a tenth
    every step, without bound. Gradients are neither divided by S nor checked, so S multiplies the update unless the
    optimizer is invariant to it, and overflow reaches the weights.

    It is not a :class:`LossScale`: those decide by gradients, which this rule never looks at.
    """

    initial: float = 1.0

    def initial_state(self) -> dict[str, float | int]:
        """Return the state before the first step."""
        return {"scale": float(self.initial)}

    def next_state(self, state: State, scaled_loss: Any) -> dict[str, Any]:
        """Return the state after a step with this scaled loss, a float32 scalar."""
        import tensorflow as tf

        scale = tf.convert_to_tensor(state["scale"], tf.float32)
        lower = tf.where(scaled_loss < scale / 2, scale * 1.1, scale)
        return {"scale": tf.where(scaled_loss > scale, scale * 0.9, lower)}


def state_dtype(initial: float | int) -> str:
    """Return the dtype of a state entry with this initial value: "float32", or "int64" for counters.

    Not int32: TensorFlow cannot update int32 variables on a GPU.
    """
    return "float32" if isinstance(initial, float) else "int64"


def _weight_of_newest(decay: float, samples: Any) -> Any:
    """Return (1 - decay) / (1 - decay**samples), the newest sample's weight in a bias-corrected moving average."""
    import tensorflow as tf

    # expm1, because the difference 1 - 0.999 is off by 1.3e-5 in float32.
    weight = math.expm1(math.log(decay)) / tf.math.expm1(tf.cast(samples, tf.float32) * math.log(decay))
    # Exactly 1: with a rounded weight, the first sample would have a variance.
    return tf.where(samples == 1, 1.0, weight)


RULES: dict[str, type[LossScale]] = {
    "static": StaticLossScale,
    "dynamic": DynamicLossScale,
    "logmax": LogMaxLossScale,
}
"""The rules by the names that modes give them."""


def _check(rule: LossScale, name: str, expected: str, valid: Callable[[Any], bool], why: str = "") -> None:
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
        raise ValueError(f"{name} must be {expected}, not {value!r}{why}")


def _check_scale(rule: LossScale, name: str) -> None:
    why = "; the reciprocal of a larger scale flushes to zero, and every gradient with it"
    _check(rule, name, "a number above 0 and at most 2**126", lambda value: 0 < value <= LARGEST_SCALE, why)


def _check_bounds(rule: DynamicLossScale | LogMaxLossScale) -> None:
    for name in ("initial", "minimum", "maximum"):
        _check_scale(rule, name)
    if not rule.minimum <= rule.initial <= rule.maximum:
        raise ValueError(
            f"the initial loss scale {rule.initial:g} is not within minimum {rule.minimum:g} and maximum "
            f"{rule.maximum:g}; choose it between them or widen them"
        )
