"""mpscale's training loop and loops written by hand, interleaved in one process.

`python fidelity_contestant.py` reads a request and answers, each a line of JSON. A turn is two blocks, and only the
second counts.

One process, because processes of different programs may differ only by where their memory is. The loops are built in
random order, because what is built first may be placed better.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.processes.process import die_with_parent
from mpscale.scaling import DynamicLossScale, LossScaleOptimizer
from mpscale.worker import built, times
from mpscale.worker import case as execute
from mpscale.worker.scaler import StepRecord
from mpscale.worker.step import TrainStep
from mpscale.worker.timing import Timing, time_steps
from mpscale.worker.update import Update
from mpscale.workloads import registry

FIRST_STEPS = 10
"""Steps whose losses are reported, to check that the loops compute the same."""

SETTLE_S = 0.4


@dataclass
class Loop:
    """A training that continues on request.

    Args:
        facts: digests of its initial weights and its batches, losses of its first steps.
        about_s: approximate seconds per step.
        turn: runs two blocks of the given number of steps; returns the seconds per step of the second.
    """

    facts: dict[str, Any]
    about_s: float
    turn: Callable[[int], float]


def by_hand(request: dict[str, Any], handed: bool) -> Loop:
    """Build the custom training loop of TensorFlow's guide, with all data on the device and without mpscale.worker.

    mixed-dynamic uses mpscale's LossScaleOptimizer here too, because the harness is what is tested.

    Args:
        request: what to train.
        handed: whether the step is called with its batch, as in the guide, instead of finding it by a counter.
    """
    workload, mode = registry.get(request["workload"]), MODES[request["mode"]]
    compiled = partial(tf.function, jit_compile=request["jit"])
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(mode.tf32)
    data = workload.data()
    order = shuffled(len(data.train_x), workload.batch_size, workload.train_steps, request["seed"])
    keras.utils.set_random_seed(request["seed"])
    keras.config.set_dtype_policy(mode.policy)
    model, optimizer = workload.model(), workload.optimizer()
    weights = [variable.numpy() for variable in model.variables]
    if mode.scaling is not None:
        optimizer = LossScaleOptimizer(optimizer, DynamicLossScale())
    optimizer.build(model.trainable_variables)

    def train(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = workload.loss(y, model(x, training=True))
            scaled = loss if mode.scaling is None else optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
        return loss

    if handed:
        batches = itertools.cycle([(tf.constant(data.train_x[i]), tf.constant(data.train_y[i])) for i in order])
        train_step = compiled(train)

        def step() -> Any:
            return train_step(*next(batches))

    else:
        all_x, all_y, all_batches = tf.constant(data.train_x), tf.constant(data.train_y), tf.constant(order)
        position = tf.Variable(0, dtype=tf.int64)  # An int32 would be kept in host memory.

        @compiled
        def step() -> Any:
            batch = tf.gather(all_batches, position % len(order))
            position.assign_add(1)
            return train(tf.gather(all_x, batch), tf.gather(all_y, batch))

    def block(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        loss.numpy()
        return (time.perf_counter() - start) / steps

    losses = [float(step()) for _ in range(FIRST_STEPS)]
    settled = time.perf_counter() + SETTLE_S
    while time.perf_counter() < settled:
        about_s = block(10)
    facts = {"losses": losses, "weights": digest(weights), "order": digest([order])}
    return Loop(facts, about_s, lambda steps: (block(steps), block(steps))[1])


class Worker:
    """mpscale's own worker, from the idle process to the timing, with two names replaced.

    ``TrainStep`` is replaced to get hold of the step, and ``time_steps`` to time on request. This object is also the
    supervisor's end of the worker's channel.

    Args:
        request: what to train.
        recording: whether a step returns loss scale and overflow as its mode does, or its loss only.
    """

    def __init__(self, request: dict[str, Any], recording: bool) -> None:
        self._recording = recording
        self._facts: dict[str, Any] = {}
        # A repeat times without training.
        case = Case(request["workload"], request["mode"], request["seed"], 1, 0, Settings(jit=request["jit"]))
        with (
            patch.object(built, "TrainStep", self._make),
            patch.object(times, "time_steps", self._ready),
            contextlib.suppress(Ready),
        ):
            execute.execute(case, Device.from_json(request["device"]), None, self)

    @property
    def loop(self) -> Loop:
        """The loop, ready to be timed."""
        return Loop(self._facts, self._about_s, self._turn)

    def _make(self, update: Update, *arguments: Any) -> TrainStep:
        if not self._recording:
            apply = update.scaler.apply
            update.scaler.apply = lambda *gradients: (apply(*gradients), StepRecord())[1]  # type: ignore[method-assign]
        self._step = TrainStep(update, *arguments)
        return self._step

    def _ready(self, step: TrainStep, about_s: float, *_: Any) -> Timing:
        self._about_s = about_s
        raise Ready

    def _turn(self, steps: int) -> float:
        # The steps per block are given as a time and the time per step.
        timing = time_steps(self._step, 1e-6 / steps, 2e-6, 2)
        assert (timing.steps_per_block, len(timing.block_s)) == (steps, 2)
        return float(timing.step_s[1])

    def phase(self, phase: str) -> None:
        if phase == "compiled":
            for _ in range(FIRST_STEPS - 1):
                self._step()
            self._facts["losses"] = self._step.read_log().loss.tolist()

    def values(self, values: dict[str, Any]) -> None:
        named = {"initial_weights_digest": "weights", "data_order_digest": "order"}
        self._facts |= {named[key]: value for key, value in values.items() if key in named}

    def miss(self, *_: Any) -> None:
        """Ignore missing columns, which nobody reads here."""

    def send(self, *_: Any) -> None:
        """Ignore other events."""


class Ready(Exception):
    """Ends the worker before its timing."""


LOOPS: dict[str, Callable[[dict[str, Any]], Loop]] = {
    "mpscale": lambda request: Worker(request, recording=True).loop,
    "unrecorded": lambda request: Worker(request, recording=False).loop,
    "by hand": partial(by_hand, handed=False),
    "handed": partial(by_hand, handed=True),
}


def race(request: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of each loop, and the seconds per step of each of its blocks."""
    loops = {name: LOOPS[name](request) for name in random.sample(list(LOOPS), len(LOOPS))}
    about_s = statistics.median(loop.about_s for loop in loops.values())
    steps = max(1, round(request["block_s"] / about_s))
    blocks: dict[str, list[float]] = {name: [] for name in LOOPS}
    gc.collect()
    gc.disable()  # As mpscale does during timing.
    for _ in range(request["rounds"]):
        for name in random.sample(list(LOOPS), len(LOOPS)):
            blocks[name].append(loops[name].turn(steps))
    return {"facts": {name: loop.facts for name, loop in loops.items()}, "blocks": blocks}


def shuffled(examples: int, size: int, steps: int, seed: int) -> np.ndarray:
    """Return indices (steps, size): a new permutation every epoch, without its incomplete last batch."""
    random, whole = np.random.default_rng(seed), examples // size * size
    epochs = [random.permutation(examples)[:whole] for _ in range(-(-steps * size // whole))]
    return np.concatenate(epochs).reshape(-1, size)[:steps]


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Return the digest that mpscale's rows have."""
    return "sha256:" + hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def main() -> None:
    faulthandler.enable()
    source, sink = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Libraries print to standard error.
    sink.write(json.dumps(race(json.loads(source.readline()))) + "\n")
    sink.flush()


if __name__ == "__main__":
    die_with_parent()
    main()
