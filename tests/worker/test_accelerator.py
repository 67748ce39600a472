"""What a worker sets before it trains."""

import pytest
import tensorflow as tf

from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.worker import device as accelerator

STAND_IN = Device("gpu", "mpscale stand-in A100", "GPU-1", (8, 0))


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
    accelerator.set_arithmetic(MODES[mode])
    assert arithmetic() == expected


def test_worker_sets_it_when_it_makes_the_device_ready(arithmetic):
    accelerator.touch(Device("cpu", "Some CPU"), MODES["graph-rewrite"])
    assert arithmetic() == (True, True)


@pytest.mark.parametrize(("device", "words"), [(Device("cpu", "Some CPU"), "CPU"), (STAND_IN, "stand-in")])
def test_allocator_that_is_not_the_gpus_has_no_peak(device, words):
    peak = accelerator.AllocatorPeak(device)
    peak.begin_window()
    values, missed = peak.columns(windowed=True)
    assert values == {}
    assert all(words in reason for reason in missed.values())
    assert set(missed) == {"gpu_memory_allocator_peak_mib", "gpu_memory_allocator_timed_peak_mib"}


def test_stand_in_for_a_gpu_trains_on_the_cpu():
    values, missed = accelerator.touch(STAND_IN, MODES["tf32"])
    assert values["gpu_allocator"] == "bfc"
    assert values["tf32"] is True
    assert missed == {}


def test_gpu_that_tensorflow_does_not_see_is_an_error():
    with pytest.raises(RuntimeError, match=r"tensorflow\[and-cuda\]"):
        accelerator.require(Device("gpu", "NVIDIA A100", "GPU-1", (8, 0)))
    accelerator.require(STAND_IN)
    accelerator.require(Device("cpu", "Some CPU"))
