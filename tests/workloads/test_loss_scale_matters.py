"""The workloads that leave float16's range at one of its ends, and so show what a loss scale is for."""

import keras
import numpy as np
import pytest
from support import one_case

from mpscale.presets import PRESETS
from mpscale.workloads import builtin, registry

CHANCE = np.log(10)
"""The loss of a model that knows nothing about ten classes."""


def trained(name, mode, steps):
    try:
        return one_case.train(registry.get(name), mode, train_steps=steps)  # XLA takes twice as long
    finally:
        keras.utils.clear_session()


@pytest.fixture(scope="module")
def padded():
    return {mode: trained("padded-gru", mode, 160) for mode in ("mixed-unscaled", "mixed-dynamic")}


@pytest.fixture(scope="module")
def diabetes():
    return {mode: trained("diabetes-sum", mode, 150) for mode in ("mixed-static", "mixed-dynamic")}


@pytest.mark.slow  # the smaller workloads below show the same; docs/workloads.md has the figures
def test_without_a_scale_a_recurrent_layer_behind_padding_learns_nothing(padded):
    assert padded["mixed-unscaled"].status == "ok"  # nothing overflows, so nothing warns of it
    assert padded["mixed-unscaled"].row["train_loss_final"] == pytest.approx(CHANCE, abs=0.02)
    assert padded["mixed-unscaled"].row["final_accuracy"] < 0.15


@pytest.mark.slow
def test_with_a_scale_it_learns(padded):
    assert padded["mixed-dynamic"].row["train_loss_final"] < 2.0
    assert padded["mixed-dynamic"].row["final_accuracy"] > 0.5


@pytest.fixture(scope="module")
def beam():
    return {mode: trained("beam-strain", mode, 200) for mode in ("mixed-static", "mixed-dynamic")}


def test_a_scale_of_128_is_too_small_for_a_loss_of_strain(beam):
    # Nothing overflows, and the last layer, which is float32, learns.
    assert (beam["mixed-static"].status, beam["mixed-static"].row["overflow_steps"]) == ("ok", 0)
    assert beam["mixed-static"].row["metric_value"] < 0.7


def test_a_dynamic_scale_starts_high_enough_for_it_and_grows(beam):
    dynamic = beam["mixed-dynamic"].row
    assert dynamic["metric_value"] > 0.9
    assert (dynamic["growth_interval"], dynamic["loss_scale_final"]) == (40, 2.0**19)


@pytest.mark.parametrize("workload", builtin.WORKLOADS, ids=lambda w: w.name)
def test_the_growth_interval_of_a_small_workload_is_a_tenth_of_its_training(workload):
    assert workload.growth_interval == pytest.approx(workload.train_steps / 10, rel=0.05)


def test_a_scale_of_128_is_too_large_for_a_sum_of_squares(diabetes):
    assert diabetes["mixed-static"].status == "stalled"
    assert diabetes["mixed-static"].row["overflow_steps"] == 150


def test_a_dynamic_scale_falls_until_it_fits(diabetes):
    dynamic = diabetes["mixed-dynamic"].row
    assert 5 < dynamic["overflow_steps"] < 30
    assert dynamic["loss_scale_final"] < 128
    assert dynamic["metric_value"] < 60 < 140 < diabetes["mixed-static"].row["metric_value"]


@pytest.mark.parametrize("preset", ["small", "full"])
def test_presets_train_them_without_a_scale_too(preset):
    for name in ("padded-gru", "beam-strain", "diabetes-sum"):
        assert name in PRESETS[preset].workloads
        assert "mixed-unscaled" in PRESETS[preset].apart[name].modes
