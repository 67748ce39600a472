"""The device as TensorFlow has it: its settings and its allocator."""

import pytest
import tensorflow as tf

from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.reason import Code
from mpscale.worker.device import AllocatorPeak, require, set_arithmetic, touch

STAND_IN = Device("gpu", "mpscale stand-in A100", "GPU-1", (8, 0))


@pytest.fixture
def arithmetic():
    """What TensorFlow is allowed to do about precision: (TF32, graph rewrite); restored afterwards."""

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
def test_mode_sets_what_tensorflow_is_allowed_to_do(arithmetic, mode, expected):
    set_arithmetic(MODES[mode])
    assert arithmetic() == expected


def test_making_the_device_ready_sets_it(arithmetic):
    touch(Device("cpu", "Some CPU"), MODES["graph-rewrite"])
    assert arithmetic() == (True, True)


@pytest.mark.parametrize("device", [Device("cpu", "Some CPU"), STAND_IN])
def test_allocator_of_a_cpu_has_no_peak(device):
    peak = AllocatorPeak(device)
    peak.begin_window()
    found = peak.columns()
    assert found.values == {}
    assert {column: reason.code for column, reason in found.unavailable.items()} == {
        "gpu_memory_allocator_peak_mib": Code.NO_GPU,
        "gpu_memory_allocator_timed_peak_mib": Code.NO_GPU,
    }


def test_stand_in_for_a_gpu_trains_on_the_cpu():
    found = touch(STAND_IN, MODES["tf32"])
    assert found.values == {"gpu_allocator": "bfc", "tf32": True}
    assert found.unavailable == {}


def test_gpu_that_tensorflow_does_not_see_is_an_error():
    with pytest.raises(RuntimeError, match=r"tensorflow\[and-cuda\]"):
        require(Device("gpu", "NVIDIA A100", "GPU-1", (8, 0)))
    require(STAND_IN)
    require(Device("cpu", "Some CPU"))
