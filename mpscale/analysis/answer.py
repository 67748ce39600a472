"""What a run answers: is mixed precision worth it here, what does it buy, what does it cost, can it be trusted?

This decides, in codes and numbers; report/first_screen.py has the words.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from functools import lru_cache
from typing import Any

from mpscale.analysis.claim import Doubt, doubts_of
from mpscale.analysis.quantities import Verdict
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.case import Place
from mpscale.core.columns import FAILED, LOST, METHOD_VERSION
from mpscale.core.device import Device
from mpscale.core.mode import MODES, Mode, is_mixed
from mpscale.core.record import place_of
from mpscale.core.runs import Run

SAVES_MEMORY = 0.95
"""The ratio of peak memory from which on memory counts as saved: a smaller saving is no reason to change the mode."""

_GAIN, _REACH = 1.05, 2.0
"""An estimate above the first, or an interval beyond the second, may hide a gain, so the answer is not a plain no."""


WAITS = 0.1
"""The share of a step from which on the wait for input may be why a training is not faster."""


class Worth(StrEnum):
    """The answer to: is mixed precision worth it here?"""

    YES = auto()
    """On every workload, some mode is faster or saves memory and trains as well as fp32."""
    PARTLY = auto()
    """On some workloads."""
    NO = auto()
    """No mode is faster or saves memory without a loss, and no estimate suggests that more processes would show it."""
    NOT_SHOWN = auto()
    """Some estimates suggest a gain, but their intervals or their accuracies show none."""
    CANNOT_TELL = auto()
    """No claim can be made about any speed, for the reasons in :attr:`Answer.weaknesses`."""
    NOTHING = auto()
    """There is no mixed mode beside a baseline."""


class Effect(Enum):
    """What a mode does for a workload, all in all."""

    GOOD = auto()
    BAD = auto()
    UNKNOWN = auto()


class Weakness(StrEnum):
    """What weakens the figures of a run."""

    EMULATED = auto()
    """It ran on a CPU, which emulates the low precision."""
    UNKNOWN_DEVICE = auto()
    STAND_IN = auto()
    """The GPU is a stand-in for tests."""
    ONE_PROCESS = auto()
    IDLE = auto()
    DISPATCH = auto()
    BUSY = auto()
    TWO_LEVELS = auto()
    WITHOUT_XLA = auto()
    INPUT_BOUND = auto()
    """The mode is faster, but a training that waits for its input pipeline is not shown to be."""
    UNJUDGED = auto()
    """It cannot be told if the metric is as good as fp32's: too few seeds."""
    INCOMPLETE = auto()
    """Nor because seeds are missing."""
    UNCLEAR_METRIC = auto()
    """Nor because the metric's margin or direction is unknown, or cases do not agree on them."""
    UNCOMPARED = auto()
    """Rows with a speed-up whose metric was not compared with fp32's, although there may be one."""
    NO_METRIC = auto()
    """Workloads without a metric: whether they train as well is not known."""
    NO_BASELINE = auto()
    """There is no fp32 at all."""
    BASELINE_FAILED = auto()
    """There is, but it has no step time."""
    BASELINE_OOM = auto()
    """Because it ran out of memory, as the mode did not."""
    BASELINE_LOST = auto()
    """Trainings in float32 that diverged or stalled."""
    UNTIMED = auto()
    """A mode has no step time."""
    LOST_CASES = auto()
    """Cases that failed, were interrupted or were left out as suspicious."""
    NOT_STARTED = auto()
    UNFINISHED = auto()
    UNREADABLE = auto()
    OLDER_METHOD = auto()


_OF_DOUBT = {
    Doubt.IDLE: Weakness.IDLE,
    Doubt.DISPATCH: Weakness.DISPATCH,
    Doubt.BUSY: Weakness.BUSY,
    Doubt.ONE_PAIR: Weakness.ONE_PROCESS,
}


