"""A pipeline as epochs of batches, and a digest of batches."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter

from mpscale.worker.labels import text_labels
from mpscale.workloads.as_in_fit import check_weighed, classes_of
from mpscale.workloads.data import leaves
from mpscale.workloads.pipeline import check_pipeline, is_pipeline, is_py_dataset

Batch = Any
"""What Keras' fit takes: x, ``(x, y)`` or ``(x, y, sample_weight)``, of structures of tensors."""
Taken = tuple[Batch, ...]
"""The batches of a step, one for each replica."""
_MOST_LEFT_OUT = 100
"""So many steps in a row may be left out."""


class Epochs:
    """A part of a pipeline, gone through as Keras' fit does it.

    Args:
        given: a part of a :class:`Pipeline`.
        part: ``"train"`` or ``"test"``.
        seed: of the order in which fit shows the batches of a PyDataset.
        class_weight: as in fit.
        most: how many batches an epoch has at most; None for all.

    Raises:
        TypeError: it is no pipeline.
        ValueError: it has no batches, or tensors without a fixed number of axes and sizes.
    """

    def __init__(
        self, given: Any, part: str, seed: int, class_weight: Mapping[int, float] | None = None, most: int | None = None
    ) -> None:
        if is_function(given):
            given = given()
            check_pipeline(given, part, made=True)
        self._part, self._seed, self._begun = part, seed, 0
        self._given, self._class_weight = given, class_weight
        self.left_out = 0
        """How many batches :meth:`forever` has left out."""
        self._adapter = None
        self.kind = "tf.data"
        if is_py_dataset(given):
            self.kind, endless = "PyDataset", given.num_batches is None
            self._adapter = PyDatasetAdapter(given, class_weight, shuffle=part == "train")
            try:
                self._dataset = self._adapter.get_tf_dataset()
            except (TypeError, ValueError):
                _check_arrays(given[0], part, class_weight)
                raise
            self.batches = None if endless else int(given.num_batches)
        else:
            if class_weight is not None:
                if min(class_weight) < 0:
                    raise ValueError("in a tf.data pipeline, the keys of class_weight must be class numbers from 0")
                _check_weighed(given.element_spec)
            self._dataset = TFDatasetAdapter(given, class_weight).get_tf_dataset()
            known = int(given.cardinality())
            endless, self.batches = known == tf.data.INFINITE_CARDINALITY, known if known >= 0 else None
        _check_spec(self._dataset.element_spec, part)
        if most is not None:
            self._dataset = self._dataset.take(most)
        elif endless and part == "test":
            raise ValueError("the test pipeline is endless; leave out its repeat(), or say Pipeline(test_steps=...)")

    @property
    def description(self) -> list[str]:
        """What it is made of, whatever the seed."""
        return [self.kind, repr(tf.nest.map_structure(_kind, self._dataset.element_spec)), str(self.batches)]

    def epoch(self) -> Generator[Batch]:
        """Yield the batches of an epoch."""
        if self._adapter is not None:
            # fit shuffles by Python's random numbers, of which the main thread may draw some in one mode only.
            random.seed(f"{self._seed} {self._begun}")
            self._adapter.on_epoch_begin()
        self._begun += 1
        number = 0
        try:
            for batch in self._dataset:
                number += 1
                yield batch
        except tf.errors.InvalidArgumentError as error:
            if (beyond := self._without_weight(number)) is None:
                raise
            assert self._class_weight is not None
            raise ValueError(
                f"a label of the train pipeline is {beyond}, and class_weight ends at class {max(self._class_weight)}, "
                "where fit fails, too; give every class a weight, 1.0 to leave it as it is, and number classes from 0"
            ) from error
        finally:
            if self._adapter is not None:
                self._adapter.on_epoch_end()

    def _without_weight(self, number: int) -> int | None:
        """A class for which Keras finds no weight, in the batches up to the one after ``number``; None without one."""
        if self._class_weight is None or self._adapter is not None:
            return None
        for batch in self._given.take(number + 1):
            classes = classes_of(keras.utils.unpack_x_y_sample_weight(batch)[1].numpy())
            if (beyond := classes[(classes < 0) | (classes > max(self._class_weight))]).size:
                return int(beyond.flat[0])
        return None

    def forever(self, replicas: int = 1) -> Generator[Taken]:
        """Yield the batches of each step, as many in a row as there are replicas, epoch after epoch.

        Left out are batches that remain at the end of an epoch, and steps whose batches differ in their number of
        examples: replicas average their losses, so the examples of the smaller batch would count for more.

        Raises:
            ValueError: an epoch has no batches, or no step.
        """
        while True:
            batches = steps = in_a_row = 0
            waiting: list[Batch] = []
            for batch in self.epoch():
                batches += 1
                waiting.append(batch)
                if len(waiting) < replicas:
                    continue
                if replicas == 1 or len(set(map(examples_in, waiting))) == 1:
                    yield tuple(waiting)
                    steps, in_a_row = steps + 1, 0
                else:
                    self.left_out, in_a_row = self.left_out + replicas, in_a_row + 1
                waiting = []
                if in_a_row > _MOST_LEFT_OUT:
                    break
            self.left_out += len(waiting)
            if not batches:
                again = (
                    "gives nothing in its second pass, as a generator that is used up; let from_generator call a "
                    "function that makes a new one"
                )
                raise ValueError(f"the {self._part} pipeline {again if self._begun > 1 else 'is empty'}")
            if not steps or in_a_row > _MOST_LEFT_OUT:
                raise ValueError(
                    f"each step takes {replicas} batches of the {self._part} pipeline, one for each replica, and its "
                    f"first {batches} have no {replicas} in a row with the same number of examples; use smaller "
                    "batches, .batch(n, drop_remainder=True), or fewer replicas"
                )


