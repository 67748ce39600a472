"""docs/architecture.md names only what exists. `make lint` runs this file, so it imports nothing slow."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def files_in_the_tree() -> list[str]:
    """Return the paths that the drawing of the tree shows, from the indentation of its lines."""
    (tree,) = re.findall(r"^mpscale/\n(.*?)^```", PAGE, re.M | re.S)
    found: list[str] = []
    folders: list[str] = []
    for indent, name, slash in re.findall(r"^( +)([\w.]+)(/?)\s", tree, re.M):
        # Two spaces for each folder that it is in.
        folders = folders[: len(indent) // 2 - 1]
        if slash:
            folders.append(name)
        else:
            found.append("/".join([*folders, name]))
    return found


def test_the_tree_shows_every_module():
    modules = [path.relative_to(ROOT / "mpscale").as_posix() for path in (ROOT / "mpscale").rglob("*.py")]
    assert sorted(files_in_the_tree()) == sorted(name for name in modules if not name.endswith("__init__.py"))


def test_every_path_in_the_text_exists():
    named = re.findall(r"`((?:[\w.-]+/)+(?:\w+\.\w+)?)`", PAGE)
    assert "telemetry/nvidia.py" in named
    assert [name for name in named if not ((ROOT / "mpscale" / name).exists() or (ROOT / name).exists())] == []


def test_the_floors_are_those_that_are_checked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (floors,) = [contract["layers"] for contract in settings["contracts"] if contract["id"] == "floors"]
    assert "\n".join(f"    {floor}" for floor in floors) in PAGE
