"""Sends what a script or a notebook compares to the processes of the cases.

What another process can import is sent by name. Functions of the script itself, lambdas and closures are sent by value
(cloudpickle), so nothing runs the script again. Large arrays are written once, and all processes map them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import numpy as np

from mpscale.workloads import Workload, sent

_LARGE = 1 << 20
"""Bytes of an array that gets a file of its own."""
_DEEPEST, _MOST_PARTS = 12, 2000
"""How far to look for what cannot be sent."""


class CannotSend(TypeError):
    """Something cannot be sent to another process; the message names it and says what to do."""


class _Refused(Exception):
    """Pickling met something that must not, or cannot, be sent: what it is, and what to do."""


def send(workload: Workload, path: Path, parts: Mapping[str, Any]) -> None:
    """Write a workload to a file, and what is large to files beside it.

    Args:
        workload: what to send.
        path: of the file.
        parts: what the user gave, by the name of the argument, for the message of an error.

    Raises:
        CannotSend: something that it uses exists only in this process.
        OSError: a file cannot be written.
    """
    with path.open("wb") as file:
        try:
            _Pickler(file, path).dump(workload)
        except OSError:
            raise
        except Exception as error:
            _explain(parts, error)


def send_outline(workload: Workload, path: Path) -> None:
    """Write a workload without what is not mpscale's: its functions, and objects of other libraries.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        _Outliner(file).dump(workload)


