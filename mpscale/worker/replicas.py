"""One training on several devices by a tf.distribute strategy: each replica takes a part of every batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy.typing as npt
import tensorflow as tf
from keras.src.losses import loss as of_keras

from mpscale.core.case import Settings
from mpscale.core.mode import Mode
from mpscale.worker.batches import Batches
from mpscale.worker.objective import NotedLoss
from mpscale.worker.step import TrainStep
from mpscale.worker.update import Update


def strategy_of(settings: Settings) -> tf.distribute.Strategy | None:
    """The strategy of a case, None without one. The device has been touched for these settings.

    Raises:
        RuntimeError: TensorFlow sees fewer GPUs than there are replicas.
    """
    if settings.strategy == "none":
        return None
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) < settings.replicas:
        raise RuntimeError(f"{settings.replicas} replicas need as many devices, and TensorFlow sees {len(devices)}")
    return _mirrored(tuple(device.name for device in devices[: settings.replicas]))


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    """One for the process: each numbers its collective operations from the start, so two would mix theirs up."""
    return tf.distribute.MirroredStrategy(list(devices))


def under(strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager[Any]:
    """The scope under which model and optimizer are made."""
    return contextlib.nullcontext() if strategy is None else strategy.scope()


class ReplicaBatches(Batches):
    """Batches of which replica r takes columns r*b to (r+1)*b, where b is the batch of a replica.

    Every replica has all examples and its part of the order on its own device. It is made under the scope of a
    strategy, and so is :class:`ReplicatedStep`.

    Args:
        examples: as of :class:`Batches`.
        order: indices int64 (steps, replicas * b).
    """

    def __init__(self, examples: Any, order: npt.NDArray[Any]) -> None:
        devices = tf.distribute.get_strategy().extended.worker_devices
        width = order.shape[1] // len(devices)
        self._parts: list[tuple[Any, Any]] = []
        for number, device in enumerate(devices):
            with tf.device(device):
                own = tf.constant(order[:, number * width : (number + 1) * width])
                self._parts.append((tf.nest.map_structure(tf.constant, examples), own))
        # One copy on each device, so that no replica reads that of another.
        self.position = tf.Variable(
            0, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
        )

    @property
    def tensors(self) -> list[Any]:
        return list(tf.nest.flatten(self._parts))

    @property
    def own(self) -> tuple[Any, Any]:
        """Examples and order of the replica that is traced."""
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        return self._parts[int(tf.get_static_value(tf.convert_to_tensor(number)))]

    def take(self, *_: Any) -> Any:
        """Return the batch of this replica; the position moves when all of them have theirs (:meth:`advance`)."""
        examples, order = self.own
        batch = tf.gather(order, self.position % order.shape[0])
        return tf.nest.map_structure(lambda each: tf.gather(each, batch), examples)

    def advance(self) -> None:
        """Go on to the next batch; outside of the replicas."""
        self.position.assign_add(1)


class ReplicatedStep(TrainStep):
    """A train step that every replica takes, each with its part of the batch.

    Gradients are added up by the optimizer, and each replica differentiates its share of the loss, so the update is
    that of the whole batch. The log has the mean of the replicas' losses, and the loss scale and overflow on which
    they agreed.

    Args:
        update: what a replica does with its part of a batch.
        batches: of the replicas.
        steps_per_call: as of :class:`TrainStep`.
    """

    batches: ReplicaBatches

    def __init__(self, update: Update, batches: ReplicaBatches, steps_per_call: int = 1) -> None:
        self.strategy = tf.distribute.get_strategy()
        # XLA cannot compile the merge_call by which TensorFlow joins replicas (scaling/skip.py).
        super().__init__(update, batches, False, steps_per_call)

    def block(self, steps: int, one_per_call: bool = False) -> None:
        """Take steps as :class:`TrainStep` does. Returns when every device is done with them."""
        super().block(steps, one_per_call)
        tf.test.experimental.sync_devices()

    def synchronise(self) -> None:
        """Wait until every device has done all steps."""
        super().synchronise()
        tf.test.experimental.sync_devices()

    def _step(self, *_: Any) -> tuple[tf.Tensor, ...]:
        with _losses_as_they_are():
            row = self.strategy.run(lambda: self.update(self.batches.take()))
        self.batches.advance()
        self._logged = tuple(row)
        loss = self.strategy.reduce(tf.distribute.ReduceOp.MEAN, row.pop("loss"), axis=None)
        return loss, *(self.strategy.experimental_local_results(value)[0] for value in row.values())

    def _empty_step(self, *_: Any) -> tf.Tensor:
        def touch() -> None:
            for variable in self.update.variables:
                variable.value.read_value()
            for tensor in tf.nest.flatten(self.batches.own):
                tf.identity(tensor)

        self.strategy.run(touch)
        self.batches.position.assign_add(0)
        return tf.zeros(3)


@contextlib.contextmanager
def _losses_as_they_are() -> Iterator[None]:
    """Keep Keras from dividing a loss by the number of replicas, while a step is traced.

    It does so in its classes of losses, and not in its functions, nor in losses of the user's own. The step does it
    for all of them alike.
    """
    scaling = of_keras.scale_loss_for_distribution
    of_keras.scale_loss_for_distribution = lambda value: value
    try:
        yield
    finally:
        of_keras.scale_loss_for_distribution = scaling


_KERAS_ALONE = (
    "Keras' loss scaling decides by the gradients of replica 0 alone, so an overflow on another one is applied, which "
    "makes weights NaN where one device would skip the step"
)


def why_diverged(reason: str, mode: Mode, replicas: int) -> str:
    """The reason why weights are not finite, with what Keras' loss scaling does on replicas, if the mode uses it."""
    if replicas == 1 or mode.scaling is None or mode.scaling.rule != "keras":
        return reason
    return f"{reason}; {_KERAS_ALONE}. Compare mixed-dynamic, which asks all replicas, before you blame float16"


def objection(loss: NotedLoss, labels: Any, replicas: int, strategy: tf.distribute.Strategy) -> str | None:
    """Why replicas cannot train by a loss; None if they can. It has been traced; ``labels`` are those of a batch."""
    if replicas == 1:
        return None
    with _losses_as_they_are():
        if loss.differs_within(strategy.scope(), labels):
            return (
                "the loss itself divides by the number of replicas, as tf.nn.compute_average_loss does, and so does "
                "the train step: use a loss that averages over the examples that it is given, such as tf.reduce_mean"
            )
    if not loss.adds_up(labels, replicas):
        return None
    return (
        "the loss adds up its examples, and the replicas average their losses: use a loss that averages over examples, "
        "such as one without reduction='sum'"
    )


def remarks(loss: NotedLoss, labels: Any, model: keras.Model, optimizer: Any, mode: Mode, replicas: int) -> list[str]:
    """What differs from a training on one device with the whole batch, a phrase each."""
    if replicas == 1:
        return []
    found = []
    if loss.adds_up(labels, replicas) is None:
        found.append("the loss of a batch is not the mean of those of its parts, or that is unknown")
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    if any(not layer.synchronized for layer in norms):
        found.append("BatchNormalization normalises over the batch of a replica (synchronized=True: over all)")
    if any(getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue")):
        found.append("Keras clips the gradients of each replica, before they are added up")
    if mode.scaling is not None and mode.scaling.rule == "keras":
        found.append(_KERAS_ALONE)
    return found
