"""One decision over all replicas of a ``tf.distribute`` strategy, and branches that every replica takes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from mpscale.scaling.finite import under_xla


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
