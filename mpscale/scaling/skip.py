"""Skipping a step without a branch: every write of an optimizer is let through or held back by a select.

A branch is the obvious way to skip, and under XLA a dear one: its conditional keeps the update from being fused with
what comes before it and copies the state in and out. Here the update always runs, and what it writes is
``finite ? new : old``, which XLA folds into the loop that computes ``new``. docs/scaling-cost.md has the measurements.

Exactness does not rest on knowing how an optimizer works. All its variables write through the gate for as long as
the update is traced, and the trace is then searched for a write that did not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import keras
import tensorflow as tf

from mpscale.scaling.gradients import under_xla

Skip = Literal["auto", "branch", "gate"]

_SCOPE = "mpscale_gate"

_WRITE = re.compile(r"Assign|Resource(?!Gather)|RngSkip|RngReadAndSkip|Stateful(?!PartitionedCall)")
"""Operations that change a resource, by the beginning of their type."""


def check_skip(skip: str) -> None:
    """Raises ValueError where ``skip`` is no way to skip a step."""
    if skip not in get_args(Skip):
        raise ValueError(f"skip must be one of {', '.join(map(repr, get_args(Skip)))}, not {skip!r}")


def apply_gated(update: Callable[[], None], variables: Iterable[Any], finite: tf.Tensor) -> bool:
    """Traces ``update`` into the current graph so that it changes nothing where ``finite`` is False.

    Args:
        update: assigns to variables.
        variables: those it is known to assign to, of Keras or TensorFlow.
        finite: boolean scalar.

    Returns:
        False where a write could not be gated. Nothing has been added to the graph then.
    """
    known = {id(variable): variable for variable in map(_native, variables)}

    def gated() -> None:
        with _gated(known.values(), finite):
            update()

    for _ in range(2):
        # A function of its own, so that a trace that fails the search can be thrown away. XLA inlines it.
        function = tf.function(gated, autograph=False).get_concrete_function()
        if not _ungated_writes(function.graph):
            function()
            return True
        # The trace knows every variable that was touched, also one that the optimizer does not list.
        known.update((id(variable), variable) for variable in function.graph.variables)
    return False


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _ungated_writes(graph: Any) -> list[str]:
    """Names of operations that write past the gate, those in branches and called functions included."""
    return [node.name for node in all_nodes(graph.as_graph_def()) if _WRITE.match(node.op) and _SCOPE not in node.name]


def all_nodes(definition: Any) -> list[Any]:
    """The nodes of a GraphDef, those in branches and called functions included."""
    return [*definition.node, *(node for function in definition.library.function for node in function.node_def)]


@contextlib.contextmanager
def _gated(variables: Iterable[Any], finite: tf.Tensor) -> Iterator[None]:
    """Lets the variables write through the gate: attributes of an object come before those of its class."""
    finite = tf.identity(finite)
    gated = [(variable, _gates(variable, finite)) for variable in variables]
    for variable, methods in gated:
        vars(variable).update(methods)
    try:
        yield
    finally:
        for variable, methods in gated:
            for name in methods:
                del vars(variable)[name]


def _gates(variable: Any, finite: tf.Tensor) -> dict[str, Callable[..., Any]]:
    """The writing methods of ``variable``, gated."""
    kind = type(variable)

    def write(old: Any, new: Any, **options: Any) -> Any:
        # A select, and not a masked difference: only a copy keeps the bits of a subnormal number.
        return kind.assign(variable, tf.where(finite, tf.cast(new, variable.dtype), old), **options)

    def assign(value: Any, **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            return write(variable.read_value(), value, **options)

    def assign_add(delta: Any, **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            old = variable.read_value()
            return write(old, old + tf.cast(delta, variable.dtype), **options)

    def assign_sub(delta: Any, **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            old = variable.read_value()
            return write(old, old - tf.cast(delta, variable.dtype), **options)

    def scatter_update(rows: tf.IndexedSlices, **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            values = tf.where(finite, rows.values, tf.gather(variable.read_value(), rows.indices))
            return kind.scatter_update(variable, tf.IndexedSlices(values, rows.indices), **options)

    # Dense, though the rows are few: adding zeros to them instead would flush subnormal numbers.
    def scatter_add(rows: tf.IndexedSlices, **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            old = variable.read_value()
            return write(old, tf.tensor_scatter_nd_add(old, rows.indices[:, tf.newaxis], rows.values), **options)

    def scatter_sub(rows: tf.IndexedSlices, **options: Any) -> Any:
        with tf.name_scope(_SCOPE):
            old = variable.read_value()
            return write(old, tf.tensor_scatter_nd_sub(old, rows.indices[:, tf.newaxis], rows.values), **options)

    return {
        "assign": assign,
        "assign_add": assign_add,
        "assign_sub": assign_sub,
        "scatter_update": scatter_update,
        "scatter_add": scatter_add,
        "scatter_sub": scatter_sub,
    }


_GATED_FROM = 2**13
"""Elements per variable, on average. Measured were 1,400 and 1,800 (branch as fast or faster) and 310,000 (gate)."""


def gate_pays(variables: Sequence[Any]) -> bool:
    """Whether, under XLA, holding back every write costs less than a branch.

    A branch copies all state in and out and costs by the element; a gate is more work for the compiler and costs by the
    variable (docs/scaling-cost.md). On a GPU a branch also waits for its predicate to reach the host.
    """
    if tf.config.list_logical_devices("GPU"):
        return True
    # A variable whose shape is known only at run time counts as small.
    elements = [tf.TensorShape(variable.shape).num_elements() or 0 for variable in variables]
    return sum(elements) >= _GATED_FROM * len(variables)


# One decision over all replicas of a ``tf.distribute`` strategy, and branches that every replica takes together.


def check_context() -> None:
    """Refuses to go on where replicas cannot decide together.

    Raises:
        ValueError: under a strategy in a cross-replica context, or compiled by XLA on devices that TensorFlow merges
            replicas on outside XLA.
    """
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
    """Refuses variables that every replica would write to in turn, so that one step counts as several.

    Raises:
        ValueError: under a strategy of several replicas, one of ``variables``, of Keras, was made outside its scope.
    """
    strategy = tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync > 1 and not all(
        strategy.extended.variable_created_in_scope(variable.value) for variable in variables
    ):
        raise ValueError(
            "the optimizer, or the one inside it, was made outside strategy.scope(), so every replica would count each "
            "step again; make both under strategy.scope(): LossScaleOptimizer(keras.optimizers.Adam())"
        )


def all_true(flag: Any) -> tf.Tensor:
    """Whether ``flag``, a boolean scalar, is True on every replica."""
    flag = tf.convert_to_tensor(flag)
    if not tf.distribute.has_strategy():
        return flag
    failed = tf.distribute.get_replica_context().all_reduce(
        tf.distribute.ReduceOp.SUM, tf.cast(tf.logical_not(flag), tf.float32)
    )
    return tf.equal(failed, 0.0)


def largest(value: Any) -> tf.Tensor:
    """The largest of the float32 scalars ``value`` of all replicas."""
    if not tf.distribute.has_strategy():
        return value
    # all_reduce knows sums only.
    return tf.reduce_max(tf.distribute.get_replica_context().all_gather(tf.reshape(value, (1,)), axis=0))


def any_set(flags: Any) -> tf.Tensor:
    """1 where ``flags``, a vector of 0 and 1 in int64, is 1 on any replica."""
    if not tf.distribute.has_strategy():
        return flags
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(flags, tf.float32))
    return tf.cast(total > 0, tf.int64)


def switch(index: Any, branches: Sequence[Callable[..., None]], *args: Any) -> None:
    """Runs the branch that ``index``, an int32 scalar, says.

    Under a strategy the branch is taken outside the replicas and then run in each of them: a branch that is taken
    inside one cannot wait for the others. ``index`` has to be the same on all.

    Args:
        index: which branch.
        branches: functions of ``args`` that assign to variables and return nothing.
        args: what the branches need of this replica's tensors; lists and None are allowed.
    """
    if not tf.distribute.has_strategy() or tf.__internal__.distribute.strategy_supports_no_merge_call():
        _switch(index, [_bound(branch, args) for branch in branches])
        return

    def across(strategy: Any, index: Any, *args: Any) -> None:
        def on_each(branch: Callable[..., None]) -> Callable[[], None]:
            return lambda: strategy.extended.call_for_each_replica(branch, args=args)

        _switch(strategy.experimental_local_results(index)[0], [on_each(branch) for branch in branches])

    tf.distribute.get_replica_context().merge_call(across, args=(index, *args))


def _bound(branch: Callable[..., None], args: Sequence[Any]) -> Callable[[], None]:
    return lambda: branch(*args)


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
