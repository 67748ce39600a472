"""The table of quantities by which runs are compared, gated and followed, and the verdicts on them.

The command line, gates, comparisons, histories and reports all use :data:`QUANTITIES`: a new quantity is one entry
there. This module is cheap to import, because the command line needs it for its help.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from mpscale.analysis.claim import conditions, find_doubts
from mpscale.analysis.trainings import by_reason, overflow_rate, overflow_unknown, trainings, without_figure
from mpscale.core.columns import COLUMNS
from mpscale.core.record import Key, Record, of_good_trainings

BASELINE = "fp32"
"""The mode that speed-ups are relative to. Always the same: a headline that switched to tf32 would look like a loss."""


class Ranked(StrEnum):
    """Words that tables count and sort by, defined in the order of their importance."""

    @property
    def rank(self) -> int:
        """Place in that order, from 0."""
        return list(type(self)).index(self)


class Outcome(Ranked):
    """The outcome of a gate."""

    FIRED = "fired"
    CANNOT_TELL = "cannot-tell"
    PASSED = "passed"
    NOT_APPLICABLE = "not-applicable"
    """The row has no such figure, and is not meant to have one."""


class Verdict(Ranked):
    """The verdict on a quantity or a metric, with the outcome of a gate on it."""

    outcome: Outcome

    SLOWER = "slower", Outcome.FIRED
    MORE = "more", Outcome.FIRED
    FASTER = "faster", Outcome.PASSED
    LESS = "less", Outcome.PASSED
    SAME = "same", Outcome.PASSED
    """Any difference is below the threshold."""
    CANNOT_TELL = "cannot-tell", Outcome.CANNOT_TELL
    NOT_COMPARABLE = "not-comparable", Outcome.CANNOT_TELL
    """The runs used different devices."""

    WORSE = "worse", Outcome.FIRED
    """Like the following, the verdict on a metric: a loss beyond the workload's margin is shown, or a seed was lost."""
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
    """A number that can be followed over many runs.

    Args:
        name: on the command line and in gates.
        title: in reports.
        column: the column of cases.csv that it is made from; its entry in ``unavailable`` explains a missing value.
    """

    name: str
    title: str
    column: str

    spread: ClassVar[Literal["interval", "range"]] = "interval"
    """The low and high ends of a point: the 95 % t interval over processes on logarithms, or the extreme seeds."""

    @property
    def unit(self) -> str:
        """Unit of the values; empty for a share of 1, and for a metric, which has its own."""
        return COLUMNS[self.column].unit

    @abstractmethod
    def sample(self, cases: Sequence[Record], baseline: Sequence[Record]) -> list[float]:
        """One value per process, pair of processes, or seed.

        Args:
            cases: of one workload and mode.
            baseline: those of :data:`BASELINE`.
        """

    def mean(self, sample: Sequence[float], cases: Sequence[Record]) -> float:
        """The value of a point whose ends are the extreme seeds."""
        return statistics.fmean(sample)

    @abstractmethod
    def lacking(
        self, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
    ) -> list[str]:
        """The seeds or processes that are missing from the value, with the reason; texts may be empty."""


@dataclass(frozen=True)
class Cost(Quantity):
    """A quantity that each process has, and of which less is better. Runs are compared by their ratio.

    Args:
        threshold: the smallest relative change that matters, unless the user gives another.
        more: verdict on an increase.
        less: verdict on a decrease.
        of_trainings: only processes that trained count: one that only times holds less memory.
        drifts: changes with the state of the machine, which differs from run to run.
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
        """Whether chance moves the values and processes that only time give more of them."""
        return self.drifts and not self.of_trainings

    def by_process(self, cases: Iterable[Record]) -> dict[Key, float]:
        """The value of every process that counts. Lost seeds and their repeats do not: their training does not work."""
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
        # The cost of a lost training is of no use.
        return [by_reason(trainings(cases).lost), by_reason(without)]


class _Speedup(Quantity):
    """Relative to :data:`BASELINE`. Pairs processes as the summary does, so both show the same number."""

    unit = "x"

    def sample(self, cases: Sequence[Record], baseline: Sequence[Record]) -> list[float]:
        own, other = (COSTS["step_time"].by_process(side) for side in (cases, baseline))
        return [other[key] / own[key] for key in own if key in other]

    def lacking(
        self, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
    ) -> list[str]:
        time = COSTS["step_time"]
        theirs = [f"{BASELINE}'s {text}" for text in time.lacking(baseline, ()) if text]
        return [*time.lacking(cases, (), not_started), *theirs, self._doubts(cases, baseline)]

    def _doubts(self, cases: Sequence[Record], baseline: Sequence[Record]) -> str:
        own, other = (conditions(of_good_trainings(side)) for side in (cases, baseline))
        doubts = find_doubts(own, other, len(self.sample(cases, baseline)))
        return f"no claim about speed: {', and '.join(doubt.text for doubt in doubts)}" if doubts else ""


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
        # Waiting for input varies more than computing: it depends on the disk and on all processors.
        Cost(
            "step_time_with_input",
            "step time with input",
            "step_time_ms_with_input",
            threshold=0.10,
            more=Verdict.SLOWER,
            less=Verdict.FASTER,
            of_trainings=False,
            drifts=True,
            is_of=("input_kind",),
        ),
        # Each process profiles a few steps, and which kernels it runs is a choice of its own, so only several processes
        # show how much the figure varies: it is judged exactly as the step time is.
        Cost(
            "device_time",
            "GPU time per step",
            "device_busy_ms_per_step",
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
            # With one allocator NVML's peak shows the pool, with the other what is in use.
            is_of=("gpu_allocator", "gpu_memory_method"),
        ),
        Cost(
            "energy",
            "energy per step",
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
"""The quantities by which two runs are compared."""
