"""Saving and restoring keeps every bit of the optimizer's state, including loss scale and counters."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import small_model, step_function

from mpscale.scaling import DynamicLossScale, LogMaxLossScale, LossScaleOptimizer, StaticLossScale

MAKE = {
    "dynamic": lambda: LossScaleOptimizer(keras.optimizers.Adam(0.01), DynamicLossScale(8.0, growth_interval=3)),
    "hysteresis, blame": lambda: LossScaleOptimizer(
        keras.optimizers.SGD(0.01, momentum=0.9), DynamicLossScale(8.0, hysteresis=3), blame=True, alarm="stop"
    ),
    "static": lambda: LossScaleOptimizer(keras.optimizers.AdamW(0.01, use_ema=True), StaticLossScale(4.0), skip="gate"),
    "logmax": lambda: LossScaleOptimizer(keras.optimizers.Lion(0.01), LogMaxLossScale()),
    "a variable that Keras does not list": lambda: LossScaleOptimizer(keras.optimizers.Nadam(0.01)),
    "window": lambda: LossScaleOptimizer(keras.optimizers.Adam(0.01, gradient_accumulation_steps=4)),
}
FACTORS = [1.0, 1.0, np.inf, 1.0, 1.0, np.nan, 1.0]


def trained(make):
    model = small_model()
    model.compile(make(), "mse")
    step = step_function(model, model.optimizer, "graph")
    for i, factor in enumerate(FACTORS):
        step(factor, i / 10)
    return model, step


def through_keras(model, make, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def through_weights(model, make, folder):
    fresh = small_model()
    fresh.compile(make(), "mse")
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.set_weights(model.get_weights())
    fresh.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])
    return fresh


def through_checkpoint(model, make, folder):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "checkpoint")
    fresh = small_model()
    fresh.compile(make(), "mse")
    fresh.optimizer.build(fresh.trainable_variables)
    tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).restore(path).assert_consumed()
    return fresh


def bits(model):
    hidden = getattr(model.optimizer.inner_optimizer, "_u_product", None)
    variables = [*model.variables, *model.optimizer.variables, *([] if hidden is None else [hidden])]
    return [v.numpy().tobytes() for v in variables]


@pytest.mark.parametrize(
    ("name", "through"),
    [
        # Every kind of variable by Keras' files, which know the fewest names; by the others, those that are left out
        # most easily.
        pytest.param(
            name,
            through,
            marks=pytest.mark.slow if through is not through_keras and name in ("static", "logmax", "dynamic") else [],
        )
        for name in MAKE
        for through in (through_keras, through_weights, through_checkpoint)
    ],
)
def test_every_bit_is_restored_and_training_continues_alike(name, through, tmp_path):
    model, step = trained(MAKE[name])
    loaded = through(model, MAKE[name], tmp_path)
    assert bits(loaded) == bits(model)
    assert loaded.optimizer.counters() | {"by_variable": None} == model.optimizer.counters() | {"by_variable": None}
    assert loaded.optimizer.trajectory() == model.optimizer.trajectory()
    for setting in ("loss_scale", "blame", "alarm", "skip"):
        assert getattr(loaded.optimizer, setting) == getattr(model.optimizer, setting)
    loaded_step = step_function(loaded, loaded.optimizer, "graph")
    for factor in (1.0, np.inf, 1.0, 1.0):
        step(factor)
        loaded_step(factor)
    assert bits(loaded) == bits(model)


OWN = ["iteration", "learning_rate", "scale", "good_steps", "tolerance"]
LOGMAX = ["iteration", "learning_rate", "scale", "mean", "slow_mean", "variance", "samples"]
LEDGER = ["steps", "scale_change_steps", "scale_changes"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("dynamic", [*OWN, *LEDGER]),
        ("hysteresis, blame", [*OWN, *LEDGER, "overflows_by_variable"]),
        ("logmax", [*LOGMAX, *LEDGER, "largest_gradient"]),
        ("logmax, blame", [*LOGMAX, *LEDGER, "overflows_by_variable", "largest_gradient"]),
        ("window", [*OWN, *LEDGER, "window_finite"]),
    ],
)
def test_variables_keep_their_order_by_which_files_identify_them(name, names):
    make = MAKE | {"logmax, blame": lambda: LossScaleOptimizer(keras.optimizers.SGD(), LogMaxLossScale(), blame=True)}
    optimizer = make[name]()
    optimizer.build(small_model().trainable_variables)
    own = optimizer.variables[: -len(optimizer.inner_optimizer.variables)]
    assert [variable.name for variable in own] == names


def test_a_program_that_imports_the_package_can_load_models(tmp_path):
    model = small_model()
    model.compile(LossScaleOptimizer(keras.optimizers.SGD(), StaticLossScale(4.0)), "mse")
    model.save(tmp_path / "model.keras")
    load = f"keras.saving.load_model({str(tmp_path / 'model.keras')!r})"
    program = f"import keras, mpscale.scaling; print({load}.optimizer.loss_scale)"
    assert output_of(program) == "StaticLossScale(scale=4.0, skip_nonfinite=True)\n"


def test_rules_need_no_tensorflow():
    program = (
        "import sys; from mpscale.core.loss_scale import DynamicLossScale; "
        "print(DynamicLossScale.parse('initial=2**20, hysteresis=2')); "
        "print({'tensorflow', 'keras', 'numpy'} & sys.modules.keys())"
    )
    assert output_of(program) == "{'initial': 1048576.0, 'hysteresis': 2}\nset()\n"


def output_of(program):
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
