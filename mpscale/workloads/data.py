"""The data of a workload: arrays, or nested dictionaries, tuples and lists of arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

Structure = Any
"""An array, or a dictionary, tuple or list of structures. The first axis of each array is the example."""

_KINDS = "biufUS"
"""NumPy's kinds of dtype that can be trained on: booleans, integers, floats, and text for models that accept it."""

_CURES = {
    "DataFrame": "pass frame.to_numpy(dtype='float32')",
    "Series": "pass series.to_numpy()",
    "str": "load the file and pass its arrays",
    "RaggedTensor": "pad it to one length with to_tensor(), or sort the examples into buckets of one length each",
    "SparseTensor": "pass tf.sparse.to_dense(...) of it",
}
_PARTS = ("train", "test", "published")


def leaves(structure: Structure, path: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of a structure with their places in it, such as ``['image'][0]``; the keys of dictionaries sorted."""
    if isinstance(structure, dict):
        for key in sorted(structure, key=str):
            yield from leaves(structure[key], f"{path}[{key!r}]")
    elif isinstance(structure, tuple | list):
        for number, each in enumerate(structure):
            yield from leaves(each, f"{path}[{number}]")
    else:
        yield path, structure


def mapped(function: Callable[[str, Any], Any], structure: Structure, path: str = "") -> Structure:
    """The structure of what ``function`` returns for the place of each array and the array."""
    if isinstance(structure, dict):
        return type(structure)((key, mapped(function, each, f"{path}[{key!r}]")) for key, each in structure.items())
    if isinstance(structure, tuple | list):
        return _joined(structure, [mapped(function, each, f"{path}[{place}]") for place, each in enumerate(structure)])
    return function(path, structure)


def taken(structure: Structure, examples: Any) -> Structure:
    """The structure with only some of its examples: indices, or a slice."""
    return mapped(lambda _, array: array[examples], structure)


def length(structure: Structure) -> int:
    """How many examples a structure has."""
    return len(next(array for _, array in leaves(structure)))


@dataclass(frozen=True, slots=True)
class Data:
    """Examples and labels. The first axis is the example. All of it is put on the device before the training.

    Each part is an array, or a nested dictionary, tuple or list of arrays, as the model takes and returns them.

    Args:
        train_x, train_y: the training set. A model that computes its loss by itself needs no ``train_y``.
        test_x, test_y: the test set, on which the final metric is computed. It should be large: a thousand examples
            cannot distinguish modes that differ by one percent. A workload without a metric needs none.
        published_x, published_y: the test set of the data's publication, if that is another. Progress towards the
            target is then measured on it instead of the test set.
        train_weight, test_weight: how much each example counts, as ``sample_weight`` of Keras' ``fit``; for
            :meth:`Workload.from_compiled`.

    Raises:
        TypeError: one of them is not a NumPy array of numbers, booleans or text, or a structure of such arrays.
        ValueError: examples, labels and weights do not fit together.
    """

    train_x: Structure
    train_y: Structure = None
    test_x: Structure = None
    test_y: Structure = None
    published_x: Structure = None
    published_y: Structure = None
    train_weight: Structure = None
    test_weight: Structure = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            part = getattr(self, name)
            if part is not None or name == "train_x":
                object.__setattr__(self, name, _checked(name, part))
        for part in _PARTS:
            self._check_lengths(part)
            self._check_alike(part)

    def _check_lengths(self, part: str) -> None:
        """Check that all arrays of a part have the same number of examples."""
        names = [f"{part}_{kind}" for kind in ("x", "y", "weight") if hasattr(self, f"{part}_{kind}")]
        given = {name: getattr(self, name) for name in names}
        if all(each is None for each in given.values()):
            return
        lengths = {
            f"{name}{path}": len(array)
            for name, each in given.items()
            if each is not None
            for path, array in leaves(each)
        }
        if given[names[0]] is None:
            lengths = {names[0]: 0, **lengths}
        # Only a model that computes its loss from the examples alone needs no labels; then the training set has none.
        if self.train_y is not None and given[names[1]] is None:
            lengths[names[1]] = 0
        if len(set(lengths.values())) == 1 and all(lengths.values()):
            return
        (first, one), (second, other) = _two_that_differ(lengths)
        raise ValueError(
            f"{first} has {one or 'no'} examples and {second} has {other or 'no'}; both need the same number, at least "
            "one"
        )

    def _check_alike(self, part: str) -> None:
        """Check that the arrays of a part are those of the training set, with as many axes."""
        for kind in ("x", "y"):
            given, trained = getattr(self, f"{part}_{kind}"), getattr(self, f"train_{kind}")
            if given is None:
                continue
            places, known = dict(leaves(given)), dict(leaves(trained)) if trained is not None else {}
            if places.keys() != known.keys():
                raise ValueError(
                    f"{part}_{kind} has {_places(places)}, but train_{kind} has {_places(known)}; both need the same "
                    "structure"
                )
            for path, array in places.items():
                if array.ndim != known[path].ndim:
                    raise ValueError(
                        f"{part}_{kind}{path} has shape {array.shape} but train_{kind}{path} has {known[path].shape}; "
                        "an example needs as many axes in both"
                    )

    @property
    def examples(self) -> int:
        """Examples of the training set."""
        return length(self.train_x)

    @property
    def train(self) -> tuple[Structure, Structure, Structure]:
        """Examples, labels and weights of the training set; None for what it does not have."""
        return self.train_x, self.train_y, self.train_weight

    @property
    def more_than_plain(self) -> list[str]:
        """What it has besides one array of examples and one of labels, in words: structures, and weights."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return [
            f"{name} is a {type(part).__name__} of {_places(dict(leaves(part)))}"
            if isinstance(part, dict | tuple | list)
            else f"there is a {name}"
            for name, part in given.items()
            if isinstance(part, dict | tuple | list) or (part is not None and name.endswith("_weight"))
        ]

    @property
    def test(self) -> tuple[Any, Any]:
        """The test set.

        Raises:
            ValueError: there is none.
        """
        if self.test_x is None or (self.test_y is None and self.train_y is not None):
            raise ValueError(
                "the data has no test set, on which the workload's metric would be computed; add test_x and test_y, or "
                "set metric=None"
            )
        return self.test_x, self.test_y

    @property
    def progress(self) -> tuple[Any, Any]:
        """The examples on which progress towards the target is measured.

        Raises:
            ValueError: there are none.
        """
        if self.published_x is None or self.published_y is None:
            return self.test
        return self.published_x, self.published_y

    def digest(self) -> str:
        """SHA-256 of shapes, dtypes and contents of all arrays, first 16 hex digits."""
        digest = hashlib.sha256()
        for name in self.__slots__:
            part = getattr(self, name)
            for path, array in [] if part is None else leaves(part):
                digest.update(f"{name}{path}{array.shape}{array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def _two_that_differ(lengths: dict[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    """The first array and the first that has another number of examples; without one, the first two or one twice."""
    first, *others = lengths.items()
    return first, next((each for each in others if each[1] != first[1]), others[0] if others else first)


def _places(places: dict[str, Any]) -> str:
    if list(places) == [""]:
        return "one array"
    return ", ".join(places) if places else "nothing"


def _checked(name: str, part: Any) -> Structure:
    """Return a structure of arrays that can be trained on."""
    if not isinstance(part, dict | tuple | list):
        return _checked_array(name, part)
    kind = type(part).__name__
    if not part:
        raise TypeError(f"{name} is an empty {kind}; leave it out, or put arrays into it")
    if isinstance(part, dict):
        return type(part)((key, _checked(f"{name}[{key!r}]", each)) for key, each in part.items())
    if any(isinstance(each, bool | int | float | str) for _, each in leaves(part)):
        raise TypeError(f"{name} must be a NumPy array, not a {kind}; pass np.asarray(...) of it")
    return _joined(part, [_checked(f"{name}[{number}]", each) for number, each in enumerate(part)])


def _joined(like: Any, parts: list[Any]) -> Any:
    """A tuple or list like another; a named tuple takes its fields one by one."""
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def _checked_array(name: str, array: Any) -> Array:
    """Return ``array`` if it can be trained on; turn an object array of text, as pandas returns it, into one of text.

    The bytes of an object array are pointers, which differ between processes.
    """
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        if any(base.__module__.startswith("tensorflow") and "Dataset" in base.__name__ for base in type(array).__mro__):
            cure = "read the data set into arrays, for example with np.stack(list(dataset.as_numpy_iterator()))"
        else:
            cure = _CURES.get(kind, "pass np.asarray(...) of it")
        raise TypeError(f"{name} must be a NumPy array, not a {kind}; {cure}")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill or drop the masked values")
    if array.ndim == 0:
        raise TypeError(f"{name} is a single value; its first axis must be the example")
    if array.dtype.kind == "O":
        kinds = {type(value) for value in array.flat}
        if kinds in ({str}, {bytes}):
            return array.astype(kinds.pop())
        if kinds and kinds <= {list, tuple, np.ndarray}:
            raise TypeError(
                f"{name} has examples of different length; pad them, for example with keras.utils.pad_sequences, and "
                "let the model mask the padding"
            )
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise TypeError(
            f"{name} is an array of Python objects ({found}); pass only numbers, for example {name}.astype('float32'), "
            "or only text"
        )
    if array.dtype.kind not in _KINDS:
        raise TypeError(
            f"{name} has dtype {array.dtype}; pass numbers, booleans or text, for example {name}.astype('float32')"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which TensorFlow does not support; pass {name}.astype('float32')"
        )
    # As a plain array: slices of a np.matrix would keep two axes.
    return np.asarray(array)
