"""What is wrong or slow about a workload, from its data, its built model, its optimizer and the traced train step.

Nothing runs on the device. A case of a run makes these checks too, so they look at no more than some of a large data
set. Whether a workload is refused is decided elsewhere, where the case needs it; here are findings only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.core.lint import Check, Finding, Severity
from mpscale.core.magnitudes import LARGEST_FLOAT16
from mpscale.core.mode import MODES, Mode
from mpscale.worker.precision import LOW, MOVES, Arithmetic, Precision
from mpscale.worker.traced import WITHIN, Product, Size, Traced, operations, source
from mpscale.workloads.data import leaves

if TYPE_CHECKING:
    from mpscale.worker.built import Built
    from mpscale.workloads import Data

TENSOR_CORES = 8
"""Sizes should be multiples of this: 16 bytes in float16 and bfloat16. See docs/guides/lint.md."""
MOST_BYTES = 2**28
"""How much of an array a case of a run looks at: reading it takes some 0.1 s."""
_NAMED = 6
"""Most layers that a sentence names; all are in ``layers``."""
_LITTLE, _HALF = 0.1, 0.5
"""Shares of the forward FLOPs. Up to the first, what is in float32 is not worth a word, and above the second it is more
than a note; up to the first, a size that the data decides is no more than a note."""
_SMALLEST_NORMAL, _SMALLEST = 2.0**-14, 2.0**-24  # of float16
_EXACT = {"float16": 2**11, "bfloat16": 2**8}
"""Up to which number every whole number is exact."""
_SQUASHES = ("Softmax", "LogSoftmax", "Sigmoid")


def look(built: Built, precision: Precision, arithmetic: Arithmetic, whole: bool) -> list[Finding]:
    """What the checks find, by topic.

    Args:
        built: what is trained; its step has been traced.
        precision: of that step.
        arithmetic: the settings of the process.
        whole: look at all data, however much that is.
    """
    mode, data = MODES[built.case.mode], built.data
    low = LOW.get(mode.policy)
    traced = traced_of(built)
    most = None if whole else MOST_BYTES
    return [
        *of_settings(traced, precision, arithmetic, mode),
        *(of_float64(traced) if "float64" not in precision.misfits(mode).values() else ()),
        *(of_outputs(traced) if traced.outputs else of_last_layers(traced, built.model)),
        *of_weights(traced, built.model, built.optimizer),
        *(of_float32(traced, low) if low else ()),
        *(of_sizes(traced, built.batch, low) if low else ()),
        *of_data(data, traced, most),
        *of_test_labels(data, traced.outputs),
        *of_host(data, bool(tf.config.list_logical_devices("GPU"))),
        *of_accumulation(traced, built.model, built.optimizer),
    ]


def traced_of(built: Built) -> Traced:
    """The traced step of what is built. What the model returned in it is known where the workload has the loss."""
    outputs = None if built.noted_loss is None else built.noted_loss.outputs
    return Traced(built.model, built.step.graph, arrays_of(built.data, "train_x"), outputs)


def arrays_of(data: Data, *parts: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays of parts of the data, by name: ``train_x``, or with a path in a structure."""
    given = {part: getattr(data, part) for part in parts}
    return {f"{part}{path}": array for part, each in given.items() if each is not None for path, array in leaves(each)}


def of_settings(traced: Traced, precision: Precision, arithmetic: Arithmetic, mode: Mode) -> Iterator[Finding]:
    """Whether the workload decides its precision itself, so that the modes would not differ as they should."""
    if arithmetic.objection is not None:
        cure = "leave out set_dtype_policy, set_floatx and the like, since the mode sets them"
        yield Finding(Check.PROCESS_SETTINGS, Severity.PROBLEM, arithmetic.objection, cure)
    elif arithmetic.policy_before not in (None, "float32"):
        yield Finding(
            Check.PROCESS_SETTINGS,
            Severity.CAUTION,
            f"the import of the workload, or its data function, sets Keras' policy to {arithmetic.policy_before}; each "
            "mode sets its own, but what was made before keeps that one",
            "leave out set_dtype_policy",
        )
    if (objected := precision.objected(mode)) is not None:
        wrong = precision.misfits(mode)
        check = Check.FLOAT64_LAYER if "float64" in wrong.values() else Check.LAYER_DTYPE
        # If nothing is wrong by itself, nothing is in the mode's precision, because these layers are in float32.
        kept = dict.fromkeys(product.layer for product in traced.products if product.dtype == "float32")
        yield Finding(check, Severity.PROBLEM, *objected, tuple(wrong or kept))


