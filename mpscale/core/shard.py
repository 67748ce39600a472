"""The parts of a plan that several machines run, ``--mp-shard I/N``: which case belongs to which part."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpscale.core.case import CaseId

MOST_PARTS = 1000
"""Of a plan. Starting a session takes as long as some cases."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several parts of a plan; ``2/3`` is the second of three."""

    part: int
    of: int

    def __str__(self) -> str:
        return f"{self.part}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The inverse of ``str``.

        Raises:
            ValueError: the text does not name a part.
        """
        found = re.fullmatch(r"\s*([0-9]{1,4})\s*/\s*([0-9]{1,4})\s*", text)
        shard = cls(int(found[1]), int(found[2])) if found else None
        if shard is None or not 1 <= shard.part <= shard.of <= MOST_PARTS:
            raise ValueError(
                f"expected I/N such as 2/3, which is the second of three parts, with I from 1 to N and N at most "
                f"{MOST_PARTS}, not {text[:40]!r}"
            )
        return shard


@dataclass(frozen=True, slots=True)
class Share:
    """The cases of one part, as run.json keeps it under ``shard``.

    Args:
        shard: which part.
        plan: ids of all cases of all parts: groups as planned, sorted within each, so that parts of one plan agree
            although each has shuffled the modes of a group in its own way.
    """

    shard: Shard
    plan: Sequence[str]

    @classmethod
    def of_plan(cls, cases: Iterable[CaseId], shard: Shard) -> Share:
        """Make a part of a plan, whose cases come in the order in which they would run."""
        groups: dict[tuple[str, int, int], list[str]] = {}
        for case in cases:
            groups.setdefault(group_of(case), []).append(str(case))
        return cls(shard, [case_id for ids in groups.values() for case_id in sorted(ids)])

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {"part": self.shard.part, "of": self.shard.of, "plan": list(self.plan)}

    @classmethod
    def of_run(cls, info: Mapping[str, Any]) -> Share | None:
        """The part in a run.json; None if the run is no part, or what it says is not as it should be."""
        found = info.get("shard")
        if not isinstance(found, dict):
            return None
        part, of, plan = (found.get(name) for name in ("part", "of", "plan"))
        if not (type(part) is type(of) is int and 1 <= part <= of <= MOST_PARTS):
            return None
        if not (isinstance(plan, list) and all(isinstance(one, str) and CaseId.parse(one) for one in plan)):
            return None
        return cls(Shard(part, of), plan)

    def parts(self) -> dict[str, int]:
        """The part that each case of the plan belongs to, from 1.

        A group is never divided. Larger groups are dealt first, each to the part with the fewest cases so far, so that
        the numbers of cases differ by one group at most. Groups of one size are dealt in turn, in the order of the
        plan: each part gets as many trainings of a workload as any other, or one less, and as many repeats. Nobody
        knows how long a case takes before it has run, so cases are counted.
        """
        cases = [(case_id, CaseId.parse(case_id)) for case_id in self.plan]
        groups = {case_id: group_of(case) for case_id, case in cases if case is not None}
        parts = [(0, part) for part in range(1, self.shard.of + 1)]
        dealt = {}
        for group, size in Counter(groups.values()).most_common():  # equal ones as they come
            cases_so_far, part = parts[0]
            dealt[group] = part
            heapq.heapreplace(parts, (cases_so_far + size, part))
        return {case_id: dealt[group] for case_id, group in groups.items()}

    def own(self) -> set[str]:
        """Ids of the cases of this part."""
        return {case_id for case_id, part in self.parts().items() if part == self.shard.part}

    def words(self) -> str:
        """Say how many of the plan's cases the part has."""
        number, total = len(self.own()), len(self.plan)
        which = f"part {self.shard.part} of {self.shard.of}"
        if number:
            return f"{which}: {number} of {total} cases"
        groups = len({group_of(case) for one in self.plan if (case := CaseId.parse(one))})
        return (
            f"{which} has nothing to do: the {total} cases are {groups} groups of a workload and a seed or repeat, and "
            "a group is not divided"
        )


def group_of(case: CaseId) -> tuple[str, int, int]:
    """What stays on one machine: workload, seed and repeat, in all modes and at every batch and loss scale."""
    return case.workload, case.seed, case.repeat
