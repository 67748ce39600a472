"""The modes of a seed must train the same."""

import json

import pytest

from mpscale.core.case import Case, Settings
from mpscale.core.record import Record
from mpscale.harness.same_start import SameStart

WORK = {
    "initial_weights_digest": "sha256:a",
    "data_order_digest": "sha256:b",
    "data_digest": "sha256:c",
    "model_digest": "sha256:d",
    "optimizer_config": json.dumps({"class": "SGD", "learning_rate": 0.1, "momentum": 0.0}),
    "loss_inputs": "labels int64 (6,); outputs (6, 3)",
    "loss_probe": 1.25,
    "step_operations": "MatMul 5, Relu 1",
    "process_settings": "none",
    "workload_digest": "sha256:e",
}


def difference(same, mode, seed=0, **values):
    return same.difference(Case("w", mode, seed, 0, 0, Settings()), Record({**WORK, **values}))


@pytest.fixture
def same():
    same = SameStart()
    assert difference(same, "fp32") is None
    return same


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"initial_weights_digest": "sha256:z"}, "other initial weights (sha256:z, fp32 had sha256:a)"),
        ({"data_digest": "sha256:z"}, "other data (sha256:z, fp32 had sha256:c)"),
        ({"model_digest": "sha256:z", "workload_digest": "sha256:y"}, "other model (sha256:z, fp32 had sha256:d)."),
        ({"workload_digest": "sha256:y"}, "other workload digest (sha256:y, fp32 had sha256:e)"),
        (
            {"optimizer_config": json.dumps({"class": "SGD", "learning_rate": 0.2, "nesterov": True})},
            "(learning_rate 0.2, fp32 had 0.1, momentum none, fp32 had 0.0, nesterov True, fp32 had none)",
        ),
        ({"loss_inputs": "labels int64 (6, 1); outputs (6, 3)"}, "other labels or outputs (labels int64 (6, 1)"),
        ({"loss_probe": 1.2502}, "other loss (1.2502 on the same labels and outputs, fp32 had 1.25)"),
        ({"step_operations": "MatMul 5, Tanh 1"}, "other operations in the train step (Relu none, fp32 had 1, Tanh 1"),
        ({"process_settings": "deterministic operations"}, "other settings of the process (deterministic operations"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_difference_is_named(same, values, said):
    assert said in difference(same, "mixed-bf16", **values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss_probe": 1.25001},
        {"loss_probe": None},
        {"layer_dtypes": "float16 3"},
        {"product_dtypes": "float16 5"},
        dict.fromkeys(WORK),
    ],
)
def test_rounding_precision_and_unknown_values_make_no_difference(same, values):
    assert difference(same, "mixed-bf16", **values) is None


def test_seeds_are_not_compared(same):
    assert difference(same, "mixed-bf16", seed=1, initial_weights_digest="sha256:z") is None
    assert difference(same, "fp32", seed=1) is not None


def test_a_case_that_died_early_is_compared_by_what_it_had():
    same = SameStart()
    assert difference(same, "fp32", loss_probe=None, step_operations=None) is None
    assert difference(same, "mixed-static", data_digest="sha256:z", loss_probe=None) is not None
    assert difference(same, "mixed-bf16", step_operations="Tanh 1") is not None
    assert "mixed-bf16 had 1.25" in difference(same, "mixed-dynamic", loss_probe=2.0)
