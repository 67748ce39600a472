"""The last step of action.yml, `verdicts.py RUN`: says what a run came to, wherever somebody may look.

As annotations of the gates that fired or could not tell, in the summary of the job, and in one comment on the pull
request, which every further run updates. What cannot be said there never fails the job: that is for the gates.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscale.analysis.answer import Cell
from mpscale.analysis.quantities import COSTS
from mpscale.analysis.versions import ModelChange, in_words
from mpscale.core.columns import FAILED
from mpscale.core.files import reading
from mpscale.core.runs import Run, RunError, read_run
from mpscale.report.about import device_name
from mpscale.report.cell import chips, quality_line, ratio_text, speed_word
from mpscale.report.first_screen import QUESTION, first_screen
from mpscale.report.github_summary import artifacts_page, github_summary
from mpscale.report.table import DASH, Table, escape, plural
from mpscale.report.words import WORDS

ANNOTATIONS = 10
"""GitHub shows as many errors, and as many warnings, of a step."""
COMMENT, SUMMARY = 65_000, 1_000_000
"""GitHub takes comments of at most 65,536 characters and summaries of at most 1 MiB."""
LINES = 20
"""Most gates that a comment lists."""
TRIES = 4

GOOD, BAD, UNKNOWN, EVEN = "✅", "❌", "❔", "⚪"
_SYMBOLS = {
    "faster": GOOD, "less": GOOD, "non-inferior": GOOD, "passed": GOOD,
    "slower": BAD, "more": BAD, "worse": BAD, "missing": BAD, "fired": BAD,
    "same": EVEN, "new": EVEN, "not-applicable": EVEN,
}  # fmt: skip
_TRAINS = {"worse": "trains worse", "non-inferior": "trains as well", "inconclusive": "cannot tell"}
"""Verdicts on a metric against that of the baseline's run, and not against fp32."""


def symbol(verdict: str) -> str:
    """The picture beside a verdict's word."""
    return _SYMBOLS.get(verdict, UNKNOWN)


