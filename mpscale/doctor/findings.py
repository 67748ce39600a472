"""What an examination finds, as plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Answer = Literal["yes", "in part", "no"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong and can be changed.

    Args:
        problem: what.
        do: what to change.
    """

    problem: str
    do: str


@dataclass(frozen=True, slots=True)
class Measured:
    """Whether a figure of a run will be there.

    Args:
        figure: its name in plain words.
        answer: whether it is measured.
        way: how, None where it is not.
        reason: why it is not, or not fully; None where it is.
        do: what would change that; None where nothing does, or nothing needs to.
    """

    figure: str
    answer: Answer
    way: str | None = None
    reason: str | None = None
    do: str | None = None


@dataclass(frozen=True, slots=True)
class Precision:
    """Whether the arithmetic of mixed precision is fast on a device; None is unknown.

    Args:
        float16: products of float16.
        bfloat16: products of bfloat16.
        tf32: whether float32 products may be rounded to TF32 there.
        words: what that means for a run, a sentence each.
    """

    float16: Answer | None
    bfloat16: Answer | None
    tf32: bool
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trained:
    """How the short training went; None for what it did not tell.

    Args:
        status: of its row.
        reason: why the status is not ``ok``.
        device_name: where it ran.
        step_time_ms: median over the blocks.
        gpu_memory_mib: its peak.
        gpu_memory_method: how that was found.
        gpu_allocator: TensorFlow's.
        wall_time_s: of the whole process.
        empty: {column: reason} of what it left empty, energy apart: that was not asked for.
    """

    status: str
    reason: str | None
    device_name: str
    step_time_ms: float | None
    gpu_memory_mib: float | None
    gpu_memory_method: str | None
    gpu_allocator: str | None
    wall_time_s: float | None
    empty: dict[str, str]


@dataclass(slots=True)
class Examination:
    """All that was found. What an examination did not come to stays empty.

    Args:
        device: where a run would train, with what is known of it; None where no run can begin.
        measured: every figure of a run.
        precision: what mixed precision can buy there.
        problems: what to change.
        notes: what is good to know.
        software: versions.
        trained: how the short training went, None without one.
    """

    device: dict[str, Any] | None = None
    measured: list[Measured] = field(default_factory=list)
    precision: Precision | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    software: dict[str, Any] = field(default_factory=dict)
    trained: Trained | None = None

    @property
    def verdict(self) -> int:
        """The exit code: 1 if there is something to change."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, the verdict first."""
        return {"verdict": self.verdict, **dataclasses.asdict(self)}
