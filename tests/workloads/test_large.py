"""The large workloads: networks against the literature, batches against memory, and the tiny ones trained."""

import functools
import math

import keras
import numpy as np
import pytest
from support.one_case import train

from mpscale.core.columns import Topic, measured_columns
from mpscale.core.reason import Code
from mpscale.harness.same_start import SameStart
from mpscale.presets import PRESETS
from mpscale.workloads import large, registry

NAMES = [workload.name for workload in large.FULL]
PARAMETERS = {
    "resnet50": 25_636_712,  # keras.io/api/applications: 25.6 M
    "efficientnet-b0": 5_330_571,  # keras.io/api/applications: 5.3 M
    "bert-base": 109_512_762,  # 109,514,298 with the two segments that it has no need of, which the paper calls 110 M
    "gpt2-small": 124_439_808,  # of the published weights, which the literature calls 124 M
    "unet": 31_030_658,  # 31.0 M
    "wide-mlp": 784 * 8192 + 3 * 8192**2 + 8192 * 10 + 4 * 8192 + 10,
    "lstm-lm": 66_022_000,  # Zaremba et al. 2014: 66 M
}
SLOTS = {"resnet50": 1, "wide-mlp": 1, "lstm-lm": 0}
"""Numbers that the optimizer keeps per parameter; two by default."""
MODES = ("mixed-static", "mixed-dynamic", "mixed-bf16", "mixed-unscaled", "mixed-keras")
ONLY_CONVOLUTIONS = ("resnet50", "efficientnet-b0", "unet")
"""Networks without a layer that Keras trains in float8; their last one is float32."""
PAIRS = [
    # EfficientNet is made like ResNet, and GPT-2 like BERT; both take long.
    pytest.param(name, mode, marks=[pytest.mark.slow] if name in ("efficientnet-b0", "gpt2-small") else [])
    for name, mode in zip(NAMES, (*MODES, "mixed-dynamic", "mixed-static"), strict=True)
]


@functools.cache
def network(name):
    """The full network without its weights, which would take gigabytes."""
    with keras.StatelessScope(initialize_variables=False):
        return registry.get(name).model()


@pytest.mark.parametrize("name", NAMES)
def test_a_network_has_as_many_parameters_as_in_the_literature(name):
    assert network(name).count_params() == PARAMETERS[name]
    assert network(name).outputs[0].dtype == "float32"


def activations(name):
    """Numbers that the layers of a network return for one example, including those within attention and LSTM."""
    total = 0
    for layer in network(name).layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        shapes = [tensor.shape[1:] for node in layer._inbound_nodes for tensor in node.output_tensors]
        total += sum(math.prod(shape) for shape in shapes)
        if isinstance(layer, keras.layers.MultiHeadAttention):
            # Query, key, value and context; scores before and after the softmax, and masked.
            total += sum(4 * math.prod(shape) + 3 * layer.num_heads * shape[0] ** 2 for shape in shapes)
        if isinstance(layer, keras.layers.LSTM):
            total += 12 * math.prod(shapes[0])  # gates before and after their activations, states
    return total


@pytest.mark.parametrize("name", NAMES)
def test_batches_by_memory_fit_in_float32_and_end_with_the_workloads_own(name):
    """The rule of the table, from the network itself: two steps may be queued."""
    batches = PRESETS["gpu"].apart[name].batches
    state_mib = PARAMETERS[name] * 4 * (2 + SLOTS.get(name, 2)) / 2**20
    example_mib = activations(name) * 4 / 2**20
    for gb, batch in batches:
        assert 600 + state_mib + 2 * batch * example_mib <= 0.8 * 1024 * gb
    assert batches[-1][1] == registry.get(name).batch_size <= large.SIZES[name]["full"].examples
    assert list(batches) == sorted(batches)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_the_same_every_time_and_leave_the_memory_to_the_training(name):
    tiny = registry.get(f"{name}-tiny").data
    assert tiny().digest() == tiny().digest()
    whole = registry.get(name).data()
    assert whole.train_x.dtype in (np.uint8, np.int64)
    assert whole.train_x.nbytes + whole.train_y.nbytes <= 200 * 2**20
    assert whole.test_x is None


@functools.cache
def trained(name, mode, jit=True):
    """Three steps of a tiny workload, as a worker takes them."""
    keras.utils.clear_session()  # every worker names its layers from the start
    return train(registry.get(f"{name}-tiny"), mode, jit=jit, train_steps=3)


def check(name, mode, *jit):
    """Compare fp32 with a mode, each with XLA or without it."""
    same, outcomes = SameStart(), [trained(name, *how) for how in zip(("fp32", mode), jit, strict=True)]
    for outcome in outcomes:
        row, missed = outcome.row, outcome.missed
        assert (outcome.status, outcome.reason) == ("ok", None)
        assert same.difference(outcome.case, outcome.record) is None
        assert math.isfinite(row["train_loss_first"]) and math.isfinite(row["train_loss_final"])
        assert (row["attempted_steps"], row["nonfinite_loss_steps"]) == (3, 0)
        assert (row["synthetic_inputs"], row["has_metric"]) == (True, False)
        assert {missed[column].code for column in measured_columns(Topic.RESULT)} == {Code.NOT_IN_WORKLOAD}
        assert not {"metric-tried", "evaluated"} & set(outcome.phases)
    first, other = (outcome.row["train_loss_first"] for outcome in outcomes)
    assert other == pytest.approx(first, rel=0.02)


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_a_tiny_workload_trains_the_same_in_fp32_and_in_another_mode(name, mode):
    check(name, mode, False, name in ("unet", "lstm-lm"))  # XLA takes most of the time


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, "mixed-logmax", "article", "mixed-fp8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_workload_trains_the_same_in_every_mode(name, mode):
    if mode == "mixed-fp8" and name in ONLY_CONVOLUTIONS:
        outcome = trained(name, mode)
        assert outcome.status == "unsupported" and "Dense and EinsumDense" in outcome.reason
    else:
        check(name, mode, True, True)
