"""A workload and its data: everything about a training that is the same in every mode."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpscale.workloads import metric as metrics
from mpscale.workloads.metric import ACCURACY, accuracy

if TYPE_CHECKING:
    import keras

Array = npt.NDArray[Any]

_KINDS = "biufUS"
"""NumPy's kinds of dtype that can be trained on: booleans, integers, floats, and text for models that accept it."""

_SERIES, _LONGEST_SERIES = re.compile(r"[A-Za-z0-9._-]+"), 100

_CURES = {
    "DataFrame": "pass frame.to_numpy(dtype='float32')",
    "Series": "pass series.to_numpy()",
    "dict": "mpscale trains models with one input and one output, so pass one array",
    "str": "load the file and pass its arrays",
}


def sparse_cross_entropy(labels: Any, logits: Any) -> Any:
    """Mean cross-entropy of integer labels (batch,) against logits (batch, classes), a float32 scalar."""
    import keras

    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return keras.ops.mean(losses)


@dataclass(frozen=True, slots=True)
class Data:
    """Examples and labels. The first axis is the example. All of it is put on the device before the training.

    Args:
        train_x, train_y: the training set.
        test_x, test_y: the test set, on which the final metric is computed. It should be large: a thousand examples
            cannot distinguish modes that differ by one percent. A workload without a metric needs none.
        published_x, published_y: the test set of the data's publication, if that is another. Progress towards the
            target is then measured on it instead of the test set.

    Raises:
        TypeError: one of them is not a NumPy array of numbers, booleans or text.
        ValueError: examples and labels do not fit together.
    """

    train_x: Array
    train_y: Array
    test_x: Array | None = None
    test_y: Array | None = None
    published_x: Array | None = None
    published_y: Array | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            array = getattr(self, name)
            if array is not None or name.startswith("train"):
                object.__setattr__(self, name, _checked(name, array))
        for part in ("train", "test", "published"):
            arrays = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            x, y = (None if array is None else len(array) for array in arrays)
            if x is None and y is None:
                continue
            if x != y or x == 0:
                raise ValueError(
                    f"{part}_x has {x or 'no'} examples and {part}_y has {y or 'no'}; both need the same number, at "
                    "least one"
                )
            for axis, array, trained in zip("xy", arrays, (self.train_x, self.train_y), strict=True):
                if array is not None and array.ndim != trained.ndim:
                    raise ValueError(
                        f"{part}_{axis} has shape {array.shape} but train_{axis} has {trained.shape}; an example needs "
                        "as many axes in both"
                    )

    @property
    def test(self) -> tuple[Array, Array]:
        """The test set.

        Raises:
            ValueError: there is none.
        """
        if self.test_x is None or self.test_y is None:
            raise ValueError(
                "the data has no test set, on which the workload's metric would be computed; add test_x and test_y, or "
                "set metric=None"
            )
        return self.test_x, self.test_y

    @property
    def progress(self) -> tuple[Array, Array]:
        """The examples on which progress towards the target is measured.

        Raises:
            ValueError: there are none.
        """
        if self.published_x is None or self.published_y is None:
            return self.test
        return self.published_x, self.published_y

    def digest(self) -> str:
        """SHA-256 of shapes, dtypes and contents of all arrays, first 16 hex digits."""
        digest = hashlib.sha256()
        for name in self.__slots__:
            array = getattr(self, name)
            if array is not None:
                digest.update(f"{name}{array.shape}{array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Workload:
    """A training to be measured.

    Args:
        name: what the user types; letters, digits, dots and single dashes.
        summary: one line.
        model: makes a fresh Keras model under the current dtype policy. Its last layer should be float32: softmax and
            loss in float16 lose the differences that are to be measured.
        data: loads the data; called in the worker before the model is built.
        optimizer: a function that makes the optimizer, without loss scaling; or a name that Keras knows, a class, or an
            instance, which each case copies.
        loss: a name that Keras knows, a ``keras.losses.Loss``, or a function ``(labels, outputs) -> loss`` in
            TensorFlow or ``keras.ops``. It returns one number, or one per example; these are averaged, as Keras does.
        metric: a name that Keras knows, a ``keras.metrics.Metric``, or a function ``(labels, outputs) -> float`` of
            NumPy arrays, called with the whole test set. None for a training of which only loss, speed, memory and
            overflow are of interest: then nothing is evaluated, and there is no verdict on its result.
        metric_name: ``"accuracy"`` fills the columns final_accuracy and metric_value, any other name only the latter.
            Keras' own metrics have a name; a metric of your own needs one.
        metric_higher_is_better: the metric's direction; needed unless it is known for a Keras metric.
        batch_size: examples per step, and per batch of an evaluation.
        train_steps: steps of a training.
        evaluate_every: steps between two evaluations on the way to ``target``.
        target: value of the metric at which the workload counts as trained, for the steps and time to get there; None
            if there is none.
        margin: how much worse than the baseline still counts as equal, in units of the metric; 0.01 for an accuracy.
            Without a margin a metric gets no verdict.
        synthetic: whether inputs and labels are drawn at random, so that nothing can be learned; needs ``metric=None``.
        growth_interval: steps without overflow after which a dynamic loss scale doubles; None for the usual 2,000. A
            tenth of ``train_steps`` suits a training that is complete. If the workload is the beginning of a longer
            training, take that one's interval: a shorter one shows more overflow than the longer training will have.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, the metric's name or direction is unknown, or the workload has no metric
            and a field that is about it.
    """

    name: str
    summary: str
    model: Callable[[], keras.Model]
    data: Callable[[], Data]
    optimizer: Callable[[], keras.optimizers.Optimizer] | keras.optimizers.Optimizer | str
    loss: Callable[[Any, Any], Any] | str = sparse_cross_entropy
    metric: Callable[[Array, Array], float] | keras.metrics.Metric | str | None = accuracy
    metric_name: str | None = None
    metric_higher_is_better: bool | None = None
    batch_size: int = 100
    train_steps: int = 2000
    evaluate_every: int = 100
    target: float | None = None
    margin: float | None = None
    synthetic: bool = False
    growth_interval: int | None = None
    series: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.summary, str):
            raise TypeError(f"a workload's name and summary must be text, not {self.name!r} and {self.summary!r}")
        if not self.name or "--" in self.name or not all(c.isalnum() or c in "-." for c in self.name):
            raise ValueError(
                f"a workload's name must consist of letters, digits, dots and single dashes, not {self.name!r}"
            )
        if self.series is not None:
            if not isinstance(self.series, str):
                raise TypeError(self._wrong("series", "text or None"))
            if len(self.series) > _LONGEST_SERIES or not _SERIES.fullmatch(self.series):
                raise ValueError(
                    f"workload {self.name}: series must consist of letters, digits, dots, dashes and underscores, at "
                    f"most {_LONGEST_SERIES}, not {self.series[:_LONGEST_SERIES]!r}"
                )
        for field in ("model", "data"):
            if not callable(getattr(self, field)):
                raise TypeError(self._wrong(field, "a function without arguments"))
        for field, kind in (("optimizer", "Optimizer"), ("loss", "Loss"), ("metric", "Metric")):
            value = getattr(self, field)
            if field == "metric" and value is None:
                continue
            if not (callable(value) or isinstance(value, str) or metrics.is_instance_of_keras(value, kind)):
                raise TypeError(self._wrong(field, f"the name of one that Keras knows, a Keras {kind}, or a function"))
        for field in ("batch_size", "train_steps", "evaluate_every"):
            number = self._number(field, Integral, "a whole number")
            if number is None or number < 1:
                raise ValueError(f"workload {self.name}: {field} must be at least 1, not {number!r}")
        interval = self._number("growth_interval", Integral, "a whole number or None")
        if interval is not None and interval < 1:
            raise ValueError(f"workload {self.name}: growth_interval must be at least 1, not {interval!r}")
        self._number("target", Real, "a number or None")
        if not isinstance(self.synthetic, bool):
            raise TypeError(self._wrong("synthetic", "True or False"))
        if self.metric is None:
            self._check_without_metric()
            return
        if self.synthetic:
            raise ValueError(
                f"workload {self.name}: nothing can be learned from synthetic inputs, so a metric would mean nothing; "
                "set metric=None, or leave out synthetic"
            )
        self._describe_metric()
        if self.metric_name == ACCURACY and self.margin is None:
            object.__setattr__(self, "margin", 0.01)
        margin = self._number("margin", Real, "a number or None")
        if margin is not None and margin < 0:
            raise ValueError(f"workload {self.name}: margin must be at least 0, not {margin!r}")
        for field in ("target", "margin"):
            share = getattr(self, field)
            if self.metric_name == ACCURACY and share is not None and not 0 <= share <= 1:
                raise ValueError(
                    f"workload {self.name}: {field} of an accuracy must be a share from 0 to 1, not {share:g}"
                )

    def _check_without_metric(self) -> None:
        for field in ("metric_name", "metric_higher_is_better", "target", "margin"):
            if getattr(self, field) is not None:
                raise ValueError(f"workload {self.name}: {field} belongs to a metric, and metric is None; leave it out")

    def reached(self, value: float) -> bool:
        """Whether ``value`` of the metric is at or beyond the target."""
        if self.target is None:
            return False
        return value >= self.target if self.metric_higher_is_better else value <= self.target

    def _number(self, field: str, kind: type, allowed: str) -> Any:
        """Replace a NumPy number in the field by a plain one, and return it. A bool does not count as a number here."""
        value = getattr(self, field)
        if value is None:
            return None
        # isinstance rules out NumPy's booleans too. A number that is not finite could not be compared.
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):  # type: ignore[arg-type]
            raise TypeError(self._wrong(field, allowed))
        plain = int(value) if kind is Integral else float(value)  # type: ignore[call-overload, arg-type]
        object.__setattr__(self, field, plain)
        return plain

    def _describe_metric(self) -> None:
        """Fill in name and direction of a metric for which they are known."""
        name, higher = (ACCURACY, True) if self.metric is accuracy else metrics.names(self.metric)
        if self.metric_name is not None and not isinstance(self.metric_name, str):
            raise TypeError(self._wrong("metric_name", "text"))
        if self.metric_higher_is_better is not None and not isinstance(self.metric_higher_is_better, bool):
            raise TypeError(self._wrong("metric_higher_is_better", "True or False"))
        named = self.metric_name or name
        if named is None:
            raise ValueError(
                f"workload {self.name}: a metric of your own needs a name and a direction; add metric_name='...' and "
                "metric_higher_is_better=True or False"
            )
        if named == ACCURACY and higher is None:
            higher = True
        given = self.metric_higher_is_better
        if higher is None and given is None:
            raise ValueError(
                f"workload {self.name}: mpscale does not know if a higher {named} is better; add "
                "metric_higher_is_better=True or False"
            )
        if None not in (higher, given) and higher != given:
            raise ValueError(
                f"workload {self.name}: metric_higher_is_better is {given}, but a {'higher' if higher else 'lower'} "
                f"{named} is better; leave it out, or give a metric of your own another metric_name"
            )
        if named == ACCURACY and not higher:
            raise ValueError(f"workload {self.name}: {name} is not an accuracy; give it another metric_name")
        object.__setattr__(self, "metric_name", named)
        object.__setattr__(self, "metric_higher_is_better", higher if given is None else given)

    def _wrong(self, field: str, allowed: str) -> str:
        return f"workload {self.name}: {field} must be {allowed}, not {getattr(self, field)!r}"


