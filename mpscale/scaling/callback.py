"""The loss scale in Keras' ``fit``: in its logs, and with its alarm checked."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from mpscale.scaling.ledger import FloorOverflowError, FloorOverflowWarning
from mpscale.scaling.optimizer import LossScaleOptimizer


class LossScaleMonitor(keras.callbacks.Callback):
    """Adds the loss scale to the logs of ``fit`` and checks the optimizer's alarm.

    At the end of every epoch, ``loss_scale`` and ``overflow_steps`` (those of the epoch) are added to the logs, for
    History and the callbacks after this one. Overflow at the floor of the scale warns; with
    ``LossScaleOptimizer(..., alarm="stop")`` it ends the training.

    Args:
        every: steps between two checks of the alarm. Each check waits for the device.

    Raises:
        ValueError: ``every`` is below 1.
        TypeError: when training begins, if the model's optimizer is no ``mpscale.LossScaleOptimizer``.
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, not {every!r}")
        self._every = every
        self._steps = 0
        self._overflow = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check that there is a loss scale to watch."""
        if not isinstance(self.model.optimizer, LossScaleOptimizer):
            raise TypeError(
                f"LossScaleMonitor watches an mpscale.LossScaleOptimizer, but the model was compiled with "
                f"{type(self.model.optimizer).__name__}; wrap the optimizer, or leave the callback out"
            )
        self._overflow = self.model.optimizer.counters()["overflow"]

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Check the alarm if ``every`` steps have passed."""
        self._steps += 1
        if self._steps % self._every == 0:
            self._check_alarm()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Check the alarm and add to the logs."""
        self._check_alarm()
        optimizer = self.model.optimizer
        overflow = optimizer.counters()["overflow"]
        if logs is not None:
            logs["loss_scale"] = float(optimizer.loss_scale_value)
            logs["overflow_steps"] = overflow - self._overflow
        self._overflow = overflow

    def _check_alarm(self) -> None:
        try:
            self.model.optimizer.check_alarm()
        except FloorOverflowError as error:
            # Not raised, so that what was trained so far and fit's History are kept.
            self.model.stop_training = True
            warnings.warn(f"training stops: {error}", FloorOverflowWarning, stacklevel=2)
