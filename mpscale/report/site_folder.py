"""The folder of a site: every file in it is written whole, and what others have put there is left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from mpscale.core.files.reading import SUMMARY, RunError, read_json
from mpscale.core.files.writing import remove, remove_leftovers, write

MANIFEST = "mpscale-site.json"
"""Lists the files that mpscale has made, the only ones that it replaces or removes."""

_OURS = re.compile(r"(?:(?:runs|comparisons)/)?[A-Za-z0-9_][A-Za-z0-9._-]*\.html|\.nojekyll")
"""Names that this module makes. A manifest that lists others was changed by somebody."""

_NOT_CONTENT = (".git",)
"""What a folder may hold and still count as empty: the branch of a repository that pages are published from."""


class SiteError(ValueError):
    """A site cannot be written here. The message says why, and what to do."""


class SiteFolder:
    """A folder to write a site into. Nothing is changed before :meth:`begin`.

    Args:
        path: of the folder; it need not exist.

    Raises:
        SiteError: it is not a folder, or it holds something else.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[str] = []
        if path.exists() and not path.is_dir():
            raise SiteError(f"{path}: is not a folder")
        self._before = self._listed()

    def has(self, name: str) -> bool:
        """Whether an earlier call has made a file, and it is still there."""
        return name in self._before and (self.path / name).is_file()

    def begin(self, planned: Iterable[str]) -> None:
        """Make the folder, and note the names of the files that are going to be written.

        The note comes first: if the process is killed in the middle, the next one knows which files are its own.

        Args:
            planned: names of files, with the folder that they are in.

        Raises:
            SiteError: somebody else has a file of such a name there.
            OSError: the folder cannot be written.
        """
        names = list(planned)
        for name in names:
            place = self.path / name
            if name not in self._before and (place.exists() or place.is_symlink()):
                raise SiteError(
                    f"{place}: mpscale has not made this file and does not replace it; move it, or name {_NEW}"
                )
        for folder in {(self.path / name).parent for name in names}:
            if folder.is_symlink() and folder != self.path:
                raise SiteError(f"{folder}: is a link, and mpscale writes only into the folder itself; name {_NEW}")
            folder.mkdir(parents=True, exist_ok=True)
        self._note({*self._before, *names})

    def write(self, name: str, content: str) -> None:
        """Write a file, whole or not at all."""
        write(self.path / name, content, self.path)
        self._made.append(name)

    def keep(self, name: str) -> None:
        """Keep a file of an earlier call as it is."""
        self._made.append(name)

    def finish(self) -> list[str]:
        """Remove the files of earlier calls that were not made again; return their names."""
        gone = sorted(self._before - set(self._made))
        for name in gone:
            remove(self.path / name, self.path)
        for folder in {(self.path / name).parent for name in (*self._before, *self._made)}:
            remove_leftovers(folder)
        self._note(self._made)
        return gone

    def _listed(self) -> set[str]:
        """The files that earlier calls have made here."""
        manifest = self.path / MANIFEST
        if not (manifest.exists() or manifest.is_symlink()):
            others = [each.name for each in self.path.iterdir()] if self.path.is_dir() else []
            others = sorted(set(others) - set(_NOT_CONTENT))
            if others:
                raise SiteError(
                    f"{self.path}: holds {others[0]}{' and more' if len(others) > 1 else ''} and no site of mpscale, "
                    f"and is left as it is; name {_NEW}"
                )
            return set()
        try:
            found = read_json(manifest, SUMMARY)
            names = found["files"]
            if not all(isinstance(name, str) for name in names):
                raise TypeError("files should be names")
        except (RunError, TypeError, KeyError) as error:
            raise SiteError(
                f"{manifest}: cannot be read ({error}), so what may be replaced is unknown; name {_NEW}"
            ) from error
        return {name for name in names if _OURS.fullmatch(name)}

    def _note(self, names: Iterable[str]) -> None:
        content = {"about": "Files that `mpscale site` has made, and may replace or remove.", "files": sorted(names)}
        write(self.path / MANIFEST, json.dumps(content, indent=1) + "\n")


_NEW = "a folder that is new, empty or a site of mpscale"