class Seen:
    """A digest of batches and their shapes. It is computed in a thread, at most two batches behind.

    ``ordered``: whether the order of the batches counts. If not, that of their examples does not either.
    """

    def __init__(self, ordered: bool = True) -> None:
        self._total, self._sum, self._ordered = hashlib.sha256(), 0, ordered
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self.shapes: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        """Add structure, dtypes, shapes and bytes of a batch."""
        self.shapes[shapes_of(batch)] += 1
        if len(self._waiting) > 1:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._add, batch))

    @property
    def digest(self) -> str:
        """SHA-256, first 16 hex digits."""
        while self._waiting:
            self._waiting.popleft().result()
        total = self._total.copy()
        total.update(str(self._sum).encode())
        return f"sha256:{total.hexdigest()[:16]}"

    def _add(self, batch: Batch) -> None:
        arrays = [tensor.numpy() for tensor in tensors_of(batch)]
        if self._ordered:
            self._total.update(repr(tf.nest.map_structure(_kind, batch)).encode())
            _update(self._total, arrays)
            return
        for number in range(examples_in(batch)):
            example = hashlib.sha256()
            _update(example, [np.asarray(array[number]) for array in arrays])
            self._sum = (self._sum + int.from_bytes(example.digest(), "big")) % 2**256


def _update(total: Any, arrays: list[Any]) -> None:
    for array in arrays:
        for piece in _bytes_of(array):
            total.update(piece)


def _check_weighed(spec: Any) -> None:
    """Check that Keras can give class weights to what a dataset has."""
    _, labels, weight = keras.utils.unpack_x_y_sample_weight(spec)
    check_weighed(labels, weight)
    if labels.dtype == tf.string:
        raise text_labels("the labels in train_y")
    if not (labels.dtype.is_floating or labels.dtype in (tf.int8, tf.int16, tf.int32, tf.int64)):
        raise ValueError(
            f"the labels are {labels.dtype.name}, which fit cannot round to find their class_weight; cast them: "
            ".map(lambda x, y: (x, tf.cast(y, tf.int64)))"
        )


def _check_arrays(batch: Any, part: str, class_weight: Mapping[int, float] | None) -> None:
    """Put into words what Keras has refused about a batch of a PyDataset, if it is known."""
    parts = keras.utils.unpack_x_y_sample_weight(batch)
    for name, given in zip(("x", "y", "weight"), parts, strict=True):
        for path, array in [] if given is None else leaves(given):
            dtype = np.asarray(array).dtype
            if dtype.kind in "OUS":
                what = "objects of Python" if dtype.kind == "O" else "text"
                raise ValueError(
                    f"{part}_{name}{path} of the PyDataset is an array of {what} ({dtype}), which Keras cannot make a "
                    "tensor of; give numbers: for classes, number them from 0; for other text, use a tf.data.Dataset"
                )
    if class_weight is not None:
        check_weighed(*parts[1:])


def _check_spec(spec: Any, part: str) -> None:
    for leaf in tf.nest.flatten(spec):
        if isinstance(leaf, tf.RaggedTensorSpec | tf.SparseTensorSpec):
            kind = "ragged" if isinstance(leaf, tf.RaggedTensorSpec) else "sparse"
            cure = ".padded_batch(n), or .map with to_tensor()" if kind == "ragged" else ".map with tf.sparse.to_dense"
            raise ValueError(f"the {part} pipeline has {kind} tensors, which a step cannot take; use {cure}")
        if getattr(leaf, "shape", None) is not None and leaf.shape.rank == 0:
            raise ValueError(f"the {part} pipeline is not batched: an element has a single value; add .batch(n)")


def check_batch(batch: Batch, part: str) -> None:
    """Check that the first axis of everything in a batch is the example."""
    shapes = [tuple(tensor.shape) for tensor in tensors_of(batch)]
    if not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        named = " and ".join(map(str, shapes))
        raise ValueError(
            f"the {part} pipeline is not batched, or its parts have different numbers of examples: an element has "
            f"shapes {named}; add .batch(n)"
        )
    if shapes[0][0] == 0:
        raise ValueError(f"the first batch of the {part} pipeline has no examples")


def examples_in(batch: Batch) -> int:
    """How many examples a batch has."""
    return int(tensors_of(batch)[0].shape[0])


def shapes_of(batch: Batch) -> str:
    """Shapes and dtypes of a batch, as text."""
    return ", ".join(f"{tensor.dtype.name} {tuple(tensor.shape)}" for tensor in tensors_of(batch))


def tensors_of(batch: Batch) -> list[Any]:
    """The tensors of a batch, at any depth."""
    return [tensor for tensor in tf.nest.flatten(batch) if tensor is not None]


def is_function(given: Any) -> bool:
    """Whether a part of a pipeline is a function that makes it."""
    return not is_pipeline(given)


def _kind(tensor: Any) -> str:
    return "" if tensor is None else f"{tensor.dtype.name} {tensor.shape}"


def _bytes_of(array: Any) -> Iterator[Any]:
    """The contents of an array in pieces for a digest; of texts also their lengths."""
    if array.dtype.kind == "O":
        for text in array.ravel():
            yield f"{len(text)} ".encode()
            yield text
    else:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
