"""The options of the pytest plug-in, and what they come to: modes, workloads and settings of a run."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpscale.config import DEFAULT_PRESET, PRESETS, Preset, folder
from mpscale.core.case import DYNAMIC_DEFAULTS, Settings
from mpscale.core.mode import MODES, Mode, modes_with_setting, select_modes
from mpscale.terminal import as_typed


def add_options(parser: pytest.Parser) -> None:
    """Adds the options, all under ``--mp-``."""
    group = parser.getgroup("mpscale", "mpscale: train in several precisions and measure")
    add = group.addoption
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    add(
        "--mp-preset",
        choices=sorted(PRESETS),
        default=DEFAULT_PRESET,
        help=f"what runs by default. {presets}",
    )
    add(
        "--mp-workloads",
        type=_names,
        metavar="A,B",
        help="workloads; `mpscale workloads` lists them; module:attribute names your own",
    )
    add(
        "--mp-modes",
        type=_names,
        metavar="A,B",
        help=f"modes out of {', '.join(MODES)}; the comparison needs fp32 among them",
    )
    add(
        "--mp-seeds",
        type=_at_least(1),
        metavar="N",
        help="trainings of each workload in each mode, seeds 0 to N-1 (default: the preset's)",
    )
    add(
        "--mp-repeats",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="further processes that only time, for narrower intervals (default: 0)",
    )
    add("--mp-steps", type=_at_least(1), metavar="N", help="steps of a training (default: the workload's)")
    add("--mp-batch-size", type=_at_least(1), metavar="N", help="examples per step (default: the workload's)")
    add(
        "--mp-static-scale",
        type=_scale,
        default=128.0,
        metavar="S",
        help=f"loss scale of {modes_with_setting('static_scale')}, such as 1024 or 2**24 (default: 128)",
    )
    add(
        "--mp-dynamic-scale",
        type=_dynamic_scale,
        default={},
        metavar="KEY=VALUE,...",
        help=f"arguments of the scale of {modes_with_setting('dynamic_scale')}: {', '.join(DYNAMIC_DEFAULTS)}",
    )
    add(
        "--mp-jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile train steps with XLA; auto is on, since float16 on a CPU can be many times slower without",
    )
    add(
        "--mp-cores",
        type=_cores,
        metavar="0,2-3",
        help="run everything on these processor cores alone (default: all that this process may use)",
    )
    add(
        "--mp-start-method",
        choices=("auto", "fork", "fresh"),
        default="auto",
        help="auto: children of a process that has TensorFlow imported on a CPU, fresh interpreters on a GPU",
    )
    add(
        "--mp-timeout",
        type=_positive,
        default=900.0,
        metavar="SECONDS",
        help="time that one case may take (default: 900)",
    )
    add(
        "--mp-timing",
        type=_positive,
        metavar="SECONDS",
        help="time that steady-state timing takes in each case (default: the preset's)",
    )
    add(
        "--mp-energy",
        type=_energy,
        metavar="SECONDS",
        help="time over which a GPU's energy is counted, at least 10; 0 leaves it out (default: the preset's)",
    )
    add(
        "--mp-gpu-allocator",
        choices=("auto", "cuda_malloc_async", "bfc"),
        default="auto",
        help="TensorFlow's allocator; auto is cuda_malloc_async, and bfc where that does not work",
    )
    add(
        "--mp-gpu-retries",
        type=_at_least(0),
        default=2,
        metavar="N",
        help="how often a case is run again that was throttled, or had other processes beside it (default: 2)",
    )
    add(
        "--mp-cool-down",
        type=_positive,
        default=60.0,
        metavar="SECONDS",
        help="time to wait for the GPU at most before that (default: 60)",
    )
    add(
        "--mp-keep-suspect",
        action="store_true",
        help="do not make such a case invalid: its row keeps its status, and gpu_suspicion says why to doubt it",
    )
    add(
        "--mp-results",
        type=folder,
        metavar="DIR",
        help="results folder (default: results/ under pytest's root directory)",
    )
    add(
        "--mp-baseline",
        metavar="RUN",
        help="run to compare with in the end: a name or how it begins, a folder, a cases.csv, `latest`",
    )
    add(
        "--mp-fail-on",
        action="append",
        metavar="GATE",
        help='fail the run, such as "step_time>5%%", "gpu_memory>3%%", "metric", "overflow_rate>0.01" or "missing"; '
        "several with commas, or the option again. What is slower is measured anew first",
    )
    add("--mp-strict", action="store_true", default=None, help="what a gate could not tell fails the run too")


def taken_for_a_place(config: pytest.Config) -> tuple[str, str] | None:
    """An option of ours and its value, where pytest takes the value for a place of tests.

    It looks for its root directory before it knows the options of plug-ins: ``--option value`` is then two arguments.
    """
    arguments = [str(argument) for argument in config.invocation_params.args]
    for option, value in itertools.pairwise(arguments):
        if option in ("--mp-results", "--mp-baseline") and Path(config.invocation_params.dir, value).exists():
            return option, value
    return None


def preset(config: pytest.Config) -> Preset:
    """The preset of the run."""
    return PRESETS[config.getoption("mp_preset")]


def settings(config: pytest.Config) -> Settings:
    """What all cases of the run have in common."""
    option = config.getoption
    # --benchmark-disable asks for a test of what is benchmarked: everything but the timing.
    timed = not option("benchmark_disable", False) or option("benchmark_enable", False)
    return Settings(
        jit=option("mp_jit") != "off",
        train_steps=option("mp_steps") or preset(config).train_steps,
        batch_size=option("mp_batch_size"),
        static_scale=option("mp_static_scale"),
        dynamic_scale=option("mp_dynamic_scale"),
        timing_s=(option("mp_timing") or preset(config).timing_s) if timed else 0.0,
        timing_blocks=preset(config).timing_blocks,
        energy_s=preset(config).energy_s if option("mp_energy") is None else option("mp_energy"),
    )


def named_modes(config: pytest.Config) -> tuple[Mode, ...]:
    """The modes that ``--mp-modes`` names."""
    try:
        return select_modes(config.getoption("mp_modes"))
    except ValueError as error:
        raise pytest.UsageError(f"--mp-modes: {error}") from error


def workloads(config: pytest.Config) -> list[str]:
    """The workloads of the run. Those of the user's own are looked for later: it takes the suite's folders."""
    from mpscale.workloads import registry

    names = list(dict.fromkeys(config.getoption("mp_workloads") or preset(config).workloads))
    check_workloads([name for name in names if not registry.is_own(name)])
    return names


def workload_folders(config: pytest.Config, suite: Iterable[Path]) -> list[Path]:
    """Where the user's own workloads are looked for, behind Python's path: the first one that has the module counts.

    Args:
        config: of the session.
        suite: the files of the tests that train.
    """
    beside = sorted({path.parent for path in suite})
    return list(dict.fromkeys([*beside, config.invocation_params.dir, config.rootpath]))


def check_workloads(names: Iterable[str], folders: Sequence[Path] = ()) -> None:
    """Imports workloads, which makes sure that they are there.

    Raises:
        pytest.UsageError: one of them is not.
    """
    from mpscale.workloads import registry

    try:
        with registry.without_gpus():
            for name in names:
                registry.get(name, folders)
    except registry.UnknownWorkload as error:
        raise pytest.UsageError(f"--mp-workloads: {error}") from error


def _names(text: str) -> list[str]:
    names = [name.strip() for name in as_typed(text).split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected at least one name")
    return names


def _at_least(least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, not {text!r}")
        return value

    return parse


def _cores(text: str) -> set[int]:
    """Numbers of cores, such as "0,2-3", each of which this process may use."""
    match = re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text.replace(" ", ""))
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cores: set[int] = set()
    for part in text.replace(" ", "").split(",") if match else ():
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    if not cores or not cores <= usable:
        there = ", ".join(map(str, sorted(usable))) or "none, since this system cannot tie processes to cores"
        raise argparse.ArgumentTypeError(f"expected cores such as 0,2-3 out of {there}, not {text!r}")
    return cores


def _energy(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if seconds != 0 and not 10 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"expected 0 or a number of seconds of at least 10, which the sensors of GPUs need, not {text!r}"
        )
    return seconds


def _number(text: str) -> float:
    power = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:\*\*|\^)\s*(-?\d+)\s*", text)
    try:
        return float(power[1]) ** int(power[2]) if power else float(text)
    except (ValueError, ArithmeticError):
        raise argparse.ArgumentTypeError(f"expected a number such as 1024 or 2**24, not {text!r}") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return value


def _scale(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 2.0**126:
        raise argparse.ArgumentTypeError(f"expected a loss scale above 0 and at most 2**126, not {text!r}")
    return value


def _dynamic_scale(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in text.split(","):
        key, _, value = pair.partition("=")
        key = key.strip()
        if key not in DYNAMIC_DEFAULTS:
            raise argparse.ArgumentTypeError(f"{key!r} is none of {', '.join(DYNAMIC_DEFAULTS)}")
        kind = type(DYNAMIC_DEFAULTS[key])
        number = _scale(value) if key in ("initial", "minimum", "maximum") else _positive(value)
        if kind is int and not number.is_integer():
            raise argparse.ArgumentTypeError(f"{key} has to be an integer, not {value!r}")
        found[key] = kind(number)
    _check_dynamic_scale(**{**DYNAMIC_DEFAULTS, **found})
    return found


def _check_dynamic_scale(
    initial: float, minimum: float, maximum: float, growth_factor: float, backoff_factor: float, **_: float
) -> None:
    """Refuses, in the words of DynamicLossScale, what would else be found out by the first case that uses it."""
    if not minimum <= initial <= maximum:
        problem = (
            f"the initial loss scale {initial:g} is not within minimum {minimum:g} and maximum {maximum:g}; "
            "choose it between them or widen them"
        )
    elif growth_factor <= 1:
        problem = f"growth_factor must be finite and above 1, not {growth_factor!r}"
    elif backoff_factor >= 1:
        problem = f"backoff_factor must be between 0 and 1, not {backoff_factor!r}"
    else:
        return
    raise argparse.ArgumentTypeError(problem)
