"""Data: what a workload is trained and tested on, checked when it is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_KINDS = "biufUS"
"""NumPy's kinds of dtype that can be trained on: booleans, integers, floats, and text for models that take it."""

_CURES = {
    "DataFrame": "pass frame.to_numpy(dtype='float32')",
    "Series": "pass series.to_numpy()",
    "list": "pass np.asarray(...) of it",
    "tuple": "pass np.asarray(...) of it",
    "dict": "models with several inputs or outputs by name are not supported yet: pass one array",
    "str": "load the file and pass its arrays",
}


@dataclass(frozen=True, slots=True)
class Data:
    """Examples and labels, first axis the example; all of it is put on the device before training starts.

    Args:
        train_x, train_y: what is trained on.
        test_x, test_y: what the final metric is taken on; large, since a thousand examples cannot tell modes apart
            that differ by a percent.
        published_x, published_y: the test set that the data's publication uses, where that is another. Progress
            towards the target is followed on it, else on the test set.

    Raises:
        TypeError: one of them is no NumPy array of numbers, booleans or text.
        ValueError: examples and labels do not fit together.
    """

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    published_x: Array | None = None
    published_y: Array | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test", "published"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            for name, array in ((f"{part}_x", x), (f"{part}_y", y)):
                if array is not None or part != "published":
                    object.__setattr__(self, name, _checked(name, array))
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if (x is None) != (y is None) or (x is not None and (len(x) != len(y) or len(x) == 0)):
                raise ValueError(
                    f"{part}_x and {part}_y need the same number of examples, at least one: "
                    f"{None if x is None else len(x)} and {None if y is None else len(y)} were given"
                )
        for part in ("test", "published"):
            for axis in "xy":
                array, trained = getattr(self, f"{part}_{axis}"), getattr(self, f"train_{axis}")
                if array is not None and array.ndim != trained.ndim:
                    raise ValueError(
                        f"{part}_{axis} has shape {array.shape} and train_{axis} {trained.shape}; "
                        "one example must have as many axes in both"
                    )

    @property
    def progress(self) -> tuple[Array, Array]:
        """The examples on which progress towards the target is followed."""
        if self.published_x is None or self.published_y is None:
            return self.test_x, self.test_y
        return self.published_x, self.published_y

    def digest(self) -> str:
        """SHA-256 over shapes, dtypes and contents of all arrays, as 16 hex digits."""
        digest = hashlib.sha256()
        for name in self.__slots__:
            array = getattr(self, name)
            if array is not None:
                digest.update(f"{name}{array.shape}{array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def _checked(name: str, array: Any) -> Array:
    """``array`` if a training can use it; text in an object array, as pandas gives it, becomes an array of text.

    Bytes of an object array are pointers, which differ from process to process.
    """
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        if any(base.__module__.startswith("tensorflow") and "Dataset" in base.__name__ for base in type(array).__mro__):
            cure = "read the data set into arrays, such as with np.stack(list(dataset.as_numpy_iterator()))"
        else:
            cure = _CURES.get(kind, "pass np.asarray(...) of it")
        raise TypeError(f"{name} must be a NumPy array, not a {kind}; {cure}")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill or drop what is masked")
    if array.ndim == 0:
        raise TypeError(f"{name} is a single value; its first axis must be the example")
    if array.dtype.kind == "O":
        return _text(name, array)
    if array.dtype.kind not in _KINDS:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which cannot be trained on; pass numbers, booleans or text, "
            f"for instance {name}.astype('float32')"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which TensorFlow does not know; pass {name}.astype('float32')"
        )
    # As a plain array: a matrix stays one of two axes whatever is taken out of it.
    return np.asarray(array)


def _text(name: str, array: Array) -> Array:
    kinds = {type(value) for value in array.flat}
    if kinds in ({str}, {bytes}):
        return array.astype(str if kinds == {str} else bytes)
    found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
    raise TypeError(
        f"{name} is an array of Python objects ({found}); pass numbers, such as {name}.astype('float32'), or text alone"
    )
