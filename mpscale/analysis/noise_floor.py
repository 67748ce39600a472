"""How much a figure moves from one run of the same code to the next: what a change has to stand out from.

Processes of one run see one state of the machine, and runs hours apart see others, so the spread within a run says too
little. Where there are at least five runs of the same code on the same machine, it is taken from them. Else there is a
"single-run baseline", and runs are taken to differ by a multiple of what their processes do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import polygamma

from mpscale.analysis.quantities import QUANTITIES, Quantity, by_process, figures
from mpscale.analysis.stats import Between
from mpscale.core.record import Record
from mpscale.core.runs import Run, environment_differences, read_info, read_run, same_hardware
from mpscale.core.trainings import MEASURED

FEWEST_RUNS = 5
MOST_RUNS = 30
"""Older ones than these say less of the machine as it is now, and reading them takes time."""

ASSUMED_RATIO = 3.0
ASSUMED_LEAST, ASSUMED_MOST = 0.01, 0.10
"""What runs are taken to differ by where it is not known: see :func:`assumed_floor`."""

_MOST_DEGREES = 10.0
"""Of a moderated variance, however alike rows are: step times on a shared machine have longer tails than a normal
distribution, and a quantile of few degrees is further out.
"""

Place = tuple[str, str]
"""Workload and mode."""


@dataclass(frozen=True)
class Floors:
    """The noise floors of a baseline.

    Args:
        runs: names of the runs of the same code that they are made from, the baseline's among them.
        of: by the name of the quantity, by workload and mode; only what is known.
        left_out: runs that cannot be read, so that it is not known whether they belong to these: folder and reason.
    """

    runs: tuple[str, ...]
    of: Mapping[str, Mapping[Place, Between]]
    left_out: tuple[tuple[str, str], ...] = ()

    def get(self, quantity: str, place: Place) -> Between | None:
        """What is known of a quantity in a row."""
        return self.of.get(quantity, {}).get(place)


NO_FLOORS = Floors((), {})


def floors_of(baseline: Run, results: Path | None = None, leave_out: Sequence[str] = ()) -> Floors:
    """:func:`find_floors` of :func:`runs_of_the_same_code`, with what could not be read."""
    unreadable: list[tuple[str, str]] = []
    found = find_floors(runs_of_the_same_code(baseline, results, leave_out, unreadable))
    return replace(found, left_out=tuple(unreadable))


def runs_of_the_same_code(
    baseline: Run,
    results: Path | None = None,
    leave_out: Sequence[str] = (),
    unreadable: list[tuple[str, str]] | None = None,
) -> list[Run]:
    """The baseline and the runs like it, newest last: same code, same settings, same machine.

    They are looked for beside the baseline's folder and in the results folder. Same code is the same software and the
    same state of the repository; two runs outside a repository are of the same code if the software is the same.

    Args:
        baseline: what is looked for. A cases.csv by itself does not know its code.
        results: the results folder, if that is not where the baseline lies.
        leave_out: names of runs that do not count, such as the one to be judged.
        unreadable: gets the folders of runs that cannot be read, and why.
    """
    if not baseline.info:
        return [baseline]
    folders = [baseline.path.resolve().parent]
    if results is not None:
        folders += [(results / kept).resolve() for kept in ("runs", "reference")]
    infos = {path.parent.name: path for folder in dict.fromkeys(folders) for path in folder.glob("*/run.json")}
    found = {baseline.name: baseline}
    for name in sorted(infos, reverse=True):
        if len(found) >= MOST_RUNS:
            break
        if name in found or name in leave_out:
            continue
        folder = infos[name].parent
        try:
            # Most runs are of other code, which is known without their journals.
            if not _alike(baseline, Run(folder, name, read_info(infos[name]), [], False)):
                continue
            run = read_run(folder)
        except Exception as error:  # whatever another run stumbles over must not cost this one its report
            if unreadable is not None:
                unreadable.append((str(folder), str(error)))
            continue
        if run.finished:
            found[name] = run
    return [found[name] for name in sorted(found)]


def find_floors(runs: Sequence[Run]) -> Floors:
    """The floors that runs of the same code show; none where there are fewer than five.

    Args:
        runs: as :func:`runs_of_the_same_code` gives them.
    """
    if len(runs) < FEWEST_RUNS:
        return NO_FLOORS
    tables = [_by_row(run) for run in runs]
    found = {
        name: floors_from_samples([{row: figures(cases, quantity) for row, cases in table.items()} for table in tables])
        for name, quantity in QUANTITIES.items()
    }
    return Floors(tuple(run.name for run in runs), {name: floors for name, floors in found.items() if floors})


def assumed_floor(sides: Sequence[Mapping[Place, Sequence[Record]]], quantity: Quantity) -> Between | None:
    """What runs are taken to differ by where it is not known; None for a quantity that does not depend on the moment.

    Three times the standard deviation of processes within a run, over all rows, though not less than one percent nor
    more than ten; and as much as processes do where these differ by more. On a shared machine of two cores processes
    of one run differed by 3 to 5 % in one hour, and runs half an hour apart by up to 18 %; in another hour processes
    differed by 10 to 20 %, and runs by no more than follows from that.

    Args:
        sides: the cases of both runs by row.
        quantity: what is compared.
    """
    if not quantity.drifts:
        return None
    within, degrees = pooled([figures(cases, quantity) for side in sides for cases in side.values()])
    spread = math.sqrt(within)
    deviation = max(spread, min(max(ASSUMED_RATIO * spread, ASSUMED_LEAST), ASSUMED_MOST))
    return Between(deviation**2, float(degrees), 0) if degrees else None


def _alike(baseline: Run, run: Run) -> bool:
    same_settings = baseline.info.get("method_version") == run.info.get("method_version")
    return same_settings and same_hardware(baseline, run) and not environment_differences(baseline, run)


def _by_row(run: Run) -> dict[tuple[str, str, str], list[Record]]:
    """Cases by workload, mode and series key."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for case in run.records:
        if case["status"] in MEASURED and case["series_key"] is not None:
            found.setdefault((case["workload"], case["mode"], case["series_key"]), []).append(case)
    return found


