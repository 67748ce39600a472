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
import dataclasses
import fcntl
import json
import os
import resource
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, cast, get_args, get_origin, get_type_hints

from mpscale.core.cause import Cause
from mpscale.core.columns import COLUMNS, STATUSES
from mpscale.core.reason import Reason
from mpscale.core.record import misfit, plain


class Phase(StrEnum):
    """How far a case has come. At each phase the session looks at the machine. A case skips phases it does not need."""

    IDLE = "idle"
    CONTEXT_READY = "context-ready"
    MODEL_BUILT = "model-built"
    COMPILED = "compiled"
    """The first step is done."""
    STEPS_SYNCHRONISED = "steps-synchronised"
    """A few more steps are done, each awaited before the next."""
    STEPS_QUEUED = "steps-queued"
    """A few more are done, queued without waiting. Nothing has been evaluated yet."""
    METRIC_TRIED = "metric-tried"
    """The model has been evaluated for the first time. Without a metric there is neither this phase nor EVALUATED."""
    TRAINED = "trained"
    """All steps of the training are done; the final evaluation comes next."""
    EVALUATED = "evaluated"
    WARM = "warm"
    TIMING_START = "timing-start"
    TIMING_END = "timing-end"
    ENERGY_END = "energy-end"
    PROFILED = "profiled"
    """A few more steps have run under the profiler, after everything that is timed."""
    DONE = "done"


