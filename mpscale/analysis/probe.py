"""What a probe says about float16: what vanishes in it, and which static loss scale fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from mpscale.core.columns import LARGEST
from mpscale.core.device import Device
from mpscale.core.files.reading import SUMMARY, RunError, read_json
from mpscale.core.magnitudes import LARGEST_FLOAT16, Magnitudes, Of, Place
from mpscale.core.reason import Reason
from mpscale.core.runs import Run

HEADROOM = 2.0**4
"""How many times larger than the largest gradient of the probe a later one may be; docs/method.md says why."""

MOST_SCALE = 2.0**24
"""The largest scale to recommend, the same as the default maximum of a dynamic one."""

OF_ALL, OF_A_LAYER = 0.001, 0.01
"""Shares of the gradients that may vanish: of all weights or all activations, and of those of one layer."""

ALL: tuple[Of, ...] = ("activations", "weights")


class Verdict(StrEnum):
    """What a static loss scale does for a workload."""

    NOT_NEEDED = "not-needed"
    """Without a scale hardly a gradient vanishes."""
    HELPS = "helps"
    """With the recommended scale hardly a gradient vanishes."""
    TOO_WIDE = "too-wide"
    """With the recommended scale some vanish all the same, and a larger one would make others overflow."""
    OVERFLOWS = "overflows"
    """Without a scale the largest gradients overflow already."""


@dataclass(frozen=True, slots=True)
class Look:
    """The gradients at one step.

    Args:
        step: its number, from 1.
        loss: its loss.
        gradients: by layer, what they belong to, and optimizer.
        in_float32: the layers that mixed precision leaves in float32, since the model asks for it. Their gradients are
            never in float16.
    """

    step: int
    loss: float
    gradients: Mapping[Place, Magnitudes]
    in_float32: frozenset[str] = frozenset()

    @property
    def in_float16(self) -> dict[Place, Magnitudes]:
        """The gradients that mixed precision has in float16."""
        return {place: each for place, each in self.gradients.items() if place.layer not in self.in_float32}

    def all(self, of: Of) -> Magnitudes:
        """Those of all layers in float16."""
        return _sum(counted for place, counted in self.in_float16.items() if place.of == of)


@dataclass(slots=True)
class Probe:
    """A short training in float32 whose gradients were looked at, finished or not.

    Args:
        workload: its name.
        device: where it trained.
        steps: how many steps it was to take.
        scale: a loss scale that the user asks about; None for the recommended one.
        looks: in order of their steps.
        problem: why there are not more looks; None if there are all.
        digest: of the workload, None as long as it is not known.
        unsure: why it is not known which layers stay in float32; all count as float16 then. None if it is known.
    """

    workload: str
    device: Device
    steps: int
    scale: float | None = None
    looks: list[Look] = field(default_factory=list)
    problem: Reason | None = None
    digest: str | None = None
    unsure: Reason | None = None

    @property
    def finite(self) -> list[Look]:
        """The looks at gradients that are finite: others say nothing about float16."""
        return [look for look in self.looks if not any(each.not_finite for each in look.gradients.values())]

    def by_layer(self) -> dict[Place, Magnitudes]:
        """The gradients of all finite looks, layer by layer, activations before weights."""
        found: dict[Place, Magnitudes] = {}
        for look in self.finite:
            for place, counted in look.gradients.items():
                found.setdefault(place, Magnitudes()).add(counted)
        layers = list(dict.fromkeys(place.layer for place in found))
        return dict(sorted(found.items(), key=lambda item: (layers.index(item[0].layer), item[0].of)))

    def by_optimizer(self) -> dict[str, Probe]:
        """The same of each optimizer, by its name, in the order in which they are applied."""
        names = dict.fromkeys(place.optimizer for look in self.looks for place in look.gradients)
        parts = {
            name: [
                replace(
                    look, gradients={place: each for place, each in look.gradients.items() if place.optimizer == name}
                )
                for look in self.finite
            ]
            for name in names
        }
        return {name: replace(self, looks=looks) for name, looks in parts.items()}

    @property
    def in_float32(self) -> frozenset[str]:
        """The layers that mixed precision leaves in float32."""
        return self.looks[0].in_float32 if self.looks else frozenset()

    def in_float16(self) -> dict[Place, Magnitudes]:
        """Those of :meth:`by_layer` that mixed precision has in float16."""
        return {place: each for place, each in self.by_layer().items() if place.layer not in self.in_float32}

    def all(self, of: Of) -> Magnitudes:
        """The gradients of all layers in float16, in all finite looks."""
        return _sum(look.all(of) for look in self.finite)

    @property
    def largest(self) -> float:
        """The largest gradient in float16 of all finite looks."""
        return max((each.largest for look in self.finite for each in look.in_float16.values()), default=0.0)


@dataclass(frozen=True, slots=True)
class Advice:
    """Which static loss scale to use.

    Args:
        verdict: what it does.
        scale: the recommended one, a power of two.
        largest: the largest gradient, without a scale.
        headroom: how many times larger a gradient may become before it overflows at that scale.
    """

    verdict: Verdict
    scale: float
    largest: float
    headroom: float


def advise(probe: Probe) -> Advice | None:
    """Recommend a static loss scale; None if no gradient in float16 but zero was seen.

    It is the largest power of two S with ``largest gradient * S * HEADROOM < 65504``, but at least 1 and at most 2**24.
    NVIDIA's guide "Train With Mixed Precision" has the same rule without headroom: a product below 65504.
    """
    largest = probe.largest
    if largest == 0.0:
        return None
    most = LARGEST_FLOAT16 / HEADROOM / largest
    # A limit of exactly 2**n leaves 2**(n - 1), as the product must be below.
    scale = min(max(2.0 ** (math.ceil(math.log2(most)) - 1), 1.0), MOST_SCALE)
    headroom = LARGEST_FLOAT16 / (largest * scale)
    if any(each.in_float16(1.0).overflowed for each in probe.in_float16().values()):
        verdict = Verdict.OVERFLOWS
    elif not _too_many_vanish(probe, 1.0):
        verdict = Verdict.NOT_NEEDED
    else:
        verdict = Verdict.TOO_WIDE if _too_many_vanish(probe, scale) else Verdict.HELPS
    return Advice(verdict, scale, largest, headroom)


def _too_many_vanish(probe: Probe, scale: float) -> bool:
    of_all = [probe.all(of).in_float16(scale).share("vanished") or 0.0 for of in ALL]
    of_layers = [each.in_float16(scale).share("vanished") or 0.0 for each in probe.in_float16().values()]
    return max(of_all) >= OF_ALL or max(of_layers, default=0.0) >= OF_A_LAYER


def worst(probe: Probe, scale: float = 1.0) -> list[tuple[Place, float]]:
    """The layers of which most vanishes at a scale, with the share of each; the worst first, without those of none."""
    shares = {
        place: share
        for place, each in probe.in_float16().items()
        if (share := each.in_float16(scale).share("vanished")) is not None and share > 0
    }
    return sorted(shares.items(), key=lambda item: -item[1])


def _sum(parts: Iterator[Magnitudes]) -> Magnitudes:
    total = Magnitudes()
    for each in parts:
        total.add(each)
    return total


@dataclass(frozen=True, slots=True)
class Kept:
    """What probe.json says about a probe.

    Args:
        name: of its folder.
        workload: as the user named it.
        values: all of it.
    """

    name: str
    workload: str
    values: Mapping[str, Any]


def probes_of(run: Run) -> list[Kept]:
    """The newest finished probe of each workload of a run, if the results folder has one of the same digest.

    A folder that cannot be read is passed over: a probe is no part of the run.
    """
    wanted = {record["workload_digest"]: record["workload"] for record in run.records if record["workload_digest"]}
    found: dict[str, Kept] = {}
    for path in sorted(run.path.resolve().parent.parent.glob("probe/*/probe.json")):
        try:
            values = read_json(path, SUMMARY)
            about_it = values["finished"] and values["problem"] is None and values["workload_digest"] in wanted
            if about_it and _is_whole(values):
                digest = values["workload_digest"]
                this = Kept(path.parent.name, wanted[digest], values)
                found[digest] = max(this, found.get(digest, this), key=lambda kept: str(kept.values.get("started")))
        except (RunError, KeyError, TypeError):
            continue
    return [found[digest] for digest in wanted if digest in found]


def _is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a probe.json has what a report shows; raise KeyError or TypeError if a part is missing."""
    advice = values["advice"]
    if advice is None:
        return True
    shares = [values[name][of] for name in ("vanish_share", "scaled_vanish_share") for of in ALL]
    numbers = [advice["scale"], advice["largest"], *(share for share in shares if share is not None)]
    return isinstance(advice["verdict"], str) and all(
        type(value) in (int, float) and 0 <= value <= LARGEST for value in numbers
    )
