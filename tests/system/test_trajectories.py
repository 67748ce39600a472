"""Overflow and loss scale of every step, compared with a loop written by hand."""

import gzip

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from support import suite_workloads

from mpscale.worker.training import batches


def hand_written(next_scale, scale):
    """Train the workload `slow` with seed 0 in float16; return the scale of each step and whether it overflowed."""
    workload = suite_workloads.slow
    data = workload.data()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = workload.model()
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = workload.optimizer()
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True)
    def gradients(x, y, scale):
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True))
            scaled = tf.reduce_mean(losses) * scale
        return [g / scale for g in tape.gradient(scaled, model.trainable_variables)]

    scales, overflows, good = [], [], 0
    for batch in batches(len(data.train_x), workload.batch_size, workload.train_steps, seed=0):
        grads = gradients(data.train_x[batch], data.train_y[batch], tf.constant(scale, tf.float32))
        finite = all(np.isfinite(g.numpy()).all() for g in grads)
        if finite:
            optimizer.apply(grads, model.trainable_variables)
        scales.append(scale)
        overflows.append(int(not finite))
        scale, good = next_scale(scale, good, finite)
    return scales, overflows


def constant(scale, good, finite):
    return scale, good


def dynamic(scale, good, finite):
    """Grows after 10 good steps, so the scale moves often."""
    if not finite:
        return max(scale / 2, 1.0), 0
    if good + 1 == 10:
        return min(scale * 2, 2.0**50), 0
    return scale, good + 1


@pytest.mark.parametrize(
    ("mode", "options", "rule", "start"),
    [
        pytest.param(
            "mixed-static", ["--mp-static-scale", "2**24"], constant, 2.0**24, marks=pytest.mark.slow
        ),  # The other one, whose scale changes, is harder.
        (
            "mixed-dynamic",
            ["--mp-dynamic-scale", "initial=2**40,maximum=2**50,growth_interval=10"],
            dynamic,
            2.0**40,
        ),
    ],
)
def test_scale_and_overflow_of_every_step_agree_with_a_loop_by_hand(run_suite, mode, options, rule, start):
    done = run_suite(
        "--mp-workloads", "suite_workloads:slow", "--mp-modes", mode, "--mp-seeds", "2", "--benchmark-disable",
        *options, page=False,
    )  # fmt: skip
    assert done.code == 0, done.output
    scales, overflows = hand_written(rule, start)
    (path,) = (done.path / "steps").glob("*--s0--*.csv.gz")
    with gzip.open(path, "rt") as file:
        steps = pd.read_csv(file)
    assert steps["overflow"].tolist() == overflows
    assert steps["loss_scale"].tolist() == scales
    assert sum(overflows) > 20
    cases = done.run.cases
    case = cases.set_index("seed").loc[0]
    assert case["overflow_steps"] == case["skipped_steps"] == sum(overflows)
    assert case["applied_steps"] == len(overflows) - sum(overflows)
    assert case["loss_scale_final"] == scales[-1]

    assert {reasons["step_time_ms_median"] for reasons in cases["unavailable"]} == {"timing was off"}
    assert cases["order"].tolist() == [0, 1]
    assert cases["initial_weights_digest"].nunique() == cases["data_order_digest"].nunique() == 2
    assert cases["data_digest"].nunique() == cases["workload_digest"].nunique() == 1
