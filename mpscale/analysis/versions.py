"""Versions of a model: which rows of runs are of one series although the model changed, and what changed.

A series key holds the digest of a workload, so a changed model begins a new series. Where the workload names its series
(`series=`), or the user asks to compare by name, digest and batch do not count, and what changed is told in words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpscale.core.case import SeriesKey
from mpscale.core.record import Record, common

ANY = "*"
"""In a series key: every version."""

_WORDS, _LONGEST = 3, 60
"""Most entries of a list of layers or settings that are told, and most characters of a setting."""


@dataclass(frozen=True, slots=True)
class ModelChange:
    """One thing that differs between two versions of a model.

    Args:
        what: such as ``parameters``.
        before: its value, in words; empty if it has none or the value says nothing.
        after: the same for the other version.
    """

    what: str
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        if not self.before and not self.after:
            return self.what
        return f"{self.what} {self.before or 'none'} to {self.after or 'none'}"


UNSAID = ModelChange("model, training or data")
"""Something differs, and the records do not say what."""


def series_name(cases: Sequence[Record], by_name: bool = False) -> str | None:
    """The name of the series whose versions are compared; None if only the same model may be compared.

    Args:
        cases: of one workload and mode.
        by_name: whether a workload without a series is followed by its own name.
    """
    named: str | None = common(cases, "series")
    return named or (str(cases[0]["workload"]) if by_name and cases else None)


def versions_key(case: Record, by_name: bool = False) -> str | None:
    """The key of the series of a case: its ``series_key``; in a named series the same for all versions of the model."""
    key: str | None = case["series_key"]
    name = case["series"] or (case["workload"] if by_name else None)
    if key is None or name is None or (parsed := SeriesKey.parse(key)) is None:
        return key
    # In a sweep the batch is part of the row's name.
    batch = {} if case["swept_batch"] is not None else {"batch": ANY}
    return str(replace(parsed, workload=name, digest=ANY, settings={**parsed.settings, **batch}))


def one_series(before: Sequence[Record], after: Sequence[Record], by_name: bool) -> bool:
    """Whether two rows may be versions of one model: their series have one name; by name, if only one of them has one.

    The rows have the same workload and mode, or the same series.
    """
    one, two = series_name(before), series_name(after)
    return one == two if one and two else by_name


def without_model(key: str) -> str:
    """A series key without what may differ between versions of a model; a text of another form as it is."""
    parsed = SeriesKey.parse(key)
    if parsed is None:
        return key
    return str(replace(parsed, workload=ANY, digest=ANY, settings={**parsed.settings, "batch": ANY}))


def model_changes(before: Sequence[Record], after: Sequence[Record]) -> list[ModelChange]:
    """What differs between the models, trainings and data of two rows, in words; empty if nothing does.

    Args:
        before: cases of one workload and mode.
        after: cases of the same one in a later run.
    """
    if (key := common(before, "series_key")) is not None and key == common(after, "series_key"):
        return []
    found = list(_changes(before, after))
    digests = [_key_digest(cases) or common(cases, "workload_digest") for cases in (before, after)]
    if not found and digests[0] != digests[1] and None not in digests:
        # A rate of dropout, an activation, the code of a loss: the records have only their digest.
        layers = [common(cases, "model_digest") for cases in (before, after)]
        found.append(ModelChange("settings of layers") if layers[0] != layers[1] else UNSAID)
    return found


def in_words(changes: Sequence[ModelChange]) -> str:
    """All changes on one line; empty if there are none."""
    return "; ".join(map(str, changes))


def _key_digest(cases: Sequence[Record]) -> str | None:
    key = common(cases, "series_key")
    parsed = None if key is None else SeriesKey.parse(key)
    return None if parsed is None else parsed.digest


def _changes(before: Sequence[Record], after: Sequence[Record]) -> Iterator[ModelChange]:
    for what, column, shown in _FACTS:
        one, two = (common(cases, column) for cases in (before, after))
        # What older runs lack is no difference.
        if one is not None and two is not None and one != two:
            yield from shown(what, one, two)


def _plain(what: str, before: Any, after: Any) -> Iterator[ModelChange]:
    yield ModelChange(what, *_told(_number, before, after))


def _unsaid(what: str, before: Any, after: Any) -> Iterator[ModelChange]:
    """A digest: that it differs is all that it says."""
    yield ModelChange(what)


def _counts(what: str, before: str, after: str) -> Iterator[ModelChange]:
    """A text such as ``Conv2D 3, Dense 2``: the kinds whose number differs."""
    one, two = (_counted(text) for text in (before, after))
    differing = [kind for kind in dict.fromkeys([*one, *two]) if one[kind] != two[kind]]
    for kind in differing[:_WORDS]:
        yield ModelChange(f"{what} {kind}", str(one[kind] or ""), str(two[kind] or ""))
    if len(differing) > _WORDS:
        yield ModelChange(f"{len(differing) - _WORDS} more kinds of {what}")


def _counted(text: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in text.split(", "):
        kind, _, number = part.rpartition(" ")
        # The file may be a stranger's, and Python refuses numbers of thousands of digits.
        found[kind or number] += int(number) if kind and number.isdecimal() and len(number) < 10 else 1
    return found


def _settings(what: str, before: str, after: str) -> Iterator[ModelChange]:
    """A JSON object: the entries that differ."""
    try:
        one, two = (json.loads(text) for text in (before, after))
    except (ValueError, RecursionError):
        one, two = None, None
    if not isinstance(one, dict) or not isinstance(two, dict):
        yield ModelChange(what)
        return
    differing = [name for name in dict.fromkeys(["class", *one, *two]) if one.get(name) != two.get(name)]
    if "class" in differing:
        # Another optimizer has other settings, and a list of them says nothing.
        differing = ["class", *(name for name in ("learning_rate",) if name in differing)]
    for name in differing[:_WORDS]:
        called = what if name == "class" else f"{what}'s {name.replace('_', ' ')}"
        yield ModelChange(called, *_told(_setting, one.get(name), two.get(name)))
    if len(differing) > _WORDS:
        yield ModelChange(f"{len(differing) - _WORDS} more settings of the {what}")


def _told(shown: Callable[[Any], str], before: Any, after: Any) -> tuple[str, str]:
    """Two values that differ, in words that differ: if a few digits are the same, all of them."""
    one, two = shown(before), shown(after)
    if one == two:
        one, two = (f"{value:,}" if isinstance(value, int) else str(value)[:_LONGEST] for value in (before, after))
    return (one, two) if one != two else ("one value", "another")


def _setting(value: Any) -> str:
    """A setting in a few words: of a class its last name, of a schedule its first and its last rate."""
    if isinstance(value, dict):
        values = list(value.values())
        return f"{_number(values[0])} ... {_number(values[-1])}" if values else "{}"
    text = _number(value)[:_LONGEST]
    return text.rpartition(".")[2] if isinstance(value, str) else text


def _number(value: Any) -> str:
    """A number with three or four digits, large ones in thousands or millions; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if not abs(value) < 1e100:
        return "a number that is not finite or too large"
    for least, size, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g} {name}"
    return f"{value:.6g}"


_Shown = Callable[[str, Any, Any], Iterator[ModelChange]]
_FACTS: tuple[tuple[str, str, _Shown], ...] = (
    ("workload", "workload", _plain),
    ("parameters", "parameters", _plain),
    ("layers", "layers", _counts),
    ("batch", "batch_size", _plain),
    ("optimizer", "optimizer_config", _settings),
    ("loss", "loss_name", _plain),
    ("metric", "metric_name", _plain),
    ("margin", "metric_margin", _plain),
    ("target", "metric_target", _plain),
    ("test examples", "test_examples", _plain),
    ("examples or labels", "data_digest", _unsaid),
)
"""What is told, from which column and how, in the order of importance."""
