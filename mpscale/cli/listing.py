"""The commands ``list`` and ``open``: which runs there are, and what one of them says."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpscale.cli import completion
from mpscale.cli.output import OK, RESULTS, add_json_option, fail, say, surface
from mpscale.config import RUN, add_results_option, folder
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.core.runs import Run


def list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the runs of a results folder, oldest first: those in runs/, and in reference/, which a repository keeps."
    )
    parser.add_argument(
        "folder", nargs="?", type=folder, metavar="RESULTS", help="results folder; the same as --results"
    )
    add_results_option(parser.add_argument, default=RESULTS)
    add_json_option(parser)


def list_runs(options: argparse.Namespace) -> int:
    from mpscale.core.runs import MAKE_ONE, by_age
    from mpscale.report.table import json_document, plural

    results = options.folder or options.results
    paths = {
        path.parent.name: path.parent for kept in ("reference", "runs") for path in results.glob(f"{kept}/*/run.json")
    }
    found = [_described(path) for path in by_age(paths.values())]
    if options.json:
        print(json_document("list", {"results": str(results), "runs": found}), end="")
        return OK
    if not found:
        return fail(f"there is no run in {results / 'runs'} or {results / 'reference'}; {MAKE_ONE}")
    where = f"{plural(len(found), 'run')} in {results}; `mpscale open RUN` shows the report of one"
    print(f"{_table(found).text(surface())}\n\n{surface().wrapped(where)}")
    if stopped := [about for about in found if about["go_on"]]:
        # Unbroken, to be copied.
        print(f"to go on with {visible(stopped[-1]['run'])}: {stopped[-1]['go_on']}")
    return OK


def _described(path: Path) -> dict[str, Any]:
    """Describe a run in plain values; one that cannot be read has only its name and the reason."""
    from mpscale.core.runs import read_run

    about: dict[str, Any] = dict.fromkeys(_KEYS) | {"run": path.name, "path": str(path)}
    try:
        return about | _facts(read_run(path))
    except Exception as error:  # whatever is wrong with one run must not cost the others their rows
        return about | {"outcome": "unreadable", "problem": str(error)}


def _facts(run: Run) -> dict[str, Any]:
    from mpscale.core.columns import FAILED
    from mpscale.core.machines import hardware
    from mpscale.core.record import grouped
    from mpscale.report.missing import go_on

    facts = hardware(run)
    statuses = [str(record["status"]) for record in run.records]
    git = run.environment.get("git")
    commit: Mapping[str, Any] = git if isinstance(git, dict) else {}
    return {
        "name": run.given_name,
        "note": run.note,
        "started": run.info.get("started"),
        "device": facts["kind"],
        "device_name": facts["name"],
        "commit": commit.get("commit"),
        "dirty": commit.get("dirty"),
        "rows": len(grouped(run.records)),
        "cases": len(statuses),
        "not_started": len(run.not_started),
        "not_ok": sum(status not in ("ok", "unsupported") for status in statuses),
        "outcome": _outcome(run, statuses, FAILED),
        "problem": run.problems[0] if run.problems else None,
        "go_on": go_on(run, Path.cwd()) or None,
    }


_KEYS = (
    "run", "path", "name", "note", "started", "device", "device_name", "commit", "dirty", "rows", "cases",
    "not_started", "not_ok", "outcome", "problem", "go_on",
)  # fmt: skip


def _outcome(run: Run, statuses: list[str], failed: Sequence[str]) -> str:
    """Say in one word how a run went, the worst first."""
    if run.problems:
        return "damaged"
    if not run.finished or run.not_started:
        return "unfinished"
    if any(status in failed for status in statuses):
        return "failed"
    return "well" if all(status in ("ok", "unsupported") for status in statuses) else "lost"


def _table(found: list[dict[str, Any]]) -> Any:
    from mpscale.report.table import DASH, Cell, Look, Table, plural

    looks: dict[str, Look] = {"well": "good", "unfinished": "weak", "lost": "weak"}

    def went(about: Mapping[str, Any]) -> Cell:
        outcome = about["outcome"]
        more = {
            "unreadable": about["problem"],
            "damaged": about["problem"],
            "unfinished": f"{plural(about['not_started'], 'case')} not started" if about["not_started"] else "",
        }.get(outcome) or (f"{about['not_ok']} of {plural(about['cases'], 'case')}" if about["not_ok"] else "")
        word = "training lost" if outcome == "lost" else outcome
        return Cell(f"{word}: {more}" if more else word, looks.get(outcome, "bad"))

    def row(about: Mapping[str, Any]) -> list[str]:
        if about["outcome"] == "unreadable":
            return [about["run"], DASH, DASH, DASH, DASH, DASH, DASH, went(about), DASH]
        started, commit = str(about["started"] or DASH), about["commit"]
        return [
            about["run"],
            str(about["name"] or DASH),
            started[:10],
            str(about["device_name"] or DASH),
            DASH if commit is None else f"{commit[:8]}{'+' if about['dirty'] else ''}",
            str(about["rows"]),
            str(about["cases"]),
            went(about),
            str(about["note"] or DASH),
        ]

    headers = ["run", "name", "date (UTC)", "device", "commit", "rows", "cases", "it went", "note"]
    spare = ["note", "date (UTC)", "cases", "rows", "device", "commit"]
    return Table(headers, [row(about) for about in found], spare).without_blank("name", "note")


def open_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Open the report of a run, or of a folder that `mpscale fit` or `mpscale probe` has left, in the browser, and "
        "print its path. Without a browser or a display, only print it."
    )
    run = parser.add_argument("run", nargs="?", default="latest", metavar="RUN", help=f"{RUN} (default: latest)")
    completion.completed_by(run, completion.runs)
    add_results_option(parser.add_argument, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print the path, and open nothing")
    add_json_option(parser)


def open_report(options: argparse.Namespace) -> int:
    from mpscale.core.runs import resolve_run
    from mpscale.report.table import json_document

    path = Path(options.run)
    if not (path / "report.html").is_file():
        path = resolve_run(options.run, options.results)
    page = path / "report.html"
    if not page.is_file():
        return fail(f"{page}: no such file; `mpscale report {options.run}` makes it")
    opened = not options.print and _has_display() and _open(page)
    if options.json:
        print(json_document("open", {"report": str(page), "opened": opened}), end="")
        return OK
    print(visible(str(page)))
    if not (opened or options.print):
        say("no browser could be opened here: open that file in one")
    return OK


def _has_display() -> bool:
    """Whether a browser would have a window. Without one, webbrowser takes the terminal for a browser of text."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in names)


def _open(page: Path) -> bool:
    import webbrowser

    try:
        return webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        return False
