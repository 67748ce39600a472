"""What a case trains, made from its workload under the policy of its mode, and its description."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mpscale.core.case import Case, series_key
from mpscale.core.columns import LARGEST, Topic, measured_columns
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.core.wire import Channel
from mpscale.worker import model as models
from mpscale.worker.batches import Batches
from mpscale.worker.feed import Feed
from mpscale.worker.float8 import Float8
from mpscale.worker.objective import NotedLoss, Objective
from mpscale.worker.precision import Arithmetic
from mpscale.worker.probe import ProbeStep
from mpscale.worker.scaler import scaler_for
from mpscale.worker.step import TrainStep
from mpscale.worker.training import batches
from mpscale.worker.update import Update
from mpscale.workloads import Data, Pipeline, Workload, registry

_OF_A_METRIC = (
    *measured_columns(Topic.RESULT),
    "steps_to_target",
    "time_to_target_s",
)
"""Columns that a workload without a metric does not have."""

NO_TARGET = Reason(Code.NOT_IN_WORKLOAD, "the workload has no target")


@dataclass(frozen=True)
class Built:
    """What a case trains.

    Args:
        data: of a pipeline, its first batches.
        order: of the data, indices (steps, batch).
        feed: the pipeline; None for arrays.
        optimizer: the workload's, without the mode's loss scaling.
        optimizer_config: describes the optimizer as it was before the mode wrapped it.
        noted_loss: the objective as the train step calls it.
        float8: the layers that compute in float8; None in other modes.
    """

    case: Case
    workload: Workload
    data: Data
    order: npt.NDArray[np.int64]
    optimizer: keras.optimizers.Optimizer
    optimizer_config: dict[str, Any]
    objective: Objective
    noted_loss: NotedLoss
    step: TrainStep
    float8: Float8 | None
    feed: Feed | None = None

    @property
    def model(self) -> keras.Model:
        return self.step.update.model

    @property
    def steps(self) -> int:
        return len(self.order)

    @property
    def batch(self) -> int:
        return self.order.shape[1]


def build(case: Case, arithmetic: Arithmetic, channel: Channel) -> Built:
    """Make everything that is trained. The device must be ready, since a user's module may use it on import."""
    workload = registry.get(case.workload)
    settings = case.settings.suited_to(workload.growth_interval)
    case = replace(case, settings=settings)
    data, steps = workload.data(), settings.train_steps or workload.train_steps
    feed = _feed(data, workload, case, steps) if isinstance(data, Pipeline) else None
    if feed is not None:
        # The order is only used to find the first batch.
        data, batch = feed.sample(), feed.batch
        order = np.broadcast_to(np.arange(batch), (steps, batch))
    elif isinstance(data, Data):
        batch = settings.batch_size or workload.batch_size
        order = batches(len(data.train_x), batch, steps, case.seed, settings.repeat_data)
    else:
        raise TypeError(
            f"the data function of {case.workload} must return an mpscale.Data of NumPy arrays or an mpscale.Pipeline, "
            f"not a {type(data).__name__}"
        )
    start = time.perf_counter()
    # Set the seed just before the model is built: loading data may draw random numbers, but not in every process.
    keras.utils.set_random_seed(case.seed)
    arithmetic.settle()
    model = models.make_model(workload.model)
    arithmetic.look("the workload's model function")
    models.build_model(model, data.train_x[:batch] if batch <= len(data.train_x) else data.train_x[order[0]])
    float8 = Float8(model) if MODES[case.mode].float8 else None
    optimizer = models.make_optimizer(workload.optimizer)
    arithmetic.look("the workload's optimizer function")
    optimizer_config = models.optimizer_description(optimizer, steps)
    scaler = scaler_for(MODES[case.mode], optimizer, settings)
    objective = Objective(workload.loss, data.train_y)
    loss = NotedLoss(objective)
    kind, update = ProbeStep if settings.looks else TrainStep, Update(model, scaler, loss)
    shown = feed or Batches((data.train_x, data.train_y), order)
    step = kind(update, shown, settings.jit, settings.steps_per_call)
    channel.values({"build_time_s": time.perf_counter() - start})
    return Built(case, workload, data, order, optimizer, optimizer_config, objective, loss, step, float8, feed)


