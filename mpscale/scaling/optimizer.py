"""LossScaleOptimizer: a Keras optimizer whose loss is scaled, whose gradients are unscaled, and that skips overflow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.loss_scale import RULES, DynamicLossScale, LossScale, NoLossScale, StaticLossScale, state_dtype
from mpscale.scaling.gradients import (
    NewValueMarks,
    all_finite,
    finite_and_largest,
    fitted,
    hidden_from_rewrite,
    join_new_values,
    nonfinite_flags,
    split_new_values,
    under_xla,
    unscaled,
)
from mpscale.scaling.guard import ScalingGuard, Unscaling, mark
from mpscale.scaling.inner import ForwardedSettings, accumulate, check_choice, check_inner, unlisted_variables, window
from mpscale.scaling.ledger import Alarm, Blame, Ledger, raise_alarm
from mpscale.scaling.skip import (
    Skip,
    apply_masked,
    check_context,
    check_scope,
    largest_on_any,
    masking_pays,
    set_on_any,
    switch,
    true_on_all,
)

# No Python control flow in here depends on a tensor, and converting it would add a second to every trace.
_as_written = tf.autograph.experimental.do_not_convert

_serializable = keras.saving.register_keras_serializable(package="mpscale")
for _rule in (NoLossScale, *RULES.values()):
    _serializable(_rule)  # Here, because the rules have to be importable without Keras.


@_serializable
class LossScaleOptimizer(ForwardedSettings, keras.optimizers.LossScaleOptimizer):
    """A Keras optimizer with loss scaling.

    It needs nothing else in ``model.compile``. In a loop of your own::

        opt = LossScaleOptimizer(keras.optimizers.Adam(1e-3), StaticLossScale(128))
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            scaled = opt.scale_loss(loss)
        grads = tape.gradient(scaled, model.trainable_variables)
        opt.apply(grads, model.trainable_variables)

    To clip the true gradients, replace the last line by::

        grads, finite = opt.unscale(grads)
        grads, _ = tf.clip_by_global_norm(grads, 1.0)
        opt.apply(grads, model.trainable_variables, finite=finite)

    ``finite`` has to be passed on: clipping can turn an infinity into a 1, which hides the overflow. A step with a
    non-finite gradient changes nothing but the loss scale and the counters: no weight, slot, moving average of the
    optimizer or iteration count. What the forward pass itself assigns, such as the statistics of BatchNormalization,
    is out of an optimizer's reach.

    With the inner optimizer's ``gradient_accumulation_steps``, there is one decision per window: a non-finite
    micro-batch costs its whole window, and steps are windows. Under a ``tf.distribute`` strategy, there is one decision
    for all replicas; build the optimizer under ``strategy.scope()``.

    Settings of the inner optimizer, such as ``clipnorm`` or ``learning_rate``, can be read and set here too. The class
    derives from Keras' own because ``compile`` would otherwise wrap it again under a mixed_float16 policy.

    Args:
        inner_optimizer: any Keras optimizer that does no loss scaling of its own.
        loss_scale: a :class:`~mpscale.scaling.LossScale`; DynamicLossScale() by default.
        blame: count the overflows of every variable. Costs another look at every gradient in overflow steps.
        alarm: what :meth:`check_alarm` does about overflow at the floor of the scale: ``"warn"``, ``"stop"`` (raise)
            or ``"ignore"``.
        skip: how an overflow step is skipped: ``"branch"`` leaves the update out, ``"gate"`` computes it and masks
            every write. Both are exact. ``"auto"`` chooses the faster one by rule of thumb: masking under XLA, except
            for many small variables on a CPU; otherwise the branch.
        name: name of the optimizer.

    Raises:
        TypeError: ``inner_optimizer`` or ``loss_scale`` is something else.
        ValueError: ``inner_optimizer`` scales the loss itself, or ``alarm`` or ``skip`` is unknown.
    """

    built: bool
    _closed = True
    _fixed = ("inner_optimizer", "loss_scale", "blame")
    _compiled = ("skip",)
    _choices: ClassVar = {"alarm": Alarm, "skip": Skip}

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        loss_scale: LossScale | None = None,
        *,
        blame: bool = False,
        alarm: Alarm = "warn",
        skip: Skip = "auto",
        name: str | None = None,
    ) -> None:
        check_inner(inner_optimizer)
        loss_scale = DynamicLossScale() if loss_scale is None else loss_scale
        if not isinstance(loss_scale, LossScale):
            raise TypeError(
                f"loss_scale must be a LossScale such as StaticLossScale(128) or DynamicLossScale(), not {loss_scale!r}"
            )
        check_choice("alarm", alarm, Alarm)
        check_choice("skip", skip, Skip)
        # Not the constructor of Keras' LossScaleOptimizer, which sets up the rule that this class replaces.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.loss_scale = loss_scale
        self.blame = blame
        self.alarm = alarm
        self.skip = skip
        self._alarmed = 0
        self._guard = ScalingGuard()
        self._new_value_marks = NewValueMarks()
        # Not in build: a step may ask for the scale before that, and a checkpoint restores only variables that exist.
        initial_state = loss_scale.initial_state()
        self._state = {name: self._add(name, state_dtype(value), value) for name, value in initial_state.items()}
        self._ledger = Ledger(self._add, initial_state["scale"])
        self._blame = Blame(self._add, self._var_key)
        self._largest: Any = None
        if not blame:
            # Otherwise after the variable of blame: saved optimizers identify variables by their order.
            self._add_largest()
        self._settings_open = True

    def build(self, var_list: Sequence[Any]) -> None:
        """Make the variables of the inner optimizer, and those that ``blame`` needs."""
        if self.built:
            return
        var_list = list(var_list)
        check_scope([*self._state.values(), self.inner_optimizer._iterations])
        if self.blame:
            self._blame.build(var_list)
            self._add_largest()
        if window(self.inner_optimizer):
            if tf.distribute.has_strategy():
                raise ValueError(
                    "gradient_accumulation_steps does not work under a strategy: Keras branches inside a replica where "
                    "replicas have to wait for each other. Add up the gradients in the training loop"
                )
            self._window_finite = self._add("window_finite", "int64", 1)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(var_list)
        if any(map(window, getattr(self.inner_optimizer, "optimizers", []))):
            raise ValueError(
                "an optimizer inside a MultiOptimizer has gradient_accumulation_steps; windows of their own cannot be "
                "skipped together. Accumulate gradients in the training loop, or use one optimizer"
            )
        for variable in unlisted_variables(self.inner_optimizer):
            self._track_variable(variable)  # Listed here, it is saved like every other.
        # Keras' own build without the moving averages and accumulators, which the inner optimizer has. Like Keras, past
        # __setattr__: the variables of the model are not this optimizer's to list or to save.
        self._trainable_variables_indices.update({self._var_key(variable): i for i, variable in enumerate(var_list)})
        object.__setattr__(self, "_trainable_variables", var_list)
        self.built = True

    @_as_written
    def scale_loss(self, loss: Any) -> Any:
        """Return ``loss`` times the loss scale, in float32 or wider: scaled in float16 it would overflow."""
        if not self.loss_scale.scales:
            return loss
        loss = tf.convert_to_tensor(loss)
        if loss.dtype in (tf.float16, tf.bfloat16):
            loss = tf.cast(loss, tf.float32)
        self._guard.note_scaling()
        return loss * tf.cast(self._scale(), loss.dtype)

    @_as_written
    def unscale(
        self, scaled_grads: Iterable[Any], variables: Sequence[Any] | None = None
    ) -> tuple[list[Any], tf.Tensor]:
        """Return the true gradients, and whether all of them are finite on all replicas.

        Args:
            scaled_grads: gradients of the scaled loss, dense or ``tf.IndexedSlices``. None stays None, and the new
                value of a variable that Keras marks ``overwrite_with_gradient`` stays as it is.
            variables: the variables of the gradients; may be left out if they are those of :meth:`build` in the same
                order. ``blame`` needs them if :meth:`apply` is called in another ``tf.function``, or with a ``finite``
                that was not computed from what this returns.

        Returns:
            The gradients in float32 or wider, divided by the loss scale, and a boolean scalar.

        Raises:
            ValueError: the gradients were computed from what an earlier call returned, or it is unknown which of them
                are new values.
        """
        scaled = [grad if grad is None or tf.is_tensor(grad) else tf.convert_to_tensor(grad) for grad in scaled_grads]
        variables = None if variables is None else list(variables)
        self._blame.in_unscale |= variables is not None
        grads, new_values, finite, flags = self._judged(scaled, variables)
        grads = self._new_value_marks.join(grads, new_values)
        unscaling = Unscaling(flags)
        if self.loss_scale.checks_finite:
            mark([finite], unscaling)
        if self.loss_scale.scales:
            self._guard.note_unscaling(scaled, grads, unscaling)
        return grads, finite

    @_as_written
    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Sequence[Any] | None = None,
        finite: Any | None = None,
    ) -> None:
        """Apply one step, or skip it.

        Args:
            grads: without ``finite``, gradients of the scaled loss. With it, what :meth:`unscale` returned, clipped or
                changed in any other way.
            trainable_variables: the variables of the gradients; may be left out once the optimizer is built.
            finite: boolean scalar from :meth:`unscale`. The gradients are then not checked again.

        Raises:
            ValueError: unscaled gradients came without ``finite``, or replicas cannot decide together here.
        """
        grads = list(grads)
        if not grads:
            return
        check_context()
        check_scope([*self._state.values(), self.inner_optimizer._iterations])
        self._ensure_built(trainable_variables)
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"{len(grads)} gradients were given for {len(variables)} variables; pass one for each")
        check_inner(self.inner_optimizer)
        self._traced |= not tf.executing_eagerly()
        if finite is None:
            grads, new_values, finite, _ = self._judged(grads, variables)
            grads = join_new_values(grads, new_values)
        else:
            if self.loss_scale.scales:
                self._guard.check_unscaled(grads)
            self._new_value_marks.check(grads, variables)
            if self.blame and self.loss_scale.checks_finite:
                self._blame.count_later(finite, variables)
            finite = true_on_all(finite)
        self._guard.end_step()
        grads = fitted(grads, variables)

        if window(self.inner_optimizer) and self.loss_scale.skip_nonfinite:
            accumulate(self.inner_optimizer, self._window_finite, self._decide, grads, variables, finite)
            return
        if not self.loss_scale.skip_nonfinite:
            self.inner_optimizer.apply(grads, variables)
        elif not self._apply_masked(grads, variables, finite):
            # Everything that the inner optimizer assigns is inside the branch, which makes the skip exact.
            index = tf.where(finite, 1, 0)
            switch(index, [lambda *_: None, self.inner_optimizer.apply], grads, variables)
        self._decide(finite)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], finite: Any | None = None) -> Any:
        """Call :meth:`apply` with pairs of gradient and variable; return the iteration count, as Keras does."""
        pairs = list(grads_and_vars)
        self.apply([grad for grad, _ in pairs], [variable for _, variable in pairs], finite=finite)
        return self.iterations

    @property
    def variables(self) -> list[Any]:
        """The variables of the loss scale and the ledger, then those of the inner optimizer."""
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def loss_scale_value(self) -> tf.Tensor:
        """The loss scale of the next step, a float32 scalar. Read it in each step, because it moves."""
        self._guard.note_reading()
        return self._scale()

    def counters(self) -> dict[str, Any]:
        """Return what became of the steps so far. Waits for the device, so do not call it in every step.

        Returns:
            Numbers of steps: ``attempted``, ``applied``, ``skipped``, ``overflow`` (with a non-finite gradient),
            ``longest_skip_run``, and ``floor_overflow`` (overflow at a scale that could not have been lower). Step
            numbers from 0, or None: ``first_overflow`` and ``last_overflow``. ``by_variable``: overflow steps by path
            of the variables that had one; None without ``blame``.
        """
        return self._ledger.counters() | {"by_variable": self._blame.counts() if self.blame else None}

    def trajectory(self) -> list[tuple[int, float]]:
        """Return the latest 256 changes of the scale, and wait for the device.

        Returns:
            Pairs of a step, numbered from 0, and the scale from that step on.
        """
        return self._ledger.trajectory()

    def check_alarm(self) -> None:
        """Warn or raise if steps overflowed at the floor of the scale since the last call. Waits for the device.

        Call it from time to time in a loop of your own; in ``fit``, :class:`~mpscale.scaling.LossScaleMonitor` does.

        Raises:
            FloorOverflowError: they did, and ``alarm`` is ``"stop"``.
        """
        counters = self.counters()
        if counters["floor_overflow"] > self._alarmed:
            self._alarmed = counters["floor_overflow"]
            raise_alarm(self.alarm, counters, float(self._scale()))

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Assign to all :attr:`variables` in order; Keras' own method stops before those of the inner optimizer.

        Raises:
            ValueError: their number or a shape differs.
        """
        if len(weights) != len(self.variables):
            raise ValueError(
                f"{len(weights)} weights were given, but the optimizer has {len(self.variables)} variables"
            )
        for variable, weight in zip(self.variables, weights, strict=True):
            if tuple(variable.shape) != np.shape(weight):
                raise ValueError(f"{variable.path} has shape {tuple(variable.shape)}, not {np.shape(weight)}")
            variable.assign(weight)

    def stateless_apply(self, optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
        """Refuse, as every Keras optimizer on TensorFlow does."""
        raise ValueError("stateless_apply is not supported with the TensorFlow backend; use apply")

    def get_config(self) -> dict[str, Any]:
        """Return plain values from which :meth:`from_config` makes an equal optimizer, without its state."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "loss_scale": keras.saving.serialize_keras_object(self.loss_scale),
            "blame": self.blame,
            "alarm": self.alarm,
            "skip": self.skip,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> LossScaleOptimizer:
        """Make an optimizer from what :meth:`get_config` returned."""
        parts = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
            for name in ("inner_optimizer", "loss_scale")
        }
        return cls(**(config | parts))

    def _add(self, name: str, dtype: str, initial: Any) -> Any:
        variable = self.add_variable(np.shape(initial), keras.initializers.Constant(initial), dtype, name=name)
        # tf.train.Checkpoint follows attributes.
        setattr(self, f"_{name}_variable", variable)
        return variable

    def _add_largest(self) -> None:
        if self.loss_scale.needs_largest:
            self._largest = self._add("largest_gradient", "float32", 0.0)

    def _ensure_built(self, variables: Sequence[Any] | None) -> None:
        if self.built:
            return
        if variables is None:
            raise ValueError(
                "the optimizer is not built: pass trainable_variables to apply, or call build(variables) first"
            )
        if tf.distribute.has_strategy():
            raise ValueError(
                "the optimizer is not built: under a strategy, call build(model.trainable_variables) "
                "under strategy.scope() before the first step"
            )
        with tf.init_scope():
            self.build(variables)

    def _scale(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._state["scale"].value)

    def _judged(
        self, scaled: list[Any], variables: list[Any] | None
    ) -> tuple[list[Any], list[Any], tf.Tensor, tf.Tensor | None]:
        """Unscale and check gradients, and note what :meth:`_decide` and ``blame`` need.

        Returns:
            Gradients; new values apart from them; whether the gradients are finite on all replicas; with ``blame`` but
            without variables, 1 for each gradient that is not finite, int64 (gradients,).
        """
        check_context()
        if self.loss_scale.scales and self.loss_scale != StaticLossScale(1.0):
            self._guard.check_scaled(scaled)
        if self.loss_scale.needs_largest and self._largest is None:
            raise ValueError(
                "the optimizer is not built: with blame, call optimizer.build(model.trainable_variables) before the "
                "first unscale"
            )
        scale = self._scale()
        known = (self._trainable_variables if self.built else []) if variables is None else variables
        scaled, new_values = split_new_values(hidden_from_rewrite(scaled), known)
        grads = unscaled(scaled, scale) if self.loss_scale.scales else scaled
        if not self.loss_scale.checks_finite:
            return grads, new_values, tf.constant(True), None
        # A finite value stays finite when divided by 1 or more, and is checked faster before the division.
        judged, factor = (scaled, 1.0 / scale) if self.loss_scale.at_least_one else (grads, 1.0)
        if self.loss_scale.needs_largest:
            finite, largest = finite_and_largest(judged)
            largest = largest_on_any(largest * factor)
            if window(self.inner_optimizer):
                largest = tf.maximum(largest, self._largest.value)
            self._largest.assign(largest)
        else:
            finite = all_finite(judged)
        flags = None
        if self.blame:
            nothing = tf.zeros((len(judged),), tf.int64)
            flags = set_on_any(tf.cond(finite, lambda: nothing, lambda: nonfinite_flags(judged)))
            if variables is not None:
                self._ensure_built(variables)
                self._blame.count(flags, variables)
                flags = None
        return grads, new_values, true_on_all(finite), flags

    def _apply_masked(self, grads: list[Any], variables: list[Any], finite: tf.Tensor) -> bool:
        """Apply a step without a branch; return False if that is not wanted or cannot be exact."""
        if self.skip == "branch" or tf.executing_eagerly() or tf.distribute.has_strategy():
            return False
        if self.skip == "auto" and not (under_xla() and masking_pays(variables)):
            return False
        return apply_masked(lambda: self.inner_optimizer.apply(grads, variables), [*variables, *self.variables], finite)

    def _decide(self, finite: tf.Tensor) -> None:
        """Move the scale and count the step."""
        state = {name: tf.convert_to_tensor(variable.value) for name, variable in self._state.items()}
        largest = tf.convert_to_tensor(self._largest.value) if self.loss_scale.needs_largest else None
        following = self.loss_scale.next_state(state, finite, largest=largest)
        for name, value in following.items():
            self._state[name].assign(value)
        if self.loss_scale.needs_largest:
            self._largest.assign(0.0)  # A window of accumulated gradients begins with nothing.
        applied = finite if self.loss_scale.skip_nonfinite else tf.constant(True)
        self._ledger.record(finite, applied, self.loss_scale.at_floor(state), state["scale"], following["scale"])
