"""The command ``site``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpscale.cli.output import OK, RESULTS, fail, live_line, warn
from mpscale.config import add_compare_by_option, folder, load, results_folder
from mpscale.terminal.streams import visible


def site_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write static pages over the runs of results folders, ready for GitHub Pages: an index, the report of each "
        "run, its comparison with the run before on the same machine, and a history. Running it again brings the "
        "pages up to date; only files that it has made itself are replaced or removed."
    )
    parser.add_argument("folder", type=folder, metavar="DIR", help="where to: a folder that is new, empty or a site")
    parser.add_argument(
        "results",
        nargs="*",
        type=folder,
        metavar="RESULTS",
        help=f"results folders, which hold runs/ and reference/ (default: `results` of [tool.mpscale], else {RESULTS})",
    )
    parser.add_argument("--title", default="mpscale", help="title of the index (default: mpscale)")
    add_compare_by_option(parser.add_argument)


def site(options: argparse.Namespace) -> int:
    from mpscale.report.site import SiteError, write_site

    line = live_line()

    def progress(done: int, total: int, name: str) -> None:
        line.update(f"[{done + 1}/{total}] {name}")

    try:
        by_name = load(Path.cwd()).override(compare_by=options.compare_by).compare_by == "name"
        results = options.results or [results_folder(Path.cwd())]
        made = write_site(options.folder, results, options.title, progress, by_name)
    except SiteError as error:
        return fail(str(error))
    finally:
        line.update("")
    warn([f"{what}: {why}" for what, why in made.broken])
    _print(made.index, made.runs, len(made.removed))
    return OK


def _print(index: Path, runs: int, removed: int) -> None:
    from mpscale.report.table import plural

    gone = f", {plural(removed, 'old page')} removed" if removed else ""
    print(visible(f"{index}") + f": {plural(runs, 'run')}{gone}")
