"""The types of the plug-in's options: which texts each accepts, and how pyproject.toml may have the same."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import TypeVar

from mpscale.config import NAMES, NUMBERS, OptionType, Written, number, shown
from mpscale.core.loss_scale import parse_number
from mpscale.terminal.streams import as_typed

_MOST_SWEPT = 100
_MOST_NAMES, _LONGEST_NAME = 1000, 150
"""Names of files have at most 255 bytes, and those of a case hold more than its workload."""
_LONGEST_CORES = 10_000
_DAY_S = 86_400.0

measuring = number(
    parse_number, lambda value: 0 < value <= _DAY_S, "a number of seconds above 0 and at most 86400, a day"
)
energy = number(
    parse_number,
    lambda value: value == 0 or 10 <= value <= _DAY_S,
    "0, or a number of seconds of at least 10, which GPU sensors need, and at most 86400, a day",
)

T = TypeVar("T")
N = TypeVar("N", int, float)


def _names(text: str) -> list[str]:
    if len(text) > _MOST_NAMES * _LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_NAMES} names, not {shown(text)}")
    names = [name.strip() for name in as_typed(text).split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected at least one name")
    if long := next((name for name in names if len(name.encode("utf-8", "backslashreplace")) > _LONGEST_NAME), None):
        raise argparse.ArgumentTypeError(
            f"a name has at most {_LONGEST_NAME} bytes, since files are named after it, not {shown(long)}"
        )
    return names


names = OptionType(_names, NAMES)


def several(parse: Callable[[str], N]) -> Callable[[str], tuple[N, ...]]:
    """Return the type of an option that takes one number or several with commas between; rising, each once."""

    def parsed(text: str) -> tuple[N, ...]:
        if (number := text.count(",") + 1) > _MOST_SWEPT:
            raise argparse.ArgumentTypeError(
                f"expected at most {_MOST_SWEPT} values, since every workload runs at each, not {number:,}"
            )
        return tuple(sorted({parse(part.strip()) for part in text.split(",")}))

    return OptionType(parsed, NUMBERS)


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Show the message of a ValueError, which argparse would replace with its own."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _cores(text: str) -> set[int]:
    """Parse numbers of cores that this process may use, such as "0,2-3"."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cores: set[int] = set()
    fits = len(text) <= _LONGEST_CORES
    for part in text.replace(" ", "").split(",") if fits else ():
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        fits = fits and first <= last
        cores |= set(range(first, last + 1))
    if not fits or not cores <= usable:
        there = ", ".join(map(str, sorted(usable))) or "none, since this system cannot tie processes to cores"
        raise argparse.ArgumentTypeError(f"expected cores such as 0,2-3 out of {there}, not {shown(text)}")
    return cores


cores = OptionType(_cores, Written('a string such as "0,2-3", or a list of numbers', (int,), several=True))
