"""Read a run from disk: its environment, its records and the steps of its cases; find runs."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpscale.core.case import CaseId, Place
from mpscale.core.cases_csv import read_cases
from mpscale.core.columns import COLUMNS, DTYPES, METHOD_VERSION, SCHEMA_VERSION, SUMMARY
from mpscale.core.files.reading import (
    INFO,
    MOST_CASES,
    NoSuchFileError,
    RunError,
    read_json,
)
from mpscale.core.journal import read_journal
from mpscale.core.naming import NAME, NOTE, called, drop_misfits, name_in, with_id
from mpscale.core.record import Key, Record, misfit, settle
from mpscale.core.run_folder import steps_path
from mpscale.core.steps_csv import read_steps
from mpscale.core.variables import recorded

if TYPE_CHECKING:
    # Imported where frames are made: reading and judging runs needs no pandas, which takes a second to load.
    import pandas as pd

__all__ = ["Run", "RunError", "cases_frame", "read_info", "read_run", "resolve_run"]

_STEP_DTYPES = {"step": "Int64", "loss": "float64", "loss_scale": "float64", "overflow": "boolean"}
MAKE_ONE = "make one with `mpscale run`, or `make bench` in a clone"
_LONGEST, _SHOWN_OF_A_NAME = 4096, 60
"""Characters of a path, and those of one that is too long that a message repeats."""
_SHOWN = 5
"""How many runs a message names."""


class NoRunYet(RunError):
    """The latest run was requested, but there is none, not even a broken one."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run as recorded in its journal.

    Args:
        path: the run's folder, or a cases.csv.
        name: its id, from ``run.json``; starts with the UTC time of its start.
        info: ``run.json``: environment, settings, planned cases, schema and method version.
        records: the last attempt of every case that was started, in the order of the plan, after
            :func:`mpscale.core.record.settle`.
        finished: whether the run ended.
        problems: what in its files could not be read and what was done about it, one sentence each.
    """

    path: Path
    name: str
    info: dict[str, Any]
    records: list[Record]
    finished: bool
    problems: list[str] = field(default_factory=list)

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row per record and one column for each of :data:`mpscale.core.columns.COLUMNS`.

        Unknown values are ``pd.NA``, or NaN in float columns; ``unavailable`` holds dicts of texts.
        """
        return cases_frame(self.records)

    @property
    def given_name(self) -> str | None:
        """The name that somebody gave the run; None if nobody did."""
        return self._text(NAME)

    @property
    def note(self) -> str | None:
        """What somebody noted about the run; None if nobody did. Any text, on one line."""
        return self._text(NOTE)

    def _text(self, key: str) -> str | None:
        found = self.info.get(key)
        return found if isinstance(found, str) else None

    @property
    def shown(self) -> str:
        """How texts name the run: by the name that it was given, with its id, or by its id alone."""
        return with_id(self.name, self.given_name)

    @property
    def plan_known(self) -> bool:
        """Whether it is known which cases should be there; a cases.csv does not show it."""
        return bool(self.info.get("planned"))

    @property
    def methods(self) -> set[int]:
        """The method versions in run.json, or in the rows of a cases.csv."""
        told = self.info.get("method_version")
        versions = [told] if told is not None else [record["method_version"] for record in self.records]
        return {version for version in versions if version is not None}

    @property
    def environment(self) -> dict[str, Any]:
        """The environment in ``run.json``; empty if there is none."""
        environment = self.info.get("environment")
        return environment if isinstance(environment, dict) else {}

    @property
    def device(self) -> dict[str, Any]:
        """The device's description in ``run.json``; empty if there is none."""
        device = self.environment.get("device")
        return device if isinstance(device, dict) else {}

    @property
    def merged(self) -> list[dict[str, Any]]:
        """What `mpscale merge` made the run of, in order; empty for a run that a session made.

        Each has the name of a run under ``run``, and may have ``started``, ``shard``, ``environment`` and ``cases``.
        """
        found = self.info.get("merged")
        parts = found.get("parts") if isinstance(found, dict) else None
        return [one for one in parts if isinstance(one, dict)] if isinstance(parts, list) else []

    @property
    def origins(self) -> frozenset[str]:
        """Names of the runs that hold its measurements: its own, and those of what it was merged from."""
        return frozenset([self.name, *(str(part.get("run")) for part in self.merged)])

    @property
    def not_started(self) -> list[str]:
        """Ids of cases that were planned but are not in the journal."""
        return [case_id for case_id in self.info.get("planned", []) if case_id not in self._case_ids]

    @cached_property
    def _case_ids(self) -> dict[str, None]:
        return dict.fromkeys(str(record["case_id"]) for record in self.records)

    @cached_property
    def waiting(self) -> dict[Place, list[Key]]:
        """The processes of :attr:`not_started`, by workload and mode."""
        workloads = list(dict.fromkeys(str(record["workload"]) for record in self.records))
        found: dict[Place, list[Key]] = {}
        for text in self.not_started:
            if case := CaseId.parse(text, workloads):
                found.setdefault(case.place, []).append((case.seed, case.repeat))
        return found

    def steps(self, case_id: str) -> pd.DataFrame:
        """The training of one case, step by step: columns step, loss, loss_scale and overflow.

        Raises:
            RunError: the run has no such case, or its steps were not written or cannot be read.
        """
        import pandas as pd

        columns = self.step_columns(case_id)
        return pd.DataFrame({name: pd.Series(columns[name], dtype=dtype) for name, dtype in _STEP_DTYPES.items()})

    def step_columns(self, case_id: str) -> dict[str, list[Any]]:
        """The columns of :meth:`steps` as lists, without pandas. None is unknown; a loss may be NaN or infinite.

        Raises:
            RunError: as :meth:`steps`.
        """
        if case_id not in self._case_ids:
            close = difflib.get_close_matches(case_id, self._case_ids, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; cases: {len(self._case_ids)}"
            raise RunError(f"{self.name} has no case {case_id!r}{hint}")
        try:
            return read_steps(steps_path(self.path, case_id))
        except NoSuchFileError as error:
            raise RunError(f"{error}; only a case that trained to its end has steps") from None


def read_run(path: str | Path) -> Run:
    """Read the run in the folder ``path``, finished or not, or a cases.csv by itself.

    A cases.csv shows neither the environment nor planned cases that were not started nor steps.

    A line of the journal that cannot be read costs only its own case, which becomes ``invalid`` with the reason, and
    :attr:`Run.problems` lists it. A cases.csv, which other programs write too, is read whole or not at all.

    Raises:
        RunError: the folder is not a run, or a file in it cannot be read at all; the message names the file.
    """
    folder = Path(path)
    if folder.is_file():
        return Run(folder, str(path), {}, settle(read_cases(folder)), finished=True)
    problems: list[str] = []
    info = read_info(folder / "run.json", problems)
    journal = read_journal(folder / "journal.jsonl", info)
    name = str(info.get("run") or folder.resolve().name)
    return Run(folder, name, info, settle(journal.records), journal.finished, problems + journal.problems)


def resolve_run(
    name_or_path: str | Path,
    results_dir: str | Path,
    left_out: list[tuple[str, str]] | None = None,
    before: str | None = None,
) -> Path:
    """Find the folder of a run, or a cases.csv.

    Args:
        name_or_path: ``latest``, which is the run that started last, even if it is still going on; the id of a run;
            the name that a single run was given; the path of its folder or of a cases.csv; or the first characters of
            a single id.
        results_dir: holds ``runs/`` and ``reference/``. ``latest`` looks only in ``runs/``.
        left_out: receives the folders that ``latest`` skipped because they cannot be read, with the reason. Without it
            ``latest`` skips none: whoever has just made a run that is broken must not be shown the one before it.
        before: name of a run; ``latest`` is then the newest of those that were begun before it.

    Raises:
        RunError: no run matches, or several do, or the latest run cannot be read.
    """
    wanted = str(name_or_path)
    if len(wanted) > _LONGEST:
        raise RunError(f"no run is called {wanted[:_SHOWN_OF_A_NAME]!r}... ({len(wanted):,} characters)")
    made, kept = (_runs_in(Path(results_dir) / folder) for folder in ("runs", "reference"))
    if wanted == "latest":
        names = [run.name for run in made]
        earlier = made[: names.index(before)] if before in names else made
        return _latest(earlier, results_dir, left_out)
    runs = made + kept
    for run in runs:
        if run.name == wanted:
            return run
    # A run that is in both folders is one run.
    runs = list({run.name: run for run in reversed(runs)}.values())[::-1]
    path = Path(wanted)
    named = called(wanted, runs)
    if named and (path / "run.json").is_file() and not path.samefile(named[0]):
        raise RunError(f"{wanted!r} is a folder here, and the name of {named[0].name}: write ./{wanted}, or that id")
    if len(named) == 1:
        return named[0]
    if named:
        raise RunError(
            f"{len(named)} runs are called {wanted!r}: {_newest(named)}; take the id of one, or give one another name: "
            "`mpscale name ID NAME`"
        )
    if path.suffix.lower() == ".csv":
        if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            return path
        raise RunError(f"{path}: no such file")
    if wanted and os.path.isdir(path):  # noqa: PTH112 - as above
        if not (path / "run.json").is_file():
            raise RunError(f"{path}: holds no run.json, so it is not a run")
        return path
    fitting = [run for run in runs if wanted and run.name.startswith(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RunError(f"{len(fitting)} runs begin with {wanted!r}: {_newest(fitting)}")
    if not runs:
        raise RunError(f"no run is called {wanted!r}; {_no_runs(results_dir)}")
    names = list(filter(None, map(name_in, runs)))
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {close[0]}? The" if close else "the"
    raise RunError(f"no run is called {wanted!r}; {hint} newest in {results_dir} are {_newest(runs)}")


def cases_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row per record, in order, with the dtype of each column."""
    import pandas as pd

    columns: dict[str, Any] = {
        name: pd.Series([record[name] for record in records], dtype=DTYPES[column.kind])
        for name, column in COLUMNS.items()
    }
    columns["unavailable"] = pd.Series(
        [{name: str(why) for name, why in record.unavailable.items()} for record in records], dtype="object"
    )
    return pd.DataFrame(columns)


def summary_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per row of a summary, with the dtype of each column; see :mod:`mpscale.analysis.summary`."""
    import pandas as pd

    return pd.DataFrame(
        {column.name: pd.Series([row[column.name] for row in rows], dtype=DTYPES[column.kind]) for column in SUMMARY}
    )


_PARTS: dict[tuple[str, ...], type] = {
    ("run",): str,
    ("started",): str,
    ("settings",): dict,
    ("shard",): dict,
    ("merged",): dict,
    ("interleaved",): dict,
    ("environment",): dict,
    ("environment", "device"): dict,
    ("environment", "device", "kind"): str,
    ("environment", "device", "name"): str,
    ("environment", "packages"): dict,
    ("environment", "variables"): dict,
    ("environment", "cpu"): dict,
    ("environment", "cpu", "logical_cores"): int,
    ("environment", "cpu", "physical_cores"): int,
    ("environment", "git"): dict,
    ("environment", "git", "commit"): str,
    ("environment", "git", "dirty"): bool,
}
"""The type of what is read from a run.json; each part may be missing, or null."""


def read_info(path: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """Read a run.json. A part of another type than it should have counts as unknown.

    Args:
        path: of the file.
        problems: receives a sentence on each such part.

    Raises:
        RunError: there is none, it is broken, or it is of a newer version; the message names the file.
    """
    try:
        info = read_json(path, INFO)
    except NoSuchFileError as error:
        raise RunError(f"{error}, so {path.parent} is not a run") from None
    if not isinstance(info, dict):
        raise RunError(f"{path}: should hold a JSON object, not {type(info).__name__}")
    version = info.get("schema_version")
    for name, value in (("schema_version", version), ("method_version", info.get("method_version", METHOD_VERSION))):
        # Cases without an end take both from here.
        if value is None or misfit(name, value):
            raise RunError(f"{path}: {name} should be an integer, not {value!r:.200}")
    assert isinstance(version, int)
    if version > SCHEMA_VERSION:
        # In a newer version a column has another meaning: reading on would mislabel figures.
        raise RunError(
            f"{path}: written with schema version {version}, this mpscale reads up to {SCHEMA_VERSION}; upgrade it"
        )
    environment = info.get("environment")
    if isinstance(environment, dict) and "variables" in environment:
        # Somebody else may have recorded more. Nothing but this list may reach a report.
        variables = environment["variables"]
        environment["variables"] = recorded(variables) if isinstance(variables, dict) else {}
    planned = info.setdefault("planned", [])
    if not (isinstance(planned, list) and all(isinstance(case_id, str) for case_id in planned)):
        raise RunError(f"{path}: planned should be a list of case ids")
    if len(planned) > MOST_CASES:
        raise RunError(f"{path}: plans {len(planned):,} cases; a run of more than {MOST_CASES:,} is not read")
    misfits = drop_misfits(info, path.name)
    if problems is not None:
        problems += misfits
    for names, kind in _PARTS.items():
        above = info
        for name in names[:-1]:
            above = above.get(name) or {}
        value = above.get(names[-1])
        if value is not None and type(value) is not kind:
            del above[names[-1]]
            if problems is not None:
                what = f"{path.name}: {'.'.join(names)} should be {kind.__name__}, not {value!r:.40}"
                problems.append(f"{what}; it counts as unknown")
    return info


def _latest(made: list[Path], results_dir: str | Path, left_out: list[tuple[str, str]] | None) -> Path:
    broken = []
    for folder in reversed(made):
        try:
            read_run(folder)
        except RunError as error:
            broken.append((str(folder), str(error)))
            continue
        if left_out is not None:
            left_out += broken
        elif broken:
            raise RunError(
                f"the latest run cannot be read: {broken[0][1]}; the newest that can be is {folder.name}: "
                f"name it, or remove {broken[0][0]}"
            )
        return folder
    if broken:
        which = "the only run" if len(broken) == 1 else f"the newest of {len(broken)} runs"
        raise RunError(f"no run in {Path(results_dir) / 'runs'} can be read; {which}: {broken[0][1]}")
    raise NoRunYet(_no_runs(results_dir))


def by_age(folders: Iterable[Path]) -> list[Path]:
    """Sort folders of runs by age: by the second in their names, and within one second by ``started`` in run.json.

    That has microseconds. Folders of one microsecond, and those of older versions that began in one second, are sorted
    by name, so the order is always the same. Names without a time are sorted by name.
    """
    folders = list(folders)
    shared = Counter(_second(folder) for folder in folders)

    def age(folder: Path) -> tuple[str, str, str]:
        second = _second(folder)
        # Nearly all runs have a second to themselves, so few files are read.
        return second, _started(folder) if shared[second] > 1 else "", folder.name

    return sorted(folders, key=age)


def _second(folder: Path) -> str:
    found = re.match(r"\d{8}T\d{6}Z", folder.name)
    return found[0] if found else folder.name


def _started(folder: Path) -> str:
    try:
        # As text: all are in UTC, and "+00:00" sorts before ".000001+00:00".
        return str(read_info(folder / "run.json").get("started") or "")
    except (RunError, OSError):
        return "unknown"  # the newest: `latest` must not pass it over


def _runs_in(folder: Path) -> list[Path]:
    return by_age(path.parent for path in folder.glob("*/run.json"))


def _newest(runs: list[Path]) -> str:
    names = list(dict.fromkeys(run.name for run in reversed(by_age(runs))))
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _no_runs(results_dir: str | Path) -> str:
    return f"there is no run in {Path(results_dir) / 'runs'}; {MAKE_ONE}"


def without_parts(runs: Iterable[Run]) -> list[Run]:
    """Leave out runs that another of them was merged from: their measurements would count twice."""
    runs = list(runs)
    of_parts = {name: run for run in runs if run.merged for name in run.origins - {run.name}}

    def is_within(run: Run) -> bool:
        whole = of_parts.get(run.name)
        return whole is not None and run._case_ids.keys() <= whole._case_ids.keys()

    return [run for run in runs if not is_within(run)]
