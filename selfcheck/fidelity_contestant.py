"""mpscale's training loop and loops written by hand, in one process, in turns of two blocks of which the second counts.

`python fidelity_contestant.py` reads a request and answers, a line of JSON each.

One process, since two processes of unlike programs may differ for no reason but where their memory lies; the loops are
built in random order, as what is built first may lie better.
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
from mpscale.core.process import die_with_parent
from mpscale.scaling import DynamicLossScale, LossScaleOptimizer
from mpscale.worker import case as execute
from mpscale.worker.scalers import StepRecord, StepScaler
from mpscale.worker.step import Timing, TrainStep, time_steps
from mpscale.workloads import registry

FIRST_STEPS = 10
"""Steps whose losses are reported: loops whose speed is compared have to do the same."""

SETTLE_S = 0.4


@dataclass
class Loop:
    """A training that goes on whenever it is asked to.

    Args:
        facts: digests of its weights and of its batches, losses of its first steps.
        about_s: about how many seconds a step takes.
        turn: takes two blocks of so many steps; the seconds that a step of the second took.
    """

    facts: dict[str, Any]
    about_s: float
    turn: Callable[[int], float]


def by_hand(request: dict[str, Any], handed: bool) -> Loop:
    """The custom training loop of TensorFlow's guide, with all data on the device, and nothing of mpscale.worker.

    The optimizer of mixed-dynamic is mpscale's LossScaleOptimizer here, too: it is the harness that is tested.

    Args:
        request: what to train.
        handed: the step is called with its batch, as in the guide. Otherwise it counts, and finds the batch itself.
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
    if mode.scaling == "dynamic":
        optimizer = LossScaleOptimizer(optimizer, DynamicLossScale())
    optimizer.build(model.trainable_variables)

    def train(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = workload.loss(y, model(x, training=True))
            scaled = loss if mode.scaling == "none" else optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
        return loss

    if handed:
        batches = itertools.cycle([(tf.constant(data.train_x[i]), tf.constant(data.train_y[i])) for i in order])
        train_step = compiled(train)

        def step() -> Any:
            return train_step(*next(batches))

    else:
        all_x, all_y, all_batches = tf.constant(data.train_x), tf.constant(data.train_y), tf.constant(order)
        position = tf.Variable(0, dtype=tf.int64)  # An int32 would be kept in the memory of the host.

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
    """mpscale's own worker: :func:`execute.execute` from the idle process to the timing, with two names replaced.

    ``TrainStep`` only to get hold of the step; ``time_steps`` is called at every turn, and not once for all. This is
    also the supervisor's end of the worker's channel.

    Args:
        request: what to train.
        recording: whether a step returns what its mode knows of loss scale and overflow, or its loss alone.
    """

    def __init__(self, request: dict[str, Any], recording: bool) -> None:
        self._recording = recording
        self._facts: dict[str, Any] = {}
        # A repeat times without having trained.
        case = Case(request["workload"], request["mode"], request["seed"], 1, 0, Settings(jit=request["jit"]))
        with patch.multiple(execute, TrainStep=self._make, time_steps=self._ready), contextlib.suppress(Ready):
            execute.execute(case, Device.from_json(request["device"]), None, self)

    @property
    def loop(self) -> Loop:
        """What it left when it was about to time."""
        return Loop(self._facts, self._about_s, self._turn)

    def _make(self, model: keras.Model, scaler: StepScaler, *arguments: Any) -> TrainStep:
        if not self._recording:
            apply = scaler.apply
            scaler.apply = lambda *gradients: (apply(*gradients), StepRecord())[1]
        self._step = TrainStep(model, scaler, *arguments)
        return self._step

    def _ready(self, step: TrainStep, about_s: float, *_: Any) -> Timing:
        self._about_s = about_s
        raise Ready

    def _turn(self, steps: int) -> float:
        # A block's steps are given as a time and how often a step fits into it.
        timing = time_steps(self._step, 1e-6 / steps, 2e-6, 2)
        assert (timing.steps_per_block, len(timing.block_s)) == (steps, 2)
        return float(timing.step_s[1])

    def phase(self, phase: str) -> None:
        if phase == "compiled":
            for _ in range(FIRST_STEPS - 1):
                self._step()
            self._facts["losses"] = self._step.read_log()[:, 0].tolist()

    def values(self, values: dict[str, Any]) -> None:
        named = {"initial_weights_digest": "weights", "data_order_digest": "order"}
        self._facts |= {named[key]: value for key, value in values.items() if key in named}

    def miss(self, *_: Any) -> None:
        """Nobody is waiting for columns."""


class Ready(Exception):
    """What the worker would do from its timing on is left out."""


LOOPS: dict[str, Callable[[dict[str, Any]], Loop]] = {
    "mpscale": lambda request: Worker(request, recording=True).loop,
    "unrecorded": lambda request: Worker(request, recording=False).loop,
    "by hand": partial(by_hand, handed=False),
    "handed": partial(by_hand, handed=True),
}


def race(request: dict[str, Any]) -> dict[str, Any]:
    """Facts of each loop, and seconds per step of each block of each."""
    loops = {name: LOOPS[name](request) for name in random.sample(list(LOOPS), len(LOOPS))}
    about_s = statistics.median(loop.about_s for loop in loops.values())
    steps = max(1, round(request["block_s"] / about_s))
    blocks: dict[str, list[float]] = {name: [] for name in LOOPS}
    gc.collect()
    gc.disable()  # As mpscale does while it times.
    for _ in range(request["rounds"]):
        for name in random.sample(list(LOOPS), len(LOOPS)):
            blocks[name].append(loops[name].turn(steps))
    return {"facts": {name: loop.facts for name, loop in loops.items()}, "blocks": blocks}


def shuffled(examples: int, size: int, steps: int, seed: int) -> np.ndarray:
    """Indices (steps, size): a fresh permutation every epoch, without its incomplete last batch."""
    random, whole = np.random.default_rng(seed), examples // size * size
    epochs = [random.permutation(examples)[:whole] for _ in range(-(-steps * size // whole))]
    return np.concatenate(epochs).reshape(-1, size)[:steps]


def digest(arrays: Iterable[np.ndarray]) -> str:
    """As mpscale's rows have it."""
    return "sha256:" + hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def main() -> None:
    faulthandler.enable()
    source, sink = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes to standard error.
    sink.write(json.dumps(race(json.loads(source.readline()))) + "\n")
    sink.flush()


if __name__ == "__main__":
    die_with_parent()
    main()
