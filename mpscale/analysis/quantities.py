"""The one table of what runs can be compared, gated or followed by, and the words for what comes of it.

Command line, gates, comparison, history and reports all go by :data:`QUANTITIES`: a new quantity is one entry there.
This module is cheap to import, because the command line needs it for its help.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from mpscale.analysis.trainings import by_reason, overflow_rate, overflow_unknown, trainings, without_figure
from mpscale.core.columns import COLUMNS
from mpscale.core.record import Key, Record, of_good_trainings

BASELINE = "fp32"
"""The mode that speed-ups are over, always the same: a headline that changed to tf32 would look like a loss."""


class Ranked(StrEnum):
    """Words that tables count and sort by, defined in the order of their importance."""

    @property
    def rank(self) -> int:
        """Place in that order, from 0."""
        return list(type(self)).index(self)


class Outcome(Ranked):
    """What came of a gate."""

    FIRED = "fired"
    CANNOT_TELL = "cannot-tell"
    PASSED = "passed"


class Verdict(Ranked):
    """What came of comparing a quantity or a metric, and what a gate makes of it."""

    outcome: Outcome

    SLOWER = "slower", Outcome.FIRED
    MORE = "more", Outcome.FIRED
    FASTER = "faster", Outcome.PASSED
    LESS = "less", Outcome.PASSED
    SAME = "same", Outcome.PASSED
    """Any difference is below the threshold."""
    CANNOT_TELL = "cannot-tell", Outcome.CANNOT_TELL
    NOT_COMPARABLE = "not-comparable", Outcome.CANNOT_TELL
    """The runs are of different devices."""

    # Of a metric
    WORSE = "worse", Outcome.FIRED
    NON_INFERIOR = "non-inferior", Outcome.PASSED
    """A loss of the workload's margin or more is ruled out."""
    INCONCLUSIVE = "inconclusive", Outcome.CANNOT_TELL

    def __new__(cls, word: str, outcome: Outcome) -> Verdict:
        member = str.__new__(cls, word)
        member._value_ = word
        member.outcome = outcome
        return member


@dataclass(frozen=True)
class Quantity(ABC):
    """What the history of runs can be of.

    Args:
        name: on the command line and in gates.
        title: in reports.
        column: of cases.csv that it is made from, and whose entry in ``unavailable`` says why there is none.
    """

    name: str
    title: str
    column: str

    spread: ClassVar[Literal["interval", "range"]] = "interval"
    """What the ends of a point are: the 95 % t interval over processes on logarithms, or smallest and largest seed."""

    @property
    def unit(self) -> str:
        """Of the values; empty for a share of 1, and for a metric, which has its own."""
        return COLUMNS[self.column].unit

    @abstractmethod
    def sample(self, cases: Sequence[Record], baseline: Sequence[Record]) -> list[float]:
        """One value per process, pair of processes, or seed.

        Args:
            cases: of one workload and mode.
            baseline: those of :data:`BASELINE`.
        """

    def mean(self, sample: Sequence[float], cases: Sequence[Record]) -> float:
        """The value over all, for quantities whose ends are a range."""
        return statistics.fmean(sample)

    def lacking(
        self, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
    ) -> list[str]:
        """Which seeds or processes should be in the value and are not, with the reason. Costs leave out lost seeds."""
        return [by_reason(trainings(cases).lost), by_reason(without_figure(cases, self.column, not_started))]


