"""What a worker sets before it trains."""

import pytest
import tensorflow as tf

from mpscale.harness import execute
from mpscale.modes import MODES
from mpscale.telemetry.device import Device


class SilentChannel:
    def values(self, values):
        pass

    def miss(self, columns, reason):
        pass


@pytest.fixture
def arithmetic():
    """What TensorFlow does about precision by itself: (TF32, graph rewrite); put back afterwards."""

    def read():
        options = tf.config.optimizer.get_experimental_options()
        return (
            tf.config.experimental.tensor_float_32_execution_enabled(),
            options.get("auto_mixed_precision", False),
        )

    tf32, rewrite = read()
    yield read
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": rewrite})


@pytest.mark.parametrize(
    ("mode", "expected"), [("fp32", (False, False)), ("mixed-dynamic", (True, False)), ("graph-rewrite", (True, True))]
)
def test_mode_sets_what_tensorflow_may_do_by_itself(arithmetic, mode, expected):
    execute.set_arithmetic(MODES[mode])
    assert arithmetic() == expected


def test_worker_sets_it_when_it_makes_the_device_ready(arithmetic):
    execute._touch(Device("cpu", "Some CPU"), MODES["graph-rewrite"], SilentChannel())
    assert arithmetic() == (True, True)
