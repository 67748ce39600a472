"""Signals at random moments."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from torture.found import Reference
from torture.rounds import Blow, Disturb, Session


def plan(rng: Random, reference: Reference) -> list[Disturb]:
    """Return how the sessions of a round are disturbed: one to three, with one to three blows each."""
    return [_several(rng.choice([1, 1, 1, 2, 2, 3]), reference) for _ in range(rng.choice([1, 1, 2, 2, 3]))]


def _several(blows: int, reference: Reference) -> Disturb:
    cases = len(reference.cases)

    def disturb(session: Session, rng: Random) -> Iterator[Blow]:
        left = cases - len(session.journal().good())
        after = -2
        for _ in range(blows):
            if after >= -1 and rng.random() < 0.5:  # such as a second Ctrl-C
                reached = session.reach(after, rng.uniform(0, 0.8))
            else:
                after = max(after, rng.randint(-1, left))
                reached = session.reach(after, rng.uniform(0, reference.pace.after(after, left)))
            if not reached:
                return
            session.look()
            if blow := session.blow(rng):
                yield blow

    return disturb
