"""Data in the forms that Keras' ``fit`` takes, as the :class:`Data` of a workload with a compiled model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from mpscale.workloads.data import Array, Data, Structure, mapped
from mpscale.workloads.pipeline import Pipeline, is_pipeline, is_py_dataset

ClassWeight = Mapping[int, float]

_MOST_NAMED = 5


def gathered(train: Any, validation: Any, class_weight: ClassWeight | None, batch_size: int) -> Data | Pipeline:
    """The training and the validation set, as one.

    Args:
        train: ``(x, y)`` or ``(x, y, sample_weight)`` of arrays or structures of them, x alone, a pipeline, or a
            function without arguments that returns one of these.
        validation: the same, or None. Arrays beside a pipeline become one, and a pipeline beside arrays is read.
        class_weight: how much examples of each class count in training; 1 for classes that it leaves out. A pipeline
            does not take it from here.
        batch_size: of validation arrays beside a pipeline.

    Raises:
        TypeError, ValueError: that is no data, or its parts do not fit together.
    """
    made = train() if callable(train) else train
    if isinstance(made, Pipeline):
        return made
    if is_pipeline(made):
        # A function is called again for each pass, under the same seed.
        return Pipeline(train, None if validation is None else _as_pipeline(validation, batch_size))
    x, y, weight = _parts("train", made)
    data = Data(x, y, train_weight=weight)
    test_x, test_y, test_weight = (None, None, None) if validation is None else _parts("validation", validation)
    if class_weight is not None:
        check_weighed(data.train_y, weight)
        weight = _weights_of(data.train_y, class_weight)
    return Data(x, y, test_x, test_y, train_weight=weight, test_weight=test_weight)


def checked_class_weight(given: Any) -> ClassWeight | None:
    """``class_weight`` with plain numbers.

    Raises:
        TypeError, ValueError: it is no dictionary of class numbers and weights.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        cure = "; pass dict(enumerate(...)) of it" if isinstance(given, list | tuple | np.ndarray) else ""
        raise TypeError(f"class_weight must be a dictionary of class numbers and weights, not {given!r}{cure}")
    for number, weight in given.items():
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"a key of class_weight must be the number of a class, not {number!r}")
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"class_weight of class {number} must be a number of at least 0, not {weight!r}")
    if not any(given.values()):
        what = "is 0 for every class, so nothing would be learned" if given else "is empty"
        raise ValueError(f"class_weight {what}; leave it out, or give classes a weight above 0")
    return {int(number): float(weight) for number, weight in given.items()}


def _as_pipeline(validation: Any, batch_size: int) -> Any:
    """Validation data beside a training pipeline."""
    given = validation() if callable(validation) else validation
    if is_pipeline(given):
        return validation
    x, y, weight = _parts("validation", given)
    Data(x, y, train_weight=weight)  # checks that the parts fit together

    def batched() -> Any:
        import keras
        import tensorflow as tf

        parts = (None if part is None else keras.tree.lists_to_tuples(part) for part in (x, y, weight))
        packed = keras.utils.pack_x_y_sample_weight(*parts)
        return tf.data.Dataset.from_tensor_slices(packed).batch(batch_size)

    return batched


def _read(name: str, pipeline: Any) -> Any:
    """All batches of a pipeline as arrays."""
    import keras

    is_dataset = not is_py_dataset(pipeline)
    count = int(pipeline.cardinality()) if is_dataset else pipeline.num_batches
    if count in (-1, None):  # -1: tf.data.INFINITE_CARDINALITY
        raise ValueError(f"{name} is an endless pipeline beside training arrays; leave out its repeat(), or take(n)")
    batches = list(pipeline) if is_dataset else [pipeline[number] for number in range(count)]
    if not batches:
        raise ValueError(f"{name} is an empty pipeline")
    return keras.tree.map_structure(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *batches)


