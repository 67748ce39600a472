"""What worker and supervisor say to each other: JSON objects, one a line.

The supervisor's first line is the request, ``{"case": ..., "device": ..., "steps_path": ..., "sys_path": [...],
"scratch": ..., "energy_s": ...}``, where ``scratch`` is a folder that is removed when the worker has ended.
The worker then writes, in any number and order,

- ``{"event": "values", "values": {column: value}}`` and ``{"event": "miss", "columns": [...], "reason": ...}``, as
  soon as they are known, so that a case that dies later keeps what it had;
- ``{"event": "phase", "phase": ...}``, and waits for an empty line: the supervisor looks at the machine in between;
- ``{"event": "progress", "done": steps, "total": steps}``;
- ``{"event": "blocks", "step_s": [...]}``, the step time of each timed block;
- ``{"event": "energy", "steps": ..., "overflow_steps": ...}``, what was taken while energy was counted;

and last ``{"event": "done", "status": ..., "reason": ...}`` or ``{"event": "error", "type": ..., "message": ...}``.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import IO, Any, Protocol

from mpscale.core.reason import Reason
from mpscale.core.record import misfit, plain


class Phase(StrEnum):
    """How far a case has come. At each phase the machine is looked at. A case skips phases that it does not need."""

    IDLE = "idle"
    CONTEXT_READY = "context-ready"
    MODEL_BUILT = "model-built"
    COMPILED = "compiled"
    TRAINED = "trained"
    WARM = "warm"
    TIMING_START = "timing-start"
    TIMING_END = "timing-end"
    ENERGY_END = "energy-end"
    DONE = "done"


class Channel(Protocol):
    """The worker's end."""

    def values(self, values: dict[str, Any]) -> None:
        """Reports columns of the record.

        Raises:
            TypeError: a value does not belong in its column: better now than after the training.
        """

    def miss(self, columns: Sequence[str], reason: Reason) -> None:
        """Reports columns that stay empty."""

    def phase(self, phase: str) -> None:
        """Reports a phase and waits until the supervisor has looked at the machine."""

    def progress(self, done: int, total: int) -> None:
        """Reports steps taken."""

    def blocks(self, step_s: Sequence[float]) -> None:
        """Reports the step times of the timed blocks."""

    def energy(self, steps: int, overflow_steps: int | None) -> None:
        """Reports the steps taken while energy was counted, and how many overflowed; None where unknown."""


class PipeChannel:
    """A channel over two text streams."""

    def __init__(self, source: IO[str], sink: IO[str]) -> None:
        self._source, self._sink = source, sink

    def request(self) -> dict[str, Any]:
        """The supervisor's request."""
        line = self._source.readline()
        if not line:
            raise EOFError("the supervisor is gone")
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, event: str, **fields: Any) -> None:
        """Writes one event."""
        self._sink.write(json.dumps({"event": event, **fields}) + "\n")
        self._sink.flush()

    def values(self, values: dict[str, Any]) -> None:
        values = {name: plain(value) for name, value in values.items()}
        for name, value in values.items():
            why = misfit(name, value)
            if why is not None:
                raise TypeError(why)
        self.send("values", values=values)

    def miss(self, columns: Sequence[str], reason: Reason) -> None:
        self.send("miss", columns=list(columns), reason=reason.to_json())

    def phase(self, phase: str) -> None:
        self.send("phase", phase=phase)
        if not self._source.readline():
            raise EOFError("the supervisor is gone")

    def progress(self, done: int, total: int) -> None:
        self.send("progress", done=done, total=total)

    def energy(self, steps: int, overflow_steps: int | None) -> None:
        self.send("energy", steps=steps, overflow_steps=overflow_steps)

    def blocks(self, step_s: Sequence[float]) -> None:
        self.send("blocks", step_s=list(step_s))


# A helper process ends when the process that started it does.

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel to end this process when its parent ends, however that happens. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
