"""Scaling efficiency between two runs that differ in the number of replicas alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpscale.analysis.change import Change
from mpscale.core.case import SeriesKey
from mpscale.core.record import Record, common


@dataclass(frozen=True, slots=True)
class Scaling:
    """Examples per second and replica on more replicas, over those on fewer (weak scaling).

    The batch of a replica is the same, so this is the step time on fewer replicas over that on more.

    Args:
        replicas: of the baseline, and of the run.
        batch: examples per step of one replica.
        examples_per_s: of all replicas, of the baseline and of the run; None if unknown.
        efficiency: 1 if twice the replicas take twice the examples in the same time; None if a step time is unknown.
        low: lower end of its 95 % interval, which holds how much runs differ, as for a change of step time; None if
            a single process on a side gives no spread.
        high: upper end.
        reason: why something is None.
    """

    replicas: tuple[int, int]
    batch: int
    examples_per_s: tuple[float | None, float | None] = (None, None)
    efficiency: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def replicas_of(one: str, two: str) -> tuple[int, int] | None:
    """The numbers of replicas in two series keys; None if they are the same, or a key cannot be read."""
    found = [_fact(SeriesKey.facts(key), "replicas") for key in (one, two)]
    before, after = (int(number) if number.isdecimal() else 0 for number in found)
    return (before, after) if before != after and before and after else None


def batch_of_a_replica(
    keys: tuple[str, str],
    replicas: tuple[int, int],
    sides: tuple[Sequence[Record], Sequence[Record]],
    same_device: bool,
) -> int | str:
    """The batch of a replica in two rows whose numbers of replicas differ, or why they have no scaling efficiency.

    Args:
        keys: of the series.
        replicas: see :func:`replicas_of`.
        sides: cases of both.
        same_device: whether both ran on the same kind of device.
    """
    one, two = (SeriesKey.facts(key) for key in keys)
    if (strategies := [_fact(facts, "strategy") for facts in (one, two)])[0] != strategies[1]:
        # Also of one device: under a strategy, one replica trains without XLA, as several do.
        cure = f"; run also --mp-strategy with --mp-replicas {min(replicas)}" if "none" in strategies else ""
        return f"strategy {' against '.join(strategies)}{cure}"
    batches = [_batch(*each) for each in zip((one, two), replicas, sides, strict=True)]
    if batches[0] != batches[1]:
        return f"batch per replica {' against '.join('unknown' if b is None else str(b) for b in batches)}"
    if any(_fact(one, name) != _fact(two, name) for name in {*one, *two} - {"replicas", "batch"}):
        return "more differs than the number of replicas"
    if not same_device:
        return "another device"
    return batches[0] or "the batch per replica is unknown"


def _fact(facts: Mapping[str, str], name: str) -> str:
    return facts.get(name) or SeriesKey.unsaid(name) or ""


def _batch(facts: Mapping[str, str], replicas: int, cases: Sequence[Record]) -> int | None:
    told = common(cases, "replica_batch_size")
    whole = facts.get("batch", "")
    if told is None and whole.isdecimal() and int(whole) % replicas == 0:
        return int(whole) // replicas
    return told if told is None else int(told)


def scaling(replicas: tuple[int, int], batch: int, step_time: Change | None) -> Scaling:
    """The efficiency, from the change of the step time between the two runs."""
    if step_time is None:
        return Scaling(replicas, batch, reason="no step time")
    before, after = (
        ms and 1e3 * batch * number / ms
        for ms, number in zip((step_time.baseline, step_time.other), replicas, strict=True)
    )
    if step_time.change is None:
        return Scaling(replicas, batch, (before, after), reason=step_time.reason)
    ratios = [None if share is None else 1 + share for share in (step_time.change, step_time.low, step_time.high)]
    if replicas[0] < replicas[1]:
        middle, high, low = (None if ratio is None else 1 / ratio for ratio in ratios)
    else:
        middle, low, high = ratios
    reason = "; ".join(filter(None, (step_time.reason, step_time.left_out)))
    return Scaling(replicas, batch, (before, after), middle, low, high, reason or None)
