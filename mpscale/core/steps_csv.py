"""Reads the log of the steps of a case, a gzipped CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpscale.core.columns import LARGEST
from mpscale.core.files.reading import MOST_STEPS, STEPS, RunError, check_text, lines_of, unpack


def read_steps(path: Path) -> dict[str, list[Any]]:
    """The columns step, loss, loss_scale and overflow of a log of steps, as lists; None is unknown.

    Raises:
        RunError: it does not exist (:class:`NoSuchFileError`), or cannot be read as such a log.
    """
    content = unpack(path, STEPS)
    check_text(path, content)
    found: dict[str, list[Any]] = {name: [] for name in _STEPS}
    reader = csv.reader(lines_of(path, content))
    try:
        header = next(reader, [])
        if missing := [name for name in _STEPS if name not in header]:
            raise RunError(f"{path}: has no column {', '.join(missing)}")
        places = [(found[name], header.index(name), parse) for name, parse in _STEPS.items()]
        for row in reader:
            if len(row) != len(header):
                raise ValueError("not as many cells as the header")
            if reader.line_num > MOST_STEPS + 1:
                raise ValueError(f"more than {MOST_STEPS:,} steps; no training has so many")
            for column, place, parse in places:
                column.append(parse(cell) if (cell := row[place]) else None)
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path}, line {reader.line_num}: cannot be read as a log of steps: {error!s:.200}") from error
    return found


def _step(cell: str) -> int:
    if not (cell.isascii() and cell.isdecimal() and len(cell) < 16):
        raise ValueError(f"expected the number of a step, not {cell!r}")
    return int(cell)


def _number(cell: str) -> float:
    value = float(cell)
    # Infinity is what a training that diverged has; a number beyond any dtype is a file that was changed.
    if LARGEST < abs(value) < math.inf:
        raise ValueError(f"{cell} is beyond the range of any loss or loss scale")
    return value


def _flag(cell: str) -> bool:
    flags = {"0": False, "1": True, "False": False, "True": True}
    if cell not in flags:
        raise ValueError(f"expected 0 or 1, not {cell!r}")
    return flags[cell]


_STEPS: dict[str, Callable[[str], Any]] = {"step": _step, "loss": _number, "loss_scale": _number, "overflow": _flag}
