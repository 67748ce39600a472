"""Whose gradients were not finite: by the variables that they were given with, whichever those are and in any order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from mpscale.scaling import provenance
from mpscale.scaling.guard import Unscaling
from mpscale.scaling.ledger import Ledger, path_of


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
