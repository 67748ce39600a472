"""The callbacks of a training, called as Keras' ``fit`` does it: at the ends of epochs and, if they ask, of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from mpscale.worker import model as models

_WRITES = (
    "would write files in the middle of a measured training; the folder of the run has loss, loss scale and overflow "
    "of each step"
)
_REFUSED = {
    "EarlyStopping": "would end trainings after different numbers of steps, which then could not be compared; say "
    "target=... in the workload for the steps and the time that each mode needs to reach a metric",
    "TerminateOnNaN": "is not needed: mpscale ends a training whose weights are no longer finite, and says so",
    "ModelCheckpoint": "would write files in the middle of a measured training; save the model after one of your own",
    "BackupAndRestore": "would write files in the middle of a measured training; mpscale repeats a case that was lost",
    "TensorBoard": _WRITES,
    "CSVLogger": _WRITES,
    "RemoteMonitor": "would send messages in the middle of a measured training",
    "SwapEMAWeights": "swaps weights around an evaluation of fit; give the optimizer use_ema=True, whose average "
    "becomes the weights at the end",
    "ProgbarLogger": "would print in the middle of a measured training; mpscale shows its progress",
    "LossScaleMonitor": "is not needed: mpscale keeps the loss scale and the overflow of each step",
}
"""Callbacks that do not fit a training that is measured and compared, and why."""

_OF_STEPS = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")


class Course:
    """The callbacks of a training. An epoch is ``epoch_steps`` steps; the last one may be shorter.

    Args:
        callbacks: fresh ones.
        model: compiled.
        steps: of the training.
        epoch_steps: steps of an epoch, at least 2.

    Raises:
        TypeError: one of them is no callback.
        ValueError: one of them does not fit a training that is compared, or an epoch is too short.
    """

    def __init__(self, callbacks: Any, model: keras.Model, steps: int, epoch_steps: int) -> None:
        self._callbacks = _checked(callbacks)
        self._model, self._epoch_steps = model, epoch_steps
        self._epoch, self._step = 0, 0
        if epoch_steps < 2:
            raise ValueError("callbacks run at the end of an epoch, which has one step here; raise evaluate_every")
        epochs = -(-steps // epoch_steps)
        options = {"verbose": 0, "epochs": epochs, "steps": epoch_steps}
        self._list = keras.callbacks.CallbackList(self._callbacks, model=model, **options)
        self.of_steps = any(_is_defined(each, name) for each in self._callbacks for name in _OF_STEPS)
        """Whether a callback is called for each step."""

    def begin(self) -> None:
        """Begin the training, before its first step."""
        self._model.stop_training = False
        self._list.on_train_begin()
        self._begin_epoch()

    def begin_step(self) -> None:
        """Before a step, if a callback wants to know."""
        if self.of_steps:
            self._list.on_train_batch_begin(self._step)

    def end_step(self, loss: Callable[[], float]) -> None:
        """After a step, if a callback wants to know; ``loss`` returns that of the step."""
        if self.of_steps:
            self._list.on_train_batch_end(self._step, {**self._logs(), "loss": loss()})
            self._check_stop()
        self._step += 1

    def end_epoch(self, evaluate: Callable[[], dict[str, Any]] | None, goes_on: bool) -> None:
        """End an epoch, and begin the next one if the training goes on.

        Args:
            evaluate: returns the metrics on the validation data; None if there is none.
            goes_on: whether there are more steps.
        """
        logs = self._logs()
        if evaluate is not None:
            logs |= {f"val_{name}": _number(value) for name, value in evaluate().items()}
        for callback in self._callbacks:
            wanted = getattr(callback, "monitor", None)
            if isinstance(wanted, str) and wanted not in logs:
                raise ValueError(
                    f"the callback {type(callback).__name__} monitors {wanted!r}, which this training does not have; "
                    f"it has {', '.join(logs)}{'' if evaluate else '; val_ needs validation data'}"
                )
        self._list.on_epoch_end(self._epoch, logs)
        self._check_stop()
        self._epoch, self._step = self._epoch + 1, 0
        if goes_on:
            self._begin_epoch()
        else:
            self._list.on_train_end(logs)

    def description(self) -> list[Any]:
        """The callbacks, for a digest: the same in every process and every mode."""
        return [[models.described_object(type(each)), _plain(each)] for each in self._callbacks]

    def _begin_epoch(self) -> None:
        self._model.reset_metrics()
        self._list.on_epoch_begin(self._epoch)

    def _logs(self) -> dict[str, Any]:
        return {name: _number(value) for name, value in self._model.get_metrics_result().items()}

    def _check_stop(self) -> None:
        if self._model.stop_training:
            raise ValueError(
                "a callback set model.stop_training, but trainings of different numbers of steps cannot be compared; "
                "leave that callback out, or say target=... in the workload"
            )


def _checked(callbacks: Any) -> Sequence[keras.callbacks.Callback]:
    given = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for each in given:
        if not isinstance(each, keras.callbacks.Callback):
            raise TypeError(
                f"the workload's callbacks function must return Keras callbacks, not {models.kind_of_object(each)}"
            )
        for kind in type(each).__mro__:
            if kind.__name__ in _REFUSED and kind.__module__.partition(".")[0] in ("keras", "mpscale"):
                raise ValueError(f"the callback {type(each).__name__} {_REFUSED[kind.__name__]}; leave it out")
    return given


def _is_defined(callback: Any, name: str) -> bool:
    """Whether a callback has a method of this name that does something, by its class or as an attribute."""
    return not getattr(getattr(callback, name), "_is_default", False)


def _plain(callback: Any) -> list[Any]:
    """Settings of a callback: numbers, text and the code of functions."""
    return [
        [name, models.described_code(held.__code__) if hasattr(held, "__code__") else held]
        for name, held in sorted(vars(callback).items())
        if name[0] != "_" and (isinstance(held, bool | int | float | str) or hasattr(held, "__code__"))
    ]


def _number(value: Any) -> Any:
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array
