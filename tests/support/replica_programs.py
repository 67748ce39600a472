"""Trains on two replicas and prints what happened, as one line of JSON.

    python replica_programs.py mirrored|multiworker

`multiworker` needs TF_CONFIG. This is a program because replicas have to be configured before TensorFlow starts.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

from mpscale.scaling import DynamicLossScale, LogMaxLossScale, LossScaleOptimizer
from mpscale.testing import inject_overflow

STEPS = 6
HIT = (1, 4)


def small_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])


def copies(variable):
    """Return the values of a variable on the local replicas."""
    value = variable.value
    return [copy.numpy() for copy in getattr(value, "values", [value])]


def train(strategy, make, replica, clip=False, jit=False, build=True):
    """Take steps with an overflow on ``replica`` only; return what became of weights, scale and counters."""
    with strategy.scope():
        model = small_model()
        optimizer = make()
        if build:
            optimizer.build(model.trainable_variables)
    inject = inject_overflow(step=HIT, replica=replica, variable=2)
    variables = model.trainable_variables
    x = np.arange(20, dtype=np.float32).reshape(5, 4) / 20

    def step():
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(tf.reduce_mean(model(tf.constant(x), training=True) ** 2))
        grads = inject(tape.gradient(scaled, variables))
        if clip:
            grads, finite = optimizer.unscale(grads)
            grads = [tf.clip_by_value(grad, -1.0, 1.0) for grad in grads]
            optimizer.apply(grads, variables, finite=finite)
        else:
            optimizer.apply(grads, variables)

    step_function = tf.function(step, jit_compile=jit)
    run = tf.function(lambda: strategy.run(step_function))
    state = lambda: [v.numpy().tobytes() for v in (*variables, *optimizer.inner_optimizer.variables)]  # noqa: E731
    changed, scales = [], []
    for _ in range(STEPS):
        before = state()
        run()
        changed.append(state() != before)
        if isinstance(optimizer, LossScaleOptimizer):
            scales.append(float(optimizer.loss_scale_value))
    all_variables = [*variables, *optimizer.variables]
    result = {
        "changed": changed,
        "scales": scales,
        "finite": all(bool(np.isfinite(v.numpy()).all()) for v in variables),
        "replicas_agree": all(np.array_equal(copy, copies(v)[0]) for v in all_variables for copy in copies(v)),
    }
    if isinstance(optimizer, LossScaleOptimizer):
        result["counters"] = optimizer.counters()
    return result


def ours(loss_scale=None, inner=lambda: keras.optimizers.Adam(0.01), **options):
    loss_scale = loss_scale or DynamicLossScale(initial=8.0)
    return lambda: LossScaleOptimizer(inner(), loss_scale, **options)


def message_of(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fit(strategy):
    with strategy.scope():
        model = small_model()
        model.compile(ours()(), "mse", jit_compile=False)
    inject = inject_overflow(step=1, replica=1)
    with inject.into(model):
        model.fit(np.ones((24, 4), np.float32), np.zeros((24, 2), np.float32), batch_size=8, verbose=0)
    return {"counters": model.optimizer.counters(), "scale": float(model.optimizer.loss_scale_value)}


def mirrored():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def outside():
        with strategy.scope():
            optimizer = ours()()
            model = small_model()
            optimizer.build(model.trainable_variables)
            optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables])

    made = lambda thing: lambda: thing  # noqa: E731
    by_keras = lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))  # noqa: E731
    accumulating = lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)  # noqa: E731
    return {
        "first": train(strategy, ours(), 0),
        "second": train(strategy, ours(), 1),
        "second, blame": train(strategy, ours(blame=True), 1),
        "second, logmax": train(strategy, ours(LogMaxLossScale()), 1),
        "second, keras": train(strategy, by_keras, 1),
        "fit": fit(strategy),
        "jit": message_of(lambda: train(strategy, ours(), 1, jit=True)),
        "jit, keras": message_of(lambda: train(strategy, by_keras, 1, jit=True)),
        "accumulating": message_of(lambda: train(strategy, ours(inner=accumulating), 1)),
        "not built": message_of(lambda: train(strategy, ours(), 1, build=False)),
        "cross-replica": message_of(outside),
        "made outside": message_of(lambda: train(strategy, made(ours()()), 1)),
        "inner made outside": message_of(lambda: train(strategy, ours(inner=made(keras.optimizers.Adam(0.01))), 1)),
        "second, blame, clipped": train(strategy, ours(blame=True), 1, clip=True),
    }


def multiworker():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    return {
        "replicas": strategy.num_replicas_in_sync,
        "first": train(strategy, ours(), 0),
        "second": train(strategy, ours(), 1),
        "second, blame": train(strategy, ours(LogMaxLossScale(), blame=True), 1),
    }


if __name__ == "__main__":
    print(json.dumps({"mirrored": mirrored, "multiworker": multiworker}[sys.argv[1]]()))
