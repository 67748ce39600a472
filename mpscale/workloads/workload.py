"""Workload: everything about a training that is the same in every mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from mpscale.workloads import metric as metric_module
from mpscale.workloads.metric import ACCURACY, accuracy

if TYPE_CHECKING:
    import keras
import hashlib

import numpy as np
import numpy.typing as npt

_ACCURACY_MARGIN = 0.01
"""One point."""


def sparse_cross_entropy(labels: Any, logits: Any) -> Any:
    """Mean cross-entropy of integer labels (batch,) against logits (batch, classes), a float32 scalar."""
    import keras

    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return keras.ops.mean(losses)


@dataclass(frozen=True)
class Workload:
    """A training to be measured.

    Args:
        name: what the user types; letters, digits, dots and single dashes.
        summary: one line.
        model: makes a fresh Keras model under the dtype policy in force. Its last layer should be float32: softmax
            and loss in float16 lose what the comparison is about.
        data: loads the data. Runs in the worker before the model is built.
        optimizer: makes the optimizer, without loss scaling; or a name that Keras knows, a class, or an instance, of
            which every case trains with a copy.
        loss: a name that Keras knows, a ``keras.losses.Loss``, or a function ``(labels, outputs) -> loss``, in
            TensorFlow or ``keras.ops``, of the whole batch or of each example; those are averaged, as Keras does.
        metric: a name that Keras knows, a ``keras.metrics.Metric``, or a function ``(labels, outputs) -> float`` on
            NumPy arrays of the whole test set.
        metric_name: ``"accuracy"`` fills the column final_accuracy, any other name metric_value alone. Keras' own
            metrics have a name, one of your own needs it.
        metric_higher_is_better: its direction; needed where it does not follow from a metric of Keras.
        batch_size: examples per step, and at most so many at once in an evaluation.
        train_steps: steps of a whole training.
        evaluate_every: steps between two looks at the metric on the way to ``target``.
        target: value of the metric that counts as trained, for steps and time to it; None where there is none.
        margin: how much worse than the baseline still counts as equal, in units of the metric; 0.01 for an accuracy.
            Without one, a metric gets no verdict.

    Raises:
        TypeError: a field is of a type that it cannot have.
        ValueError: a field is out of range, or the metric's name or direction is unknown.
    """

    name: str
    summary: str
    model: Callable[[], keras.Model]
    data: Callable[[], Data]
    optimizer: Callable[[], keras.optimizers.Optimizer] | keras.optimizers.Optimizer | str
    loss: Callable[[Any, Any], Any] | str = sparse_cross_entropy
    metric: Callable[[Array, Array], float] | keras.metrics.Metric | str = accuracy
    metric_name: str | None = None
    metric_higher_is_better: bool | None = None
    batch_size: int = 100
    train_steps: int = 2000
    evaluate_every: int = 100
    target: float | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        self._check_name()
        for field in ("model", "data"):
            if not callable(getattr(self, field)):
                raise TypeError(self._wrong(field, "a function without arguments"))
        for field, kind in (("optimizer", "Optimizer"), ("loss", "Loss"), ("metric", "Metric")):
            value = getattr(self, field)
            if not (callable(value) or isinstance(value, str) or metric_module.is_instance_of_keras(value, kind)):
                raise TypeError(self._wrong(field, f"the name of one that Keras knows, a Keras {kind}, or a function"))
        for field in ("batch_size", "train_steps", "evaluate_every"):
            number = self._number(field, Integral, "a whole number")
            if number is None or number < 1:
                raise ValueError(f"workload {self.name}: {field} must be at least 1, not {number!r}")
        self._number("target", Real, "a number or None")
        self._describe_metric()
        if self.metric_name == ACCURACY and self.margin is None:
            object.__setattr__(self, "margin", _ACCURACY_MARGIN)
        margin = self._number("margin", Real, "a number or None")
        if margin is not None and margin < 0:
            raise ValueError(f"workload {self.name}: margin must be at least 0, not {margin!r}")
        for field in ("target", "margin"):
            share = getattr(self, field)
            if self.metric_name == ACCURACY and share is not None and not 0 <= share <= 1:
                raise ValueError(
                    f"workload {self.name}: an accuracy is a share from 0 to 1, so {field} cannot be {share:g}"
                )

    def reached(self, value: float) -> bool:
        """Whether ``value`` of the metric is at the target or beyond."""
        if self.target is None:
            return False
        return value >= self.target if self.metric_higher_is_better else value <= self.target

    def _check_name(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.summary, str):
            raise TypeError(f"a workload's name and summary are text, not {self.name!r} and {self.summary!r}")
        if not self.name or "--" in self.name or not all(c.isalnum() or c in "-." for c in self.name):
            raise ValueError(
                f"a workload's name is made of letters, digits, dots and single dashes, which {self.name!r} is not"
            )

    def _number(self, field: str, kind: type, allowed: str) -> Any:
        """The field as a plain number of Python, NumPy's included; a bool is none, although Python says so."""
        value = getattr(self, field)
        if value is None:
            return None
        # NumPy's booleans are no numbers to Python; a float that is not finite compares with nothing.
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):  # type: ignore[arg-type]
            raise TypeError(self._wrong(field, allowed))
        plain = int(value) if kind is Integral else float(value)  # type: ignore[call-overload, arg-type]
        object.__setattr__(self, field, plain)
        return plain

    def _describe_metric(self) -> None:
        """Fills in name and direction of the metric where they follow from it."""
        name, higher = (ACCURACY, True) if self.metric is accuracy else metric_module.names(self.metric)
        if self.metric_name is not None and not isinstance(self.metric_name, str):
            raise TypeError(self._wrong("metric_name", "text"))
        if self.metric_higher_is_better is not None and not isinstance(self.metric_higher_is_better, bool):
            raise TypeError(self._wrong("metric_higher_is_better", "True or False"))
        named = self.metric_name or name
        if named is None:
            raise ValueError(
                f"workload {self.name}: a metric of your own needs a name and a direction; add "
                "metric_name='...' and metric_higher_is_better=True or False"
            )
        if named == ACCURACY and higher is None:
            higher = True
        said = self.metric_higher_is_better
        if higher is None and said is None:
            raise ValueError(
                f"workload {self.name}: it is not known whether more of {named} is better; "
                "add metric_higher_is_better=True or False"
            )
        if None not in (higher, said) and higher != said:
            raise ValueError(
                f"workload {self.name}: metric_higher_is_better={said}, but {'more' if higher else 'less'} of "
                f"{named} is better; leave it out, or give a metric of your own another metric_name"
            )
        if named == ACCURACY and not higher:
            raise ValueError(f"workload {self.name}: {name} is no accuracy; give it another metric_name")
        object.__setattr__(self, "metric_name", named)
        object.__setattr__(self, "metric_higher_is_better", higher if said is None else said)

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
    """Turns a function that makes a model into a :class:`Workload`; ``options`` are its other fields.

    ::

        @mpscale.workload("my-mlp", data=load, optimizer=lambda: keras.optimizers.Adam(1e-3), train_steps=500)
        def my_mlp():
            return keras.Sequential([...])
    """

    def decorate(model: Callable[[], keras.Model]) -> Workload:
        line = summary or (model.__doc__ or "").strip().partition("\n")[0]
        return Workload(name=name, summary=line, model=model, data=data, optimizer=optimizer, **options)

    return decorate