class Advice(StrEnum):
    """What to do next."""

    USE = auto()
    """Train with :attr:`Answer.mode`; if that is None, with another mode on each of :attr:`Answer.choices`."""
    STAY = auto()
    """Stay with float32; :attr:`Answer.mode` is the one for those who train in float16 all the same."""
    MEASURE = auto()
    """Measure again, in a way that removes the weaknesses."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a mode does for a workload.

    Args:
        row: of the summary.
        speed: the verdict on its speed; None without a ratio.
        doubts: what speaks against a claim about its speed.
        quality: the verdict on its metric; None if it has none.
        lost: how many of its trainings ended without a usable result.
        is_worse: whether its metric is worse, or a training was lost that was not lost in fp32.
        unsupported: whether nothing was trained because the mode cannot run here.
        effect: all in all.
    """

    row: Row
    speed: Verdict | None
    doubts: tuple[Doubt, ...]
    quality: Verdict | None
    lost: int
    is_worse: bool
    unsupported: bool
    effect: Effect

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the baseline; None if it is not known."""
        return _speedup(self.row)[0]

    @property
    def ends(self) -> tuple[float, float] | None:
        """The 95 % interval of the ratio; None if a single pair of processes cannot give it."""
        _, low, high = _speedup(self.row)
        return None if low is None or high is None else (low, high)

    @property
    def with_input(self) -> float | None:
        """How many times as fast with the input pipeline; None for arrays."""
        ratio: float | None = self.row[f"speedup_with_input_{self.row['headline_baseline']}"]
        return ratio

    @property
    def input_bound(self) -> bool:
        """See :func:`is_input_bound`."""
        return is_input_bound(self.row)

    @property
    def claimed(self) -> bool:
        """Whether it has a ratio with an interval, and nothing speaks against a claim."""
        return self.ratio is not None and not self.doubts and self.ends is not None

    @property
    def saves_memory(self) -> bool:
        """Whether it needs clearly less GPU memory than float32."""
        ratio = self.row["gpu_memory_ratio"]
        return ratio is not None and ratio <= SAVES_MEMORY

    @property
    def mode(self) -> Mode | None:
        """What is known of the mode; None for that of another version."""
        return MODES.get(self.row["mode"])

    @property
    def is_control(self) -> bool:
        """Whether the mode is a control experiment."""
        return self.mode is not None and self.mode.is_control


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run answers.

    Args:
        worth: the answer in a word.
        advice: what to do.
        mode: the name of the mode that the advice is about, as tables show it; None if it is about none.
        baselines: the row that each workload's modes are compared with; None if there is none.
        cells: by workload and mode, as tables name them; only modes below float32.
        choices: the mode to use on each workload on which some mode is good.
        weaknesses: what weakens the figures, with the number of rows or cases that it applies to.
        noise: the median half-width of the intervals of speed-ups, as a ratio minus 1; None if there are none.
    """

    worth: Worth
    advice: Advice
    mode: str | None
    baselines: Mapping[str, Row | None]
    cells: Mapping[str, Mapping[str, Cell]]
    choices: Mapping[str, str]
    weaknesses: Mapping[Weakness, int]
    noise: float | None

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of the columns, in order: those of mpscale in its own order, control experiments last."""
        found = {name: cell for cells in self.cells.values() for name, cell in cells.items()}
        order = {name: place for place, name in enumerate(MODES)}
        return tuple(sorted(found, key=lambda name: (found[name].is_control, order.get(found[name].row["mode"], 99))))

    @property
    def serious(self) -> tuple[Cell, ...]:
        """The cells of modes that somebody may use: all but control experiments and what cannot run here."""
        return tuple(cell for cells in self.cells.values() for cell in cells.values() if _is_serious(cell))

    @property
    def good(self) -> tuple[str, ...]:
        """Workloads on which some mode is good."""
        return tuple(self.choices)

    @property
    def asked(self) -> tuple[str, ...]:
        """Workloads with a mode that somebody may use."""
        return tuple(name for name, cells in self.cells.items() if any(map(_is_serious, cells.values())))

    @property
    def refused(self) -> tuple[str, ...]:
        """Workloads on which no mode gains anything, and no estimate suggests that more processes would show it."""
        told = {_workload(cell) for cell in self.serious if cell.claimed or cell.is_worse}
        return tuple(sorted(told - {_workload(cell) for cell in self.serious if _may_gain(cell)}))

    @property
    def chosen(self) -> tuple[Cell, ...]:
        """The cells of :attr:`choices`."""
        return tuple(self.cells[workload][mode] for workload, mode in self.choices.items())

    @property
    def controls(self) -> tuple[Cell, ...]:
        """The cells of control experiments."""
        return tuple(cell for cells in self.cells.values() for cell in cells.values() if cell.is_control)


def speed_verdict(row: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict on the speed of a row of the summary over its headline baseline.

    ``FASTER`` or ``SLOWER`` if the 95 % interval shows it and nothing speaks against the claim, else ``CANNOT_TELL``;
    None for the baseline itself and without a ratio. :func:`doubts_of` says what speaks against a claim.
    """
    ratio, low, high = _speedup(row)
    if ratio is None or row["mode"] == row["headline_baseline"]:
        return None
    if doubts_of(row, row["headline_baseline"]) or low is None or high is None or low <= 1.0 <= high:
        return Verdict.CANNOT_TELL
    return Verdict.FASTER if low > 1.0 else Verdict.SLOWER


