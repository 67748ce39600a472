"""One case, from an idle process to its last figure. Runs in the worker."""

from __future__ import annotations

import csv
import gzip
import json
import time
from pathlib import Path
from types import FunctionType
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mpscale.core.case import Case, series_key
from mpscale.core.device import Device
from mpscale.core.mode import MODES, Mode
from mpscale.core.wire import Channel, Phase
from mpscale.worker import device as accelerator
from mpscale.worker import model as identity
from mpscale.worker import training as order
from mpscale.worker.model import build_model, make_model, make_optimizer
from mpscale.worker.objective import Objective
from mpscale.worker.precision import Arithmetic, Precision
from mpscale.worker.scalers import scaler_for
from mpscale.worker.step import UNKNOWN, TrainStep, keep_going, time_empty_call, time_steps, warm_up
from mpscale.worker.training import Evaluator, is_accuracy, score_for, train
from mpscale.workloads import Data, Workload, registry

_LEAST_MORE_S = 0.5
"""While steps are timed the energy counter is read seldom, which would make for a blurred end of the window."""


def execute(
    case: Case, device: Device, steps_path: Path | None, channel: Channel, energy_s: float = 0.0
) -> tuple[str, str | None]:
    """Runs ``case`` and reports over ``channel`` as it goes.

    Args:
        case: what to run.
        device: where; the process must have been started with this device visible.
        steps_path: where the log of every step goes, as gzipped CSV.
        channel: the supervisor's end.
        energy_s: seconds that steps go on for, from the start of the timing and for a moment after its end at least,
            so that their energy can be counted; 0 counts none.

    Returns:
        The status, and why it is not ``ok``.
    """
    mode, settings = MODES[case.mode], case.settings
    accelerator.require(device)
    channel.phase(Phase.IDLE)
    _report(channel, *accelerator.touch(device, mode))
    channel.phase(Phase.CONTEXT_READY)

    # Only now: a module of the user's may make variables when it is imported, and TensorFlow would take the device for
    # them before it was told how.
    workload = registry.get(case.workload)
    data = workload.data()
    if not isinstance(data, Data):
        raise TypeError(
            f"the data function of {case.workload} must return an mpscale.Data of NumPy arrays, not a "
            f"{type(data).__name__}"
        )
    arithmetic = Arithmetic(mode, device, settings.jit)
    batch = settings.batch_size or workload.batch_size
    steps = settings.train_steps or workload.train_steps
    indices = order.batches(len(data.train_x), batch, steps, case.seed)
    start = time.perf_counter()
    # The seed comes last before the model: loading data may draw numbers, and not in every process.
    keras.utils.set_random_seed(case.seed)
    arithmetic.settle()
    model = make_model(workload.model)
    arithmetic.look("the workload's model function")
    build_model(model, data.train_x[:batch])
    optimizer = make_optimizer(workload.optimizer)
    arithmetic.look("the workload's optimizer function")
    # Before it is wrapped, which is done in another way in every mode.
    described = identity.optimizer_description(optimizer, steps)
    scaler = scaler_for(mode, optimizer, settings.static_scale, settings.dynamic_scale)
    objective = Objective(workload.loss, data.train_y)
    loss = identity.NotedLoss(objective)
    step = TrainStep(model, scaler, loss, data.train_x, data.train_y, indices, settings.jit)
    channel.values({"build_time_s": time.perf_counter() - start})
    channel.phase(Phase.MODEL_BUILT)

    trace_s = step.trace()
    arithmetic.look("the train step was traced")
    precision = Precision(model, step.graph)
    _describe(case, mode, workload, model, data, indices, optimizer, described, step.added_losses, channel)
    _report(channel, *precision.columns())
    _report(channel, *loss.columns(data.train_y[indices[0]]))
    channel.values({"process_settings": arithmetic.column()})
    objections = [text for text in (precision.objection(mode), arithmetic.objection) if text is not None]
    if objections:
        # Not trained: whatever came of it would stand under the name of another precision.
        return "invalid", "; ".join(objections)
    start = time.perf_counter()
    step()
    step.synchronise()
    channel.values({"trace_time_s": trace_s, "first_step_s": time.perf_counter() - start})
    channel.phase(Phase.COMPILED)

    status: tuple[str, str | None] = ("ok", None)
    if case.trains:
        evaluate = _evaluator(model, workload, data, objective, settings.jit, batch)
        status = _train(step, model, scaler.optimizer, evaluate, workload, data, steps, steps_path, channel)
        channel.phase(Phase.TRAINED)
    else:
        step.read_log()
    peak = accelerator.AllocatorPeak(device)
    if settings.timing_s > 0:
        _time(step, case, batch, energy_s, peak, channel)
    _report(channel, *peak.columns(windowed=settings.timing_s > 0))
    channel.phase(Phase.DONE)
    arithmetic.look("training and timing")
    return status if arithmetic.objection is None else ("invalid", arithmetic.objection)


def _time(
    step: TrainStep, case: Case, batch: int, energy_s: float, peak: accelerator.AllocatorPeak, channel: Channel
) -> None:
    """Times steady state, counts energy over as many steps as that takes, reports."""
    settings = case.settings
    about_s = warm_up(step)
    channel.phase(Phase.WARM)
    peak.begin_window()
    channel.phase(Phase.TIMING_START)
    start = time.perf_counter()
    timing = time_steps(step, about_s, settings.timing_s, settings.timing_blocks)
    channel.phase(Phase.TIMING_END)
    more: tuple[int, int | None] = (0, 0)
    if energy_s > 0:
        left_s = energy_s - (time.perf_counter() - start)
        more = keep_going(step, timing.steps_per_block, max(left_s, _LEAST_MORE_S))
        channel.phase(Phase.ENERGY_END)
    overflows = None if None in (timing.overflow_steps, more[1]) else (timing.overflow_steps or 0) + (more[1] or 0)
    channel.energy(timing.steps + more[0], overflows)
    channel.values(timing.values(batch, time_empty_call(step)))
    channel.blocks(timing.step_s.tolist())


