"""One case, from an idle process to its last figure."""

from __future__ import annotations

import csv
import gzip
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from mpscale.core.case import Case
from mpscale.core.device import Device
from mpscale.core.files.errors import in_words
from mpscale.core.files.writing import replacing
from mpscale.core.lint import to_cell
from mpscale.core.mode import MODES
from mpscale.core.processes.events import Channel, NotKept, Phase, Remarked
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.worker import autotuning
from mpscale.worker.built import Built, build, judged
from mpscale.worker.cluster import check_same, noticing_lost_peers, replicas_here
from mpscale.worker.compiled import shares
from mpscale.worker.compiled.judged import refused_labels
from mpscale.worker.compiled.update import FitUpdate
from mpscale.worker.described import NO_TARGET, described
from mpscale.worker.device import AllocatorPeak, require, touch
from mpscale.worker.draws import draws_of
from mpscale.worker.findings import is_finite, put, report
from mpscale.worker.lint import look as lint
from mpscale.worker.precision import Arithmetic, Precision
from mpscale.worker.probe import ProbeStep, watch
from mpscale.worker.refusal import refusals_of
from mpscale.worker.replicas import ReplicatedStep, objection, remarks, why_diverged
from mpscale.worker.step import Log
from mpscale.worker.throughput import Throughput
from mpscale.worker.times import profiled, several_per_call, steady_state, with_input
from mpscale.worker.training import Evaluator, first_pause, is_accuracy, score_for, train
from mpscale.workloads.data import length
from mpscale.workloads.metric import ACCURACY

_SYNCHRONISED_STEPS, _QUEUED_STEPS = 3, 4
"""Steps after the first whose memory is read: so many that are awaited one by one, and then so many that are queued."""

_SAME = (
    "workload_digest", "data_digest", "data_order_digest", "first_batches_digest", "initial_weights_digest",
    "optimizer_config",
)  # fmt: skip
"""What all workers of a case have in common, besides the case itself and the settings of their processes."""

Status = tuple[str, str | None]
"""The status of a case, and the reason if it is not ``ok``."""


def execute(case: Case, device: Device, steps_path: Path | None, channel: Channel, energy_s: float = 0.0) -> Status:
    """Run ``case`` and report over ``channel`` along the way.

    Args:
        case: what to run.
        device: where to train; the process must have been started with this device visible.
        steps_path: where to write the log of every step, as gzipped CSV.
        channel: takes the reports.
        energy_s: how long to take steps, from the start of the timing, to measure their energy; 0 for no energy.
    """
    mode, settings = MODES[case.mode], case.settings
    require(device)
    channel.phase(Phase.IDLE)
    with noticing_lost_peers(settings):
        report(channel, touch(device, mode, settings))
        software = {"TensorFlow": tf.__version__, "Keras": keras.__version__}
        if device.kind == "gpu":
            software["allocator"] = os.environ.get("TF_GPU_ALLOCATOR") or "bfc"
        check_same(settings, {**software, **settings.to_json(), **case.to_json(), "settings": None})
        channel.phase(Phase.CONTEXT_READY)
        arithmetic = Arithmetic(mode, device, settings.jit)
        built = build(case, arithmetic, channel)
        channel.phase(Phase.MODEL_BUILT)
        with refusals_of(built.model, settings.jit, channel):
            return _run(built, arithmetic, device, steps_path, channel, energy_s)


