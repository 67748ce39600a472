"""Two replicas with a batch of b train as one device with a batch of 2b; what does otherwise is refused or told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import replica_cases

from mpscale.worker.training import batches

HERE = Path(replica_cases.__file__)
ALIKE = {
    "a loss of Keras": 1e-5,
    "a loss of the user": 1e-5,
    "regularizers": 1e-5,
    "several steps per call": 1e-5,
    "an overflow": 5e-3,
    "the article's scale": 5e-3,
}
"""Cases that train as one device does, and how far losses may differ: by rounding, in float32 or float16."""
OTHERS = {
    "compiled": 1e-5,
    "compiled, several steps per call": 1e-5,
    "its own train_step": 1e-5,
    "its own train_step, an overflow": 5e-3,
    "a loss that adds up": 1e-5,
    "a pipeline": 1e-5,
    "compiled, a pipeline": 1e-5,
    "compiled, a PyDataset": 1e-5,
}
"""The same of compiled models and pipelines."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A process of its own, because logical devices have to be configured before TensorFlow starts."""
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE), str(tmp_path_factory.mktemp("replicas"))],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ALIKE)
def test_two_replicas_train_as_one_device_with_the_double_batch(cases, name):
    two, one = cases[name]
    assert (two["status"], one["status"], two["remarks"]) == ("ok", "ok", [])
    for fact in ("initial_weights_digest", "data_order_digest", "loss_probe", "flops_per_step", "metric_value"):
        assert two[fact] == one[fact] is not None
    losses = np.array([[float(loss) for loss in each["loss"]] for each in (two, one)])
    assert len(losses[0]) == replica_cases.STEPS
    assert losses[0] == pytest.approx(losses[1], rel=ALIKE[name], nan_ok=True)
    assert (two["batch_size"], two["replica_batch_size"]) == (40, 20)
    assert (one["batch_size"], one["replica_batch_size"]) == (40, 40)


@pytest.mark.parametrize("name", OTHERS)
def test_compiled_models_and_pipelines_on_two_replicas_train_as_on_one_device(cases, name):
    two, one = cases[name]
    assert (two["status"], one["status"], two["remarks"]) == ("ok", "ok", []) and not two["jit"]
    for fact in ("initial_weights_digest", "flops_per_step"):
        assert two[fact] == one[fact] is not None
    losses = np.array([[float(loss) for loss in each["loss"]] for each in (two, one)])
    assert losses[0] == pytest.approx(losses[1], rel=OTHERS[name], nan_ok=True)
    assert two["batch_size"] == one["batch_size"] == 2 * two["replica_batch_size"]
    # All examples once, although no batch divides their number.
    assert two["metric_value"] == pytest.approx(one["metric_value"], rel=1e-6)
    assert two["test_examples"] == one["test_examples"] == replica_cases.TEST


@pytest.mark.parametrize("name", ["its own train_step", "a loss that adds up", "a loss of one number"])
def test_a_compiled_model_trains_as_by_fit_under_the_same_strategy(cases, name):
    two, _ = cases[name]
    assert [float(loss) for loss in two["loss"]] == pytest.approx(cases["by fit"][name], rel=1e-5)


@pytest.mark.parametrize("name", ["a loss of one number", "two optimizers"])
def test_gradients_that_nothing_divides_are_told(cases, name):
    two, one = cases[name]
    (remark,) = two["remarks"]
    assert "is not divided by the number of replicas, so its gradients are 2 times those of one device" in remark
    assert float(two["loss"][0]) == pytest.approx(2 * float(one["loss"][0]), rel=1e-3)


def test_a_step_takes_a_batch_of_the_pipeline_for_each_replica(cases):
    two, one = cases["compiled, a pipeline"]
    assert two["input_batches"].endswith(f"x{2 * replica_cases.STEPS}")
    assert one["input_batches"].endswith(f"x{replica_cases.STEPS}")
    assert two["examples_per_s"] == pytest.approx(40 / two["step_time_ms_median"] * 1e3)
    assert two["step_time_ms_with_input"] > 0


