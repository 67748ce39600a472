"""Variables whose "gradient" is their new value: Keras marks them ``overwrite_with_gradient``.

Float8 layers keep their scales and the largest values that they met (``amax_history``) in such variables, and their
backward pass returns what those are to be next. Keras assigns it as it is: no learning rate, no clipping, no decay. So
it is not divided by the loss scale either, and says nothing about whether the gradients are finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from mpscale.scaling.ledger import path_of


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
