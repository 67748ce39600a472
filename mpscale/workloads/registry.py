"""Finds workloads by name: those of mpscale, those of installed packages, and any by ``module:attribute``.

Finding one imports code of other people, which may fail in any way: only what was asked for may fail with it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.machinery
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mpscale.workloads import builtin as article
from mpscale.workloads import builtin as mnist1d
from mpscale.workloads.workload import Workload

ENTRY_POINT_GROUP = "mpscale.workloads"

_SHIPPED = {w.name: w for w in (mnist1d.MLP, mnist1d.CNN, mnist1d.GRU, article.ARTICLE)}


class UnknownWorkload(ValueError):
    """A name that is no workload."""


@dataclass
class Offered:
    """What can be named without a module.

    Args:
        workloads: by name, mpscale's own first.
        broken: why an entry point cannot be used, by its name. A name that several packages offer is nobody's, and
            is here, too.
    """

    workloads: dict[str, Workload] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def available() -> dict[str, Workload]:
    """Every workload that has a name, mpscale's own first; those that are broken are left out."""
    return offered().workloads


def offered() -> Offered:
    """The workloads of mpscale, and those that installed packages offer by entry point, whole and broken."""
    found = Offered(dict(_SHIPPED))
    origins: dict[str, str] = {}
    try:
        entries = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value))
    except Exception as error:  # one package whose list of entry points cannot be read
        found.broken["entry points"] = f"those of the installed packages cannot be read: {_said(error)}"
        return found
    for entry in entries:
        origin = f"the entry point {entry.value!r}{_package(entry)}"
        try:
            candidate = _workload(_guarded(entry.load, origin), origin)
        except UnknownWorkload as error:
            found.broken[entry.name] = str(error)
            continue
        name = candidate.name
        if name in _SHIPPED:
            found.broken[entry.name] = f"{origin} offers {name!r}, which is the name of a workload of mpscale's own"
        elif name in origins and found.workloads.get(name) is not candidate:
            # Whose would it be? What comes first is a matter of chance, and the other would be trained unnoticed.
            found.workloads.pop(name, None)
            found.broken[name] = (
                f"both {origins[name]} and {origin} offer {name!r}; name the one that you mean by its module, such as "
                f"{entry.value}"
            )
        else:
            origins[name] = origin
            found.workloads[name] = candidate
    return found


