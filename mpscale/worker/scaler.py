"""How the loss scale of a mode takes part in a train step: it scales the loss, and applies or skips the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from mpscale.core.case import Settings
from mpscale.core.loss_scale import RULES
from mpscale.core.mode import Mode
from mpscale.scaling import ArticleLossScale, LossScaleOptimizer


class StepRecord(NamedTuple):
    """The record of a step besides its loss. A value of None is not part of the compiled step, so it costs nothing.

    Args:
        scale: the loss scale that the step used, a float32 scalar; None if the mode has none.
        overflow: float32 scalar, 1 if a gradient was not finite, else 0; None if the mode does not check.
    """

    scale: Any = None
    overflow: Any = None


class StepScaler:
    """The bare optimizer; subclasses scale the loss. ``scale_loss`` and ``apply`` are traced into the train step.

    Modes without scaling use the bare one, since the baseline must be what a user would run: even a wrapper that does
    nothing would cost time.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer

    def scale_loss(self, loss: Any) -> Any:
        """The loss to differentiate."""
        return self.optimizer.scale_loss(loss)

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        """Update the weights."""
        self.optimizer.apply(grads, variables)
        return StepRecord()

    def overflow_steps(self, steps: int) -> int | None:
        """How many of the ``steps`` steps so far overflowed; None if the mode does not check."""
        return None


class Scaled(StepScaler):
    """mpscale's LossScaleOptimizer."""

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        scale = self.optimizer.loss_scale_value
        grads, finite = self.optimizer.unscale(grads)
        self.optimizer.apply(grads, variables, finite=finite)
        return StepRecord(scale, tf.cast(tf.logical_not(finite), tf.float32))

    def overflow_steps(self, steps: int) -> int | None:
        return int(self.optimizer.counters()["overflow"])


class KerasScaled(StepScaler):
    """Keras' own LossScaleOptimizer. It counts nothing, but its inner optimizer counts the steps that are applied."""

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        scale = tf.convert_to_tensor(self.optimizer.dynamic_scale.value)
        # The scale does not always show it: overflow halves the scale, but a scale of 0 stays 0.
        iterations = self.optimizer.inner_optimizer.iterations
        before = tf.identity(iterations.value)
        self.optimizer.apply(grads, variables)
        return StepRecord(scale, tf.cast(tf.equal(iterations.value, before), tf.float32))

    def overflow_steps(self, steps: int) -> int | None:
        return steps - int(self.optimizer.inner_optimizer.iterations.numpy())


class ArticleScaled(StepScaler):
    """The article's rule: the scaled loss moves the scale, and the gradients reach the optimizer still scaled."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        super().__init__(optimizer)
        self._rule = ArticleLossScale()
        self._scale = tf.Variable(
            self._rule.initial_state()["scale"],
            dtype=tf.float32,
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,  # all of them compute the same
        )

    def scale_loss(self, loss: Any) -> Any:
        return loss * self._scale

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        self.optimizer.apply(grads, variables)
        scale = self._scale.read_value()
        if tf.distribute.has_strategy():
            # Each replica has its share of the loss.
            scaled_loss = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, scaled_loss)
        self._scale.assign(self._rule.next_state({"scale": scale}, scaled_loss)["scale"])
        return StepRecord(scale)


def scaler_for(mode: Mode, optimizer: keras.optimizers.Optimizer, settings: Settings) -> StepScaler:
    """Wrap a fresh optimizer in the loss scaling of ``mode``, with its arguments from ``settings``."""
    if mode.scaling is None:
        return StepScaler(optimizer)
    if mode.scaling.rule == "keras":
        names = {"initial": "initial_scale", "growth_interval": "dynamic_growth_steps"}
        chosen = {names[name]: value for name, value in mode.scale_arguments(settings).items()}
        return KerasScaled(keras.optimizers.LossScaleOptimizer(optimizer, **chosen))
    if mode.scaling.rule == "article":
        return ArticleScaled(optimizer)
    rule = RULES[mode.scaling.rule]
    return Scaled(LossScaleOptimizer(optimizer, rule(**mode.scale_arguments(settings))))