def _run(
    built: Built, arithmetic: Arithmetic, device: Device, steps_path: Path | None, channel: Channel, energy_s: float
) -> Status:
    """Train and time what is built; arguments as of :func:`execute`."""
    case, mode = built.case, MODES[built.case.mode]
    float8 = built.float8
    if float8 is not None and (unsupported := float8.unsupported_reason(built.optimizer)) is not None:
        return "unsupported", unsupported

    step = built.step
    trace_s = step.trace()
    arithmetic.look("the train step was traced")
    misused = None if float8 is None else float8.misused(step.graph)
    if built.compiled is not None and (unsupported := _unsupported(built, device, channel)) is not None:
        return "unsupported", unsupported
    if built.compiled is not None:
        for refused in refused_labels(step, built.data.train_y).values():
            raise refused
    if not case.settings.looks:
        built = judged(built)
    precision = Precision(built.model, step.graph)
    what = described(built)
    check_same(case.settings, {name: what.values.get(name) for name in _SAME} | {"settings": arithmetic.column()})
    report(channel, what)
    report(channel, precision.columns())
    found = Findings()
    found.put("random_draws", draws_of(step.graph, case.settings.jit))
    report(channel, found)
    varies = built.feed.varies if built.feed else None
    replicas = case.settings.replicas
    throughput = Throughput(step.graph, mode, device, varies, replicas, replicas // replicas_here(case.settings))
    report(channel, throughput.columns())
    report(channel, built.loss_columns())
    channel.values({"process_settings": arithmetic.column()})
    if case.seed == 0 and case.trains:
        # The first case of each workload and mode: nothing runs, and other cases would find the same.
        _lint(built, precision, arithmetic, channel)
    if misused is not None:
        return "unsupported", misused
    if case.settings.strategy != "none" and (unsupported := _on_replicas(built, channel)) is not None:
        return "unsupported", unsupported
    objections = [text for text in (precision.objection(mode), arithmetic.objection) if text is not None]
    if objections:
        # Do not train: any figure would be reported under the name of another precision.
        return "invalid", "; ".join(objections)
    if isinstance(step, ProbeStep):
        return watch(step, built.steps, case.settings.looks, built.build_again, channel)
    course = built.course if case.trains else None
    if course is not None:
        course.begin()
        course.begin_step()
    start = time.perf_counter()
    step()
    step.synchronise()
    channel.values({"trace_time_s": trace_s, "first_step_s": time.perf_counter() - start})
    if course is not None:
        course.end_step(step.last_loss)
    report(channel, autotuning.columns(device, built.case.settings.jit))
    channel.phase(Phase.COMPILED)

    peak = AllocatorPeak(device, replicas_here(case.settings))
    opening_s = _take_opening_steps(built, peak, channel)
    status: Status = ("ok", None)
    if case.trains:
        status = _train(built, opening_s, steps_path, channel)
        if built.workload.metric is not None:
            channel.phase(Phase.EVALUATED)
    else:
        step.read_log()
    if built.feed is not None:
        planned = built.steps if case.trains else int(built.feed.position)
        shown = built.feed.shown(planned)
        check_same(case.settings, {"data_order_digest": shown.values.get("data_order_digest")})
        report(channel, shown)
        if built.feed.remark is not None:
            channel.send(Remarked(built.feed.remark))
    step_ms = steady_state(built, energy_s, peak, channel) if case.settings.timing_s > 0 else None
    report(channel, peak.columns())
    report(channel, several_per_call(built))
    if step_ms is not None:
        if built.feed is not None:
            report(channel, with_input(built.feed, built, step_ms))
        # Last of all: the profiler slows steps and takes memory of the device.
        busy_ms = profiled(step, step_ms, device, case.settings.replicas, channel)
        report(channel, throughput.timed(step_ms, busy_ms))
    channel.phase(Phase.DONE)
    arithmetic.look("training and timing")
    return status if arithmetic.objection is None else ("invalid", arithmetic.objection)


def _lint(built: Built, precision: Precision, arithmetic: Arithmetic, channel: Channel) -> None:
    """Report what is wrong or slow about the workload. A model that cannot be looked at can be trained all the same."""
    try:
        channel.values({"lint": to_cell(lint.look(built, precision, arithmetic, whole=False))})
    except Exception:
        traceback.print_exc()


def _on_replicas(built: Built, channel: Channel) -> str | None:
    """Say what replicas do otherwise than one device would; return why they cannot train at all, or None."""
    step, loss, replicas, mode = built.step, built.noted_loss, built.case.settings.replicas, MODES[built.case.mode]
    assert isinstance(step, ReplicatedStep)
    optimizers = [built.optimizer] if built.compiled is None else list(built.compiled.optimizers.values())
    labels = None if loss is None else built.data.train_y[built.order[0]]
    found = remarks(loss, labels, built.model, optimizers, mode, replicas)
    if isinstance(step.update, FitUpdate):
        found += shares.remarks(step, step.update, built.first_batch())
    for remark in found:
        channel.send(Remarked(remark))
    return objection(step, loss, labels, mode)


def _take_opening_steps(built: Built, peak: AllocatorPeak, channel: Channel) -> float:
    """Take steps for their memory: first synchronised one by one, then queued. Return the seconds that they took.

    They come before anything is evaluated, since TensorFlow keeps the memory that it has once taken from the driver. If
    the case trains, they are the first steps of the training, at most until it evaluates.
    """
    step, left = built.step, _SYNCHRONISED_STEPS + _QUEUED_STEPS
    if built.case.trains:
        left = min(left, first_pause(built.workload.evaluate_every, built.steps) - 1)
        if built.course is not None and built.course.of_steps:
            left = 0
    synchronised = min(left, _SYNCHRONISED_STEPS)
    start = time.perf_counter()
    for _ in range(synchronised):
        step()
        step.synchronise()
    seconds = time.perf_counter() - start
    report(channel, peak.so_far())
    channel.phase(Phase.STEPS_SYNCHRONISED)
    start = time.perf_counter()
    for _ in range(left - synchronised):
        step()
    step.synchronise()
    seconds += time.perf_counter() - start
    channel.phase(Phase.STEPS_QUEUED)
    return seconds


def _unsupported(built: Built, device: Device, channel: Channel) -> str | None:
    """Why a compiled model cannot be trained in the mode; None if it can. A train step has been traced."""
    mode, update = MODES[built.case.mode], built.step.update
    assert isinstance(update, FitUpdate)
    if (reason := mode.unsupported_reason(device, built.case.settings.jit)) is not None:
        return reason
    if mode.scaling is None:
        return None
    if update.remark is not None:
        channel.send(Remarked(": ".join(update.remark)))
    unscaled = update.unscaled(mode.name)
    return None if unscaled is None else "; ".join(unscaled)


def _evaluator(built: Built) -> Callable[[Any, Any], float]:
    """The metric, tried out so that mistakes show before the training."""
    workload, data, objective = built.workload, built.data, built.objective
    if built.judge is not None:
        judge = built.judge
        judge.evaluator.try_out()
        return lambda x, y: judge()
    assert objective is not None
    test_x, test_y = data.test
    one_output = not objective.output or objective.output[-1] == 1
    threshold = objective.threshold() if one_output and is_accuracy(workload.metric) else None
    score = score_for(workload, test_y, objective.output, threshold)
    batch = built.replica_batch if built.feed is None else len(test_x)
    evaluate = Evaluator(built.model, score, built.case.settings.jit, batch)
    evaluate.try_out(test_x, test_y)
    evaluate.try_out(*data.progress)
    return evaluate


def _score(built: Built, evaluate: Callable[[Any, Any], float], final: bool = False) -> tuple[float, int]:
    """The metric on the progress set or, at the end, on the test set, and the number of its examples."""
    if built.feed is None:
        x, y = built.data.test if final else built.data.progress
        return evaluate(x, y), length(x)
    built.feed.begin_test(final)
    if isinstance(evaluate, Evaluator):
        value = evaluate.over(built.feed.test_arrays())
    else:
        value = evaluate(None, None)
    return value, built.feed.test_examples


def _train(built: Built, opening_s: float, steps_path: Path | None, channel: Channel) -> Status:
    workload, steps = built.workload, built.steps
    evaluate = None
    if workload.metric is not None:
        evaluate = _evaluator(built)
        channel.phase(Phase.METRIC_TRIED)
    training = train(
        built.step,
        steps,
        workload,
        None if evaluate is None else lambda: _score(built, evaluate)[0],
        lambda done: channel.progress(done, steps),
        opening_s,
        built.course,
        None if built.judge is None else built.judge.evaluator,
    )
    channel.phase(Phase.TRAINED)
    if built.course is not None and isinstance(built.step, ReplicatedStep) and training.weights_finite:
        built.step.check_weights("weights after the callbacks")
    found = Findings(training.values())
    if workload.metric is not None:
        not_reached = NO_TARGET
        if workload.target is not None:
            not_reached = Reason(Code.NEVER_HAPPENED, f"the target of {workload.target:g} was not reached")
        put(found, "steps_to_target", training.steps_to_target, not_reached)
        put(found, "time_to_target_s", training.time_to_target_s, not_reached)
    if built.float8 is not None:
        found.add(built.float8.columns())
    if (growth_interval := MODES[built.case.mode].growth_interval(built.case.settings)) is not None:
        found.put("growth_interval", growth_interval)
    report(channel, found)
    if steps_path is not None:
        try:
            _write_steps(steps_path, training.log)
        except OSError as error:
            # The training is done, and its figures do not need this file.
            channel.send(NotKept("its steps", in_words(error)))
    # As at the end of Keras' fit: an optimizer that keeps a moving average of the weights copies it into them.
    built.step.update.scaler.optimizer.finalize_variable_values(built.model.trainable_variables)
    status, reason = training.status
    if reason is not None and not training.weights_finite:
        reason = why_diverged(reason, MODES[built.case.mode], built.case.settings.replicas)
    if evaluate is None:
        return status, reason
    (metric, examples), name = _score(built, evaluate, final=True), workload.metric_name
    found, other = (
        Findings({"test_examples": examples}),
        Reason(Code.NOT_IN_WORKLOAD, f"the workload's metric is {name}"),
    )
    put(found, "metric_value", metric, other)
    put(found, "final_accuracy", metric if name == ACCURACY else None, other)
    # Before anything else is evaluated: a case that dies later keeps its metric.
    report(channel, found)
    found, unpublished = Findings(), Reason(Code.NOT_IN_WORKLOAD, "the data has no other published test set")
    published = None if built.data.published_x is None else _score(built, evaluate)[0]
    put(found, "published_metric_value", published, unpublished)
    report(channel, found)
    if status == "ok" and not is_finite(metric):
        return "diverged", f"the {name} on the test set was {metric} after {len(training.log)} steps"
    return status, reason


def _write_steps(path: Path, log: Log) -> None:
    """Write loss, loss scale and overflow of every step; columns that the mode does not have are empty."""
    empty = [""] * len(log)
    scales = empty if log.scale is None else log.scale.tolist()
    overflows = empty if log.overflow is None else log.overflow.astype(int).tolist()
    with replacing(path, path.parent.parent) as whole, gzip.open(whole, "wt", newline="", compresslevel=5) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "loss", "loss_scale", "overflow"])
        losses = (f"{loss:.9g}" for loss in log.loss.tolist())
        rows.writerows(zip(range(len(log)), losses, scales, overflows, strict=True))
