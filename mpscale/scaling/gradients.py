"""From gradients of the scaled loss to true ones."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpscale.scaling import guard as provenance
from mpscale.scaling.guard import Unscaling
from mpscale.scaling.ledger import Ledger, path_of


def unscaled(grads: Sequence[Any], scale: tf.Tensor) -> list[Any]:
    """``grads / scale`` in float32 or wider, so that a small gradient survives the division.

    As a product, which is quicker. The reciprocal of a power of two is exact, that of another scale rounded.

    Args:
        grads: dense tensors or ``tf.IndexedSlices``; None is passed through.
        scale: float32 scalar, at most 2**126.
    """
    reciprocal = 1.0 / scale

    def times(grad: tf.Tensor) -> tf.Tensor:
        if grad.dtype in (tf.float16, tf.bfloat16):
            grad = tf.cast(grad, tf.float32)
        return grad * tf.cast(reciprocal, grad.dtype)

    return [_each(times, grad) for grad in grads]


def as_tensors(grads: Iterable[Any]) -> list[Any]:
    """``grads``, arrays made tensors; None is passed through."""
    return [grad if grad is None or tf.is_tensor(grad) else tf.convert_to_tensor(grad) for grad in grads]


def kept_from_rewrite(grads: Sequence[Any]) -> list[Any]:
    """``grads``, out of reach of TensorFlow's own rewrite of graphs to float16 where that is switched on.

    The rewrite takes a product along that follows one which it has taken to float16, and the finite check with it:
    a small gradient, unscaled there, is zero again. What the rewrite has on none of its lists it leaves in float32,
    with all that follows; Bitcast is such an operation, and moves no data.
    """
    if not tf.config.optimizer.get_experimental_options().get("auto_mixed_precision"):
        return list(grads)

    def out_of_reach(grad: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(tf.bitcast(grad, tf.int32), tf.float32) if grad.dtype == tf.float32 else grad

    return [_each(out_of_reach, grad) for grad in grads]


def fitted(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """``grads`` with the shapes of their variables, in so far as only the variables know them.

    Keras' optimizers cannot add up gradients of unknown rank, nor slices that do not say of how many rows.

    Args:
        grads: dense tensors or ``tf.IndexedSlices``; None is passed through.
        variables: of Keras or TensorFlow, one for each gradient.
    """

    def fit(grad: Any, variable: Any) -> Any:
        if grad is None:
            return None
        if isinstance(grad, tf.IndexedSlices):
            if grad.dense_shape is not None:
                return grad
            rows = tf.shape(variable.value if isinstance(variable, keras.Variable) else variable, grad.indices.dtype)
            return tf.IndexedSlices(grad.values, grad.indices, rows)
        grad = tf.convert_to_tensor(grad)
        return grad if grad.shape.is_fully_defined() else tf.ensure_shape(grad, variable.shape)

    return [fit(grad, variable) for grad, variable in zip(grads, variables, strict=True)]


def _each(function: Callable[[tf.Tensor], tf.Tensor], grad: Any) -> Any:
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(function(grad.values), grad.indices, grad.dense_shape)
    return function(tf.convert_to_tensor(grad))


# The finite check: whether all gradients are finite, which of them are not, and how large the largest is.

_INFINITY_BITS = 0x7F800000
"""Of float32."""

_SMALL = 2**13
"""Elements below which copying a tensor costs less than starting further kernels for it."""

_IN_ROWS = 2**14
"""Elements from which a tensor is reduced in two stages. XLA spreads a reduction over a CPU's cores by its outputs:
one that has a single output runs on a single core."""


def all_finite(tensors: Sequence[Any]) -> tf.Tensor:
    """Whether every element of every tensor is finite.

    Under XLA, tensors of one shape are checked together: their flags are combined element by element, which fuses into
    one loop; a tensor whose shape is known only at run time is checked by itself. The results for all shapes are laid
    end to end and reduced once more, to one scalar. A network of many small layers would otherwise pay for one kernel
    per variable, and XLA would copy the conjunction of all flags into every loop that depends on it, as it does with
    anything cheap.

    Args:
        tensors: dense tensors or ``tf.IndexedSlices``; None stands for a variable that the loss does not reach.

    Returns:
        A boolean scalar, True for no tensors.
    """
    values = _values(tensors)
    if not values:
        return tf.constant(True)
    if not under_xla():
        return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in _small_joined(values)]))
    flags = []
    for group in _by_shape(values):
        finite = functools.reduce(tf.logical_and, [tf.math.is_finite(value) for value in group])
        flags.append(_reduced(tf.reduce_all, finite))
    # A minimum over integers second, because XLA makes one reduction of two that are alike.
    return tf.reduce_min(tf.cast(_joined(flags), tf.int32)) > 0


def finite_and_largest(tensors: Sequence[Any]) -> tuple[tf.Tensor, tf.Tensor]:
    """:func:`all_finite` and the largest absolute value, from one look at the tensors.

    Args:
        tensors: as for :func:`all_finite`.

    Returns:
        A boolean scalar, and a float32 scalar: 0 for no tensors, without meaning where one is not finite. A float64
        value beyond float32 counts as not finite.
    """
    magnitudes = [tf.abs(tf.cast(value, tf.float32)) for value in _values(tensors)]
    if not magnitudes:
        return tf.constant(True), tf.constant(0.0)
    # Bits are ordered as the magnitudes are, with infinity and then NaN on top; and unlike that of floating-point
    # numbers, a maximum of integers is one that XLA vectorises on a CPU.
    bits = [tf.bitcast(magnitude, tf.int32) for magnitude in magnitudes]
    if under_xla():
        largest = []
        for group in _by_shape(bits):
            together = functools.reduce(tf.maximum, group)
            largest.append(_reduced(tf.reduce_max, together))
        # As above: a maximum by way of a minimum.
        top = -tf.reduce_min(-_joined(largest))
    else:
        top = tf.reduce_max(tf.stack([tf.reduce_max(each) for each in _small_joined(bits)]))
    # Nothing has the smallest integer for a maximum.
    top = tf.maximum(top, 0)
    return top < _INFINITY_BITS, tf.bitcast(top, tf.float32)


def nonfinite_flags(tensors: Sequence[Any]) -> tf.Tensor:
    """1 for every tensor with an element that is not finite, int64 (tensors,); 0 for None."""
    zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
    return tf.stack(
        [zero if tensor is None else tf.where(all_finite([tensor]), zero, one) for tensor in tensors]
        or [tf.zeros((0,), tf.int64)]
    )


def under_xla() -> bool:
    """Whether what is being traced will be compiled by XLA as a whole, as by ``tf.function(jit_compile=True)``."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def _reduced(reduce: Callable[..., tf.Tensor], values: tf.Tensor) -> tf.Tensor:
    """``values``, or a reduction of them to fewer: what is worth doing before they are laid end to end."""
    elements = values.shape.num_elements()
    if elements is None:
        # Down to one, since nothing says that they are few. A maximum of no elements is the smallest integer, which
        # has no negative; bits of a magnitude are never below 0.
        reduced = reduce(values)
        return reduced if reduced.dtype == tf.bool else tf.maximum(reduced, 0)
    return reduce(values, axis=-1) if values.shape.rank >= 2 and elements >= _IN_ROWS else values


