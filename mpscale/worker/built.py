"""What a case trains, made from its workload under the policy of its mode, and its description."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mpscale.core.case import Case
from mpscale.core.mode import MODES
from mpscale.core.processes.events import Channel, Remarked
from mpscale.core.record import Findings
from mpscale.worker import model as models
from mpscale.worker.batches import Batches
from mpscale.worker.cluster import cluster_of
from mpscale.worker.compiled import model as compiling
from mpscale.worker.compiled.course import Course
from mpscale.worker.compiled.evaluator import FitEvaluator, Judge
from mpscale.worker.compiled.judged import probed_loss
from mpscale.worker.compiled.model import CompiledModel
from mpscale.worker.compiled.update import FitUpdate
from mpscale.worker.feed import Feed
from mpscale.worker.float8 import Float8
from mpscale.worker.objective import NotedLoss, Objective
from mpscale.worker.precision import Arithmetic
from mpscale.worker.probe import ProbeStep
from mpscale.worker.replicas import ReplicaBatches, ReplicatedStep, check_optimizers, strategy_of, under
from mpscale.worker.scaler import scaler_for
from mpscale.worker.step import TrainStep
from mpscale.worker.training import batches
from mpscale.worker.update import Update
from mpscale.workloads import Data, Pipeline, Workload, registry
from mpscale.workloads.as_in_fit import class_weight_remarks
from mpscale.workloads.data import Structure, leaves, length, taken

_IMPORT_SEED = 0
_EPOCH = 100  # steps, of a pipeline of unknown length


@dataclass(frozen=True)
class Built:
    """What a case trains.

    Args:
        data: of a pipeline, its first batches.
        order: of the data, indices (steps, batch).
        feed: the pipeline; None for arrays.
        optimizer: the workload's, without the mode's loss scaling.
        optimizer_config: describes the optimizer as it was before the mode wrapped it.
        objective: the workload's loss; None if the model is compiled, and so has one.
        noted_loss: the objective as the train step calls it.
        float8: the layers that compute in float8; None in other modes.
        compiled: the model as it was compiled; None if the workload trains it.
        course: the callbacks of a compiled model; None if there are none.
        judge: the metric of a compiled model; None until a train step has been traced (:func:`judged`).
    """

    case: Case
    workload: Workload
    data: Data
    order: npt.NDArray[np.int64]
    optimizer: keras.optimizers.Optimizer
    optimizer_config: dict[str, Any]
    objective: Objective | None
    noted_loss: NotedLoss | None
    step: TrainStep
    float8: Float8 | None
    compiled: CompiledModel | None = None
    course: Course | None = None
    judge: Judge | None = None
    feed: Feed | None = None

    @property
    def model(self) -> keras.Model:
        return self.step.update.model

    @property
    def steps(self) -> int:
        return len(self.order)

    @property
    def batch(self) -> int:
        """Examples of a step, of all replicas together."""
        return self.order.shape[1]

    def first_batch(self) -> tuple[Structure, Structure, Structure]:
        """Examples, labels and weights of the first batch as a replica gets them, arrays; None for no such."""
        if self.feed is not None:
            batch = self.feed.first_arrays()
        else:
            one = self.order[0][: self.replica_batch]
            batch = tuple(None if part is None else taken(part, one) for part in self.data.train)
            batch = batch if self.compiled is None else compiling.as_fed(*batch)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        return x, y, weight

    @property
    def replica_batch(self) -> int:
        """Examples of a step on one device."""
        return self.batch // self.case.settings.replicas

    def build_again(self) -> keras.Model:
        """Make and build the workload's model once more, under the policy that is set now."""
        examples = taken(self.data.train_x, self.order[0][: self.replica_batch])
        if self.compiled is None:
            model = models.make_model(self.workload.model)
            models.build_model(model, examples)
        else:
            model = compiling.make(self.workload.model).model
            compiling.build_weights(model, examples)
        return model

    def loss_columns(self) -> Findings:
        """The columns of a record about the loss, once a train step has been traced."""
        if self.noted_loss is not None:
            return self.noted_loss.columns(self.data.train_y[self.order[0]])
        batch = self.first_batch()
        named = zip(("inputs", "labels", "weights"), batch, strict=True)
        given = [f"{what} {_shapes(part)}" for what, part in named if part is not None]
        found = Findings({"loss_inputs": "; ".join(given)})
        found.put("loss_probe", probed_loss(self.step, batch))
        return found


