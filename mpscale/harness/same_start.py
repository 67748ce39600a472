"""Holds the modes of a seed to the same start: a difference between them has to come from the precision alone."""

from __future__ import annotations

from mpscale.harness.case import Case
from mpscale.records import Record

_DIGESTS = {
    "initial_weights_digest": "initial weights",
    "data_order_digest": "order of the data",
    "data_digest": "data",
}


class SameStart:
    """Remembers the digests of the first case of each group and compares the others with them."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, int, int], tuple[str, dict[str, str]]] = {}

    def difference(self, case: Case, record: Record) -> str | None:
        """What ``case`` started from that an earlier mode of its group did not; None where all is equal.

        A case that died before it had digests is not judged.
        """
        digests = {name: record[name] for name in _DIGESTS if record[name] is not None}
        if len(digests) < len(_DIGESTS):
            return None
        mode, first = self._first.setdefault(case.group, (case.mode, digests))
        differing = [
            f"{what} ({digests[name]}, {mode} had {first[name]})"
            for name, what in _DIGESTS.items()
            if digests[name] != first[name]
        ]
        return f"did not start like {mode}: other {', '.join(differing)}" if differing else None
