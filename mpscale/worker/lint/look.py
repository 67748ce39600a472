"""What is wrong or slow about a workload, from its built model, its optimizers and the traced train step.

Nothing runs on the device. A case of a run makes these checks too, so they look at no more than some of a large data
set. Whether a workload is refused is decided elsewhere, where the case needs it; here are findings only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.lint import Check, Finding, Severity
from mpscale.core.mode import MODES, Mode
from mpscale.worker.compiled.judged import Judged, cast_texts, judged_of
from mpscale.worker.compiled.update import FitUpdate
from mpscale.worker.lint import data as checks
from mpscale.worker.lint.data import Arrays
from mpscale.worker.precision import LOW, MOVES, Arithmetic, Precision
from mpscale.worker.traced import WITHIN, Product, Size, Traced, operations, source
from mpscale.workloads.data import leaves

if TYPE_CHECKING:
    from mpscale.worker.built import Built

TENSOR_CORES = 8
"""Sizes should be multiples of this: 16 bytes in float16 and bfloat16. See docs/guides/lint.md."""
MOST_BYTES = 2**28
"""How much of a part of the data a case of a run looks at: reading it takes some 0.1 s."""
_NAMED = 6
"""Most layers that a sentence names; all are in ``layers``."""
_LITTLE, _HALF = 0.1, 0.5
"""Shares of the forward FLOPs. Up to the first, what is in float32 is not worth a word, and above the second it is more
than a note; up to the first, a size that the data decides is no more than a note."""
_SQUASHES = ("Softmax", "LogSoftmax", "Sigmoid")


def look(built: Built, precision: Precision, arithmetic: Arithmetic, whole: bool) -> list[Finding]:
    """What the checks find, by topic.

    Args:
        built: what is trained; its step has been traced.
        precision: of that step.
        arithmetic: the settings of the process.
        whole: look at all data, however much that is.
    """
    mode = MODES[built.case.mode]
    low = LOW.get(mode.policy)
    traced, judged = traced_of(built), judged_of(built.step)
    # A step of a compiled model gets arrays of float64 as float32, as from Keras' fit, but not so a pipeline's.
    arrays = Arrays(built.data, built.feed is not None, built.compiled is None or built.feed is not None)
    batch, most = built.replica_batch, None if whole else MOST_BYTES
    optimizers = _optimizers(built)
    found = [
        *of_settings(traced, precision, arithmetic, mode),
        *(of_float64(traced) if "float64" not in precision.misfits(mode).values() else ()),
        *of_outputs(traced),
        *of_weights(traced, built.model, optimizers),
        *(of_float32(traced, low) if low else ()),
        *(of_sizes(traced, batch, low, arrays.piped) if low else ()),
        *checks.of_pipeline(arrays),
        *checks.of_inputs(arrays, traced, most),
        *checks.of_labels(arrays, judged, cast_texts(built.step) if built.compiled is not None else ()),
        *checks.of_test_labels(arrays, _classes(built, traced, judged)),
        *checks.of_host(arrays, bool(tf.config.list_logical_devices("GPU"))),
        *of_accumulation(traced, built.model, optimizers),
        *of_train_step(built, mode),
    ]
    return list(dict.fromkeys(found))


def traced_of(built: Built) -> Traced:
    """The traced step of what is built."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(built.step.batch)
    inputs = {f"train_x{path}": tensor for path, tensor in leaves(x)}
    update = built.step.update
    if isinstance(update, FitUpdate):
        # A train_step of the user's own may use no loss of Keras' class.
        reached: Any = [each.outputs for each in update.compared] or update.returned
    else:
        reached = None if built.noted_loss is None else built.noted_loss.outputs
    outputs = {id(each): each for each in tf.nest.flatten(reached) if tf.is_symbolic_tensor(each)}
    return Traced(built.model, built.step.graph, inputs, list(outputs.values()))


