"""Workloads with real work added to every step: ``trust_workloads:mnist1d_mlp_x120`` does 120 more small products."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpscale.workloads import Workload, registry

SIZE = 32


def __getattr__(name: str) -> Workload:
    workload, _, extra = name.rpartition("_x")
    if not extra.isdigit():
        raise AttributeError(name)
    base = registry.get(workload.replace("_", "-"))
    return dataclasses.replace(base, loss=_with_more(base.loss, int(extra)))


def _with_more(loss: Any, products: int) -> Any:
    """Return a loss that also multiplies a matrix by itself, in a way that no compiler can remove."""

    def slower(labels: Any, outputs: Any) -> Any:
        import tensorflow as tf

        value = loss(labels, outputs)
        # It depends on the loss, so it cannot be folded into a constant.
        matrix = tf.eye(SIZE) + 1e-3 * tf.stop_gradient(value)

        def multiply(count: Any, matrix: Any) -> Any:
            return count + 1, tf.tanh(tf.matmul(matrix, matrix))

        _, matrix = tf.while_loop(lambda count, _: count < products, multiply, (0, matrix))
        return value + 1e-30 * tf.stop_gradient(tf.reduce_sum(matrix))

    return slower
