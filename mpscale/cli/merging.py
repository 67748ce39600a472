"""The command ``merge``: one run of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpscale.cli import completion
from mpscale.cli.output import OK, RESULTS, say, warn
from mpscale.config import RUN, add_results_option
from mpscale.terminal.streams import visible

_RUN = f"what to merge: {RUN}"


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make one run of the parts of a plan, which `--mp-shard I/N` has divided, or of runs with different cases that "
        "were measured in the same way. The run is a new one in runs/ of the results folder; the parts stay as they "
        "are. Refused is what would make figures wrong: other versions, settings or devices, a case twice, parts of "
        "different plans, and missing parts. Exit code: 0 merged, 2 refused."
    )
    runs = parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    completion.completed_by(runs, completion.runs)
    add_results_option(parser.add_argument, default=RESULTS)
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="merge although parts or cases are missing; the report says which, as that of a run that was stopped",
    )
    parser.add_argument(
        "--accuracy-only",
        action="store_true",
        help="merge runs of different devices, without step times, memory and energy, which are no one figure",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def merge(options: argparse.Namespace) -> int:
    from mpscale.core.runs import resolve_run
    from mpscale.harness.merge import Merger
    from mpscale.harness.merged_folder import write_merged
    from mpscale.report.files import WRITTEN, rebuild
    from mpscale.report.missing import lacks
    from mpscale.report.table import json_document

    results = Path(options.results)
    paths = [resolve_run(name, results) for name in options.runs]
    merger = Merger.of(paths, options.allow_missing, options.accuracy_only)
    warn([f"{part.name}: {problem}" for part in merger.parts for problem in part.run.problems])
    run = rebuild(write_merged(merger, results), results)
    warn(run.problems)
    said = lacks(run)
    if said:
        say(f"{run.name} is not complete. {said}")
    files = [str(run.path / name) for name in WRITTEN]
    if options.json:
        parts = [part.name for part in merger.parts]
        about = {"run": run.name, "path": str(run.path), "parts": parts, "missing_parts": list(merger.missing_parts)}
        counts = {"cases": len(run.records), "not_started": len(run.not_started), "problems": run.problems}
        print(json_document("merge", {**about, **counts, "files": files}), end="")
        return OK
    print(*map(visible, files), sep="\n")
    return OK
