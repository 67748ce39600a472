"""What a run answers: is mixed precision worth it here, what does it buy, what does it cost, can it be trusted?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpscale.analysis.claim import doubts_of
from mpscale.analysis.quantities import Verdict


def speed_verdict(row: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict on the speed of a row of the summary over its headline baseline.

    ``FASTER`` or ``SLOWER`` if the 95 % interval shows it and nothing speaks against the claim, else ``CANNOT_TELL``;
    None for the baseline itself and without a ratio. :func:`doubts_of` says what speaks against a claim.
    """
    baseline = row["headline_baseline"]
    ratio, low, high = (row[f"speedup_{baseline}{end}"] for end in ("", "_low", "_high"))
    if ratio is None or row["mode"] == baseline:
        return None
    if doubts_of(row, baseline) or low is None or high is None or low <= 1.0 <= high:
        return Verdict.CANNOT_TELL
    return Verdict.FASTER if low > 1.0 else Verdict.SLOWER
