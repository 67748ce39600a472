"""What is wrong or slow about the data of a workload: types, values, labels that do not fit the loss.

Of a pipeline these are its first batches, and the findings say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.core.lint import Check, Finding, Severity
from mpscale.core.magnitudes import LARGEST_FLOAT16
from mpscale.worker import labels as label_forms
from mpscale.worker.compiled.judged import Judged
from mpscale.worker.objective import check_finite, check_logits, check_values
from mpscale.worker.refused import Refused
from mpscale.worker.traced import Traced
from mpscale.workloads import Data
from mpscale.workloads.data import leaves, length

_SMALLEST_NORMAL, _SMALLEST = 2.0**-14, 2.0**-24  # of float16
_EXACT = {"float16": 2**11, "bfloat16": 2**8}
"""Up to which number every whole number is exact."""


class Arrays:
    """The data as arrays.

    Args:
        data: all of it, or the first batches of a pipeline.
        piped: whether it is those.
        kept: whether float64 arrays go into the step as they are, and not as float32.
    """

    def __init__(self, data: Data, piped: bool = False, kept: bool = True) -> None:
        self.data, self.piped, self.kept = data, piped, kept

    def of(self, *parts: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of parts of the data, by name: ``train_x``, or with a path in a structure."""
        given = {part: getattr(self.data, part) for part in parts}
        return {
            f"{part}{path}": array for part, each in given.items() if each is not None for path, array in leaves(each)
        }

    def told(self, name: str, examples: int | None = None) -> str:
        """What people call an array of which so many examples were looked at; by default all that are here."""
        array = self.of(part_of(name))[name]
        looked = len(array) if examples is None else examples
        return f"the first {looked:,} examples of {name}" if self.piped or looked < len(array) else name

    def cast(self, name: str, dtype: str) -> str:
        """How to cast an array, as an instruction."""
        return f'cast {name} to "{dtype}" in the pipeline' if self.piped else f'pass {name}.astype("{dtype}")'


def part_of(name: str) -> str:
    """The field of :class:`~mpscale.workloads.Data` that an array is in."""
    return name.partition("[")[0]


def of_pipeline(arrays: Arrays) -> Iterator[Finding]:
    """That only the first batches of a pipeline are looked at."""
    if arrays.piped:
        data = arrays.data
        test = "" if data.test_x is None else f" and {length(data.test_x):,} of the first batch of its test set"
        yield Finding(
            Check.FIRST_BATCHES,
            Severity.NOTE,
            f"the data is a pipeline: lint looked at {data.examples:,} examples of its first batches{test}",
            "check the others where they are made; in a run, the loss and the overflows of each step show them",
        )


def of_inputs(arrays: Arrays, traced: Traced, most: int | None) -> Iterator[Finding]:
    """Types and values of inputs and labels.

    Args:
        arrays: the data.
        traced: the step, which shows what inputs are cast to before anything is computed with them.
        most: how many bytes of a part of the data to look at; None for all.
    """
    every = arrays.of("train_x", "train_y", "test_x", "test_y")
    if wide := [name for name, array in every.items() if array.dtype == np.float64 and arrays.kept]:
        yield Finding(
            Check.FLOAT64_DATA,
            Severity.CAUTION,
            f"float64: {' and '.join(wide)}; that is twice the memory, and a cast in every step",
            arrays.cast(wide[0], "float32"),
        )
    for name, x in arrays.of("train_x").items():
        casts = traced.casts_of(name)
        floats = [dtype for dtype in casts if dtype.startswith(("float", "bfloat"))]
        if x.dtype.kind in "iub" and floats:
            yield Finding(
                Check.INTEGER_INPUTS,
                Severity.NOTE,
                f"{name} is {x.dtype.name} and is cast to {floats[0]} in every step",
                f"{arrays.cast(name, 'float32')} if memory does not matter; integers take less",
                tuple(filter(None, [casts[floats[0]]])),
            )
    for part in ("train_x", "test_x", "published_x"):
        given = arrays.of(part)
        for name, array in given.items():
            if array.dtype.kind in "biuf" and array.size:
                # The test set goes the way of the training set.
                casts = traced.casts_of(f"train_x{name.removeprefix(part)}")
                share = None if most is None else most // len(given)
                yield from _of_values(arrays, name, array, casts, share)


