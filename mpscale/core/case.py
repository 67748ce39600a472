"""What to run: cases, the settings that a run shares, and how cases and series are named."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mpscale.core.columns import METHOD_VERSION
from mpscale.core.loss_scale import DynamicLossScale
from mpscale.core.mode import Mode

StartMethod = Literal["fork", "fresh"]
Strategy = Literal["none", "mirrored", "multiworker"]

_CASE_ID = re.compile(
    r"(.+)--(?!batch\d+--|scale\d[\d.e+-]*--|replicas\d+--)(.+?)"
    r"(?:--batch(\d{1,18}))?(?:--scale(\d[\d.e+-]{0,30}))?(?:--replicas(\d{1,9}))?--s(\d{1,18})--r(\d{1,18})"
)
_SERIES_KEY = re.compile(r"(.*)/([^/]*)/([^/]*)/(batch=.*)/method=([^/]*)")


Place = tuple[str, str]
"""Workload and mode as tables name them: what a row of most tables is about. See :meth:`Variant.place`."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What a run varies besides workload, mode, seed and repeat: a sweep.

    Args:
        batch: examples per step, in a run with several batch sizes; None in others.
        scale: the constant loss scale, in a mode that has one and a run with several; None in others.
        replicas: on how many devices, in a run with several such numbers; None in others.
    """

    batch: int | None = None
    scale: float | None = None
    replicas: int | None = None

    def place(self, workload: str, mode: str) -> Place:
        """Name a workload and a mode in this variant: ``toy @64 @x2`` and ``mixed-static @2^24``.

        fp32 has no loss scale, so the row with which a mode is compared is that of the same first name and ``fp32``.
        """
        if self.batch is not None:
            workload = f"{workload} @{self.batch}"
        if self.replicas is not None:
            workload = f"{workload} @x{self.replicas}"
        if self.scale is not None:
            mode = f"{mode} @{scale_text(self.scale)}"
        return workload, mode

    def parts(self) -> list[str]:
        """The variant in ids: ``batch64``, ``scale16777216`` and ``replicas2``; empty without a sweep."""
        parts = [] if self.batch is None else [f"batch{self.batch}"]
        parts += [] if self.scale is None else [f"scale{self.scale:.17g}"]
        return parts if self.replicas is None else [*parts, f"replicas{self.replicas}"]

    def columns(self) -> dict[str, Any]:
        """The columns of a record that tell the variant; none without a sweep."""
        known = {"swept_batch": self.batch, "swept_scale": self.scale, "swept_replicas": self.replicas}
        return {name: value for name, value in known.items() if value is not None}

    def applied_to(self, settings: Settings) -> Settings:
        """The settings of a case in this variant."""
        if self.batch is not None:
            settings = replace(settings, batch_size=self.batch)
        if self.replicas is not None:
            settings = replace(settings, replicas=self.replicas)
        return settings if self.scale is None else replace(settings, static_scale=self.scale)


def scale_text(scale: float) -> str:
    """Write a loss scale so that no two look alike: large powers of two as ``2^24``, others in full."""
    mantissa, exponent = math.frexp(scale)
    if mantissa == 0.5 and exponent > 16:
        return f"2^{exponent - 1}"
    return short if float(short := f"{scale:g}") == scale else repr(scale)


@dataclass(frozen=True, slots=True)
class CaseId:
    """Names a case in its run. The text is usable as a file name.

    It is ``<workload>--<mode>--s<seed>--r<repeat>``. In a sweep, those of ``--batch<size>``, ``--scale<scale>`` and
    ``--replicas<number>`` that vary follow the mode.
    """

    workload: str
    mode: str
    seed: int
    repeat: int
    variant: Variant = Variant()

    def __str__(self) -> str:
        parts = [self.workload.replace(":", "+"), self.mode, *self.variant.parts()]
        return "--".join([*parts, f"s{self.seed}", f"r{self.repeat}"])

    @property
    def place(self) -> Place:
        """Workload and mode as tables name them."""
        return self.variant.place(self.workload, self.mode)

    def columns(self) -> dict[str, Any]:
        """The columns of a record that say which case it is."""
        names = ("workload", "mode", "seed", "repeat")
        return {**{name: getattr(self, name) for name in names}, **self.variant.columns()}

    @classmethod
    def parse(cls, text: str, workloads: Iterable[str] = ()) -> CaseId | None:
        """The inverse of ``str``; None if the text is not the id of a case.

        Args:
            text: the id.
            workloads: names that may occur. In others a ``+`` is taken for the ``:`` of ``module:attribute``.
        """
        found = _CASE_ID.fullmatch(text)
        if found is None:
            return None
        workload, mode, batch, scale, replicas, seed, repeat = found.groups()
        known = next((name for name in workloads if name.replace(":", "+") == workload), workload.replace("+", ":"))
        try:
            numbers = (None if batch is None else int(batch), None if scale is None else float(scale))
            variant = Variant(*numbers, None if replicas is None else int(replicas))
        except ValueError:
            return None
        return cls(known, mode, int(seed), int(repeat), variant)


@dataclass(frozen=True)
class Settings:
    """What all cases of a workload have in common, apart from what a sweep varies.

    Args:
        jit: compile train steps with XLA, in all modes.
        train_steps: steps of a training; None for the workload's default.
        batch_size: examples per step and replica; None for the workload's default.
        static_scale: loss scale of mixed-static.
        dynamic_scale: arguments of a dynamic loss scale that differ from the defaults.
        steps_per_call: steps that one call of the compiled program takes.
        timing_s: seconds of steady-state timing; 0 for none.
        timing_blocks: the minimum number of timed blocks.
        energy_s: seconds of further steps if the GPU's energy can be measured; 0 to skip energy.
        repeat_data: fill a batch that is larger than the training set with several copies of it.
        looks: at how many steps of a training `mpscale probe` looks at the gradients; 0 for a case of a run.
        lint: look for what is wrong or slow about the workload, and take a few steps only for that.
        autotune: whether each process lets XLA tune its kernels, or those of a workload and mode share the results.
        strategy: of tf.distribute; ``none`` trains on one device.
        replicas: on how many devices each step is taken, over all workers. The batch size is that of a replica.
        machines: how many of them the replicas are on, each with a session of its own.
    """

    jit: bool = True
    train_steps: int | None = None
    batch_size: int | None = None
    static_scale: float = 128.0
    dynamic_scale: Mapping[str, float] = field(default_factory=dict)
    steps_per_call: int = 1
    timing_s: float = 2.0
    timing_blocks: int = 50
    energy_s: float = 10.0
    repeat_data: bool = False
    looks: int = 0
    lint: bool = False
    autotune: Literal["fresh", "shared"] = "fresh"
    strategy: Strategy = "none"
    replicas: int = 1
    machines: int = 1

    def suited_to(self, growth_interval: int | None) -> Settings:
        """These settings with the growth interval of a workload, if it has one and the user chose none."""
        if growth_interval is None:
            return self
        return replace(self, dynamic_scale={"growth_interval": growth_interval, **self.dynamic_scale})

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "dynamic_scale": dict(self.dynamic_scale)}


@dataclass(frozen=True)
class Case:
    """One process. Repeat 0 trains to the end and times; a repeat above 0 only times.

    ``order`` is its place in the run. The settings are those of its variant.
    """

    workload: str
    mode: str
    seed: int
    repeat: int
    order: int
    settings: Settings
    variant: Variant = Variant()

    @property
    def named(self) -> CaseId:
        """Which case it is."""
        return CaseId(self.workload, self.mode, self.seed, self.repeat, self.variant)

    @property
    def id(self) -> str:
        """Unique in a run, and usable as a file name; see :class:`CaseId`."""
        return str(self.named)

    @property
    def place(self) -> Place:
        """Workload and mode as tables name them."""
        return self.named.place

    @property
    def group(self) -> tuple[str, int, int]:
        """Cases of one group start from the same weights and see the same data; only mode and loss scale differ."""
        return (self.place[0], self.seed, self.repeat)

    @property
    def trains(self) -> bool:
        """Whether it trains to the end."""
        return self.repeat == 0

    def identity(self) -> dict[str, Any]:
        """The columns of a record that say which case it is."""
        return {"case_id": self.id, **self.named.columns(), "order": self.order}

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "settings": self.settings.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Case:
        """The inverse of :meth:`to_json`."""
        return cls(**{**values, "settings": Settings(**values["settings"]), "variant": Variant(**values["variant"])})


@dataclass(frozen=True, slots=True)
class SeriesKey:
    """What rows of different runs must share to be compared: everything that moves a figure except the machine.

    The text is ``<workload>/<digest>/<mode>/<setting>=<value>,.../method=<version>``.
    """

    workload: str
    digest: str
    mode: str
    settings: Mapping[str, str]
    method: str

    def __str__(self) -> str:
        settings = ",".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.workload}/{self.digest}/{self.mode}/{settings}/method={self.method}"

    @classmethod
    def parse(cls, text: str) -> SeriesKey | None:
        """The inverse of ``str``; None if the text is not a series key."""
        # Both names of workloads and settings may contain slashes: timing=2s/50.
        found = _SERIES_KEY.fullmatch(text)
        if found is None:
            return None
        workload, digest, mode, settings, method = found.groups()
        parts = (part.partition("=") for part in settings.split(","))
        return cls(workload, digest, mode, {name: value for name, _, value in parts}, method)

    @staticmethod
    def facts(text: str) -> dict[str, str]:
        """Digest, settings and method in the text of a key, by name; a text of another form is all of ``series``."""
        key = SeriesKey.parse(text)
        return {"series": text} if key is None else {"digest": key.digest, **key.settings, "method": key.method}

    @staticmethod
    def unsaid(name: str) -> str | None:
        """The value of a fact that a key leaves out because it is the default; None if there is no default."""
        known = {"steps_per_call": "1", "autotune": "fresh", "strategy": "none", "replicas": "1", "machines": "1"}
        dynamic = {argument: f"{value:.17g}" for argument, value in DynamicLossScale.defaults().items()}
        return (known | dynamic).get(name)


def series_key(mode: Mode, workload: str, digest: str, batch_size: int, train_steps: int, settings: Settings) -> str:
    """The text of the :class:`SeriesKey` of a case.

    It holds settings of a loss scale only for modes that use them: another static scale is no new series of fp32. The
    number of steps per call is left out if it is 1, as in keys from before it could be chosen. If tuning is shared, it
    says so, because the choice of kernels is then no longer part of the noise between processes. The batch is that of
    all replicas together; strategy and replicas are left out without a strategy, and so is one machine.
    """
    parts = {"batch": str(batch_size), "steps": str(train_steps), "jit": "on" if settings.jit else "off"}
    parts |= {"timing": f"{settings.timing_s:g}s/{settings.timing_blocks}"}
    parts |= {"steps_per_call": str(settings.steps_per_call)} if settings.steps_per_call != 1 else {}
    parts |= {name: f"{value:.17g}" for name, value in sorted(mode.scale_arguments(settings).items())}
    if settings.autotune == "shared" and settings.jit:
        parts["autotune"] = "shared"
    if settings.strategy != "none":
        parts |= {"strategy": settings.strategy, "replicas": str(settings.replicas)}
        parts |= {"machines": str(settings.machines)} if settings.machines != 1 else {}
    return str(SeriesKey(workload, digest, mode.name, parts, str(METHOD_VERSION)))


def plan(
    workloads: Sequence[str],
    modes: Sequence[Mode],
    seeds: int,
    repeats: int,
    settings: Settings,
    shuffle_seed: int = 0,
    first: int = 0,
    batches: Sequence[int] = (),
    scales: Sequence[float] = (),
    replicas: Sequence[int] = (),
) -> Iterator[Case]:
    """The cases of a run, in the order in which they run.

    The modes of one workload and seed run next to each other, so that a drift of the machine hits all of them, in an
    order that is shuffled each time, so that none always comes first. Repeats come after the seeds, so that a run that
    is cut short loses precision rather than results. ``first`` is the place of the first case in the run.

    ``batches``, ``scales`` and ``replicas`` make a sweep: each mode runs at every batch and number of replicas, and one
    with a constant loss scale at every scale, side by side with the modes that it is compared with. Empty: those of the
    settings, and no sweep.
    """
    random_order = random.Random(shuffle_seed)
    rounds = [(seed, 0) for seed in range(seeds)] + [(0, repeat) for repeat in range(1, repeats + 1)]
    order = itertools.count(first)
    several: tuple[Sequence[int | None], Sequence[int | None]] = (batches or [None], replicas or [None])
    sizes = list(itertools.product(*several))
    turns = [
        (mode.name, scale)
        for mode in modes
        for scale in (scales if mode.scaling and mode.scaling.setting == "static_scale" and scales else [None])
    ]
    for workload in workloads:
        for seed, repeat in rounds:
            for batch, number in sizes:
                for mode_name, scale in random_order.sample(turns, len(turns)):
                    variant = Variant(batch, scale, number)
                    own = variant.applied_to(settings)
                    yield Case(workload, mode_name, seed, repeat, next(order), own, variant)
