"""What processes tell each other: events, and the channel by which a worker reports them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, cast, get_args, get_origin, get_type_hints

from mpscale.core.cause import Cause
from mpscale.core.columns import COLUMNS, STATUSES
from mpscale.core.processes.wire import Garbled, Wire
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
