"""Verdicts, doubts and metrics in words that people know. Codes, as in CSV, JSON and gates, stay as they are."""

from __future__ import annotations

from mpscale.analysis.claim import Doubt
from mpscale.analysis.overall import Overall
from mpscale.analysis.quantities import Verdict

WORDS = {
    Verdict.FASTER: "faster",
    Verdict.SLOWER: "slower",
    Verdict.LESS: "less",
    Verdict.MORE: "more",
    Verdict.SAME: "the same",
    Verdict.CANNOT_TELL: "no difference shown",
    Verdict.NOT_COMPARABLE: "not comparable",
    Verdict.NON_INFERIOR: "as good as fp32",
    Verdict.WORSE: "worse than fp32",
    # Not "too few seeds": the reason may also be a seed that failed, or a workload without a margin.
    Verdict.INCONCLUSIVE: "cannot tell",
}
"""What a report says for each verdict."""

DOUBTS = {
    Doubt.IDLE: "GPU idle",
    Doubt.DISPATCH: "dispatch-bound",
    Doubt.BUSY: "machine busy",
    Doubt.ONE_PAIR: "one process",
}
"""What a cell says for each doubt about a speed-up; :attr:`Doubt.text` says it in full."""

_METRICS = {"r2_score": "R²", "mean_absolute_error": "mean absolute error", "mean_squared_error": "mean squared error"}


def metric_name(name: str | None) -> str:
    """Return the name of a metric as people read it."""
    return "metric" if name is None else _METRICS.get(name, name.replace("_", " "))


AGAINST_RUN = WORDS | {
    Verdict.NON_INFERIOR: "as good",
    Verdict.WORSE: "worse",
}
"""What a comparison says: its metrics are judged against the baseline's run, not against fp32."""

OVERALL = {
    Overall.WORSE: "worse",
    Overall.BETTER: "better",
    Overall.SAME: "the same",
    Overall.NO_DIFFERENCE: "no difference shown",
    Overall.CANNOT_TELL: "cannot tell",
}
"""What a comparison says about a run as a whole."""