def _feed(pipeline: Pipeline, workload: Workload, case: Case, steps: int) -> Feed:
    """The batches of a pipeline.

    Raises:
        ValueError: the case asks for what only arrays can do.
    """
    settings = case.settings
    asked = {
        "another batch size (--mp-batch-size, --mp-batch-sizes, mpscale fit)": settings.batch_size is not None,
        "several steps per call (--mp-steps-per-call)": settings.steps_per_call != 1,
    }
    if refused := [what for what, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"{case.workload} has a pipeline, which batches its data itself, so {' and '.join(refused)} cannot be "
            "used; leave it out, change .batch(n) in the pipeline, or return an mpscale.Data of arrays"
        )
    return Feed(pipeline, workload.data, case.seed, steps)


def described(built: Built) -> Findings:
    """What is about to be trained, and the digests that have to be the same in every mode."""
    case, workload, model = built.case, built.workload, built.model
    data_digest = (built.feed or built.data).digest()
    weights = models.weights_of(model.variables)
    parameters = int(sum(np.prod(v.shape) for v in models.weights_of(model.trainable_variables)))
    parts: list[Any] = [
        models.model_config(model),
        models.config_of(built.optimizer) or built.optimizer_config,
        models.described_object(workload.loss),
        parameters,
        data_digest,
    ]
    if workload.metric is not None and not isinstance(workload.metric, FunctionType):
        parts.append(models.described_object(workload.metric))
    if added := built.step.update.added_losses:
        parts.append({"losses that the model adds": added})
    digest = models.digest(models.without_precision(parts))
    key = series_key(MODES[case.mode], case.workload, digest, built.batch, built.steps, case.settings)
    found = Findings(
        {
            # The prefix keeps a digest that happens to be all decimal digits from being read as a number.
            "workload_digest": f"sha256:{digest}",
            "data_digest": f"sha256:{data_digest}",
            "initial_weights_digest": f"sha256:{models.arrays_digest(v.numpy() for v in weights)}",
            "model_digest": f"sha256:{models.digest(models.model_description(model))}",
            "optimizer_config": json.dumps(built.optimizer_config),
            "series_key": key,
            "batch_size": built.batch,
            "optimizer": type(built.optimizer).__name__,
            "parameters": parameters,
            "synthetic_inputs": workload.synthetic,
            "has_metric": workload.metric is not None,
        }
    )
    if built.feed is not None:
        found.add(built.feed.columns())
    else:
        found.add(_of_arrays(built.order))
    if workload.metric is None:
        found.miss(_OF_A_METRIC, _no_metric(workload))
        return found
    found.values |= {
        "metric_name": workload.metric_name,
        "metric_higher_is_better": workload.metric_higher_is_better,
    }
    if built.feed is None:
        found.values["test_examples"] = len(built.data.test[0])
    put(found, "metric_target", workload.target, NO_TARGET)
    put(found, "metric_margin", workload.margin, Reason(Code.NOT_IN_WORKLOAD, "the workload has no margin"))
    return found


def _of_arrays(order: npt.NDArray[np.int64]) -> Findings:
    """What a pipeline would have to show batch by batch."""
    found = Findings(
        {"data_order_digest": f"sha256:{models.arrays_digest([order])}", "input_kind": "arrays", "input_shapes": 1}
    )
    why = Reason(Code.NOT_IN_WORKLOAD, "the data is arrays, which lie on the device")
    found.miss(
        ["first_batches_digest", "input_passes", "input_batches", "step_time_ms_with_input", "input_wait_share"], why
    )
    return found


def _no_metric(workload: Workload) -> Reason:
    """Why a workload without a metric has none of the figures that follow from it."""
    why = (
        "synthetic inputs: no accuracy" if workload.synthetic else "the workload has no metric, so nothing is evaluated"
    )
    return Reason(Code.NOT_IN_WORKLOAD, why)


def put(found: Findings, column: str, value: float | None, missing: Reason) -> None:
    """Put a figure if it is finite, otherwise the reason why not; ``missing`` is the reason if there is no value."""
    if value is not None and is_finite(value):
        found.values[column] = value
    else:
        found.miss([column], missing if value is None else Reason(Code.NOT_FINITE, "not finite"))


def is_finite(value: float) -> bool:
    """Whether a column can hold it: a perplexity of 1e130 says no more than an infinite one."""
    return abs(value) <= LARGEST
