"""The train step of a compiled model: its own ``train_step``, with the mode's optimizer inside.

Nothing is added to the step. While it is traced, calls of the optimizers and of ``tf.GradientTape.gradient`` are
observed, which tells the true loss, the loss scale and the overflow of each step. Replicas are traced in turns, each
in a thread of its own, and each is observed by itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import loss as of_keras

from mpscale.scaling.guard import within_reach
from mpscale.worker.batches import replica_number
from mpscale.worker.replicas import look
from mpscale.worker.scaler import StepRecord, StepScaler
from mpscale.worker.update import Applied, Others, Update, key_of, loss_of, total


@dataclass
class _Gradients:
    """A call of ``tf.GradientTape.gradient``: what was differentiated, for what, and the result.

    ``others``: other tensors with their gradients.
    """

    target: Any
    sources: list[Any]
    result: list[Any]
    others: list[tuple[Any, Any]]


@dataclass
class _Applied(Applied):
    """A call of ``apply`` in a train_step.

    Args:
        scaled_loss: what was differentiated.
        was_scaled: whether the optimizer scaled the loss.
        was_changed: whether the gradients are others than the tape returned.
        was_shared: whether another optimizer has applied gradients of the same call of the tape before.
    """

    scaled_loss: Any
    was_scaled: bool
    was_changed: bool
    was_shared: bool


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

    others: Others
    only_look: bool
    gradients: list[_Gradients] = field(default_factory=list)
    """Those that no optimizer has applied yet."""
    used: list[_Gradients] = field(default_factory=list)
    """The others."""
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
            tf.function(lambda given: loss_of(self._train(given)), autograph=False).get_concrete_function(specs)
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
        losses = tf.nest.flatten([each.losses for each in applied])
        if not all(map(within_reach, (*losses, *(each.record.scale for each in applied)))):
            raise ValueError(
                "train_step applies gradients inside of a loop, a branch or a function of TensorFlow, where neither "
                "their loss nor an overflow can be seen; apply them outside of it"
            )
        # An optimizer that is applied several times per step, or several of them, make one row.
        columns = {
            "scale": (_least, [each.record.scale for each in applied]),
            "overflow": (_most, [each.record.overflow for each in applied]),
        }
        row = {"loss": loss_of(applied)} | {
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

    def applied(self, batch: Any, others: Others = lambda _: ()) -> list[Applied]:
        return list(self._train(batch, others))

    def losses_of(self, batch: Any) -> list[Any]:
        """The losses whose gradients a step would apply, in that order, scalars; nothing is applied or noted."""
        return [loss_of([each]) for each in self._observe(batch, lambda _: (), only_look=True).applied]

    def overflow_steps(self, steps: int) -> int | None:
        counted = self.scaler.overflow_steps(steps)
        return counted if self._overflows is None or counted is None else int(self._overflows.numpy())

    def unscaled(self, mode: str) -> tuple[str, str] | None:
        """Why ``train_step`` cannot be trained in a mode that scales the loss, and what to do; None if it can.

        Known once a step has been traced.
        """
        if shared := sorted({each.name for each in self._applied if each.was_shared}):
            return (
                f"train_step of {type(self.model).__name__} applies the result of one call of tape.gradient with "
                f"{' and '.join(shared)} and with another optimizer, but each divides by a loss scale of its own",
                "with tf.GradientTape(persistent=True), scale the loss for each optimizer in the tape, and "
                "differentiate it for each: `tape.gradient(scaled, weights)`",
            )
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

    def _train(self, batch: Any, others: Others = lambda _: (), only_look: bool = False) -> list[_Applied]:
        """Take the model's train step, or all of it except ``apply``; return the calls of ``apply``."""
        seen = self._observe(batch, others, only_look)
        if replica_number() == 0:
            self._applied, self.compared, self.returned = seen.applied, seen.compared, seen.returned
            self.undivided = seen.undivided
        return seen.applied

    def _observe(self, batch: Any, others: Others, only_look: bool) -> _Observed:
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
        if not all(each.losses for each in seen.applied):
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
            trained = {key_of(variable) for variable in self.model.trainable_variables}
            more = list(seen.others(flat)) if any(key_of(source) in trained for source in flat) else []
            if more:
                result, found = differentiate(tape, target, [sources, more], *arguments, **options)
            else:
                result, found = differentiate(tape, target, sources, *arguments, **options), []
            of_others = list(zip(more, found, strict=True))
            seen.gradients.append(_Gradients(target, flat, tf.nest.flatten(result), of_others))
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
    wanted = {key_of(variable) for variable in variables}
    found = [each for each in seen.gradients if wanted & {key_of(source) for source in each.sources}]
    seen.gradients = [each for each in seen.gradients if not any(each is taken for taken in found)]
    shared = [] if found else [each for each in seen.used if wanted <= {key_of(source) for source in each.sources}][-1:]
    seen.used += found
    found += shared
    scaled = seen.losses.pop(name, [])
    losses = [loss for loss, _ in scaled] if scaled else [each.target for each in found]
    after = [loss for _, loss in scaled] if scaled else losses
    computed = {id(grad) for each in found for grad in each.result}
    changed = any(grad is not None and id(grad) not in computed for grad in grads)
    # A loss that is differentiated twice, for other weights, has the same gradients for the same tensor.
    others = {(id(each.target), id(tensor)): (tensor, grad) for each in found for tensor, grad in each.others}
    scaled_loss = total(after) if after else None
    of_fit = scaled_loss, bool(scaled), changed, bool(shared)
    return _Applied(name, grads, variables, [*others.values()], losses, StepRecord(), *of_fit)


def _least(values: list[Any]) -> Any:
    return tf.reduce_min(tf.stack(values))


def _most(values: list[Any]) -> Any:
    return tf.reduce_max(tf.stack(values))
