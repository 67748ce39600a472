"""Generated data on disk, so that generating it is not part of every process of a run."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def directory() -> Path:
    """``$MPSCALE_CACHE``, else ``$XDG_CACHE_HOME/mpscale``, else ``~/.cache/mpscale``."""
    named = os.environ.get("MPSCALE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mpscale"


def arrays(name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays that ``make`` returns, read back from the cache where an earlier process left them.

    A file that cannot be read is made again, and a cache that cannot be written is done without: the data is only
    slower to come by. What was trained on is in the record by its digest, whichever way it came.
    """
    path = directory() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        made = dict(make())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A whole file under another name first: a second process must never read half of one.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as temporary:
            np.savez(temporary, **made)
        Path(temporary.name).replace(path)
    except OSError:
        pass
    return made
