"""What LossScaleOptimizer counts, and when its alarm warns or raises."""

import warnings

import keras
import numpy as np
import pytest
from support.small_step import HOW, small_model, step_function

from mpscale.scaling import (
    DynamicLossScale,
    FloorOverflowError,
    FloorOverflowWarning,
    LossScaleMonitor,
    LossScaleOptimizer,
    NoLossScale,
    StaticLossScale,
)
from mpscale.scaling.ledger import TRAJECTORY
from mpscale.testing import inject_overflow

GOOD, BAD = 1.0, np.inf
NAMES = ("attempted", "applied", "skipped", "overflow", "longest_skip_run")
NAMES += ("first_overflow", "last_overflow", "floor_overflow")


@pytest.mark.parametrize(
    ("factors", "counters", "trajectory"),
    [
        pytest.param([], [0, 0, 0, 0, 0, None, None, 0], [(0, 8.0)], id="no step"),
        pytest.param([GOOD], [1, 1, 0, 0, 0, None, None, 0], [(0, 8.0)], id="a good step"),
        pytest.param([BAD], [1, 0, 1, 1, 1, 0, 0, 0], [(0, 8.0), (1, 4.0)], id="a bad step"),
        pytest.param(
            [BAD, GOOD, BAD, BAD, GOOD, BAD],
            [6, 2, 4, 4, 2, 0, 5, 2],
            [(0, 8.0), (1, 4.0), (3, 2.0)],
            id="runs, and overflow at the floor",
        ),
        pytest.param(
            [GOOD] * 3 + [BAD, GOOD],
            [5, 4, 1, 1, 1, 3, 3, 0],
            [(0, 8.0), (3, 16.0), (4, 8.0)],
            id="growth, then overflow",
        ),
    ],
)
@pytest.mark.parametrize("how", HOW)
def test_steps_are_counted(how, factors, counters, trajectory):
    model = small_model()
    scale = DynamicLossScale(8.0, growth_interval=3, minimum=2.0)
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), scale)
    step = step_function(model, optimizer, how)
    for factor in factors:
        step(factor)
    assert optimizer.counters() == {**dict(zip(NAMES, counters, strict=True)), "by_variable": None}
    assert optimizer.trajectory() == trajectory


def test_trajectory_keeps_the_latest_changes():
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.0), DynamicLossScale(8.0, growth_interval=1, maximum=16.0))
    step = step_function(model, optimizer, "xla")
    for i in range(TRAJECTORY + 10):
        step(BAD if i % 2 else GOOD)
    trajectory = optimizer.trajectory()
    assert len(trajectory) == TRAJECTORY
    assert trajectory[-1] == (TRAJECTORY + 10, 8.0)
    assert trajectory[-2] == (TRAJECTORY + 9, 16.0)
    assert trajectory[0] == (11, 16.0)


def at_the_floor(**options):
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), DynamicLossScale(2.0), **options)
    return model, optimizer, step_function(model, optimizer, "graph")


def test_alarm_waits_for_the_floor_and_warns_once():
    _, optimizer, step = at_the_floor()
    step(BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.check_alarm()
    step(BAD)
    with pytest.warns(FloorOverflowWarning, match=r"1 of 2 steps .* at its floor \(1\); .* step 1\. .*blame=True"):
        optimizer.check_alarm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.check_alarm()
    step(BAD)
    with pytest.warns(FloorOverflowWarning, match="2 of 3 steps"):
        optimizer.check_alarm()


def test_alarm_names_the_variables():
    model, optimizer, step = at_the_floor(blame=True, alarm="stop")
    for _ in range(2):
        step(BAD)
    with pytest.raises(
        FloorOverflowError, match=f"Non-finite gradients: {model.trainable_variables[0].path} \\(2 steps\\)"
    ):
        optimizer.check_alarm()


@pytest.mark.parametrize(
    ("loss_scale", "options"),
    [(DynamicLossScale(2.0), {"alarm": "ignore"}), (StaticLossScale(8.0), {}), (NoLossScale(), {})],
    ids=["ignored", "static", "none"],
)
def test_no_alarm_if_ignored_or_without_a_floor(loss_scale, options):
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale, **options)
    step = step_function(model, optimizer, "graph")
    for _ in range(3):
        step(BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.check_alarm()


def fitted(alarm, overflow_steps, epochs=3):
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.01), DynamicLossScale(2.0), alarm=alarm)
    model.compile(optimizer, "mse")
    with inject_overflow(step=overflow_steps).into(model):
        return model.fit(
            np.ones((20, 4), np.float32),
            np.zeros((20, 2), np.float32),
            batch_size=5,
            epochs=epochs,
            verbose=0,
            callbacks=[LossScaleMonitor(every=2)],
        )


def test_monitor_adds_scale_and_overflows_of_the_epoch_to_the_logs():
    history = fitted("ignore", [1, 5, 6]).history
    assert history["loss_scale"] == [1.0, 1.0, 1.0]
    assert history["overflow_steps"] == [1, 2, 0]


def test_monitor_warns_or_stops_the_training():
    with pytest.warns(FloorOverflowWarning, match="2 of"):
        assert len(fitted("warn", [1, 4, 5]).history["loss"]) == 3
    with pytest.warns(FloorOverflowWarning, match="training stops"):
        assert len(fitted("stop", [1, 4, 5]).history["loss"]) == 2


def test_monitor_refuses_other_optimizers_and_intervals():
    model = small_model()
    for optimizer in ("sgd", keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())):
        model.compile(optimizer, "mse")
        with pytest.raises(TypeError, match=r"watches an mpscale\.LossScaleOptimizer"):
            model.fit(np.ones((5, 4)), np.ones((5, 2)), callbacks=[LossScaleMonitor()], verbose=0)
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        LossScaleMonitor(every=0)