def workload(
    name: str,
    *,
    data: Callable[[], Data],
    optimizer: Callable[[], keras.optimizers.Optimizer] | keras.optimizers.Optimizer | str,
    summary: str = "",
    **options: Any,
) -> Callable[[Callable[[], keras.Model]], Workload]:
    """Turn a function that makes a model into a :class:`Workload`. ``options`` are its other fields.

    ::

        @mpscale.workload("my-mlp", data=load, optimizer=lambda: keras.optimizers.Adam(1e-3), train_steps=500)
        def my_mlp():
            return keras.Sequential([...])
    """

    def decorate(model: Callable[[], keras.Model]) -> Workload:
        line = summary or (model.__doc__ or "").strip().partition("\n")[0]
        return Workload(name=name, summary=line, model=model, data=data, optimizer=optimizer, **options)

    return decorate


def _checked(name: str, array: Any) -> Array:
    """Return ``array`` if it can be trained on; turn an object array of text, as pandas returns it, into one of text.

    The bytes of an object array are pointers, which differ between processes.
    """
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        if any(base.__module__.startswith("tensorflow") and "Dataset" in base.__name__ for base in type(array).__mro__):
            cure = "read the data set into arrays, for example with np.stack(list(dataset.as_numpy_iterator()))"
        else:
            cure = _CURES.get(kind, "pass np.asarray(...) of it")
        raise TypeError(f"{name} must be a NumPy array, not a {kind}; {cure}")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill or drop the masked values")
    if array.ndim == 0:
        raise TypeError(f"{name} is a single value; its first axis must be the example")
    if array.dtype.kind == "O":
        kinds = {type(value) for value in array.flat}
        if kinds in ({str}, {bytes}):
            return array.astype(kinds.pop())
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise TypeError(
            f"{name} is an array of Python objects ({found}); pass only numbers, for example {name}.astype('float32'), "
            "or only text"
        )
    if array.dtype.kind not in _KINDS:
        raise TypeError(
            f"{name} has dtype {array.dtype}; pass numbers, booleans or text, for example {name}.astype('float32')"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which TensorFlow does not support; pass {name}.astype('float32')"
        )
    # As a plain array: slices of a np.matrix would keep two axes.
    return np.asarray(array)