def of_outputs(traced: Traced) -> Iterator[Finding]:
    """Whether float16 reaches softmax or loss."""
    for outputs in traced.outputs:
        op = source(outputs)
        squash = op.type if op.type in _SQUASHES else None
        half = op.outputs[0].dtype.name
        if half not in ("float16", "bfloat16") or (squash is None and outputs.dtype.name != half):
            continue
        layers = tuple(filter(None, [traced.layer_of(op)]))
        yield _half_output(squash.lower() if squash else None, half, layers)


def _half_output(squash: str | None, half: str, layers: tuple[str, ...]) -> Finding:
    what = f"{squash} is computed in {half}" if squash else f"the outputs reach the loss in {half}"
    return Finding(
        Check.HALF_OUTPUT,
        Severity.PROBLEM if squash and half == "float16" else Severity.CAUTION,
        f"{what}, which keeps {11 if half == 'float16' else 8} bits of them: losses and gradients lose small "
        "differences",
        'give the last layer float32: keras.layers.Dense(..., dtype="float32"), or, to keep a large product in '
        f'{half}, keras.layers.Activation({squash or "linear"!r}, dtype="float32") after it',
        layers,
    )


def of_last_layers(traced: Traced, model: keras.Model) -> Iterator[Finding]:
    """The same by the layers of a compiled model, as far as it says which are the last."""
    for output in getattr(model, "outputs", None) or ():
        layer = output._keras_history.operation
        dtype = getattr(layer, "compute_dtype", "float32")
        if dtype not in ("float16", "bfloat16"):
            continue
        name = str(getattr(getattr(layer, "activation", None), "__name__", ""))
        squash = name in ("softmax", "sigmoid", "log_softmax") or isinstance(layer, keras.layers.Softmax)
        yield _half_output(name or "softmax" if squash else None, dtype, (traced.label(layer),))