def floors_from_samples(samples: Sequence[Mapping[tuple[str, str, str], Sequence[float]]]) -> dict[Place, Between]:
    """The spread of runs in each row that all of them have, what moves all rows alike apart from what moves one.

    A run's figure in a row is its mean, what the run did to all rows, and what it did to this one. The first is
    known from as many values as there are runs. The second has as many in each row, and rows are alike in it, so each
    row's variance is moderated by those of the others. Smyth, "Linear models and empirical Bayes methods", Statistical
    Applications in Genetics and Molecular Biology 2004;3:3.
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


def pair_noise(
    sides: Sequence[Mapping[Place, Sequence[Record]]], quantity: Quantity
) -> dict[Place, tuple[float, float]]:
    """Variance and degrees of freedom of the differences of pairs, of processes that ran in turns, on logarithms.

    Three pairs a row say little of their spread; the rows together say more, see :func:`moderated`.

    Args:
        sides: the cases of both runs by row.
        quantity: what is compared.
    """
    found = {}
    for place in sides[0]:
        one, two = (by_process(side[place], quantity) for side in sides)
        differences = [math.log(two[key] / one[key]) for key in one if key in two]
        if len(differences) > 1:
            found[place] = (float(np.var(differences, ddof=1)), len(differences) - 1)
    variances, degrees = moderated(*(np.array([pair[n] for pair in found.values()]) for n in range(2)))
    return dict(zip(found, zip(variances.tolist(), degrees.tolist(), strict=True), strict=True))


def moderated(
    variances: npt.NDArray[np.float64], degrees: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Variances of rows that are alike, each drawn towards what they have in common, and their degrees of freedom.

    Smyth 2004, section 6.2: their logarithms tell how much the true ones differ, hence how far to draw. Only upwards:
    a row that is noisier than others often is so for a reason.

    Args:
        variances: one a row, (rows,).
        degrees: of freedom of each, (rows,).
    """
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
    """The variance of logarithms within samples of positive values, and its degrees of freedom.

    Both are 0 where no sample has two values.
    """
    degrees = sum(len(sample) - 1 for sample in samples if len(sample) > 1)
    squares = math.fsum(float(np.var(np.log(sample))) * len(sample) for sample in samples if len(sample) > 1)
    return (squares / degrees, degrees) if degrees else (0.0, 0)
