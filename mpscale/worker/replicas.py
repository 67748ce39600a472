"""One training on several devices by a tf.distribute strategy: each replica takes a part of every batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from keras.src.losses import loss as of_keras

from mpscale.core.case import Settings
from mpscale.core.mode import Mode
from mpscale.worker import model as models
from mpscale.worker.batches import Batches, replica_number
from mpscale.worker.cluster import JoinedCluster, cluster_of
from mpscale.worker.feed import Feed
from mpscale.worker.objective import NotedLoss
from mpscale.worker.step import Log, TrainStep
from mpscale.worker.update import Update


def strategy_of(settings: Settings) -> tf.distribute.Strategy | None:
    """The strategy of a case, None without one. The device has been touched for these settings.

    Raises:
        RuntimeError: TensorFlow sees fewer GPUs than there are replicas.
    """
    if settings.strategy == "none":
        return None
    cluster = cluster_of(settings)
    if cluster is not None:
        return cluster.strategy
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
        strategy = tf.distribute.get_strategy()
        width, devices = order.shape[1] // strategy.num_replicas_in_sync, strategy.extended.worker_devices
        # Numbers count the replicas of all workers, and devices are those of this one.
        numbers = strategy.experimental_distribute_values_from_function(
            lambda replica: replica.replica_id_in_sync_group
        )
        self._parts: list[tuple[Any, Any]] = []
        for number, device in zip(strategy.experimental_local_results(numbers), devices, strict=True):
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
        return self._parts[replica_number()]

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
    that of the whole batch. The log has the mean of the replicas' losses, or the sum of shares if the update divides
    by itself, and the loss scale and overflow on which they agreed.

    Args:
        update: what a replica does with its part of a batch.
        batches: of the replicas.
        steps_per_call: as of :class:`TrainStep`.
        cluster: the workers that train together; None if this process trains alone.

    Raises:
        ValueError: a variable belongs to no replica.
    """

    batches: ReplicaBatches | Feed

    def __init__(
        self,
        update: Update,
        batches: ReplicaBatches | Feed,
        steps_per_call: int = 1,
        cluster: JoinedCluster | None = None,
    ) -> None:
        self.strategy, self.cluster = tf.distribute.get_strategy(), cluster
        _check_made_here(update.variables)
        # XLA cannot compile the merge_call by which TensorFlow joins replicas (scaling/skip.py).
        super().__init__(update, batches, False, steps_per_call)

    def block(self, steps: int, one_per_call: bool = False) -> None:
        """Take steps as :class:`TrainStep` does. Returns when every device is done with them."""
        super().block(steps, one_per_call)
        self._await_devices()

    def synchronise(self) -> None:
        """Wait until every device has done all steps."""
        super().synchronise()
        self._await_devices()

    def _await_devices(self) -> None:
        """Of this process; tf.test.experimental.sync_devices would also turn to those of other workers."""
        for device in self.strategy.extended.worker_devices:
            with tf.device(device):
                tf.raw_ops.SyncDevice()

    def agreed(self, value: Any) -> Any:
        return value if self.cluster is None else self.cluster.agreed(value)

    def weights_finite(self) -> bool:
        return bool(self.agreed(super().weights_finite()))

    def check_weights(self, name: str) -> None:
        """Check that all workers have the same weights, which callbacks can change by what differs, such as the time.

        Statistics of batches, which are not trained, are those of each worker.

        Raises:
            ValueError: they do not; it calls them ``name``.
        """
        if self.cluster is not None:
            trained = models.weights_of(self.update.model.trainable_variables)
            self.cluster.check_same({name: models.arrays_digest(each.numpy() for each in trained)})

    def last_loss(self) -> float:
        return float(self._of_workers(np.float32(super().last_loss())))

    def read_log(self) -> Log:
        log = super().read_log()
        # Not in the step: a user's step would not wait for the others once more, only for their losses.
        return replace(log, loss=self._of_workers(log.loss))

    def _of_workers(self, losses: Any) -> Any:
        """Losses of all workers, from those of this one, float32."""
        if self.cluster is None:
            return losses
        return self.cluster.total(losses) if self.update.divides else self.cluster.mean(losses)

    def _step(self, *batches: Any) -> tuple[tf.Tensor, ...]:
        def step() -> dict[str, Any]:
            batch = self.batches.take(*batches)
            if replica_number() == 0:
                self.batch = batch
            return self.update(batch)

        with contextlib.nullcontext() if self.update.divides else _losses_as_they_are():
            row = self.strategy.run(step)
        self.batches.advance()
        self._logged = tuple(row)
        losses = self.strategy.experimental_local_results(row.pop("loss"))
        loss = tf.add_n(losses) if self.update.divides else tf.add_n(losses) / len(losses)
        return loss, *(self.strategy.experimental_local_results(value)[0] for value in row.values())

    def _empty_step(self, *batches: Any) -> tf.Tensor:
        def touch() -> None:
            for variable in self.update.variables:
                variable.value.read_value()
            fed = self.batches.own if isinstance(self.batches, ReplicaBatches) else self.batches.take(*batches)
            for tensor in tf.nest.flatten(fed):
                if tensor is not None:
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


