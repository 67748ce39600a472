"""The model and the optimizer of a workload, refused where mpscale's step would train something else than they say."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import marshal
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.scaling.skip import all_nodes
from mpscale.worker.precision import computes_below_float32

_STEPS = (
    "train_step", "compute_loss", "_compute_loss", "make_train_function", "train_on_batch", "fit", "test_step",
    "predict_step",
)  # fmt: skip
"""Methods of a Keras model that say how it is trained and evaluated."""

_EXCLUDED = ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern")
_SETTINGS = (bool, int, float, str)
_STATE = ("built", "_built", "_lock", "name")
"""Attributes of an optimizer that are no settings."""


def make_model(build: Any) -> keras.Model:
    """The workload's model.

    Raises:
        TypeError: it is no Keras model.
        ValueError: it says how it is to be trained, which mpscale's step would ignore.
    """
    model = build()
    if not isinstance(model, keras.Model):
        raise TypeError(f"the workload's model must return a keras.Model, not {_kind(model)}")
    own = [name for name in _STEPS if _overrides(model, name)]
    if own:
        raise ValueError(
            f"{type(model).__name__} has a {' and a '.join(own)} of its own, which mpscale would ignore, since "
            "it trains and evaluates by itself; put what it adds into the workload's loss or metric, or into the model "
            "by add_loss"
        )
    if getattr(model, "compiled", False):
        raise ValueError(
            "the model is compiled, but mpscale trains it with the workload's optimizer, loss and metric; "
            "leave model.compile out"
        )
    inputs = model.inputs if model.built and hasattr(model, "inputs") else None
    if inputs is not None and len(inputs) > 1:
        raise ValueError(
            f"the model has {len(inputs)} inputs; mpscale trains models with one so far: join them into one array"
        )
    return model


def build_model(model: keras.Model, example: Any) -> None:
    """Makes the weights of a model that makes them when it first sees data.

    Args:
        model: the model.
        example: one batch of examples.

    Raises:
        ValueError: it has no weights that can be trained.
    """
    if not model.built:
        dtype = "string" if example.dtype.kind in "US" else example.dtype.name
        model(keras.KerasTensor(example.shape, dtype=dtype))
    if not (model.built and model.weights):
        model(example)  # Some layers of a Sequential tell their shapes only of real data.
    if not model.trainable_variables:
        raise ValueError("the model has no variable that can be trained")


def make_optimizer(source: Any) -> keras.optimizers.Optimizer:
    """A fresh optimizer.

    Args:
        source: a function that makes one, a class, a name that Keras knows, or an instance, which is copied.

    Raises:
        TypeError: it is no Keras optimizer.
        ValueError: Keras knows none of that name, or it scales the loss already.
    """
    if isinstance(source, str):
        try:
            optimizer = keras.optimizers.get(source)
        except ValueError as error:
            raise ValueError(f"Keras knows no optimizer called {source!r}; give a name such as 'adam'") from error
    elif isinstance(source, keras.optimizers.Optimizer | keras.optimizers.schedules.LearningRateSchedule):
        optimizer = source
    else:
        optimizer = source()
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "the workload's optimizer must be a Keras optimizer such as keras.optimizers.Adam(), "
            f"not {_kind(optimizer)}"
        )
    for inner in _all_inside(optimizer):
        if isinstance(inner, keras.optimizers.LossScaleOptimizer) or _scales(inner):
            raise ValueError(
                f"the workload's optimizer scales the loss itself ({type(inner).__name__}), so that its gradients "
                "would be scaled twice, and in modes without loss scaling at all; give the optimizer inside it, "
                "without loss_scale_factor: mpscale adds the loss scaling of each mode"
            )
    return _copy(optimizer) if optimizer is source else optimizer


def _copy(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    if not optimizer.built and not type(optimizer).__module__.startswith("keras."):
        # As good as a copy: nothing has been trained with it, and each case has a process of its own. What a class of
        # the user's was made with need not all be in its config.
        return optimizer
    try:
        copy = type(optimizer).from_config(optimizer.get_config())
        for name, value in vars(optimizer).items():
            # Not in the config either: settings that were made later, and weights to which no weight decay goes.
            later = isinstance(value, _SETTINGS) and not name.startswith("_self_") and name not in _STATE
            if name in _EXCLUDED or (later and vars(copy).get(name) != value):
                setattr(copy, name, value)
        return copy
    except Exception as error:  # whatever a class of the user's, or its schedule, does not provide for
        if not optimizer.built:
            return optimizer
        raise ValueError(
            f"{type(optimizer).__name__} has been used already and cannot be copied ({error}); "
            "give a function that makes a new one"
        ) from error


def _all_inside(optimizer: keras.optimizers.Optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """The optimizer and those that it holds, whatever it calls them."""
    yield optimizer
    for held in vars(optimizer).values():
        for inner in held if isinstance(held, list | tuple) else (held,):
            if isinstance(inner, keras.optimizers.Optimizer):
                yield from _all_inside(inner)


def _scales(optimizer: Any) -> bool:
    """Whether the loss or the gradients are scaled by it."""
    return (
        getattr(optimizer, "loss_scale_factor", None) is not None
        or getattr(type(optimizer), "scale_loss", None) is not keras.optimizers.Optimizer.scale_loss
        or hasattr(optimizer, "get_scaled_loss")
    )


def _overrides(model: keras.Model, name: str) -> bool:
    """Whether a class of the user's, or the instance itself, has its own method of this name."""
    if name in vars(model):
        return not name.startswith("_")
    defined = next((base for base in type(model).__mro__ if name in vars(base)), None)
    return defined is not None and defined.__module__.partition(".")[0] != "keras"


