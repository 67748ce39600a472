"""Where a user's choices come from: presets, ``[tool.mpscale]``, and options that the plug-in and the command share."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from mpscale.core.device import Device
from mpscale.core.file_errors import why
from mpscale.core.loss_scale import parse_number
from mpscale.core.mode import DEFAULT_MODES
from mpscale.core.reading import MOST_STEPS, SETTINGS, RunError, read_text

N = TypeVar("N", int, float)

MOST_SHOWN = 60
"""Characters of a value that a message repeats."""


@dataclass(frozen=True, slots=True)
class Apart:
    """What a preset does otherwise with one workload. None: as with the others.

    Args:
        batches: by the memory of the GPU: (GB, the batch for a GPU of that size), rising. Empty: the workload's own.
        seeds: trainings in each mode.
        repeats: further processes that only time.
        modes: instead of the default modes; devices with TF32 run ``tf32`` too.
        train_steps: steps per training.
        timing_blocks: minimum number of timing blocks.
        energy_s: as in :class:`Preset`.
        autotune: as in :class:`~mpscale.core.case.Settings`.
    """

    batches: tuple[tuple[int, int], ...] = ()
    seeds: int | None = None
    repeats: int = 0
    modes: tuple[str, ...] = DEFAULT_MODES
    train_steps: int | None = None
    timing_blocks: int | None = None
    energy_s: float | None = None
    autotune: Literal["fresh", "shared"] = "fresh"

    def batch(self, memory_mib: float | None) -> int | None:
        """The batch for a GPU of this memory, the smallest if it is unknown; None if there is too little for any."""
        if memory_mib is None:
            return self.batches[0][1]
        return max((batch for gb, batch in self.batches if holds(memory_mib, gb)), default=None)


@dataclass(frozen=True, slots=True)
class Preset:
    """What a run does unless options say otherwise.

    Args:
        summary: one line for ``pytest --help``.
        workloads: names of the workloads.
        seeds: trainings of each workload in each mode.
        timing_s: seconds of steady-state timing per case.
        timing_blocks: minimum number of timing blocks.
        train_steps: steps per training; None takes the workload's own number.
        energy_s: seconds over which a GPU's energy is measured; 0 leaves it out.
        apart: workloads with which it does otherwise.
    """

    summary: str
    workloads: tuple[str, ...]
    seeds: int
    timing_s: float
    timing_blocks: int = 50
    train_steps: int | None = None
    energy_s: float = 10.0
    apart: Mapping[str, Apart] = field(default_factory=dict)


_SOLD_AS = 0.9
"""GPUs report a little less memory than they are sold with: 22.5 GiB of 24 GB with error correction."""


def holds(memory_mib: float, gb: int) -> bool:
    """Whether a GPU that reports this memory is one of ``gb`` or more."""
    return memory_mib >= _SOLD_AS * 1024 * gb


def _large(*batches: tuple[int, int]) -> Apart:
    """One process that trains and one that only times, since a speed-up is claimed from two pairs of processes on.

    There is no accuracy, so a few steps will do, and mixed-static would add nothing to mixed-dynamic. XLA's tuning
    takes most of the time, so the two processes share it.
    """
    return Apart(
        batches,
        seeds=1,
        repeats=1,
        modes=("fp32", "mixed-dynamic", "mixed-bf16"),
        train_steps=20,
        timing_blocks=10,
        autotune="shared",
    )


# The largest round batch with 600 MiB + state + 2 x batch x activations <= 0.8 x memory. State: weights, gradients and
# slots of the optimizer. Activations: outputs of all layers of an example in float32, of which a process holds those of
# two steps if steps are queued. docs/workloads.md has both for each workload, and measurements beside them.
_LARGE = {
    "resnet50": _large((8, 16), (16, 32), (24, 64), (40, 96), (80, 192)),
    "efficientnet-b0": _large((8, 24), (16, 64), (24, 96), (40, 160), (80, 320)),
    "bert-base": _large((8, 16), (16, 48), (24, 96), (40, 160), (80, 320)),
    "gpt2-small": _large((8, 2), (16, 4), (24, 8), (40, 16), (80, 32)),
    "unet": _large((8, 2), (16, 4), (24, 8), (40, 16)),
    "wide-mlp": _large((8, 8192)),
    "lstm-lm": _large((8, 256), (16, 512), (24, 1024), (80, 2048)),
}
_ACCURACY_ALONE = Apart(energy_s=0.0)
"""For workloads that are too small for a GPU: their energy is that of waiting for Python."""

_OUT_OF_RANGE = ("padded-gru", "beam-strain", "diabetes-sum")
_NEEDS_A_SCALE = {name: Apart(modes=(*DEFAULT_MODES, "mixed-unscaled")) for name in _OUT_OF_RANGE}
"""Workloads that show what a loss scale is for, next to a training without one."""

PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "smoke": Preset(
            "seconds per case, to see that everything works (its figures mean little)",
            workloads=("mnist1d-mlp", "article-mlp"),
            seeds=1,
            timing_s=0.3,
            timing_blocks=10,
            train_steps=100,
            energy_s=0.0,
        ),
        "small": Preset(
            "full trainings, minutes on two cores",
            workloads=(*_OUT_OF_RANGE, "mnist1d-mlp", "mnist1d-cnn", "article-mlp"),
            seeds=3,
            timing_s=2.0,
            apart=_NEEDS_A_SCALE,
        ),
        "full": Preset(
            "more seeds, longer timing and a recurrent network",
            workloads=(*_OUT_OF_RANGE, "mnist1d-mlp", "mnist1d-cnn", "mnist1d-gru", "article-mlp"),
            seeds=5,
            timing_s=4.0,
            apart=_NEEDS_A_SCALE,
        ),
        "gpu": Preset(
            "four networks that keep a GPU busy, with batches that fit its memory, and two small ones for accuracy; "
            "about half an hour on an H100",
            workloads=("resnet50", "bert-base", "unet", "wide-mlp", "mnist1d-cnn", "article-mlp"),
            seeds=3,
            timing_s=2.0,
            apart={**_LARGE, "mnist1d-cnn": _ACCURACY_ALONE, "article-mlp": _ACCURACY_ALONE},
        ),
    }
)
DEFAULT_PRESET = "small"
GPU_PRESET, GPU_PRESET_GB = "gpu", 8
"""The preset for a GPU, and the memory from which on it is the default there."""


def preset_for(device: Device, named: str | None = None) -> tuple[str, str]:
    """Return the name of the preset of a run on ``device``, and why it is that one.

    Args:
        device: where the run trains.
        named: the preset that the user named, which wins.
    """
    if named is not None:
        return named, "as asked for"
    if device.kind == "cpu":
        return DEFAULT_PRESET, "the default on a CPU"
    if device.memory_mib is None:
        return DEFAULT_PRESET, f"the memory of the GPU is unknown, and {GPU_PRESET} needs {GPU_PRESET_GB} GB"
    size = f"the GPU has {device.memory_mib / 1024:.1f} GiB"
    if holds(device.memory_mib, GPU_PRESET_GB):
        return GPU_PRESET, f"{size}; --mp-preset names another"
    return DEFAULT_PRESET, f"{size}, and {GPU_PRESET} needs {GPU_PRESET_GB} GB"


class SettingsError(ValueError):
    """``[tool.mpscale]`` is not valid. The message names the file, the key and what is allowed."""


@dataclass(frozen=True, slots=True)
class ProjectSettings:
    """The table ``[tool.mpscale]`` of a pyproject.toml.

    Args:
        baseline: run that a pytest run is compared with; a path is relative to the working directory.
        fail_on: gates.
        strict: whether a gate that cannot tell also fails the build.
        threshold: smallest change of step time worth reporting, as text.
        compare_by: ``name`` to compare all versions of a workload, ``model`` to compare only the same model.
    """

    baseline: str | None = None
    fail_on: Sequence[str] = ()
    strict: bool = False
    threshold: str | None = None
    compare_by: str = "model"

    def override(self, **given: Any) -> ProjectSettings:
        """Return these settings with values from the command line, which win; None means not given."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


