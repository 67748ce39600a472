"""Which cases a pytest session runs: planned while tests are collected, then narrowed to the chosen tests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mpscale
from mpscale.config import why_not_writable
from mpscale.core.case import Case, plan
from mpscale.core.shard import Shard, Share
from mpscale.pytest_plugin import options, origin
from mpscale.pytest_plugin.handed import refuse_unused

if TYPE_CHECKING:
    from mpscale.telemetry.client import Driver

MOST_CASES = 20_000
"""Of a run. Each takes some seconds."""
PARAMETERS = ("workload", "mode", "seed", "repeat")
VARIANT = "mp_variant"
"""A further parameter, in a sweep."""
CASE = pytest.StashKey[Case]()
CLOCK = pytest.StashKey["ReplayClock"]()


_OURS = Path(mpscale.__file__).parents[1]
"""Where suites are mpscale's own: in the package, and in a clone."""


class ReplayClock:
    """A clock for pytest-benchmark that replays what a worker measured.

    pytest-benchmark reads the clock before and after each round; the difference is the next recorded step time.
    """

    __name__ = "ReplayClock"

    def __init__(self) -> None:
        self._now = 0.0
        self._inside = False
        self._steps: Iterator[float] = iter(())

    def load(self, step_s: list[float]) -> None:
        """Set the step times of the coming rounds, in seconds."""
        self._steps = iter(step_s)

    def __call__(self) -> float:
        """Return seconds since an arbitrary moment."""
        if self._inside:
            self._now += next(self._steps, 0.0)
        self._inside = not self._inside
        return self._now


_ABOUT_THE_TABLE = {
    "compare": None,
    "compare_fail": None,
    "histogram": None,
    "cprofile": None,
    "verbose": None,
    "columns": None,
    "sort": "min",
    "group_by": "group",
    "name": "normal",
}
"""Options of pytest-benchmark that its table is needed for, with their defaults if those are not empty."""


def shows_benchmark_table(config: pytest.Config) -> bool:
    """Whether cases belong into pytest-benchmark's table."""
    given = {name: config.getoption(f"benchmark_{name}", None) for name in _ABOUT_THE_TABLE}
    asked = any(value and value != _ABOUT_THE_TABLE[name] for name, value in given.items())
    return asked or bool(config.getoption("mp_benchmark_table"))


