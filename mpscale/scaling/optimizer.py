"""LossScaleOptimizer: wraps a Keras optimizer, scales the loss, unscales the gradients and skips overflow steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpscale.scaling.finite import all_finite
from mpscale.scaling.ledger import Ledger
from mpscale.scaling.loss_scale import DynamicLossScale, LossScale, state_dtype

# Nothing here has control flow that depends on a tensor, and rewriting it all would add a second to every trace.
_as_written = tf.autograph.experimental.do_not_convert


@keras.saving.register_keras_serializable(package="mpscale")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
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

    It derives from Keras' own class because ``compile`` would otherwise wrap it a second time under a
    mixed_float16 policy.

    Args:
        inner_optimizer: any Keras optimizer that does no loss scaling of its own.
        loss_scale: a :class:`~mpscale.scaling.LossScale`; DynamicLossScale() where none is given.
        name: name of the optimizer.

    Raises:
        TypeError: ``inner_optimizer`` or ``loss_scale`` is something else.
        ValueError: ``inner_optimizer`` scales the loss itself.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        loss_scale: LossScale | None = None,
        name: str | None = None,
    ) -> None:
        _check_inner(inner_optimizer)
        loss_scale = DynamicLossScale() if loss_scale is None else loss_scale
        if not isinstance(loss_scale, LossScale):
            raise TypeError(
                f"loss_scale must be a LossScale such as StaticLossScale(128) or DynamicLossScale(), not {loss_scale!r}"
            )
        # Not Keras' LossScaleOptimizer's own __init__: it sets up the dynamic rule that this class replaces.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.loss_scale = loss_scale

    def build(self, var_list: Sequence[Any]) -> None:
        """Makes the variables of the loss scale, the counters and the inner optimizer."""
        if self.built:
            return

        def add(name: str, dtype: str, initial: float | int) -> Any:
            variable = self.add_variable((), keras.initializers.Constant(initial), dtype, name=name)
            # An attribute of its own is what tf.train.Checkpoint follows.
            setattr(self, f"_{name}_variable", variable)
            return variable

        self._scale_state_names = tuple(self.loss_scale.initial_state())
        for name, initial in self.loss_scale.initial_state().items():
            add(name, state_dtype(initial).name, initial)
        self._ledger = Ledger(lambda name: add(f"steps_{name}", "int64", 0))
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(var_list)
        keras.optimizers.Optimizer.build(self, var_list)

    @_as_written
    def scale_loss(self, loss: Any) -> Any:
        """``loss`` times the loss scale, in float32: a float16 loss would overflow by being scaled."""
        if not self.loss_scale.checks_finite:
            return loss
        return tf.cast(loss, tf.float32) * self.loss_scale_value

    @_as_written
    def unscale(self, scaled_grads: Iterable[Any]) -> tuple[list[Any], tf.Tensor]:
        """The true gradients, and whether all of them are finite.

        Args:
            scaled_grads: gradients of the scaled loss, dense or ``tf.IndexedSlices``; None is passed through.

        Returns:
            The gradients in float32 or wider, divided by the loss scale, and a boolean scalar.
        """
        grads = list(scaled_grads)
        if not self.loss_scale.checks_finite:
            return grads, tf.constant(True)
        scale = self.loss_scale_value
        grads = [_divided(grad, scale) for grad in grads]
        return grads, all_finite(grads)

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
            ValueError: more than one replica trains: the decision has to be taken over all of them.
        """
        grads = list(grads)
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError(
                "this LossScaleOptimizer works on one replica; under a strategy with several, each would decide "
                "for itself whether to skip and the weights would drift apart. Train on one device for now"
            )
        if not self.built:
            if trainable_variables is None:
                raise ValueError(
                    "the optimizer is not built: pass trainable_variables to apply, or call build(variables) first"
                )
            with tf.init_scope():
                self.build(list(trainable_variables))
        if finite is None:
            grads, finite = self.unscale(grads)
        finite = tf.convert_to_tensor(finite)

        if self.loss_scale.skip_nonfinite:
            applied = finite

            def update() -> tf.Tensor:
                self.inner_optimizer.apply(grads, trainable_variables)
                return tf.constant(True)

            # Everything that the inner optimizer assigns is inside the branch, which is what makes a skip exact.
            tf.cond(finite, update, lambda: tf.constant(False))
        else:
            applied = tf.constant(True)
            self.inner_optimizer.apply(grads, trainable_variables)

        state = {name: self._scale_state(name).value for name in self._scale_state_names}
        for name, value in self.loss_scale.next_state(state, finite).items():
            self._scale_state(name).assign(value)
        self._ledger.record(finite, applied)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], finite: Any | None = None) -> Any:
        """:meth:`apply` for pairs of gradient and variable; returns the iteration count, as Keras does."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, variables, finite=finite)
        return self.iterations

    @property
    def loss_scale_value(self) -> tf.Tensor:
        """The loss scale of the next step, a float32 scalar."""
        if not self.built:
            return tf.constant(self.loss_scale.initial_state()["scale"], tf.float32)
        return tf.convert_to_tensor(self._scale_state("scale").value)

    def counters(self) -> dict[str, int]:
        """What became of the steps so far: attempted, applied, skipped, overflow, longest_skip_run.

        Waits for the device, so not for every step of a timed loop. All are 0 before the first step.
        """
        if not self.built:
            return dict.fromkeys(("attempted", "applied", "skipped", "overflow", "longest_skip_run"), 0)
        return self._ledger.read()

    def stateless_apply(self, optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
        """Refused, as by every Keras optimizer on TensorFlow."""
        raise ValueError("stateless_apply is not supported with the TensorFlow backend; use apply")

    def get_config(self) -> dict[str, Any]:
        """Plain dicts: name, inner optimizer and loss scale."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "loss_scale": keras.saving.serialize_keras_object(self.loss_scale),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> LossScaleOptimizer:
        """The inverse of :meth:`get_config`."""
        return cls(
            keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects),
            keras.saving.deserialize_keras_object(config["loss_scale"], custom_objects=custom_objects),
            name=config.get("name"),
        )

    def _scale_state(self, name: str) -> Any:
        return getattr(self, f"_{name}_variable")


def _check_inner(inner: Any) -> None:
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ValueError(f"inner_optimizer is a {type(inner).__name__} already; wrap the optimizer inside it instead")
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(f"inner_optimizer must be a Keras optimizer such as keras.optimizers.Adam(), not {inner!r}")
    if inner.loss_scale_factor is not None:
        raise ValueError(
            f"inner_optimizer has loss_scale_factor={inner.loss_scale_factor}, so gradients would be unscaled twice; "
            f"leave that out and pass loss_scale=StaticLossScale({inner.loss_scale_factor})"
        )


def _divided(grad: Any, scale: tf.Tensor) -> Any:
    """``grad / scale`` in float32 or wider, so that a small gradient survives the division."""
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(_divided(grad.values, scale), grad.indices, grad.dense_shape)
    grad = tf.convert_to_tensor(grad)
    if grad.dtype in (tf.float16, tf.bfloat16):
        grad = tf.cast(grad, tf.float32)
    return grad / tf.cast(scale, grad.dtype)