_KINDS: dict[str, str] = {
    "baseline": "a string",
    "fail-on": "a list of strings",
    "strict": "true or false",
    "threshold": 'a string such as "5%"',
    "compare-by": '"model" or "name"',
}


def load(start: Path) -> ProjectSettings:
    """Read the nearest pyproject.toml in ``start`` or above it. Without that file or table, return the defaults.

    Raises:
        SettingsError: the file cannot be read, or a setting is unknown or has the wrong type.
    """
    path = next((f / "pyproject.toml" for f in (start, *start.parents) if (f / "pyproject.toml").is_file()), None)
    if path is None:
        return ProjectSettings()
    try:
        table = tomllib.loads(read_text(path, SETTINGS))
        for name in ("tool", "mpscale"):
            table = table.get(name, {})
            if not isinstance(table, dict):
                raise SettingsError(f"{path}: {name} must be a table, not {table!r:.40}")
    except RunError as error:
        raise SettingsError(str(error)) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from error
    for key, value in table.items():
        if key not in _KINDS:
            raise SettingsError(f"{path}: [tool.mpscale] has no setting {shown(key)}, only {', '.join(_KINDS)}")
        if not _fits(key, value):
            raise SettingsError(f"{path}: {key} of [tool.mpscale] must be {_KINDS[key]}, not {value!r:.200}")
    baseline = table.get("baseline")
    # A path in the file is relative to the file, wherever pytest is called.
    if baseline is not None and path.parent != Path.cwd() and (path.parent / baseline).exists():
        baseline = str(path.parent / baseline)
    return ProjectSettings(
        baseline,
        tuple(table.get("fail-on", ())),
        table.get("strict", False),
        table.get("threshold"),
        table.get("compare-by", "model"),
    )


