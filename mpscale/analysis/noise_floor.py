"""How much a figure differs between runs of the same code: the noise that a change has to stand out from.

All processes of a run see one state of the machine, and a run hours later sees another, so the spread within a run is
too small. If there are at least five runs of the same code on the same machine, they show the noise. Otherwise there is
a "single-run baseline", and runs are assumed to differ by a multiple of the spread of their processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import polygamma

from mpscale.analysis.quantities import COSTS, Cost
from mpscale.analysis.stats import Between
from mpscale.core.case import Place
from mpscale.core.columns import MEASURED
from mpscale.core.machines import environment_differences, same_hardware
from mpscale.core.record import Record, grouped
from mpscale.core.runs import Run, by_age, read_info, read_run

FEWEST_RUNS = 5
MOST_RUNS = 30
"""Older runs say less about the machine as it is now, and reading them takes time."""

ASSUMED_RATIO = 3.0
ASSUMED_LEAST, ASSUMED_MOST = 0.01, 0.10
"""How much runs are assumed to differ: see :func:`assumed_floor`."""

_MOST_DEGREES = 10.0
"""Limit for a moderated variance, however similar the rows: step times on a shared machine have longer tails than a
normal distribution, and quantiles lie further out with few degrees of freedom.
"""
_Row = tuple[str, str, str]
"""Workload, mode and series key."""


@dataclass(frozen=True)
class Floors:
    """The noise floors of a baseline.

    Args:
        runs: names of the runs of the same code that they come from, including the baseline.
        of: by the name of the cost, then by workload and mode; only what is known.
        left_out: runs that cannot be read and might be of the same code: folder and reason.
    """

    runs: tuple[str, ...]
    of: Mapping[str, Mapping[Place, Between]]
    left_out: tuple[tuple[str, str], ...] = ()

    def get(self, quantity: str, place: Place) -> Between | None:
        """The floor of a cost in a row, None if it is not known."""
        return self.of.get(quantity, {}).get(place)


NO_FLOORS = Floors((), {})


def floors_of(baseline: Run, results: Path | None = None, leave_out: Sequence[str] = ()) -> Floors:
    """The floors that :func:`runs_of_the_same_code` show; none if there are fewer than five runs."""
    unreadable: list[tuple[str, str]] = []
    runs = runs_of_the_same_code(baseline, results, leave_out, unreadable)
    return floors_among(runs, tuple(unreadable))


def floors_among(runs: Sequence[Run], left_out: tuple[tuple[str, str], ...] = ()) -> Floors:
    """The floors that runs of the same code, settings and machine show; none if there are fewer than five.

    Args:
        runs: finished ones.
        left_out: runs that might belong to them and cannot be read: folder and reason.
    """
    if len(runs) < FEWEST_RUNS:
        return Floors((), {}, left_out)
    tables = [_by_row(run) for run in runs]
    found = {
        name: floors_from_samples([{row: cost.sample(cases) for row, cases in table.items()} for table in tables])
        for name, cost in COSTS.items()
    }
    return Floors(tuple(run.name for run in runs), {name: of for name, of in found.items() if of}, left_out)


def runs_of_the_same_code(
    baseline: Run,
    results: Path | None = None,
    leave_out: Sequence[str] = (),
    unreadable: list[tuple[str, str]] | None = None,
) -> list[Run]:
    """Find the baseline and the runs of the same code, settings and machine, oldest first.

    Looks beside the baseline's folder and in the results folder. Same code means the same software and the same state
    of the repository; outside a repository, the same software.

    Args:
        baseline: the run to match. A cases.csv does not name its code, so it matches only itself.
        results: the results folder, if the baseline lies elsewhere.
        leave_out: names of runs that do not count, such as the one to be judged.
        unreadable: receives the folders of runs that cannot be read, with the reason.
    """
    if not baseline.info:
        return [baseline]
    folders = [baseline.path.resolve().parent]
    if results is not None:
        folders += [(results / kept).resolve() for kept in ("runs", "reference")]
    infos = {path.parent.name: path for folder in dict.fromkeys(folders) for path in folder.glob("*/run.json")}
    found = {baseline.name: baseline}
    # What a run was merged from holds the same measurements: as two runs they would not differ at all.
    taken = {*baseline.origins, *leave_out}
    for name in (folder.name for folder in reversed(by_age(path.parent for path in infos.values()))):
        if len(found) >= MOST_RUNS:
            break
        if name in found or name in leave_out:
            continue
        folder = infos[name].parent
        try:
            # Most runs are of other code, and run.json alone shows that.
            info = Run(folder, name, read_info(infos[name]), [], False)
            if info.origins & taken:
                continue
            same_method = baseline.info.get("method_version") == info.info.get("method_version")
            if not same_method or not same_hardware(baseline, info) or environment_differences(baseline, info):
                continue
            run = read_run(folder)
        except Exception as error:  # whatever is wrong with another run must not cost this one its report
            if unreadable is not None:
                unreadable.append((str(folder), str(error)))
            continue
        if run.finished:
            found[name] = run
            taken |= run.origins
    by_path = {run.path: run for run in found.values()}
    return [by_path[path] for path in by_age(by_path)]


def assumed_floor(sides: Sequence[Mapping[Place, Sequence[Record]]], cost: Cost) -> Between | None:
    """The variance between runs to assume if it is not known; None for costs that do not drift.

    The standard deviation between runs is taken to be three times that of processes within a run, over all rows, but at
    least 1 % and at most 10 %, or as large as that of the processes if that is larger. On a shared machine with two
    cores, processes of a run differed by 3 to 5 % in one hour, and runs half an hour apart by up to 18 %; in another
    hour processes differed by 10 to 20 %, and runs by no more than that implies.

    Args:
        sides: the cases of both runs by row.
        cost: what is compared.
    """
    if not cost.drifts:
        return None
    within, degrees = pooled([cost.sample(cases) for side in sides for cases in side.values()])
    spread = math.sqrt(within)
    deviation = max(spread, min(max(ASSUMED_RATIO * spread, ASSUMED_LEAST), ASSUMED_MOST))
    return Between(deviation**2, float(degrees), 0) if degrees else None


def _by_row(run: Run) -> dict[_Row, list[Record]]:
    found: dict[_Row, list[Record]] = {}
    for place, cases in grouped(run.records).items():
        measured = [case for case in cases if case["status"] in MEASURED and case["series_key"] is not None]
        for key in dict.fromkeys(case["series_key"] for case in measured):
            found[*place, key] = [case for case in measured if case["series_key"] == key]
    return found


def floors_from_samples(samples: Sequence[Mapping[_Row, Sequence[float]]]) -> dict[Place, Between]:
    """The variance between runs in each row that all of them have.

    The figure of a run in a row is the mean of the row, plus an effect of the run on all rows, plus an effect of the
    run on this row. The common effect has one value per run. The own effect has one per run and row, with a similar
    variance in all rows, so each row's variance is moderated by those of the others. Smyth, "Linear models and
    empirical Bayes methods", Statistical Applications in Genetics and Molecular Biology 2004;3:3.
    """
    rows = [row for row in samples[0] if all(sample.get(row) for sample in samples)]
    if not rows:
        return {}
    figures = np.array([[np.mean(np.log(sample[row])) for row in rows] for sample in samples])
    degrees = len(samples) - 1
    centred = figures - figures.mean(axis=0)
    shift = centred.mean(axis=1)
    common = float(np.sum(shift**2)) / degrees
    own, own_degrees = np.zeros(len(rows)), math.inf
    if len(rows) > 1:
        rest = np.sum((centred - shift[:, None]) ** 2, axis=0) / (degrees * (1 - 1 / len(rows)))
        own, of_each = moderated(rest, np.full(len(rows), degrees))
        own_degrees = float(of_each[0])
    found = {}
    for row, variance in zip(rows, own.tolist(), strict=True):
        below = common**2 / degrees + variance**2 / own_degrees
        total = common + variance
        within, within_degrees = pooled([sample[row] for sample in samples])
        found[row[:2]] = Between(
            total, total**2 / below if below > 0 else float(degrees), len(samples), within, within_degrees
        )
    return found


def pair_noise(sides: Sequence[Mapping[Place, Sequence[Record]]], cost: Cost) -> dict[Place, tuple[float, float]]:
    """Variance and degrees of freedom of the log ratios of pairs, for interleaved runs.

    The few pairs of one row show little of their spread; all rows together show more, see :func:`moderated`.

    Args:
        sides: the cases of both runs by row.
        cost: what is compared.
    """
    found = {}
    for place in sides[0]:
        one, two = (cost.by_process(side[place]) for side in sides)
        differences = [math.log(two[key] / one[key]) for key in one if key in two]
        if len(differences) > 1:
            found[place] = (float(np.var(differences, ddof=1)), len(differences) - 1)
    variances, degrees = moderated(*(np.array([pair[n] for pair in found.values()]) for n in range(2)))
    return dict(zip(found, zip(variances.tolist(), degrees.tolist(), strict=True), strict=True))


def moderated(
    variances: npt.NDArray[np.float64], degrees: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shrink the variances of similar rows towards their common value, and return them with their degrees of freedom.

    Smyth 2004, section 6.2: the logarithms show how much the true variances differ, and so how far to shrink. Variances
    are only raised: there is often a reason why a row is noisier than others.

    Args:
        variances: one per row, (rows,).
        degrees: of freedom of each, (rows,).
    """
    from scipy.optimize import brentq  # loads slowly, and only a comparison needs it

    known = variances > 0
    if np.sum(known) < 2:
        return variances, degrees.astype(float)
    half = degrees[known] / 2
    centred = np.log(variances[known]) - polygamma(0, half) + np.log(half)
    spread = float(np.var(centred, ddof=1) - np.mean(polygamma(1, half)))
    mean = float(np.mean(centred))
    if spread <= 0:
        return np.maximum(variances, math.exp(mean)), np.full(len(variances), _MOST_DEGREES)
    prior = 2 * brentq(lambda x: float(polygamma(1, x)) - spread, 1e-6, 1e9)
    common = math.exp(mean + float(polygamma(0, prior / 2)) - math.log(prior / 2))
    drawn = (prior * common + degrees * variances) / (prior + degrees)
    return np.maximum(variances, drawn), np.minimum(prior + degrees, np.maximum(degrees, _MOST_DEGREES))


def pooled(samples: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The pooled variance of logarithms within samples of positive values, and its degrees of freedom.

    Both are 0 if no sample has two values.
    """
    degrees = sum(len(sample) - 1 for sample in samples if len(sample) > 1)
    squares = math.fsum(float(np.var(np.log(sample))) * len(sample) for sample in samples if len(sample) > 1)
    return (squares / degrees, degrees) if degrees else (0.0, 0)
