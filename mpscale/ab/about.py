"""Prints what an environment holds, as JSON. A script for the interpreter in question, whatever mpscale it has."""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
from importlib import metadata
from typing import Any


def about() -> dict[str, Any]:
    """Versions, and what of the environment does not work. ``turns`` is None if it has no mpscale that takes turns."""
    broken: dict[str, str] = {}
    modules = {}
    for name in ("pytest", "pytest_benchmark", "tensorflow", "mpscale"):
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:  # a broken installation fails in any way
            broken[name] = f"{type(error).__name__}: {error}"
    packages: dict[str, str] = {}
    for distribution in metadata.distributions():
        # Of two with the same name, the first is the one that gets imported.
        packages.setdefault(re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower(), distribution.version)
    # TensorFlow comes under several names, such as tensorflow-cpu and tf-nightly; mpscale may be installed as editable.
    packages |= {name: modules[name].__version__ for name in ("tensorflow", "mpscale") if name in modules}
    if not any(entry.name == "mpscale" for entry in metadata.entry_points(group="pytest11")):
        broken.setdefault("mpscale", "it is not installed, so its pytest plug-in is not found")
    columns = _module("mpscale.core.columns", "mpscale.columns")
    return {
        "turns": getattr(_module("mpscale.ab.turns", "mpscale.turns"), "VERSION", None),
        "method_version": getattr(columns, "METHOD_VERSION", None),
        "schema_version": getattr(columns, "SCHEMA_VERSION", None),
        "python": platform.python_version(),
        "packages": packages,
        "broken": broken,
    }


def _module(*names: str) -> Any:
    """The first of several modules that can be imported: its name in this version of mpscale and in earlier ones."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(about()) + "\n")
