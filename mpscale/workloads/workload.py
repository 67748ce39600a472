"""Workload: everything about a training that is the same in every mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from mpscale.workloads import metric as metric_module
from mpscale.workloads.data import Array, Data
from mpscale.workloads.metric import ACCURACY, accuracy

if TYPE_CHECKING:
    import keras

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
