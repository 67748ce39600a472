"""Workload and Data: everything about a training that is the same in every mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import keras

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Examples and labels, first axis the example; all of it is put on the device before training starts.

    Args:
        train_x, train_y: what is trained on.
        test_x, test_y: what the final metric is taken on; large, since a thousand examples cannot tell modes apart
            that differ by a percent.
        published_x, published_y: the test set that the data's publication uses, where that is another. Progress
            towards the target is followed on it, else on the test set.
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
            if (x is None) != (y is None) or (x is not None and (len(x) != len(y) or len(x) == 0)):
                raise ValueError(
                    f"{part}_x and {part}_y need the same number of examples, at least one: "
                    f"{None if x is None else len(x)} and {None if y is None else len(y)} were given"
                )

    @property
    def progress(self) -> tuple[Array, Array]:
        """The examples on which progress towards the target is followed."""
        if self.published_x is None or self.published_y is None:
            return self.test_x, self.test_y
        return self.published_x, self.published_y

    def digest(self) -> str:
        """SHA-256 over shapes, dtypes and bytes of all arrays, as 16 hex digits."""
        digest = hashlib.sha256()
        for name in self.__slots__:
            array = getattr(self, name)
            if array is not None:
                digest.update(f"{name}{array.shape}{array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def sparse_cross_entropy(labels: Any, logits: Any) -> Any:
    """Mean cross-entropy of integer labels (batch,) against logits (batch, classes), a float32 scalar."""
    import keras

    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return keras.ops.mean(losses)


def accuracy(labels: Array, logits: Array) -> float:
    """Share of the rows of ``logits`` (examples, classes) whose largest entry is at ``labels`` (examples,).

    A row that holds a NaN counts as wrong: argmax would name the NaN's own class.
    """
    right = np.argmax(logits, axis=-1) == labels
    return float(np.mean(right & ~np.isnan(logits).any(axis=-1)))


@dataclass(frozen=True)
class Workload:
    """A training to be measured.

    Args:
        name: what the user types; letters, digits, dots and single dashes.
        summary: one line.
        model: makes a fresh Keras model under the dtype policy in force. Its last layer should be float32: softmax
            and loss in float16 lose what the comparison is about.
        data: loads the data. Runs in the worker before the model is built.
        optimizer: makes the optimizer, without loss scaling.
        loss: ``(labels, outputs) -> float32 scalar``, in TensorFlow or ``keras.ops``.
        metric: ``(labels, outputs) -> float`` on NumPy arrays of the whole test set.
        metric_name: ``"accuracy"`` fills the column final_accuracy, any other name metric_value alone.
        metric_higher_is_better: its direction.
        batch_size: examples per step.
        train_steps: steps of a whole training.
        evaluate_every: steps between two looks at the metric on the way to ``target``.
        target: value of the metric that counts as trained, for steps and time to it; None where there is none.
        margin: how much worse than the baseline still counts as equal, in units of the metric.
    """

    name: str
    summary: str
    model: Callable[[], keras.Model]
    data: Callable[[], Data]
    optimizer: Callable[[], keras.optimizers.Optimizer]
    loss: Callable[[Any, Any], Any] = sparse_cross_entropy
    metric: Callable[[Array, Array], float] = accuracy
    metric_name: str = "accuracy"
    metric_higher_is_better: bool = True
    batch_size: int = 100
    train_steps: int = 2000
    evaluate_every: int = 100
    target: float | None = None
    margin: float = 0.01

    def __post_init__(self) -> None:
        if not self.name or "--" in self.name or not all(c.isalnum() or c in "-." for c in self.name):
            raise ValueError(
                f"a workload's name is made of letters, digits, dots and single dashes, which {self.name!r} is not"
            )
        for field in ("batch_size", "train_steps", "evaluate_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"workload {self.name}: {field} must be at least 1, not {getattr(self, field)!r}")

    def reached(self, value: float) -> bool:
        """Whether ``value`` of the metric is at the target or beyond."""
        if self.target is None:
            return False
        return value >= self.target if self.metric_higher_is_better else value <= self.target


def workload(
    name: str,
    *,
    data: Callable[[], Data],
    optimizer: Callable[[], keras.optimizers.Optimizer],
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
