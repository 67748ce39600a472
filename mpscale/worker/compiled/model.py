"""A compiled model: made under the policy of a mode, with its optimizers laid bare, and described.

A mode scales the loss in its own way, so what a model's optimizer does about it is taken off first. The model keeps
everything else that it was compiled with.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from mpscale.core.lint import Check
from mpscale.worker import model as models
from mpscale.worker.labels import text_labels
from mpscale.worker.refused import Refused
from mpscale.workloads.data import Structure, leaves, mapped

_REPLACED = ("fit", "train_on_batch", "make_train_function")
"""Methods of a Keras model that decide when a train step is taken, which is for mpscale to do."""
_USED = ("train_step", "test_step", "compute_loss", "_compute_loss", "compute_metrics", "call")
"""Methods that decide what a train step or an evaluation does."""
_NOT_DESCRIBED = ("optimizer", "jit_compile", "steps_per_execution", "run_eagerly", "auto_scale_loss")
"""Arguments of ``compile`` that have columns of their own, or that mpscale sets."""


@dataclass(frozen=True)
class CompiledModel:
    """A model as its workload compiled it.

    Args:
        model: may be unbuilt.
        arguments: those of ``compile`` that were given, by name; empty if it was compiled before it was asked for.
        optimizers: without loss scaling, by the attribute of the model that holds them; two may hold the same one. One
            that a model with several was compiled with may be unused.
        notes: what was taken off, in words.
    """

    model: keras.Model
    arguments: dict[str, Any]
    optimizers: dict[str, keras.optimizers.Optimizer]
    notes: list[str] = field(default_factory=list)

    @property
    def jit(self) -> bool | None:
        """Whether ``compile`` asks for XLA; None if it leaves that open."""
        asked = self.arguments.get("jit_compile", "auto")
        return None if asked == "auto" else bool(asked)

    @property
    def steps_per_execution(self) -> int:
        return int(self.model.steps_per_execution)

    def description(self) -> Any:
        """What is trained besides the layers: loss, loss weights and metrics, and code and settings of own classes."""
        model = self.model
        own = [each for each in (model, *model._flatten_layers(include_self=False)) if not _is_of_keras(type(each))]
        return [
            [[name, _described(value)] for name, value in sorted(self.arguments.items()) if name not in _NOT_DESCRIBED],
            [[name, _described(getattr(type(each), name))] for each in own for name in _USED if _defines(each, name)],
            [] if _is_of_keras(type(model)) else [[name, _described(value)] for name, value in _settings(model)],
        ]


def make(build: Callable[[], keras.Model]) -> CompiledModel:
    """Make a workload's compiled model.

    Raises:
        TypeError: it is not a Keras model.
        ValueError: it is not compiled, or trains in a way that cannot be taken over.
    """
    with _noted_compile() as calls:
        model = build()
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"the workload's function must return a compiled keras.Model, not {models.kind_of_object(model)}"
        )
    if not getattr(model, "compiled", False):
        raise ValueError(
            "the workload's function returned a model that is not compiled; call model.compile(optimizer, loss, ...) "
            "in it, or use mpscale.Workload with an optimizer, a loss and a metric"
        )
    own = [name for name in _REPLACED if models.overrides(model, name)]
    if own:
        raise ValueError(
            f"{type(model).__name__} defines its own {' and '.join(own)}, which mpscale does not call, since it takes "
            "the steps itself; move what a step does to train_step"
        )
    arguments = calls.get(id(model), {})
    if model.run_eagerly:
        raise ValueError("the model is compiled with run_eagerly=True, which nobody would time; leave it out")
    notes: list[str] = []
    optimizers: dict[str, keras.optimizers.Optimizer] = {}
    for name, held in sorted(vars(model).items(), key=lambda each: each[0] != "optimizer"):
        if isinstance(held, keras.optimizers.Optimizer):
            optimizers[name] = _bare(held, name, notes)
    if not optimizers:
        raise ValueError("the model is compiled without an optimizer, so it cannot be trained; give compile one")
    return CompiledModel(model, arguments, optimizers, notes)


def build_weights(model: keras.Model, examples: Structure) -> None:
    """Create the weights of a model from a batch of examples, unless it is one that nobody calls, as a GAN."""
    if is_callable(model) or model.built:
        models.build_model(model, examples)


def build_metrics(model: keras.Model, batch: Any) -> None:
    """Make the variables of compiled metrics, if Keras' own ``train_step`` will use them.

    A trace that makes variables is followed by another one. Where this does not work, that is what happens.
    """
    if not models.overrides(model, "train_step") and model.built:
        with contextlib.suppress(Exception):
            model._symbolic_build(data_batch=batch)


def is_callable(model: keras.Model) -> bool:
    """Whether a model can be called as a whole."""
    return models.overrides(model, "call") or _is_of_keras(type(model))


def check_labels(model: keras.Model, labels: Structure, test: Structure = None) -> None:
    """Check that a model that compares labels by its compiled loss has some, and that they are numbers.

    ``test``: those of the test set, if there are any.

    Raises:
        ValueError: it has none, or they are text.
    """
    if model.loss is None or models.overrides(model, "train_step"):
        return
    if labels is None:
        raise ValueError("the model is compiled with a loss, but train has no labels to compare with: give (x, y)")
    given = {"train_y": labels} | ({} if test is None or models.overrides(model, "test_step") else {"test_y": test})
    texts = [f"{part}{path}" for part in given for path, array in leaves(given[part]) if array.dtype.kind in "US"]
    if texts and not models.overrides(model, "compute_loss"):
        raise text_labels(f"the labels in {' and '.join(texts)}")


def as_fed(x: Structure, y: Structure, weight: Structure) -> Any:
    """Examples, labels and weights as Keras' ``fit`` hands them to a train step: x, ``(x, y)`` or ``(x, y, weight)``.

    Numbers that are not whole become float32, and weights of examples are those of each output.
    """
    if weight is not None and isinstance(y, dict | tuple | list) and not isinstance(weight, dict | tuple | list):
        if weight.ndim > 1 and weight.shape[1:] != (1,):
            raise ValueError(
                f"the sample weights have shape {weight.shape}, but with several outputs one array of them can only "
                "have one number per example; give one array per output"
            )
        one = weight
        weight = mapped(lambda *_: one, y)
    x, y, weight = (
        None if part is None else keras.tree.lists_to_tuples(mapped(_in_float32, part)) for part in (x, y, weight)
    )
    return keras.utils.pack_x_y_sample_weight(x, y, weight)


def _in_float32(_: str, array: Any) -> Any:
    return array.astype("float32") if array.dtype.kind == "f" else array


@contextlib.contextmanager
def _noted_compile() -> Iterator[dict[int, dict[str, Any]]]:
    """Note the arguments of ``compile`` by id of the model, since a compiled model tells only what became of them.

    Keras then does not wrap the optimizer in a loss scaling of its own either.
    """
    owner = next(base for base in keras.Model.__mro__ if "compile" in vars(base))
    original = vars(owner)["compile"]
    signature = inspect.signature(original)
    calls: dict[int, dict[str, Any]] = {}

    @functools.wraps(original)
    def noted(model: Any, *arguments: Any, **options: Any) -> Any:
        given = signature.bind(model, *arguments, **options).arguments
        _, *named = given.items()
        calls[id(model)] = dict(named)
        return original(model, **{**dict(named), "auto_scale_loss": False})

    owner.compile = noted
    try:
        yield calls
    finally:
        owner.compile = original


def _bare(optimizer: Any, name: str, notes: list[str]) -> keras.optimizers.Optimizer:
    """The optimizer without loss scaling; ``notes`` gets what was taken off."""
    taken_off = []
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        taken_off.append(type(optimizer).__name__)
        optimizer = optimizer.inner_optimizer
    if getattr(optimizer, "loss_scale_factor", None) is not None:
        taken_off.append("loss_scale_factor")
        optimizer.loss_scale_factor = None
    if taken_off:
        notes.append(
            f"the model's {name} was compiled with {' and '.join(taken_off)}, which was taken off, since each mode "
            "scales the loss in its own way"
        )
    for inner in models.all_inside(optimizer):
        if models.scales_loss(inner):
            raise Refused(
                Check.OPTIMIZER_SCALES,
                f"the model's {name} scales the loss itself ({type(inner).__name__}), but mpscale adds the loss "
                "scaling of each mode",
                "compile with an optimizer that does not",
            )
    return optimizer


def _is_of_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "keras"


def _defines(thing: Any, name: str) -> bool:
    """Whether a class that is not Keras' defines a method of this name."""
    defined = next((base for base in type(thing).__mro__ if name in vars(base)), None)
    return defined is not None and not _is_of_keras(defined)


def _settings(model: keras.Model) -> list[tuple[str, Any]]:
    """Attributes of a model of the user's own class that say how it is trained."""
    plain = (bool, int, float, str, types.FunctionType, keras.losses.Loss)
    held = sorted(vars(model).items())
    return [(name, value) for name, value in held if name[0] != "_" and name != "name" and isinstance(value, plain)]


def _described(value: Any) -> Any:
    """A description that is the same in every process and every mode."""
    if isinstance(value, dict):
        # Not as a dictionary: the name of an output may be that of an entry which is left out elsewhere.
        return [[str(key), _described(each)] for key, each in sorted(value.items(), key=lambda item: str(item[0]))]
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    value = getattr(value, "python_function", value)  # of a tf.function
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, types.FunctionType) and not value.__module__.startswith(("keras.", "tensorflow.")):
        held = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        given = [*(value.__defaults__ or ()), *held]
        return [
            models.described_object(value),
            models.described_code(value.__code__),
            [each if isinstance(each, bool | int | float | str) else type(each).__qualname__ for each in given],
        ]
    if value is None or isinstance(value, tf.DType):
        return str(value)
    return models.described_object(value)


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True