class Plan:
    """The device of a session, its cases, and those of them that were chosen.

    Args:
        config: of the session.
        driver: lists the GPUs.
        shuffle_seed: for the order of the cases.
        planned: ids of the cases of a run that goes on, in order; None for a new run.

    Raises:
        ValueError: the environment selects a GPU that does not exist, no workload fits the device, or it cannot run the
            cases of the run that goes on.
    """

    def __init__(
        self, config: pytest.Config, driver: Driver, shuffle_seed: int, planned: Sequence[str] | None = None
    ) -> None:
        from mpscale.telemetry import host

        self._config, self.driver = config, driver
        self.device = options.choose_device(config, driver.devices, host.cpu())
        name, why = options.choose_preset(config, self.device)
        self._preset, self.preset = name, f"preset {name}: {why}"
        """Which preset was chosen, and why."""
        self.left_out: list[str] = []
        """Workloads of the preset that do not fit the device: why, and what to do."""
        cases = self._planned(shuffle_seed)
        if planned is not None:
            cases = _as_planned(cases, planned)
        self.parameter_names = (*PARAMETERS, VARIANT) if any(case.variant.parts() for case in cases) else PARAMETERS
        """The parameters of the tests."""
        self._cases = {self._parameters(case): case for case in cases}
        # A run that goes on has its part already.
        self._shard: Shard | None = None if planned is not None else config.getoption("mp_shard")
        self.share: Share | None = None
        """The part of the cases that this session has, if it has one part of several."""
        self.chosen: list[Case] = []
        self.tests: set[str] = set()
        """Node ids of the tests that measure a chosen case."""
        self.own_workloads: dict[str, str] = {}
        """The user's own workloads that were chosen, and where they are."""

    def _planned(self, shuffle_seed: int) -> list[Case]:
        config, device, cases = self._config, self.device, list[Case]()
        batches, scales, replicas = options.swept(config)
        for number, name in enumerate(options.workloads(config)):
            if (why := options.why_left_out(config, name, device)) is not None:
                self.left_out.append(why)
                continue
            planned = plan(
                [name],
                options.modes(config, name, device),
                options.seeds(config, name),
                options.repeats(config, name),
                options.settings(config, name, device.memory_mib),
                shuffle_seed=shuffle_seed + number,
                first=len(cases),
                batches=batches,
                scales=scales,
                replicas=replicas,
            )
            # No further than needed to see that there are too many: it makes them one by one.
            cases += itertools.islice(planned, MOST_CASES + 1 - len(cases))
            if len(cases) > MOST_CASES:
                raise ValueError(
                    f"more than {MOST_CASES:,} cases, which take more than a day; ask for fewer seeds, repeats, modes, "
                    "workloads, batch sizes or scales, or split them into several runs"
                )
        if not cases:
            raise ValueError("; ".join(self.left_out))
        return cases

    @property
    def is_empty(self) -> bool:
        """Whether the session has a part of the plan that has no case."""
        return self.share is not None and not self.share.own()

    @property
    def on_gpu(self) -> bool:
        """Whether the cases run on a GPU."""
        return self.device.kind == "gpu"

    def parameters(self) -> list[Any]:
        """Return one pytest.param per case, in the order in which they run."""
        return [pytest.param(*parameters, id=_parameters_id(case)) for parameters, case in self._cases.items()]

    def _parameters(self, case: Case) -> tuple[Any, ...]:
        values = {**{name: getattr(case, name) for name in PARAMETERS}, VARIANT: "-".join(case.variant.parts())}
        return tuple(values[name] for name in self.parameter_names)

    def prepare(self, items: list[pytest.Item]) -> None:
        """Give each test its case and a clock, and restore the order of the cases if a plug-in has changed it."""
        places = [place for place, item in enumerate(items) if _measures(item)]
        ours = [items[place] for place in places]
        for item in ours:
            parameters = item.callspec.params  # type: ignore[attr-defined]
            item.stash[CASE] = case = self._cases[tuple(parameters[name] for name in self.parameter_names)]
            item.stash[CLOCK] = ReplayClock()
            if hasattr(self._config.option, "benchmark_disable"):
                marker = item.get_closest_marker("benchmark")
                marks = {"group": case.place[0], **(marker.kwargs if marker else {}), "timer": item.stash[CLOCK]}
                # First, since pytest-benchmark uses the closest marker: the test's own options stay, except the timer.
                item.add_marker(pytest.mark.benchmark(**marks), append=False)
        for place, item in zip(places, sorted(ours, key=lambda item: item.stash[CASE].order), strict=True):
            items[place] = item

    def deal(self, items: list[pytest.Item]) -> None:
        """Leave out tests whose case belongs to another part of the plan, if the session has one part of several.

        This comes after -k and -m, so that what they have chosen is dealt evenly.
        """
        cases = {item.stash[CASE].order: item.stash[CASE].named for item in items if CASE in item.stash}
        if self._shard is None or not cases:
            return
        self.share = Share.of_plan([cases[order] for order in sorted(cases)], self._shard)
        own = self.share.own()
        others = [item for item in items if CASE in item.stash and item.stash[CASE].id not in own]
        items[:] = [item for item in items if CASE not in item.stash or item.stash[CASE].id in own]
        self._config.hook.pytest_deselected(items=others)

    def choose(self, items: list[pytest.Item]) -> list[Case]:
        """Return the cases left after -k, -m and the like, and look up the user's own workloads among them.

        Raises:
            pytest.UsageError: a workload cannot be imported.
        """
        from mpscale.workloads import registry

        ours = [item for item in items if CASE in item.stash]
        self.tests = {item.nodeid for item in ours}
        self.chosen = list({item.stash[CASE].id: item.stash[CASE] for item in ours}.values())
        beside = sorted({item.path.parent for item in ours})
        # After Python's path; the first folder that has the module wins.
        by_project = origin.by_project(self._config, "--mp-workloads")
        named_in = [] if by_project is None else [by_project.parent]
        folders = list(dict.fromkeys([*beside, self._config.invocation_params.dir, self._config.rootpath, *named_in]))
        names = dict.fromkeys(case.workload for case in self.chosen if registry.is_own(case.workload))
        options.check_workloads(self._config, names, folders)
        refuse_unused(self._config, any(map(registry.takes_data, names)))
        self.own_workloads = {name: registry.source(name, folders) for name in names}
        self._check_series()
        return self.chosen

    def notes(self, items: Sequence[pytest.Item]) -> list[str]:
        """Return what may surprise whoever wrote the suite, a sentence each."""
        own = any(CASE in item.stash and not item.path.is_relative_to(_OURS) for item in items)
        if not own or self._config.getoption("mp_workloads"):
            return []
        return [
            f"no workloads are named, so mpscale's own are trained, those of the preset {self._preset}; --mp-workloads "
            "names yours, and so does `workloads` of [tool.mpscale] in pyproject.toml"
        ]

    def _check_series(self) -> None:
        """Refuse two workloads of one series: later runs could not tell which of them a version belongs to."""
        from mpscale.workloads import registry

        owners: dict[str, str] = {}
        for name in dict.fromkeys(case.workload for case in self.chosen):
            if (series := registry.get(name).series) is None:
                continue
            if series in owners:
                raise pytest.UsageError(
                    f"the workloads {owners[series]} and {name} have the series {series!r}; give each one of its own, "
                    "or run them apart"
                )
            owners[series] = name

    def selection(self) -> dict[str, Any]:
        """Return the workloads, modes, seeds and repeats that were chosen, and what sets single workloads apart."""
        found = {f"{name}s": list(dict.fromkeys(getattr(case, name) for case in self.chosen)) for name in PARAMETERS}
        from mpscale.workloads import registry

        common = options.settings(self._config).to_json()
        own = {
            name: options.settings(self._config, name, self.device.memory_mib)
            .suited_to(registry.get(name).growth_interval)
            .to_json()
            for name in found["workloads"]
        }
        apart = {
            workload: {name: value for name, value in settings.items() if value != common[name]}
            for workload, settings in own.items()
        }
        return {
            **found,
            "left_out": self.left_out or None,
            "set_apart": {workload: values for workload, values in apart.items() if values} or None,
        }


