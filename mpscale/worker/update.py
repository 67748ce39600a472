"""One update of a model's weights from a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpscale.worker.scaler import StepScaler


class Update:
    """Forward pass, loss, gradients and the optimizer's work; traced into the train step.

    Args:
        model: a built Keras model.
        scaler: the mode's scaling, whose optimizer is not built yet.
        loss: ``(labels, outputs) -> scalar``; losses that the model adds itself are added here.
    """

    divides = False
    """Whether a replica's loss is its share of the loss of all of them; otherwise that is their mean."""

    def __init__(self, model: keras.Model, scaler: StepScaler, loss: Callable[[Any, Any], Any]) -> None:
        self.model, self.scaler, self._loss = model, scaler, loss
        self.added_losses = 0
        """How many losses the model adds itself; known once the step has been traced."""
        scaler.optimizer.build(model.trainable_variables)

    @property
    def variables(self) -> list[Any]:
        """All that a step may read or write."""
        return [*self.model.variables, *self.scaler.optimizer.variables]

    def overflow_steps(self, steps: int) -> int | None:
        """How many of the ``steps`` steps so far overflowed; None if the mode does not check."""
        return self.scaler.overflow_steps(steps)

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Train on a batch. Return the row of the log: the loss, and what else the mode has of a ``StepRecord``."""
        loss, scaled, grads, _ = self.differentiated(batch)
        row = {"loss": loss, **self.scaler.apply(grads, self.model.trainable_variables, scaled)._asdict()}
        return {name: value for name, value in row.items() if value is not None}

    def differentiated(
        self, batch: Any, others: Callable[[], Sequence[Any]] = tuple
    ) -> tuple[Any, Any, list[Any], list[Any]]:
        """The loss of a batch, the scaled loss, and the gradients of this for the weights.

        ``others`` is called when the loss has been traced; the tensors that it returns get their gradients, too.
        """
        x, y = batch
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.cast(self._loss(y, self.model(x, training=True)), tf.float32)
            # Regularizers and add_loss are part of the loss, as in Keras' fit.
            added = [tf.reduce_sum(tf.cast(more, tf.float32)) for more in self.model.losses]
            self.added_losses = len(added)
            loss = tf.add_n([loss, *added]) if added else loss
            scaled = self.scaler.scale_loss(_share(loss))
        grads = tape.gradient(scaled, [*variables, *others()])
        return loss, scaled, grads[: len(variables)], grads[len(variables) :]


def _share(loss: Any) -> Any:
    """What this replica contributes to the mean loss of all replicas, whose gradients the optimizer adds up."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return loss if replicas == 1 else loss / replicas
