"""Messages between two processes of mpscale.

The session talks to the worker of each case, to the warm parent that forks workers, to the GPU monitor, and, under
``mpscale ab``, to the command. Each pair has a socket of its own, a :class:`Wire`, so standard output and error belong
to whatever runs in the process. Messages are JSON objects, one per line. The standard library's
``multiprocessing.connection`` would block inside a message whose writer was stopped or killed halfway through while a
process that it left behind holds the socket open; a :class:`Wire` never does.

Most messages are dataclasses: an :class:`Event` goes over the wire as its fields and its name under ``event``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_OUT_OF_REACH = 500
"""The lowest descriptor of a wire in a process that runs other people's code, which may use low ones by accident."""


class Garbled(EOFError):
    """Something other than a message came over a wire, which is useless from then on."""


_GARBLED = "what came over the wire is not a message"
_LONGEST = 2**26
"""Bytes of the longest line that is read. The longest messages have some millions."""
EVER_S = 1e6
"""Longer than any wait. The system counts milliseconds in 32 bits."""
_MOST_READS = 2**12
"""How often to read at a time, lest a side that never stops writing be listened to forever."""


class Wire:
    """One end of a socket on which two processes exchange JSON objects, one per line.

    Args:
        end: the socket, which this object owns.
        longest: bytes of the longest line that is read.
    """

    def __init__(self, end: socket.socket, longest: int = _LONGEST) -> None:
        self._socket, self._longest = end, longest
        self._unread = bytearray()
        self._messages: deque[dict[str, Any]] = deque()
        self._garbled = False
        self.closed = False
        """Whether nothing more will arrive."""
        self.descriptors: list[int] = []
        """File descriptors that were sent along and that nobody has taken yet."""

    @classmethod
    def pair(cls) -> tuple[Wire, Wire]:
        """Both ends of a new wire."""
        ours, theirs = socket.socketpair()
        return cls(ours), cls(theirs)

    @classmethod
    def inherited(cls, descriptor: int) -> Wire:
        """This process's end of a wire.

        Args:
            descriptor: its number. The end moves out of the way, to a high number, and programs that this process
                starts do not inherit it.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        first = _OUT_OF_REACH if limit == resource.RLIM_INFINITY else min(_OUT_OF_REACH, limit // 2)
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, first)
        os.close(descriptor)
        return cls(socket.socket(fileno=moved))

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message. If the other side is gone, the next :meth:`receive` says so.

        Args:
            message: any JSON object.
            descriptors: open files to send along.
        """
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            if descriptors:
                socket.send_fds(self._socket, [line], descriptors)
            else:
                self._socket.sendall(line)

    def receive(self, seconds: float | None = None, ended: Wire | int | None = None) -> dict[str, Any]:
        """Return the next message.

        Args:
            seconds: how long to wait for it; None waits without limit. Below 0 the socket is not read: only a message
                that is already here is returned.
            ended: a descriptor or wire that becomes readable when the other side has ended. Waiting for the end of this
                wire would not do: a process that the other side left behind may hold it open.

        Raises:
            TimeoutError: no message came in time.
            EOFError: no message will come.
            Garbled: something other than a message came.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        sources, left = [self] if ended is None else [self, ended], seconds
        while not self._messages:
            if self.closed:
                raise Garbled(_GARBLED) if self._garbled else EOFError("it has ended")
            ready = [] if left is not None and left < 0 else wait_for(sources, left)
            if self in ready:
                self._read()
            elif ready:
                self.closed = True
            else:
                raise TimeoutError
            left = None if deadline is None else deadline - time.monotonic()
        return self._messages.popleft()

    def arrived(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived, without waiting; raises as :meth:`receive` does."""
        for _ in range(_MOST_READS):
            if self.closed or not self._read():
                break
        if self._garbled and not self._messages:
            raise Garbled(_GARBLED)
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def close(self) -> None:
        """Close this end; the other side reads the end of the wire."""
        self.closed = True
        self._socket.close()

    def _read(self) -> bool:
        """Read what has arrived, up to a limit; return whether anything had."""
        # Not socket.recv_fds, which in Python 3.11 ignores its flags. There is room for four descriptors.
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            chunk, extras, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(4 * struct.calcsize("i")), flags)
        except BlockingIOError:
            return False
        except OSError:
            chunk, extras = b"", []
        for level, kind, data in extras:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.descriptors += struct.unpack(f"{len(data) // struct.calcsize('i')}i", data)
        self.closed = not chunk
        self._unread += chunk
        lines: list[bytes] = []
        if b"\n" in chunk:
            *lines, rest = bytes(self._unread).split(b"\n")
            self._unread = bytearray(rest)
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self._garble()
                break
            self._messages.append(message)
        if len(self._unread) > self._longest:
            self._garble()
        return True

    def _garble(self) -> None:
        self._garbled = self.closed = True
        self._unread.clear()


def wait_for(sources: Iterable[Wire | int], seconds: float | None) -> list[Wire | int]:
    """Return the wires and descriptors with something to read, after at most ``seconds``; None waits without limit."""
    sources = list(sources)
    # A message that has been read but not taken no longer makes its socket readable.
    known = [each for each in sources if isinstance(each, Wire) and (each._messages or each.closed)]
    others = [each for each in sources if each not in known]
    with selectors.PollSelector() as selector:
        for each in others:
            selector.register(each, selectors.EVENT_READ)
        ready: list[Any] = [key.fileobj for key, _ in selector.select(0.0 if known else seconds)]
    return known + ready