def _fits(key: str, value: Any) -> bool:
    if key == "fail-on":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if key == "compare-by":
        return value in COMPARE_BY
    return isinstance(value, bool) if key == "strict" else isinstance(value, str)


_LONGEST_PATH = 4096
"""What Linux allows."""

RUN = "name of a run or its first characters, a run's folder, a cases.csv, or `latest`"
"""Every way to name a run on the command line."""


def add_results_option(add: Callable[..., Any], prefix: str = "", *, default: Path | None = None) -> None:
    """Add ``--results``; without a default it is ``results/`` in pytest's root directory."""
    add(
        f"--{prefix}results",
        type=folder,
        default=default,
        metavar="DIR",
        help=f"results folder (default: {default or 'results/ in the root directory of pytest'})",
    )


COMPARE_BY = ("model", "name")
"""What rows of two runs must share, besides mode and settings: the same model, or the name of workload or series."""


def add_compare_by_option(add: Callable[..., Any], prefix: str = "") -> None:
    """Add ``--compare-by``, which overrides ``[tool.mpscale]``."""
    add(
        f"--{prefix}compare-by",
        choices=COMPARE_BY,
        help="model: compare rows only if model, batch, optimizer, loss and data are the same, unless the workload "
        "names a series; name: compare all versions of a workload, and say what changed (default: model)",
    )


def add_gate_options(add: Callable[..., Any], prefix: str = "") -> None:
    """Add ``--fail-on``, ``--strict`` and ``--compare-by``, which override ``[tool.mpscale]``."""
    add(
        f"--{prefix}fail-on",
        action="append",
        metavar="GATE",
        help="fail if a figure is worse than in the baseline: step_time>5%%, gpu_memory>3%%, host_memory>20%%, "
        "energy>10%%, compile_time>20%%, metric or missing; or beyond a limit, without a baseline: step_time<=12ms, "
        "gpu_memory<=8000MiB, speedup>=1.5, accuracy>=95%%, metric>=0.9, overflow_rate>0.01; of some rows only: "
        "speedup[mixed-*]>=1.5, metric[signs/fp32]; separate several by commas, or repeat the option",
    )
    add(f"--{prefix}strict", action="store_true", default=None, help="also fail if a gate cannot tell")
    add_compare_by_option(add, prefix)


