"""Counters of what became of each step, kept on the device so that counting costs no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_COUNTERS = ("attempted", "applied", "overflow", "skip_run", "longest_skip_run")


class Ledger:
    """Counts steps in int64 variables.

    Args:
        add_variable: makes one int64 scalar variable from a name; the optimizer passes its own maker, so that the
            counters are saved and restored with it.
    """

    def __init__(self, add_variable: Callable[[str], Any]) -> None:
        self._variables = {name: add_variable(name) for name in _COUNTERS}

    def record(self, finite: Any, applied: Any) -> None:
        """Counts one step.

        Args:
            finite: boolean scalar, whether its gradients were finite (True where nobody looked).
            applied: boolean scalar, whether its update was applied.
        """
        v = self._variables
        one = tf.constant(1, tf.int64)
        run = tf.where(applied, tf.constant(0, tf.int64), v["skip_run"].value + one)
        v["attempted"].assign(v["attempted"].value + one)
        v["applied"].assign(v["applied"].value + tf.cast(applied, tf.int64))
        v["overflow"].assign(v["overflow"].value + tf.cast(tf.logical_not(finite), tf.int64))
        v["skip_run"].assign(run)
        v["longest_skip_run"].assign(tf.maximum(v["longest_skip_run"].value, run))

    def read(self) -> dict[str, int]:
        """The counters as Python integers; waits for the device."""
        values = {name: int(variable.value) for name, variable in self._variables.items()}
        return {
            "attempted": values["attempted"],
            "applied": values["applied"],
            "skipped": values["attempted"] - values["applied"],
            "overflow": values["overflow"],
            "longest_skip_run": values["longest_skip_run"],
        }
