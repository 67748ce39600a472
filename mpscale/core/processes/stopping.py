"""What SIGINT, SIGTERM and SIGHUP do: the first ends the work in good order, the second ends the process at once.

Ctrl-C is SIGINT, CI and batch systems send SIGTERM, and a terminal that closes sends SIGHUP. The first of them becomes
a KeyboardInterrupt, but not inside :func:`held`, where it waits: code that cleans up or records must come to its end.
The second kills the processes that this one has started and leaves, without a word to code that may hang. Only
:func:`whole` delays that, for as long as one line of a journal takes.

Python runs signal handlers in the main thread, so the state is that of the process. A session in another thread gets no
handlers, and everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from mpscale.core.processes.process import kill_living

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
ONE_S = 0.5
"""Signals within this time are one: `timeout` and a shell whose terminal closes send two."""
_LAST_S = 2.0
"""How long the last actions may take before a process that ends at once."""


class _Stopping:
    """The state of this process."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        """The handlers that ours replace; empty if there are none of ours."""
        self.signal: signal.Signals | None = None
        """The first signal, None as long as there was none."""
        self.first: list[Callable[[], object]] = []
        self.actions: list[Callable[[], object]] = []
        self.exit_code = 0
        self.held = self.whole = 0
        self._at = 0.0
        self.waits = self.ends = False

    def heard(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        __tracebackhide__ = True  # pytest names the place of a KeyboardInterrupt: it is not here
        now = time.monotonic()
        if number == getattr(signal, "SIGHUP", None):
            _forget_dead_terminals()
        if self.signal is None:
            self.signal, self._at = signal.Signals(number), now
            if self.held > 0:
                self.waits = True
                return
            raise KeyboardInterrupt(self.signal.name)
        if now - self._at < ONE_S:
            return
        if self.whole > 0:
            self.ends = True
        else:
            self.end()

    def raise_what_waits(self) -> None:
        """Raise the KeyboardInterrupt of a signal that came while it was held."""
        __tracebackhide__ = True
        if self.waits and self.held <= 0 and self.signal is not None:
            self.waits = False
            raise KeyboardInterrupt(self.signal.name)

    def end(self) -> None:
        """End this process at once. What it has started ends with it."""
        if self.exit_code < 0:
            return  # a third signal, while this is under way
        code, self.exit_code = self.exit_code, -1

        def leave() -> None:
            time.sleep(_LAST_S)
            os._exit(code)

        # Whatever hangs, such as a file system: nothing may keep the process.
        threading.Thread(target=leave, daemon=True).start()
        for act in (*self.first, kill_living, *reversed(self.actions), sys.stdout.flush, sys.stderr.flush):
            with contextlib.suppress(BaseException):
                act()
        os._exit(code)

    def restore(self) -> None:
        """Put the handlers back."""
        for number, handler in self.before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)
        self.before = {}


_stopping = _Stopping()
# A child that the host process forks must end by a signal as it would without us.
os.register_at_fork(after_in_child=_stopping.restore)


@contextlib.contextmanager
def listening(exit_code: int) -> Iterator[None]:
    """Listen to the signals, and put the handlers back at the end.

    A signal that is ignored stays so, as SIGHUP under `nohup`, and one for which somebody else has a handler is theirs.

    Args:
        exit_code: of a process that a second signal ends.
    """
    state = _stopping
    if state.before:  # within another one
        yield
        return
    state.signal, state.exit_code, state.first, state.actions = None, exit_code, [], []
    state.held = state.whole = 0
    state.waits = state.ends = False
    try:
        for number in _SIGNALS:
            now = signal.getsignal(number)
            if now in (signal.SIG_DFL, signal.default_int_handler):
                state.before[number] = now  # first: the handler may be called as soon as it is there
                try:
                    signal.signal(number, state.heard)
                except ValueError:  # not the main thread
                    state.before = {}
                    break
        yield
    finally:
        state.restore()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let a first signal wait until this block has ended, and raise its KeyboardInterrupt then."""
    __tracebackhide__ = True
    _stopping.held += 1
    try:
        yield
    finally:
        _stopping.held -= 1
        _stopping.raise_what_waits()


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a first signal here, although this is within :func:`held`: for long waits."""
    __tracebackhide__ = True
    before, _stopping.held = _stopping.held, 0
    try:
        _stopping.raise_what_waits()
        yield
    finally:
        _stopping.held = before


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Let every signal wait until this block has ended: a block of milliseconds, or nothing can end the process."""
    with held():
        _stopping.whole += 1
        try:
            yield
        finally:
            _stopping.whole -= 1
            if _stopping.ends and _stopping.whole == 0:
                _stopping.end()


def asked() -> str | None:
    """The name of the signal that asked to stop, such as ``SIGTERM``; None if there was none."""
    return None if _stopping.signal is None else _stopping.signal.name


def taken() -> str | None:
    """As :func:`asked`; if that signal still waits, the caller ends the work, and it raises nothing any more."""
    _stopping.waits = False
    return asked()


def before_ending_at_once(act: Callable[[], object], *, children_live: bool = False) -> Callable[[], None]:
    """Have ``act`` called before a second signal ends the process, if that takes no time.

    Args:
        act: what to do.
        children_live: call it before the processes that this one has started are killed, and not after that.

    Returns:
        A function that takes this back.
    """
    actions = _stopping.first if children_live else _stopping.actions
    actions.append(act)

    def forget() -> None:
        with contextlib.suppress(ValueError):
            actions.remove(act)

    return forget


def _forget_dead_terminals() -> None:
    """Let what still writes to a terminal that is gone write to nowhere, instead of failing with EIO."""
    with contextlib.suppress(OSError):
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                descriptor, target = int(entry.name), str(entry.readlink())
                if target.startswith(("/dev/pts/", "/dev/tty", "/dev/console")) and not os.isatty(descriptor):
                    nowhere = os.open(os.devnull, os.O_RDWR)
                    os.dup2(nowhere, descriptor, inheritable=os.get_inheritable(descriptor))
                    os.close(nowhere)
