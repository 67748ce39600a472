"""What `mpscale lint` finds in a workload, in a run too: a check for programs, a severity, layers, words and a cure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mpscale.core.files.reading import parse_json
from mpscale.core.reason import encodable


class Check(StrEnum):
    """What is checked. docs/guides/lint.md has a row for each: what it means, why it costs, and the cure."""

    # Precision
    HALF_OUTPUT = "half-output"
    LAYER_DTYPE = "layer-dtype"
    PROCESS_SETTINGS = "process-settings"
    HALF_WEIGHTS = "half-weights"
    MOSTLY_FLOAT32 = "mostly-float32"
    FLOAT64_LAYER = "float64-layer"
    # Speed
    DIMENSION = "dimension"
    BATCH_SIZE = "batch-size"
    DISPATCH_BOUND = "dispatch-bound"
    XLA = "xla"
    # Data
    FLOAT64_DATA = "float64-data"
    INTEGER_INPUTS = "integer-inputs"
    DATA_ON_HOST = "data-on-host"
    FIRST_BATCHES = "first-batches"
    INPUTS_NOT_FINITE = "inputs-not-finite"
    INPUTS_TOO_LARGE = "inputs-too-large"
    INPUTS_TOO_SMALL = "inputs-too-small"
    INPUTS_ROUNDED = "inputs-rounded"
    # Labels and loss
    LABELS_MISFIT = "labels-misfit"
    LABELS_OUT_OF_RANGE = "labels-out-of-range"
    LABELS_NOT_FINITE = "labels-not-finite"
    SOFTMAX_TWICE = "softmax-twice"
    OUTPUTS = "outputs"
    FIRST_LOSS = "first-loss"
    # Optimizer
    OPTIMIZER_SCALES = "optimizer-scales"
    TRAIN_STEP = "train-step"
    EPSILON = "epsilon"
    BATCH_NORM_ACCUMULATION = "batch-norm-accumulation"


class Severity(StrEnum):
    """How bad a finding is, the worst first."""

    PROBLEM = "problem"
    """Figures would be wrong, mean something else, or not come about."""
    CAUTION = "caution"
    """It costs speed, memory or accuracy."""
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found. It may go into a cell of a table, unlike a :class:`~mpscale.core.reason.Reason`.

    Args:
        check: which check found it, for programs.
        severity: how bad it is.
        text: what was found, for people.
        cure: what to do, as an instruction.
        layers: the names of the layers that it is about; below another layer with its path. Empty for what is not
            about layers.
    """

    check: Check
    severity: Severity
    text: str
    cure: str
    layers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        found = {"check": str(self.check), "severity": str(self.severity), "text": self.text, "cure": self.cure}
        return found | ({"layers": list(self.layers)} if self.layers else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Finding:
        """The inverse of :meth:`to_json`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is not a finding, or one of a newer version.
        """
        texts = [value["text"], value["cure"], *value.get("layers", ())]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text of a finding is none")
        text, cure, *layers = map(encodable, texts)
        return cls(Check(value["check"]), Severity(value["severity"]), text, cure, tuple(layers))


@dataclass(frozen=True, slots=True)
class InModes:
    """A finding, and the modes in which it was made."""

    finding: Finding
    modes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**self.finding.to_json(), "modes": list(self.modes)}


def to_cell(findings: Iterable[Finding]) -> str:
    """The value of the column ``lint``."""
    return json.dumps([finding.to_json() for finding in findings])


def of_cell(text: str | None) -> list[Finding]:
    """The inverse of :func:`to_cell`; without what is no finding, as in a table edited by hand."""
    try:
        values = parse_json(text or "[]")
    except ValueError:
        return []
    found = []
    for value in values if isinstance(values, list) else ():
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            found.append(Finding.from_json(value))
    return found


def merged(by_mode: Mapping[str, Sequence[Finding]]) -> list[InModes]:
    """The findings of the cases of a workload, the worst first: what several modes share is told once.

    What the first step shows in fp32 is no matter of precision, so it is not repeated for other modes.
    """
    found: dict[Finding, list[str]] = {}
    in_fp32 = {finding.check for finding in by_mode.get("fp32", ())}
    for mode, findings in by_mode.items():
        for finding in findings:
            if finding.check is Check.FIRST_LOSS and mode != "fp32" and Check.FIRST_LOSS in in_fp32:
                continue
            modes = found.setdefault(finding, [])
            if mode not in modes:
                modes.append(mode)
    order = list(Severity)
    told = [InModes(finding, tuple(modes)) for finding, modes in found.items()]
    return sorted(told, key=lambda each: order.index(each.finding.severity))
