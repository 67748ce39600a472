"""The device of a run: why it is not a GPU, its settings and state, its figures, and which precisions are fast."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mpscale.core.device import NVIDIA, Device, vendor_of
from mpscale.core.reason import Code, Reason
from mpscale.doctor.finding import Caution
from mpscale.telemetry import host
from mpscale.telemetry.client import Driver, NoDriver
from mpscale.telemetry.samples import THROTTLING, ClockEvent, Reading

Answer = Literal["yes", "in part", "no"]

SIGNS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""Files of NVIDIA's kernel module. One of them exists if there is a GPU, even if the driver's library is broken."""

_NORMAL_WITHOUT_GPU = (Code.NO_LIBRARY, Code.DRIVER_NOT_LOADED, Code.NO_DEVICE)
_NEAR_SLOWDOWN_C = 20.0
_FAR_BELOW = 0.8
_SEE_WHY = "see what nvidia-smi -q -d CLOCK,PERFORMANCE says"
_IF_HIDDEN = (
    "If the driver does not list the worker, peak memory is the rise of the whole GPU's memory, which is right as "
    "long as nobody else uses it"
)
_SHARE_NAMESPACE = "start the container with --pid=host, to have memory by process"
_HOST_NAMESPACE = "pid:[4026531836]"
"""The first PID namespace of every Linux has this number (PROC_PID_INIT_INO)."""

_ADVICE = (
    "For Tensor Cores choose batch, units and channels in multiples of 8.",
    "mpscale compiles steps with XLA; your own program needs jit_compile=True for the same speed.",
    "Small steps wait for Python, not for the GPU: if a report says dispatch_bound, use a larger batch, or "
    "--mp-steps-per-call.",
)
_NO_SPEED = (
    "Figures here show whether training works (overflow, loss scale, accuracy), but not the speed of another device."
)


def why_no_gpu(driver: Driver | NoDriver, environ: Mapping[str, str]) -> Reason:
    """Return why a run would use the CPU."""
    if driver.devices:
        visible = vendor_of(driver.devices).visible
        names = ", ".join(gpu.name for gpu in driver.devices if gpu.parent_uuid is None)
        return Reason(Code.HIDDEN, f"{visible}={environ.get(visible)!r} hides {names}")
    return driver.reason or Reason(Code.NO_DEVICE, "the driver works and finds no GPU")


def check_absence(why: Reason, environ: Mapping[str, str], signs: Sequence[Path] = SIGNS) -> Iterator[Reason | str]:
    """Check whether the machine has a GPU although a run would use the CPU.

    Args:
        why: from :func:`why_no_gpu`.
        environ: environment variables.
        signs: files that exist while NVIDIA's driver is loaded.
    """
    if why.code is Code.HIDDEN:
        yield f"{why}, so the CPU is measured"
        return
    has_gpu = why.code not in _NORMAL_WITHOUT_GPU or any(sign.exists() for sign in signs)
    if has_gpu and not NVIDIA.hides(environ):
        yield replace(
            why,
            text=f"NVIDIA's driver is on this machine, but no GPU can be used: {why}",
            cure=f"{why.cure or 'see what nvidia-smi says'}; or measure the CPU with {NVIDIA.visible}=-1",
        )


def check_gpu(device: Device, facts: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Reason | str]:
    """Check the settings and state of the GPU, and who else uses it.

    Args:
        device: the GPU.
        facts: its properties, from :meth:`Driver.facts`.
        now: its state, from :meth:`Driver.look`.
    """
    if now["lost"]:
        yield Reason(
            Code.GPU_LOST, "the GPU stopped answering just now", "reset it with nvidia-smi --gpu-reset, or reboot"
        )
    if now["processes"]:
        yield Reason(
            Code.BUSY,
            f"{_others(now['processes'])} computed on the GPU just now. Rows would be invalid, since memory and energy "
            "include theirs",
            f"end them (nvidia-smi lists them), name another GPU in {vendor_of([device]).visible}, or keep such rows "
            "with --mp-keep-suspect",
        )
    if facts["persistence"] is False:
        yield (
            "persistence mode is off: the first call to an idle GPU takes seconds, and settings may be lost between "
            "runs (turn it on with nvidia-smi -pm 1, as root)"
        )
    if device.parent_uuid is not None:
        yield "a MIG instance: figures of the whole GPU, which others share, are left empty"
    if now["graphics_processes"]:
        yield f"{_others(now['graphics_processes'])} drew with the GPU just now: step times may vary more"
    temperature, slowdown = now["temperature_c"], facts.get("slowdown_c")
    if temperature is not None and slowdown is not None and temperature > slowdown - _NEAR_SLOWDOWN_C:
        yield f"the GPU is at {temperature:g} °C and slows down at {slowdown:g} °C: let it cool first"
    events = [event for event in now["clock_events"] if event in THROTTLING]
    if events:
        yield f"the GPU is throttled just now ({', '.join(events)}): rows would be invalid meanwhile"


