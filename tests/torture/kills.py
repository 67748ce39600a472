"""Signals at random moments."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from torture.rounds import Blow, Disturb, Session

_WAITS_S = {-1: 3.0, 0: 6.0}
"""How long the start of a session takes, and its first case, which waits for TensorFlow."""
_CASE_S = 1.3
"""How long each further case takes, and the reports."""


def plan(rng: Random, cases: int) -> list[Disturb]:
    """Return how the sessions of a round are disturbed: one to three, with one to three blows each.

    Args:
        rng: chooses.
        cases: how many there are.
    """
    return [_several(rng.choice([1, 1, 1, 2, 2, 3]), cases) for _ in range(rng.choice([1, 1, 2, 2, 3]))]


def _several(blows: int, cases: int) -> Disturb:
    def disturb(session: Session, rng: Random) -> Iterator[Blow]:
        done = len(session.journal().good())
        after = -2
        for _ in range(blows):
            if after >= -1 and rng.random() < 0.5:  # such as a second Ctrl-C
                reached = session.reach(after, rng.uniform(0, 0.4))
            else:
                after = max(after, rng.randint(-1, cases - done))
                reached = session.reach(after, rng.uniform(0, _WAITS_S.get(after, _CASE_S)))
            if not reached:
                return
            session.look()
            if blow := session.blow(rng):
                yield blow

    return disturb
