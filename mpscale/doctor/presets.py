"""Which preset fits a machine, and about how long it takes there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpscale.config import DEFAULT_PRESET, PRESETS, Preset
from mpscale.core.device import Device
from mpscale.core.mode import default_modes

_CPU_S = {"mnist1d-mlp": 3.5, "mnist1d-cnn": 5.0, "mnist1d-gru": 22.0, "article-mlp": 2.2}
"""Seconds of a case without its timing, seen on two cores of an AMD EPYC; fewer with the 100 steps of ``smoke``."""
_GPU_S = 3.0
"""The same for the smallest workload on an NVIDIA H200, forked. Larger ones take longer, as XLA tunes their kernels."""
_FEW_CORES = 2


@dataclass(frozen=True, slots=True)
class Duration:
    """A preset, the number of its cases, and about how many seconds they take."""

    preset: str
    cases: int
    seconds: float

    def __str__(self) -> str:
        minutes = self.seconds / 60
        return (
            f"{self.preset}: {self.cases} cases, about {minutes:.0f} min" if minutes >= 1 else f"{self.preset}: < 1 min"
        )


@dataclass(frozen=True, slots=True)
class Advice:
    """Which preset fits.

    Args:
        preset: its name.
        durations: of all presets; rough, and rather too short.
        words: what it is good for on this machine, in sentences.
    """

    preset: str
    durations: list[Duration] = field(default_factory=list)
    words: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        durations = {each.preset: {"cases": each.cases, "about_s": round(each.seconds)} for each in self.durations}
        return {"fits": self.preset, "presets": durations, "words": list(self.words)}


def advice(device: Device, cores: int) -> Advice:
    """Return which preset fits a device.

    Args:
        device: where a run would train.
        cores: the processor cores that it may use.
    """
    durations = [_duration(name, preset, device) for name, preset in PRESETS.items()]
    if device.kind == "gpu":
        words = (
            "It shows whether every mode trains as well as fp32 here. Its workloads are too small to keep a GPU busy: "
            "their step times say more about Python than about the GPU.",
            "For speed, take a workload of GPU size with --mp-workloads module:attribute and a --mp-batch-size that "
            "fills the GPU. For small workloads, --mp-steps-per-call 20 takes most of Python out of a step.",
        )
        return Advice(DEFAULT_PRESET, durations, words)
    first = "It shows whether every mode trains as well as fp32. `full` has more seeds for a verdict."
    if cores < _FEW_CORES:
        few = "Begin with `smoke`: the times below were seen on two cores, and there is one here."
        return Advice("smoke", durations, (few,))
    return Advice(DEFAULT_PRESET, durations, (first,))


def _duration(name: str, preset: Preset, device: Device) -> Duration:
    cases = len(default_modes(device)) * preset.seeds
    if device.kind == "gpu":
        per_case = dict.fromkeys(preset.workloads, _GPU_S + max(preset.energy_s, preset.timing_s))
    else:
        per_case = {workload: _CPU_S[workload] + preset.timing_s for workload in preset.workloads}
    return Duration(name, cases * len(preset.workloads), cases * sum(per_case.values()))