def _small_joined(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """``values``, small ones of a dtype laid end to end: without XLA every operation is a kernel to be started."""
    small: dict[tf.DType, list[tf.Tensor]] = defaultdict(list)
    large: list[tf.Tensor] = []
    for value in values:
        elements = value.shape.num_elements()
        (large if elements is None or elements >= _SMALL else small[value.dtype]).append(value)
    return large + [_joined(group) if len(group) > 1 else group[0] for group in small.values()]


def _joined(values: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(value, (-1,)) for value in values], 0)


def _values(tensors: Sequence[Any]) -> list[tf.Tensor]:
    return [
        tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)
        for tensor in tensors
        if tensor is not None
    ]


def _by_shape(values: Sequence[tf.Tensor]) -> list[list[tf.Tensor]]:
    """Groups of tensors that surely have one shape: two of shape (None, 8) may differ in length."""
    groups: dict[Any, list[tf.Tensor]] = defaultdict(list)
    for place, value in enumerate(values):
        groups[tuple(value.shape) if value.shape.is_fully_defined() else place].append(value)
    return list(groups.values())


# Whose gradients were not finite: by the variables that they were given with, whichever those are and in any order.


class Blame:
    """Counts in a ledger what was found in ``unscale``, there or, where variables are not known yet, in ``apply``.

    Args:
        optimizer: the LossScaleOptimizer, which knows the variables that it was built with.
        ledger: counts for each of them.
    """

    def __init__(self, optimizer: Any, ledger: Ledger) -> None:
        self._optimizer, self._ledger = optimizer, ledger
        self.in_unscale = False  # whether unscale was ever told the variables

    def now(self, flags: tf.Tensor, variables: Sequence[Any]) -> None:
        """Counts ``flags``, int64 (variables,), for ``variables``.

        Raises:
            ValueError: the optimizer was not built with one of them, or their number is not that of the flags.
        """
        known = {self._optimizer._var_key(v): i for i, v in enumerate(self._optimizer._trainable_variables)}
        unknown = [path_of(v) for v in variables if self._optimizer._var_key(v) not in known]
        if unknown:
            raise ValueError(
                f"the optimizer was not built with {', '.join(unknown)}; give build all variables that will be updated"
            )
        if flags.shape[0] != len(variables):
            raise ValueError(
                f"{flags.shape[0]} gradients cannot be blamed on the {len(variables)} variables that came with them; "
                "pass one for each to unscale: grads, finite = optimizer.unscale(grads, variables)"
            )
        self._ledger.blame(flags, [known[self._optimizer._var_key(v)] for v in variables])

    def later(self, finite: Any, variables: Sequence[Any]) -> None:
        """Counts for ``variables`` what the calls of ``unscale`` found that ``finite`` comes from.

        Raises:
            ValueError: as :meth:`now`, or it comes from no call that is known.
        """
        found = frozenset().union(*provenance.origins([finite]))
        calls = [source for source in found if isinstance(source, Unscaling)]
        if not (calls or self.in_unscale) or not all(provenance.within_reach(call.flags) for call in calls):
            raise ValueError(
                "blame does not know whose gradients were not finite: finite comes from another function than this, or "
                "was made anew; pass the variables to unscale: grads, finite = optimizer.unscale(grads, variables)"
            )
        flags = [call.flags for call in calls if call.flags is not None]
        if flags:
            self.now(functools.reduce(tf.maximum, flags), variables)


