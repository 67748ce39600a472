"""Evaluation needs no more of the device's memory than a batch does, however large the test set is."""

import pytest
from support.forked import run_forked

IMPORTS = """
import resource
from pathlib import Path
import keras
import numpy as np
import tensorflow as tf
from mpscale.worker.training import Evaluator, score_for
from mpscale.workloads import Workload
"""

LIMITED = """
# An example takes 4 MiB in the hidden layer: 8 of them 32 MiB, all 256 a GiB.
layers = [keras.layers.Dense(2**20, use_bias=False, kernel_initializer="ones"), keras.layers.Reshape((-1, 1))]
model = keras.Sequential([keras.Input((1,)), *layers, keras.layers.GlobalAveragePooling1D()])
x = np.arange(256, dtype=np.float32)[:, None]
evaluate = Evaluator(model, lambda y, outputs, mask: float((y == outputs[:, 0]).mean()), False, 8)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
try:
    np.ones((256, 2**20), np.float32)
except MemoryError:
    print("not all at once")
evaluate.try_out(x, x[:, 0])
print("metric", evaluate(x, x[:, 0]))
"""
"""Evaluates 256 examples in batches of 8, with 512 MiB more than the process has before."""

ON_THE_HOST = """
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
update = keras.metrics.MeanAbsoluteError.update_state

def seen(self, y, outputs, *rest):
    print("on", tf.convert_to_tensor(outputs).device[-5:])
    return update(self, y, outputs, *rest)

keras.metrics.MeanAbsoluteError.update_state = seen
x = np.ones((4, 1), np.float32)
for mask in (None, np.ones(4, bool)):
    with tf.device("CPU:1"):
        keras.metrics.MeanAbsoluteError()
        score = score_for(Workload("x", "", *[lambda: None] * 3, metric="mae"), x, (1,), None)
        print("metric", score(x, 2 * x, mask))
"""
"""Computes a metric where another device than the host would be used: the second of two that the CPU poses as."""


@pytest.fixture(scope="module")
def done():
    return run_forked(IMPORTS, {"limited": LIMITED, "on the host": ON_THE_HOST})


def test_a_memory_limit_that_suffices_for_batches_suffices_for_evaluation(done):
    limited = done["limited"]
    assert limited.stdout.splitlines() == ["not all at once", "metric 1.0"], limited.stderr[-2000:]


def test_the_outputs_of_all_examples_meet_on_the_host(done):
    lines = done["on the host"].stdout.splitlines()
    assert lines.count("metric 1.0") == 2, done["on the host"].stderr[-2000:]
    assert {line for line in lines if line.startswith("on")} == {"on CPU:0"}
