"""Why something is missing, invalid or refused: a code for programs, a text for people and, if there is one, a cure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any


class Code(StrEnum):
    """The kind of a reason. Code and tests look at this and never at the text, which may change at any time."""

    OTHER = "other"
    """None of the kinds below, or from a version of mpscale without codes."""

    # The case
    NOT_IN_MODE = "not-in-mode"
    """The mode has no such thing: no loss scale, no check of gradients."""
    NOT_IN_WORKLOAD = "not-in-workload"
    """The workload has no such thing: no target, no margin, another metric."""
    NOT_ASKED_FOR = "not-asked-for"
    """An option turned it off."""
    NOT_REACHED = "not-reached"
    """The case ended before that."""
    UNSUPPORTED = "unsupported"
    """The device, or the way steps are compiled, cannot run the mode."""
    NOT_FINITE = "not-finite"
    """The figure is NaN or infinite."""
    NOT_COMPARABLE = "not-comparable"
    """The figure would say nothing about a difference between modes: it is random, or itself rounded."""
    NEVER_HAPPENED = "never-happened"
    """There was nothing to record: no step overflowed, no step was applied."""
    NOT_COUNTED = "not-counted"
    """The train step has an operation whose FLOPs are unknown."""
    NO_PEAK = "no-peak"
    """No figure of the manufacturer is known for this device in this precision."""
    MISFIT = "misfit"
    """A value does not belong in its column, so it was dropped."""
    OUT_OF_MEMORY = "out-of-memory"
    """A batch does not fit into the memory."""

    # The host and the GPU
    NO_GPU = "no-gpu"
    """The case ran on a CPU."""
    HIDDEN = "hidden"
    """CUDA_VISIBLE_DEVICES hides every GPU."""
    HOST_SILENT = "host-silent"
    """The operating system does not report the figure."""
    NO_LIBRARY = "no-library"
    """There is no driver library on this machine."""
    BINDING_BROKEN = "binding-broken"
    """The Python package that calls the driver library cannot be imported."""
    BINDING_TOO_OLD = "binding-too-old"
    """That package lacks a function that is needed."""
    DRIVER_NOT_LOADED = "driver-not-loaded"
    DRIVER_TOO_OLD = "driver-too-old"
    DRIVER_MISMATCH = "driver-mismatch"
    """The driver's library and its kernel module are of different versions."""
    DRIVER_SILENT = "driver-silent"
    """The driver did not answer in time."""
    MONITOR_DIED = "monitor-died"
    """The process that calls the driver has ended."""
    NO_DEVICE = "no-device"
    """The driver works, but there is no GPU that can be used."""
    NO_PERMISSION = "no-permission"
    GPU_LOST = "gpu-lost"
    """The GPU fell off the bus or was reset."""
    NOT_TOLD = "not-told"
    """The driver does not report the figure for this GPU."""
    SHARED = "shared"
    """A MIG instance: the figure is that of the whole GPU, which others share."""
    GARBLED = "garbled"
    """The driver returned a list that cannot be parsed."""
    IMPLAUSIBLE = "implausible"
    """The driver returned a value that cannot be true."""
    TOO_FEW_SAMPLES = "too-few-samples"
    """The readings are too few, or too old, for a figure."""
    WINDOW_TOO_SHORT = "window-too-short"
    ALLOCATOR_SILENT = "allocator-silent"
    """TensorFlow's allocator does not report the figure."""
    PROFILER_SILENT = "profiler-silent"
    """TensorFlow's profiler is in use, or it recorded nothing that can be read."""
    FORK_UNSAFE = "fork-unsafe"
    """The process that workers are forked from has touched the GPU, or nothing shows that it has not."""

    # The machine, before a run
    SOFTWARE_MISFIT = "software-misfit"
    """A package is missing, of a wrong version, or does not fit the GPU."""
    ENVIRONMENT = "environment"
    """An environment variable distorts figures."""
    REFUSED_OPTION = "refused-option"
    """An option that a run would have here is unknown, or has a value that it cannot have."""
    MISCOMPILES = "miscompiles"
    """A compiler is of a version that is known to make wrong programs."""
    SLOWED = "slowed"
    """The GPU is kept, or was seen, below the clocks or the power that it is made for."""
    PROCESSES_HIDDEN = "processes-hidden"
    """The driver and this process may number processes differently, so that none finds those of the other."""
    BUSY = "busy"
    """Another process computes on the GPU."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is missing, invalid or refused.

    Args:
        code: the kind, for programs.
        text: the reason in words, for people.
        cure: what the user can do about it, as an instruction; None if nothing, or if that is not known.
    """

    code: Code
    text: str
    cure: str | None = None

    def __post_init__(self) -> None:
        # Names of files that are not UTF-8 come with surrogates, which cannot be written to a file.
        object.__setattr__(self, "text", encodable(self.text))

    def __str__(self) -> str:
        return self.text

    def worded(self, text: str) -> Reason:
        """The same reason with another text, such as one that says more."""
        return replace(self, text=text)

    def to_json(self) -> dict[str, str]:
        """A dict of plain values."""
        found = {"code": str(self.code), "text": self.text}
        return found if self.cure is None else {**found, "cure": self.cure}

    @classmethod
    def from_json(cls, value: Any) -> Reason:
        """The inverse of :meth:`to_json`. A bare text, as older versions wrote it, has the code ``other``.

        Raises:
            TypeError: the value is neither a text nor an object with a text.
        """
        try:
            if isinstance(value, str):
                return _shared(Code.OTHER, value, None)
            return _shared(value.get("code"), value.get("text"), value.get("cure"))
        except (AttributeError, TypeError):
            raise TypeError(f"a reason should be a text or an object with a text, not {value!r:.200}") from None


@lru_cache(maxsize=4096)
def _shared(code: Any, text: Any, cure: Any) -> Reason:
    """One object for equal reasons: a run of ten thousand cases holds half a million, and few different ones.

    Raises:
        TypeError: the text is not one.
    """
    if not isinstance(text, str):
        raise TypeError
    # A newer mpscale may have more codes.
    return Reason(Code(code) if code in set(Code) else Code.OTHER, text, cure if isinstance(cure, str) else None)


def encodable(text: str) -> str:
    """``text`` with an escape for each lone surrogate, so that any file can hold it."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
