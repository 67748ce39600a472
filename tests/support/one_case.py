"""One case, run in this process as in a worker."""

import sys
import types
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.reason import Reason
from mpscale.core.record import Record
from mpscale.worker.case import execute
from mpscale.worker.training import batches
from mpscale.workloads import Data, Workload


@dataclass
class Outcome:
    """The supervisor's end of the channel: what the worker reports."""

    case: Case
    status: str = ""
    reason: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    missed: dict[str, Reason] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)

    @property
    def record(self):
        """The row that the supervisor would make of it."""
        ending = {"status": self.status, "status_reason": self.reason}
        return Record({**self.case.identity(), **self.row, **ending}, self.missed)

    def values(self, values):
        self.row |= values

    def miss(self, columns, reason):
        self.missed |= dict.fromkeys(columns, reason)

    def send(self, event):
        self.sent.append(event)

    def phase(self, phase):
        self.phases.append(phase)

    def progress(self, done, total): ...

    def blocks(self, step_s): ...

    def energy(self, steps, overflow_steps): ...


def train(workload, *arguments, **options):
    """Train ``workload`` as a worker would, and restore the settings of the process."""
    try:
        return run_case(workload, *arguments, **options)
    finally:
        keras.config.set_dtype_policy("float32")
        tf.config.experimental.enable_tensor_float_32_execution(True)


def run_case(workload, mode="fp32", seed=0, jit=False, energy_s=0.0, steps_path=None, timing_s=0.0, **settings):
    """Train ``workload``, or that of a name, as a worker would; leave the settings of the process as they are then."""
    name = workload if isinstance(workload, str) else "situation:workload"
    if name != workload:
        module = types.ModuleType("situation")
        module.workload = workload
        sys.modules["situation"] = module
    settings = Settings(jit=jit, timing_s=timing_s, energy_s=energy_s, **settings)
    case = Case(name, mode, seed, 0, 0, settings)
    outcome = Outcome(case)
    outcome.status, outcome.reason = execute(case, Device("cpu", "CPU"), steps_path, outcome, energy_s)
    return outcome


def workload(model, data, optimizer=lambda: keras.optimizers.SGD(0.1), **options):
    """A short training."""
    options = {"batch_size": 20, "train_steps": 60, "evaluate_every": 30, **options}
    return Workload("situation", "", model, data, optimizer, **options)


def by_fit(model, data, loss, optimizer, seed=0, batch=20, steps=60, metrics=()):
    """The same training by Keras' own fit, on the same batches in the same order."""
    keras.utils.set_random_seed(seed)
    net = model()
    net.compile(optimizer, loss=loss, metrics=list(metrics), jit_compile=False)
    order = batches(len(data.train_x), batch, steps, seed).ravel()
    net.fit(data.train_x[order], data.train_y[order], batch_size=batch, shuffle=False, verbose=0)
    return net


def blobs(classes=3, examples=240, noise=0.6, dtype=np.int64):
    """Clusters around the corners of a square, easy but not trivial: ``(x, y)`` with y (examples,)."""
    random = np.random.default_rng(1)
    y = np.arange(examples) % classes
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], float)
    x = corners[y] + noise * random.normal(size=(examples, 2))
    return x.astype(np.float32), y.astype(dtype)


def split(x, y):
    """Data with two thirds of the examples to train on."""
    cut = len(x) * 2 // 3
    return Data(x[:cut], y[:cut], x[cut:], y[cut:])


def dense(outputs=3, **options):
    """A small perceptron."""
    hidden = partial(keras.layers.Dense, 8, activation="tanh", **options)
    return lambda: keras.Sequential([keras.Input((2,)), hidden(), keras.layers.Dense(outputs, dtype="float32")])
