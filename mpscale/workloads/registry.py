"""Find workloads by name: mpscale's own, those of installed packages, and any by ``module:attribute``.

This imports other people's code, which may fail in any way. Only what was asked for may fail with it. What a script or
a notebook has sent (:mod:`mpscale.core.given`) comes before all others.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import importlib
import importlib.machinery
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mpscale.core.given import given
from mpscale.workloads import builtin, large, sent
from mpscale.workloads.workload import Workload

ENTRY_POINT_GROUP = "mpscale.workloads"

_BUILTIN = {workload.name: workload for workload in (*builtin.WORKLOADS, *large.FULL, *large.TINY)}


_looking = contextvars.ContextVar("_looking", default=False)


def is_looking() -> bool:
    """Whether code of other people runs only because a session or a worker looks for a workload in it."""
    return _looking.get()


class UnknownWorkload(ValueError):
    """There is no workload of that name, or it cannot be loaded."""


@dataclass
class Offered:
    """The workloads that can be named without their module.

    Args:
        workloads: by name, mpscale's own first.
        broken: why an entry point cannot be used, by its name, which may also be one that several packages offer.
    """

    workloads: dict[str, Workload] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """The names of mpscale's workloads and those of entry points, without importing anybody's code."""
    found = list(_BUILTIN)
    with contextlib.suppress(Exception):  # one package whose list of entry points cannot be read
        found += sorted(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
    return list(dict.fromkeys(found))


def offered() -> Offered:
    """The workloads of mpscale and those that installed packages offer by entry point, including broken ones."""
    found = Offered(dict(_BUILTIN))
    origins: dict[str, str] = {}
    try:
        entries = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value))
    except Exception as error:  # one package whose list of entry points cannot be read
        found.broken["entry points"] = f"the entry points of the installed packages cannot be read: {_said(error)}"
        return found
    for entry in entries:
        package = getattr(entry.dist, "name", None)
        origin = f"the entry point {entry.value!r}{f' of the package {package}' if package else ''}"
        try:
            candidate = _workload(_guarded(entry.load, origin), origin)
        except UnknownWorkload as error:
            found.broken[entry.name] = str(error)
            continue
        name = candidate.name
        if name in _BUILTIN:
            found.broken[entry.name] = f"{origin} offers {name!r}, but mpscale has a workload of that name"
        elif name in origins and found.workloads.get(name) is not candidate:
            # Which one comes first is a matter of chance, and the wrong one would be trained unnoticed.
            found.workloads.pop(name, None)
            found.broken[name] = (
                f"both {origins[name]} and {origin} offer {name!r}; use module:attribute instead, such as {entry.value}"
            )
        else:
            origins[name] = origin
            found.workloads[name] = candidate
    return found


def get(name: str, folders: Iterable[str | Path] = ()) -> Workload:
    """The workload called ``name``, or the one at ``module:attribute``.

    Args:
        name: as the user gave it.
        folders: where to look for a module that is not on Python's path, in this order. They stay at the end of the
            path, since a module may import its neighbours later.

    Raises:
        UnknownWorkload: there is none, or it cannot be loaded; the message explains why and lists the workloads.
    """
    parcel = given().parcel
    if parcel is not None and name in parcel.names:
        outline = not given().in_worker
        return _guarded(lambda: sent.load(parcel.file(name, outline)), f"the workload {name!r} cannot be loaded")
    if is_own(name):
        return _own(name, [*map(str, folders)])
    if name in _BUILTIN:
        return _BUILTIN[name]
    found = offered()
    if name in found.workloads:
        return found.workloads[name]
    if name in found.broken:
        raise UnknownWorkload(f"the workload {name!r} cannot be loaded: {found.broken[name]}")
    close = difflib.get_close_matches(name, [*found.workloads, *found.broken], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    broken = f"; broken: {', '.join(found.broken)}" if found.broken else ""
    raise UnknownWorkload(
        f"no workload is called {name!r}{hint}; the workloads are {', '.join(found.workloads)}; use module:attribute "
        f"for one of your own{broken}"
    )


@contextlib.contextmanager
def without_gpus() -> Iterator[None]:
    """Hide all GPUs from TensorFlow while looking for workloads in a process that will not train them.

    If a module creates a metric or an optimizer on import, TensorFlow takes the GPU, and nearly all of its memory, for
    as long as the process lives. If no module does, TensorFlow can still see the GPU later.
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


def takes_data(name: str) -> bool:
    """Whether a ``module:attribute`` that :func:`get` has found is a function, whose data are named by options."""
    module, _, attribute = name.partition(":")
    return not isinstance(operator.attrgetter(attribute)(sys.modules[module]), Workload)


def is_own(name: str) -> bool:
    """Whether ``name`` has the form ``module:attribute``."""
    return ":" in name


def source(name: str, folders: Iterable[str | Path] = ()) -> str:
    """The file in which :func:`get` found a ``module:attribute``, and which other file it hides, if any."""
    module = sys.modules[name.partition(":")[0]]
    return f"{_file(module)}{_hidden(module, map(str, folders))}"


