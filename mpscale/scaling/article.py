"""The rule of the article that mpscale began with, its feedback restored, kept to show by measurement what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class ArticleLossScale:
    """Compares the scaled loss with the scale.

    With loss L and scale S, starting at 1::

        L * S > S:      S = S * 0.9
        L * S < S / 2:  S = S * 1.1

    Since both sides carry S, this compares the loss with 1 and with 0.5: once the loss is below 0.5, S grows by a
    tenth with every step and without bound. Gradients are neither divided by S nor checked, so S multiplies the
    update of an optimizer that is not invariant to it, and overflow reaches the weights.

    It is no :class:`~mpscale.scaling.LossScale`: that contract is about gradients, which this rule never looks at.
    """

    initial: float = 1.0

    def initial_state(self) -> dict[str, float | int]:
        """The state before the first step."""
        return {"scale": float(self.initial)}

    def next_state(self, state: dict[str, Any], scaled_loss: Any) -> dict[str, Any]:
        """The state after a step whose scaled loss, a float32 scalar, was ``scaled_loss``."""
        scale = tf.convert_to_tensor(state["scale"], tf.float32)
        lower = tf.where(scaled_loss < scale / 2, scale * 1.1, scale)
        return {"scale": tf.where(scaled_loss > scale, scale * 0.9, lower)}
