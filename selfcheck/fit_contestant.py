"""mpscale's steps of a compiled model and those of Keras' own ``fit``, interleaved in one process.

`python fit_contestant.py` reads a request and answers, each a line of JSON, as fidelity_contestant.py does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import fidelity_contestant
import keras
import tensorflow as tf
from fidelity_contestant import FIRST_STEPS, SETTLE_S, Loop, Worker, digest, shuffled

from mpscale.core.mode import MODES
from mpscale.core.processes.process import die_with_parent
from mpscale.scaling import LossScaleOptimizer
from mpscale.workloads import registry


class _Second(keras.callbacks.Callback):
    """Times the second epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self.start


def by_fit(request: dict[str, Any], handed: bool) -> Loop:
    """Train the model by Keras alone, with mpscale's LossScaleOptimizer in mixed-dynamic.

    Args:
        request: what to train.
        handed: whether the train function of fit is called with batches that are on the device, which is what fit does
            for a step, instead of fit itself with a cached tf.data pipeline.
    """
    workload, mode = registry.get(request["workload"]), MODES[request["mode"]]
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(mode.tf32)
    data = workload.data()
    order = shuffled(data.examples, workload.batch_size, workload.train_steps, request["seed"])
    keras.utils.set_random_seed(request["seed"])
    keras.config.set_dtype_policy(mode.policy)
    model = workload.model()
    model.jit_compile = request["jit"]
    weights = [variable.numpy() for variable in model.variables]
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    model.optimizer = LossScaleOptimizer(inner) if mode.scaling is not None else inner
    model.make_train_function(force=True)
    batches = itertools.cycle([(tf.constant(data.train_x[i]), tf.constant(data.train_y[i])) for i in order])

    def step() -> Any:
        return model.train_function([next(batches)])

    def block(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            logs = step()
        logs["loss"].numpy()
        return (time.perf_counter() - start) / steps

    losses = []
    for _ in range(FIRST_STEPS):
        model.reset_metrics()
        losses.append(float(step()["loss"]))
    settled = time.perf_counter() + SETTLE_S
    while time.perf_counter() < settled:
        about_s = block(10)
    facts = {"losses": losses, "weights": digest(weights), "order": digest([order])}
    if handed:
        return Loop(facts, about_s, lambda steps: (block(steps), block(steps))[1])
    flat = order.ravel()
    pipeline = tf.data.Dataset.from_tensor_slices((data.train_x[flat], data.train_y[flat]))
    pipeline = pipeline.batch(workload.batch_size, drop_remainder=True).cache().repeat().prefetch(tf.data.AUTOTUNE)

    def epochs(steps: int) -> float:
        second = _Second()
        model.fit(pipeline, epochs=2, steps_per_epoch=steps, verbose=0, callbacks=[second])
        return second.seconds / steps

    return Loop(facts, about_s, epochs)


LOOPS: dict[str, Callable[[dict[str, Any]], Loop]] = {
    "mpscale": lambda request: Worker(request, recording=True).loop,
    "fit's step": partial(by_fit, handed=True),
    "fit": partial(by_fit, handed=False),
}

if __name__ == "__main__":
    die_with_parent()
    fidelity_contestant.LOOPS = LOOPS
    fidelity_contestant.main()
