"""Settings on LossScaleOptimizer are forwarded to the optimizer inside it, or refused."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.scaling import DynamicLossScale, LossScaleOptimizer, SettingTooLateWarning
from mpscale.scaling.inner import FORWARDED

OF_ITS_OWN = {"name", "built"}
WORKS_BY_ITSELF = {  # Keras' own code, independent of the inner optimizer
    *("add_variable", "add_variable_from_reference", "add_optimizer_variables", "assign", "assign_add", "assign_sub"),
    *("save_own_variables", "load_own_variables"),  # they use ``variables``
}
FORWARDED_BY_KERAS = {"iterations", "finalize_variable_values"}


def wrapped(inner=None, **options):
    return LossScaleOptimizer(inner or keras.optimizers.SGD(0.5), DynamicLossScale(8.0, growth_interval=100), **options)


def dense():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="ones")])


def steps(optimizer, count=3, gradient=3.0):
    """Return the weights after ``count`` steps with a constant gradient."""
    model = dense()
    variables = model.trainable_variables
    for _ in range(count):
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(sum(tf.reduce_sum(v.value) for v in variables) * gradient)
        grads = tape.gradient(loss, [v.value for v in variables])
        optimizer.apply_gradients(zip(grads, variables, strict=True))
    optimizer.finalize_variable_values(variables)
    return model.get_weights()


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_every_public_attribute_of_a_keras_optimizer_is_handled():
    """A new one, in a later Keras, fails here: it has to be forwarded, overridden or refused."""
    plain = keras.optimizers.Optimizer(0.1)
    of_tensorflow = public(tf.__internal__.tracking.AutoTrackable)
    overridden = {name for kind in LossScaleOptimizer.__mro__[:2] for name in vars(kind)}
    unknown = public(plain) - of_tensorflow - overridden - OF_ITS_OWN - WORKS_BY_ITSELF - FORWARDED_BY_KERAS
    assert not unknown


def test_every_public_attribute_of_keras_own_wrapper_is_handled():
    own = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    own.build(dense().trainable_variables)
    optimizer = wrapped()
    for name in public(own) - public(keras.optimizers.SGD(0.1)) - public(LossScaleOptimizer) - {"inner_optimizer"}:
        with pytest.raises(AttributeError, match="belongs to Keras' own"):
            getattr(optimizer, name)
        with pytest.raises(AttributeError, match="belongs to Keras' own"):
            setattr(optimizer, name, 4.0)


SETTINGS = {
    "weight_decay": 0.1,
    "clipnorm": 1.0,
    "global_clipnorm": 1.0,
    "clipvalue": 0.25,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 3,
    "momentum": 0.9,
    "nesterov": True,
    "learning_rate": 0.25,
}
COMPANIONS = {
    "ema_momentum": {"use_ema": True},
    "ema_overwrite_frequency": {"use_ema": True},
    "nesterov": {"momentum": 0.9},
}


def test_the_table_has_every_forwarded_setting():
    assert set(FORWARDED) <= set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_on_the_wrapper_trains_as_one_in_the_inner_constructor(name):
    settings = COMPANIONS.get(name, {}) | {name: SETTINGS[name]}
    expected = steps(keras.optimizers.SGD(**{"learning_rate": 0.5} | settings))
    optimizer = wrapped()
    for setting, value in settings.items():
        setattr(optimizer, setting, value)
        assert getattr(optimizer, setting) == value
    for ours, right in zip(steps(optimizer), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-6)
    without = steps(keras.optimizers.SGD(0.5, **COMPANIONS.get(name, {})))
    assert not np.array_equal(expected[0], without[0]), "the setting has to make a difference"


@pytest.mark.parametrize("name", ["weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "learning_rate"])
def test_a_setting_changed_between_two_steps_affects_the_next_one(name):
    def with_a_change(optimizer):
        model = dense()
        kernel = model.trainable_variables[0]
        for i in range(3):
            if i == 1:
                setattr(optimizer, name, SETTINGS[name])
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(tf.reduce_sum(kernel.value) * 3.0)
            optimizer.apply(tape.gradient(loss, [kernel.value]), [kernel])
        return model.get_weights()[0]

    np.testing.assert_allclose(with_a_change(wrapped()), with_a_change(keras.optimizers.SGD(0.5)), rtol=1e-6)


@pytest.mark.parametrize("by", ["var_list", "var_names"])
def test_a_variable_excluded_from_weight_decay_does_not_decay(by):
    model = dense()
    kernel, bias = model.trainable_variables
    bias.assign([1.0, 1.0])
    optimizer = wrapped(keras.optimizers.AdamW(0.1, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(**{by: [bias] if by == "var_list" else ["bias"]})
    zeros = [tf.zeros(v.shape) for v in (kernel, bias)]
    optimizer.scale_loss(0.0)
    optimizer.apply(zeros, [kernel, bias])
    assert kernel.numpy()[0, 0] == pytest.approx(0.95)
    assert bias.numpy()[0] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"loss_scale_factor": 128.0}, r"loss_scale=StaticLossScale\(128\.0\)", id="a second loss scale"),
        pytest.param({"gradient_accumulation_steps": 1}, "must be an integer >= 2", id="a window of one"),
        pytest.param({"use_ema": True, "ema_momentum": 2.0}, r"must be in the range \[0, 1\]", id="a momentum of two"),
        pytest.param({"clipnorm": 1.0, "clipvalue": 1.0}, "Only one of", id="two kinds of clipping"),
        pytest.param({"loss_scale": DynamicLossScale()}, "cannot be changed; make a new", id="another rule"),
        pytest.param({"inner_optimizer": keras.optimizers.SGD()}, "cannot be changed", id="another inner optimizer"),
        pytest.param({"blame": True}, "cannot be changed", id="blame afterwards"),
        pytest.param({"skip": "sometimes"}, "skip must be one of", id="a way to skip that does not exist"),
        pytest.param({"alarm": "loud"}, "alarm must be one of", id="an alarm that does not exist"),
        pytest.param({"clip_norm": 1.0}, "nor the SGD inside it has 'clip_norm'", id="a typing error"),
        pytest.param({"lr": 1.0}, "nor the SGD inside it has 'lr'", id="a name of Keras 2"),
        pytest.param({"beta_1": 0.5}, "nor the SGD inside it has 'beta_1'", id="a setting of another optimizer"),
        pytest.param({"dynamic_growth_steps": 10}, r"growth_interval=", id="a setting of Keras' own wrapper"),
        pytest.param({"iterations": 10}, "iterations", id="the iteration count"),
    ],
)
def test_settings_without_effect_are_refused(change, message):
    optimizer = wrapped()
    *before, (name, value) = change.items()
    for setting, allowed in before:
        setattr(optimizer, setting, allowed)
    with pytest.raises((ValueError, AttributeError), match=message):
        setattr(optimizer, name, value)


@pytest.mark.parametrize("change", [{"use_ema": True}, {"gradient_accumulation_steps": 2}], ids=lambda c: next(iter(c)))
def test_settings_that_need_variables_are_refused_after_build(change):
    optimizer = wrapped()
    optimizer.build(dense().trainable_variables)
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} cannot be changed once the optimizer is built"):
        setattr(optimizer, name, value)


def test_a_second_scale_set_on_the_inner_optimizer_is_refused_at_the_next_step():
    optimizer = wrapped()
    optimizer.inner_optimizer.loss_scale_factor = 128.0
    with pytest.raises(ValueError, match=r"has loss_scale_factor=128\.0"):
        steps(optimizer)


def test_settings_that_a_multi_optimizer_would_ignore_are_refused():
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1)))
    optimizer = wrapped(several)
    with pytest.raises(ValueError, match="clipnorm does nothing on a MultiOptimizer"):
        optimizer.clipnorm = 1.0
    with pytest.raises(ValueError, match="exclude_from_weight_decay does nothing on a MultiOptimizer"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])


@pytest.mark.parametrize("name", ["clipnorm", "weight_decay", "momentum", "skip"])
def test_a_setting_that_a_compiled_step_no_longer_reads_warns(name):
    optimizer = wrapped(keras.optimizers.SGD(0.5, momentum=0.5))
    variable = keras.Variable([1.0])
    step = tf.function(lambda: optimizer.apply([optimizer.scale_loss(tf.ones(1))], [variable]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(optimizer, name, "branch" if name == "skip" else 0.25)
        step()
        optimizer.learning_rate = 0.125  # every step reads it
    with pytest.warns(SettingTooLateWarning, match=f"{name} was changed after a step had been compiled"):
        setattr(optimizer, name, "gate" if name == "skip" else 0.75)


@pytest.mark.parametrize(
    ("name", "value"),
    [("clipnorm", 0.5), ("weight_decay", None), ("momentum", 0.5), ("skip", "auto"), ("alarm", "ignore")],
)
def test_settings_that_change_no_compiled_step_do_not_warn(name, value):
    """The value that the step was compiled with, and the alarm, which no step checks."""
    optimizer = wrapped(keras.optimizers.SGD(0.5, momentum=0.5, clipnorm=0.5))
    variable = keras.Variable([1.0])
    tf.function(lambda: optimizer.apply([optimizer.scale_loss(tf.ones(1))], [variable]))()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == value


def test_settings_that_only_the_inner_optimizer_has_are_read_and_set_there():
    optimizer = wrapped(keras.optimizers.Adam(0.1, beta_1=0.8))
    assert optimizer.beta_1 == 0.8
    optimizer.beta_1 = 0.7
    assert optimizer.inner_optimizer.beta_1 == 0.7
    with pytest.raises(AttributeError, match="rho"):
        _ = optimizer.rho


def test_a_subclass_may_have_attributes_of_its_own():
    class Noted(LossScaleOptimizer):
        def __init__(self, *args):
            super().__init__(*args)
            self.note = "mine"

    optimizer = Noted(keras.optimizers.SGD(0.5))
    optimizer.clipnorm = 1.0
    assert optimizer.note == "mine"
    assert optimizer.inner_optimizer.clipnorm == 1.0


def fitted(optimizer, *callbacks):
    keras.utils.set_random_seed(0)
    model = dense()
    model.compile(optimizer, "mse", jit_compile=False)
    x = np.arange(16, dtype=np.float32).reshape(8, 2) / 16
    model.fit(x, x, batch_size=4, epochs=4, verbose=0, callbacks=list(callbacks))
    return model.get_weights()


CALLBACKS = {
    "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1)),
    "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau("loss", min_delta=10.0, patience=1, factor=0.5),
    "SwapEMAWeights": lambda: keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_keras_callbacks_work_as_on_a_bare_optimizer(name):
    bare = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    optimizer = wrapped(keras.optimizers.SGD(0.1))
    optimizer.use_ema, optimizer.ema_momentum = True, 0.5
    for ours, right in zip(fitted(optimizer, CALLBACKS[name]()), fitted(bare, CALLBACKS[name]()), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5)
    assert float(optimizer.learning_rate) == float(bare.learning_rate)


def test_settings_are_saved_with_the_optimizer():
    optimizer = wrapped()
    optimizer.clipnorm, optimizer.weight_decay = 2.0, 0.125
    again = LossScaleOptimizer.from_config(optimizer.get_config())
    assert (again.clipnorm, again.weight_decay) == (2.0, 0.125)
