"""LossScaleOptimizer: wraps a Keras optimizer, scales the loss, unscales the gradients and skips overflow steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from mpscale.scaling import guard as provenance
from mpscale.scaling import skip as replicas
from mpscale.scaling.gradients import (
    Blame,
    Handed,
    all_finite,
    as_tensors,
    finite_and_largest,
    fitted,
    kept_from_rewrite,
    nonfinite_flags,
    put_back,
    taken_out,
    under_xla,
    unscaled,
)
from mpscale.scaling.guard import ScalingGuard, Unscaling
from mpscale.scaling.inner import ForwardedSettings, accumulate, check_inner, unlisted_variables, window
from mpscale.scaling.ledger import Alarm, Ledger, check_policy, raise_alarm
from mpscale.scaling.loss_scale import (
    DynamicLossScale,
    LogMaxLossScale,
    LossScale,
    NoLossScale,
    StaticLossScale,
    state_dtype,
)
from mpscale.scaling.skip import Skip, apply_gated, check_skip, gate_pays

# Nothing here has Python control flow that depends on a tensor, and rewriting it all would add a second to every trace.
_as_written = tf.autograph.experimental.do_not_convert


_serializable = keras.saving.register_keras_serializable(package="mpscale")
for _rule in (NoLossScale, StaticLossScale, DynamicLossScale, LogMaxLossScale):
    _serializable(_rule)  # Here, because the rules are imported without Keras.


@_serializable
class LossScaleOptimizer(ForwardedSettings, keras.optimizers.LossScaleOptimizer):
    """A Keras optimizer with loss scaling.

    In ``model.compile`` it needs nothing else. In a loop of your own::

        opt = LossScaleOptimizer(keras.optimizers.Adam(1e-3), StaticLossScale(128))
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            scaled = opt.scale_loss(loss)
        grads = tape.gradient(scaled, model.trainable_variables)
        opt.apply(grads, model.trainable_variables)

    and to clip the true gradients, between the last two lines::

        grads, finite = opt.unscale(grads)
        grads, _ = tf.clip_by_global_norm(grads, 1.0)
        opt.apply(grads, model.trainable_variables, finite=finite)

    ``finite`` has to travel along: clipping can turn an infinity into a 1, after which nothing looks wrong. A step
    whose gradients are not all finite changes nothing but the loss scale and the counters: no weight, no slot, no
    moving average of the optimizer, no iteration count. What the forward pass itself assigns, such as the statistics
    of BatchNormalization, is outside an optimizer's reach.

    With ``gradient_accumulation_steps`` of the inner optimizer, one decision is made for each window: a micro-batch
    that is not finite costs its whole window, and steps are counted in windows. Under a ``tf.distribute`` strategy one
    decision is made over all replicas; build the optimizer under ``strategy.scope()``.

    It derives from Keras' own class because ``compile`` would otherwise wrap it a second time under a
    mixed_float16 policy.

    The settings of the inner optimizer, such as ``clipnorm`` or ``learning_rate``, can be read and set here as well.

    Args:
        inner_optimizer: any Keras optimizer that does no loss scaling of its own.
        loss_scale: a :class:`~mpscale.scaling.LossScale`; DynamicLossScale() where none is given.
        blame: count the overflows of every variable by itself. Costs a look at every gradient in overflow steps.
        alarm: what :meth:`check_alarm` does when steps overflow although the scale is at its floor: ``"warn"``,
            ``"stop"`` (raise) or ``"ignore"``.
        skip: how an overflow step is skipped: ``"branch"`` leaves the update out; ``"gate"`` computes it and holds
            back what it writes. Both are exact. ``"auto"`` takes what is faster: the gate under XLA, but for many small
            variables on a CPU; else the branch.
        name: name of the optimizer.

    Raises:
        TypeError: ``inner_optimizer`` or ``loss_scale`` is something else.
        ValueError: ``inner_optimizer`` scales the loss itself, or ``alarm`` or ``skip`` is unknown.
    """

    built: bool
    _closed = True
    _fixed = ("inner_optimizer", "loss_scale", "blame")
    _compiled = ("skip",)
    _checks: ClassVar = {"alarm": check_policy, "skip": check_skip}

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
        check_policy(alarm)
        check_skip(skip)
        # Not Keras' LossScaleOptimizer's own __init__: it sets up the dynamic rule that this class replaces.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.loss_scale = loss_scale
        self.blame = blame
        self.alarm = alarm
        self.skip = skip
        self._alarmed = 0
        self._guard = ScalingGuard()
        self._handed = Handed()
        # Here and not in build: a step may ask for the scale before, and a restored checkpoint gives it only to a
        # variable that there is.
        initial_state = loss_scale.initial_state()
        self._state = {name: self._add(name, state_dtype(value), value) for name, value in initial_state.items()}
        self._ledger = Ledger(self._add, initial_state["scale"])
        self._blame = Blame(self, self._ledger)
        self._largest: Any = None
        if not blame:
            # Else it comes after that of the ledger: files of saved optimizers know variables by their order.
            self._add_largest()
        self._settings_open = True

    def _add(self, name: str, dtype: str, initial: Any) -> Any:
        variable = self.add_variable(np.shape(initial), keras.initializers.Constant(initial), dtype, name=name)
        # An attribute of its own is what tf.train.Checkpoint follows.
        setattr(self, f"_{name}_variable", variable)
        return variable

    def _add_largest(self) -> None:
        if self.loss_scale.needs_largest and self._largest is None:
            self._largest = self._add("largest_gradient", "float32", 0.0)

    def build(self, var_list: Sequence[Any]) -> None:
        """Makes the variables of the inner optimizer, and what blame needs."""
        if self.built:
            return
        var_list = list(var_list)
        replicas.check_scope([*self._state.values(), self.inner_optimizer._iterations])
        if self.blame:
            self._ledger.blame_one_by_one(var_list)
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
        # Keras' own build, less the moving averages and accumulators, which are the inner optimizer's. Like Keras, past
        # __setattr__: the variables of the model are none of this optimizer's, to list or to save.
        self._trainable_variables_indices.update({self._var_key(variable): i for i, variable in enumerate(var_list)})
        object.__setattr__(self, "_trainable_variables", var_list)
        self.built = True

    @_as_written
    def scale_loss(self, loss: Any) -> Any:
        """``loss`` times the loss scale, in float32 or wider: a float16 loss would overflow by being scaled."""
        if not self.loss_scale.scales:
            return loss
        loss = tf.convert_to_tensor(loss)
        if loss.dtype in (tf.float16, tf.bfloat16):
            loss = tf.cast(loss, tf.float32)
        self._guard.scaling()
        return loss * tf.cast(self._scale(), loss.dtype)

    @_as_written
    def unscale(
        self, scaled_grads: Iterable[Any], variables: Sequence[Any] | None = None
    ) -> tuple[list[Any], tf.Tensor]:
        """The true gradients, and whether all of them are finite, on all replicas.

        Args:
            scaled_grads: gradients of the scaled loss, dense or ``tf.IndexedSlices``; None is passed through, and so
                is the new value of a variable that Keras marks ``overwrite_with_gradient``.
            variables: those that they belong to; may be left out if they are those that the optimizer was built with,
                in their order. ``blame`` needs them if :meth:`apply` is called in another ``tf.function`` or with a
                ``finite`` that was made anew.

        Returns:
            The gradients in float32 or wider, divided by the loss scale, and a boolean scalar.

        Raises:
            ValueError: the gradients were computed from what an earlier call returned, or it cannot be told which of
                them are new values.
        """
        scaled = as_tensors(scaled_grads)
        variables = None if variables is None else list(variables)
        self._blame.in_unscale |= variables is not None
        grads, new_values, finite, flags = self._judged(scaled, variables)
        grads = self._handed.out(grads, new_values)
        unscaling = Unscaling(flags)
        if self.loss_scale.checks_finite:
            provenance.mark([finite], unscaling)
        if self.loss_scale.scales:
            self._guard.unscaled(scaled, grads, unscaling)
        return grads, finite

    @_as_written
    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Sequence[Any] | None = None,
        finite: Any | None = None,
    ) -> None:
        """Applies one step, or skips it.

        Args:
            grads: without ``finite``, gradients of the scaled loss; with it, what :meth:`unscale` returned, clipped
                or changed in any other way.
            trainable_variables: the variables they belong to; may be left out once the optimizer is built.
            finite: what :meth:`unscale` said. The step is then not judged again.

        Raises:
            ValueError: gradients that were unscaled came without ``finite``, or see :func:`replicas.check_context`.
        """
        grads = list(grads)
        if not grads:
            return
        replicas.check_context()
        replicas.check_scope([*self._state.values(), self.inner_optimizer._iterations])
        self._ensure_built(trainable_variables)
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"{len(grads)} gradients were given for {len(variables)} variables; pass one for each")
        check_inner(self.inner_optimizer)
        self._traced |= not tf.executing_eagerly()
        if finite is None:
            grads, new_values, finite, _ = self._judged(grads, variables)
            grads = put_back(grads, new_values)
        else:
            if self.loss_scale.scales:
                self._guard.check_unscaled(grads)
            self._handed.check(grads, variables)
            if self.blame and self.loss_scale.checks_finite:
                self._blame.later(finite, variables)
            finite = replicas.all_true(finite)
        self._guard.over()
        grads = fitted(grads, variables)

        if window(self.inner_optimizer) and self.loss_scale.skip_nonfinite:
            accumulate(self.inner_optimizer, self._window_finite, self._decide, grads, variables, finite)
            return
        if not self.loss_scale.skip_nonfinite:
            self.inner_optimizer.apply(grads, variables)
        elif not self._apply_gated(grads, variables, finite):
            # Everything that the inner optimizer assigns is inside the branch, which is what makes a skip exact.
            index = tf.where(finite, 1, 0)
            replicas.switch(index, [lambda *_: None, self.inner_optimizer.apply], grads, variables)
        self._decide(finite)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], finite: Any | None = None) -> Any:
        """:meth:`apply` for pairs of gradient and variable; returns the iteration count, as Keras does."""
        pairs = list(grads_and_vars)
        self.apply([grad for grad, _ in pairs], [variable for _, variable in pairs], finite=finite)
        return self.iterations

    @property
    def variables(self) -> list[Any]:
        """Those of the loss scale and the ledger, then those of the inner optimizer."""
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def loss_scale_value(self) -> tf.Tensor:
        """The loss scale of the next step, a float32 scalar. Read it in the step: a number kept is soon out of date."""
        self._guard.reading()
        return self._scale()

    def counters(self) -> dict[str, Any]:
        """What became of the steps so far; waits for the device, so not for every step of a timed loop.

        Returns:
            ``attempted``, ``applied``, ``skipped``, ``overflow`` (steps with a gradient that was not finite),
            ``longest_skip_run``, ``floor_overflow`` (overflow steps whose scale could not have been lower), all 0
            before the first step; ``first_overflow`` and ``last_overflow``, numbered from 0, None where there was none;
            ``by_variable``, path to overflow steps of the variables that had one, None without ``blame``.
        """
        return self._ledger.counters() | ({"by_variable": {}} if self.blame and not self.built else {})

    def trajectory(self) -> list[tuple[int, float]]:
        """How the scale moved: pairs of a step, numbered from 0, and the scale from that step on. Waits for the device.

        The last 256 changes are kept.
        """
        return self._ledger.trajectory()

    def check_alarm(self) -> None:
        """Speaks up if steps overflowed at the floor of the scale since the last call. Waits for the device.

        For loops of your own, every now and then; in ``fit``, :class:`~mpscale.scaling.LossScaleMonitor` calls it.

        Raises:
            FloorOverflowError: they did, and ``alarm`` is ``"stop"``.
        """
        counters = self.counters()
        if counters["floor_overflow"] > self._alarmed:
            self._alarmed = counters["floor_overflow"]
            raise_alarm(self.alarm, counters, float(self._scale()))

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets :attr:`variables` in their order. Keras' own method stops before those of the inner optimizer.

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
        """Refused, as by every Keras optimizer on TensorFlow."""
        raise ValueError("stateless_apply is not supported with the TensorFlow backend; use apply")

    def get_config(self) -> dict[str, Any]:
        """Plain values, from which :meth:`from_config` makes an equal optimizer without its state."""
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
        """The inverse of :meth:`get_config`."""
        parts = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
            for name in ("inner_optimizer", "loss_scale")
        }
        return cls(**(config | parts))

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
        """:meth:`unscale`, and what is kept of it for :meth:`apply` and the ledger.

        Returns:
            Gradients, new values apart from them, and whether the gradients are finite; with ``blame`` and without
            variables to blame, which are not finite, int64 (gradients,).
        """
        replicas.check_context()
        if self.loss_scale.scales and self.loss_scale != StaticLossScale(1.0):
            self._guard.check_scaled(scaled)
        if self.loss_scale.needs_largest and self._largest is None:
            raise ValueError(
                "the optimizer is not built: with blame, call optimizer.build(model.trainable_variables) before the "
                "first unscale"
            )
        scale = self._scale()
        known = (self._trainable_variables if self.built else []) if variables is None else variables
        scaled, new_values = taken_out(kept_from_rewrite(scaled), known)
        grads = unscaled(scaled, scale) if self.loss_scale.scales else scaled
        if not self.loss_scale.checks_finite:
            return grads, new_values, tf.constant(True), None
        # What is finite stays finite in a division by 1 or more, and is quicker to look at before it.
        judged, factor = (scaled, 1.0 / scale) if self.loss_scale.at_least_one else (grads, 1.0)
        if self.loss_scale.needs_largest:
            finite, largest = finite_and_largest(judged)
            largest = replicas.largest(largest * factor)
            if window(self.inner_optimizer):
                largest = tf.maximum(largest, self._largest.value)
            self._largest.assign(largest)
        else:
            finite = all_finite(judged)
        flags = None
        if self.blame:
            nothing = tf.zeros((len(judged),), tf.int64)
            flags = tf.cond(finite, lambda: nothing, lambda: nonfinite_flags(judged))
            flags = replicas.any_set(flags)
            if variables is not None:
                self._ensure_built(variables)
                self._blame.now(flags, variables)
                flags = None
        return grads, new_values, replicas.all_true(finite), flags

    def _apply_gated(self, grads: list[Any], variables: list[Any], finite: tf.Tensor) -> bool:
        """Applies a step without a branch; False where that is not wanted or cannot be exact."""
        if self.skip == "branch" or tf.executing_eagerly() or tf.distribute.has_strategy():
            return False
        if self.skip == "auto" and not (under_xla() and gate_pays(variables)):
            return False
        return apply_gated(lambda: self.inner_optimizer.apply(grads, variables), [*variables, *self.variables], finite)

    def _decide(self, finite: tf.Tensor) -> None:
        """Moves the scale and counts the step."""
        state = {name: tf.convert_to_tensor(variable.value) for name, variable in self._state.items()}
        largest = tf.convert_to_tensor(self._largest.value) if self.loss_scale.needs_largest else None
        following = self.loss_scale.next_state(state, finite, largest=largest)
        for name, value in following.items():
            self._state[name].assign(value)
        if self.loss_scale.needs_largest:
            self._largest.assign(0.0)  # A window of accumulated gradients begins with nothing.
        applied = finite if self.loss_scale.skip_nonfinite else tf.constant(True)
        self._ledger.record(finite, applied, self.loss_scale.at_floor(state), state["scale"], following["scale"])
