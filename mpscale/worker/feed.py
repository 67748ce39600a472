"""The batches of a pipeline: seen before the training, shown to it, held on the device and streamed to be timed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.columns import Passes
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.worker.batches import replica_number
from mpscale.worker.epochs import (
    Batch,
    Epochs,
    Seen,
    Taken,
    check_batch,
    examples_in,
    is_function,
    shapes_of,
    tensors_of,
)
from mpscale.workloads import Data, Pipeline

_LOOKED_AT, _LOOKED_AT_BYTES = 8, 2**28
"""Batches of most steps, and about most bytes, that are looked at before the training and held to time steps."""
_SHAPES_NAMED = 4
_AS_OF_A_LOST_WORKER = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError)
"""Errors of a pipeline, such as one that reads over a network, which TensorFlow also raises for a lost worker."""
_LEFT_OUT = 0.1
"""With a larger share of batches that would have to be compiled first, the time with input is unknown."""


class InputFailed(Exception):
    """A pipeline failed while steps were timed, after the training; or in it, by an error as of a lost worker."""


class Feed:
    """The batches of a pipeline for a train step, which takes as arguments one for each replica of this process.

    First these are the batches of the training, whose digest is taken on the way. Then the first of them can be held
    on the device (:meth:`hold`), or the pipeline can go on without a digest (:meth:`stream`).

    Two passes over the first batches show, before the training, whether the pipeline repeats them.

    Args:
        pipeline: what the workload's data function has returned.
        again: that function, called again for each pass if the pipeline consists of objects and not of functions.
        seed: set before each pass is made.
        steps: of the training.
        class_weight: as in Keras' fit.
        strategy: of replicas, each of which takes a batch of every step; None without one.

    Raises:
        TypeError: the pipeline is not what it should be.
        ValueError: it has no batches, its tensors are ragged or sparse, or a pass differs from another.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        again: Callable[[], Any],
        seed: int,
        steps: int,
        class_weight: Mapping[int, float] | None = None,
        strategy: tf.distribute.Strategy | None = None,
    ) -> None:
        self._strategy, self._devices = strategy, ["GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"]
        self.replicas = replicas = 1 if strategy is None else strategy.num_replicas_in_sync
        own = 0
        if strategy is not None:
            self._devices = list(strategy.extended.worker_devices)
            own = strategy.extended._get_replica_id_in_sync_group(0)
        # A process sees the batches of all replicas and trains on those of its own.
        self._own = slice(own, own + len(self._devices))
        self.position = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.cycle = 1

        def make() -> tuple[Pipeline, Epochs, Epochs | None]:
            keras.utils.set_random_seed(seed)
            made = pipeline if is_function(pipeline.train) else again()
            if not isinstance(made, Pipeline):
                raise TypeError(f"the data function returned a Pipeline first and then a {type(made).__name__}")
            train = Epochs(made.train, "train", seed, class_weight)
            test = None if made.test is None else Epochs(made.test, "test", seed, most=made.test_steps)
            return made, train, test

        # Not those that are trained on: what is left half read has drawn random numbers ahead, how many is chance.
        _, train, test = make()
        with contextlib.closing(train.forever(replicas)) as looked:
            self.first = list(_few(looked, steps))
        """The batches of the first steps."""
        check_batch(self.first[0][0], "train")
        self.first_test = None if test is None else _first(test)
        """The first batch of the test set; None without one."""
        made, self._train, self._test = make()
        self._steps = self._train.forever(replicas)
        self._peeked = deque(itertools.islice(self._steps, len(self.first)))
        self._first, self._shown = Seen(), Seen()
        self._compiled: set[str] = set()  # shapes of the batches of a step
        for batch in itertools.chain(*self.first):
            self._first.add(batch)
        self.passes = _compare(self._first, itertools.chain(*self._peeked), pipeline, made)
        # Its own, because modes may have gone through the other one more or less often, until they reached the target.
        self._final_test = None if made.test is None else Epochs(made.test, "test", seed, most=made.test_steps)
        self._test_shown, self._is_final = Seen(ordered=False), False
        self.test_examples = 0
        """Examples in the test batches since :meth:`begin_test`."""
        self._next: Callable[[], Taken] = self._of_training
        self._left_out = self._streamed = 0
        self._description = [*self._train.description, *([] if self._test is None else self._test.description)]
        self.kind, batches = self._train.kind, self._train.batches
        self.epoch_steps = None if batches is None else batches // replicas
        """Steps of an epoch at most; None if that is unknown or endless."""

    @property
    def batch(self) -> int:
        """Examples of the first step."""
        return self.replicas * examples_in(self.first[0][0])

    @property
    def held(self) -> list[Taken]:
        """The first steps whose batches are held on devices: not smaller ones, such as the last of an epoch."""
        most = max(examples_in(taken[0]) for taken in self.first)
        return [taken for taken in self.first if examples_in(taken[0]) == most]

    @property
    def examples(self) -> int:
        """Examples of a step whose batches are held."""
        return self.replicas * examples_in(self.held[0][0])

    @property
    def varies(self) -> Reason | None:
        """Why the FLOPs of a step differ from batch to batch; None if they do not, for those that are held."""
        # The graph is that of this process, and stands for other workers if their batches have the same shapes.
        is_whole = len(self._devices) == self.replicas or len(set(map(shapes_of, self.first[0]))) == 1
        if is_whole and {*map(_shapes, self.held)} == {_shapes(self.first[0])}:
            return None
        return Reason(Code.NOT_COUNTED, "FLOPs were not counted: the batches of the pipeline have several shapes")

    def sample(self) -> Data:
        """The examples of the first batches that have the shape of the own first one, and of the first test batch.

        The own first one, of this process: the step is traced with it, and other workers may have other shapes.
        """
        shape = _but_first_axis(self.first[0][self._own.start])
        alike = [batch for batch in itertools.chain(*self.first) if _but_first_axis(batch) == shape]
        joined = tf.nest.map_structure(lambda *parts: np.concatenate([part.numpy() for part in parts]), *alike)
        test = None if self.first_test is None else tf.nest.map_structure(_array, self.first_test)
        (x, y, weight), (test_x, test_y, test_weight) = map(keras.utils.unpack_x_y_sample_weight, (joined, test))
        return Data(x, y, test_x, test_y, train_weight=weight, test_weight=test_weight)

    def first_arrays(self) -> Batch:
        """The first batch of this process, as NumPy arrays."""
        return tf.nest.map_structure(_array, self.first[0][self._own.start])

    @property
    def tensors(self) -> list[Any]:
        """None: a batch is an argument."""
        return []

    @property
    def specs(self) -> tuple[Any, ...]:
        """The batches of the first step, as specifications."""
        return tf.nest.map_structure(_spec, self.first[0][self._own])

    def arguments(self) -> tuple[Any, ...]:
        """The batches of the next step."""
        return self._next()[self._own]

    def take(self, *batches: Batch) -> Batch:
        """Return the batch of the replica that is traced; part of the step, which it counts without a strategy."""
        if self._strategy is None:
            self.advance()
        return batches[replica_number()]

    def advance(self) -> None:
        """Count a step; outside of replicas."""
        self.position.assign_add(1)

    def hold(self) -> None:
        """From now on show the batches of the first steps in turn, each of which lies on the device that takes it."""
        held = [self._on_devices(taken) for taken in self.held]
        self.cycle = len(held) if len(set(map(_shapes, held))) > 1 else 1
        self._next = itertools.cycle(held).__next__

    def stream(self) -> None:
        """From now on show the batches that the pipeline gives, without a digest. Steps may raise :class:`InputFailed`.

        Those of a shape that no step was compiled for are left out: it would be compiled while it is timed.
        """
        self.cycle, self._next = 1, self._of_stream
        self._left_out = self._streamed = 0

    @property
    def too_many_left_out(self) -> bool:
        """Whether so many batches of :meth:`stream` were left out that it does not stand for the pipeline."""
        return self._left_out > _LEFT_OUT * max(self._streamed, 1)

    def begin_test(self, final: bool) -> None:
        """Before the test set is gone through; ``final``: at the end, when its examples are added to the digest."""
        self.test_examples, self._is_final = 0, final

    def test(self) -> Iterator[Batch]:
        """Yield the batches of the test set."""
        test = self._final_test if self._is_final else self._test
        assert test is not None
        for batch in test.epoch():
            self.test_examples += examples_in(batch)
            if self._is_final:
                self._test_shown.add(batch)
            yield batch

    def test_arrays(self) -> Iterator[tuple[Any, Any]]:
        """Yield examples and labels of the test set by batch, as NumPy arrays."""
        for batch in self.test():
            x, y, _ = keras.utils.unpack_x_y_sample_weight(tf.nest.map_structure(_array, batch))
            yield x, y

    def digest(self) -> str:
        """Of what the pipeline is, whatever the seed: its kind, structure, dtypes, shapes and number of batches."""
        return hashlib.sha256("\n".join(self._description).encode()).hexdigest()[:16]

    def columns(self) -> Findings:
        """What is known before the training."""
        digest = self._first.digest
        return Findings({"input_kind": self.kind, "input_passes": self.passes, "first_batches_digest": digest})

    @property
    def remark(self) -> str | None:
        """Which batches replicas did not train on so far; None if on all."""
        if not self._train.left_out:
            return None
        return (
            f"{self._train.left_out} batches of the pipeline were left out: those that remain at the end of an epoch, "
            f"where fewer than {self.replicas} are left or their numbers of examples differ"
        )

    def shown(self, planned: int) -> Findings:
        """What is known after the training, in which ``planned`` steps were to be taken."""
        found, taken = Findings(), self._shown.shapes.total() // self.replicas
        found.put("input_shapes", len(self._shown.shapes))
        named = [f"{shape} x{count}" for shape, count in self._shown.shapes.most_common(_SHAPES_NAMED)]
        more = len(self._shown.shapes) - len(named)
        found.put("input_batches", "; ".join([*named, f"{more} more"] if more else named))
        if taken < planned:
            why = f"the training ended after {taken} of {planned} steps, so it did not see all batches"
            found.miss(["data_order_digest"], Reason(Code.NOT_REACHED, why))
        else:
            both = f"{self._shown.digest} {self._test_shown.digest}".encode()
            found.put("data_order_digest", f"sha256:{hashlib.sha256(both).hexdigest()[:16]}")
        return found

    def _of_training(self) -> Taken:
        try:
            taken = self._peeked.popleft() if self._peeked else next(self._steps)
        except _AS_OF_A_LOST_WORKER as error:
            raise InputFailed(f"{type(error).__name__}: {error}") from error
        for batch in taken:
            self._shown.add(batch)
        self._compiled.add(_shapes(taken))
        return taken

    def _of_stream(self) -> Taken:
        while True:
            try:
                taken = self._peeked.popleft() if self._peeked else next(self._steps)
            except Exception as error:  # from the user's code
                raise InputFailed(f"{type(error).__name__}: {error}") from error
            self._streamed += 1
            if _shapes(taken) in self._compiled:
                return taken
            self._left_out += 1
            if self._left_out > 100 and self.too_many_left_out:
                return self.first[0]

    def _on_devices(self, taken: Taken) -> Taken:
        """Copies on the devices of this process; the batches of other processes as they are."""
        copies = list(taken)
        for number, device in enumerate(self._devices, self._own.start):
            with tf.device(device):
                copies[number] = tf.nest.map_structure(_copied, taken[number])
        return tuple(copies)


