"""A word on the speed of a mode while the run goes on."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpscale.core.record import Record


class SoFar:
    """Judges a mode by the cases that have ended, as the table at the end will judge it by all of them."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Record]] = defaultdict(dict)
        """The last attempts by workload, as tables name it, and case: modes are compared within a workload."""

    def know(self, record: Record) -> None:
        """Take a case that had ended before the session began."""
        self._records[record.place[0]][str(record["case_id"])] = record

    def __call__(self, record: Record) -> tuple[str, str]:
        """Return a word and its look; empty as long as the cases show no difference."""
        from mpscale.analysis.answer import speed_verdict
        from mpscale.analysis.quantities import Verdict
        from mpscale.analysis.summary import summarise
        from mpscale.core.record import place_of
        from mpscale.report.words import WORDS

        self.know(record)
        # If a workload goes on without XLA, what was measured with it is about to be measured again.
        alike = [each for each in self._records[record.place[0]].values() if each["jit"] == record["jit"]]
        try:
            row = next(row for row in summarise(alike) if place_of(row) == record.place)
            verdict = speed_verdict(row)
        except (ValueError, StopIteration):  # such as a step time of 0, which the report will speak of
            return "", ""
        looks = {Verdict.FASTER: "good", Verdict.SLOWER: "bad"}
        return (f"{WORDS[verdict]} so far", looks[verdict]) if verdict in looks else ("", "")
