"""Where the value of an option came from: the command line, or ``[tool.mpscale]`` of the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True, slots=True)
class FromProject:
    """The options of a session that come from ``[tool.mpscale]``.

    Args:
        path: of the file.
        texts: by option, as :class:`~mpscale.core.invocation.Invocation` has them.
        overridden: keys for which the command line has another value.
    """

    path: Path
    texts: Mapping[str, Any]
    overridden: Sequence[str]


PROJECT = pytest.StashKey[FromProject]()
UNFIT = pytest.StashKey[str]()
"""Why a value of ``[tool.mpscale]`` cannot be used on this machine, for sessions that have cases."""


def by_project(config: pytest.Config, option: str) -> Path | None:
    """Return the file that has the option, if that is what counts."""
    found = config.stash.get(PROJECT, None)
    return None if found is None or option not in found.texts else found.path


def of(config: pytest.Config, option: str) -> str:
    """Return how a message names the place where an option was given."""
    path = by_project(config, option)
    return option if path is None else f"{path}: {option.removeprefix('--mp-')} of [tool.mpscale]"


def told(config: pytest.Config) -> list[str]:
    """Return a sentence on the options that are the project's; none if there are none."""
    found = config.stash.get(PROJECT, None)
    if found is None:
        return []
    keys = ", ".join(option.removeprefix("--mp-") for option in found.texts)
    parts = [f"{found.path.name} sets {keys}"] if keys else []
    parts += [f"the command line overrides {', '.join(found.overridden)} of {found.path.name}"] * bool(found.overridden)
    return ["; ".join(parts)] if parts else []
