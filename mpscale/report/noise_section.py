"""The section of a report on how much step times move by themselves."""

from __future__ import annotations

import math

from mpscale.analysis.noise_floor import FEWEST_RUNS, Floors, assumed_floor, pooled
from mpscale.analysis.quantities import QUANTITIES, SINGLE_RUN, values
from mpscale.analysis.runs import Run
from mpscale.analysis.summary import plain_rows
from mpscale.analysis.trainings import Row
from mpscale.report import cells
from mpscale.report.tables import markdown_table

_TIME = QUANTITIES["step_time"]


def noise(run: Run, floors: Floors) -> str:
    """Spread between processes of this run and between runs of this code, for who wants to judge a change by it.

    Args:
        run: the run.
        floors: how much runs of its code differ, where that is known.
    """
    cases: dict[tuple[str, str], list[Row]] = {}
    for case in plain_rows(run.cases):
        cases.setdefault((case["workload"], case["mode"]), []).append(case)
    assumed = assumed_floor([cases], _TIME)
    rows = []
    for row in plain_rows(run.summary):
        place = (row["workload"], row["mode"])
        times = values(cases[place], _TIME)
        if not times:
            continue
        variance, degrees = pooled([times])
        known = floors.get("step_time", place)
        floor = known or assumed
        text = cells.DASH if floor is None else f"{floor.limit:.1%}{'' if known else '?'}"
        rows.append([*place, cells.count(len(times)), f"{math.sqrt(variance):.1%}" if degrees else cells.DASH, text])
    if not rows:
        return ""
    table = markdown_table(["workload", "mode", "processes", "spread of processes", "noise floor"], rows)
    return f"{table}\n\n{_basis(floors)}"


def _basis(floors: Floors) -> str:
    if floors.runs:
        return (
            f"Spread: standard deviation. Noise floor: two runs of this code here differ by less in 19 of 20 cases, by "
            f"{len(floors.runs)} runs of it on this machine."
        )
    return (
        f"Spread: standard deviation. As a baseline this is a {SINGLE_RUN} (?): how much runs of this code differ here "
        f"is not known until there are {FEWEST_RUNS} of them, and a comparison goes by the spread of processes."
    )