def matrix(rows: Sequence[Mapping[str, Any]], cell: Callable[[Any], str]) -> str:
    """Return a markdown table of workloads by modes, in the order in which they first come."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    cells = {(row["workload"], row["mode"]): cell(row) for row in rows}
    workloads = dict.fromkeys(row["workload"] for row in rows)
    lines = [[workload, *(cells.get((workload, mode), DASH) for mode in modes)] for workload in workloads]
    # The table escapes what people named.
    return Table(["", *modes], lines).markdown()


def of_change(row: Mapping[str, Any]) -> str:
    """What became of a row of the baseline."""
    if row["state"] != "paired":
        return f"{symbol(row['state'])} {row['state'].replace('-', ' ')}"
    parts = []
    for name, change in row["changes"].items():
        verdict = change["verdict"]
        # Time is always told, other costs only if they changed.
        if name == "step_time" or symbol(verdict) in (GOOD, BAD):
            what = "" if name == "step_time" else f"{COSTS[name].title}: "
            number = "" if change["change"] is None else f" {change['change']:+.1%}"
            parts.append(f"{symbol(verdict)} {what}{WORDS.get(verdict, verdict)}{number}")
    if row["metric"] is not None:
        verdict = row["metric"]["verdict"]
        parts.append(f"{symbol(verdict)} {_TRAINS.get(verdict, verdict)}")
    if row["model_changes"]:
        parts.append("the model changed")
    if row["newly_failed"]:
        parts.append(f"{BAD} {len(row['newly_failed'])} failed")
    return " · ".join(parts) or f"{UNKNOWN} not measured"


def of_mode(cell: Cell) -> str:
    """What a mode comes to within its run."""
    parts = [f"{symbol(cell.speed or '')} {ratio_text(cell)} {speed_word(cell)}"]
    parts += [f"{symbol(cell.quality)} {quality_line(cell)}"] if cell.quality is not None else []
    return " · ".join([*parts, *chips(cell)])


def annotations(found: Mapping[str, Any]) -> list[str]:
    """Return the workflow commands that show the gates which fired or could not tell beside the job."""
    gates = found["gates"]
    lines = [command("error" if found["fails"] else "warning", "mpscale", found["note"])] if found["note"] else []
    for level, outcome in (("error", "fired"), ("warning", "cannot-tell")):
        those = [gate for gate in gates if gate["outcome"] == outcome]
        shown = those if len(those) <= ANNOTATIONS else those[: ANNOTATIONS - 1]
        for gate in shown:
            against = f" (baseline {gate['baseline']})" if gate["baseline"] else ""
            text = f"{outcome}: {_row(gate)}: {gate['text']}{against}"
            lines.append(command(level, f"mpscale {gate['gate']}", text))
        if len(those) > len(shown):
            lines.append(command(level, "mpscale", f"and {len(those) - len(shown)} more: see the job summary"))
    return [*lines, command("notice", "mpscale", in_short(found))] if gates else lines


def command(level: str, title: str, text: str) -> str:
    """Return a workflow command. GitHub reads its properties up to a colon and its text up to the end of the line."""
    plain = {"%": "%25", "\r": "%0D", "\n": "%0A"}
    for mark, code in plain.items():
        title, text = title.replace(mark, code), text.replace(mark, code)
    return f"::{level} title={title.replace(':', '%3A').replace(',', '%2C')}::{text}"


def in_short(found: Mapping[str, Any]) -> str:
    """Return what the gates came to, in a sentence."""
    outcomes = [gate["outcome"] for gate in found["gates"] if gate["outcome"] != "not-applicable"]
    if not outcomes:
        return str(found["note"] or f"compared with {found['baseline']}; there are no gates")
    words = {"fired": "fired", "cannot-tell": "could not tell", "passed": "passed"}
    counted = [f"{outcomes.count(code)} {word}" for code, word in words.items() if code in outcomes]
    against = f" against {found['baseline']}" if found["baseline"] else ""
    return "; ".join(filter(None, [found["note"], f"gates{against}: {', '.join(counted)}"]))


def body(run: Run | None, found: Mapping[str, Any] | None, marker: str) -> str:
    """Return the comment: the gates first, then both matrices."""
    if run is None:
        return f"{marker}\n### {BAD} mpscale made no run\n\nThe log of the job says why.\n"
    fired = found is not None and found["fails"]
    heading = "a gate fired" if fired else "no gate fired" if found and found["gates"] else "no gate was judged"
    mark = BAD if fired else GOOD if heading == "no gate fired" else UNKNOWN
    if failed := [record for record in run.records if record["status"] in FAILED]:
        mark, heading = BAD, f"{heading}, {plural(len(failed), 'case')} failed"
    parts = [f"{marker}\n### {mark} mpscale: {heading}", f"On {escape(device_name(run) or 'an unknown device')}."]
    if found is not None:
        said = escape(in_short(found))
        parts.append(f"{said[:1].upper()}{said[1:]}.")
        parts.append("\n".join(_loud(found["gates"])))
        for compared in found["comparisons"]:
            parts.append(f"**Against the baseline**\n\n{matrix(compared['rows'], of_change)}")
            parts.append("\n".join(_models(compared["rows"])))
    screen = first_screen(run)
    cells = [cell for by_mode in screen.answer.cells.values() for cell in by_mode.values()]
    within = matrix([{"cell": cell, **cell.row} for cell in cells], lambda row: of_mode(row["cell"]))
    parts.append(f"**{escape(QUESTION)} {escape(screen.headline)}**\n\n{within}")
    if page := artifacts_page(os.environ):
        parts.append(f"[Report and files]({page})")
    text = "\n\n".join(filter(None, parts))
    return (text if len(text) <= COMMENT else text[:COMMENT].rpartition("\n")[0] + "\n\n… cut; see the job") + "\n"


def _models(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each workload whose model changed, with what did."""
    changed = [(row["workload"], in_words([ModelChange(**each) for each in row["model_changes"]])) for row in rows]
    return [f"- {escape(f'{name}: the model changed: {said}')}" for name, said in dict.fromkeys(changed) if said]