def _report(channel: Channel, values: dict[str, Any], missed: dict[str, str]) -> None:
    channel.values(values)
    for column, reason in missed.items():
        channel.miss([column], reason)


def _describe(
    case: Case,
    mode: Mode,
    workload: Workload,
    model: keras.Model,
    data: Data,
    indices: npt.NDArray[np.int64],
    optimizer: keras.optimizers.Optimizer,
    described: dict[str, Any],
    added_losses: int,
    channel: Channel,
) -> None:
    """Reports what is about to be trained, and the digests by which modes are held to the same start.

    ``optimizer`` is the workload's, without the mode's loss scaling; ``described`` says the same in plain values.
    """
    steps, batch = indices.shape
    data_digest = data.digest()
    parameters = int(sum(np.prod(v.shape) for v in model.trainable_variables))
    parts: list[Any] = [
        identity.model_config(model),
        identity.config_of(optimizer) or described,
        identity.described_object(workload.loss),
        parameters,
        data_digest,
    ]
    if not isinstance(workload.metric, FunctionType):
        parts.append(identity.described_object(workload.metric))
    if added_losses:
        parts.append({"losses that the model adds": added_losses})
    digest = identity.digest(identity.without_precision(parts))
    channel.values(
        {
            # The prefix keeps a digest of digits alone from being read back as a number.
            "workload_digest": f"sha256:{digest}",
            "data_digest": f"sha256:{data_digest}",
            "data_order_digest": f"sha256:{order.digest([indices])}",
            "initial_weights_digest": f"sha256:{order.digest(v.numpy() for v in model.variables)}",
            "model_digest": f"sha256:{identity.digest(identity.model_description(model))}",
            "optimizer_config": json.dumps(described),
            "series_key": series_key(mode, case.workload, digest, batch, steps, case.settings),
            "batch_size": batch,
            "optimizer": type(optimizer).__name__,
            "parameters": parameters,
            "metric_name": workload.metric_name,
            "metric_higher_is_better": workload.metric_higher_is_better,
            "metric_target": workload.target,
            "metric_margin": workload.margin,
            "test_examples": len(data.test_x),
        }
    )
    if workload.target is None:
        channel.miss(["metric_target"], "the workload has no target")
    if workload.margin is None:
        channel.miss(["metric_margin"], "the workload has no margin")


def _evaluator(
    model: keras.Model, workload: Workload, data: Data, objective: Objective, jit: bool, batch: int
) -> Evaluator:
    """The metric, tried out: what is wrong with it is known before the training and not after."""
    one_output = not objective.output or objective.output[-1] == 1
    threshold = objective.threshold() if one_output and is_accuracy(workload.metric) else None
    score = score_for(workload.metric, str(workload.metric_name), data.test_y, objective.output, threshold)
    evaluate = Evaluator(model, score, jit, batch)
    evaluate.try_out(data.test_x, data.test_y)
    evaluate.try_out(*data.progress)
    return evaluate


def _train(
    step: TrainStep,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    evaluate: Evaluator,
    workload: Workload,
    data: Data,
    steps: int,
    steps_path: Path | None,
    channel: Channel,
) -> tuple[str, str | None]:
    """Trains to the end, evaluates, reports."""
    training = train(step, model, evaluate, workload, data, steps, lambda done: channel.progress(done, steps))
    channel.values(training.values())
    if training.steps_to_target is None:
        target = "the workload has no target" if workload.target is None else f"{workload.target:g} was not reached"
        channel.miss(["steps_to_target", "time_to_target_s"], target)
    if steps_path is not None:
        _write_steps(steps_path, training.log)
    # As Keras' fit ends: an optimizer that keeps a moving average of the weights puts it in their place.
    optimizer.finalize_variable_values(model.trainable_variables)
    metric = evaluate(data.test_x, data.test_y)
    channel.values({"metric_value": metric})
    channel.miss(["metric_value"], "not finite")
    if workload.metric_name == "accuracy":
        channel.values({"final_accuracy": metric})
        channel.miss(["final_accuracy"], "not finite")
    else:
        channel.miss(["final_accuracy"], f"the workload's metric is {workload.metric_name}")
    if data.published_x is not None:
        channel.values({"published_metric_value": evaluate(*data.progress)})
        channel.miss(["published_metric_value"], "not finite")
    else:
        channel.miss(["published_metric_value"], "the data has no other published test set")
    status, reason = training.status
    if status == "ok" and not np.isfinite(metric):
        return "diverged", f"the {workload.metric_name} on the test set was {metric} after {len(training.log)} steps"
    return status, reason


def _write_steps(path: Path, log: npt.NDArray[np.float32]) -> None:
    """Writes loss, loss scale and overflow of every step; empty where the mode has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with gzip.open(partial, "wt", newline="", compresslevel=5) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "loss", "loss_scale", "overflow"])
        for number, (loss, scale, overflow) in enumerate(log.tolist()):
            rows.writerow(
                [
                    number,
                    f"{loss:.9g}",
                    "" if scale == UNKNOWN else scale,
                    "" if overflow == UNKNOWN else int(overflow),
                ]
            )
    partial.replace(path)
