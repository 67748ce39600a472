"""Where a train step gets its batches from."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf


class Source(Protocol):
    """What a train step needs to get its batches."""

    position: tf.Variable
    """How many batches have been taken, int64, on the device."""
    cycle: int
    """So many batches are shown in turn and are not alike; 1 if all cost the same."""

    @property
    def tensors(self) -> list[Any]:
        """All that lies on the device, apart from the position."""

    @property
    def specs(self) -> tuple[Any, ...]:
        """What :meth:`arguments` returns first, as specifications."""

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the next step."""

    def take(self, *arguments: Any) -> Any:
        """Return the batch of a step; part of the step."""


def replica_number() -> int:
    """The replica of this process that is traced, from 0; 0 outside of replicas."""
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        return 0
    number = int(tf.get_static_value(tf.convert_to_tensor(context.replica_id_in_sync_group)))
    return number % len(context.strategy.extended.worker_devices)


class Batches:
    """Examples that lie on the device, and the order in which a training sees them.

    Args:
        examples: a structure of arrays, each (examples, ...), such as ``(x, y)``.
        order: indices into all of them, int64 (steps, batch); after the last row the first comes again.
    """

    cycle = 1
    specs: tuple[Any, ...] = ()

    def __init__(self, examples: Any, order: npt.NDArray[np.int64]) -> None:
        # int64 throughout: TensorFlow keeps the int32 tensors of a GPU program in host memory.
        self._examples, self._order = tf.nest.map_structure(tf.constant, examples), tf.constant(order)
        self.position = tf.Variable(0, dtype=tf.int64, trainable=False)
        """How many batches have been taken."""

    @property
    def tensors(self) -> list[Any]:
        """All that lies on the device, apart from the position."""
        return [*tf.nest.flatten(self._examples), self._order]

    def arguments(self) -> tuple[Any, ...]:
        """None: a step finds its batch on the device."""
        return ()

    def take(self, *_: Any) -> Any:
        """Return the next batch, of the structure of the examples; part of the train step."""
        # tf.gather and not order[position]: indexing with a tensor in Python's slice syntax recompiles at every step.
        batch = tf.gather(self._order, self.position % self._order.shape[0])
        self.position.assign_add(1)
        return tf.nest.map_structure(lambda examples: tf.gather(examples, batch), self._examples)