def _as_planned(cases: list[Case], planned: Sequence[str]) -> list[Case]:
    """Return the cases of an earlier plan, in its order."""
    known = {case.id: case for case in cases}
    if unknown := [case_id for case_id in planned if case_id not in known]:
        raise ValueError(
            f"the run that goes on has {len(unknown)} cases that are not planned here, such as {unknown[0]}: workloads "
            "and modes depend on the device and on the version of mpscale"
        )
    return [replace(known[case_id], order=order) for order, case_id in enumerate(dict.fromkeys(planned))]


def _parameters_id(case: Case) -> str:
    which = f"seed{case.seed}" if case.trains else f"repeat{case.repeat}"
    return "-".join([case.workload, case.mode, *case.variant.parts(), which])


def _measures(item: pytest.Item) -> bool:
    return "mp_case" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")


def shuffle_seed(config: pytest.Config) -> int:
    """Return a seed for the order of cases.

    Workers of pytest-xdist must agree on it, or they stop before a test can report that xdist cannot be used.
    """
    worker: dict[str, str] = getattr(config, "workerinput", {})
    return int(worker["testrunuid"], 16) if "testrunuid" in worker else int(time.time())


NO_XDIST = "mpscale measures step times, and cases that run at the same time would disturb each other: run without -n"


def check_use(config: pytest.Config, plan: Plan, results: Path) -> None:
    """Check that the chosen cases can be measured the way pytest was called.

    Args:
        config: of the session.
        plan: has the cases.
        results: the results folder.

    Raises:
        pytest.UsageError: they cannot.
    """
    if not hasattr(config.option, "benchmark_disable"):
        raise pytest.UsageError(
            "mpscale passes step times to pytest-benchmark, which is switched off: leave out `-p no:benchmark`, or "
            "load it with `-p pytest_benchmark.plugin`; --benchmark-disable trains without timing"
        )
    if config.getoption("numprocesses", None):
        raise pytest.UsageError(NO_XDIST)
    if not config.invocation_params.dir.is_relative_to(config.rootpath):
        for option, value in _taken_for_test_paths(config):
            raise pytest.UsageError(
                f"pytest takes {value} for a test path and chooses its root directory by it; write {option}={value}"
            )
    if not config.option.collectonly:
        check_name(config, results)
        why_not = why_not_writable(results / "runs")
        if why_not is not None:
            named = origin.of(config, "--mp-results")
            raise pytest.UsageError(f"{named}: {results} is not a folder that can be written to ({why_not})")


def check_name(config: pytest.Config, results: Path) -> None:
    """Check that no run in the results folder has the name that this one is to have.

    Raises:
        pytest.UsageError: there is one.
    """
    from mpscale.core.naming import others_called

    name = config.getoption("mp_name")
    if name is None or config.getoption("mp_resume") is not None:
        return
    if there := others_called(name, results):
        raise pytest.UsageError(
            f"--mp-name: {there[0].name} is called {name} already; take another name, or give that run one: "
            f"mpscale name {there[0].name} NAME"
        )


def _taken_for_test_paths(config: pytest.Config) -> Iterator[tuple[str, str]]:
    """Yield options whose value pytest takes for a test path.

    pytest chooses its root directory before it knows the options of plug-ins, so ``--option value`` is two arguments.
    """
    arguments = [str(argument) for argument in config.invocation_params.args]
    for option, value in itertools.pairwise(arguments):
        if (
            option in ("--mp-results", "--mp-baseline", "--mp-resume", "--mp-name")
            and Path(config.invocation_params.dir, value).exists()
        ):
            yield option, value