def _own(name: str, folders: Sequence[str]) -> Workload:
    module_name, _, attribute = name.partition(":")
    nothing = f"no workload at {name!r}"
    parts = (*module_name.split("."), *attribute.split("."))
    if not all(part.isidentifier() for part in parts) or module_name.endswith(".py"):
        path = Path(module_name)
        meant = f"{path.stem}:{attribute}" if path.suffix == ".py" else "my_workloads:signs"
        raise UnknownWorkload(f"{nothing}: write module:attribute with the name of the module, such as {meant}")
    module, candidate = _found(module_name, attribute, nothing, folders)
    where = f", in {_file(module)}{_hidden(module, folders)}"
    if callable(candidate) and not isinstance(candidate, Workload):
        return _compiled(candidate, name, where, folders)
    return _workload(candidate, repr(name), where)


def _found(
    module_name: str, attribute: str, nothing: str, folders: Sequence[str], is_data: bool = False
) -> tuple[ModuleType, Any]:
    """A module and its attribute; ``nothing`` is what an error begins with."""
    sys.path += [folder for folder in folders if folder not in sys.path]
    # Files may have been created since Python last looked.
    importlib.invalidate_caches()
    try:
        module = _guarded(lambda: importlib.import_module(module_name), nothing)
    except UnknownWorkload as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            places = "".join(f", then in {folder}" for folder in folders)
            looked = f"mpscale looked on Python's path{places}"
            raise UnknownWorkload(f"{error}; {looked}{_hidden(cause, folders)}") from cause
        raise
    try:
        return module, _guarded(lambda: operator.attrgetter(attribute)(module), nothing)
    except UnknownWorkload as error:
        if not isinstance(error.__cause__, AttributeError):
            raise
        there = [each for each, value in vars(module).items() if isinstance(value, Workload)]
        has = f"; its workloads are {', '.join(there)}" if there else "; it has no workloads"
        raise UnknownWorkload(
            f"{nothing}: the module {module_name} in {_file(module)} has no attribute {attribute!r}"
            f"{'' if is_data else has}{_hidden(module, folders)}"
        ) from error.__cause__


def _compiled(build: Callable[..., Any], name: str, where: str, folders: Sequence[str]) -> Workload:
    """The workload of a function that returns a compiled model, with the data that the session was given."""
    if given().train is None:
        raise UnknownWorkload(
            f"{name!r} is {_a(build)}, not an mpscale.Workload{where}; if it returns a compiled model, name its data, "
            f"such as --train {name.partition(':')[0]}:train_data, or --mp-train for pytest"
        )
    parts = {}
    for part in ("train", "validation"):
        if (place := getattr(given(), part)) is not None:
            module_name, _, attribute = place.rpartition(":")
            nothing = f"no data at {place!r} (--mp-{part})"
            _, parts[part] = _found(module_name or name.partition(":")[0], attribute, nothing, folders, is_data=True)
    return _guarded(lambda: Workload.from_compiled(build, **parts), f"the workload {name!r}")


def _guarded(run: Callable[[], Any], what: str) -> Any:
    """Call ``run``, which is other people's code; raise UnknownWorkload if it raises anything but KeyboardInterrupt.

    That includes what sys.exit, argparse and pytest.skip raise, which is not an ``Exception``.
    """
    token = _looking.set(True)
    try:
        return run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UnknownWorkload(f"{what}: {_said(error)}") from error
    finally:
        _looking.reset(token)


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return (
            f"importing it called sys.exit({error.code!r}), as argparse does; put code for the command line under "
            'if __name__ == "__main__":'
        )
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception as another:
        text = f"its message cannot be read: {type(another).__name__}"
    return f"{kind}: {text}" if text else kind


def _hidden(found: ModuleType | ModuleNotFoundError, folders: Iterable[str]) -> str:
    """A note on a file in ``folders`` that is hidden by another module of its name; empty if there is none."""
    name = str(found.name if isinstance(found, ModuleNotFoundError) else found.__name__)
    top = name.partition(".")[0]
    taken = sys.modules.get(top)
    if taken is None:
        return ""
    for folder in folders:
        spec = importlib.machinery.PathFinder.find_spec(top, [folder])
        if spec is not None and spec.origin is not None and spec.origin != vars(taken).get("__file__"):
            return f". {spec.origin} is hidden by {_file(taken)}; rename it"
    return ""


def _file(module: ModuleType) -> str:
    # vars() bypasses a __getattr__ of the module, which may answer anything.
    places = list(vars(module).get("__path__", ()))
    return str(vars(module).get("__file__") or ", ".join(places) or "Python itself")


def _workload(candidate: object, origin: str, where: str = "") -> Workload:
    if not isinstance(candidate, Workload):
        raise UnknownWorkload(f"{origin} is {_a(candidate)}, not an mpscale.Workload{where}")
    return candidate


def _a(candidate: object) -> str:
    kind = type(candidate).__name__
    return f"{'an' if kind[0].lower() in 'aeio' else 'a'} {kind}"
