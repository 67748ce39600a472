"""Runs a program and ends whatever it has started.

It is called as ``python keeper.py DESCRIPTOR STARTER PASSED PROGRAM ARGUMENT...``, where STARTER is the process that
calls it, and PASSED names descriptors, such as ``5,6``, that are only for the program.

On Linux, the session starts each fresh worker, and the warm parent that forks workers, through two keepers::

    session - outer keeper - inner keeper - program - whatever it starts

A keeper is a "child subreaper": a process below it whose parent ends becomes its child, also one in a session of its
own and one that has forked twice. When the program ends, or when whoever started a keeper ends in whatever way, the
keeper kills its children until it has none. Only a parent can free a process id, so the id of a child that has not
been waited for cannot belong to another process, and nothing but descendants of the program is ever killed.

There are two, because one may be killed itself. If the inner keeper is, its children become the outer one's. If the
outer keeper is, the inner one gets a signal, as the outer one does when the session ends. A keeper sleeps until then.

Over the socket DESCRIPTOR the inner keeper sends ``{"pid": ..., "keeper": ...}``, the program's process id and its own,
and when the program has ended and all that it started is gone, ``{"status": wait status}``. Anything that arrives
there, or its end, makes the outer keeper end all.

What cannot be caught: a process that somebody else starts on request, such as ``systemd-run`` or ``docker``; one with
the rights of another user, such as ``sudo``'s; one that a driver does not let die, which is left alone after 10 s; and
all of it if both keepers are killed in the same moment. Other systems have no such thing: there, what is left is the
process group of a worker, which the session kills.

It is a script that imports nothing of mpscale, so that it starts fast: 22 ms were measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

_MOMENT_S = 0.2
"""What is left may end by itself in this time. Python's own process that removes shared memory of a dead one does."""
_GIVE_UP_S = 10.0

_ENDING = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
)  # fmt: skip
"""Signals that would end both keepers at once if somebody sent them to all processes, and leave what they keep."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however that happens. Linux only."""
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Have processes below this one become its children when their parents end. Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def wait_for_child(child: int, options: int = 0) -> int | None:
    """Return the wait status of a child, after that of each orphan that ends before it.

    Args:
        child: its process id.
        options: of ``os.waitpid``; with ``os.WNOHANG`` the result is None if the child is alive.
    """
    while True:
        pid, status = os.waitpid(-1, options)
        if pid == child:
            return status
        if not pid:
            return None


def end_children() -> bool:
    """Wait for a moment until the children of this process have ended, and kill those that have not.

    Returns:
        Whether none is left.
    """
    start = time.monotonic()
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            # Some are alive.
            waited_s = time.monotonic() - start
            if waited_s > _GIVE_UP_S:
                return False
            if waited_s > _MOMENT_S:
                for pid in _children():
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
            continue
        return True


def _children() -> list[int]:
    """The children of this process. One that starts or ends meanwhile may be missing."""
    try:
        found = []
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
            with open(f"/proc/self/task/{thread}/children") as file:  # noqa: PTH123
                found += [int(pid) for pid in file.read().split()]
        return found
    except OSError:  # a kernel without such lists
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == os.getpid()]  # noqa: PTH208


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:  # noqa: PTH123
            # The name, in parentheses, may hold anything: the fields count from its end.
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


class _Keeper:
    """This process as a keeper. It ends at once if ``starter``, its parent, has already ended."""

    def __init__(self, starter: int) -> None:
        self._told = False
        self._woken, waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._tell)
        # The starter may have blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD, *_ENDING))
        adopt_orphans()
        die_with_parent(signal.SIGTERM)
        if os.getppid() != starter:
            sys.exit()

    def _tell(self, *_: object) -> None:
        self._told = True

    def keep(self, main: int, orders: socket.socket | None = None) -> int | None:
        """Sleep until a child has ended or this process is told to end; then end all children.

        Args:
            main: the child.
            orders: readable when this process is to end.

        Returns:
            The wait status of the child, None if it had not ended by then.
        """
        sources = select.poll()
        sources.register(self._woken, select.POLLIN)
        if orders is not None:
            sources.register(orders, select.POLLIN)
        status = None
        while status is None and not self._told:
            for source, _ in sources.poll():
                if source == self._woken:
                    os.read(self._woken, 4096)
                else:
                    self._told = True
            status = wait_for_child(main, os.WNOHANG)
        if status is None:
            os.kill(main, signal.SIGKILL)
        end_children()
        return status


def _run(command: Sequence[str]) -> None:
    """Become the program, as a child of a keeper."""
    os.setsid()
    die_with_parent()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and so would the program
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], list(command))


def main(descriptor: int, starter: int, command: Sequence[str], own: Sequence[int]) -> None:
    """Be both keepers.

    Args:
        descriptor: of the socket to the starter.
        starter: the process that has started this one.
        command: the program and its arguments.
        own: descriptors that only the program needs.
    """
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)  # or the program would hold it open
    outer = _Keeper(starter)
    outer_pid = os.getpid()
    inner_pid = os.fork()
    if inner_pid:
        for each in own:
            os.close(each)
        outer.keep(inner_pid, control)
        return
    # Not in the process group of the other, or one signal could end both.
    os.setsid()
    inner = _Keeper(outer_pid)
    program = os.fork()
    if not program:
        try:
            _run(command)
        except OSError as error:
            print(f"{command[0]} cannot be started: {error}", file=sys.stderr, flush=True)
        os._exit(127)
    for each in own:
        os.close(each)
    _send(control, f'{{"pid": {program}, "keeper": {os.getpid()}}}')
    status = inner.keep(program)
    if status is not None:
        _send(control, f'{{"status": {status}}}')


def _send(control: socket.socket, message: str) -> None:
    with contextlib.suppress(OSError):
        control.sendall(f"{message}\n".encode())


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), given[3:], [int(number) for number in given[2].split(",") if number])