def _kind(thing: Any) -> str:
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


# What is trained, told without its precision, so that two modes of one workload can be held against each other. A
# description is JSON that is the same in every process and in every mode: names of layers, dtypes and addresses are
# left out of it.

_PRECISION = ("name", "dtype", "dtype_policy", "registered_name", "build_config")
_PROBE_SEED = 17
_SCALARS = (str, int, float, bool)
_NOT_REPEATABLE = re.compile(r"Assign|ResourceScatter|Random|Multinomial|RngRead|RngSkip|PyFunc")


def digest(described: Any) -> str:
    """SHA-256 of a description, as 16 hex digits."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=described_object).encode()).hexdigest()[:16]


def without_precision(config: Any) -> Any:
    """``config`` without names and dtypes: the same model in another mode has to have the same digest."""
    if isinstance(config, Mapping):
        if config.get("class_name") == "__lambda__":
            return described_lambda(config["config"])
        kept = {key: without_precision(value) for key, value in config.items() if key not in _PRECISION}
        if isinstance(kept.get("kwargs"), dict):
            # Keras notes an argument that is None in one mode and not in another.
            kept["kwargs"] = {key: value for key, value in kept["kwargs"].items() if value is not None}
        return kept
    if isinstance(config, list | tuple):
        return [without_precision(value) for value in config]
    return config


def described_object(value: Any) -> Any:
    """Stands in for what JSON cannot hold. Not ``str``, which gives most objects an address in memory."""
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, np.ndarray | tf.Tensor | tf.Variable | keras.Variable):
        array = np.asarray(value)
        return [str(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]]
    if isinstance(value, np.generic):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, functools.partial):
        return [described_object(value.func), list(value.args), dict(value.keywords)]
    if isinstance(value, types.CodeType):
        return described_code(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    config = config_of(value)
    if config is None:
        # An instance of the user's own class is what it was made with, as far as that can be written down.
        config = {name: held for name, held in getattr(value, "__dict__", {}).items() if isinstance(held, _SCALARS)}
    return [described_object(type(value)), without_precision(config)]


def described_lambda(config: Any) -> Any:
    """A lambda as Keras keeps it. Its marshalled code is not the same in every process, what it does is."""
    try:
        code = described_code(marshal.loads(base64.b64decode(config["code"])))
    except (EOFError, KeyError, TypeError, ValueError):
        return "a lambda that cannot be read"
    return [code, without_precision({key: value for key, value in config.items() if key != "code"})]


def described_code(code: types.CodeType) -> list[Any]:
    """What a function does, without where it is written down."""
    constants = [described_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]


def model_config(model: keras.Model) -> Any:
    """The model's config; of a class of the user's own, what can be seen of it.

    Keras' config of such a class holds the default arguments of its constructor, whatever it was made with.
    """
    own = type(model).__module__.partition(".")[0] != "keras"
    return model_description(model) if own else config_of(model)


def model_description(model: keras.Model) -> Any:
    """The model's config, and those of its layers at any depth: a model that has no config has layers that do."""
    layers = model._flatten_layers(include_self=False)
    named = [*layers, *(operation for part in (model, *layers) for operation in getattr(part, "operations", ()))]
    names = {part.name: f"part {number}" for number, part in enumerate(named)} | {model.name: "model"}
    described = [
        [described_object(type(layer)), None if isinstance(layer, keras.Model) else config_of(layer)]
        for layer in layers
    ]
    shapes = [tuple(v.shape) for v in model.variables]
    # What a layer of the user's own asks of its weights is in no config.
    asked = [described_object(each) for v in model.variables for each in (v.regularizer, v.constraint) if each]
    # Names of layers, by which a config says what is connected with what, depend on what else the process has made.
    return _renamed(without_precision([config_of(model), described, shapes, asked]), names)


