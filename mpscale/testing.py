"""For tests of loss scaling, mpscale's or anyone's: an overflow at a chosen place.

Only an overflow shows whether a scaler skips the step, lowers the scale and makes all replicas agree, but waiting for a
model to overflow tests the model. ``inject_overflow`` makes gradients of chosen steps, replicas and variables overflow.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpscale.scaling.ledger import path_of


class OverflowInjector:
    """Makes gradients non-finite in chosen steps. :func:`inject_overflow` is another name for this class.

    In a train step of your own, eager or compiled, it takes the gradients and returns them::

        inject = inject_overflow(step=3, variable="dense/kernel")
        grads = tape.gradient(scaled_loss, model.trainable_variables)
        grads = inject(grads, model.trainable_variables)
        opt.apply(grads, model.trainable_variables)

    Where the gradients are out of reach, as in ``model.fit``::

        with inject_overflow(step=3).into(model):
            model.fit(x, y)

    Steps are counted in a variable on the device, so a compiled function is hit in the right step. Under a strategy
    every replica counts for itself, and all counts are the same.

    Args:
        step: the steps that are hit, counted from 0 in calls of the injector. An empty iterable is a control.
        replica: index of the replica in sync whose gradients are hit; None for all.
        variable: index of the gradient that is hit, or the path of its variable, or the end of that path from a slash
            on, such as "dense/kernel" or "kernel"; None for all gradients.
        value: inf, -inf or nan; it replaces the first element.

    Raises:
        ValueError: an argument is something else.
    """

    def __init__(
        self,
        step: int | Iterable[int],
        replica: int | None = None,
        variable: int | str | None = None,
        value: float = math.inf,
    ) -> None:
        if not (replica is None or _is_index(replica)):
            raise ValueError(f"replica must be an integer of at least 0, or None for all replicas; not {replica!r}")
        if not (variable is None or isinstance(variable, str) or _is_index(variable)):
            raise ValueError(
                "variable must be an integer of at least 0, a path such as 'dense/kernel', or None for all; "
                f"not {variable!r}"
            )
        self.steps = _checked_steps(step)
        self.replica = None if replica is None else operator.index(replica)
        self.variable = variable if variable is None or isinstance(variable, str) else operator.index(variable)
        self.value = _checked_value(value)
        self._called = False
        self._inside = False
        self._make_variables(tf.distribute.get_strategy())

    @property
    def calls(self) -> int:
        """Steps counted so far. Waits for the device; not for use inside a ``tf.function``."""
        return int(self._count.numpy())

    def __call__(self, grads: Iterable[Any], variables: Iterable[Any] | None = None) -> list[Any]:
        """Return the gradients of one step, non-finite if this step, replica and variable were chosen.

        In a chosen step the first element (flat index 0) of each chosen gradient is ``value``; all else stays as it is.
        Under a strategy, call it inside the function that ``strategy.run`` runs.

        Args:
            grads: dense tensors of any shape or ``tf.IndexedSlices``; None stays None.
            variables: the Keras or TensorFlow variables of the gradients; needed if ``variable`` is a path.

        Returns:
            The gradients in the same order, with the same dtypes, shapes and kinds.

        Raises:
            TypeError: ``grads`` is a single gradient or a mapping.
            ValueError: there is no such variable or replica, the chosen gradients are None or empty, the call is not
                in a replica context, or the injector was used under another strategy before.
        """
        injected: list[Any] = self._injected(grads, variables, only_armed=False)
        return injected

    @contextlib.contextmanager
    def into(self, target: Any) -> Iterator[OverflowInjector]:
        """Inject into the gradients that are passed to ``optimizer.apply`` inside a ``with`` block.

        ``model.fit`` and ``apply_gradients`` call that method. With a loss scale optimizer the gradients are still
        scaled then, as after a real overflow.

        Keras keeps its compiled train function, and one that was traced before the block does not inject. Given the
        model, this method has the function traced anew in the block and again after it. Given the optimizer, trace
        inside the block: compile the model there, or set ``model.train_function = None``. A function traced inside the
        block neither counts nor injects after it.

        Args:
            target: a compiled Keras model or a Keras optimizer, including loss scale optimizers.

        Yields:
            The injector.

        Raises:
            TypeError: ``target`` is something else.
            ValueError: the model has no optimizer, or gradients are passed with ``finite``: whether the step is skipped
                was decided before.
            RuntimeError: the block is inside a ``tf.function`` or another block of this injector, or no gradients were
                passed in it, so that the test would have tested nothing.
        """
        model = target if isinstance(target, keras.Model) else None
        optimizer = _optimizer_of(target)
        if not tf.executing_eagerly():
            raise RuntimeError(
                "into() is inside a tf.function, where it would end with the tracing; put the block around the "
                "training, or call the injector on the gradients"
            )
        if self._inside:
            raise RuntimeError("this injector is inside an into() block already; make another with inject_overflow")
        before = self.calls
        own = vars(optimizer).get("apply")
        # Past Keras' __setattr__, which inspects what is assigned to an optimizer.
        object.__setattr__(optimizer, "apply", self._hooked(optimizer))
        self._arm(True)
        if model is not None:
            model.train_function = None
        try:
            yield self
        finally:
            self._arm(False)
            if own is None:
                object.__delattr__(optimizer, "apply")
            else:
                object.__setattr__(optimizer, "apply", own)
            if model is not None:
                model.train_function = None
        if self.calls == before:
            raise RuntimeError(
                f"no gradients were passed to the apply of {type(optimizer).__name__} inside this into() block. Train "
                "inside it; if you did, the train function was traced before it or the model has another optimizer: "
                "pass the compiled model to into(), or set model.train_function = None inside the block"
            )

    def _hooked(self, optimizer: Any) -> Callable[..., Any]:
        """Return ``optimizer.apply`` with the injection before it."""
        original = optimizer.apply

        def apply(grads: Any, trainable_variables: Any = None, finite: Any = None, **others: Any) -> Any:
            if finite is not None:
                raise ValueError(
                    "apply was given finite, so whether to skip this step is decided already and an overflow injected "
                    "now would go unseen; leave into() out and call the injector on the gradients before unscale"
                )
            if trainable_variables is not None:
                trainable_variables = list(trainable_variables)
            known = trainable_variables or getattr(optimizer, "_trainable_variables", None) or None
            return original(self._injected(grads, known, only_armed=True), trainable_variables, **others)

        return apply

    # No control flow in here depends on a tensor.
    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def _injected(self, grads: Iterable[Any], variables: Iterable[Any] | None, only_armed: bool) -> list[Any]:
        if isinstance(grads, Mapping | str) or hasattr(grads, "dtype"):
            raise TypeError(f"grads must be a list of gradients, not a {type(grads).__name__}; put it into a list")
        grads = list(grads)
        chosen = self._chosen(grads, None if variables is None else list(variables))
        hit = self._on_this_replica()
        self._count_under(tf.distribute.get_strategy())
        count = self._count.read_value()
        advance = self._armed.read_value() if only_armed else tf.constant(1, tf.int64)
        self._count.assign_add(advance)
        hit &= (advance > 0) & tf.reduce_any(count == tf.constant(self.steps, tf.int64, (len(self.steps),)))
        for index in chosen:
            grads[index] = _with_first(grads[index], self.value, hit)
        return grads

    def _chosen(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> list[int]:
        """Return the indices of the gradients to hit, none of which is None."""
        if variables is not None and len(variables) != len(grads):
            raise ValueError(f"there are {len(grads)} gradients and {len(variables)} variables; pass one for each")
        paths = None if variables is None else list(map(path_of, variables))
        if self.variable is None:
            places = list(range(len(grads)))
        elif isinstance(self.variable, str):
            places = [_place_of(self.variable, paths)]
        elif self.variable < len(grads):
            places = [self.variable]
        else:
            raise ValueError(
                f"variable={self.variable} is not among the {len(grads)} gradients"
                + ("" if paths is None else f" of {', '.join(paths)}")
                + "; the first is 0"
            )
        chosen = [place for place in places if _may_have_elements(grads[place])]
        if not chosen:
            what = f"the gradient of variable={self.variable!r} is" if len(places) == 1 else "all gradients are"
            raise ValueError(
                f"{what} None or empty, so nothing can be made non-finite; choose a variable that the loss depends on"
            )
        return chosen

    def _on_this_replica(self) -> tf.Tensor:
        """Return whether this replica is chosen, a boolean scalar."""
        context = tf.distribute.get_replica_context()
        if context is None:
            raise ValueError(
                "the injector was called outside a replica, where the gradients of several may be merged already; call "
                "it in the function that strategy.run runs"
            )
        if self.replica is None:
            return tf.constant(True)
        if self.replica >= context.num_replicas_in_sync:
            raise ValueError(
                f"replica={self.replica}, but {context.num_replicas_in_sync} are in sync and the first is 0; choose a "
                "smaller one, or train under a strategy with more"
            )
        return tf.equal(context.replica_id_in_sync_group, self.replica)

    def _count_under(self, strategy: Any) -> None:
        """Make variables for each replica of ``strategy`` before the first call."""
        if strategy is not self._strategy:
            if self._called:
                raise ValueError(
                    f"this injector counts its calls under {type(self._strategy).__name__} and was now called under "
                    f"{type(strategy).__name__}; make one for each with inject_overflow"
                )
            self._make_variables(strategy)
        self._called = True

    def _make_variables(self, strategy: Any) -> None:
        def make() -> None:
            with strategy.scope():
                self._count = _per_replica("overflow_injector_count", 0)
                self._armed = _per_replica("overflow_injector_armed", int(self._inside))

        # A tf.function notices variables that are made while it is traced, even under tf.init_scope: it traces once
        # more, or refuses if it was called before. It does not notice those made in another thread.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(make).result()
        self._strategy = strategy

    def _arm(self, inside: bool) -> None:
        self._inside = inside
        self._armed.assign(int(inside))


inject_overflow = OverflowInjector  # a verb, which reads better in a test


def _per_replica(name: str, initial: int) -> Any:
    """Make a counter that each replica updates and reads by itself."""
    return tf.Variable(
        initial,
        trainable=False,
        name=name,
        dtype=tf.int64,  # TensorFlow cannot update int32 variables on a GPU.
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def _checked_steps(step: Any) -> tuple[int, ...]:
    try:
        steps: list[Any] = [step] if isinstance(step, str) else list(step)
    except TypeError:  # an integer, or an array without a dimension
        steps = [step]
    if not all(map(_is_index, steps)):
        raise ValueError(f"step must be an integer of at least 0 or several of them, not {step!r}; the first step is 0")
    return tuple(sorted(set(map(operator.index, steps))))


def _checked_value(value: Any) -> float:
    try:
        number = 0.0 if isinstance(value, str) else float(value)
    except TypeError:
        number = 0.0
    if math.isfinite(number):
        raise ValueError(f"value must be inf, -inf or nan, not {value!r}; a finite gradient is not an overflow")
    return number


def _is_index(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and operator.index(value) >= 0
    except TypeError:
        return False


def _optimizer_of(target: Any) -> Any:
    if isinstance(target, keras.optimizers.Optimizer):
        return target
    if not isinstance(target, keras.Model):
        raise TypeError(f"into() takes a compiled Keras model or a Keras optimizer, not {target!r}")
    optimizer = getattr(target, "optimizer", None)
    if optimizer is None:
        raise ValueError(f"the model {target.name!r} has no optimizer; compile it before into()")
    return optimizer


def _place_of(wanted: str, paths: Sequence[str] | None) -> int:
    if paths is None:
        raise ValueError(f"variable={wanted!r} is a path, so pass the variables along with the gradients")
    path = wanted.removesuffix(":0")
    places = [place for place, known in enumerate(paths) if known == path]
    places = places or [place for place, known in enumerate(paths) if known.endswith(f"/{path}")]
    if not places:
        raise ValueError(f"no variable is called {wanted!r}; there are {', '.join(paths)}")
    if len(places) > 1:
        raise ValueError(
            f"variable={wanted!r} can be {' or '.join(paths[place] for place in places)}; give the whole path or, if "
            f"that is the same, the index in {', '.join(paths)}"
        )
    return places[0]


def _may_have_elements(grad: Any) -> bool:
    """Return False if ``grad`` is None or is known to be empty before it is computed."""
    if grad is None:
        return False
    values = grad.values if isinstance(grad, tf.IndexedSlices) else grad
    return bool(tf.convert_to_tensor(values).shape.num_elements() != 0)


def _with_first(grad: Any, value: float, hit: tf.Tensor) -> Any:
    """Return ``grad`` with ``value`` as its first element if ``hit``, a boolean scalar, is True."""
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(_with_first(grad.values, value, hit), grad.indices, grad.dense_shape)
    grad = tf.convert_to_tensor(grad)
    flat = tf.reshape(grad, [-1])
    # A slice instead of an index, so that a tensor that turns out to be empty stays as it is.
    first = tf.where(hit, tf.constant(value, grad.dtype), flat[:1])
    changed = tf.reshape(tf.concat([first, flat[1:]], 0), tf.shape(grad))
    changed.set_shape(grad.shape)
    return changed
