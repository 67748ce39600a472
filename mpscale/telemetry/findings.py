"""Columns as telemetry finds them: a value, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Findings:
    """{column: value} of what is known and {column: reason} of what is not."""

    values: dict[str, Any] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def put(self, column: str, value: Any, reason: str) -> None:
        """Notes the value of a column, or where it is None the reason."""
        if value is None:
            self.unavailable[column] = reason
        else:
            self.values[column] = value

    def add(self, other: Findings) -> None:
        """Takes over all that another found."""
        self.values |= other.values
        self.unavailable |= other.unavailable