def optimizer_description(optimizer: keras.optimizers.Optimizer, steps: int) -> dict[str, Any]:
    """Class, settings and learning rate of an optimizer, before it is built and wrapped.

    Args:
        optimizer: of Keras or the user's own; what its config leaves out is taken from its attributes.
        steps: of a training; the learning rate of a schedule is told for some of them.
    """
    config = config_of(optimizer) or {}
    settings = {
        name.lstrip("_"): value
        for name, value in vars(optimizer).items()
        if isinstance(value, _SCALARS) and not name.startswith("_self_") and name not in ("_lock", "built")
    }
    described = without_precision({**settings, **config, "class": described_object(type(optimizer))})
    rates = _learning_rates(optimizer, steps)
    if rates is not None:
        described["learning_rate"] = rates
    plain: dict[str, Any] = json.loads(json.dumps(described, sort_keys=True, default=described_object))
    return plain


def _learning_rates(optimizer: keras.optimizers.Optimizer, steps: int) -> Any:
    """The learning rate, {step: rate} of a schedule; None where it cannot be had."""
    schedule = getattr(optimizer, "_learning_rate", None)
    try:
        with tf.device("CPU:0"):
            if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
                return _short(optimizer.learning_rate)
            some = sorted({step for step in (0, 1, 2, 10, 100, steps // 4, steps // 2, steps - 1) if 0 <= step < steps})
            return {f"step {step}": _short(schedule(tf.constant(step, tf.int64))) for step in some}
    except Exception:  # the user's code, which may fail in any way; it is asked again in the step
        return None


def _short(value: Any) -> float:
    return float(f"{float(keras.ops.convert_to_numpy(value)):.6g}")


def config_of(value: Any) -> Any:
    """Its config, None where it has none."""
    try:
        return value.get_config()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


class NotedLoss:
    """A loss that is handed on as it is, and notes when it is traced what it was given.

    Args:
        loss: ``(labels, outputs) -> scalar``.
    """

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        self._loss = loss
        self._outputs: Any = None
        self._labels: Any = None

    def __call__(self, labels: Any, outputs: Any) -> Any:
        self._labels, self._outputs = (tf.nest.map_structure(_spec, value) for value in (labels, outputs))
        return self._loss(labels, outputs)

    def columns(self, labels: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """{column: value} and {column: reason}, after it was traced.

        Args:
            labels: those of the first batch.
        """
        given = [_shapes(value, dtypes) for value, dtypes in ((self._labels, True), (self._outputs, False))]
        values: dict[str, Any] = {"loss_inputs": f"labels {given[0]}; outputs {given[1]}"}
        try:
            probe = self._probe(labels)
        except Exception as error:  # the user's code, away from the model and the device that it was written for
            probe = f"the loss does not run by itself: {type(error).__name__}"
        if isinstance(probe, float) and not np.isfinite(probe):
            probe = "not finite on outputs between 0 and 1"
        if isinstance(probe, str):
            return values, {"loss_probe": probe}
        return {**values, "loss_probe": probe}, {}

    def _probe(self, labels: Any) -> float | str:
        """The loss of ``labels`` and of outputs that are the same in every mode; a reason where it cannot tell.

        As traced, so that a loss which changes something, and would be another one afterwards, can be left alone; and
        on the CPU, where it takes none of the memory that is measured.
        """

        def call(labels: Any, outputs: Any) -> Any:
            return self._loss(labels, outputs)

        with tf.device("CPU:0"):
            # First in the precision of the model's outputs, since the loss may ask for it.
            for dtype in (None, tf.float32):
                outputs = tf.nest.map_structure(functools.partial(_probed, dtype=dtype), self._outputs)
                given = tf.nest.map_structure(tf.constant, labels)
                specs = tf.nest.map_structure(_spec, (given, outputs))
                traced = tf.function(call).get_concrete_function(*specs)
                nodes = all_nodes(traced.graph.as_graph_def())
                if any(_NOT_REPEATABLE.search(node.op) for node in nodes):
                    return "the loss draws numbers, changes variables or calls Python"
                if not computes_below_float32(nodes):
                    return float(np.sum(np.asarray(traced(given, outputs), np.float64)))
        return "the loss computes in less than float32"


def _spec(value: Any) -> tf.TensorSpec:
    return tf.TensorSpec(value.shape, value.dtype)


def _shapes(specs: Any, dtypes: bool) -> str:
    """Shapes of a structure, in brackets; floating dtypes of outputs belong to the mode."""
    told = [f"{spec.dtype.name if dtypes else ''} {tuple(spec.shape)}".strip() for spec in tf.nest.flatten(specs)]
    return " and ".join(told)


def _probed(spec: tf.TensorSpec, dtype: tf.DType | None) -> tf.Tensor:
    """Outputs that are probabilities and could be logits, in multiples of 1/64, which every precision holds exactly."""
    if not spec.dtype.is_floating:
        return tf.zeros(spec.shape, spec.dtype)
    values = np.random.default_rng(_PROBE_SEED).integers(1, 64, spec.shape.as_list()) / 64.0
    return tf.constant(values, dtype or spec.dtype)
