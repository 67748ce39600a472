"""The command ``name``: the name and the note of a run that has ended."""

from __future__ import annotations

import argparse

from mpscale.cli import completion
from mpscale.cli.output import OK, RESULTS, add_json_option, fail, say
from mpscale.config import RUN, add_results_option
from mpscale.terminal.streams import as_typed, on_one_line


def name_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Give a run a name, a note or both; `pytest --mp-name NAME --mp-note TEXT` does the same when it begins. An "
        "empty one takes it away. Without either, show what the run has."
    )
    run = parser.add_argument("run", metavar="RUN", help=RUN)
    completion.completed_by(run, completion.runs)
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="letters, digits and . _ + -, and no other run of the folder has it"
    )
    parser.add_argument("--note", type=as_typed, metavar="TEXT", help="what to remember of the run")
    add_results_option(parser.add_argument, default=RESULTS)
    add_json_option(parser)


def name(options: argparse.Namespace) -> int:
    from mpscale.core.naming import NAME, NOTE, note_of, others_called, rename, run_name
    from mpscale.core.runs import read_info, resolve_run
    from mpscale.report.table import json_document

    path = resolve_run(options.run, options.results)
    if path.is_file():
        return fail(f"{path} is a table without a run.json, which would hold the name; rename the file")
    changes = {}
    try:
        if options.name is not None:
            changes[NAME] = options.name and run_name(options.name)
        if options.note is not None:
            changes[NOTE] = options.note.strip() and note_of(options.note)
    except ValueError as error:
        return fail(str(error))
    here = path.resolve()
    if changes.get(NAME) and (others := others_called(changes[NAME], here.parents[1], here)):
        return fail(f"{others[0].name} is called {options.name} already; take another name, or give that run one")
    if changes:
        rename(path, changes)
    info = read_info(path / "run.json")
    about = {"run": str(info.get("run") or here.name), "name": info.get(NAME), "note": info.get(NOTE)}
    if options.json:
        print(json_document("name", about), end="")
        return OK
    print(on_one_line(f"{about['run']}: {about['name'] or 'no name'}, {about['note'] or 'no note'}"))
    if changes and (path / "report.html").is_file():
        say(f"its report does not say so yet: `mpscale report {path}`")
    return OK