@dataclass(frozen=True)
class Event:
    """A message with a name and fields."""

    name: ClassVar[str]

    def __init_subclass__(cls, name: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = name

    def to_json(self) -> dict[str, Any]:
        """The message; its values are plain."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {"event": self.name, **values}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`. Drops unknown fields, because the other side may be newer.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of another type.
        """
        event = cls(**{each.name: fields[each.name] for each in dataclasses.fields(cls) if each.name in fields})
        for name, kind in _types(cast(Hashable, cls)).items():
            if not _is_a(getattr(event, name), kind):
                raise TypeError(f"{name} is {getattr(event, name)!r:.80}")
        return event


@cache
def _types(kind: Any) -> dict[str, Any]:
    """The types of an event's fields."""
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as far as its annotation tells; an int is a float, but a bool is no number."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(_is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is_a(each, parts[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(each, parts[1]) for each in value.values())
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


E = TypeVar("E", bound=Event)


def event_of(message: Mapping[str, Any], kinds: Iterable[type[E]]) -> E:
    """Return the event of one of the ``kinds`` that a received message stands for.

    Raises:
        Garbled: it stands for none of them.
    """
    try:
        return {kind.name: kind for kind in kinds}[message["event"]].from_json(message)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Garbled(f"not a message of mpscale: {error}") from error


@dataclass(frozen=True)
class Values(Event, name="values"):
    """Columns of the record, as soon as they are known, so that a case that dies later keeps them."""

    values: dict[str, Any]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        event = super().from_json(fields)
        for name, value in event.values.items():
            if why := misfit(name, value):
                raise ValueError(why)
        return event


@dataclass(frozen=True)
class Missed(Event, name="miss"):
    """Columns that stay empty, with the reason."""

    columns: list[str]
    reason: Reason

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "reason": self.reason.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        columns = fields["columns"]
        if not _is_a(columns, list[str]) or not COLUMNS.keys() >= set(columns):
            raise ValueError(f"columns are {columns!r:.80}")
        return cls(columns, Reason.from_json(fields["reason"]))


@dataclass(frozen=True)
class PhaseReached(Event, name="phase"):
    """A phase. The worker waits for an answer, an empty message, while the session looks at the machine."""

    phase: Phase

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(Phase(fields["phase"]))


@dataclass(frozen=True)
class StepsDone(Event, name="progress"):
    """Training steps taken so far, of how many."""

    done: int
    total: int


@dataclass(frozen=True)
class Looked(Event, name="look"):
    """A look at the gradients of a step.

    Args:
        step: its number, from 1.
        loss: its loss.
        gradients: the values of a :class:`~mpscale.core.magnitudes.Place` and of the
            :class:`~mpscale.core.magnitudes.Magnitudes` there.
        in_float32: the layers that mixed precision leaves in float32, or why they are not known.
    """

    step: int
    loss: float
    gradients: list[dict[str, Any]]
    in_float32: list[str] | Reason

    def to_json(self) -> dict[str, Any]:
        kept = self.in_float32
        return {**super().to_json(), "in_float32": kept.to_json() if isinstance(kept, Reason) else kept}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        kept = fields["in_float32"]
        kept = kept if isinstance(kept, list) else Reason.from_json(kept)
        parts = {"step": int, "loss": float, "gradients": list[dict[str, Any]]}
        if wrong := [name for name, kind in parts.items() if not _is_a(fields[name], kind)]:
            raise TypeError(f"{wrong[0]} is {fields[wrong[0]]!r:.80}")
        return cls(fields["step"], fields["loss"], fields["gradients"], kept)


@dataclass(frozen=True)
class Blocks(Event, name="blocks"):
    """Seconds per step of each timed block."""

    step_s: list[float]


@dataclass(frozen=True)
class EnergySteps(Event, name="energy"):
    """Steps taken while energy was counted, and how many of them overflowed; None if unknown."""

    steps: int
    overflow_steps: int | None


@dataclass(frozen=True)
class NotKept(Event, name="not-kept"):
    """A file of the case could not be written. Its figures are known all the same.

    Args:
        what: was to be in it, such as ``its steps``.
        why: in words.
    """

    what: str
    why: str


@dataclass(frozen=True)
class Remarked(Event, name="remark"):
    """What else to know about the case, for the column ``note``."""

    text: str


@dataclass(frozen=True)
class Finished(Event, name="done"):
    """The case came to its end, with this status. The last message."""

    status: str
    reason: str | None
    runtime: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        event = super().from_json(fields)
        if event.status not in STATUSES:
            raise ValueError(f"{event.status!r:.80} is not a status of a case")
        return event


@dataclass(frozen=True)
class Failed(Event, name="error"):
    """The case raised an exception: its type, its message, and what kind of event that was. The last message."""

    type: str
    message: str
    cause: Cause = Cause.EXCEPTION

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return super().from_json({**fields, "cause": Cause.of(fields["cause"])})


@dataclass(frozen=True)
class Again(Event, name="again"):
    """Another attempt at a case begins, for this reason. Only shown as progress, never sent over a wire."""

    reason: str


@dataclass(frozen=True)
class Noted(Event, name="noted"):
    """Something about the run that its user should know. Only shown as progress, never sent over a wire."""

    text: str


Progressed = PhaseReached | StepsDone | Looked | Again | Noted
"""What is shown as progress."""

WORKER_EVENTS = (
    Values,
    Missed,
    PhaseReached,
    StepsDone,
    Looked,
    Blocks,
    EnergySteps,
    NotKept,
    Remarked,
    Finished,
    Failed,
)
"""What a worker sends."""


class Channel:
    """What a case reports to, over the wire of its worker."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def send(self, event: Event) -> None:
        """Report an event."""
        self._wire.send(event.to_json())

    def values(self, values: dict[str, Any]) -> None:
        """Report columns of the record.

        Raises:
            TypeError: a value does not belong in its column; better now than after the training.
        """
        values = {name: plain(value) for name, value in values.items()}
        for name, value in values.items():
            if why := misfit(name, value):
                raise TypeError(why)
        self.send(Values(values))

    def miss(self, columns: Sequence[str], reason: Reason) -> None:
        """Report columns that stay empty."""
        self.send(Missed(list(columns), reason))

    def phase(self, phase: str) -> None:
        """Report a phase and wait until the session has looked at the machine."""
        self.send(PhaseReached(Phase(phase)))
        self._wire.receive()

    def progress(self, done: int, total: int) -> None:
        """Report steps taken."""
        self.send(StepsDone(done, total))

    def blocks(self, step_s: Sequence[float]) -> None:
        """Report the seconds per step of each timed block."""
        self.send(Blocks(list(step_s)))

    def energy(self, steps: int, overflow_steps: int | None) -> None:
        """Report the steps taken while energy was counted, and how many overflowed; None if unknown."""
        self.send(EnergySteps(steps, overflow_steps))


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
