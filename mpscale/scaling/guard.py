"""Whether a loop scales its loss and unscales its gradients once: the wrong is refused, the doubtful is said."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from mpscale.scaling import provenance


class UnscaledLossWarning(UserWarning):
    """Gradients are divided by the loss scale although no loss was multiplied by it, or the reverse."""


class Unscaling:
    """One call of ``unscale``.

    Args:
        flags: which of its gradients were not finite, int64 (gradients,); None where that is not to be counted later.
    """

    def __init__(self, flags: tf.Tensor | None) -> None:
        self.flags = flags


class ScalingGuard:
    """Follows the gradients of one optimizer by where they come from, not by when they come."""

    def __init__(self) -> None:
        self._scales_losses = self._reads_scale = self._unscales = self._has_warned = False
        self._under_way: set[Unscaling] = set()
        self._scaled = object()  # the source of gradients that unscale was given
        self._watch = provenance.Watch()

    def scaling(self) -> None:
        """Notes that the loss of a further step is scaled."""
        self._scales_losses = True
        self.over()

    def reading(self) -> None:
        """Notes that the scale was read, perhaps to scale or unscale by hand."""
        self._reads_scale = True

    def over(self) -> None:
        """Notes that the steps whose gradients were unscaled so far are over, applied or left out."""
        self._under_way.clear()
        self._watch.stop()

    def unscaled(self, scaled: Sequence[Any], true: Sequence[Any], unscaling: Unscaling) -> None:
        """Notes that ``true`` came of ``scaled``."""
        self._unscales = True
        for before, after in zip(scaled, true, strict=True):
            if after is not None:
                before._mpscale_role, after._mpscale_role = "scaled", "unscaled"
        provenance.mark(scaled, self._scaled)
        provenance.mark(true, unscaling, alone=True)
        self._under_way.add(unscaling)
        # Operations of several replicas run in threads of their own.
        if tf.executing_eagerly() and not tf.distribute.has_strategy():
            self._watch.start()

    def check_scaled(self, grads: Sequence[Any]) -> None:
        """Checks gradients that are about to be divided by the loss scale.

        Raises:
            ValueError: one of them is what ``unscale`` returned, or in this step was computed from that.
        """
        remedy = "pass them to apply(grads, variables, finite=finite) with the finite that unscale returned"
        if "unscaled" in map(_role, grads):
            raise ValueError(
                f"these gradients are unscaled already, and would be divided by the loss scale twice; {remedy}"
            )
        # Scaled gradients times a factor that was found with the help of true ones are scaled.
        if self._under_way and any(
            self._under_way & found and self._scaled not in found for found in provenance.origins(grads)
        ):
            raise ValueError(
                "unscale was called in this step, but apply got other gradients and no finite: these were computed "
                f"from what unscale returned, and would be divided by the loss scale twice; {remedy}"
            )
        if not (self._scales_losses or self._reads_scale):
            self._warn(
                "gradients are divided by the loss scale, but no loss has been multiplied by it: every update is too "
                "small by that factor. Differentiate optimizer.scale_loss(loss)"
            )

    def check_unscaled(self, grads: Sequence[Any]) -> None:
        """Checks gradients that came with a ``finite``, so that nothing will divide them.

        Raises:
            ValueError: one of them is what ``unscale`` was given.
        """
        if "scaled" in map(_role, grads):
            raise ValueError(
                "these are the scaled gradients that unscale was given; pass those that it returned, "
                "or leave finite out, so that apply unscales by itself"
            )
        if self._scales_losses and not (self._unscales or self._reads_scale):
            self._warn(
                "apply was given finite, which says that the gradients are unscaled, but unscale was never called: "
                "every update is too large by the loss scale. Use grads, finite = optimizer.unscale(grads)"
            )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, UnscaledLossWarning, stacklevel=6)


def _role(grad: Any) -> str | None:
    return getattr(grad, "_mpscale_role", None)
