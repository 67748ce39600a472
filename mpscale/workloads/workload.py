"""A workload and its data: everything about a training that is the same in every mode."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from mpscale.workloads import metric as metrics
from mpscale.workloads.as_in_fit import checked_class_weight, gathered
from mpscale.workloads.data import Array, Data
from mpscale.workloads.metric import ACCURACY, accuracy
from mpscale.workloads.pipeline import Pipeline

if TYPE_CHECKING:
    import keras

COMPILE_IT = (
    "call model.compile(optimizer, loss=..., metrics=[...]) in the function that makes the model, and make the "
    "workload by mpscale.Workload.from_compiled(function, train=(x, y), validation=(x, y)), which trains it as Keras' "
    "fit does"
)
"""The cure for what is more than an input, an output and a loss."""

_SERIES, _LONGEST_SERIES = re.compile(r"[A-Za-z0-9._-]+"), 100


def sparse_cross_entropy(labels: Any, logits: Any) -> Any:
    """Mean cross-entropy of integer labels (batch,) against logits (batch, classes), a float32 scalar."""
    import keras

    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return keras.ops.mean(losses)


@dataclass(frozen=True)
class Compiled:
    """What only a workload of a compiled model has; see :meth:`Workload.from_compiled`.

    Args:
        evaluated: whether there is validation data.
        class_weight: how much examples of each class count in training.
        callbacks: makes the callbacks.
    """

    evaluated: bool
    class_weight: Mapping[int, float] | None = None
    callbacks: Callable[[], Sequence[keras.callbacks.Callback]] | None = None


@dataclass(frozen=True)
class Workload:
    """A training to be measured.

    The fields are for a model that mpscale trains by itself. :meth:`from_compiled` takes a compiled model as it is.

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
        compiled: set by :meth:`from_compiled` alone. Optimizer and loss are then the model's. ``metric`` names the
            compiled metric that is judged; None until the worker has built the model, if that is to be the first one.
            ``evaluate_every`` is 0 for one pass over the data.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, the metric's name or direction is unknown, or the workload has no metric
            and a field that is about it.
    """

    name: str
    summary: str
    model: Callable[[], keras.Model]
    data: Callable[[], Data | Pipeline]
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
    compiled: Compiled | None = None

    @classmethod
    def from_compiled(
        cls,
        build: Callable[[], keras.Model],
        *,
        train: Any,
        validation: Any = None,
        name: str | None = None,
        summary: str = "",
        metric: str | None = None,
        metric_higher_is_better: bool | None = None,
        margin: float | None = None,
        target: float | None = None,
        batch_size: int | None = None,
        train_steps: int | None = None,
        evaluate_every: int | None = None,
        class_weight: Mapping[int, float] | None = None,
        callbacks: Callable[[], Sequence[keras.callbacks.Callback]] | None = None,
        growth_interval: int | None = None,
        series: str | None = None,
        synthetic: bool = False,
    ) -> Workload:
        """A workload of a compiled model, which is trained as Keras' ``fit`` would train it.

        ``model.compile`` says everything about the training: loss, loss weights, metrics, optimizer, ``jit_compile``
        and ``steps_per_execution``. A ``train_step`` or ``compute_loss`` of the model's own is used. The mode sets the
        dtype policy and wraps the optimizer.

        Args:
            build: makes and compiles a fresh model, without setting a dtype policy or scaling the loss. Its last layer
                should be float32.
            train: what ``fit`` takes as ``x``, ``y`` and ``sample_weight``: ``(x, y)``, ``(x, y, sample_weight)`` or
                x alone, of arrays or of nested dictionaries, tuples and lists of arrays; a tf.data.Dataset, a
                keras.utils.PyDataset or an :class:`mpscale.Pipeline`. Or a function without arguments that returns it,
                which is called in the worker; then what it draws at random is the same in every mode.
            validation: the same, for evaluation; None evaluates nothing, and then there is no verdict on the result.
            name: as for any workload; by default that of ``build``, with dashes.
            summary: one line; by default the first one of the documentation of ``build``.
            metric: the compiled metric that is judged, by its name in the logs of ``fit``, with or without ``val_``.
                By default the first compiled metric, or the validation loss (``"loss"``) if there is none.
            metric_higher_is_better: its direction; needed unless it is known for a Keras metric.
            margin: as for any workload.
            target: as for any workload.
            batch_size: examples per step, 32 by default; a pipeline has its own.
            train_steps: steps of a training, 2,000 by default.
            evaluate_every: steps of an epoch, after which callbacks run and ``target`` is looked at; by default one
                pass over the training data.
            class_weight: as in ``fit``: ``{class: weight}``.
            callbacks: a function that makes callbacks which change the training, such as
                ``keras.callbacks.LearningRateScheduler``.
            growth_interval: as for any workload.
            series: as for any workload.
            synthetic: as for any workload.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of range.
        """
        if not callable(build):
            raise TypeError(f"build must be a function that returns a compiled keras.Model, not {build!r}")
        name = str(getattr(build, "__name__", "")).strip("_").replace("_", "-") if name is None else name
        if not isinstance(name, str) or not name or name == "<lambda>":
            raise ValueError("the function that builds the model has no name; give the workload one: name='...'")
        for role, given in (("train", train), ("validation", validation)):
            if isinstance(given, Workload):
                raise TypeError(f"workload {name}: {role} must be data, not a workload")
        if train is None:
            raise TypeError(f"workload {name}: train must be data as in Keras' fit, or a function that returns it")
        if callbacks is not None and not callable(callbacks):
            raise TypeError(
                f"workload {name}: callbacks must be a function that makes them, because each training needs fresh "
                f"ones, such as lambda: [keras.callbacks.ReduceLROnPlateau()]; not {callbacks!r}"
            )
        if isinstance(train, Pipeline) and validation is not None:
            raise TypeError(f"workload {name}: a Pipeline has its own test set; say Pipeline(train, test) alone")
        evaluated = validation is not None or (isinstance(train, Pipeline) and train.test is not None)
        weights = checked_class_weight(class_weight)
        line = summary or (build.__doc__ or "").strip().partition("\n")[0]
        return cls(
            name=name,
            summary=line,
            model=build,
            data=lambda: gathered(train, validation, weights, 32 if batch_size is None else batch_size),
            optimizer="the model's",
            loss="the model's",
            metric=metric.removeprefix("val_") if isinstance(metric, str) else metric,
            metric_higher_is_better=metric_higher_is_better,
            batch_size=32 if batch_size is None else batch_size,
            train_steps=2000 if train_steps is None else train_steps,
            evaluate_every=0 if evaluate_every is None else evaluate_every,
            target=target,
            margin=margin,
            synthetic=synthetic,
            growth_interval=growth_interval,
            series=series,
            compiled=Compiled(evaluated, weights, callbacks),
        )

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
            if (field == "metric" and value is None) or self.compiled is not None:
                continue
            if isinstance(value, dict | list | tuple):
                raise TypeError(
                    f"workload {self.name}: a workload that is not compiled has one {field}, not a "
                    f"{type(value).__name__} of them; {COMPILE_IT}"
                )
            if not (callable(value) or isinstance(value, str) or metrics.is_instance_of_keras(value, kind)):
                raise TypeError(self._wrong(field, f"the name of one that Keras knows, a Keras {kind}, or a function"))
        for field in ("batch_size", "train_steps", "evaluate_every"):
            number = self._number(field, Integral, "a whole number")
            unset = field == "evaluate_every" and self.compiled is not None and number == 0
            if number is None or (number < 1 and not unset):
                raise ValueError(f"workload {self.name}: {field} must be at least 1, not {number!r}")
        interval = self._number("growth_interval", Integral, "a whole number or None")
        if interval is not None and interval < 1:
            raise ValueError(f"workload {self.name}: growth_interval must be at least 1, not {interval!r}")
        self._number("target", Real, "a number or None")
        if not isinstance(self.synthetic, bool):
            raise TypeError(self._wrong("synthetic", "True or False"))
        if self.compiled is not None:
            self._check_compiled(self.compiled)
            return
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

    def _check_compiled(self, compiled: Compiled) -> None:
        if self.metric is not None and not isinstance(self.metric, str):
            raise TypeError(self._wrong("metric", "the name of a metric that the model is compiled with"))
        if self.metric_higher_is_better is not None and not isinstance(self.metric_higher_is_better, bool):
            raise TypeError(self._wrong("metric_higher_is_better", "True or False"))
        margin = self._number("margin", Real, "a number or None")
        if margin is not None and margin < 0:
            raise ValueError(f"workload {self.name}: margin must be at least 0, not {margin!r}")
        if compiled.evaluated and self.synthetic:
            raise ValueError(
                f"workload {self.name}: nothing can be learned from synthetic inputs, so an evaluation would mean "
                "nothing; leave out validation, or synthetic"
            )
        if not compiled.evaluated:
            for field in ("metric", "metric_higher_is_better", "target", "margin"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"workload {self.name}: {field} is about the result on validation data, and there is none; "
                        "give validation, or leave it out"
                    )

    def judged_by(self, metric: str, higher_is_better: bool | None, is_share: bool) -> Workload:
        """This workload of a compiled model, once it is known by which metric it is judged.

        Args:
            metric: its name.
            higher_is_better: its direction; None if only its author knows it.
            is_share: whether it is an accuracy, whose margin is 0.01 if none is given.

        Raises:
            ValueError: its direction is unknown, or another one is given.
        """
        given = self.metric_higher_is_better
        if given is None and higher_is_better is None:
            raise ValueError(
                f"workload {self.name}: mpscale does not know if a higher {metric} is better; add "
                "metric_higher_is_better=True or False, or choose another metric of the model: metric='...'"
            )
        if None not in (given, higher_is_better) and given != higher_is_better:
            raise ValueError(
                f"workload {self.name}: metric_higher_is_better is {given}, but a "
                f"{'higher' if higher_is_better else 'lower'} {metric} is better; leave it out"
            )
        margin = 0.01 if is_share and self.margin is None else self.margin
        higher = higher_is_better if given is None else given
        return replace(self, metric=metric, metric_name=metric, metric_higher_is_better=higher, margin=margin)

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
    data: Callable[[], Data | Pipeline],
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