def test_batches_that_do_not_make_a_step_are_left_out_and_counted(cases):
    # Of an epoch of eight, the last one is smaller, so neither it nor the one before it is trained on; 24 steps are
    # eight epochs, of which the last was not gone through to its end.
    (remark,) = cases["a pipeline with a rest"]
    assert "14 batches of the pipeline were left out" in remark


@pytest.mark.parametrize("name", ["an overflow", "its own train_step, an overflow"])
def test_an_overflow_on_either_replica_is_one_decision_of_both(cases, name):
    two, one = cases[name]
    order = batches(160, 40, replica_cases.STEPS, 0)
    steps, columns = np.nonzero(order == order[2, replica_cases.BATCH + 3])
    assert {column // replica_cases.BATCH for column in columns} == {0, 1}
    assert [step for step, flag in enumerate(two["overflow"]) if flag == "1"] == steps.tolist()
    assert (two["scale"], two["overflow"]) == (one["scale"], one["overflow"])
    assert float(two["scale"][-1]) == 2.0 ** (15 - sum(steps < replica_cases.STEPS - 1))


@pytest.mark.parametrize("name", ["an overflow", "its own train_step, an overflow"])
def test_lint_looks_at_one_replica(cases, name):
    # Keras numbers the layers of a process.
    cells = [json.loads(re.sub(r"_\d+", "", case["lint"])) for case in cases[name]]
    found = [[(each["check"], each["layers"]) for each in cell if each["check"] != "batch-size"] for cell in cells]
    assert found[0] == found[1] != []


def test_the_rule_of_the_article_follows_the_loss_of_all_replicas(cases):
    two, one = cases["the article's scale"]
    assert len(set(two["scale"])) > 2
    assert np.array(two["scale"], float) == pytest.approx(np.array(one["scale"], float), rel=5e-3)


def test_examples_per_second_are_those_of_all_replicas(cases):
    two, _ = cases["several steps per call"]
    assert two["timed_blocks"] >= 3
    assert two["examples_per_s"] == pytest.approx(40 / two["step_time_ms_median"] * 1e3)


@pytest.mark.parametrize(
    ("name", "told"),
    [("statistics", ["BatchNormalization", "clips the gradients of each"]), ("Keras' scaling", ["of replica 0 alone"])],
)
def test_what_replicas_do_otherwise_is_told(cases, name, told):
    two, one = cases[name]
    assert (two["status"], two["initial_weights_digest"]) == ("ok", one["initial_weights_digest"])
    assert len(two["remarks"]) == len(told)
    assert all(part in remark for part, remark in zip(told, two["remarks"], strict=True))


def test_an_overflow_that_keras_applies_is_not_taken_for_a_fault_of_float16(cases):
    two, one = cases["an overflow that Keras does not see"]
    assert one["status"] == "ok"
    assert two["status"] == "diverged"
    assert "weights were not finite" in two["reason"]
    assert "overflow on another one is applied" in two["reason"]
    assert "Compare mixed-dynamic, which asks all replicas, before you blame float16" in two["reason"]
    assert ["of replica 0 alone" in remark for remark in two["remarks"]] == [True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a sum", "unsupported: the loss adds up its examples"),
        ("a share", "unsupported: the loss itself divides by the number of replicas"),
        ("a batch too large", "take 180 examples per step, and the training set has 160; choose a batch of at most 80"),
        ("batches of several sizes", "first 2 have no 2 in a row with the same number of examples"),
        ("accumulated gradients", "SGD has gradient_accumulation_steps, which Keras cannot do on replicas"),
        ("an optimizer made outside", "the variable sgd/iteration was made before replicas were"),
    ],
)
def test_what_replicas_cannot_train_is_refused(cases, name, message):
    assert message in cases[name]
