"""Arguments of :func:`mpscale.compare` as options of ``mpscale run``, one to one: ``batch_size`` is --mp-batch-size."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import Any, NoReturn

from mpscale.core.invocation import RENAMED
from mpscale.core.mode import Mode, select_modes
from mpscale.pytest_plugin.resume import add_every_option

_TAKEN = ("workloads", "train", "validation", "resume")
"""Options that follow from other arguments."""


class _Options(argparse.ArgumentParser):
    """The options of a run; ``table`` has each, and how it was declared, by the name of the argument."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.table: dict[str, tuple[str, Mapping[str, Any]]] = {}

        def add(option: str, **how: Any) -> None:
            self.add_argument(option, **how)
            name = option.removeprefix("--mp-").replace("-", "_")
            if name not in _TAKEN:
                self.table[RENAMED.get(name, name)] = option, how

        add_every_option(add)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def names() -> list[str]:
    """The arguments that are options."""
    return sorted(_Options().table)


def as_options(given: Mapping[str, Any]) -> list[str]:
    """Write arguments as options, and check them as the command does.

    Args:
        given: by name; one that is None is not given.

    Raises:
        TypeError: a value has a type that the option cannot have.
        ValueError: a value is not allowed; the message says what is.
    """
    parser = _Options()
    typed = []
    for name, value in given.items():
        if value is None:
            continue
        option, how = parser.table[name]
        if how.get("action") in ("store_true", argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, not {value!r}")
            no = [] if how["action"] == "store_true" else [f"--no-{option[2:]}"]
            one = [option] if value else no
        else:
            one = [f"{option}={_text(name, value)}"]
        try:
            parser.parse_args(one)
        except ValueError as error:
            raise ValueError(str(error).replace(f"argument {option}", name)) from None
        typed += one
    if given.get("modes") is not None:
        try:
            select_modes([part.strip() for part in _text("modes", given["modes"]).split(",")])
        except ValueError as error:
            raise ValueError(f"modes: {error}") from None
    return typed


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that nothing takes.

    Raises:
        TypeError: there is one; the message has the most similar name.
    """
    allowed = sorted(set(known))
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(allowed)}"
            raise TypeError(f"mpscale.compare() has no argument {name!r}; {hint}")


def _text(name: str, value: Any) -> str:
    """A value as one would type it."""
    match value:
        case bool():
            return "on" if value else "off"
        case str() | PathLike():
            return str(fspath(value))
        case Mode():
            return value.name
        case Mapping():
            return ",".join(f"{key}={_text(name, each)}" for key, each in value.items())
        case int():
            return str(int(value))
        case float():
            return repr(float(value))  # without the name of NumPy's type
        case Iterable():
            return ",".join(_text(name, each) for each in (sorted(value) if isinstance(value, set) else value))
        case _ if hasattr(value, "item"):  # a number of NumPy's
            return _text(name, value.item())
    raise TypeError(f"{name} must be a number, a text or a list of them, not {value!r}")
