"""How long a GPU computes per step, from a profile of a few steps that are not timed.

TensorFlow's profiler writes an XSpace protocol buffer, in which CUPTI has recorded every kernel. What the reader
relies on was found in profiles of an H200 that TensorFlow 2.21 wrote (tests/data/xspace), and in the sources of XLA's
profiler (``cupti_collector.cc``, ``trace_utils.h``):

- A GPU is a plane, ``/device:GPU:0`` and so on, numbered as the process sees them. Without CUPTI there is none, or none
  with events; the host's planes are there in any case.
- A line of a GPU plane is a CUDA stream. Streams overlap, and so do kernels of one stream (on the H200 gradients of
  convolutions, by up to 3 us): times must be united, never added.
- An event lies at ``line.timestamp_ns * 1000 + event.offset_ps`` and lasts ``event.duration_ps``. These are
  picoseconds, but CUPTI's clock counts nanoseconds. All lines share the clock of the profile, which starts near 0.
- The statistics of an event tell its kind: a kernel has ``kernel_details``, a copy ``memcpy_details`` and a fill
  ``Memset_details``. Their names are those of the CUDA functions and tell nothing. A kernel inside a CUDA graph is
  recorded like any other, with ``cuda_graph_node_id``; if CUPTI traces graphs as a whole, one event with
  ``cuda_graph_exec_id`` stands for all of a launch. Its gaps are short, so it counts as a kernel. The profiles of the
  H200 contain no graphs.
- Tools that read a profile add lines that repeat the same time by step, module, operation or name scope. Their ids are
  in a range of their own. TensorFlow's profiler does not write them, but another version may.
- Counters and CUPTI's own overhead are on further lines. They have none of these statistics.
- CUPTI drops events that began before the profile or end after it.

The profile contains only whole steps: the device is idle when it starts and again before it stops, and warm-up comes
before it. Time per step is therefore the time of the profile over the number of steps. In the profiles of the H200,
kernels of the first of three steps took at most 4 % longer than those of the fastest, although others used the GPU.

A CPU has no such figure. Without XLA, the profiler records only the operations that TensorFlow takes for expensive at
that moment (17 to 19 of a small step, 47 to 189 of a larger one, from one profile to the next), and no times of the
threads that share an operation. With XLA it records every operation, which lengthened a step of 1 ms by up to 0.3 ms,
but not the time between them. On two cores, operations so covered 60 to 76 % of a small step without XLA and 43 to 59 %
of it with XLA, although the process kept 1.5 and 1.1 cores busy all the time. The spans around operations cover the
whole call, waiting included: that is the step time, which is known already.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

from mpscale.core.device import Device
from mpscale.core.files.temporary import TemporaryFolder
from mpscale.core.reason import Code, Reason

_GPU_PLANE = re.compile(r"/device:GPU:(\d+)")
_KERNELS = frozenset({"kernel_details", "cuda_graph_exec_id"})
_COPIES = frozenset({"memcpy_details", "Memset_details"})
_DERIVED_LINES = range(0xDEADBEEF, 0xDEADBEEF + 0x1000)
"""Ids of lines that repeat the time of others, as unsigned 32-bit numbers; TensorFlow 2.21 uses the first 390."""

_PS_PER_MS = 10**9

TOLERANCE = 0.05
"""By how much kernels may run longer than a step takes. Steps are profiled after they were timed, so clocks differ."""

_NO_CUPTI = (
    "install CUPTI, which pip install 'tensorflow[and-cuda]' includes; if it is there, allow profiling: load the "
    "kernel module nvidia with NVreg_RestrictProfilingToAdminUsers=0, or start the container with --cap-add=SYS_ADMIN"
)


@dataclass(frozen=True, slots=True)
class BusyTime:
    """What one GPU did in a profile.

    Args:
        kernels_ms: time in which at least one kernel ran.
        copies_ms: time in which memory was copied or filled. It may overlap with kernels.
        kernels: how many kernels ran, those of CUDA graphs included where CUPTI tells them apart.
        steps: how many steps the profile contains.
    """

    kernels_ms: float
    copies_ms: float
    kernels: int
    steps: int = 1

    @property
    def kernels_ms_per_step(self) -> float:
        return self.kernels_ms / self.steps

    @property
    def copies_ms_per_step(self) -> float:
        return self.copies_ms / self.steps

    def share(self, step_ms: float) -> float | Reason:
        """The share of a step in which at least one kernel runs; ``step_ms`` was measured without the profiler."""
        share = self.kernels_ms_per_step / step_ms
        if share <= 1 + TOLERANCE:
            return min(share, 1.0)
        return Reason(
            Code.IMPLAUSIBLE,
            f"kernels ran for {self.kernels_ms_per_step:.3g} ms per step while steps were profiled, but a step took "
            f"{step_ms:.3g} ms while they were timed",
            "run again when nothing else uses the GPU",
        )


def busy_time(profile: Any, steps: int = 1) -> dict[int, BusyTime]:
    """The GPUs of a profile (XSpace) of ``steps`` steps, by number. GPUs on which no kernel ran are left out."""
    gpus = {}
    for plane in profile.planes:
        match = _GPU_PLANE.fullmatch(plane.name)
        if match is None:
            continue
        kernels, copies = _intervals(plane, _KERNELS), _intervals(plane, _COPIES)
        if busy := _union(kernels):
            gpus[int(match[1])] = BusyTime(busy / _PS_PER_MS, _union(copies) / _PS_PER_MS, len(kernels), steps)
    return gpus


def profile_steps(run_steps: Callable[[], None], steps: int, device: Device) -> BusyTime | Reason:
    """Run some steps under TensorFlow's profiler and return how long the GPU computed.

    The GPU is number 0, the only one that a case uses; other visible GPUs are ignored. CUPTI costs time at its first
    use and keeps some memory of the device: call this when everything that is measured has been measured. Nothing runs
    on a CPU. A profiler that fails costs the figure and never the case.

    Args:
        run_steps: takes ``steps`` steps, which must be compiled and warm. What it raises is passed on.
        steps: how many; the profile grows with the number of kernels, and 2 million are too many for CUPTI.
        device: the device of the case.
    """
    if device.kind != "gpu":
        return Reason(Code.NO_GPU, "on a CPU, TensorFlow's profiler records too little to tell when it computes")
    if device.is_stand_in:
        return Reason(Code.NO_GPU, "the CPU trained in place of the stand-in")
    profile = record(run_steps)
    return profile if isinstance(profile, Reason) else first_gpu(profile, steps)


def first_gpu(profile: Any, steps: int) -> BusyTime | Reason:
    """GPU 0 in a profile (XSpace) of ``steps`` steps."""
    # Both are about CUPTI: what kept it from recording, and how many events it dropped.
    complaints = "; ".join([*profile.errors, *profile.warnings])
    found = busy_time(profile, steps).get(0)
    if found is None:
        told = f" ({complaints})" if complaints else ""
        return _silent(f"TensorFlow's profiler recorded no kernel of the GPU: CUPTI gave it none{told}", _NO_CUPTI)
    if complaints:
        return _silent(f"TensorFlow's profile of the GPU may be incomplete ({complaints})")
    return found


def record(run_steps: Callable[[], None]) -> Any | Reason:
    """Return the XSpace of a call of ``run_steps`` and of all that it starts on a device."""
    try:
        place = TemporaryFolder("profile")
        name = str(place.path)
    except OSError as error:
        return _silent(f"TensorFlow's profiler has no place for its file: {error}")
    with place:
        tf.test.experimental.sync_devices()
        try:
            # Without options: TensorFlow 2.21 ignores them, as a profile's own note of its options shows.
            tf.profiler.experimental.start(name)
        except tf.errors.AlreadyExistsError:
            return _silent(
                "TensorFlow's profiler is already in use in this process",
                "let the workload stop its profile before the training ends (tf.profiler.experimental.stop)",
            )
        except Exception as error:  # whatever it is, the case goes on without the figure
            return _silent(f"TensorFlow's profiler did not start: {_said(error)}")
        try:
            run_steps()
            tf.test.experimental.sync_devices()
        except BaseException:
            with contextlib.suppress(Exception):
                tf.profiler.experimental.stop(save=False)
            raise
        try:
            tf.profiler.experimental.stop()
        except Exception as error:
            return _silent(f"TensorFlow's profiler gave no profile: {_said(error)}")
        return read_profile(Path(name))


def read_profile(folder: Path) -> Any | Reason:
    """Return the only XSpace under a folder that the profiler has written to."""
    files = list(folder.rglob("*.xplane.pb"))
    if len(files) != 1:
        return _silent(f"TensorFlow's profiler wrote {len(files)} files instead of one")
    try:
        content = files[0].read_bytes()
        profile = XSpace.FromString(content)
    except (OSError, DecodeError) as error:
        return _silent(f"TensorFlow's profile cannot be read: {_said(error)}", f"free space in {tempfile.gettempdir()}")
    # No bytes are a valid message.
    return profile if content else _silent("TensorFlow's profile is an empty file")


def _intervals(plane: Any, kinds: frozenset[str]) -> list[tuple[int, int]]:
    """Start and end, in ps, of the events of a GPU plane that have one of these statistics."""
    ids = {key for key, metadata in plane.stat_metadata.items() if metadata.name in kinds}
    return [
        (start := line.timestamp_ns * 1000 + event.offset_ps, start + event.duration_ps)
        for line in plane.lines
        if line.id % 2**32 not in _DERIVED_LINES
        for event in line.events
        if any(stat.metadata_id in ids for stat in event.stats)
    ]


def _union(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of a union of intervals, which may overlap, touch or be empty."""
    length = reached = 0  # no time of a profile is negative
    for start, end in sorted(intervals):
        if end > reached:
            length += end - max(start, reached)
            reached = end
    return length


def _silent(text: str, cure: str | None = None) -> Reason:
    return Reason(Code.PROFILER_SILENT, text, cure)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
