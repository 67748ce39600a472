"""The train step of a compiled model: its own ``train_step``, with the mode's optimizer inside.

Nothing is added to the step. While it is traced, calls of the optimizers and of ``tf.GradientTape.gradient`` are
observed, which tells the true loss, the loss scale and the overflow of each step. Replicas are traced in turns, each
in a thread of its own, and each is observed by itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import loss as of_keras

from mpscale.scaling.guard import within_reach
from mpscale.worker.batches import replica_number
from mpscale.worker.replicas import look
from mpscale.worker.scaler import StepRecord, StepScaler
from mpscale.worker.update import Update


@dataclass
class _Gradients:
    """A call of ``tf.GradientTape.gradient``: what was differentiated, for what, and the result."""

    target: Any
    sources: list[Any]
    result: list[Any]
    others: list[Any]


@dataclass
class _Applied:
    """A call of an optimizer's ``apply``.

    Args:
        name: the attribute of the model that holds the optimizer.
        loss: float32 scalar, unscaled; None if it is not known.
        scaled_loss: what was differentiated.
        was_scaled: whether the optimizer scaled the loss.
        was_changed: whether the gradients are others than the tape returned.
        record: loss scale and overflow.
    """

    name: str
    grads: list[Any]
    variables: list[Any]
    others: list[Any]
    loss: Any
    scaled_loss: Any
    was_scaled: bool
    was_changed: bool
    record: StepRecord = field(default_factory=StepRecord)


@dataclass(frozen=True)
class Compared:
    """A call of a loss of Keras' class.

    Args:
        loss: the ``keras.losses.Loss``.
        labels: what it got, as in the trace.
        outputs: the same.
    """

    loss: Any
    labels: Any
    outputs: Any


@dataclass
class _Observed:
    """What a train step does with the optimizers, from the first to the last call, and with losses and the model.

    Args:
        others: returns tensors that get their gradients, too.
        only_look: whether nothing is applied.
    """

    others: Callable[[], Sequence[Any]]
    only_look: bool
    gradients: list[_Gradients] = field(default_factory=list)
    losses: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    """The losses that each optimizer has scaled since it last applied gradients, before and after."""
    applied: list[_Applied] = field(default_factory=list)
    within: bool = False
    """Whether a call comes from an optimizer itself."""
    compared: list[Compared] = field(default_factory=list)
    """The calls of losses that no other loss has made."""
    divided: int = 0
    """How often Keras has divided a loss by the number of replicas."""
    undivided: int = 0
    """How many of the calls of losses it did not divide."""
    returned: Any = None
    """What the model returned when it was called last."""
    losses_within: int = 0
    """How many losses are being computed, one inside another."""


class FitUpdate(Update):
    """The ``train_step`` of a compiled model.

    Args:
        model: compiled.
        scalers: the mode's scaling for each of the model's optimizers, by the attribute that holds it; those of one
            optimizer are the same.
        batch: the first one, of the structure that ``train_step`` takes. It shows which optimizers are used.
        on_trace: called when a trace begins. There may be two, of which the second counts: a first trace that makes
            variables, such as those of metrics, is followed by another.

    Raises:
        ValueError: ``train_step`` does not train with an optimizer of the model.
    """

    divides = True

    def __init__(
        self,
        model: keras.Model,
        scalers: Mapping[str, StepScaler],
        batch: Any,
        on_trace: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self._on_trace = model, on_trace
        self._scalers: dict[str, StepScaler] = {}
        self.added_losses = 0
        self._applied: list[_Applied] = []
        self.compared: list[Compared] = []
        """What losses were called with; known once a step has been traced, as is the next."""
        self.returned: Any = None
        """The outputs of the model; None if nothing calls it as a whole, as a GAN."""
        self.undivided = 0
        """How many calls of losses Keras does not divide by the number of replicas."""
        self._overflows: tf.Variable | None = None
        self._traced, self._tracing, self._lock = threading.local(), 0, threading.Lock()
        for name, scaler in scalers.items():
            setattr(model, name, scaler.optimizer)
            if scaler not in self._scalers.values():
                self._scalers[name] = scaler
        main, replicated = next(iter(scalers)), tf.distribute.has_strategy()
        if is_known := len(self._scalers) == 1 and model.built:
            scalers[main].optimizer.build(model.trainable_variables)
        # Which optimizer trains which weights only a trace can tell. It builds them, too.
        specs = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, tf.as_dtype(array.dtype)), batch)
        if replicated:
            with contextlib.suppress(Exception) if is_known else contextlib.nullcontext():
                look(lambda given: self._train(given, only_look=True), specs, tf.distribute.get_strategy())
        elif not is_known:
            tf.function(lambda given: self._train(given)[0].loss, autograph=False).get_concrete_function(specs)
        if not is_known:
            self._scalers = {each.name: scalers[each.name] for each in self._applied}
            main = self._applied[0].name
        self.scaler = self._scalers[main]
        if len(self._scalers) > 1 or (replicated and len(self._applied) > 1):
            self._overflows = self._counter()

    @property
    def optimizers(self) -> list[str]:
        """The attributes of the model that hold the optimizers in use, the first to be applied first."""
        return list(self._scalers)

    @property
    def variables(self) -> list[Any]:
        optimizers = [variable for scaler in self._scalers.values() for variable in scaler.optimizer.variables]
        return [*self.model.variables, *self.model.metrics_variables, *optimizers]

    def __call__(self, batch: Any) -> dict[str, Any]:
        applied = self._train(batch)
        if not all(within_reach(each.loss) and within_reach(each.record.scale) for each in applied):
            raise ValueError(
                "train_step applies gradients inside of a loop, a branch or a function of TensorFlow, where neither "
                "their loss nor an overflow can be seen; apply them outside of it"
            )
        # An optimizer that is applied several times per step, or several of them, make one row.
        columns = {
            "loss": (tf.add_n, [each.loss for each in applied]),
            "scale": (_least, [each.record.scale for each in applied]),
            "overflow": (_most, [each.record.overflow for each in applied]),
        }
        row = {
            name: values[0] if len(values) == 1 else join(values)
            for name, (join, values) in columns.items()
            if all(value is not None for value in values)
        }
        if self._overflows is None and len(applied) > 1:
            with tf.init_scope():
                self._overflows = self._counter()
        if self._overflows is not None and "overflow" in row:
            self._overflows.assign_add(tf.cast(row["overflow"], tf.int64))
        return row

    def differentiated(
        self, batch: Any, others: Callable[[], Sequence[Any]] = tuple
    ) -> tuple[Any, Any, list[Any], list[Any]]:
        applied = self._train(batch, others, only_look=True)
        if len(applied) != 1:
            raise ValueError(
                f"train_step applies gradients {len(applied)} times, and those of one loss can be looked at; a model "
                "with one optimizer that is applied once can be probed"
            )
        (one,) = applied
        known = {_key(variable): grad for variable, grad in zip(one.variables, one.grads, strict=True)}
        grads = [known.get(_key(variable)) for variable in self.model.trainable_variables]
        return one.loss, one.scaled_loss, grads, one.others

    def losses_of(self, batch: Any) -> list[Any]:
        """The losses whose gradients a step would apply, in that order, scalars; nothing is applied or noted."""
        return [each.loss for each in self._observe(batch, tuple, only_look=True).applied]

    def overflow_steps(self, steps: int) -> int | None:
        counted = self.scaler.overflow_steps(steps)
        return counted if self._overflows is None or counted is None else int(self._overflows.numpy())

    def unscaled(self, mode: str) -> tuple[str, str] | None:
        """Why ``train_step`` cannot be trained in a mode that scales the loss, and what to do; None if it can.

        Known once a step has been traced.
        """
        bare = sorted({each.name for each in self._applied if not each.was_scaled})
        if not bare:
            return None
        one, all_of = f"self.{bare[0]}", " and ".join(f"self.{name}" for name in bare)
        return (
            f"train_step of {type(self.model).__name__} does not call scale_loss of {all_of}: {mode} divides gradients "
            "by a loss scale, by which they would never have been multiplied",
            f"add `loss = {one}.scale_loss(loss)` in the tape, and apply the gradients of this loss: "
            f"`{one}.apply_gradients(zip(tape.gradient(loss, weights), weights))`",
        )

    @property
    def remark(self) -> tuple[str, str] | None:
        """What ``train_step`` does to scaled gradients, and what to do; None if nothing. Known once traced."""
        changed = sorted({each.name for each in self._applied if each.was_scaled and each.was_changed})
        if not changed:
            return None
        return (
            "train_step changes gradients before it applies them. Here they are multiplied by the loss scale, so a "
            "norm or a limit means something else than in fp32",
            f"use clipnorm, global_clipnorm or clipvalue of {' and '.join(changed)}, which take the true gradients",
        )

    def _train(
        self, batch: Any, others: Callable[[], Sequence[Any]] = tuple, only_look: bool = False
    ) -> list[_Applied]:
        """Take the model's train step, or all of it except ``apply``; return the calls of ``apply``."""
        seen = self._observe(batch, others, only_look)
        if replica_number() == 0:
            self._applied, self.compared, self.returned = seen.applied, seen.compared, seen.returned
            self.undivided = seen.undivided
        return seen.applied

    def _observe(self, batch: Any, others: Callable[[], Sequence[Any]], only_look: bool) -> _Observed:
        self._on_trace()
        seen = _Observed(others, only_look)
        # One that is a tf.function would be a graph of its own within this one.
        train_step = getattr(self.model.train_step, "python_function", self.model.train_step)
        with self._observed(seen):
            train_step(batch)
        if not seen.applied:
            raise ValueError(
                f"train_step of {type(self.model).__name__} applied no gradients with an optimizer that the model "
                f"holds ({', '.join(self._scalers)}); keep its optimizer in an attribute of the model and call "
                "apply_gradients on it"
            )
        if any(each.loss is None for each in seen.applied):
            raise ValueError(
                f"train_step of {type(self.model).__name__} applied gradients that no tf.GradientTape has computed, so "
                "its loss is not known; compute them with tape.gradient(loss, weights)"
            )
        return seen

    @staticmethod
    def _counter() -> tf.Variable:
        return tf.Variable(0, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    @property
    def _seen(self) -> _Observed | None:
        """What has been observed of the replica that is traced; None in a thread that traces none."""
        return getattr(self._traced, "seen", None)

    @contextlib.contextmanager
    def _observed(self, seen: _Observed) -> Iterator[None]:
        """Observe a replica while its step is traced. The first one to begin hooks in, the last one to end unhooks."""
        with self._lock:
            if not self._tracing:
                self._installed = self._hooked()
            self._tracing += 1
        self._traced.seen = seen
        try:
            yield
        finally:
            self._traced.seen = None
            with self._lock:
                self._tracing -= 1
                if not self._tracing:
                    self._installed.close()

    def _hooked(self) -> contextlib.ExitStack:
        """Hook into the calls of optimizers, tape, losses and model; return what takes the hooks off."""
        differentiate, call_layer = tf.GradientTape.gradient, keras.layers.Layer.__call__
        call_loss, divide = keras.losses.Loss.__call__, of_keras.scale_loss_for_distribution

        def gradient(tape: Any, target: Any, sources: Any, *arguments: Any, **options: Any) -> Any:
            if (seen := self._seen) is None:
                return differentiate(tape, target, sources, *arguments, **options)
            flat = tf.nest.flatten(sources)
            trained = {_key(variable) for variable in self.model.trainable_variables}
            more = list(seen.others()) if any(_key(source) in trained for source in flat) else []
            if more:
                result, found = differentiate(tape, target, [sources, more], *arguments, **options)
            else:
                result, found = differentiate(tape, target, sources, *arguments, **options), []
            seen.gradients.append(_Gradients(target, flat, tf.nest.flatten(result), found))
            return result

        def called(layer: Any, *arguments: Any, **options: Any) -> Any:
            outputs = call_layer(layer, *arguments, **options)
            if layer is self.model and (seen := self._seen) is not None:
                seen.returned = outputs
            return outputs

        def compared(loss: Any, y_true: Any, y_pred: Any, *arguments: Any, **options: Any) -> Any:
            if (seen := self._seen) is None:
                return call_loss(loss, y_true, y_pred, *arguments, **options)
            if not seen.losses_within:
                seen.compared.append(Compared(loss, y_true, y_pred))
            seen.losses_within, before = seen.losses_within + 1, seen.divided
            try:
                return call_loss(loss, y_true, y_pred, *arguments, **options)
            finally:
                seen.losses_within -= 1
                seen.undivided += seen.divided == before

        def divided(loss: Any) -> Any:
            if (seen := self._seen) is not None:
                seen.divided += 1
            return divide(loss)

        with contextlib.ExitStack() as stack:
            for name, scaler in self._scalers.items():
                held = vars(scaler.optimizer)
                for method, hook in self._hooks(name, scaler).items():
                    # Past __setattr__, which may track or refuse it.
                    held[method] = hook
                    stack.callback(held.pop, method)
            tf.GradientTape.gradient = gradient
            stack.callback(setattr, tf.GradientTape, "gradient", differentiate)
            keras.layers.Layer.__call__, keras.losses.Loss.__call__ = called, compared
            stack.callback(setattr, keras.layers.Layer, "__call__", call_layer)
            stack.callback(setattr, keras.losses.Loss, "__call__", call_loss)
            of_keras.scale_loss_for_distribution = divided
            stack.callback(setattr, of_keras, "scale_loss_for_distribution", divide)
            return stack.pop_all()

    def _hooks(self, name: str, scaler: StepScaler) -> dict[str, Callable[..., Any]]:
        """What an optimizer's ``scale_loss`` and ``apply`` do while a step is traced."""
        optimizer = scaler.optimizer
        scale_loss, apply = optimizer.scale_loss, optimizer.apply

        def hooked_scale_loss(loss: Any) -> Any:
            if (seen := self._seen) is None or seen.within:
                return scale_loss(loss)
            with _within(seen):
                scaled = scaler.scale_loss(loss)
            seen.losses.setdefault(name, []).append((loss, scaled))
            return scaled

        def hooked_apply(grads: Any, trainable_variables: Any = None, finite: Any = None) -> None:
            unscaled = {} if finite is None else {"finite": finite}
            if (seen := self._seen) is None or seen.within:
                apply(grads, trainable_variables, **unscaled)
                return
            grads = list(grads)
            variables = list(optimizer._trainable_variables if trainable_variables is None else trainable_variables)
            if not optimizer.built:
                with tf.init_scope():
                    optimizer.build(variables)
            this = _applied(seen, name, grads, variables)
            with _within(seen):
                if seen.only_look:
                    pass
                elif finite is None:
                    this.record = scaler.apply(grads, variables, this.scaled_loss)
                else:
                    # Its train step has unscaled them by itself.
                    scale = optimizer.loss_scale_value
                    apply(grads, variables, finite=finite)
                    this.record = StepRecord(scale, tf.cast(tf.logical_not(finite), tf.float32))
                    this.was_changed = False
            seen.applied.append(this)

        return {"scale_loss": hooked_scale_loss, "apply": hooked_apply}


@contextlib.contextmanager
def _within(seen: _Observed) -> Iterator[None]:
    seen.within = True
    try:
        yield
    finally:
        seen.within = False


def _applied(seen: _Observed, name: str, grads: list[Any], variables: list[Any]) -> _Applied:
    """The call of ``apply`` that is about to come, with the loss whose gradients it applies."""
    wanted = {_key(variable) for variable in variables}
    found = [each for each in seen.gradients if wanted & {_key(source) for source in each.sources}]
    seen.gradients = [each for each in seen.gradients if not any(each is taken for taken in found)]
    scaled = seen.losses.pop(name, [])
    losses = [loss for loss, _ in scaled] if scaled else [each.target for each in found]
    after = [loss for _, loss in scaled] if scaled else losses
    computed = {id(grad) for each in found for grad in each.result}
    changed = any(grad is not None and id(grad) not in computed for grad in grads)
    others = found[0].others if found else []
    return _Applied(name, grads, variables, others, _total(losses), _total(after), bool(scaled), changed)


def _total(losses: list[Any]) -> Any:
    """The sum of losses, a float32 scalar: what their gradients are those of."""
    flat = [tf.convert_to_tensor(loss) for loss in tf.nest.flatten(losses)]
    flat = [loss if loss.dtype == tf.float32 else tf.cast(loss, tf.float32) for loss in flat]
    flat = [loss if loss.shape.rank == 0 else tf.reduce_sum(loss) for loss in flat]
    return flat[0] if len(flat) == 1 else tf.add_n(flat) if flat else None


def _key(variable: Any) -> int:
    """Identifies a weight, given as a variable of Keras, or as that of TensorFlow which it holds, also on a replica."""
    held = getattr(variable, "_value", variable)
    of_all = getattr(held, "_distributed_container", None)
    return id(held if of_all is None else of_all())


def _least(values: list[Any]) -> Any:
    return tf.reduce_min(tf.stack(values))


def _most(values: list[Any]) -> Any:
    return tf.reduce_max(tf.stack(values))
