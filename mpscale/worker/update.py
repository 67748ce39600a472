"""One update of a model's weights from a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from mpscale.worker.scaler import StepRecord, StepScaler

Others = Callable[[Sequence[Any]], Iterable[Any]]
"""Called when a loss has been traced, with the weights for which it is about to be differentiated; returns tensors."""


@dataclass
class Applied:
    """A call of an optimizer's ``apply``.

    Args:
        name: of the optimizer: the attribute of the model that holds it.
        grads: those that were applied, multiplied by the loss scale.
        variables: their weights.
        others: other tensors on which the loss depends, with their gradients; None for a gradient that there is not.
        losses: what was differentiated, unscaled; empty if that is not known.
        record: loss scale and overflow.
    """

    name: str
    grads: list[Any]
    variables: list[Any]
    others: list[tuple[Any, Any]]
    losses: list[Any]
    record: StepRecord


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
        (applied,) = self.applied(batch)
        row = {"loss": loss_of([applied]), **applied.record._asdict()}
        return {name: value for name, value in row.items() if value is not None}

    def applied(self, batch: Any, others: Others = lambda _: ()) -> list[Applied]:
        """Train on a batch. Return what the optimizer has applied; ``others`` get their gradients, too."""
        x, y = batch
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.cast(self._loss(y, self.model(x, training=True)), tf.float32)
            # Regularizers and add_loss are part of the loss, as in Keras' fit.
            added = [tf.reduce_sum(tf.cast(more, tf.float32)) for more in self.model.losses]
            self.added_losses = len(added)
            loss = tf.add_n([loss, *added]) if added else loss
            scaled = self.scaler.scale_loss(_share(loss))
        more = list(others(variables))
        grads = tape.gradient(scaled, [*variables, *more])
        grads, of_others = grads[: len(variables)], list(zip(more, grads[len(variables) :], strict=True))
        record = self.scaler.apply(grads, variables, scaled)
        return [Applied("optimizer", grads, variables, of_others, [loss], record)]


def loss_of(applied: Iterable[Applied]) -> Any:
    """The loss of a step, a float32 scalar: the sum of all that was differentiated, each once."""
    return total([*{id(loss): loss for each in applied for loss in tf.nest.flatten(each.losses)}.values()])


def total(losses: list[Any]) -> Any:
    """The sum of losses, a float32 scalar: what their gradients are those of."""
    flat = [tf.convert_to_tensor(loss) for loss in tf.nest.flatten(losses)]
    flat = [loss if loss.dtype == tf.float32 else tf.cast(loss, tf.float32) for loss in flat]
    flat = [loss if loss.shape.rank == 0 else tf.reduce_sum(loss) for loss in flat]
    return flat[0] if len(flat) == 1 else tf.add_n(flat)


def key_of(variable: Any) -> int:
    """Identifies a weight, given as a variable of Keras, or as that of TensorFlow which it holds, also on a replica."""
    held = getattr(variable, "_value", variable)
    of_all = getattr(held, "_distributed_container", None)
    return id(held if of_all is None else of_all())


def _share(loss: Any) -> Any:
    """What this replica contributes to the mean loss of all replicas, whose gradients the optimizer adds up."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return loss if replicas == 1 else loss / replicas