# Data: what a workload is trained and tested on, checked when it is made.

Array = npt.NDArray[Any]

_KINDS = "biufUS"
"""NumPy's kinds of dtype that can be trained on: booleans, integers, floats, and text for models that take it."""

_CURES = {
    "DataFrame": "pass frame.to_numpy(dtype='float32')",
    "Series": "pass series.to_numpy()",
    "list": "pass np.asarray(...) of it",
    "tuple": "pass np.asarray(...) of it",
    "dict": "models with several inputs or outputs by name are not supported yet: pass one array",
    "str": "load the file and pass its arrays",
}


@dataclass(frozen=True, slots=True)
class Data:
    """Examples and labels, first axis the example; all of it is put on the device before training starts.

    Args:
        train_x, train_y: what is trained on.
        test_x, test_y: what the final metric is taken on; large, since a thousand examples cannot tell modes apart
            that differ by a percent.
        published_x, published_y: the test set that the data's publication uses, where that is another. Progress
            towards the target is followed on it, else on the test set.

    Raises:
        TypeError: one of them is no NumPy array of numbers, booleans or text.
        ValueError: examples and labels do not fit together.
    """

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    published_x: Array | None = None
    published_y: Array | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test", "published"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            for name, array in ((f"{part}_x", x), (f"{part}_y", y)):
                if array is not None or part != "published":
                    object.__setattr__(self, name, _checked(name, array))
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if (x is None) != (y is None) or (x is not None and (len(x) != len(y) or len(x) == 0)):
                raise ValueError(
                    f"{part}_x and {part}_y need the same number of examples, at least one: "
                    f"{None if x is None else len(x)} and {None if y is None else len(y)} were given"
                )
        for part in ("test", "published"):
            for axis in "xy":
                array, trained = getattr(self, f"{part}_{axis}"), getattr(self, f"train_{axis}")
                if array is not None and array.ndim != trained.ndim:
                    raise ValueError(
                        f"{part}_{axis} has shape {array.shape} and train_{axis} {trained.shape}; "
                        "one example must have as many axes in both"
                    )

    @property
    def progress(self) -> tuple[Array, Array]:
        """The examples on which progress towards the target is followed."""
        if self.published_x is None or self.published_y is None:
            return self.test_x, self.test_y
        return self.published_x, self.published_y

    def digest(self) -> str:
        """SHA-256 over shapes, dtypes and contents of all arrays, as 16 hex digits."""
        digest = hashlib.sha256()
        for name in self.__slots__:
            array = getattr(self, name)
            if array is not None:
                digest.update(f"{name}{array.shape}{array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def _checked(name: str, array: Any) -> Array:
    """``array`` if a training can use it; text in an object array, as pandas gives it, becomes an array of text.

    Bytes of an object array are pointers, which differ from process to process.
    """
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        if any(base.__module__.startswith("tensorflow") and "Dataset" in base.__name__ for base in type(array).__mro__):
            cure = "read the data set into arrays, such as with np.stack(list(dataset.as_numpy_iterator()))"
        else:
            cure = _CURES.get(kind, "pass np.asarray(...) of it")
        raise TypeError(f"{name} must be a NumPy array, not a {kind}; {cure}")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill or drop what is masked")
    if array.ndim == 0:
        raise TypeError(f"{name} is a single value; its first axis must be the example")
    if array.dtype.kind == "O":
        return _text(name, array)
    if array.dtype.kind not in _KINDS:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which cannot be trained on; pass numbers, booleans or text, "
            f"for instance {name}.astype('float32')"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which TensorFlow does not know; pass {name}.astype('float32')"
        )
    # As a plain array: a matrix stays one of two axes whatever is taken out of it.
    return np.asarray(array)


def _text(name: str, array: Array) -> Array:
    kinds = {type(value) for value in array.flat}
    if kinds in ({str}, {bytes}):
        return array.astype(str if kinds == {str} else bytes)
    found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
    raise TypeError(
        f"{name} is an array of Python objects ({found}); pass numbers, such as {name}.astype('float32'), or text alone"
    )
