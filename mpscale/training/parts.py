"""The model and the optimizer of a workload, refused where mpscale's step would train something else than they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

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