def of_weights(traced: Traced, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Iterator[Finding]:
    """Whether weights are below float32, and what becomes of the optimizer's epsilon then."""
    halves = [v for v in model.trainable_variables if v.dtype in ("float16", "bfloat16")]
    if not halves:
        return
    layers = tuple(dict.fromkeys(map(traced.owner, halves)))
    kinds = " and ".join(sorted({str(v.dtype) for v in halves}))
    yield Finding(
        Check.HALF_WEIGHTS,
        Severity.PROBLEM,
        f"{_layers(layers, 'keep', 'keeps')} weights in {kinds}, so updates that are small beside a weight are lost",
        "leave out dtype there: the mode's policy computes in 16 bits and keeps weights in float32",
        layers,
    )
    epsilon = getattr(optimizer, "epsilon", None)
    if isinstance(epsilon, float) and epsilon > 0 and any(v.dtype == "float16" for v in halves):
        if float(np.float16(epsilon)) == 0.0:
            yield Finding(
                Check.EPSILON,
                Severity.PROBLEM,
                f"the optimizer's epsilon of {epsilon:g} is 0 in float16, in which it is added for these weights: "
                "where gradients are 0, the update is 0 / 0",
                "keep the weights in float32, or take an epsilon of 1e-7 or more",
                layers,
            )


def of_float64(traced: Traced) -> Iterator[Finding]:
    """Products and other work in float64, for which GPUs have few units or none."""
    wide = [
        (op.type, traced.layer_of(op, outer))
        for op, outer in operations(traced.graph)
        if op.outputs and op.outputs[0].dtype == tf.float64 and op.type != "Cast" and not MOVES.match(op.type)
    ]
    if wide:
        layers = tuple(dict.fromkeys(layer for _, layer in wide if layer))
        kinds = list(dict.fromkeys(kind for kind, _ in wide))
        yield Finding(
            Check.FLOAT64_LAYER,
            Severity.CAUTION,
            f"{_layers(layers, 'compute', 'computes') if layers else 'the train step computes'} in float64 "
            f"({_listed(kinds)}) in every mode; most GPUs are many times slower there",
            'cast to float32, or leave out dtype="float64"',
            layers,
        )


def of_float32(traced: Traced, low: str) -> Iterator[Finding]:
    """How much of the work stays in float32 although the mode computes in ``low``."""
    kept = [product for product in traced.products if product.dtype == "float32"]
    share = traced.share(kept) if kept else None
    if share is None or share <= _LITTLE:
        return
    layers = tuple(dict.fromkeys(product.layer for product in kept))
    yield Finding(
        Check.MOSTLY_FLOAT32,
        Severity.CAUTION if share > _HALF else Severity.NOTE,
        f"{_percent(share)} of the forward FLOPs are in float32 also in modes of mixed precision: {_listed(layers)}",
        'leave out dtype="float32" there; for a large last layer, compute it in 16 bits and put '
        'keras.layers.Activation("linear", dtype="float32") after it',
        layers,
    )


def of_sizes(traced: Traced, batch: int, low: str) -> Iterator[Finding]:
    """Sizes that are no multiples of 8: Tensor Cores are then used in part, or after copies with padding."""
    products = [product for product in traced.products if product.dtype == low]
    odd: dict[str, list[Size]] = {}
    within: list[Product] = []
    for product in products:
        sizes = [size for size in product.sizes if size.number % TENSOR_CORES]
        if sizes:
            known = odd.setdefault(product.layer, [])
            # What a product within a layer multiplies is often a size of its weights.
            numbers = {size.number for size in known}
            known += [s for s in sizes if s not in known and not (s.what == WITHIN and s.number in numbers)]
            within.append(product)
    for given in (False, True):
        layers = {layer: sizes for layer, sizes in odd.items() if all(size.given for size in sizes) is given}
        if not layers:
            continue
        if not given:
            layers = {layer: [size for size in sizes if not size.given] for layer, sizes in layers.items()}
        share = traced.share([product for product in within if product.layer in layers])
        cost = "" if share is None else f"; {_percent(share)} of the forward FLOPs are there"
        yield Finding(
            Check.DIMENSION,
            Severity.NOTE if given and (share or 0.0) <= _LITTLE else Severity.CAUTION,
            f"sizes that are no multiples of {TENSOR_CORES}: {_sized(layers)}{cost}",
            "pad features with zeros and classes with unused ones, if it is worth it"
            if given
            else f"choose units, filters, heads and vocabulary in multiples of {TENSOR_CORES}, such as {_next(layers)}",
            tuple(layers),
        )
    if products and batch % TENSOR_CORES:
        yield Finding(
            Check.BATCH_SIZE,
            Severity.CAUTION,
            f"the batch of {batch} is no multiple of {TENSOR_CORES}: the gradients of weights are sums over it",
            f"choose {_up(batch)}, with batch_size or --mp-batch-size",
        )


def of_data(data: Data, traced: Traced, most: int | None) -> Iterator[Finding]:
    """Types and values of inputs and labels.

    Args:
        data: all of it.
        traced: the step, which shows what inputs are cast to before anything is computed with them.
        most: how many bytes of an array to look at; None for all.
    """
    every = arrays_of(data, "train_x", "train_y", "test_x", "test_y")
    if wide := [name for name, array in every.items() if array.dtype == np.float64]:
        yield Finding(
            Check.FLOAT64_DATA,
            Severity.CAUTION,
            f"float64: {' and '.join(wide)}; that is twice the memory, and a cast in every step",
            f'pass {wide[0]}.astype("float32")',
        )
    for name, x in arrays_of(data, "train_x").items():
        casts = traced.casts_of(name)
        floats = [dtype for dtype in casts if dtype.startswith(("float", "bfloat"))]
        if x.dtype.kind in "iub" and floats:
            yield Finding(
                Check.INTEGER_INPUTS,
                Severity.NOTE,
                f"{name} is {x.dtype.name} and is cast to {floats[0]} in every step",
                'pass x.astype("float32") if its memory does not matter; integers take less',
                tuple(filter(None, [casts[floats[0]]])),
            )
    for name, array in arrays_of(data, "train_x", "test_x", "published_x").items():
        if array.dtype.kind in "biuf" and array.size:
            # The test set goes the way of the training set.
            casts = traced.casts_of(f"train_x{name.removeprefix(name[: name.index('_x') + 2])}")
            yield from _of_values(name, array, casts, most)


def _of_values(name: str, array: npt.NDArray[Any], casts: dict[str, str], most: int | None) -> Iterator[Finding]:
    """The values of inputs, of which the first ``most`` bytes are looked at."""
    examples = len(array) if most is None else max(1, min(len(array), most * len(array) // max(array.nbytes, 1)))
    part = array[:examples]
    low, high = (float(extreme) for extreme in (part.min(), part.max()))  # NaN if any is NaN; without a copy
    of = name if examples == len(array) else f"the first {examples:,} examples of {name}"
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = sum(
            int((~np.isfinite(part[start : start + 1024])).reshape(len(part[start : start + 1024]), -1).any(1).sum())
            for start in range(0, examples, 1024)
        )
        yield Finding(
            Check.INPUTS_NOT_FINITE,
            Severity.PROBLEM,
            f"{bad:,} of {examples:,} examples in {of} {'is' if bad == 1 else 'are'} not finite",
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


def of_test_labels(data: Data, outputs: list[Any]) -> Iterator[Finding]:
    """Labels that only the metric sees; those of the training are checked where the loss is made."""
    for name, labels in arrays_of(data, "test_y", "published_y").items():
        if not labels.size:
            continue
        if labels.dtype.kind == "f" and not math.isfinite(float(labels.min())) * math.isfinite(float(labels.max())):
            yield Finding(
                Check.LABELS_NOT_FINITE,
                Severity.CAUTION,
                f"labels in {name} are not finite, so the metric may not be either",
                "leave these examples out, or use a metric that ignores them",
            )
        if len(outputs) != 1 or labels.dtype.kind not in "iu" or outputs[0].shape.rank != labels.ndim + 1:
            continue
        classes = outputs[0].shape[-1]
        if data.train_y.dtype.kind in "iu" and classes > 1 and not 0 <= labels.min() <= labels.max() < classes:
            yield Finding(
                Check.LABELS_OUT_OF_RANGE,
                Severity.PROBLEM,
                f"labels in {name} range from {labels.min()} to {labels.max()}, but a model with {classes} outputs has "
                f"classes 0 to {classes - 1}",
                "number the classes from 0, the same in the training and the test set",
            )


def of_host(data: Data, on_gpu: bool) -> Iterator[Finding]:
    """Which arrays TensorFlow keeps in host memory although there is a GPU, as it does with int32 and text."""
    arrays = arrays_of(data, "train_x", "train_y")
    kept = {name: array for name, array in arrays.items() if array.dtype.kind in "US" or array.dtype == np.int32}
    names = [name for name, array in kept.items() if ":GPU:" not in tf.constant(array[:1]).backing_device]
    if on_gpu and names:
        yield Finding(
            Check.DATA_ON_HOST,
            Severity.CAUTION,
            f"TensorFlow keeps {' and '.join(names)} in host memory, as it does with int32 and text, and copies them",
            f'pass {names[0]}.astype("int64"), or a float; turn text into numbers before the training',
        )


def of_accumulation(traced: Traced, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Iterator[Finding]:
    """BatchNormalization sees each batch alone, however many batches an update is accumulated over."""
    steps = getattr(optimizer, "gradient_accumulation_steps", None)
    layers = tuple(
        traced.label(layer)
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    )
    if steps and steps > 1 and layers:
        yield Finding(
            Check.BATCH_NORM_ACCUMULATION,
            Severity.CAUTION,
            f"{_layers(layers, 'normalize', 'normalizes')} each batch by itself, although {steps} batches make up an "
            "update: the training is not that of the larger batch",
            "use keras.layers.GroupNormalization or LayerNormalization, or a larger batch without accumulation",
            layers,
        )


def _listed(names: Iterable[str]) -> str:
    named = list(names)
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")


def _layers(names: tuple[str, ...], plural: str, singular: str) -> str:
    return f"{_listed(names)} {singular if len(names) == 1 else plural}"


def _sized(layers: dict[str, list[Size]]) -> str:
    """Such as ``dense (100 outputs), dense_1 (100 inputs)``."""

    def told(sizes: list[Size]) -> Iterator[str]:
        for what in dict.fromkeys(size.what for size in sizes):
            numbers = [size.number for size in sizes if size.what == what]
            yield f"{' and '.join(map(str, numbers))} {what.removesuffix('s') if numbers == [1] else what}"

    return _listed(f"{name} ({', '.join(told(sizes))})" for name, sizes in layers.items())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %"


def _up(number: int) -> int:
    return -(-number // TENSOR_CORES) * TENSOR_CORES


def _next(layers: dict[str, list[Size]]) -> str:
    number = min(size.number for sizes in layers.values() for size in sizes)
    return f"{_up(number)} for {number}"