# Variables whose "gradient" is their new value: Keras marks them ``overwrite_with_gradient``. Float8 layers keep
# their scales and the largest values that they met (``amax_history``) in such variables, and their backward pass
# returns what those are to be next. Keras assigns it as it is: no learning rate, no clipping, no decay. So it is not
# divided by the loss scale either, and says nothing about whether the gradients are finite.


def is_overwritten(variable: Any) -> bool:
    """Whether what stands for a gradient of ``variable`` is its new value."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def taken_out(grads: Sequence[Any], variables: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """``grads`` with None for every new value, and the new values with None for every gradient."""
    overwritten = [is_overwritten(variable) for variable in variables]
    if True not in overwritten:
        return list(grads), [None] * len(grads)
    if len(grads) != len(variables):
        raise ValueError(
            f"{len(grads)} gradients came for {len(variables)} variables, of which {overwritten.count(True)} are "
            "overwritten with what stands in the place of a gradient (float8 scales): which of the gradients those "
            "are cannot be told. Pass the variables, too: unscale(grads, variables) and apply(grads, variables)"
        )
    return (
        [None if new else grad for grad, new in zip(grads, overwritten, strict=True)],
        [grad if new else None for grad, new in zip(grads, overwritten, strict=True)],
    )


def put_back(grads: Sequence[Any], new_values: Sequence[Any]) -> list[Any]:
    """The inverse of :func:`taken_out`."""
    return [grad if new is None else new for grad, new in zip(grads, new_values, strict=True)]


class Handed:
    """Marks the new values that unscale returns, so that apply knows them again.

    Between the two gradients are clipped. A new value that was clipped along is wrong, and so are the gradients if it
    had a part in their norm; neither shows in the figures.
    """

    def __init__(self) -> None:
        self._any = False

    def out(self, grads: Sequence[Any], new_values: Sequence[Any]) -> list[Any]:
        """:func:`put_back`, with the new values marked."""
        self._any = True
        # Copies, because a mark must not be found on what went into unscale.
        marked = [None if new is None else tf.nest.map_structure(tf.identity, new) for new in new_values]
        for new in marked:
            if new is not None:
                new._mpscale_new_value = True
        return put_back(grads, marked)

    def check(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Looks at what came for ``variables`` together with the ``finite`` of an earlier unscale.

        Raises:
            ValueError: something else than unscale returned came for a variable that is overwritten, or a new value
                for one that is not.
        """
        if not self._any:
            return
        for grad, variable in zip(grads, variables, strict=True):
            if grad is not None and is_overwritten(variable) != hasattr(grad, "_mpscale_new_value"):
                raise ValueError(
                    f"what came for {path_of(variable)} is not what unscale returned for it. Variables with "
                    "overwrite_with_gradient (float8 scales) get their new value in the place of a gradient, and it "
                    "must not be clipped, added up or counted in a norm. Let the inner optimizer clip (clipnorm, "
                    "global_clipnorm or clipvalue leave it out), or change only the gradients of the other variables; "
                    "call unscale(grads, variables) with the variables of apply, and both in the same tf.function"
                )