def folder(text: str) -> Path:
    """The type of an option that takes a folder.

    Raises:
        argparse.ArgumentTypeError: the text cannot name one.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, and nothing was given")
    if len(text) > _LONGEST_PATH or "\0" in text:
        raise argparse.ArgumentTypeError(f"no folder can have this name: {shown(text)}")
    try:
        # A shell does not expand ~ in --option=~/folder.
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} names the home of a user unknown to this machine") from None


def number(parse: Callable[[str], N], fits: Callable[[N], bool], expected: str) -> Callable[[str], N]:
    """Return the type of an option that takes a number.

    Args:
        parse: converts a text to a number, or raises ValueError.
        fits: whether the option accepts the number.
        expected: describes what it accepts, for the message.
    """

    def parsed(text: str) -> N:
        with contextlib.suppress(ValueError):
            value = parse(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, not {shown(text)}")

    return parsed


def shown(text: str) -> str:
    """A value that a message repeats, in quotation marks; of a long one only the beginning."""
    return repr(text) if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]!r}... ({len(text):,} characters)"


def whole_number(text: str) -> int:
    """Parse a whole number: `int` would also take 1_000 and digits of other scripts.

    Raises:
        ValueError: it is none, or has more than 30 digits.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()):
        raise ValueError
    return int(text)


def integer(least: int, most: int, why: str = "") -> Callable[[str], int]:
    """Return the type of an option that takes a whole number.

    Args:
        least: the smallest.
        most: the largest.
        why: the reason for the largest, to follow it.
    """
    expected = f"an integer of at least {least} and at most {most}{why and f', {why}'}"
    return number(whole_number, lambda value: least <= value <= most, expected)


WEEK_S = 604_800.0
seconds = number(
    parse_number, lambda value: 0 < value <= WEEK_S, "a number of seconds above 0 and at most 604800, a week"
)
"""The type of an option that takes a time."""

training_steps = integer(1, MOST_STEPS, "since each step of a training is recorded")
batch_size = integer(1, 2**31 - 1, "since TensorFlow counts examples in 32 bits")

_MOST_MIB = 2.0**30
"""A pebibyte."""
_UNITS_MIB = {"m": 1.0, "g": 1024.0, "t": 1024.0**2}


def memory(text: str) -> float:
    """The type of an option that takes an amount of memory; in MiB.

    Raises:
        argparse.ArgumentTypeError: it is not an amount above 0 with a unit, or more than 1024 TiB.
    """
    found = re.fullmatch(r"([0-9]{1,30}\.?[0-9]{0,30})\s*([mgt])(i?b)?", text.strip().casefold())
    mib = 0.0 if found is None else float(found[1]) * _UNITS_MIB[found[2]]
    if not 0 < mib <= _MOST_MIB:
        raise argparse.ArgumentTypeError(
            f"expected an amount of memory such as 800MiB or 4GiB, at most 1024TiB, not {shown(text)}"
        )
    return mib


_ATTEMPTS = 20
"""How often to look whether a folder can be written to, while other sessions may do the same."""
_PAUSE_S = 0.01
"""The longest pause between two looks; its length is random, so that two sessions do not meet again."""
_PROBE = bytes(1 << 16)
"""More than file systems store in the entry of a file itself, so it does not fit on a full disk."""


def why_not_writable(wanted: Path) -> str | None:
    """Return why no file can be made in the folder ``wanted``, or None if one can.

    This makes one to find out: for root, permissions allow everything, even in /proc, and a full disk has them too. It
    leaves nothing behind, unless several sessions look at the same time: then one may leave an empty folder.
    """
    for attempt in range(_ATTEMPTS):
        try:
            _make_a_file_in(wanted)
        except OSError as error:
            culprit = Path(error.filename) if isinstance(error.filename, str) else wanted
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            if attempt < _ATTEMPTS - 1 and (isinstance(error, FileNotFoundError) or (in_the_way and culprit.is_dir())):
                # Another session looks at the same time, and has made or removed its folder.
                time.sleep(random.uniform(0.0, _PAUSE_S))
                continue
            # Name the folder or what is in its way, never the temporary file.
            place = culprit if culprit == wanted or culprit in wanted.parents else wanted
            return f"{place}: {'it exists and is not a folder' if in_the_way else why(error)}"
        else:
            break
    return None


def _make_a_file_in(wanted: Path) -> None:
    made: list[Path] = []
    try:
        for each in (*reversed(wanted.parents), wanted):
            if not each.is_dir():
                each.mkdir()
                made.append(each)
        with tempfile.TemporaryFile(dir=wanted) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
