"""What to run: one training of one workload in one mode, and the settings that a whole run shares."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mpscale.core.columns import METHOD_VERSION
from mpscale.core.mode import Mode

StartMethod = Literal["fork", "fresh"]


@dataclass(frozen=True)
class Settings:
    """What all cases of a run have in common.

    Args:
        jit: compile train steps with XLA, in every mode alike.
        train_steps: steps of a training; None takes the workload's own.
        batch_size: examples per step; None takes the workload's own.
        static_scale: loss scale of mixed-static.
        dynamic_scale: arguments of the scale of mixed-dynamic and graph-rewrite that differ from the defaults.
        timing_s: seconds of steady-state timing; 0 leaves the timing out.
        timing_blocks: fewest blocks of it.
        energy_s: seconds that steps go on for where a GPU's energy can be counted; 0 leaves energy out.
    """

    jit: bool = True
    train_steps: int | None = None
    batch_size: int | None = None
    static_scale: float = 128.0
    dynamic_scale: Mapping[str, float] = field(default_factory=dict)
    timing_s: float = 2.0
    timing_blocks: int = 50
    energy_s: float = 10.0

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "dynamic_scale": dict(self.dynamic_scale)}


@dataclass(frozen=True)
class Case:
    """One process: ``seed`` trains and times, a ``repeat`` above 0 only times.

    ``order`` is its place in the run.
    """

    workload: str
    mode: str
    seed: int
    repeat: int
    order: int
    settings: Settings

    @property
    def id(self) -> str:
        """Unique in a run, and usable as a file name."""
        return f"{self.workload.replace(':', '+')}--{self.mode}--s{self.seed}--r{self.repeat}"

    @property
    def group(self) -> tuple[str, int, int]:
        """Cases of one group start from the same weights and see the same data; only the mode differs."""
        return (self.workload, self.seed, self.repeat)

    @property
    def trains(self) -> bool:
        """Whether it trains to the end."""
        return self.repeat == 0

    def identity(self) -> dict[str, Any]:
        """The columns of a record that say which case it is."""
        return {
            "case_id": self.id,
            "workload": self.workload,
            "mode": self.mode,
            "seed": self.seed,
            "repeat": self.repeat,
            "order": self.order,
        }

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "settings": self.settings.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Case:
        """The inverse of :meth:`to_json`."""
        return cls(**{**values, "settings": Settings(**values["settings"])})


def series_key(mode: Mode, workload: str, digest: str, batch_size: int, train_steps: int, settings: Settings) -> str:
    """What two rows of different runs must share to be compared: everything that moves a figure but the machine.

    Settings of a loss scale are in it for the mode that uses it alone, so that another static scale does not make a
    new series of fp32.
    """
    parts = {"batch": batch_size, "steps": train_steps, "jit": "on" if settings.jit else "off"}
    parts |= {"timing": f"{settings.timing_s:g}s/{settings.timing_blocks}"}
    parts |= {name: f"{value:.17g}" for name, value in sorted(mode.scale_arguments(settings).items())}
    text = ",".join(f"{key}={value}" for key, value in parts.items())
    return f"{workload}/{digest}/{mode.name}/{text}/method={METHOD_VERSION}"


def plan(
    workloads: Sequence[str],
    modes: Sequence[Mode],
    seeds: int,
    repeats: int,
    settings: Settings,
    shuffle_seed: int = 0,
) -> Iterator[Case]:
    """The cases of a run, in the order in which they run.

    The modes of one workload and seed run next to each other, so that a drift of the machine hits all of them, and
    in an order shuffled anew for each, so that none always comes first. Repeats come after the seeds: what is lost
    if a run is cut short is then precision and not a result.
    """
    random_order = random.Random(shuffle_seed)
    rounds = [(seed, 0) for seed in range(seeds)] + [(0, repeat) for repeat in range(1, repeats + 1)]
    order = itertools.count()
    for workload in workloads:
        for seed, repeat in rounds:
            for mode in random_order.sample(list(modes), len(modes)):
                yield Case(workload, mode.name, seed, repeat, next(order), settings)


# What tells the series of one workload and mode apart, in a few words.

# See harness.case.series_key. Settings hold slashes: timing=2s/50.
_KEY = re.compile(r".*/(?P<digest>[^/]*)/[^/]*/(?P<settings>batch=.*)/(?P<method>method=[^/]*)")

_ON = "on "
"""Before the names of facts on the machine, so that none is taken for a setting."""


def tell_apart(siblings: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A text for each of some series of one workload and mode; empty where there is nothing to tell.

    Args:
        siblings: series key (see :func:`mpscale.core.case.series_key`) and hardware of each; hardware holds only
            what is known.
    """
    facts = [
        key_facts(key) | {f"{_ON}{name}": str(fact) for name, fact in machine.items()} for key, machine in siblings
    ]
    names = dict.fromkeys(name for each in facts for name in each)
    differing = [name for name in names if len({each.get(name) for each in facts}) > 1]
    machines = {tuple(sorted((name, str(fact)) for name, fact in machine.items())) for _, machine in siblings}
    if len({each.get("on name") for each in facts}) == len(machines):
        # The device's name says which machine it is; the rest would only make the text longer.
        differing = [name for name in differing if name == "on name" or not name.startswith(_ON)]
    return [", ".join(_words(name, each[name]) for name in differing if name in each) for each in facts]


def key_facts(key: str) -> dict[str, str]:
    """The digest, the settings and the method that a series key holds, by name."""
    found = _KEY.fullmatch(key)
    if found is None:
        return {"series": key}
    facts = {"digest": found["digest"]}
    for setting in [*found["settings"].split(","), found["method"]]:
        name, _, value = setting.partition("=")
        facts[name] = value
    return facts


def _words(name: str, fact: str) -> str:
    if name in ("on name", "on kind"):
        return fact
    if name == "on cores":
        return f"{fact} core" if fact == "1" else f"{fact} cores"
    # Eight hex digits tell models apart and leave room for the rest.
    return f"digest {fact[:8]}" if name == "digest" else f"{name.removeprefix(_ON)}={fact}"