def build(case: Case, arithmetic: Arithmetic, channel: Channel, workload: Workload | None = None) -> Built:
    """Make everything that is trained. The device must be ready, since a user's module may use it on import.

    ``workload`` stands in for that of the case.
    """
    # What a module draws at random when it is imported, such as the order of a dataset, is then the same in every case.
    keras.utils.set_random_seed(_IMPORT_SEED)
    workload = workload or registry.get(case.workload)
    settings = case.settings.suited_to(workload.growth_interval)
    case = replace(case, settings=settings)
    if workload.compiled is not None:
        # As it would be at the top of a script: what makes the data may draw random numbers.
        keras.utils.set_random_seed(case.seed)
    given: Any = workload.data()
    steps, feed = settings.train_steps or workload.train_steps, None
    if isinstance(given, Pipeline):
        feed = _feed(given, workload, case, steps)
        data = feed.sample()
    elif isinstance(given, Data):
        data = given
    else:
        raise TypeError(
            f"the data function of {case.workload} must return an mpscale.Data of NumPy arrays or an mpscale.Pipeline, "
            f"not a {type(given).__name__}: mpscale.Data(train_x, train_y, test_x, test_y), or mpscale.Pipeline(train, "
            "test) of datasets"
        )
    if workload.compiled is None:
        models.check_data(data)
    if feed is not None:
        # Of a pipeline, the order is only used to find the first batch. Those of replicas may have several shapes.
        order = np.broadcast_to(np.arange(feed.batch) % data.examples, (steps, feed.batch))
    else:
        own = settings.batch_size or workload.batch_size
        batch = own * settings.replicas
        if own <= data.examples < batch and not settings.repeat_data:
            raise ValueError(
                f"{settings.replicas} replicas with a batch of {own} each take {batch} examples per step, and the "
                f"training set has {data.examples}; choose a batch of at most {data.examples // settings.replicas}, or "
                "fewer replicas"
            )
        order = batches(data.examples, batch, steps, case.seed, settings.repeat_data)
    start = time.perf_counter()
    # Set the seed just before the model is built: loading data may draw random numbers, but not in every process.
    keras.utils.set_random_seed(case.seed)
    arithmetic.settle()
    make = _of_compiled if workload.compiled is not None else _of_workload
    with under(strategy_of(settings)):
        built = make(case, workload, data, order, feed, arithmetic, channel)
    channel.values({"build_time_s": time.perf_counter() - start})
    return built


def _of_workload(
    case: Case,
    workload: Workload,
    data: Data,
    order: npt.NDArray[np.int64],
    feed: Feed | None,
    arithmetic: Arithmetic,
    channel: Channel,
) -> Built:
    """What a workload trains with its own loss and optimizer."""
    settings, batch = case.settings, order.shape[1] // case.settings.replicas
    model = models.make_model(workload.model)
    arithmetic.look("the workload's model function")
    models.build_model(model, data.train_x[:batch] if batch <= data.examples else data.train_x[order[0][:batch]])
    float8 = Float8(model) if MODES[case.mode].float8 else None
    optimizer = models.make_optimizer(workload.optimizer)
    arithmetic.look("the workload's optimizer function")
    optimizer_config = models.optimizer_description(optimizer, len(order))
    scaler = scaler_for(MODES[case.mode], optimizer, settings)
    objective = Objective(workload.loss, data.train_y)
    loss = NotedLoss(objective)
    kind, update = ProbeStep if settings.looks else TrainStep, Update(model, scaler, loss)
    if settings.strategy == "none":
        shown = feed or Batches((data.train_x, data.train_y), order)
        step = kind(update, shown, settings.jit, settings.steps_per_call)
    else:
        check_optimizers([optimizer])
        own = feed or ReplicaBatches((data.train_x, data.train_y), order)
        step = ReplicatedStep(update, own, settings.steps_per_call, cluster_of(settings))
    return Built(case, workload, data, order, optimizer, optimizer_config, objective, loss, step, float8, feed=feed)


def _feed(pipeline: Pipeline, workload: Workload, case: Case, steps: int) -> Feed:
    """The batches of a pipeline.

    Raises:
        ValueError: the case asks for what only arrays can do.
    """
    settings, compiled = case.settings, workload.compiled
    asked = {
        "another batch size (--mp-batch-size, mpscale fit)": settings.batch_size is not None,
        "several steps per call (--mp-steps-per-call)": settings.steps_per_call != 1,
    }
    if refused := [what for what, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"{case.workload} has a pipeline, which batches its data itself, so {' and '.join(refused)} cannot be "
            "used; leave it out, change .batch(n) in the pipeline, or return an mpscale.Data of arrays"
        )
    if settings.strategy == "multiworker" and not pipeline.deterministic:
        raise ValueError(
            f"{case.workload} has a pipeline with deterministic=False, of which each worker would see other batches; "
            "make it deterministic, or use --mp-strategy mirrored, where one process takes the batches of all replicas"
        )
    class_weight = None if compiled is None else compiled.class_weight
    return Feed(pipeline, workload.data, case.seed, steps, class_weight, strategy_of(settings))


