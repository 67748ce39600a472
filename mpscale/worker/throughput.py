"""How fast a step computes: TFLOP/s, and the share of the device's peak."""

from __future__ import annotations

from typing import Any

from mpscale.core.device import Device
from mpscale.core.mode import Mode
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.worker.flops import flops_of
from mpscale.worker.peaks import peak_of

_PER_MS = 1e9
"""FLOPs per ms in a TFLOP/s."""


class Throughput:
    """The FLOPs of a case, and what follows from them once steps have been timed.

    Args:
        graph: the traced graph of the train step.
        mode: the mode of the case.
        device: where it runs.
        varies: why the FLOPs differ from step to step; None if they do not.
        replicas: devices of this kind that take a step together.
        workers: processes that take a step together; the graph is of one of them.
    """

    def __init__(
        self, graph: Any, mode: Mode, device: Device, varies: Reason | None = None, replicas: int = 1, workers: int = 1
    ) -> None:
        self._mode, self._device = mode, device
        flops = varies or flops_of(graph)
        self._flops = flops if isinstance(flops, Reason) else flops * workers
        peak = peak_of(device, mode.products)
        self._peak = peak if isinstance(peak, Reason) else peak * replicas

    def columns(self) -> Findings:
        """The columns that are known before anything is timed."""
        found = Findings()
        found.put("flops_per_step", self._flops)
        found.put("tflops_peak", self._peak)
        return found

    def timed(self, step_ms: float, busy_ms: float | Reason) -> Findings:
        """The columns that follow from step times.

        Args:
            step_ms: the median time of a step.
            busy_ms: the time per step in which the GPU computed, or the reason why it is unknown.
        """
        found = Findings()
        for suffix, ms in (("", step_ms), ("_while_busy", busy_ms)):
            rate = self._rate(ms)
            found.put(f"tflops{suffix}", rate)
            found.put(f"peak_share{suffix}", self._share(rate))
        return found

    def _rate(self, ms: float | Reason) -> float | Reason:
        if isinstance(ms, Reason):
            return ms
        if isinstance(self._flops, Reason):
            return self._flops
        if self._device.kind == "cpu" and self._mode.is_mixed:
            return Reason(
                Code.NOT_COMPARABLE,
                "most CPUs emulate float16 and bfloat16 by conversions, so FLOP/s say nothing about the precision",
                "run on a GPU",
            )
        return self._flops / (ms * _PER_MS)

    def _share(self, rate: float | Reason) -> float | Reason:
        if isinstance(self._peak, Reason):
            return self._peak
        if isinstance(rate, Reason):
            return rate
        share = rate / self._peak
        if share <= 1:
            return share
        return Reason(
            Code.IMPLAUSIBLE,
            f"{rate:.4g} TFLOP/s were computed, but the peak is {self._peak:g}: FLOPs, time or peak are wrong",
            "report it, with report.md",
        )
