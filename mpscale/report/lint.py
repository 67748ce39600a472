"""The findings of `mpscale lint`, and those that a run made at its start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mpscale.core.given import Given, given
from mpscale.core.lint import Finding, InModes, Severity, merged, of_cell
from mpscale.core.reason import Reason
from mpscale.core.record import Record, grouped
from mpscale.core.runs import Run
from mpscale.report.table import Cell, Look, Table, joined, json_document, listed, plural
from mpscale.terminal.streams import PIPE, Surface, visible

_LAYERS = 6
"""Most layers in a cell."""
_LOOKS: dict[Severity, Look] = {Severity.PROBLEM: "bad", Severity.CAUTION: "weak", Severity.NOTE: "unknown"}
_STYLES = {Severity.PROBLEM: "bold red", Severity.CAUTION: "bold yellow", Severity.NOTE: "bold"}
_HEADERS = ("severity", "check", "layers", "modes", "what was found", "what to do")
_NOTE = (
    "Found in the first training of each mode, before its first step. `mpscale lint` also takes a step and looks at "
    "whole arrays; its guide explains each check."
)


def render(
    workload: str,
    device: str,
    modes: Sequence[str],
    findings: Sequence[InModes],
    failed: Mapping[str, Reason],
    form: str,
    surface: Surface = PIPE,
) -> str:
    """The result of the command in one of its formats.

    Args:
        workload: its name.
        device: the name of the device on which it was built.
        modes: in which it was looked at.
        findings: the worst first.
        failed: {mode: why it could not be looked at to the end}.
        form: ``table``, ``markdown``, ``csv`` or ``json``.
        surface: what the place of the result can show.
    """
    if form == "json":
        about: dict[str, Any] = {"workload": workload, "device_name": device, "modes": list(modes)}
        about["findings"] = [each.to_json() for each in findings]
        return json_document("lint", about | {"failed": {mode: why.to_json() for mode, why in failed.items()}})
    if form == "csv":
        rows = [[*map(str, _row(each, len(each.finding.layers)))] for each in findings]
        return Table(_HEADERS, rows).csv()
    by_reason: dict[str, list[str]] = {}
    for mode, why in failed.items():
        by_reason.setdefault(str(why), []).append(mode)
    missing = [f"{joined(of)} could not be looked at to the end: {why}" for why, of in by_reason.items()]
    found = counted(each.finding for each in findings) or ("not looked at to the end" if failed else "nothing found")
    headline = f"{workload} in {joined(modes)} on {device}: {found}"
    if form == "markdown":
        return "\n\n".join(filter(None, [headline, table(findings).markdown(), *missing])) + "\n"
    parts = [surface.paint(surface.wrapped(visible(headline)), "bold")]
    for each in findings:
        finding = each.finding
        head = surface.paint(finding.severity, _STYLES[finding.severity])
        where = ", ".join(filter(None, [listed(finding.layers, _LAYERS), f"in {' and '.join(each.modes)}"]))
        lines = [f"{head} {finding.check}: {visible(where)}"]
        lines += [surface.wrapped(visible(text)) for text in (finding.text, f"do: {finding.cure}")]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *(surface.wrapped(visible(line)) for line in missing)]) + "\n"


def table(findings: Iterable[InModes]) -> Table:
    """A row per finding."""
    return Table(_HEADERS, [_row(each, _LAYERS) for each in findings])


def _row(each: InModes, most: int) -> list[Any]:
    finding = each.finding
    return [
        Cell(str(finding.severity), _LOOKS[finding.severity]),
        str(finding.check),
        listed(finding.layers, max(most, 1)) if finding.layers else "",
        ", ".join(each.modes),
        finding.text,
        finding.cure,
    ]


def counted(findings: Iterable[Finding]) -> str:
    """Such as ``1 problem, 2 cautions``; empty if there are none."""
    numbers = Counter(finding.severity for finding in findings)
    return ", ".join(plural(numbers[severity], severity) for severity in Severity if numbers[severity])


def of_run(run: Run) -> dict[str, list[InModes]]:
    """{workload: what the cases of a run found at their start}, without workloads for which there is nothing."""
    by_workload: dict[str, dict[str, list[Finding]]] = {}
    for (workload, mode), records in grouped(run.records).items():
        found = [finding for record in records for finding in of_cell(record["lint"])]
        if found:
            by_workload.setdefault(workload, {})[mode] = found
    return {workload: merged(by_mode) for workload, by_mode in by_workload.items()}


def section(run: Run) -> list[Table | str]:
    """The findings of a run, with a row for each workload and finding."""
    rows = [[workload, *_row(each, _LAYERS)] for workload, found in of_run(run).items() for each in found]
    return [Table(["workload", *_HEADERS], rows), _NOTE] if rows else []


def sentences(run: Run) -> Iterator[str]:
    """What a run found that is more than a note, in a sentence per workload."""
    for workload, found in of_run(run).items():
        told = [each.finding for each in found if each.finding.severity is not Severity.NOTE]
        if told:
            checks = listed(list(dict.fromkeys(finding.check.value for finding in told)), _LAYERS)
            yield f"{workload} has {counted(told)} ({checks}; see Lint)."


class News:
    """What a case found at its start that no case of its workload found before."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def of(self, record: Record) -> str | None:
        """A line for the terminal; None if there is nothing new, or only notes."""
        workload = record["workload"]
        new = [
            finding
            for finding in of_cell(record["lint"])
            if finding.severity is not Severity.NOTE and (workload, finding.check) not in self._told
        ]
        if not new:
            return None
        self._told |= {(workload, finding.check) for finding in new}
        checks = ", ".join(dict.fromkeys(finding.check.value for finding in new))
        # The command alone would not find the data of a function, nor what a script has sent.
        where = f"`mpscale lint {workload}` or the report" if given() == Given() else "the report"
        return f"{workload} has {counted(new)}: {checks}; {where} says what to do"
