"""A workload's model and optimizer: made, checked, and described so that the modes can be compared.

A model or optimizer is refused if mpscale's train step would not train it as it asks. A description is JSON that is the
same in every process and every mode, so it leaves out names of layers, dtypes and addresses.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import marshal
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.core.lint import Check
from mpscale.scaling.gradients import is_overwritten
from mpscale.worker.refused import Refused
from mpscale.workloads import Data
from mpscale.workloads.workload import COMPILE_IT

_STEPS = (
    "train_step", "compute_loss", "_compute_loss", "make_train_function", "train_on_batch", "fit", "test_step",
    "predict_step",
)  # fmt: skip
"""Methods of a Keras model that define how it is trained and evaluated."""

_SCALARS = (bool, int, float, str)
_PRECISION = ("name", "dtype", "dtype_policy", "registered_name", "build_config")
"""Entries of a config that differ between modes."""


def check_data(data: Data) -> None:
    """Check the data of a model that mpscale trains by itself.

    Raises:
        ValueError: it has no labels, or is more than an array of examples and one of labels.
    """
    if data.train_y is None:
        raise ValueError(
            "the data has no train_y, which the workload's loss compares with what the model returns; give labels. For "
            f"a model that needs none, as with add_loss, {COMPILE_IT}"
        )
    if more := data.more_than_plain:
        raise ValueError(
            "a model that is not compiled takes an array of examples and one of labels, but "
            f"{' and '.join(more[:2])}; {COMPILE_IT}"
        )


def make_model(build: Any) -> keras.Model:
    """Make the workload's model.

    Raises:
        TypeError: it is not a Keras model.
        ValueError: it defines how it is trained, which mpscale would ignore, or it has several inputs.
    """
    model = build()
    if not isinstance(model, keras.Model):
        raise TypeError(f"the workload's model function must return a keras.Model, not {kind_of_object(model)}")
    own = [name for name in _STEPS if overrides(model, name)]
    if own:
        raise ValueError(
            f"{type(model).__name__} defines its own {' and '.join(own)}, which this workload would ignore, since it "
            f"has a loss and an optimizer of its own; {COMPILE_IT}"
        )
    if getattr(model, "compiled", False):
        raise ValueError(
            "the model is compiled, but this workload has an optimizer, a loss and a metric of its own; leave out "
            "model.compile, or take all of them from the model: mpscale.Workload.from_compiled"
        )
    inputs = model.inputs if model.built and hasattr(model, "inputs") else None
    if inputs is not None and len(inputs) > 1:
        raise ValueError(f"the model has {len(inputs)} inputs, but this workload takes one; {COMPILE_IT}")
    return model


def build_model(model: keras.Model, examples: Any) -> None:
    """Create the weights of a model that has none before it sees data, from a batch of examples.

    Raises:
        ValueError: it has no trainable weights.
    """
    if not model.built:
        model(tf.nest.map_structure(_symbolic, examples))
    if not (model.built and model.weights):
        model(examples)  # Some layers of a Sequential need real data to know their shapes.
    if not model.trainable_variables:
        raise ValueError("the model has no trainable variables; add a layer with weights, or unfreeze one")


def _symbolic(examples: npt.NDArray[Any]) -> Any:
    dtype = "string" if examples.dtype.kind in "US" else examples.dtype.name
    return keras.KerasTensor(examples.shape, dtype=dtype)


def weights_of(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    """The variables of a model without those that only its precision adds, such as scales of float8 layers."""
    return [variable for variable in variables if not is_overwritten(variable)]


def make_optimizer(source: Any) -> keras.optimizers.Optimizer:
    """Make a fresh optimizer.

    Args:
        source: a function that makes one, a class, a name that Keras knows, or an instance, which is copied.

    Raises:
        TypeError: it is not a Keras optimizer.
        ValueError: Keras knows no optimizer of that name, or it scales the loss itself.
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
            f"not {kind_of_object(optimizer)}"
        )
    for inner in all_inside(optimizer):
        if scales_loss(inner):
            raise Refused(
                Check.OPTIMIZER_SCALES,
                f"the workload's optimizer scales the loss itself ({type(inner).__name__}), but mpscale adds the loss "
                "scaling of each mode",
                "give the inner optimizer, without loss_scale_factor",
            )
    return _copy(optimizer) if optimizer is source else optimizer


