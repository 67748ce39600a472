"""The compiled step does what a loop written by hand does; in addition it only returns a record.

selfcheck/test_fidelity.py compares step times, which are noisy. These tests compare programs, which are exact.
"""

import re
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.core.case import Settings
from mpscale.core.mode import MODES
from mpscale.scaling import DynamicLossScale, LossScaleOptimizer
from mpscale.worker.batches import Batches
from mpscale.worker.scaler import scaler_for
from mpscale.worker.step import TrainStep
from mpscale.worker.update import Update
from mpscale.workloads import registry

WORKLOAD = registry.get("mnist1d-mlp")
SCALES = {"fp32": None, "mixed-dynamic": DynamicLossScale()}
RECORD = {"fp32": Counter(), "mixed-dynamic": Counter(ReadVariableOp=1, LogicalNot=1, Cast=1, Identity=2)}
"""The operations that return loss scale and overflow; in fp32 there is only the loss to return."""
KERNELS = {"fp32": Counter(), "mixed-dynamic": Counter(fusion=1)}


@pytest.fixture(scope="module")
def start():
    data = WORKLOAD.data()
    return data.train_x[:200], data.train_y[:200], np.arange(200).reshape(-1, WORKLOAD.batch_size)


def mpscales(mode, start, jit):
    keras.config.set_dtype_policy(MODES[mode].policy)
    scaler = scaler_for(MODES[mode], WORKLOAD.optimizer(), Settings())
    update = Update(WORKLOAD.model(), scaler, WORKLOAD.loss)
    return TrainStep(update, Batches(start[:2], start[2]), jit)._function


def by_hand(mode, start, jit):
    keras.config.set_dtype_policy(MODES[mode].policy)
    model, optimizer, scale = WORKLOAD.model(), WORKLOAD.optimizer(), SCALES[mode]
    if scale is not None:
        optimizer = LossScaleOptimizer(optimizer, scale)
    variables = model.trainable_variables
    optimizer.build(variables)
    all_x, all_y, order = map(tf.constant, start)
    position = tf.Variable(0, dtype=tf.int64)

    @tf.function(jit_compile=jit)
    def step():
        batch = tf.gather(order, position % len(start[2]))
        position.assign_add(1)
        with tf.GradientTape() as tape:
            x, y = tf.gather(all_x, batch), tf.gather(all_y, batch)
            loss = WORKLOAD.loss(y, model(x, training=True))
            scaled = loss if scale is None else optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    return step


@pytest.mark.parametrize("mode", SCALES)
def test_step_has_the_operations_of_one_written_by_hand_and_those_of_its_record(mode, start):
    ours, theirs = (
        Counter(op.type for op in make(mode, start, jit=False).get_concrete_function().graph.get_operations())
        for make in (mpscales, by_hand)
    )
    assert ours - theirs == RECORD[mode]
    assert not theirs - ours


@pytest.mark.parametrize("mode", SCALES)
def test_step_compiled_by_xla_has_the_kernels_of_one_written_by_hand_and_that_of_its_record(mode, start):
    ours, theirs = (kernels(compiled(make(mode, start, jit=True))) for make in (mpscales, by_hand))
    assert ours["fusion"] > 10
    assert ours - theirs == KERNELS[mode]
    assert not theirs - ours


def test_step_of_fp32_compiled_by_xla_is_one_written_by_hand_line_by_line(start):
    ours, theirs = (nameless(compiled(make("fp32", start, jit=True))) for make in (mpscales, by_hand))
    assert len(ours) > 100
    assert ours == theirs


def compiled(function):
    """The program that XLA compiles, as text."""
    return function.experimental_get_compiler_ir()(stage="optimized_hlo")


def nameless(program):
    """Its lines without the first, which has only names, and without their places in Python code."""
    return re.sub(r", metadata=\{.*?\}|a_inference_\w+", "", program).splitlines()[1:]


def kernels(program):
    """The number of instructions that the program executes, by kind."""
    entry = program[program.index("ENTRY") :]
    kinds = Counter(re.findall(r" = (?:\(.*?\)|\S+) ([a-z-]+)\(", entry))
    return Counter({kind: number for kind, number in kinds.items() if kind not in ("parameter", "tuple", "constant")})
