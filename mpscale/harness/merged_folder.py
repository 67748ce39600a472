"""Writes the folder of a run that was merged from several: whole, or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mpscale.core.files.reading import INFO, JOURNAL, SAMPLES, STEPS, Content, RunError, read_bytes
from mpscale.core.files.writing import replacing, write, write_new
from mpscale.core.journal import read_journal
from mpscale.core.run_folder import gpu_path, steps_path
from mpscale.core.run_lock import RunIsHeld, RunLock
from mpscale.core.runs import read_info
from mpscale.harness.merge import LINK, Merger, Part

_BEGUN = re.compile(r"\.merging-[0-9a-f]{16}")
"""Names of folders of merges that have not ended."""
_NAME = re.compile(r"\d{8}T\d{6}Z-(.+?)(?:-[0-9a-f]{4})?")
_SURELY_DEAD_S = 60.0
"""A folder that is older, in seconds, and that nobody has locked, is left from a process that was killed."""
_MOST_ATTEMPTS = 1000
"""Of a case, whose files are copied."""


def write_merged(merger: Merger, results: Path) -> Path:
    """Write ``<results>/runs/<run>/`` without its reports.

    It is made under another name, and gets its own when it is whole. A process that is killed before leaves a folder
    that is no run, and that the next merge removes.

    Args:
        merger: what is merged.
        results: the results folder; created if it does not exist.

    Returns:
        The folder.

    Raises:
        RunError: a file of a part is a link, or cannot be read; or the whole is larger than a run can be.
        OSError: the folder cannot be written.
    """
    runs = results / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(runs)
    folder = runs / f".merging-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        lock = RunLock.take(folder)
        try:
            path = runs / _write(merger, folder)
        finally:
            lock.free()
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return path


def _write(merger: Merger, folder: Path) -> str:
    """Fill the folder, run.json last; return the name of the run."""
    # Right after its last part, wherever runs are sorted by name or by start.
    started = (merger.started() or datetime.now(UTC)) + timedelta(microseconds=1)
    name = f"{started:%Y%m%dT%H%M%SZ}-{_slug(merger)}-merged-{secrets.token_hex(2)}"
    info = {"run": name, "started": started.isoformat(timespec="microseconds"), **merger.info()}
    content = json.dumps(info, indent=2) + "\n"
    if len(content.encode()) > INFO.most:
        raise RunError(f"the run.json of these {len(merger.parts)} runs would be larger than {INFO.most_mib} MiB")
    _write_journal(merger, folder / "journal.jsonl", info)
    for part in merger.parts:
        for path, target, kind in _files(part, folder, with_samples=not merger.different):
            if path.is_symlink():
                raise RunError(f"{path}: {LINK}")
            if path.exists():  # a timing-only process has no steps
                write_new(target, read_bytes(path, kind), root=folder)
    write(folder / "run.json", content)
    # As its readers will, and as they have read the journal: a run that none can read must not appear.
    read_info(folder / "run.json")
    return name


def _write_journal(merger: Merger, path: Path, info: dict[str, Any]) -> None:
    """Write the journal, and add what it takes to be read as those of the parts are."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    finished = all(part.run.finished for part in merger.parts)
    wanted = merger.rows()
    added: list[dict[str, Any]] = []
    for _ in range(2):
        with replacing(path) as file:
            file.write(_line({"event": "run_started", "time": now, "run": info["run"]}))
            for event in itertools.chain(merger.events(), added):
                file.write(_line(event))
            if finished:
                file.write(_line({"event": "run_finished", "time": now, "exit_status": 0, "cases": len(wanted)}))
            if file.tell() > JOURNAL.most:
                raise RunError(f"the journal of these runs would be larger than {JOURNAL.most_mib} MiB; merge fewer")
        found = {str(one["case_id"]): one.to_json() for one in read_journal(path, info).records}
        # A line of a part that cannot be read makes its case invalid; here there is no such line.
        added = [
            {"event": "case_finished", "time": now, "case_id": case_id, "record": row, "step_s": [], "phases": {}}
            for case_id, row in wanted.items()
            if found.get(case_id) != row
        ]
        if not added:
            return
    raise RunError(f"{added[0]['case_id']} could not be taken over as it is; take the original runs")


def _files(part: Part, folder: Path, with_samples: bool) -> Iterator[tuple[Path, Path, Content]]:
    """Yield the files of the cases of a part: where each is, where it goes, and what it holds."""
    source = part.run.path
    for record in part.run.records:
        case_id = str(record["case_id"])
        yield steps_path(source, case_id), steps_path(folder, case_id), STEPS
        for attempt in range(1, min(record["attempts"] or 1, _MOST_ATTEMPTS) + 1 if with_samples else 1):
            yield gpu_path(source, case_id, attempt), gpu_path(folder, case_id, attempt), SAMPLES


def _slug(merger: Merger) -> str:
    """The part of the names of the runs that says on which device they are."""
    slugs = {found[1] if (found := _NAME.fullmatch(part.name)) else "" for part in merger.parts}
    (slug,) = slugs if len(slugs) == 1 else ("runs",)
    plain = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
    return plain[:40].rstrip("-") or "runs"


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _remove_leftovers(runs: Path) -> None:
    """Remove folders of merges that were killed."""
    for folder in runs.iterdir():
        with contextlib.suppress(OSError, RunIsHeld):
            is_one = _BEGUN.fullmatch(folder.name) is not None and not folder.is_symlink()
            # A younger one may belong to a process that has made it and not yet locked it.
            if is_one and time.time() - folder.stat().st_mtime > _SURELY_DEAD_S:
                RunLock.take(folder).free()
                shutil.rmtree(folder, ignore_errors=True)
