"""How large numbers are, counted by power of two, and what float16 would make of them at any loss scale.

A float32 number is 2**e times m, with 1 <= m < 2. Its bin is made of e and of where m lies: exactly 1, below
2 - 2**-10, below 2 - 2**-11, or above. These are the places within a power of two at which rounding to float16, to the
nearest and in doubt to even, changes sides:

    at most 2**-25             becomes 0
    below 2**-14 - 2**-25      becomes subnormal: less than the 11 bits of a normal number are left
    at least 65,520            becomes infinite; that is 2**15 (2 - 2**-11)

Multiplication by a power of two moves a number by whole powers, so one count answers for every such scale, exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

PLACES = 4
"""Bins in each power of two. The number of a bin is ``PLACES`` times float32's biased exponent, plus the place."""
BINS = 256 * PLACES
SECOND, THIRD = 2.0 - 2.0**-10, 2.0 - 2.0**-11
"""Where the last two places of a power of two begin."""
BIAS = 127

LARGEST_FLOAT16 = 65504.0
MOST_POWER = 100
"""Scales from 2**-100 to 2**100: there, a subnormal float32 number becomes 0 in float16 at every scale."""

Of = Literal["weights", "activations"]
"""What the gradients belong to."""


class Place(NamedTuple):
    """Where gradients are.

    Args:
        layer: its path below the model.
        of: what they belong to.
        optimizer: of whose loss they are the gradients: the attribute of the model that holds the optimizer.
    """

    layer: str
    of: Of
    optimizer: str = "optimizer"


@dataclass(frozen=True, slots=True)
class Rounded:
    """What float16 makes of numbers that are neither zero nor infinite nor NaN.

    Args:
        of: how many numbers these are.
        vanished: how many become zero.
        subnormal: how many become subnormal, so that precision is lost.
        overflowed: how many become infinite.
    """

    of: int
    vanished: int
    subnormal: int
    overflowed: int

    def share(self, name: Literal["vanished", "subnormal", "overflowed"]) -> float | None:
        """One of the counts as a share of all numbers; None if there are none."""
        return getattr(self, name) / self.of if self.of else None


@dataclass(slots=True)
class Magnitudes:
    """Numbers of float32, counted.

    Args:
        counts: by number of the bin; empty bins may be missing.
        largest: the largest magnitude among those that are finite; 0 if there is none above.
    """

    counts: Counter[int] = field(default_factory=Counter)
    largest: float = 0.0

    def add(self, other: Magnitudes) -> None:
        """Count the numbers of another, too."""
        self.counts.update(other.counts)
        self.largest = max(self.largest, other.largest)

    @property
    def total(self) -> int:
        """All numbers."""
        return sum(self.counts.values())

    @property
    def zero(self) -> int:
        """Numbers that are zero in float32, such as the gradients behind a ReLU that is off."""
        return self.counts.get(0, 0)

    @property
    def not_finite(self) -> int:
        """Infinities and NaNs of float32."""
        return sum(self.counts.get(255 * PLACES + place, 0) for place in range(PLACES))

    def by_power(self) -> dict[int, int]:
        """Finite numbers other than zero by the power of two at or below them; -127 has those below 2**-126."""
        found: Counter[int] = Counter()
        for number, count in self.counts.items():
            if 0 < number < 255 * PLACES and count:
                found[number // PLACES - BIAS] += count
        return dict(sorted(found.items()))

    def in_float16(self, scale: float) -> Rounded:
        """What rounding the numbers, times ``scale``, to float16 makes of them.

        Raises:
            ValueError: the scale is not a power of two from 2**-100 to 2**100.
        """
        shift = power_of_two(scale)
        vanished = subnormal = overflowed = of = 0
        for number, count in self.counts.items():
            if not 0 < number < 255 * PLACES:
                continue
            of += count
            place = number % PLACES
            power = number // PLACES - BIAS + shift
            if power < -25 or (power == -25 and place == 0):
                vanished += count
            elif power < -15 or (power == -15 and place < 2):
                subnormal += count
            elif power > 15 or (power == 15 and place == 3):
                overflowed += count
        return Rounded(of, vanished, subnormal, overflowed)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {"largest": self.largest, "counts": {str(number): count for number, count in self.counts.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Magnitudes:
        """The inverse of :meth:`to_json`."""
        return cls(Counter({int(number): count for number, count in values["counts"].items()}), values["largest"])


def power_of_two(scale: float) -> int:
    """The exponent of a scale that is a power of two.

    Raises:
        ValueError: it is not one from 2**-100 to 2**100.
    """
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or abs(exponent - 1) > MOST_POWER:
        raise ValueError(f"a loss scale must be a power of two from 2**-{MOST_POWER} to 2**{MOST_POWER}, not {scale!r}")
    return exponent - 1
