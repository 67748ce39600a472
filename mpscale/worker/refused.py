"""A workload that is refused for something that `mpscale lint` has a check for."""

from __future__ import annotations

from mpscale.core.lint import Check, Finding, Severity


class Refused(ValueError):
    """What mpscale does not train, because its figures would be wrong. `mpscale lint` tells it with the other findings.

    Args:
        check: which check it is.
        text: what was found.
        cure: what to do.
    """

    def __init__(self, check: Check, text: str, cure: str) -> None:
        super().__init__(f"{text}; {cure}")
        self.finding = Finding(check, Severity.PROBLEM, text, cure)
