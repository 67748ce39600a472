"""The optimizer inside LossScaleOptimizer: what it may be, its settings, and its windows of accumulated gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, get_args

import keras
import tensorflow as tf

from mpscale.scaling.gradients import is_overwritten
from mpscale.scaling.skip import switch

FORWARDED = (
    "weight_decay",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "gradient_accumulation_steps",
)
"""Arguments of every Keras optimizer's constructor that a wrapper does not use itself."""

_BEFORE_BUILD = ("use_ema", "gradient_accumulation_steps")
"""Settings that need variables made by ``build``."""

_OF_KERAS_RULE = {
    "initial_scale": "DynamicLossScale(initial=...)",
    "dynamic_growth_steps": "DynamicLossScale(growth_interval=...)",
    "dynamic_scale": "optimizer.loss_scale_value",
    "step_counter": "optimizer.counters()",
}
"""Attributes of Keras' LossScaleOptimizer that mean nothing here, and what replaces them."""


class SettingTooLateWarning(UserWarning):
    """A setting was changed after a step had been compiled with the old value."""


def check_inner(inner: Any) -> None:
    """Raise TypeError if ``inner`` is not a Keras optimizer, ValueError if it scales the loss itself."""
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ValueError(f"inner_optimizer is a {type(inner).__name__} already; wrap the optimizer inside it instead")
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(f"inner_optimizer must be a Keras optimizer such as keras.optimizers.Adam(), not {inner!r}")
    if inner.loss_scale_factor is not None:
        raise ValueError(
            f"inner_optimizer has loss_scale_factor={inner.loss_scale_factor}, so gradients would be unscaled twice; "
            f"leave that out and pass loss_scale=StaticLossScale({inner.loss_scale_factor})"
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError if ``value`` is not among the arguments of ``choices``, a ``typing.Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, not {value!r}")


def unlisted_variables(inner: Any) -> list[keras.Variable]:
    """Return variables that ``inner`` keeps but does not list, as Keras' Nadam does."""
    listed = {id(variable) for variable in inner.variables}
    return [each for each in vars(inner).values() if isinstance(each, keras.Variable) and id(each) not in listed]


def window(inner: Any) -> int:
    """Return the micro-batches per update, 0 if gradients are not accumulated."""
    return getattr(inner, "gradient_accumulation_steps", None) or 0


def accumulate(
    inner: Any,
    window_finite: Any,
    decide: Callable[[tf.Tensor], None],
    grads: list[Any],
    variables: list[Any],
    finite: tf.Tensor,
) -> None:
    """Take one micro-batch of a window of ``gradient_accumulation_steps``, which is applied or dropped as a whole.

    The inner optimizer sees only the last micro-batch of a finite window. Its own accumulators hold the sum until then;
    it adds the last one, divides, applies and clears. ``window_finite`` is an int64 variable, 1 if all gradients of the
    window so far were finite; ``decide`` is called once per window with whether it was finite, a boolean scalar.
    """
    steps = window(inner)
    whole = tf.logical_and(finite, window_finite.value > 0)
    ends = tf.equal((inner._iterations.value + 1) % steps, 0)

    def add(grads: list[Any], variables: list[Any], whole: tf.Tensor) -> None:
        for grad, variable in zip(grads, variables, strict=True):
            if grad is None:
                continue
            accumulator = inner._accumulated_gradients[inner._get_variable_index(variable)]
            if is_overwritten(variable):
                # Keras takes the largest new value of a window, and the first may be below 0.
                begins = tf.equal(inner._iterations.value % steps, 0)
                accumulator.assign(tf.where(begins, grad, tf.maximum(accumulator.value, grad)))
            else:
                accumulator.assign_add(grad)
        inner._iterations.assign_add(1)
        window_finite.assign(tf.cast(whole, tf.int64))

    def apply(grads: list[Any], variables: list[Any], whole: tf.Tensor) -> None:
        inner.apply(grads, variables)
        decide(tf.constant(True))

    def discard(grads: list[Any], variables: list[Any], whole: tf.Tensor) -> None:
        # Assigned, because a NaN minus itself is still NaN.
        for accumulator in inner._accumulated_gradients:
            accumulator.assign(tf.zeros_like(accumulator.value))
        inner._iterations.assign_sub(steps - 1)
        window_finite.assign(1)
        decide(tf.constant(False))

    index = tf.where(ends, tf.where(whole, 1, 2), 0)
    switch(index, [add, apply, discard], grads, variables, whole)


class ForwardedSettings:
    """Forwards settings to ``inner_optimizer``, where Keras reads them, and refuses those without effect.

    Until the constructor sets ``_settings_open``, every attribute is kept here.
    """

    inner_optimizer: Any
    _settings_open = False
    _traced = False
    _fixed: tuple[str, ...] = ()  # attributes that cannot be changed
    _compiled: tuple[str, ...] = ()  # attributes that a compiled step does not read again
    _choices: ClassVar[Mapping[str, Any]] = {}  # for attributes with a few values, the Literal of these

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._settings_open or name.startswith("_"):
            super().__setattr__(name, value)
        elif name in self._fixed:
            raise AttributeError(f"{name} cannot be changed; make a new {type(self).__name__} with it")
        elif name in FORWARDED:
            self._forward(name, value)
        elif name in _OF_KERAS_RULE:
            _refuse_keras_rule(name)
        elif hasattr(type(self), name) or name in vars(self):
            if name in self._choices:
                check_choice(name, value, self._choices[name])
            if name in self._compiled and value != getattr(self, name):
                self._warn_if_traced(name)
            super().__setattr__(name, value)
        elif hasattr(self.inner_optimizer, name):
            self._forward(name, value)
        elif "_closed" in vars(type(self)):
            raise AttributeError(
                f"neither {type(self).__name__} nor the {type(self.inner_optimizer).__name__} inside it has "
                f"{name!r}, so setting it would do nothing"
            )
        else:  # A subclass may have attributes of its own.
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_KERAS_RULE:
            _refuse_keras_rule(name)
        if name.startswith("_") or "inner_optimizer" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner_optimizer, name)

    @property
    def loss_scale_factor(self) -> None:
        """None: the loss scale is that of ``loss_scale``."""
        return None

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        if value is not None:
            raise ValueError(
                f"loss_scale_factor={value!r} would scale the loss a second time; "
                f"leave it None and pass loss_scale=StaticLossScale({value!r}) instead"
            )

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value
        if callable(value):  # A number is assigned to a variable, which every compiled step reads.
            self._warn_if_traced("learning_rate")

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Call the inner optimizer's method of this name.

        Raises:
            ValueError: the inner optimizer is a MultiOptimizer, which would ignore it.
        """
        self._refuse_multi_optimizer("exclude_from_weight_decay")
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)
        self._warn_if_traced("exclude_from_weight_decay")

    def update_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: one variable cannot be updated, or skipped, without the others."""
        raise NotImplementedError("LossScaleOptimizer has no update_step; call apply(grads, variables)")

    def _forward(self, name: str, value: Any) -> None:
        inner, before = self.inner_optimizer, getattr(self.inner_optimizer, name)
        if name in FORWARDED:
            self._refuse_multi_optimizer(name)
            settings = {setting: getattr(inner, setting) for setting in FORWARDED}
            if inner.built and name in _BEFORE_BUILD and value != settings[name]:
                raise ValueError(
                    f"{name} cannot be changed once the optimizer is built, because it needs variables of its own; "
                    "set it before the first step, or pass it to the inner optimizer's constructor"
                )
            keras.optimizers.Optimizer(0.0, **settings | {name: value})  # Raises what Keras raises for these.
        setattr(inner, name, value)
        if not (value is before or (isinstance(value, str | int | float) and value == before)):
            self._warn_if_traced(name)

    def _refuse_multi_optimizer(self, name: str) -> None:
        if hasattr(self.inner_optimizer, "optimizers"):
            raise ValueError(
                f"{name} does nothing on a {type(self.inner_optimizer).__name__}; "
                "set it on each of optimizer.inner_optimizer.optimizers"
            )

    def _warn_if_traced(self, name: str) -> None:
        if self._traced:
            warnings.warn(
                f"{name} was changed after a step had been compiled with the old value, which that step keeps; "
                "call model.compile again, or make a new tf.function",
                SettingTooLateWarning,
                stacklevel=4,
            )


def _forwarded(name: str) -> property:
    # The setter lets Keras' constructor assign its defaults, to no effect; after that, __setattr__ comes first.
    return property(
        lambda self: getattr(self.inner_optimizer, name),
        lambda self, value: None,
        doc="The inner optimizer's setting of this name.",
    )


for _name in FORWARDED:
    setattr(ForwardedSettings, _name, _forwarded(_name))


def _refuse_keras_rule(name: str) -> NoReturn:
    raise AttributeError(
        f"{name} belongs to Keras' own LossScaleOptimizer; here there is {_OF_KERAS_RULE[name]} instead"
    )