def is_input_bound(row: Mapping[str, Any]) -> bool:
    """Whether a mode is faster on the device, and the wait for input leaves no gain that is shown."""
    with_input, waits = f"speedup_with_input_{row['headline_baseline']}", row["input_wait_share"]
    if row[with_input] is None or waits is None or waits <= WAITS:
        return False
    low = row[f"{with_input}_low"]
    return speed_verdict(row) is Verdict.FASTER and (low is None or low <= 1.0)


def _speedup(row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    baseline = row["headline_baseline"]
    ratio, low, high = (row[f"speedup_{baseline}{end}"] for end in ("", "_low", "_high"))
    return ratio, low, high


@lru_cache(maxsize=8)
def answer_of(run: Run) -> Answer:
    """Return what a run answers. Do not change it: it is made once."""
    baselines: dict[str, Row | None] = {}
    cells: dict[str, dict[str, Cell]] = {}
    rows = summary_of(run)
    told = _Told(run)
    for row in rows:
        workload, mode = place_of(row)
        baselines.setdefault(workload, None)
        if row["mode"] == row["headline_baseline"]:
            baselines[workload] = row
        elif is_mixed(row["mode"]):
            cells.setdefault(workload, {})[mode] = _cell(row, told)
    serious = [cell for by_mode in cells.values() for cell in by_mode.values() if _is_serious(cell)]
    choices = _choices(cells)
    worth = _worth(serious, len(choices), len({place_of(cell.row)[0] for cell in serious}))
    advice, advised = _advice(worth, serious, choices)
    weaknesses = {weakness: count for weakness, count in _counted(run, rows, serious, baselines, told) if count}
    return Answer(worth, advice, advised, baselines, cells, choices, weaknesses, _noise(serious))


class _Told:
    """What the records of a run say that rows do not have as numbers, by workload and mode."""

    def __init__(self, run: Run) -> None:
        lost: dict[Place, set[int]] = {}
        for record in run.records:
            if record["status"] in LOST and record["repeat"] == 0:
                lost.setdefault(record.place, set()).add(record["seed"])
        self.lost: Mapping[Place, set[int]] = lost
        self.unsupported = Counter(record.place for record in run.records if record["status"] == "unsupported")
        self.oom = Counter(record.place for record in run.records if record["status"] == "oom")


def _is_serious(cell: Cell) -> bool:
    return not cell.is_control and not cell.unsupported


def _cell(row: Row, told: _Told) -> Cell:
    speed, doubts = speed_verdict(row), tuple(doubts_of(row, row["headline_baseline"]))
    quality: Verdict | None = row["metric_verdict"]
    workload, mode = place_of(row)
    lost = told.lost.get((workload, mode), set())
    # A verdict has weighed the lost seeds against fp32's; without one, each that fp32 did not lose counts.
    is_worse = quality is Verdict.WORSE or bool(quality is None and lost - told.lost.get((workload, "fp32"), set()))
    unsupported = told.unsupported[workload, mode] == row["cases"]
    found = Cell(row, speed, doubts, quality, len(lost), is_worse, unsupported, Effect.UNKNOWN)
    return replace(found, effect=_effect(found))


def _effect(cell: Cell) -> Effect:
    row = cell.row
    if cell.is_worse:
        return Effect.BAD
    if cell.speed is Verdict.SLOWER:
        return Effect.UNKNOWN if cell.saves_memory else Effect.BAD
    # What synthetic inputs cannot show is said beside the answer; a metric that was not compared is missing.
    ended = row["ok"] == row["cases"] and not row["not_started"]
    trains = cell.quality is Verdict.NON_INFERIOR or (row["has_metric"] is False and ended)
    gains = cell.saves_memory or (cell.speed is Verdict.FASTER and not cell.input_bound)
    return Effect.GOOD if trains and gains else Effect.UNKNOWN


def _worth(serious: Sequence[Cell], good: int, workloads: int) -> Worth:
    if all(cell.ratio is None and cell.row["gpu_memory_ratio"] is None and cell.quality is None for cell in serious):
        return Worth.NOTHING
    if good:
        return Worth.YES if good == workloads else Worth.PARTLY
    claimed = [cell for cell in serious if cell.claimed]
    if not claimed:
        return Worth.CANNOT_TELL
    undecided = {_workload(cell) for cell in claimed if _may_gain(cell)}
    return Worth.NOT_SHOWN if undecided == {_workload(cell) for cell in claimed} else Worth.NO


def _workload(cell: Cell) -> str:
    return place_of(cell.row)[0]


def _may_gain(cell: Cell) -> bool:
    """Whether its estimate or its interval suggests a gain that is not shown."""
    if cell.effect is Effect.BAD or not cell.claimed or cell.input_bound:
        return False
    return (cell.ratio or 0.0) > _GAIN or (cell.ends is not None and cell.ends[1] > _REACH)


def _choices(cells: Mapping[str, Mapping[str, Cell]]) -> dict[str, str]:
    """Return the mode to use by workload: one mode for all if one is good on all, else the fastest good ones."""
    good = {
        workload: {mode: cell for mode, cell in found.items() if _is_serious(cell) and cell.effect is Effect.GOOD}
        for workload, found in cells.items()
    }
    good = {workload: found for workload, found in good.items() if found}
    common = [mode for mode in next(iter(good.values()), {}) if all(mode in found for found in good.values())]
    # One that is worse elsewhere comes last.
    worse = {mode for found in cells.values() for mode, cell in found.items() if cell.is_worse}
    best = max(
        common,
        key=lambda mode: (mode not in worse, _mean_speedup([found[mode] for found in good.values()])),
        default=None,
    )
    if best is not None:
        return dict.fromkeys(good, best)
    return {
        workload: max(found, key=lambda mode: (mode not in worse, _mean_speedup([found[mode]])))
        for workload, found in good.items()
    }


def _advice(worth: Worth, serious: Sequence[Cell], choices: Mapping[str, str]) -> tuple[Advice, str | None]:
    if choices:
        modes = set(choices.values())
        return Advice.USE, modes.pop() if len(modes) == 1 else None
    if worth is not Worth.NO:
        return Advice.MEASURE, None
    by_mode: dict[str, list[Cell]] = {}
    for cell in serious:
        by_mode.setdefault(place_of(cell.row)[1], []).append(cell)
    trained = {
        name: found
        for name, found in by_mode.items()
        # A mode that is worse anywhere is not advised everywhere.
        if not any(cell.is_worse for cell in found) and _as_good(found) and _scales(found[0])
    }
    # The order of the modes decides: mixed-dynamic comes before the less usual ones.
    order = sorted(trained, key=lambda name: (-_as_good(trained[name]), _rank(trained[name][0])))
    return Advice.STAY, order[0] if order else None


def _as_good(cells: Sequence[Cell]) -> int:
    return sum(cell.quality is Verdict.NON_INFERIOR for cell in cells)


def _scales(cell: Cell) -> bool:
    """Whether the mode is float16 with a loss scale that reacts to overflow."""
    mode = cell.mode
    return mode is not None and mode.scaling is not None and mode.scaling.rule != "static"


def _rank(cell: Cell) -> int:
    return list(MODES).index(cell.row["mode"]) if cell.row["mode"] in MODES else len(MODES)


def _mean_speedup(cells: Sequence[Cell]) -> float:
    known = [cell.ratio for cell in cells if cell.ratio is not None]
    return statistics.geometric_mean(known) if known else 0.0


def _noise(serious: Sequence[Cell]) -> float | None:
    widths = [
        math.sqrt(cell.ends[1] / cell.ends[0]) - 1
        for cell in serious
        if cell.ends is not None and cell.ends[0] > 0 and math.isfinite(cell.ends[1])
    ]
    return statistics.median(widths) if widths else None


def _counted(
    run: Run, rows: Sequence[Row], serious: Sequence[Cell], baselines: Mapping[str, Row | None], told: _Told
) -> Iterator[tuple[Weakness, int]]:
    yield Weakness.EMULATED, sum(cell.row["device"] == "cpu" for cell in serious)
    compared = [cell.row for cell in serious if cell.ratio is not None]
    yield Weakness.UNKNOWN_DEVICE, sum(row["device"] is None for row in compared)
    unjudged = [row for row in compared if row["metric_verdict"] is None]
    yield Weakness.UNCOMPARED, sum(row["has_metric"] is not False for row in unjudged)
    names = {record["device_name"] for record in run.records} | {run.device.get("name")}
    yield Weakness.STAND_IN, int(any(Device("gpu", str(name)).is_stand_in for name in names if name))
    for doubt, weakness in _OF_DOUBT.items():
        yield weakness, sum(doubt in cell.doubts for cell in serious)
    yield Weakness.TWO_LEVELS, sum(row["two_level_processes"] for row in rows)
    timed = [record for record in run.records if record["step_time_ms_median"] is not None]
    yield Weakness.WITHOUT_XLA, int({(one["device"], one["jit"]) for one in timed} == {("gpu", False)})
    yield Weakness.INPUT_BOUND, sum(cell.input_bound for cell in serious)
    yield from Counter(_why_unjudged(cell.row) for cell in serious if cell.quality is Verdict.INCONCLUSIVE).items()
    yield Weakness.NO_METRIC, len({cell.row["workload"] for cell in serious if cell.row["has_metric"] is False})
    yield from Counter(
        _why_not_compared(cell, baselines[place_of(cell.row)[0]], told)
        for cell in serious
        if cell.ratio is None and not cell.lost
    ).items()
    of_float32 = [seeds for (_, mode), seeds in told.lost.items() if not is_mixed(mode)]
    yield Weakness.BASELINE_LOST, sum(map(len, of_float32))
    yield Weakness.LOST_CASES, sum(record["status"] in FAILED for record in run.records)
    yield Weakness.NOT_STARTED, len(run.not_started)
    yield Weakness.UNFINISHED, int(not run.finished)
    yield Weakness.UNREADABLE, len(run.problems)
    yield Weakness.OLDER_METHOD, int(bool(run.methods) and max(run.methods) < METHOD_VERSION)


def _why_unjudged(row: Row) -> Weakness:
    if row["metric_reason"] is None:
        return Weakness.UNJUDGED
    if row["metric_left_out"] is not None or not row["metric_pairs"]:
        return Weakness.INCOMPLETE
    unknown = row["metric_margin"] is None or row["metric_higher_is_better"] is None
    return Weakness.UNJUDGED if row["metric_pairs"] == 1 and not unknown else Weakness.UNCLEAR_METRIC


def _why_not_compared(cell: Cell, baseline: Row | None, told: _Told) -> Weakness:
    if cell.row["step_time_ms"] is None:
        return Weakness.UNTIMED
    if baseline is None:
        return Weakness.NO_BASELINE
    is_oom = baseline["step_time_ms"] is None and told.oom[place_of(baseline)]
    return Weakness.BASELINE_OOM if is_oom else Weakness.BASELINE_FAILED
