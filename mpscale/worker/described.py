"""The description of what a case trains, and the digests that have to be the same in every mode."""

from __future__ import annotations

import json
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscale.core.case import series_key
from mpscale.core.columns import Topic, measured_columns
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.worker import model as models
from mpscale.worker.built import Built
from mpscale.worker.compiled.update import FitUpdate
from mpscale.worker.findings import put
from mpscale.workloads import Workload
from mpscale.workloads.data import length

_OF_A_METRIC = (
    *measured_columns(Topic.RESULT),
    "steps_to_target",
    "time_to_target_s",
)
"""Columns that a workload without a metric does not have."""

NO_TARGET = Reason(Code.NOT_IN_WORKLOAD, "the workload has no target")
_NO_SERIES = Reason(Code.NOT_IN_WORKLOAD, "the workload names no series")


def described(built: Built) -> Findings:
    """What is about to be trained, and the digests that have to be the same in every mode."""
    case, workload, model = built.case, built.workload, built.model
    data_digest = (built.feed or built.data).digest()
    weights = models.weights_of(model.variables)
    parameters = int(sum(np.prod(v.shape) for v in models.weights_of(model.trainable_variables)))
    parts: list[Any] = [
        models.model_config(model),
        models.config_of(built.optimizer) or built.optimizer_config,
        models.described_object(workload.loss) if built.compiled is None else built.compiled.description(),
        parameters,
        data_digest,
    ]
    if isinstance(built.step.update, FitUpdate) and len(built.step.update.optimizers) > 1:
        parts.append(built.optimizer_config)
    if built.course is not None:
        parts.append({"callbacks": built.course.description()})
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
            "replica_batch_size": built.replica_batch,
            "optimizer": type(built.optimizer).__name__,
            "loss_name": models.name_of(workload.loss),
            "parameters": parameters,
            "synthetic_inputs": workload.synthetic,
            "has_metric": workload.metric is not None,
        }
    )
    found.put("series", workload.series or _NO_SERIES)
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
        found.values["test_examples"] = length(built.data.test[0])
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
    why = "the workload has no metric, so nothing is evaluated"
    if workload.compiled is not None:
        why = "the workload has no validation data, so nothing is evaluated"
    if workload.synthetic:
        why = "synthetic inputs: no accuracy"
    return Reason(Code.NOT_IN_WORKLOAD, why)
