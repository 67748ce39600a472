"""Which preset fits a machine, and about how long it takes there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpscale.core.device import Device
from mpscale.core.mode import Mode, default_modes, is_mixed
from mpscale.presets import DEFAULT_PRESET, GPU_PRESET, PRESETS, Apart, Preset, preset_for

_CPU_S = {
    "padded-gru": 6.0,
    "beam-strain": 3.5,
    "diabetes-sum": 2.0,
    "mnist1d-mlp": 3.5,
    "mnist1d-cnn": 5.0,
    "mnist1d-gru": 22.0,
    "article-mlp": 2.2,
}
"""Seconds of a case without its timing, seen on two cores of an AMD EPYC; fewer with the 100 steps of ``smoke``."""
_GPU_S = 3.0
"""The same for the smallest workload on an NVIDIA H200, forked. Larger ones take longer, as XLA tunes their kernels."""


@dataclass(frozen=True, slots=True)
class _Large:
    """What a process of a large workload takes on a GPU like an H100, in seconds.

    On an H200, the first step of a wide dense network took 58 s in float16 and 4 to 8 s in float32, that of a
    transformer's encoder 14 s in float32 and more than 100 s in float16: nearly all of it is XLA's tuning. ResNet-50
    was seen without XLA only. All else is estimated from these.

    Args:
        start: from the fork to the traced step, and the end of the process.
        tuned_32, tuned_16: of the first step, if XLA tunes its kernels for it, in float32 and in 16 bits.
        step: a step in float32, with the batch for 80 GB.
    """

    start: float
    tuned_32: float
    tuned_16: float
    step: float


_LARGE = {
    "resnet50": _Large(start=10.0, tuned_32=15.0, tuned_16=45.0, step=0.2),
    "bert-base": _Large(start=10.0, tuned_32=15.0, tuned_16=110.0, step=0.6),
    "unet": _Large(start=8.0, tuned_32=15.0, tuned_16=45.0, step=0.6),
    "wide-mlp": _Large(start=6.0, tuned_32=8.0, tuned_16=60.0, step=0.25),
}
_COMPILED_S = 10.0
"""Of the first step, if the process is given the results of another's tuning."""
_OTHER_STEPS = 20
"""Steps besides those of a training: the opening ones, warm-up and profile."""
_FASTER = 3.0
"""How many times faster than float32 a step is in other modes, which the estimate hardly depends on."""
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
    durations = [
        _duration(name, preset, device)
        for name, preset in PRESETS.items()
        if device.kind == "gpu" or name != GPU_PRESET
    ]
    if device.kind == "gpu":
        fits, why = preset_for(device)
        if fits == GPU_PRESET:
            words = (
                "A run takes it by default here. Its large workloads show what a mode buys in speed, memory and "
                "energy, on synthetic inputs. Its small ones show whether every mode trains as well as fp32.",
                "The batches fit the memory of this GPU; --mp-batch-size sets others.",
            )
            return Advice(fits, durations, words)
        words = (
            f"The large workloads do not fit: {why}.",
            "It shows whether every mode trains as well as fp32 here. Its workloads are too small to keep a GPU busy: "
            "their step times say more about Python than about the GPU. --mp-steps-per-call 20 takes most of Python "
            "out of a step.",
        )
        return Advice(fits, durations, words)
    first = "It shows whether every mode trains as well as fp32. `full` has more seeds for a verdict."
    if cores < _FEW_CORES:
        few = "Begin with `smoke`: the times below were seen on two cores, and there is one here."
        return Advice("smoke", durations, (few,))
    return Advice(DEFAULT_PRESET, durations, (first,))


def _duration(name: str, preset: Preset, device: Device) -> Duration:
    cases, seconds = 0, 0.0
    for workload in preset.workloads:
        apart = preset.apart.get(workload, Apart())
        if apart.batches and apart.batch(device.memory_mib) is None:
            continue
        modes = default_modes(device, apart.modes)
        processes = len(modes) * ((apart.seeds or preset.seeds) + apart.repeats)
        cases += processes
        energy_s = preset.energy_s if apart.energy_s is None else apart.energy_s
        if workload in _LARGE:
            measured = max(energy_s, preset.timing_s) * processes
            seconds += measured + sum(_large_s(_LARGE[workload], mode, apart) for mode in modes)
        elif device.kind == "gpu":
            seconds += processes * (_GPU_S + max(energy_s, preset.timing_s))
        else:
            seconds += processes * (_CPU_S[workload] + preset.timing_s)
    return Duration(name, cases, seconds)


def _large_s(known: _Large, mode: Mode, apart: Apart) -> float:
    """Seconds of all processes of a mode without their timing."""
    processes = (apart.seeds or 1) + apart.repeats
    tuned = known.tuned_16 if is_mixed(mode.name) else known.tuned_32
    compiled = tuned + (processes - 1) * (_COMPILED_S if apart.autotune == "shared" else tuned)
    steps = (apart.seeds or 1) * (apart.train_steps or 0) + processes * _OTHER_STEPS
    return processes * known.start + compiled + steps * known.step / (1.0 if mode.name == "fp32" else _FASTER)