def get(name: str, folders: Iterable[str | Path] = ()) -> Workload:
    """The workload called ``name``, or the one at ``module:attribute``.

    Args:
        name: as the user gave it.
        folders: where a module is looked for that is not on Python's path, the first one first. They stay on the
            path, behind everything else, since a module may import what lies beside it later.

    Raises:
        UnknownWorkload: there is none, or it cannot be had; the message says why, and what there is.
    """
    if is_own(name):
        return _own(name, [str(folder) for folder in folders])
    if name in _SHIPPED:
        return _SHIPPED[name]
    found = offered()
    if name in found.workloads:
        return found.workloads[name]
    if name in found.broken:
        raise UnknownWorkload(f"the workload {name!r} cannot be had: {found.broken[name]}")
    close = difflib.get_close_matches(name, [*found.workloads, *found.broken], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    broken = f"; broken: {', '.join(found.broken)}" if found.broken else ""
    raise UnknownWorkload(
        f"no workload is called {name!r}{hint}; the workloads are {', '.join(found.workloads)}, "
        f"and module:attribute names one of your own{broken}"
    )


@contextlib.contextmanager
def without_gpus() -> Iterator[None]:
    """Hides all GPUs from TensorFlow while workloads are looked for in a process that will not train them.

    A module that makes a metric or an optimizer when it is imported has TensorFlow take the GPU, and nearly all of its
    memory with it, for as long as the process lives. One that makes none leaves TensorFlow free to see the GPU later.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def is_own(name: str) -> bool:
    """Whether ``name`` has the form ``module:attribute``."""
    return ":" in name


def source(name: str, folders: Iterable[str | Path] = ()) -> str:
    """The file in which :func:`get` has found a ``module:attribute``, and which other one that hides, if any."""
    module = sys.modules[name.partition(":")[0]]
    return f"{_file(module)}{_hidden(module, [str(folder) for folder in folders])}"


def _own(name: str, folders: Sequence[str]) -> Workload:
    module_name, _, attribute = name.partition(":")
    nothing = f"no workload at {name!r}"
    parts = (*module_name.split("."), *attribute.split("."))
    if not all(part.isidentifier() for part in parts) or module_name.endswith(".py"):
        path = Path(module_name)
        meant = f"{path.stem}:{attribute}" if path.suffix == ".py" else "my_workloads:signs"
        raise UnknownWorkload(f"{nothing}: write module:attribute with the module's name, such as {meant}")
    sys.path += [folder for folder in folders if folder not in sys.path]
    # Files that came to be after Python last looked.
    importlib.invalidate_caches()
    try:
        module = _guarded(lambda: importlib.import_module(module_name), nothing)
    except UnknownWorkload as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            raise UnknownWorkload(f"{error}; it was looked for {_places(folders)}{_hidden(cause, folders)}") from cause
        raise
    where = f"the module {module_name} in {_file(module)}"
    try:
        candidate = _guarded(lambda: operator.attrgetter(attribute)(module), nothing)
    except UnknownWorkload as error:
        if not isinstance(error.__cause__, AttributeError):
            raise
        there = [each for each, value in vars(module).items() if isinstance(value, Workload)]
        has = f"its workloads are {', '.join(there)}" if there else "it has no workload at all"
        raise UnknownWorkload(
            f"{nothing}: {where} has no attribute {attribute!r}; {has}{_hidden(module, folders)}"
        ) from error.__cause__
    return _workload(candidate, f"{name!r}", f", in {_file(module)}{_hidden(module, folders)}")


def _guarded(run: Callable[[], Any], what: str) -> Any:
    """What ``run``, which is other people's code, returns.

    Raises:
        UnknownWorkload: it ended in an exception, other than the user's interrupt, which is passed on. That exception
            is its cause: sys.exit, argparse and pytest.skip raise some that are no ``Exception``.
    """
    try:
        return run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UnknownWorkload(f"{what}: {_said(error)}") from error


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return (
            f"its import called sys.exit({error.code!r}), as argparse does; put what only a program does under "
            'if __name__ == "__main__":'
        )
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception as another:
        text = f"its message cannot be read: {type(another).__name__}"
    return f"{kind}: {text}" if text else kind


def _places(folders: Sequence[str]) -> str:
    return "on Python's path" + "".join(f", then in {folder}" for folder in folders)


def _hidden(found: ModuleType | ModuleNotFoundError, folders: Sequence[str]) -> str:
    """Names a file in ``folders`` that would have been meant, had Python not found another module of its name."""
    name = str(found.name if isinstance(found, ModuleNotFoundError) else found.__name__)
    top = name.partition(".")[0]
    taken = sys.modules.get(top)
    if taken is None:
        return ""
    for folder in folders:
        spec = importlib.machinery.PathFinder.find_spec(top, [folder])
        if spec is not None and spec.origin is not None and spec.origin != vars(taken).get("__file__"):
            return f". {spec.origin} is hidden by {_file(taken)}: give it another name"
    return ""


def _file(module: ModuleType) -> str:
    # Past a __getattr__ of the module's, which may answer anything.
    places = list(vars(module).get("__path__", ()))
    return str(vars(module).get("__file__") or ", ".join(places) or "Python itself")


def _package(entry: EntryPoint) -> str:
    name = getattr(entry.dist, "name", None)
    return f" of the package {name}" if name else ""


def _workload(candidate: object, origin: str, where: str = "") -> Workload:
    if not isinstance(candidate, Workload):
        kind = type(candidate).__name__
        article = "an" if kind[0].lower() in "aeio" else "a"
        raise UnknownWorkload(f"{origin} is {article} {kind}, not an mpscale.Workload{where}")
    return candidate
