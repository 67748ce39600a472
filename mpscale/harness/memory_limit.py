"""A limit on the memory of the workers of a case that trains on a CPU.

Without one, the host would swap, or its kernel would kill some process. ``setrlimit`` will not do: without XLA,
TensorFlow 2.21 crashes (SIGSEGV) when an allocation fails, and address space is not what a host runs out of. So the
resident memory is watched from here, and a worker that exceeds the limit is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from mpscale.telemetry.host import peak_resident_mib

_INTERVAL_S = 0.01
"""A processor fills some 50 MiB of new memory in this time."""


class MemoryLimit:
    """Watches processes, in a ``with`` block that ends before they are waited for.

    Args:
        pids: the processes. Whoever started them ends the others when the first is killed.
        limit_mib: what they may use together; None for any amount, in which case nothing is watched.
    """

    def __init__(self, pids: Sequence[int], limit_mib: float | None) -> None:
        self._pids, self._limit_mib = pids, limit_mib
        self.peak_mib = 0.0
        """The most that was seen so far."""
        self._peaks_mib = dict.fromkeys(pids, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="mpscale memory limit")
        self._pidfd: int | None = None

    def __enter__(self) -> Self:
        if self._limit_mib is not None:
            # With its number alone, another process could be hit once this one has ended.
            with contextlib.suppress(OSError, AttributeError):
                self._pidfd = os.pidfd_open(self._pids[0])
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._pidfd is not None:
            os.close(self._pidfd)

    @property
    def problem(self) -> str | None:
        """How the process exceeded the limit, whether it was killed in time or not; None if it kept to it."""
        if self._limit_mib is None or self.peak_mib <= self._limit_mib:
            return None
        return f"used {self.peak_mib:,.0f} MiB of memory; the limit is {self._limit_mib:,.0f} MiB"

    def _watch(self) -> None:
        assert self._limit_mib is not None  # or the thread was not started
        while True:
            # The peak so far, so that none is missed between two looks.
            for pid, before in self._peaks_mib.items():
                self._peaks_mib[pid] = max(before, peak_resident_mib(pid) or 0.0)
            self.peak_mib = sum(self._peaks_mib.values())
            if self.peak_mib > self._limit_mib:
                self._kill()
                return
            if self._ended.wait(_INTERVAL_S):
                return

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            else:
                os.kill(self._pids[0], signal.SIGKILL)