def check_speed(facts: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Caution]:
    """Check whether the GPU is kept below what it is made for.

    Args:
        facts: its properties, from :meth:`Driver.facts`.
        now: its state, from :meth:`Driver.look`. The clocks of an idle GPU are low and say nothing.
    """
    limit, default = facts["power_limit_w"], facts.get("power_limit_default_w")
    if limit is not None and default is not None and limit < default:
        text = f"the power limit is {limit:g} W, below the default of {default:g} W: steps may be slower than elsewhere"
        yield Caution(Code.SLOWED, text, f"nvidia-smi -pl {default:g}, as root")
    if ClockEvent.APPLICATION_CLOCKS in now["clock_events"]:
        text = "the clocks are held down by a setting (application clocks): steps are slower than elsewhere"
        yield Caution(Code.SLOWED, text, "nvidia-smi -rac and nvidia-smi -rgc, as root")
    elif ClockEvent.IDLE not in now["clock_events"]:
        yield from check_clock(now["sm_clock_mhz"], facts, "just now, and the driver does not say that it idles")
        memory, most = now["memory_clock_mhz"], facts.get("max_memory_clock_mhz")
        if memory is not None and most is not None and memory < _FAR_BELOW * most:
            yield Caution(Code.SLOWED, f"the GPU's memory runs at {memory:.0f} of {most:.0f} MHz just now", _SEE_WHY)


def check_clock(clock_mhz: float | None, facts: Mapping[str, Any], when: str) -> Iterator[Caution]:
    """Check whether a clock of the multiprocessors is far below the highest one.

    Args:
        clock_mhz: None if unknown.
        facts: properties of the GPU, from :meth:`Driver.facts`.
        when: the clock was seen.
    """
    most = facts.get("max_sm_clock_mhz")
    if clock_mhz is not None and most is not None and clock_mhz < _FAR_BELOW * most:
        yield Caution(Code.SLOWED, f"the GPU ran at {clock_mhz:.0f} of {most:.0f} MHz {when}", _SEE_WHY)


def check_namespace(
    now: Mapping[str, Any], own: bool | None = None, processes: Path = Path("/proc")
) -> Iterator[Caution]:
    """Check whether the driver may number processes otherwise than this machine or container does.

    Only a process that uses the GPU shows for certain whether the driver lists it under its own number.

    Args:
        now: the state of the GPU, from :meth:`Driver.look`.
        own: whether this process has a PID namespace of its own; None to find out.
        processes: the folder with an entry for each process.
    """
    if not (_has_own_namespace() if own is None else own):
        return
    strange = [pid for pid in now["pids"] if not (processes / str(pid)).exists()]
    if strange:
        listed = ", ".join(map(str, strange[:3]))
        text = f"the driver lists processes that do not exist here ({listed}), so it does not number them as we do"
    else:
        text = (
            "this process has a PID namespace of its own; whether the driver lists a worker under its number there "
            "shows only when one uses the GPU (mpscale doctor --gpu)"
        )
    yield Caution(Code.PROCESSES_HIDDEN, f"{text}. {_IF_HIDDEN}", _SHARE_NAMESPACE)