def _of_compiled(
    case: Case,
    workload: Workload,
    data: Data,
    order: npt.NDArray[np.int64],
    feed: Feed | None,
    arithmetic: Arithmetic,
    channel: Channel,
) -> Built:
    """What a compiled model trains by its own train_step."""
    assert workload.compiled is not None
    callbacks, class_weight = workload.compiled.callbacks, workload.compiled.class_weight
    steps, batch = order.shape
    one, is_replicated = order[0][: batch // case.settings.replicas], case.settings.strategy != "none"
    epoch = data.examples // batch if feed is None else feed.epoch_steps or _EPOCH
    workload = replace(workload, evaluate_every=workload.evaluate_every or max(epoch, 1))
    compiled = compiling.make(workload.model)
    arithmetic.look("the workload's model function")
    model = compiled.model
    compiling.check_labels(model, data.train_y, data.test_y)
    compiling.build_weights(model, taken(data.train_x, one))
    float8 = Float8(model) if MODES[case.mode].float8 else None
    case, remarks = _asked_by(compiled, case)
    if feed is not None and case.settings.steps_per_call != 1:
        remarks.append("one step per call, although the model has steps_per_execution: a step takes one batch")
        case = replace(case, settings=replace(case.settings, steps_per_call=1))
    remarks += class_weight_remarks(data.train_y, class_weight, feed is not None)
    for remark in (*compiled.notes, *remarks):
        channel.send(Remarked(remark))
    channel.values({"jit": case.settings.jit, "steps_per_call": case.settings.steps_per_call})
    configs = {name: models.optimizer_description(each, steps) for name, each in compiled.optimizers.items()}
    wrapped = {id(each): scaler_for(MODES[case.mode], each, case.settings) for each in compiled.optimizers.values()}
    scalers = {name: wrapped[id(each)] for name, each in compiled.optimizers.items()}
    on_trace = float8.forget_calls if float8 is not None else lambda: None
    if is_replicated:
        check_optimizers(list(compiled.optimizers.values()))
    shown: Any = feed
    if feed is None:
        fed = compiling.as_fed(*data.train)
        first = taken(fed, one)
        shown = ReplicaBatches(fed, order) if is_replicated else Batches(fed, order)
    else:
        first = feed.first[0][0]
    update = FitUpdate(model, scalers, first, on_trace)
    used = update.optimizers
    config = configs[used[0]] if len(used) == 1 else {name: configs[name] for name in used}
    compiling.build_metrics(model, first)
    kind = ProbeStep if case.settings.looks else TrainStep
    settings, per_call = case.settings, case.settings.steps_per_call
    step: TrainStep
    if is_replicated:
        step = ReplicatedStep(update, shown, per_call, cluster_of(settings))
    else:
        step = kind(update, shown, settings.jit, per_call)
    course = None
    if callbacks is not None:
        course = Course(callbacks(), model, steps, workload.evaluate_every)
        arithmetic.look("the workload's callbacks function")
    optimizer = compiled.optimizers[used[0]]
    return Built(case, workload, data, order, optimizer, config, None, None, step, float8, compiled, course, feed=feed)


def _asked_by(compiled: CompiledModel, case: Case) -> tuple[Case, list[str]]:
    """The case with what the model was compiled with, unless an option says otherwise; and what to say about that."""
    settings, remarks = case.settings, []
    if compiled.jit is False and settings.jit:
        settings = replace(settings, jit=False)
        remarks.append("without XLA, because the model is compiled with jit_compile=False")
    elif compiled.jit and not settings.jit:
        remarks.append("without XLA, although the model is compiled with jit_compile=True")
    asked = compiled.steps_per_execution
    if settings.steps_per_call == 1:
        settings = replace(settings, steps_per_call=asked)
    elif asked not in (1, settings.steps_per_call):
        remarks.append(f"--mp-steps-per-call goes before the {asked} steps_per_execution of the model")
    return replace(case, settings=settings), remarks


def judged(built: Built) -> Built:
    """The same with the metric by which it is judged; a train step has been traced."""
    if built.compiled is None or built.workload.compiled is None or not built.workload.compiled.evaluated:
        return built
    if built.feed is not None:
        test_batches, first = built.feed.test, built.feed.first_test
    else:
        data, batch = built.data, built.replica_batch
        fed = compiling.as_fed(*data.test, data.test_weight)
        examples, first = length(data.test[0]), taken(fed, slice(0, batch))

        def test_batches() -> Iterator[Any]:
            for start in range(0, examples, batch):
                yield taken(fed, slice(start, start + batch))

    strategy = built.step.strategy if isinstance(built.step, ReplicatedStep) else None
    evaluator = FitEvaluator(built.model, test_batches, built.case.settings.jit, first, strategy, built.step.agreed)
    judge = Judge(built.workload, built.model, evaluator)
    return replace(built, workload=judge.workload, judge=judge)


def _shapes(part: Structure) -> str:
    """Dtypes and shapes of a batch, such as ``['ids'] int64 (20, 64) and ['age'] float32 (20,)``."""
    shapes = [f"{path} {array.dtype} {array.shape}".strip() for path, array in leaves(part)]
    return " and ".join(shapes)
