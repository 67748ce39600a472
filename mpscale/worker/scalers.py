"""What a train step does about the loss scale, one class for each kind of scaling that a mode can have.

Modes without scaling use the bare optimizer, since a wrapper that does nothing would still cost something and the
baseline has to be what a user would run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf

from mpscale.core.mode import Mode
from mpscale.scaling import ArticleLossScale, DynamicLossScale, LogMaxLossScale, LossScaleOptimizer, StaticLossScale


class StepRecord(NamedTuple):
    """What is known of a step beyond its loss; None is no part of the step, and so costs it nothing.

    Args:
        scale: the loss scale that it was taken with, a float32 scalar; None in modes without.
        overflow: float32 scalar, 1 if a gradient was not finite, 0 if all were; None where nobody looked.
    """

    scale: Any = None
    overflow: Any = None


class StepScaler(Protocol):
    """What the train step needs. All methods but ``overflow_steps`` are traced into it."""

    optimizer: keras.optimizers.Optimizer

    def build(self, variables: Sequence[Any]) -> None:
        """Makes every variable that :meth:`apply` will touch."""

    def scale_loss(self, loss: Any) -> Any:
        """The loss to differentiate."""

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        """Updates the weights."""

    def overflow_steps(self, steps: int) -> int | None:
        """How many of the ``steps`` so far had a non-finite gradient; None where nobody looked."""


class Unscaled:
    """The bare optimizer: fp32, tf32, mixed-bf16 and mixed-unscaled."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale_loss(self, loss: Any) -> Any:
        return loss

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        self.optimizer.apply(grads, variables)
        return StepRecord()

    def overflow_steps(self, steps: int) -> int | None:
        return None


class Scaled:
    """mpscale's LossScaleOptimizer: mixed-static, mixed-dynamic, mixed-logmax and graph-rewrite."""

    def __init__(self, optimizer: LossScaleOptimizer) -> None:
        self.optimizer: LossScaleOptimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale_loss(self, loss: Any) -> Any:
        return self.optimizer.scale_loss(loss)

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        scale = self.optimizer.loss_scale_value
        grads, finite = self.optimizer.unscale(grads)
        self.optimizer.apply(grads, variables, finite=finite)
        return StepRecord(scale, tf.cast(tf.logical_not(finite), tf.float32))

    def overflow_steps(self, steps: int) -> int | None:
        return int(self.optimizer.counters()["overflow"])


class KerasScaled:
    """Keras' own LossScaleOptimizer: mixed-keras. It counts nothing, but an overflow step is no iteration of the
    optimizer inside it.
    """

    def __init__(self, optimizer: keras.optimizers.LossScaleOptimizer) -> None:
        self.optimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale_loss(self, loss: Any) -> Any:
        return self.optimizer.scale_loss(loss)

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        scale = tf.convert_to_tensor(self.optimizer.dynamic_scale.value)
        # Not by its scale, which halves on overflow until it is 0 and then cannot fall any further.
        iterations = self.optimizer.inner_optimizer.iterations
        before = tf.identity(iterations.value)
        self.optimizer.apply(grads, variables)
        return StepRecord(scale, tf.cast(tf.equal(iterations.value, before), tf.float32))

    def overflow_steps(self, steps: int) -> int | None:
        return steps - int(self.optimizer.inner_optimizer.iterations.numpy())


class ArticleScaled:
    """The article's rule: the scaled loss moves the scale, gradients go to the optimizer as they are."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer
        self._rule = ArticleLossScale()
        self._scale = tf.Variable(self._rule.initial_state()["scale"], dtype=tf.float32, trainable=False)

    def build(self, variables: Sequence[Any]) -> None:
        self.optimizer.build(variables)

    def scale_loss(self, loss: Any) -> Any:
        return loss * self._scale

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        self.optimizer.apply(grads, variables)
        scale = self._scale.read_value()
        self._scale.assign(self._rule.next_state({"scale": scale}, scaled_loss)["scale"])
        return StepRecord(scale)

    def overflow_steps(self, steps: int) -> int | None:
        return None


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
