"""What a check can find: a problem (a ``Reason``), a caution, or a note (a text)."""

from __future__ import annotations

from dataclasses import dataclass

from mpscale.core.reason import Reason


@dataclass(frozen=True, slots=True)
class Caution(Reason):
    """What makes figures worse or doubtful, although a run is complete. It does not change the exit code."""


Finding = Reason | str