def _of_values(
    arrays: Arrays, name: str, array: npt.NDArray[Any], casts: dict[str, str], most: int | None
) -> Iterator[Finding]:
    """The values of inputs, of which the first ``most`` bytes are looked at."""
    examples = len(array) if most is None else max(1, min(len(array), most * len(array) // max(array.nbytes, 1)))
    part = array[:examples]
    low, high = (float(extreme) for extreme in (part.min(), part.max()))  # NaN if any is NaN; without a copy
    of = arrays.told(name, examples)
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = sum(
            int((~np.isfinite(part[start : start + 1024])).reshape(len(part[start : start + 1024]), -1).any(1).sum())
            for start in range(0, examples, 1024)
        )
        yield Finding(
            Check.INPUTS_NOT_FINITE,
            Severity.PROBLEM,
            f"{bad:,} of {f'{examples:,} examples in {of}' if of == name else of} "
            f"{'is' if bad == 1 else 'are'} not finite",
            "leave these examples out, or replace the values: numpy.nan_to_num",
        )
        return
    largest = max(-low, high)
    if "float16" in casts:
        layers = tuple(filter(None, [casts["float16"]]))
        if largest > LARGEST_FLOAT16:
            yield Finding(
                Check.INPUTS_TOO_LARGE,
                Severity.PROBLEM,
                f"{of} reaches {largest:g}, and becomes infinite in float16, which ends at {LARGEST_FLOAT16:,.0f}",
                "scale the inputs, for instance to mean 0 and variance 1, before they reach the model",
                layers,
            )
        elif 0 < largest < _SMALLEST_NORMAL:
            yield Finding(
                Check.INPUTS_TOO_SMALL,
                Severity.PROBLEM if largest < _SMALLEST else Severity.CAUTION,
                f"{of} is at most {largest:.3g}, and float16 keeps {'nothing' if largest < _SMALLEST else 'few bits'} "
                f"of what is below {_SMALLEST if largest < _SMALLEST else _SMALLEST_NORMAL:.2g}",
                "scale the inputs, for instance to mean 0 and variance 1, before they reach the model",
                layers,
            )
    for dtype in _EXACT.keys() & casts.keys():
        if array.dtype.kind in "iu" and largest > _EXACT[dtype]:
            yield Finding(
                Check.INPUTS_ROUNDED,
                Severity.CAUTION,
                f"{of} has whole numbers up to {largest:,.0f}, and {dtype} rounds those above {_EXACT[dtype]:,}: "
                "numbers of categories would become others",
                'for categories, declare keras.Input(shape, dtype="int32"); for quantities, scale the inputs',
                tuple(filter(None, [casts[dtype]])),
            )


def of_labels(arrays: Arrays, judged: Sequence[Judged], texts: Iterable[str]) -> Iterator[Finding]:
    """Labels and sample weights of a compiled model. A workload with a loss of its own is refused for its labels.

    ``texts``: the labels that are text where the step takes numbers.
    """
    given = arrays.of("train_y")
    yield from (label_forms.text_labels(f"the labels in {arrays.told(name)}").finding for name in texts)
    for each in judged:
        labels = given[each.name]
        if labels.dtype.kind not in "US" and labels.size and (each.kind or each.is_spoiled_by(labels)):
            yield from _of_judged(each, labels, f"the labels in {arrays.told(each.name)}")
    for name, weights in arrays.of("train_weight").items():
        if weights.dtype.kind == "f" and not np.isfinite(weights).all():
            yield Finding(
                Check.LABELS_NOT_FINITE,
                Severity.PROBLEM,
                f"the sample weights in {arrays.told(name)} are not finite",
                "give examples that are not to count a weight of 0",
            )


def _of_judged(judged: Judged, labels: npt.NDArray[Any], what: str) -> Iterator[Finding]:
    """What a workload with a loss of its own is refused for."""
    kind, options = judged.kind, judged.options
    form = label_forms.keras_form(kind, judged.label, judged.output)
    label = form(np.empty((1, *(size or 1 for size in judged.label)))).shape[1:]
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_finite(labels, what),
        lambda: None if None in judged.label else label_forms.check_fit(kind, label, judged.output),
        lambda: check_logits(kind, options, judged.squashed_by, f"the outputs for {judged.name} end"),
        lambda: check_values(kind, options, labels, judged.classes, what),
    )
    for check in checks:
        try:
            check()
        except Refused as refused:
            yield refused.finding


def of_test_labels(arrays: Arrays, classes: Mapping[str, int]) -> Iterator[Finding]:
    """Labels that only the metric sees.

    Args:
        arrays: the data.
        classes: how many classes there are, by the place of their numbers in the labels.
    """
    for name, labels in arrays.of("test_y", "published_y").items():
        if not labels.size:
            continue
        of = arrays.told(name)
        if labels.dtype.kind == "f" and not math.isfinite(float(labels.min())) * math.isfinite(float(labels.max())):
            yield Finding(
                Check.LABELS_NOT_FINITE,
                Severity.CAUTION,
                f"labels in {of} are not finite, so the metric may not be either",
                "leave these examples out, or use a metric that ignores them",
            )
        number = classes.get(name.removeprefix(part_of(name)))
        if number and labels.dtype.kind in "iu" and not 0 <= labels.min() <= labels.max() < number:
            yield Finding(
                Check.LABELS_OUT_OF_RANGE,
                Severity.PROBLEM,
                f"labels in {of} range from {labels.min()} to {labels.max()}, but a model with {number} outputs has "
                f"classes 0 to {number - 1}",
                "number the classes from 0, the same in the training and the test set",
            )


def of_host(arrays: Arrays, on_gpu: bool) -> Iterator[Finding]:
    """Which arrays TensorFlow keeps in host memory although there is a GPU, as it does with int32 and text."""
    given = arrays.of("train_x", "train_y")
    kept = {name: array for name, array in given.items() if array.dtype.kind in "US" or array.dtype == np.int32}
    names = [name for name, array in kept.items() if ":GPU:" not in tf.constant(array[:1]).backing_device]
    if on_gpu and names:
        yield Finding(
            Check.DATA_ON_HOST,
            Severity.CAUTION,
            f"TensorFlow keeps {' and '.join(names)} in host memory, as it does with int32 and text, and copies them",
            f"{arrays.cast(names[0], 'int64')}, or to a float; turn text into numbers before the training",
        )
