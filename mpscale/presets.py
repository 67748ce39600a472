"""Presets: which workloads, modes, seeds and times a run has unless options say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from mpscale.core.device import Device
from mpscale.core.mode import DEFAULT_MODES


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
