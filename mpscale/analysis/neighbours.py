"""Many runs, each against one before it: the comparisons behind a history and a site.

The verdicts are those of :mod:`mpscale.analysis.compare`. What differs from `mpscale compare` is that runs are already
in memory, so that the noise floors of a thousand comparisons do not read a thousand folders each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

from mpscale.analysis.compare import ComparedRow, Comparison, compare
from mpscale.analysis.history import Series, oldest_first
from mpscale.analysis.noise_floor import MOST_RUNS, Floors, floors_among
from mpscale.analysis.pairs import State
from mpscale.analysis.quantities import Verdict
from mpscale.analysis.versions import versions_key
from mpscale.core.machines import environment_facts, hardware
from mpscale.core.record import Record, common
from mpscale.core.runs import Run, RunError


class Neighbours:
    """Compares runs with each other, each pair once.

    Args:
        runs: in any order; if several have the same name, the first counts.
        by_name: see :func:`mpscale.analysis.compare.compare`.
    """

    def __init__(self, runs: Sequence[Run], by_name: bool = False) -> None:
        self.by_name = by_name
        self._runs = {run.name: run for _, run in oldest_first(runs)}
        self._comparisons: dict[tuple[str, str], Comparison | RunError] = {}
        self._rows: dict[tuple[str, str], dict[str, ComparedRow]] = {}
        self._floors: dict[tuple[str, ...], Floors] = {}

    def comparison(self, before: str, after: str) -> Comparison:
        """The comparison of two runs, by name.

        Raises:
            RunError: they cannot be compared.
        """
        pair = before, after
        if pair not in self._comparisons:
            try:
                floors = self.floors(before, leave_out=after)
                sides = self._runs[before], self._runs[after]
                self._comparisons[pair] = compare(*sides, floors=floors, by_name=self.by_name)
            except RunError as error:
                self._comparisons[pair] = error
        found = self._comparisons[pair]
        if isinstance(found, RunError):
            raise found
        return found

    def verdict(self, series: Series, quantity: str, before: str, after: str) -> Verdict | None:
        """The verdict on a quantity of a series between two of its runs; None if a comparison does not judge it."""
        try:
            comparison = self.comparison(before, after)
        except RunError:
            return None
        pair = before, after
        if pair not in self._rows:
            paired = [row for row in comparison.rows if row.pair.state is State.PAIRED]
            self._rows[pair] = {self._key(case): row for row in paired for case in row.pair.other}
        row = self._rows[pair].get(series.key)
        if row is None:
            return None
        if quantity == "metric":
            return row.quality.verdict if row.quality is not None else None
        return row.changes[quantity].verdict if quantity in row.changes else None

    def higher_is_better(self, series: Series) -> bool | None:
        """The direction of the metric of a series; None if it is not known or not always the same."""
        run = self._runs[series.points[-1].run.name]
        cases = [case for case in run.records if case["workload"] == series.workload]
        found: bool | None = common(cases, "metric_higher_is_better")
        return found

    def floors(self, name: str, leave_out: str = "") -> Floors:
        """How much runs of the same code as the named one differ, without one of them; from the newest ones."""
        code = self._codes[name]
        names = () if code is None else tuple(each for each in self._same_code[code] if each != leave_out)[-MOST_RUNS:]
        if names not in self._floors:
            self._floors[names] = floors_among([self._runs[each] for each in names])
        return self._floors[names]

    def before(self, name: str) -> str | None:
        """The run to compare a run with: the last one before it on the same machine, with the same preset and rows.

        That is the last one that has half of its rows, or else the last one that has any of them. None if there is
        none.
        """
        mine, some = self._series[name], None
        group = self._groups[self._group_of[name]]
        for other in reversed(group[: group.index(name)]):
            shared = len(mine & self._series[other])
            if 2 * shared >= len(mine) > 0:
                return other
            some = some or (other if shared else None)
        return some

    @cached_property
    def _codes(self) -> dict[str, str | None]:
        """What has to be equal for two runs to be of the same code; None if that is not known."""
        return {
            name: json.dumps([run.info.get("method_version"), hardware(run), environment_facts(run)], default=str)
            if run.info
            else None
            for name, run in self._runs.items()
        }

    @cached_property
    def _same_code(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, code in self._codes.items():
            if code is not None and self._runs[name].finished:
                found.setdefault(code, []).append(name)
        return found

    @cached_property
    def _series(self) -> dict[str, set[str]]:
        return {name: {self._key(case) for case in run.records} - {"None"} for name, run in self._runs.items()}

    def _key(self, case: Record) -> str:
        return str(versions_key(case, self.by_name))

    @cached_property
    def _group_of(self) -> dict[str, str]:
        """Machine and preset."""
        found = {}
        for name, run in self._runs.items():
            settings = run.info.get("settings")
            preset = settings.get("preset") if isinstance(settings, dict) else None
            found[name] = json.dumps([hardware(run), preset], sort_keys=True, default=str)
        return found

    @cached_property
    def _groups(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, group in self._group_of.items():
            found.setdefault(group, []).append(name)
        return found