def _parts(name: str, data: Any | Callable[[], Any]) -> tuple[Structure, Structure, Structure]:
    """x, y and sample_weight, the latter two None where there are none."""
    given = data() if callable(data) else data
    given = _read(name, given) if is_pipeline(given) else given
    parts = tuple(given) if isinstance(given, tuple | list) else (given,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(
            f"{name} is a {type(given).__name__} of {len(parts)}; give x, (x, y) or (x, y, sample_weight), and several "
            "inputs as one x: ((a, b), y) or ({'a': a, 'b': b}, y)"
        )
    x, y, weight = (None if part is None else mapped(_as_array, part) for part in (*parts, None, None)[:3])
    return x, y, weight


def _as_array(_: str, value: Any) -> Any:
    """A tensor of TensorFlow's as an array; anything else as it is."""
    kind = type(value)
    is_tensor = kind.__module__.startswith("tensorflow") and kind.__name__ == "EagerTensor"
    return value.numpy() if is_tensor else value


def check_weighed(labels: Any, weight: Any) -> None:
    """Check that class weights can be given to labels, which are arrays, or tensors of a pipeline or their types.

    Raises:
        ValueError: there are sample weights, too, or there is not one array of labels.
    """
    if weight is not None:
        raise ValueError(
            "train has sample weights and there is a class_weight, too; multiply them, and leave out class_weight"
        )
    if labels is None or isinstance(labels, dict | tuple | list):
        raise ValueError(
            "class_weight needs one array of labels, as in fit; give sample weights: (x, y, sample_weight)"
        )


def classes_of(labels: Array) -> Array:
    """The class of each example, as Keras' ``fit`` finds it: a rounded number, or the place of the largest entry.

    A label that is not finite gets a number that no class has, as when ``fit`` casts it.
    """
    if labels.ndim > 1:
        labels = labels[..., 0] if labels.shape[-1] == 1 else labels.argmax(axis=-1)
    finite = np.isfinite(labels)
    return np.where(finite, np.round(np.where(finite, labels, 0)).astype(np.int64), np.iinfo(np.int32).min)


def class_weight_remarks(labels: Array, class_weight: ClassWeight | None, piped: bool) -> list[str]:
    """What class weights do that nobody would expect, a phrase each.

    Args:
        labels: of the training set, numbers.
        class_weight: of some of their classes; None of none.
        piped: whether the labels are the first ones of a pipeline.
    """
    if class_weight is None:
        return []
    found, where = [], "in the first batches" if piped else "in the training data"
    classes = np.unique(classes_of(labels))
    if without := [int(number) for number in classes if number not in class_weight]:
        found.append(f"class_weight leaves out {_named(without)} {where}: their examples count as 1, as in fit")
    if not piped and (unknown := sorted(class_weight.keys() - set(classes.tolist()))):
        found.append(f"class_weight has {_named(unknown)}, of which the training data has no example")
    if labels.ndim > 1 and labels.shape[-1] > 1:
        if labels.min() < 0 or not np.allclose(labels.sum(axis=-1), 1.0, atol=1e-3):
            found.append(
                f"labels of shape {labels.shape[1:]} are not one-hot: as in fit, the largest entry of an example, or "
                "the first of several, is the class whose class_weight counts"
            )
    elif labels.dtype.kind == "f" and not (labels == np.round(labels)).all():
        found.append(f"labels {where} are not whole numbers: as in fit, they are rounded to find their class_weight")
    return found


def _named(classes: list[int]) -> str:
    """Classes in words."""
    named = ", ".join(map(str, classes[:_MOST_NAMED])) + (", ..." if len(classes) > _MOST_NAMED else "")
    return f"class{'es' if len(classes) > 1 else ''} {named}"


def _weights_of(labels: Structure, class_weight: ClassWeight) -> Array:
    """The weight of each example."""
    classes = None if labels.dtype.kind not in "biuf" else classes_of(labels)
    if classes is None or classes.ndim > 1:
        raise ValueError(
            "class_weight needs one class number, or one-hot labels, per example, as in fit; give sample weights: "
            "(x, y, sample_weight)"
        )
    if not np.isin(classes, list(class_weight)).any():
        raise ValueError(
            f"class_weight has {_named(sorted(class_weight))}, but the training data has "
            f"{_named(np.unique(classes).tolist())}, so it would change nothing; number the classes as the labels do"
        )
    weights = np.ones(len(classes), np.float32)
    for number, weight in class_weight.items():
        weights[classes == number] = weight
    return weights