def _copy(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    if not optimizer.built and not type(optimizer).__module__.startswith("keras."):
        # As good as a copy: nothing has been trained with it, and each case has a process of its own. The config of a
        # user's own class may lack some of its arguments.
        return optimizer
    try:
        copy, settings = type(optimizer).from_config(optimizer.get_config()), _settings(optimizer)
        for name, value in vars(optimizer).items():
            # The config lacks settings that were changed later, and the weights that are excluded from weight decay.
            later = name in settings and name not in ("_built", "name") and vars(copy).get(name) != value
            if later or name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
                setattr(copy, name, value)
        return copy
    except Exception as error:  # from a user's own class, or its schedule
        if not optimizer.built:
            return optimizer
        raise ValueError(
            f"this {type(optimizer).__name__} has been used already and cannot be copied ({error}); give a function "
            "that makes a new one"
        ) from error


def _settings(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Plain attributes of an optimizer, by name."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, _SCALARS) and not name.startswith("_self_") and name not in ("_lock", "built")
    }


def all_inside(optimizer: keras.optimizers.Optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """The optimizer and those in its attributes, at any depth."""
    yield optimizer
    for held in vars(optimizer).values():
        for inner in held if isinstance(held, list | tuple) else (held,):
            if isinstance(inner, keras.optimizers.Optimizer):
                yield from all_inside(inner)


def scales_loss(optimizer: Any) -> bool:
    """Whether it scales the loss or the gradients."""
    return (
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or getattr(optimizer, "loss_scale_factor", None) is not None
        or getattr(type(optimizer), "scale_loss", None) is not keras.optimizers.Optimizer.scale_loss
        or hasattr(optimizer, "get_scaled_loss")
    )


def overrides(model: keras.Model, name: str) -> bool:
    """Whether a user's class, or the instance itself, defines a method of this name."""
    if name in vars(model):
        return not name.startswith("_")
    defined = next((base for base in type(model).__mro__ if name in vars(base)), None)
    return defined is not None and defined.__module__.partition(".")[0] != "keras"


def kind_of_object(thing: Any) -> str:
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def digest(description: Any) -> str:
    """SHA-256 of a description, first 16 hex digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=described_object).encode()).hexdigest()[:16]


def arrays_digest(arrays: Iterable[Any]) -> str:
    """SHA-256 of the bytes of arrays, first 16 hex digits."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def without_precision(config: Any) -> Any:
    """``config`` without names and dtypes, so a model has the same digest in every mode."""
    if isinstance(config, Mapping):
        if config.get("class_name") == "__lambda__":
            return described_lambda(config["config"])
        if config.get("class_name") == "Float8QuantizationConfig":
            return None  # as in the config of a layer that is not quantized
        kept = {key: without_precision(value) for key, value in config.items() if key not in _PRECISION}
        if isinstance(kept.get("kwargs"), dict):
            # Keras lists arguments that are None in some modes only.
            kept["kwargs"] = {key: value for key, value in kept["kwargs"].items() if value is not None}
        return kept
    if isinstance(config, list | tuple):
        return [without_precision(value) for value in config]
    return config


def described_object(value: Any) -> Any:
    """A description of what JSON cannot hold. ``str`` would not do, since it may contain addresses in memory."""
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, np.ndarray | tf.Tensor | tf.Variable | keras.Variable):
        array = np.asarray(value)
        return [str(array.shape), arrays_digest([array])]
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
        # An instance of a user's own class is described by its plain attributes.
        config = {name: held for name, held in getattr(value, "__dict__", {}).items() if isinstance(held, _SCALARS)}
    return [described_object(type(value)), without_precision(config)]


def name_of(value: Any) -> str:
    """The name of a loss as people know it: the name itself, a function's, or the class of an instance."""
    if isinstance(value, functools.partial):
        return name_of(value.func)
    return value if isinstance(value, str) else str(getattr(value, "__name__", type(value).__name__))


def described_lambda(config: Any) -> Any:
    """A lambda from a Keras config. Its marshalled code varies between processes; its instructions do not."""
    try:
        code = described_code(marshal.loads(base64.b64decode(config["code"])))
    except (EOFError, KeyError, TypeError, ValueError):
        return "a lambda that cannot be read"
    return [code, without_precision({key: value for key, value in config.items() if key != "code"})]


def described_code(code: types.CodeType) -> list[Any]:
    """What a function does, regardless of its place in a file."""
    return [code.co_code.hex(), [_constant(each) for each in code.co_consts], list(code.co_names)]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return described_code(value)
    # The order of a set of text differs between processes.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def model_config(model: keras.Model) -> Any:
    """The model's config, or a description if its class is the user's own.

    Keras' config of such a class holds the defaults of its constructor, whatever the arguments were.
    """
    own = type(model).__module__.partition(".")[0] != "keras"
    return model_description(model) if own else config_of(model)


def model_description(model: keras.Model) -> Any:
    """The configs of the model and of its layers at any depth, since a model may have no config and its layers do."""
    layers = model._flatten_layers(include_self=False)
    named = [*layers, *(operation for part in (model, *layers) for operation in getattr(part, "operations", ()))]
    names = {part.name: f"part {number}" for number, part in enumerate(named)} | {model.name: "model"}
    described = [
        [described_object(type(layer)), None if isinstance(layer, keras.Model) else config_of(layer)]
        for layer in layers
    ]
    shapes = [tuple(v.shape) for v in weights_of(model.variables)]
    # Regularizers and constraints of a user's own layer are in no config.
    asked = [described_object(each) for v in model.variables for each in (v.regularizer, v.constraint) if each]
    # Configs connect layers by their names, which depend on what else the process has made.
    return _renamed(without_precision([config_of(model), described, shapes, asked]), names)


def optimizer_description(optimizer: keras.optimizers.Optimizer, steps: int) -> dict[str, Any]:
    """Class, settings and learning rate of an optimizer, before it is built and wrapped.

    Settings that its config lacks are taken from its attributes. A learning-rate schedule is described by its rates at
    some of the ``steps`` of a training.
    """
    config = config_of(optimizer) or {}
    settings = {name.lstrip("_"): value for name, value in _settings(optimizer).items()}
    described = without_precision({**settings, **config, "class": described_object(type(optimizer))})
    rates = _learning_rates(optimizer, steps)
    if rates is not None:
        described["learning_rate"] = rates
    plain: dict[str, Any] = json.loads(json.dumps(described, sort_keys=True, default=described_object))
    return plain


def _learning_rates(optimizer: keras.optimizers.Optimizer, steps: int) -> Any:
    """The learning rate, or {step: rate} of a schedule; None if it cannot be computed here."""
    schedule = getattr(optimizer, "_learning_rate", None)
    try:
        with tf.device("CPU:0"):
            if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
                return _short(optimizer.learning_rate)
            some = sorted({step for step in (0, 1, 2, 10, 100, steps // 4, steps // 2, steps - 1) if 0 <= step < steps})
            return {f"step {step}": _short(schedule(tf.constant(step, tf.int64))) for step in some}
    except Exception:  # from the user's code, which runs again in the train step
        return None


def _short(value: Any) -> float:
    return float(f"{float(keras.ops.convert_to_numpy(value)):.6g}")


def config_of(value: Any) -> Any:
    """The config of an object; None if it has none."""
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
