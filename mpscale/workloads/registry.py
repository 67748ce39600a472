"""Finds workloads by name: those of mpscale, those of installed packages, and any by ``module:attribute``."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from mpscale.workloads import article, mnist1d
from mpscale.workloads.workload import Workload

ENTRY_POINT_GROUP = "mpscale.workloads"


class UnknownWorkload(ValueError):
    """A name that is no workload."""


def available() -> dict[str, Workload]:
    """Every workload by name: mpscale's own first, then those that installed packages offer by entry point.

    Raises:
        UnknownWorkload: an entry point does not lead to a workload, or takes a name that is taken.
    """
    found = {w.name: w for w in (mnist1d.MLP, mnist1d.CNN, mnist1d.GRU, article.MLP)}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        candidate = _workload(entry.load(), f"the entry point {entry.value!r}")
        if candidate.name in found:
            raise UnknownWorkload(f"the entry point {entry.value!r} offers {candidate.name!r}, a name that is taken")
        found[candidate.name] = candidate
    return found


def get(name: str) -> Workload:
    """The workload called ``name``, or the one at ``module:attribute``.

    Raises:
        UnknownWorkload: there is none; the message lists those there are.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            candidate = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # importing runs the user's code, which may fail in any way
            raise UnknownWorkload(f"no workload at {name!r}: {type(error).__name__}: {error}") from error
        return _workload(candidate, f"{name!r}")
    known = available()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UnknownWorkload(
            f"no workload is called {name!r}{hint}; the workloads are {', '.join(known)}, "
            "and module:attribute names one of your own"
        )
    return known[name]


def _workload(candidate: object, origin: str) -> Workload:
    if not isinstance(candidate, Workload):
        raise UnknownWorkload(f"{origin} is a {type(candidate).__name__}, not an mpscale.Workload")
    return candidate