def _classes(built: Built, traced: Traced, judged: list[Judged]) -> dict[str, int]:
    """How many classes there are, by the place in the labels, such as ``['kind']``, where labels are their numbers."""
    if built.noted_loss is None:
        known = [each for each in judged if each.classes and each.options.get("ignore_class") is None]
        return {each.name.removeprefix("train_y"): each.classes or 0 for each in known}
    labels, outputs = built.data.train_y, traced.outputs
    numbered = labels.dtype.kind in "iu" and len(outputs) == 1 and outputs[0].shape.rank == labels.ndim + 1
    classes = outputs[0].shape[-1] if numbered else None
    return {"": classes} if classes and classes > 1 else {}


def _optimizers(built: Built) -> list[keras.optimizers.Optimizer]:
    """Those that train the model, without loss scaling."""
    update = built.step.update
    if built.compiled is None or not isinstance(update, FitUpdate):
        return [built.optimizer]
    return [built.compiled.optimizers[name] for name in update.optimizers]


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
        what = f"{squash.lower()} is computed in {half}" if squash else f"the outputs reach the loss in {half}"
        yield Finding(
            Check.HALF_OUTPUT,
            Severity.PROBLEM if squash and half == "float16" else Severity.CAUTION,
            f"{what}, which keeps {11 if half == 'float16' else 8} bits of them: losses and gradients lose small "
            "differences",
            'give the last layer float32: keras.layers.Dense(..., dtype="float32"), or, to keep a large product in '
            f'{half}, keras.layers.Activation({(squash or "linear").lower()!r}, dtype="float32") after it',
            tuple(filter(None, [traced.layer_of(op)])),
        )


def of_weights(
    traced: Traced, model: keras.Model, optimizers: Sequence[keras.optimizers.Optimizer]
) -> Iterator[Finding]:
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
    for optimizer in optimizers if any(v.dtype == "float16" for v in halves) else ():
        epsilon = getattr(optimizer, "epsilon", None)
        if isinstance(epsilon, float) and epsilon > 0 and float(np.float16(epsilon)) == 0.0:
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


def of_sizes(traced: Traced, batch: int, low: str, piped: bool) -> Iterator[Finding]:
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
            f"choose {_up(batch)}, with {'.batch in the pipeline' if piped else 'batch_size or --mp-batch-size'}",
        )


def of_accumulation(
    traced: Traced, model: keras.Model, optimizers: Sequence[keras.optimizers.Optimizer]
) -> Iterator[Finding]:
    """BatchNormalization sees each batch alone, however many batches an update is accumulated over."""
    steps = max(getattr(optimizer, "gradient_accumulation_steps", None) or 1 for optimizer in optimizers)
    layers = tuple(
        traced.label(layer)
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    )
    if steps > 1 and layers:
        yield Finding(
            Check.BATCH_NORM_ACCUMULATION,
            Severity.CAUTION,
            f"{_layers(layers, 'normalize', 'normalizes')} each batch by itself, although {steps} batches make up an "
            "update: the training is not that of the larger batch",
            "use keras.layers.GroupNormalization or LayerNormalization, or a larger batch without accumulation",
            layers,
        )


def of_train_step(built: Built, mode: Mode) -> Iterator[Finding]:
    """What a compiled model does about the loss scale: in its optimizer, or in a train_step of its own."""
    update = built.step.update
    for note in built.compiled.notes if built.compiled is not None else ():
        yield Finding(Check.OPTIMIZER_SCALES, Severity.NOTE, note, "compile with the inner optimizer alone")
    if mode.scaling is None or not isinstance(update, FitUpdate):
        return
    if (unscaled := update.unscaled(mode.name)) is not None:
        yield Finding(Check.TRAIN_STEP, Severity.PROBLEM, *unscaled)
    if update.remark is not None:
        yield Finding(Check.TRAIN_STEP, Severity.CAUTION, *update.remark)


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