def _first(test: Epochs) -> Batch:
    with contextlib.closing(test.epoch()) as epoch:
        batch = next(epoch, None)
    if batch is None:
        raise ValueError("the test pipeline is empty")
    check_batch(batch, "test")
    return batch


def _few(steps: Iterable[Taken], most: int) -> Iterator[Taken]:
    """Yield the batches of the steps that are looked at before the training."""
    held = 0
    for taken in itertools.islice(steps, min(most, _LOOKED_AT)):
        yield taken
        held += sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in tensors_of(taken))
        if held > _LOOKED_AT_BYTES:
            return


def _compare(first: Seen, second: Iterable[Batch], pipeline: Pipeline, made: Pipeline) -> Passes:
    """Return what two passes over a pipeline show.

    Raises:
        ValueError: they differ, and the pipeline does not allow it.
    """
    seen = Seen()
    for batch in second:
        seen.add(batch)
    if seen.digest == first.digest:
        return Passes.SAME if pipeline.deterministic else Passes.ALLOWED
    if not pipeline.deterministic:
        return Passes.DIFFER
    if made.train is pipeline.train and not is_function(made.train):
        return Passes.RESHUFFLED
    raise ValueError(
        "the train pipeline gives other batches when it is made again with the same seed, so modes would be trained on "
        "different data; make everything random inside the function that makes the pipeline, with a seed (also "
        "np.random.default_rng(seed) in a generator), draw random numbers in no map with num_parallel_calls, and leave "
        "tf.data.Options().deterministic alone; or allow it with mpscale.Pipeline(..., deterministic=False)"
    )


def _shapes(taken: Taken) -> str:
    return "; ".join(map(shapes_of, taken))


def _but_first_axis(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[1:]) for tensor in tensors_of(batch)]


def _array(tensor: Any) -> Any:
    return None if tensor is None else tensor.numpy()


def _copied(tensor: Any) -> Any:
    # TensorFlow keeps text on the host.
    return tensor if tensor is None or tensor.dtype == tf.string else tf.identity(tensor)


def _spec(tensor: Any) -> Any:
    return None if tensor is None else tf.TensorSpec(tensor.shape, tensor.dtype)