def check_listed(method: str | None, why: Reason | None) -> Iterator[Caution]:
    """Check whether the driver listed a worker that used the GPU.

    Args:
        method: its column ``gpu_memory_method``.
        why: its column ``gpu_memory_process_peak_mib`` is empty; None if it is not.
    """
    if why is not None and method is not None:
        yield Caution(Code.PROCESSES_HIDDEN, f"the short training: {why}. {_IF_HIDDEN}", _SHARE_NAMESPACE)


def _has_own_namespace() -> bool:
    """Whether this process has its own PID namespace, as in most containers."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()) != _HOST_NAMESPACE
    except OSError:
        return False


def _others(count: int) -> str:
    return f"{count} other process{'' if count == 1 else 'es'}"


@dataclass(frozen=True, slots=True)
class Figure:
    """Whether a run can measure a figure.

    Args:
        name: in plain words.
        answer: whether it can be measured.
        way: how; None if it cannot be measured.
        reason: why not, or why only in part; None if the answer is yes.
    """

    name: str
    answer: Answer
    way: str | None = None
    reason: Reason | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {
            "figure": self.name,
            "answer": self.answer,
            "way": self.way,
            "reason": self.reason and self.reason.text,
            "do": self.reason and self.reason.cure,
        }


_GPU_FIGURES = {
    "peak GPU memory": Reading.PROCESSES,
    "reserved memory": Reading.RESERVED_MEMORY,
    "energy": Reading.ENERGY,
    "power": Reading.POWER,
    "clocks": Reading.SM_CLOCK,
    "temperature": Reading.TEMPERATURE,
    "throttling": Reading.CLOCK_EVENTS,
    "utilisation": Reading.UTILIZATION,
}
"""Figures of the GPU, each with the reading that it needs most."""


def figures_without_gpu(why: Reason) -> list[Figure]:
    """Return all figures of a run without a GPU, or with one that cannot be watched."""
    return _with_the_others([Figure(name, "no", reason=why) for name in _GPU_FIGURES])


def figures_of_gpu(ways: Mapping[str, str], reasons: Mapping[str, Reason]) -> list[Figure]:
    """Return all figures of a run on a GPU.

    Args:
        ways: how readings are taken.
        reasons: why other readings cannot be taken.
    """
    figures = {name: _figure(name, reading, ways, reasons) for name, reading in _GPU_FIGURES.items()}
    memory, energy, clocks = figures["peak GPU memory"], figures["energy"], figures["clocks"]
    if memory.reason is None:
        figures["peak GPU memory"] = replace(memory, way="process: the driver's list of processes")
    elif Reading.MEMORY in ways:
        way = "device-minus-idle: right if nobody else uses the GPU"
        figures["peak GPU memory"] = replace(memory, answer="in part", way=way)
    if energy.reason is not None and Reading.POWER in ways:
        reason = energy.reason.worded(f"no counter: {energy.reason}")
        figures["energy"] = Figure("energy", "in part", "power: its integral over the timed steps", reason)
    memory_clock = _figure("clocks", Reading.MEMORY_CLOCK, ways, reasons)
    for name, missing, known in (("sm", clocks, memory_clock), ("memory", memory_clock, clocks)):
        if missing.reason is not None and known.reason is None:
            reason = missing.reason.worded(f"not of {name}: {missing.reason}")
            figures["clocks"] = replace(known, answer="in part", reason=reason)
    return _with_the_others(list(figures.values()))


def _figure(name: str, reading: Reading, ways: Mapping[str, str], reasons: Mapping[str, Reason]) -> Figure:
    if reading in ways:
        return Figure(name, "yes", ways[reading])
    return Figure(name, "no", reason=reasons.get(reading) or Reason(Code.NOT_TOLD, "the driver does not report it"))


def check_figures(figures: Sequence[Figure]) -> Iterator[Reason]:
    """Yield a problem for each reason that the user can remove, with all figures that are missing because of it."""
    together: dict[Reason, list[str]] = {}
    for figure in figures:
        if figure.reason is not None and figure.reason.cure is not None:
            together.setdefault(figure.reason, []).append(figure.name)
    for reason, names in together.items():
        yield reason.worded(f"not or not fully measured: {', '.join(names)}: {reason}")


def _with_the_others(of_gpu: Sequence[Figure]) -> list[Figure]:
    memory = Figure("host memory", "yes", "VmHWM of the process")
    if host.peak_resident_mib(os.getpid()) is None:
        memory = Figure("host memory", "no", reason=Reason(Code.HOST_SILENT, "this system has no /proc"))
    return [
        Figure("step time", "yes", "blocks of compiled steps in steady state"),
        *of_gpu,
        memory,
        Figure("overflow", "yes", "every gradient is checked, in modes with a loss scale"),
        Figure("accuracy", "yes", "on the test set, after the last step"),
    ]


@dataclass(frozen=True, slots=True)
class Precision:
    """Which precisions are fast on a device; None if unknown. Only a run shows what a model gains from that.

    Args:
        float16: whether products of float16 are fast.
        bfloat16: whether products of bfloat16 are fast.
        tf32: whether the device can round float32 products to TF32.
        float8: whether products of float8 are fast.
        words: what that means for a run, in sentences.
    """

    float16: Answer | None
    bfloat16: Answer | None
    tf32: bool
    float8: Answer | None
    words: tuple[str, ...]


def precision_of_gpu(device: Device) -> Precision:
    """Return which precisions a GPU computes fast, judged by its generation."""
    capability = device.compute_capability
    if capability is None:
        unknown = "The compute capability is unknown, so nothing can be said about speed."
        return Precision(None, None, False, None, (unknown,))
    mine = f"Compute capability {'.'.join(map(str, capability))}"
    if device.has_tf32:
        cores = "float16, bfloat16, TF32 and, under XLA, float8" if device.has_float8 else "float16, bfloat16 and TF32"
        fast = f"{mine}: {cores} run on Tensor Cores."
        baseline = (
            "By default TensorFlow rounds float32 products to TF32 here. Compare mixed modes with tf32, and fp32 with "
            "tf32 to see what TF32 alone gives."
        )
        return Precision("yes", "yes", True, "yes" if device.has_float8 else "no", (fast, baseline, *_ADVICE))
    converted = "bfloat16 is converted to float32 and back, and TF32 needs 8.0."
    # Compute capability 7.5 is Turing both with and without Tensor Cores; only the name tells them apart.
    if capability >= (7, 0) and not (capability == (7, 5) and "GTX 16" in device.name):
        return Precision("yes", "no", False, "no", (f"{mine}: float16 runs on Tensor Cores. {converted}", *_ADVICE))
    if capability in ((5, 3), (6, 0), (6, 2), (7, 5)):
        twice = f"{mine}, no Tensor Cores: float16 is up to twice as fast as float32. {converted}"
        return Precision("in part", "no", False, "no", (twice, *_ADVICE[1:]))
    slow = "float16 is far slower than float32" if capability == (6, 1) else "there is no arithmetic for float16"
    nothing = f"{mine}: {slow}, so mixed precision saves memory at most. {converted}"
    return Precision("no", "no", False, "no", (nothing, _NO_SPEED))


def precision_of_cpu(flags: Sequence[str] | None) -> Precision:
    """Return which precisions a CPU computes fast.

    Args:
        flags: its instruction sets that matter for precision, None if unknown.
    """
    if flags is None:
        unknown = "This system does not report which instructions its CPU has for float16 and bfloat16."
        return Precision(None, None, False, "no", (unknown, _NO_SPEED))
    float16: Answer = "yes" if "amx_fp16" in flags else "in part" if "avx512_fp16" in flags else "no"
    bfloat16: Answer = "yes" if "amx_bf16" in flags else "in part" if "avx512_bf16" in flags else "no"
    fast = [name for name, answer in (("bfloat16", bfloat16), ("float16", float16)) if answer != "no"]
    words = ["This CPU has no instructions for float16 or bfloat16, so mixed precision saves no time here."]
    if fast:
        words = [
            f"This CPU has instructions for {' and '.join(fast)}. TensorFlow uses them through oneDNN, which XLA does "
            "not call: try --mp-jit off."
        ]
    if float16 == "no":
        words.append("float16 is emulated; without XLA it may be many times slower than float32.")
    return Precision(float16, bfloat16, False, "no", (*words, _NO_SPEED))
