"""The name and the note that people give a run, in its run.json. A run's id, the name of its folder, stays what it is.

Names are typed into shells, shown in tables and kept in files that others read, so they have few characters. Two runs
may have the same name, say in folders that were brought together; whoever names one of them is told so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpscale.core.files.reading import INFO, RunError, read_json
from mpscale.core.files.writing import write
from mpscale.core.reason import encodable
from mpscale.core.run_lock import RunIsHeld, RunLock

NAME, NOTE = "name", "note"
"""Keys of run.json."""
_LONGEST, _LONGEST_NOTE = 60, 500
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_SHOWN = 60
"""Characters of a refused text that a message repeats."""


def run_name(text: str) -> str:
    """Return a name, or say why it is none.

    Raises:
        ValueError: it is none.
    """
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"the name of a run begins with a letter or digit, and has only these and . _ + -, not {shown}"
        )
    if len(text) > _LONGEST:
        raise ValueError(f"the name of a run has at most {_LONGEST} characters, not {len(text):,}")
    if text.lower() == "latest":
        raise ValueError("`latest` means the run that started last, so no run is called so")
    if text.lower().endswith(".csv"):
        raise ValueError(f"{shown} would be taken for a cases.csv; leave out the end")
    if _ID.match(text):
        raise ValueError(f"{shown} begins like the id of a run, with a time; put something before it")
    return text


def note_of(text: str) -> str:
    """Return a note, on one line and in characters that any file can hold.

    Raises:
        ValueError: it is empty, or too long.
    """
    note = encodable(" ".join(text.split()))
    if not 0 < len(note) <= _LONGEST_NOTE:
        raise ValueError(f"a note has at least 1 and at most {_LONGEST_NOTE} characters, not {len(note):,}")
    return note


def with_id(run_id: str, name: str | None) -> str:
    """How texts name a run: by the name that it was given, with its id, or by its id alone."""
    return run_id if name is None else f"{name} ({run_id})"


def drop_misfits(info: dict[str, Any], file: str) -> list[str]:
    """Remove a name and a note that no mpscale writes from a run.json; return a sentence on each."""
    said = []
    for key, check in ((NAME, run_name), (NOTE, note_of)):
        value = info.get(key)
        try:
            if value is not None and (not isinstance(value, str) or check(value) != value):
                raise ValueError(f"it is {value!r:.40}")
        except ValueError as error:
            del info[key]
            said.append(f"{file}: {key} is none that a run may have ({error}); it counts as unknown")
    return said


def name_in(folder: Path) -> str | None:
    """The name of the run in a folder; None if it has none, or its run.json cannot be read."""
    try:
        info = read_json(folder / "run.json", INFO)
    except RunError:
        return None
    found = info.get(NAME) if isinstance(info, dict) else None
    try:
        return run_name(found) if isinstance(found, str) else None
    except ValueError:
        return None


def called(wanted: str, folders: Iterable[Path]) -> list[Path]:
    """The runs among ``folders`` that have the name ``wanted``. No file is read if no run can have it."""
    try:
        run_name(wanted)
    except ValueError:
        return []
    return [folder for folder in folders if name_in(folder) == wanted]


def others_called(name: str, results: Path, but: Path | None = None) -> list[Path]:
    """The runs in a results folder that have a name, without the run in the folder ``but``."""
    files = (path for kept in ("reference", "runs") for path in results.glob(f"{kept}/*/run.json"))
    found = {path.parent.name: path.parent for path in files}
    return called(name, [folder for own, folder in found.items() if but is None or own != but.name])


def rename(folder: Path, changes: Mapping[str, str]) -> None:
    """Give a run another name or note; an empty one takes it away.

    Args:
        folder: of the run.
        changes: :data:`NAME` or :data:`NOTE`, or both, with texts that have been checked.

    Raises:
        RunError: the run is still going on, or its run.json cannot be read.
        OSError: its folder cannot be written.
    """
    try:
        lock = RunLock.take(folder)
    except RunIsHeld as held:
        raise RunError(f"{folder.name} is still going on, and would overwrite this: {held}") from None
    try:
        path = folder / "run.json"
        info = read_json(path, INFO)
        if not isinstance(info, dict):
            raise RunError(f"{path}: should hold a JSON object, not {type(info).__name__}")
        kept = {key: value for key, value in info.items() if key not in changes}
        given = {key: text for key, text in changes.items() if text}
        # The id first, as in the file of a run that was named when it began.
        first = {"run": kept.pop("run")} if "run" in kept else {}
        write(path, json.dumps({**first, **given, **kept}, indent=2) + "\n")
    finally:
        lock.free()