class _Outliner(pickle.Pickler):
    """Pickles plain values and what is mpscale's, and a stand-in for anything else."""

    def reducer_override(self, value: Any) -> Any:
        """Called for all but numbers, texts and their containers."""
        named = value if isinstance(value, type | types.FunctionType) else type(value)
        if named.__module__.startswith("mpscale.") and "<locals>" not in named.__qualname__:
            return NotImplemented
        return sent.stand_in, ()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles what this process has.

    Args:
        file: takes the pickle.
        beside: files for what is large have names that begin with this one's; None to write none, to try things out.
    """

    def __init__(self, file: io.BufferedIOBase | Any, beside: Path | None = None) -> None:
        super().__init__(file, protocol=5)
        self._beside, self._files = beside, 0
        self._by_value: set[types.ModuleType] = set()

    def dump(self, value: Any) -> None:
        """Write a value."""
        try:
            super().dump(value)
        finally:
            for module in self._by_value:
                cloudpickle.unregister_pickle_by_value(module)

    def reducer_override(self, value: Any) -> Any:
        """How to send a value that is not left to its own way."""
        if isinstance(value, types.FunctionType | type):
            self._by_value_if_hidden(value)
        elif isinstance(value, np.ndarray):
            if (reduced := self._array(value)) is not None:
                return reduced
        elif _is_a(value, "tensorflow", "data.Dataset"):
            return self._dataset(value)
        else:
            _refuse(value)
        return super().reducer_override(value)

    def _by_value_if_hidden(self, value: Any) -> None:
        """Send a function or class by value if its module exists in this process only, as one that was made by hand."""
        module = sys.modules.get(getattr(value, "__module__", None) or "")
        if module is None or module.__name__ == "__main__" or module in self._by_value:
            return
        if not _can_be_found(module.__name__.partition(".")[0]):
            cloudpickle.register_pickle_by_value(module)
            self._by_value.add(module)

    def _array(self, value: np.ndarray[Any, Any]) -> Any:
        base: Any = value.base
        if isinstance(value, np.memmap) and isinstance(base, mmap.mmap) and value.filename is not None:
            order = "C" if value.flags.c_contiguous else "F"
            return sent.mapped, (str(Path(value.filename).absolute()), value.dtype, value.offset, value.shape, order)
        plain = type(value) in (np.ndarray, np.memmap) and not value.dtype.hasobject
        if not plain or value.nbytes < _LARGE:
            return None
        path = self._new_file("npy")
        if path is not None:
            np.save(path, value, allow_pickle=False)
        return sent.array, (str(path),)

    def _dataset(self, dataset: Any) -> Any:
        try:
            graph = sent.graph_of(dataset)
        except Exception as error:
            raise _Refused(
                f"a tf.data pipeline that works only in this process ({error})",
                "pass a function that returns it, which each process calls once its seed is set",
            ) from error
        path = self._new_file("graph")
        if path is not None:
            path.write_bytes(graph)
        return sent.dataset, (str(path), dataset.element_spec)

    def _new_file(self, kind: str) -> Path | None:
        self._files += 1
        return None if self._beside is None else self._beside.with_suffix(f".{self._files}.{kind}")


@functools.cache
def _can_be_found(top: str) -> bool:
    """Whether another process can find a module, which need not be true if this one has it."""
    for finder in sys.meta_path:
        with contextlib.suppress(Exception):
            if finder.find_spec(top, None) is not None:
                return True
    return False


def _is_a(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class of a library that this process has imported; it is not imported for that."""
    if module not in sys.modules:
        return False
    kind: Any = sys.modules[module]
    for part in name.split("."):
        kind = getattr(kind, part, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _refuse(value: Any) -> None:
    """Refuse what could be pickled, but would not be in the other process what it is here."""
    if _is_a(value, "keras", "Model"):
        raise _Refused(
            "a Keras model, whose layers keep the precision that they were made with",
            "make it in the function that builds the model",
        )
    # One that was adapted, such as a Normalization, is data; a mode's precision is nothing to it.
    if _is_a(value, "keras", "layers.Layer") and (value.trainable_weights or not value.built):
        raise _Refused(
            "a Keras layer, which keeps the precision that it was made with",
            "make it in the function that builds the model",
        )
    if isinstance(value, io.IOBase) and not isinstance(value, io.BytesIO | io.StringIO):
        raise _Refused("an open file", "open it in the function")


def _explain(parts: Mapping[str, Any], error: Exception) -> NoReturn:
    """Raise an error that names what cannot be sent."""
    for name, value in parts.items():
        if (found := _culprit(value)) is not None:
            path, why = found
            within = "".join(part if part.startswith("[") else f".{part}" for part in path)
            if within.startswith("."):
                name = f"{name} uses {within[1:]}, which"
            else:
                name += within
            raise CannotSend(f"{name} cannot be sent to the processes of the cases: it is {why}") from error
    raise CannotSend(f"the workload cannot be sent to the processes of the cases: {error}") from error


def _culprit(value: Any, depth: int = 0) -> tuple[list[str], str] | None:
    """The path to what cannot be sent within a value, and what it is and what to do; None if all of it can."""
    error = _try(value)
    if error is None:
        return None
    if not isinstance(error, _Refused) or not _is_refused_itself(value):
        for name, part in _parts(value) if depth < _DEEPEST else ():
            if (found := _culprit(part, depth + 1)) is not None:
                path, why = found
                return [*([name] if name else []), *path], why
    if isinstance(error, _Refused):
        what, cure = error.args
        return [], f"{what}; {cure}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    said = str(error).partition("\n")[0]
    return [], f"of type {kind} ({said}); make it in the function, or in a module, which each process imports"


def _is_refused_itself(value: Any) -> bool:
    try:
        _refuse(value)
    except _Refused:
        return True
    return _is_a(value, "tensorflow", "data.Dataset")


def _try(value: Any) -> Exception | None:
    try:
        _Pickler(_Nowhere()).dump(value)
    except Exception as error:
        return error
    return None


class _Nowhere:
    """A file that forgets what is written."""

    def write(self, data: Any) -> int:
        return len(data)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value consists of, each with a name if it has one."""
    if isinstance(value, types.MethodType):
        yield "", value.__func__
        yield "self", value.__self__
    elif isinstance(value, functools.partial):
        yield from (("", each) for each in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a name that has no value yet
                yield name, cell.cell_contents
        names = dict.fromkeys(name for code in _codes(value.__code__) for name in code.co_names)
        yield from ((name, value.__globals__[name]) for name in names if name in value.__globals__)
        yield from (("", each) for each in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()))
    elif isinstance(value, Mapping):
        yield from ((f"[{name!r}]", each) for name, each in list(value.items())[:_MOST_PARTS])
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{place}]", each) for place, each in enumerate(list(value)[:_MOST_PARTS]))
    elif isinstance(value, type):
        if value.__module__ == "__main__":
            yield from ((name, each) for name, each in vars(value).items() if not name.startswith("__"))
    elif not isinstance(value, types.ModuleType):
        yield from ((name, each) for name, each in getattr(value, "__dict__", {}).items())


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