@dataclass(frozen=True)
class Cost(Quantity):
    """A quantity of a process, less of which is better. Runs are compared by the ratio.

    Args:
        threshold: the smallest relative change that matters, unless the user gives another.
        more: verdict on an increase.
        less: verdict on a decrease.
        of_trainings: only processes that trained count: one that only times holds less memory.
        drifts: moves with the state of the machine, which differs from run to run.
        is_of: columns that say what exactly was measured; figures that differ in one of them are not compared.

    Raises:
        ValueError: the column is not marked positive.
    """

    threshold: float
    more: Verdict = Verdict.MORE
    less: Verdict = Verdict.LESS
    of_trainings: bool = True
    drifts: bool = False
    is_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not COLUMNS[self.column].positive:
            raise ValueError(f"{self.column} may be 0, and ratios need positive values: mark it in columns.py")

    @property
    def can_be_remeasured(self) -> bool:
        """Whether further processes that only time give new values, and chance moves them."""
        return self.drifts and not self.of_trainings

    def by_process(self, cases: Iterable[Record]) -> dict[Key, float]:
        """The value of every process that counts.

        Lost seeds do not, nor do their repeats: their steps are not those of a working training.
        """
        return {
            case.key: value
            for case in of_good_trainings(cases)
            if (value := case[self.column]) is not None and not (self.of_trainings and case["repeat"])
        }

    def kinds(self, cases: Iterable[Record]) -> set[tuple[Any, ...]]:
        """What exactly was measured in these cases: the values of :attr:`is_of`, one tuple per kind."""
        return {tuple(case[name] for name in self.is_of) for case in cases if case[self.column] is not None}

    def sample(self, cases: Sequence[Record], baseline: Sequence[Record] = ()) -> list[float]:
        """One value per process."""
        return list(self.by_process(cases).values())

    def lacking(
        self, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
    ) -> list[str]:
        without = without_figure(cases, self.column, not_started, self.of_trainings)
        return [by_reason(trainings(cases).lost), by_reason(without)]


class _Speedup(Quantity):
    """Over :data:`BASELINE`, from the same pairs as in the summary, so that both give the same number."""

    unit = "x"

    def sample(self, cases: Sequence[Record], baseline: Sequence[Record]) -> list[float]:
        own, other = (COSTS["step_time"].by_process(side) for side in (cases, baseline))
        return [other[key] / own[key] for key in own if key in other]

    def lacking(
        self, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
    ) -> list[str]:
        theirs = [text for text in super().lacking(baseline, ()) if text]
        return [*super().lacking(cases, baseline, not_started), *(f"{BASELINE}'s {text}" for text in theirs)]


class _Metric(Quantity):
    spread = "range"

    def sample(self, cases: Sequence[Record], baseline: Sequence[Record]) -> list[float]:
        return list(trainings(cases).metric.values())

    def lacking(
        self, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
    ) -> list[str]:
        seeds = trainings(cases, not_started)
        return [by_reason({**seeds.lost, **seeds.unknown})]


class _OverflowRate(Quantity):
    spread = "range"
    unit = ""

    def sample(self, cases: Sequence[Record], baseline: Sequence[Record]) -> list[float]:
        return [rate for case in cases if (rate := overflow_rate([case])) is not None]

    def mean(self, sample: Sequence[float], cases: Sequence[Record]) -> float:
        rate = overflow_rate(cases)
        return statistics.fmean(sample) if rate is None else rate

    def lacking(
        self, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
    ) -> list[str]:
        return [by_reason(overflow_unknown(cases, not_started))]


QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Cost(
            "step_time",
            "step time",
            "step_time_ms_median",
            threshold=0.05,
            more=Verdict.SLOWER,
            less=Verdict.FASTER,
            of_trainings=False,
            drifts=True,
        ),
        Cost(
            "gpu_memory",
            "GPU memory",
            "gpu_memory_nvml_peak_mib",
            threshold=0.03,
            # The peak by NVML follows the pool with one allocator, and what is in use with the other.
            is_of=("gpu_allocator", "gpu_memory_method"),
        ),
        Cost(
            "energy",
            "energy a step",
            "gpu_energy_j_per_step",
            threshold=0.10,
            of_trainings=False,
            drifts=True,
            is_of=("gpu_energy_method",),
        ),
        Cost("host_memory", "host memory", "host_memory_peak_mib", threshold=0.20),
        _Metric("metric", "final metric", "metric_value"),
        _OverflowRate("overflow_rate", "overflow rate", "overflow_steps"),
        _Speedup("speedup", f"speed-up over {BASELINE}", "step_time_ms_median"),
    )
}
"""All quantities, in the order of tables."""

COSTS = {name: quantity for name, quantity in QUANTITIES.items() if isinstance(quantity, Cost)}
"""Those that runs are compared by."""
