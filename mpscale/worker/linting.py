"""A case that only looks for what is wrong or slow about its workload: `mpscale lint`.

What a run would refuse is noted, replaced by something that cannot be wrong, and the rest is looked at all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.case import Case
from mpscale.core.device import Device
from mpscale.core.lint import Check, Finding, Severity, to_cell
from mpscale.core.mode import MODES
from mpscale.core.processes.events import Channel, Phase
from mpscale.worker.built import Built, build
from mpscale.worker.case import Status
from mpscale.worker.compiled import model as compiling
from mpscale.worker.compiled.judged import refused_labels
from mpscale.worker.device import require, touch
from mpscale.worker.lint import look as checks
from mpscale.worker.precision import Arithmetic, Precision
from mpscale.worker.probe import Call, noted_calls
from mpscale.worker.refusal import refusal_in
from mpscale.worker.refused import Refused
from mpscale.worker.timing import DISPATCH_BOUND, time_empty_call, warm_up
from mpscale.workloads import Data, Workload, registry
from mpscale.workloads.data import mapped


def _any_loss(labels: Any, outputs: Any) -> Any:
    return tf.reduce_mean(tf.abs(outputs), -1)


def _trained_plainly(build: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
    """Another optimizer for a compiled model, and as many of it."""

    def plain() -> keras.Model:
        model = build()
        for name, held in list(vars(model).items()):
            if isinstance(held, keras.optimizers.Optimizer):
                setattr(model, name, keras.optimizers.SGD())
        return model

    return plain


def _numbered(make: Callable[[], Any], wrong: Collection[str] = ()) -> Callable[[], Any]:
    """Class 0 for labels that are text, and for those that are wrong, by the names of their arrays."""

    def number(path: str, array: Any) -> Any:
        is_refused = array.dtype.kind in "US" or f"train_y{path}" in wrong
        return np.zeros(array.shape, np.int64) if is_refused else array

    def made() -> Any:
        data = make()
        if not isinstance(data, Data):
            return data
        parts = {name: getattr(data, name) for name in ("train_y", "test_y")}
        return replace(data, **{name: mapped(number, part) for name, part in parts.items() if part is not None})

    return made


def _standing_in(workload: Workload, check: Check) -> tuple[str, Workload]:
    """Which part of a workload a check refuses, and the workload with another one that is not refused."""
    optimizer = check is Check.OPTIMIZER_SCALES
    if workload.compiled is None:
        return (
            ("optimizer", replace(workload, optimizer="sgd"))
            if optimizer
            else ("loss", replace(workload, loss=_any_loss))
        )
    if optimizer:
        return "optimizer", replace(workload, model=_trained_plainly(workload.model))
    return "labels", replace(workload, data=_numbered(workload.data))


def lint(case: Case, device: Device, channel: Channel) -> Status:
    """Look at the workload of ``case`` in its mode, and report the findings so far after each part."""
    mode = MODES[case.mode]
    require(device)
    channel.phase(Phase.IDLE)
    touch(device, mode, case.settings)
    channel.phase(Phase.CONTEXT_READY)
    found: list[Finding] = []

    def report(findings: Any) -> None:
        found.extend(findings)
        channel.values({"lint": to_cell(found)})

    report([])
    workload = registry.get(case.workload)
    arithmetic = Arithmetic(mode, device, case.settings.jit)
    built, stood_in = _built(case, workload, arithmetic, channel, report)
    if built is None:
        return "ok", None  # the same part is refused again, so there is nothing to look at
    channel.phase(Phase.MODEL_BUILT)
    if built.compiled is not None and (unsupported := mode.unsupported_reason(device, built.case.settings.jit)):
        return "unsupported", unsupported
    if built.float8 is not None and (unsupported := built.float8.unsupported_reason(built.optimizer)) is not None:
        return "unsupported", unsupported
    arithmetic.look("the train step was traced")
    precision = Precision(built.model, built.step.graph)
    report(checks.look(built, precision, arithmetic, whole=True))
    if built.compiled is not None and (wrong := refused_labels(built.step, built.data.train_y)):  # which has been told
        if built.feed is not None:
            return "ok", None
        workload = replace(built.workload, data=_numbered(built.workload.data, wrong))
        built = build(case, arithmetic, channel, workload)
        stood_in.add("labels")
    built, refused = _first_step(built, channel, arithmetic)
    report(refused)
    channel.phase(Phase.COMPILED)
    if not stood_in & {"loss", "labels"}:
        report(_first_loss(built))
    report(_dispatch(built))
    return "ok", None


def _built(
    case: Case, workload: Workload, arithmetic: Arithmetic, channel: Channel, report: Any
) -> tuple[Built | None, set[str]]:
    """Build and trace, and stand in for what is refused; return also which parts of the workload are not its own."""
    stood_in: set[str] = set()
    while True:
        try:
            built = build(case, arithmetic, channel, workload)
            built.step.trace()
            return built, stood_in
        except Refused as refused:
            part, workload = _standing_in(workload, refused.finding.check)
            if part in stood_in:
                return None, stood_in
            report([refused.finding])
            stood_in.add(part)


def _first_step(built: Built, channel: Channel, arithmetic: Arithmetic) -> tuple[Built, list[Finding]]:
    """Take the first step. If XLA refuses it, return what it refuses, and the same without XLA, whose step is taken.

    An error that both have is the workload's own.
    """
    try:
        built.step()
        built.step.synchronise()
        return built, []
    except Exception as error:
        if (refusal := refusal_in(error, built.model, built.case.settings.jit)) is None:
            raise
        traced = checks.traced_of(built)
    settings = replace(built.case.settings, jit=False)
    built = build(replace(built.case, settings=settings), arithmetic, channel, built.workload)
    built.step()
    built.step.synchronise()
    layers = tuple(dict.fromkeys(traced.label(each.layer) for each in refusal.operations if each.layer is not None))
    return built, [
        Finding(
            Check.XLA,
            Severity.PROBLEM,
            f"XLA cannot compile the train step: {refusal}",
            "move this out of the model, for instance augmentation and text into the data, give it constant shapes, "
            "or run without XLA: --mp-jit off",
            layers,
        )
    ]


def _first_loss(built: Built) -> Iterator[Finding]:
    """Whether the loss of the first step is finite, and if not, in which layer that begins."""
    loss = float(built.step.read_log().loss[0])
    if np.isfinite(loss):
        return
    mode, layer = built.case.mode, None
    where = "which layer has the first outputs that are not finite is not known, because nothing calls all of the model"
    if compiling.is_callable(built.model):
        layer = _first_not_finite(built)
        where = "the model's outputs are finite"
    if layer is not None:
        where = f"the outputs of {layer} are the first that are not finite"
    cure = "look at the inputs, the initial weights and the loss"
    if mode != "fp32":
        cure = 'if it is finite in fp32, give this layer dtype="float32", or scale what it gets'
    text = f"the loss of the first step is {loss} in {mode}; {where}"
    yield Finding(Check.FIRST_LOSS, Severity.PROBLEM, text, cure, (layer,) if layer else ())


def _first_not_finite(built: Built) -> str | None:
    """The first layer whose outputs for the first batch are not finite, with new weights: the step has changed its."""
    keras.utils.set_random_seed(built.case.seed)
    examples, _, _ = built.first_batch()
    model = built.build_again()
    labels: list[str] = []

    @tf.function(autograph=False)
    def finite(x: Any) -> Any:
        def flags(calls: list[Call]) -> Iterator[Any]:
            for call in calls:
                yield from flags(call.inside)
                for tensor in call.outputs:
                    labels.append(call.label)
                    yield tf.reduce_all(tf.math.is_finite(tensor))

        with noted_calls(model) as calls:
            model(x, training=True)
        return tf.stack([*flags(calls), tf.constant(True)])

    flags = finite(tf.nest.map_structure(tf.constant, examples)).numpy()[:-1]
    return None if flags.all() else labels[int(np.argmin(flags))]


def _dispatch(built: Built) -> Iterator[Finding]:
    """Whether Python and TensorFlow take more of a step than the device does."""
    cure = "use a larger batch, or several steps per call: --mp-steps-per-call 10"
    if built.feed is not None:
        cure = "use a larger batch"  # each step takes one
        built.feed.hold()  # otherwise a step also waits for its input
    step_s = warm_up(built.step)
    share = min(time_empty_call(built.step) / (built.step.steps_per_call * step_s), 1.0)
    if share > DISPATCH_BOUND:
        yield Finding(
            Check.DISPATCH_BOUND,
            Severity.CAUTION,
            f"dispatch in Python and TensorFlow takes {100 * share:.0f} % of a step of {step_s * 1e3:.3g} ms here: "
            "whatever a mode gains on the device hardly shows",
            cure,
        )