def _loud(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each gate that fired, then for each that could not tell, up to a number."""
    loud = [gate for outcome in ("fired", "cannot-tell") for gate in gates if gate["outcome"] == outcome]
    lines = [f"- {symbol(g['outcome'])} `{g['gate']}` {escape(_row(g))}: {escape(g['text'])}" for g in loud[:LINES]]
    return lines + ([f"- and {len(loud) - LINES} more: see the job summary"] if len(loud) > LINES else [])


def _row(gate: Mapping[str, Any]) -> str:
    return " ".join(gate["row"] or ["no row"])


class Refused(Exception):
    """GitHub did not do what it was asked; the text says why."""


def ask(method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:
    """Call GitHub's API, again after a moment if it is out of order.

    Raises:
        Refused: it did not work. Its ``args`` are the reason and, if GitHub gave one, the HTTP status.
    """
    request = urllib.request.Request(
        f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}{path}",
        data=None if content is None else json.dumps(content).encode(),
        method=method,
        headers={
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
            "Content-Type": "application/json",
            "User-Agent": "mpscale",
        },
    )
    for attempt in range(1, TRIES + 1):
        status, wait = None, 2.0**attempt
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            status, why = error.code, f"GitHub answered {error.code} {error.reason}"
            limited = error.code == 429 or "Retry-After" in error.headers
            if error.code < 500 and not limited:
                raise Refused(why, status) from error
        except (OSError, ValueError) as error:
            why = f"GitHub could not be reached: {error}"
        if attempt < TRIES:
            time.sleep(wait * float(os.environ.get("MPSCALE_PATIENCE", "1")))
    raise Refused(f"{why}, {TRIES} times", status)


def comment(text: str, marker: str) -> str:
    """Write the comment, or update the one of an earlier run; return what was done, or why not."""
    event = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
    number = event.get("pull_request", {}).get("number")
    if number is None:
        return "no comment: this is not the job of a pull request"
    if not os.environ.get("GITHUB_TOKEN"):
        return "no comment: the job has no token; the job summary has the verdicts"
    try:
        earlier = next((each["id"] for each in _comments(number) if _is_ours(each, marker)), None)
        if earlier is None:
            return f"commented: {ask('POST', f'/issues/{number}/comments', {'body': text})['html_url']}"
        return f"comment updated: {ask('PATCH', f'/issues/comments/{earlier}', {'body': text})['html_url']}"
    except Refused as error:
        why, status = error.args
        if status in (401, 403, 404):
            why += (
                ". The token of this job may not write to the pull request: that of a fork never may, another needs "
                "`permissions: pull-requests: write`"
            )
        return f"no comment: {why}. The job summary has the verdicts"


def _comments(number: int) -> Iterable[Mapping[str, Any]]:
    for page in range(1, 31):
        found = ask("GET", f"/issues/{number}/comments?per_page=100&page={page}")
        yield from found
        if len(found) < 100:
            return


def _is_ours(each: Mapping[str, Any], marker: str) -> bool:
    """Whether a comment is from an earlier run. Anyone can write the marker, so only a trusted author counts."""
    trusted = each["user"]["type"] == "Bot" or each["author_association"] in ("OWNER", "MEMBER", "COLLABORATOR")
    return trusted and each["body"].startswith(marker)


def main(folder: str) -> None:
    """Say what the run came to; ``folder`` is empty if there is none."""
    run, found = None, None
    try:
        run = read_run(Path(folder)) if folder else None
    except RunError as error:
        print(command("warning", "mpscale", str(error)))
    if run is not None and (file := run.path / "comparison.json").is_file():
        try:
            found = reading.read_json(file, reading.SUMMARY)
            print("\n".join(annotations(found)))
        except RunError as error:
            print(command("warning", "mpscale", str(error)))
    marker = f"<!-- mpscale: {os.environ['NAME']} -->"
    text = body(run, found, marker)
    parts = [text] + ([] if run is None else [github_summary(run, SUMMARY // 2, artifacts_page(os.environ))])
    if run is not None and (file := run.path / "comparison.md").is_file():
        try:
            parts.append(reading.read_text(file, reading.REPORT))
        except RunError as error:
            print(command("warning", "mpscale", str(error)))
    with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
        summary.write("\n\n".join(parts).encode()[:SUMMARY].decode(errors="ignore"))
    if os.environ["COMMENT"] == "true":
        print(command("notice", "mpscale", comment(text, marker)))


if __name__ == "__main__":
    main(sys.argv[1])
