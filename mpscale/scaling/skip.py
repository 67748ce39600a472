"""Skip a step exactly: either mask every write of the update, or leave the update out by a branch.

A branch is the obvious way, but slow under XLA: its conditional is not fused with what comes before it, and copies the
state in and out. A masked update always runs, and writes ``finite ? new : old``, which XLA folds into the loop that
computes ``new``. docs/scaling-cost.md has the measurements.

Exactness does not depend on knowing how an optimizer works. All its variables write through the mask while the update
is traced, and the trace is then searched for writes that did not.

Under a ``tf.distribute`` strategy all replicas make one decision, and take a branch together.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import keras
import tensorflow as tf

from mpscale.scaling.gradients import under_xla

Skip = Literal["auto", "branch", "gate"]
"""``"gate"`` is the masked update."""

_SCOPE = "mpscale_skip"

_WRITE = re.compile(r"Assign|Resource(?!Gather)|RngSkip|RngReadAndSkip|Stateful(?!PartitionedCall)")
"""Operations that change a resource, by the beginning of their type."""

_MASK_FROM = 2**13
"""Average elements per variable from which masking is faster on a CPU. The branch was as fast or faster at 1,400 and
1,800, the mask at 310,000; nothing in between was measured."""

_AGREED = "_mpscale_agreed"


def masking_pays(variables: Sequence[Any]) -> bool:
    """Return whether masking every write is faster than a branch, under XLA.

    A branch copies all state in and out, and costs by the element; masking is more work for the compiler, and costs by
    the variable (docs/scaling-cost.md). On a GPU a branch also waits until its predicate has reached the host.
    """
    if tf.config.list_logical_devices("GPU"):
        return True
    # A variable whose shape is known only at run time counts as small.
    elements = [tf.TensorShape(variable.shape).num_elements() or 0 for variable in variables]
    return sum(elements) >= _MASK_FROM * len(variables)


def apply_masked(update: Callable[[], None], variables: Iterable[Any], finite: tf.Tensor) -> bool:
    """Trace ``update`` into the current graph so that it changes nothing if ``finite`` is False.

    Args:
        update: assigns to variables.
        variables: Keras or TensorFlow variables that ``update`` is known to assign to.
        finite: boolean scalar.

    Returns:
        False if a write could not be masked; nothing has been added to the graph then.
    """
    native = (variable.value if isinstance(variable, keras.Variable) else variable for variable in variables)
    known = {id(variable): variable for variable in native}

    def masked() -> None:
        with _masked(known.values(), finite):
            update()

    for _ in range(2):
        # A function of its own, so that a trace that fails the search can be thrown away. XLA inlines it.
        function = tf.function(masked, autograph=False).get_concrete_function()
        nodes = all_nodes(function.graph.as_graph_def())
        if not any(_WRITE.match(node.op) and _SCOPE not in node.name for node in nodes):
            function()
            return True
        # The trace knows every variable it touches, including those that the optimizer does not list.
        known.update((id(variable), variable) for variable in function.graph.variables)
    return False


def switch(index: Any, branches: Sequence[Callable[..., None]], *args: Any) -> None:
    """Run one of ``branches``.

    Under a strategy the branch is taken outside the replicas and then run in each of them, because replicas cannot
    wait for each other inside a branch that each took by itself.

    Args:
        index: int32 scalar, which branch; the same on all replicas.
        branches: functions of ``args`` that assign to variables and return nothing.
        args: this replica's tensors that the branches need; may contain lists and None.
    """
    if not tf.distribute.has_strategy() or tf.__internal__.distribute.strategy_supports_no_merge_call():
        _switch(index, [functools.partial(branch, *args) for branch in branches])
        return

    def across(strategy: Any, index: Any, *args: Any) -> None:
        on_each = [functools.partial(strategy.extended.call_for_each_replica, branch, args=args) for branch in branches]
        _switch(strategy.experimental_local_results(index)[0], on_each)

    tf.distribute.get_replica_context().merge_call(across, args=(index, *args))


def true_on_all(flag: Any) -> tf.Tensor:
    """Return whether ``flag``, a boolean scalar, is True on every replica; replicas communicate once per flag."""
    flag = tf.convert_to_tensor(flag)
    if not tf.distribute.has_strategy() or hasattr(flag, _AGREED):
        return flag
    agreed = tf.equal(_sum(tf.logical_not(flag)), 0.0)
    setattr(agreed, _AGREED, True)
    return agreed


def set_on_any(flags: Any) -> tf.Tensor:
    """Return 1 for each of ``flags``, 0 or 1 in an int64 vector, that is 1 on any replica."""
    if not tf.distribute.has_strategy():
        return flags
    return tf.cast(_sum(flags) > 0, tf.int64)


def largest_on_any(value: Any) -> tf.Tensor:
    """Return the largest ``value``, a float32 scalar, of all replicas."""
    if not tf.distribute.has_strategy():
        return value
    # all_reduce has no maximum.
    return tf.reduce_max(tf.distribute.get_replica_context().all_gather(tf.reshape(value, (1,)), axis=0))


def _sum(flags: tf.Tensor) -> tf.Tensor:
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(flags, tf.float32))


def check_context() -> None:
    """Raise ValueError if replicas cannot decide together here."""
    if not tf.distribute.has_strategy():
        return
    if tf.distribute.in_cross_replica_context():
        raise ValueError(
            "LossScaleOptimizer was used in a cross-replica context; call it inside the function that you pass to "
            "strategy.run, where the gradients of one replica are"
        )
    if under_xla() and not tf.__internal__.distribute.strategy_supports_no_merge_call():
        raise ValueError(
            f"jit_compile=True does not work with {type(tf.distribute.get_strategy()).__name__} on these devices: "
            "TensorFlow joins replicas by merge_call here, which XLA cannot compile. Leave jit_compile off: "
            "model.compile(..., jit_compile=False), or tf.function without jit_compile"
        )


def check_scope(variables: Iterable[Any]) -> None:
    """Raise ValueError if several replicas share one of ``variables``, so that one step would count several times."""
    strategy = tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync > 1 and not all(
        strategy.extended.variable_created_in_scope(variable.value) for variable in variables
    ):
        raise ValueError(
            "the optimizer, or the one inside it, was made outside strategy.scope(), so every replica would count each "
            "step again; make both under strategy.scope(): LossScaleOptimizer(keras.optimizers.Adam())"
        )


def all_nodes(definition: Any) -> list[Any]:
    """Return the nodes of a GraphDef, including those in branches and called functions."""
    return [*definition.node, *(node for function in definition.library.function for node in function.node_def)]


@contextlib.contextmanager
def _masked(variables: Iterable[Any], finite: tf.Tensor) -> Iterator[None]:
    """Mask the writing methods of ``variables``: attributes of an object take precedence over those of its class."""
    finite = tf.identity(finite)
    masked = [(variable, _masked_methods(variable, finite)) for variable in variables]
    for variable, methods in masked:
        vars(variable).update(methods)
    try:
        yield
    finally:
        for variable, methods in masked:
            for name in methods:
                del vars(variable)[name]


def _masked_methods(variable: Any, finite: tf.Tensor) -> dict[str, Callable[..., Any]]:
    kind = type(variable)

    def write(new_of: Callable[[Any], Any], **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            old = variable.read_value()
            # A select, not a masked difference: only a copy keeps the bits of a subnormal number.
            return kind.assign(variable, tf.where(finite, tf.cast(new_of(old), variable.dtype), old), **options)

    def assign(value: Any, **options: Any) -> Any:
        return write(lambda old: value, **options)

    def assign_add(delta: Any, **options: Any) -> Any:
        return write(lambda old: old + tf.cast(delta, old.dtype), **options)

    def assign_sub(delta: Any, **options: Any) -> Any:
        return write(lambda old: old - tf.cast(delta, old.dtype), **options)

    def scatter_update(rows: tf.IndexedSlices, **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            values = tf.where(finite, rows.values, tf.gather(variable.read_value(), rows.indices))
            return kind.scatter_update(variable, tf.IndexedSlices(values, rows.indices), **options)

    # Dense even for a few rows: adding zeros to the others would flush subnormal numbers.
    def scatter_add(rows: tf.IndexedSlices, **options: Any) -> Any:
        return write(lambda old: tf.tensor_scatter_nd_add(old, rows.indices[:, tf.newaxis], rows.values), **options)

    def scatter_sub(rows: tf.IndexedSlices, **options: Any) -> Any:
        return write(lambda old: tf.tensor_scatter_nd_sub(old, rows.indices[:, tf.newaxis], rows.values), **options)

    methods = (assign, assign_add, assign_sub, scatter_update, scatter_add, scatter_sub)
    return {method.__name__: method for method in methods}


def _switch(index: Any, branches: Sequence[Callable[[], None]]) -> None:
    def run(branch: Callable[[], None]) -> Callable[[], tf.Tensor]:
        def call() -> tf.Tensor:
            branch()
            return tf.constant(True)  # Branches have to return something of one type.

        return call

    if len(branches) == 2:
        tf.cond(tf.equal(index, 0), run(branches[0]), run(branches[1]))
    else:
        tf.switch_case(index, [run(branch) for branch in branches])
