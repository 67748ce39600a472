"""Print what an environment contains, as JSON. A script for that environment's interpreter, whatever its mpscale."""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
from importlib import metadata
from typing import Any


def about() -> dict[str, Any]:
    """Versions, and what does not work. ``turns`` is None if there is no mpscale that can take turns."""
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
    # TensorFlow has several names, such as tensorflow-cpu; the metadata of an editable mpscale may be out of date.
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
    """Import the first of ``names`` that exists: the module's name in this mpscale, then in earlier ones."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(about()) + "\n")
