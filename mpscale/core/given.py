"""What a session was given beside the names of workloads, and passes on to its workers.

A function that makes a compiled model has no data of its own: options name them. What a script or a notebook compares
is in a parcel: a private folder that the script's process has made, and that lives as long as it waits for the session.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "MPSCALE_PARCEL"
"""The environment variable by which a script's process names the parcel to the session that it starts."""
_CONTENTS, _RUN = "contents.json", "run"


class NoParcel(ValueError):
    """The folder cannot be used as a parcel; the text says why."""


@dataclass(frozen=True)
class Parcel:
    """The workloads that a script has sent.

    Args:
        folder: only its owner can use it, since what is in it is unpickled.
        sender: id of the process that has made it.
        python_path: where that process looks for modules, in order.
        names: of the workloads.
    """

    folder: str
    sender: int
    python_path: Sequence[str]
    names: Sequence[str]

    def file(self, name: str, outline: bool = False) -> Path:
        """The file with a workload, pickled; ``outline``: without what is not mpscale's, for a session.

        Raises:
            NoParcel: the folder is gone, or somebody else could have written it.
        """
        _check(self.folder)
        return Path(self.folder, f"{list(self.names).index(name)}{'.outline' if outline else ''}.pickle")

    def write(self) -> None:
        """Write the contents, last of all that is in the folder."""
        contents = {name: value for name, value in asdict(self).items() if name != "folder"}
        Path(self.folder, _CONTENTS).write_text(json.dumps(contents), encoding="utf-8")

    @classmethod
    def read(cls, folder: str) -> Parcel:
        """Read the contents.

        Raises:
            NoParcel: the folder is not a whole parcel, or somebody else could have written it.
        """
        _check(folder)
        try:
            return cls(folder, **json.loads(Path(folder, _CONTENTS).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise NoParcel(
                f"{VARIABLE}: {folder} holds no workloads ({error}); mpscale.compare sets this variable itself"
            ) from error

    def note_run(self, path: Path) -> None:
        """Tell the sender which run the session makes."""
        with contextlib.suppress(OSError):
            Path(self.folder, _RUN).write_text(str(path), encoding="utf-8")

    def run(self) -> Path | None:
        """The folder of the run that the session has made; None if it has made none."""
        with contextlib.suppress(OSError):
            return Path(Path(self.folder, _RUN).read_text(encoding="utf-8"))
        return None


def _check(folder: str) -> None:
    """Raise NoParcel unless this user alone can write the folder."""
    try:
        state = Path(folder).lstat()
    except OSError as error:
        raise NoParcel(f"{VARIABLE}: {folder}, in which a script has sent its workload, is gone ({error})") from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o077:
        raise NoParcel(f"{VARIABLE}: {folder} is not a folder that only this user can read and write")


@dataclass(frozen=True)
class Given:
    """What a session was given.

    Args:
        train: where a function's data for training are, as ``module:attribute`` or as an attribute of its module.
        validation: where its data for validation are.
        parcel: None for a session that no script has started.
        in_worker: whether this process trains, and so needs all of a workload that a script has sent.
    """

    train: str | None = None
    validation: str | None = None
    parcel: Parcel | None = None
    in_worker: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Given:
        """The inverse of :meth:`to_json`."""
        parcel = values["parcel"]
        return cls(**{**values, "parcel": None if parcel is None else Parcel(**parcel)})


_given = [Given()]


def given() -> Given:
    """What this process was given."""
    return _given[0]


def take(what: Given) -> None:
    """Set what this process was given."""
    _given[0] = what