class _OneReplica(tf.distribute.ReplicaContext):
    """A replica that has no other to wait for."""

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        return value

    def all_gather(self, value: Any, axis: int, options: Any = None) -> Any:
        return value


@contextlib.contextmanager
def alone(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Be the first replica of this process, as if there were no other: nothing is divided by their number.

    Variables are those of this replica, so that nothing is added up over replicas.
    """
    first = strategy.extended._get_replica_id_in_sync_group(0)
    with (
        strategy.scope(),
        _OneReplica(strategy, first),
        tf.device(strategy.extended.worker_devices[0]),
        of_one(strategy),
    ):
        yield


def look(call: Callable[[Any], Any], specs: Any, strategy: tf.distribute.Strategy) -> None:
    """Trace a call on one replica, so that the variables that it makes are there: replicas that wait can make none.

    In a graph and not in a ``tf.function``, which could not initialise variables of several replicas.
    """
    with tf.__internal__.FuncGraph("look").as_default(), alone(strategy):
        call(tf.nest.map_structure(lambda spec: tf.compat.v1.placeholder(spec.dtype, spec.shape), specs))


@contextlib.contextmanager
def of_one(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Let a strategy say that it has one replica, to whatever divides a loss by that."""
    kind: Any = type(strategy)
    kind.num_replicas_in_sync = property(lambda _: 1)  # hides that of its base
    try:
        yield
    finally:
        del kind.num_replicas_in_sync


def on_replicas(variable: Any) -> tuple[Any, ...]:
    """The variables of TensorFlow that are a variable on the replicas of this process; itself if it is on none."""
    return tuple(variable._values) if isinstance(variable, tf.distribute.DistributedValues) else (variable,)


@contextlib.contextmanager
def restored(variables: Sequence[tf.Variable]) -> Iterator[None]:
    """Give variables back the values that they have now."""
    kept = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in kept:
            variable.assign(value)


def check_optimizers(optimizers: Sequence[Any]) -> None:
    """Raise ValueError if replicas cannot train with an optimizer."""
    for optimizer in optimizers:
        if getattr(optimizer, "gradient_accumulation_steps", None):
            raise ValueError(
                f"{type(optimizer).__name__} has gradient_accumulation_steps, which Keras cannot do on replicas: it "
                "branches where they have to wait for each other; leave it out, or leave out --mp-strategy"
            )


def _check_made_here(variables: Sequence[Any]) -> None:
    for variable in variables:
        if not isinstance(variable.value, tf.distribute.DistributedValues):
            raise ValueError(
                f"the variable {variable.path} was made before replicas were, for example when the workload's module "
                "was imported, so each replica would change it again; make all layers, optimizers and metrics inside "
                "the function of the workload"
            )


def objection(step: ReplicatedStep, loss: NotedLoss | None, labels: Any, mode: Mode) -> str | None:
    """Why replicas cannot train so; None if they can.

    Args:
        step: has been traced.
        loss: the workload's; None if its model is compiled, which trains as in Keras' fit whatever its loss does.
        labels: of a batch.
        mode: of the case.
    """
    replicas, strategy = step.strategy.num_replicas_in_sync, step.strategy
    if replicas == 1:
        return None
    if step.cluster is not None and step.cluster.workers > 1 and _decides_by_replica_0(mode):
        return (
            f"in {mode.name} Keras decides on each worker by itself whether to skip a step, and workers that decide "
            "differently would wait for each other for ever; use mixed-dynamic, or --mp-strategy mirrored"
        )
    if loss is None:
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


def remarks(
    loss: NotedLoss | None, labels: Any, model: keras.Model, optimizers: Sequence[Any], mode: Mode, replicas: int
) -> list[str]:
    """What differs from a training on one device with the whole batch, a phrase each; ``loss``: None if compiled."""
    if replicas == 1:
        return []
    found = []
    if loss is not None and loss.adds_up(labels, replicas) is None:
        found.append("the loss of a batch is not the mean of those of its parts, or that is unknown")
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    if any(not layer.synchronized for layer in norms):
        found.append("BatchNormalization normalises over the batch of a replica (synchronized=True: over all)")
    clips = ("clipnorm", "global_clipnorm", "clipvalue")
    if any(getattr(optimizer, name, None) for optimizer in optimizers for name in clips):
        found.append("Keras clips the gradients of each replica, before they are added up")
    if _decides_by_replica_0(mode):
        found.append(_KERAS_ALONE)
    return found


def _decides_by_replica_0(mode: Mode) -> bool:
    """Whether an overflow on another replica of the process goes unnoticed."""
    return mode.scaling is not None and mode.scaling.rule == "keras"
