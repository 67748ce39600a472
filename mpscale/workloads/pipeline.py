"""Data that is batched by itself: a tf.data.Dataset or a Keras PyDataset, which need not fit on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NOT_PIPELINES = {
    "ndarray": "for arrays return mpscale.Data(train_x, train_y, test_x, test_y)",
    "tuple": "for arrays return mpscale.Data(train_x, train_y, test_x, test_y)",
    "DataFrame": "for arrays return mpscale.Data(train_x, train_y, test_x, test_y)",
    "DataLoader": "wrap it in tf.data.Dataset.from_generator(...), or in a keras.utils.PyDataset",
    "generator": "wrap it in tf.data.Dataset.from_generator(...)",
    "DistributedDataset": "give the tf.data.Dataset itself: --mp-strategy distributes it",
}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Training and test data as pipelines of batches, for data that is too large for the device or made on the fly.

    A batch is what Keras' fit takes: ``(x, y)`` or ``(x, y, sample_weight)``, or x alone if the model needs no y. The
    pipeline decides how many examples a batch has.

    Args:
        train: a tf.data.Dataset, a keras.utils.PyDataset, or a function without arguments that returns one. It may be
            endless; otherwise it is gone through again and again, as the epochs of fit. A function is called after the
            seed of the case has been set, so an unseeded shuffle in it has the same order in every mode. So is a
            pipeline that the workload's ``data`` function makes.
        test: the same for the test set, on which the metric is computed. A workload without a metric needs none.
        test_steps: how many batches of an endless test set are one; None for all.
        deterministic: False allows a pipeline whose batches are not the same in every pass. Modes are then trained on
            different batches, and the report says so.

    Raises:
        TypeError: a part is neither a pipeline nor a function, or ``deterministic`` is not a bool.
        ValueError: ``test_steps`` is not a positive number, or there is no test set that it could be about.
    """

    train: Any
    test: Any = None
    test_steps: int | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_pipeline(self.train, "train")
        if self.test is not None:
            check_pipeline(self.test, "test")
        steps = self.test_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"test_steps must be a number of batches, at least 1, or None, not {steps!r}")
        if steps is not None and self.test is None:
            raise ValueError("test_steps is about the test set, and there is none; add test, or leave it out")
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"deterministic must be True or False, not {self.deterministic!r}")


def is_dataset(given: Any) -> bool:
    """Whether ``given`` is a tf.data.Dataset. This does not import TensorFlow."""
    return any(
        base.__name__ == "DatasetV2" and base.__module__.startswith("tensorflow.") for base in type(given).__mro__
    )


def is_py_dataset(given: Any) -> bool:
    """Whether ``given`` is a keras.utils.PyDataset. This does not import Keras."""
    return any(base.__name__ == "PyDataset" and base.__module__.startswith("keras.") for base in type(given).__mro__)


def is_pipeline(given: Any) -> bool:
    """Whether ``given`` is data that is batched by itself. This imports neither TensorFlow nor Keras."""
    return is_dataset(given) or is_py_dataset(given)


def check_pipeline(given: Any, part: str, made: bool = False) -> None:
    """Check a part of a :class:`Pipeline`.

    Args:
        given: the part.
        part: ``"train"`` or ``"test"``.
        made: a function has returned it, so it is no function any more.

    Raises:
        TypeError: it is something else.
    """
    if is_pipeline(given) or (callable(given) and not made):
        return
    kind = type(given).__name__
    cure = _NOT_PIPELINES.get(kind, "for arrays return mpscale.Data(train_x, train_y, test_x, test_y)")
    what = f"the function for {part} of a Pipeline must return" if made else f"{part} of a Pipeline must be"
    function = "" if made else ", or a function that returns one"
    raise TypeError(f"{what} a tf.data.Dataset or a keras.utils.PyDataset{function}, not a {kind}; {cure}")
