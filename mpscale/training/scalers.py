"""What a train step does about the loss scale, one class for each kind of scaling that a mode can have.

Modes without scaling use the bare optimizer, since a wrapper that does nothing would still cost something and the
baseline has to be what a user would run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from mpscale.modes import Mode
from mpscale.scaling import (
    ArticleLossScale,
    DynamicLossScale,
    LogMaxLossScale,
    LossScaleOptimizer,
    StaticLossScale,
)

UNKNOWN = -1.0
"""Stands in the step log for a value that the mode does not have."""


class StepScaler(Protocol):
    """What the train step needs. All methods are traced into it."""

    optimizer: keras.optimizers.Optimizer

    def build(self, variables: Sequence[Any]) -> None:
        """Makes every variable that :meth:`apply` will touch."""

    def scale(self) -> Any:
        """The loss scale in force, a float32 scalar; UNKNOWN in modes without."""

    def scale_loss(self, loss: Any) -> Any:
        """The loss to differentiate."""

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> Any:
        """Updates the weights; 1 if a gradient was not finite, 0 if all were, UNKNOWN if nobody looked."""


class Unscaled:
    """The bare optimizer: fp32, tf32, mixed-bf16 and mixed-unscaled."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale(self) -> Any:
        return tf.constant(UNKNOWN)

    def scale_loss(self, loss: Any) -> Any:
        return loss

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> Any:
        self.optimizer.apply(grads, variables)
        return tf.constant(UNKNOWN)


class Scaled:
    """mpscale's LossScaleOptimizer: mixed-static, mixed-dynamic, mixed-logmax and graph-rewrite."""

    def __init__(self, optimizer: LossScaleOptimizer) -> None:
        self.optimizer: LossScaleOptimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale(self) -> Any:
        return self.optimizer.loss_scale_value

    def scale_loss(self, loss: Any) -> Any:
        return self.optimizer.scale_loss(loss)

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> Any:
        grads, finite = self.optimizer.unscale(grads)
        self.optimizer.apply(grads, variables, finite=finite)
        return tf.where(finite, 0.0, 1.0)


class KerasScaled:
    """Keras' own LossScaleOptimizer: mixed-keras. It counts nothing, but an overflow step is no iteration of the
    optimizer inside it.
    """

    def __init__(self, optimizer: keras.optimizers.LossScaleOptimizer) -> None:
        self.optimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale(self) -> Any:
        return tf.convert_to_tensor(self.optimizer.dynamic_scale.value)

    def scale_loss(self, loss: Any) -> Any:
        return self.optimizer.scale_loss(loss)

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> Any:
        # Not by its scale, which halves on overflow until it is 0 and then cannot fall any further.
        iterations = self.optimizer.inner_optimizer.iterations
        before = tf.identity(iterations.value)
        self.optimizer.apply(grads, variables)
        return tf.where(tf.equal(iterations.value, before), 1.0, 0.0)


class ArticleScaled:
    """The article's rule: the scaled loss moves the scale, gradients go to the optimizer as they are."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer
        self._rule = ArticleLossScale()
        self._scale = tf.Variable(self._rule.initial_state()["scale"], dtype=tf.float32, trainable=False)

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale(self) -> Any:
        return self._scale.read_value()

    def scale_loss(self, loss: Any) -> Any:
        return loss * self._scale

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> Any:
        self.optimizer.apply(grads, variables)
        self._scale.assign(self._rule.next_state({"scale": self._scale.read_value()}, scaled_loss)["scale"])
        return tf.constant(UNKNOWN)


def scaler_for(
    mode: Mode, optimizer: keras.optimizers.Optimizer, static_scale: float, dynamic: Mapping[str, Any]
) -> StepScaler:
    """The scaler of ``mode`` around ``optimizer``.

    Args:
        mode: what to train.
        optimizer: a fresh optimizer.
        static_scale: the loss scale of mixed-static.
        dynamic: arguments of :class:`~mpscale.scaling.DynamicLossScale` that differ from its defaults.
    """
    match mode.scaling:
        case "none":
            return Unscaled(optimizer)
        case "static":
            return Scaled(LossScaleOptimizer(optimizer, StaticLossScale(static_scale)))
        case "dynamic":
            return Scaled(LossScaleOptimizer(optimizer, DynamicLossScale(**dynamic)))
        case "logmax":
            return Scaled(LossScaleOptimizer(optimizer, LogMaxLossScale()))
        case "keras":
            return KerasScaled(keras.optimizers.LossScaleOptimizer(optimizer))
        case "article":
            return ArticleScaled(optimizer)
