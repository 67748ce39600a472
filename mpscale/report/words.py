"""Verdicts in words that people know. Codes, as in CSV, JSON and gates, stay as they are."""

from __future__ import annotations

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
    Verdict.INCONCLUSIVE: "too few seeds to tell",
}
"""What a report says for each verdict."""

AGAINST_RUN = WORDS | {
    Verdict.NON_INFERIOR: "as good",
    Verdict.WORSE: "worse",
    Verdict.INCONCLUSIVE: "cannot tell",
}
"""What a comparison says: its metrics are judged against the baseline's run, not against fp32."""
