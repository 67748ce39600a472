"""The parts of a training: the order of the data, the log of the steps, the evaluation."""

import keras
import numpy as np
import pytest

from mpscale.core.case import Settings
from mpscale.core.mode import MODES
from mpscale.scaling import LogMaxLossScale
from mpscale.worker.batches import Batches
from mpscale.worker.scaler import scaler_for
from mpscale.worker.step import MOST_UNREAD, Log, TrainStep
from mpscale.worker.timing import Timing, keep_going, time_empty_call, time_steps, warm_up
from mpscale.worker.training import Evaluator, Training, batches, first_pause, train
from mpscale.worker.update import Update
from mpscale.workloads import Data, Workload
from mpscale.workloads.workload import sparse_cross_entropy


@pytest.mark.parametrize("batch_size", [5, 4], ids=["whole batches", "the incomplete batch is left out"])
def test_every_epoch_shows_every_example_at_most_once(batch_size):
    order = batches(examples=10, batch_size=batch_size, steps=5, seed=0)
    assert order.shape == (5, batch_size)
    assert all(len(set(epoch.ravel())) == 2 * batch_size for epoch in (order[:2], order[2:4]))
    assert not np.array_equal(order[:2], order[2:4])


def test_order_comes_from_the_seed_alone():
    np.testing.assert_array_equal(batches(50, 5, 30, seed=3), batches(50, 5, 30, seed=3))
    assert not np.array_equal(batches(50, 5, 30, seed=3), batches(50, 5, 30, seed=4))
    np.testing.assert_array_equal(batches(50, 5, 30, seed=3)[:7], batches(50, 5, 7, seed=3))


@pytest.mark.parametrize("size", [0, 11, -1])
def test_batch_that_cannot_be_drawn_is_refused(size):
    with pytest.raises(ValueError, match="choose a batch_size from 1 to 10"):
        batches(10, size, 1, 0)


def test_a_batch_above_the_training_set_repeats_it_if_asked_to():
    order = batches(10, 25, 2, seed=0, repeat=True)
    assert order.shape == (2, 25)
    assert np.bincount(order.ravel()).tolist() == [5] * 10
    np.testing.assert_array_equal(batches(10, 5, 6, 0, repeat=True), batches(10, 5, 6, 0))


DATA = Data(
    np.arange(40, dtype=np.float32).reshape(20, 2) / 40,
    np.arange(20) % 2,
    np.ones((7, 2), np.float32),
    np.ones(7, np.int64),
)


def hidden():
    return keras.layers.Dense(4, activation="tanh")


def make_step(mode="mixed-dynamic", jit=True, layer=hidden, **dynamic):
    """A step of a model whose first layer computes in the mode's precision; without it nothing could overflow."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(MODES[mode].policy)
    model = keras.Sequential([keras.Input((2,)), layer(), keras.layers.Dense(2, dtype="float32")])
    keras.config.set_dtype_policy("float32")
    scaler = scaler_for(MODES[mode], keras.optimizers.SGD(0.1), Settings(dynamic_scale=dynamic))
    shown = Batches((DATA.train_x, DATA.train_y), batches(20, 5, 8, seed=0))
    return TrainStep(Update(model, scaler, sparse_cross_entropy), shown, jit)


# Every mode is compiled by XLA below.
@pytest.mark.parametrize("jit", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    ("mode", "scale", "overflow"),
    [
        ("fp32", None, None),
        ("mixed-bf16", None, None),
        ("mixed-unscaled", None, None),
        ("mixed-static", [128.0], [False]),
        ("mixed-dynamic", [2.0**15], [False]),
        ("mixed-logmax", [LogMaxLossScale().initial], [False]),
        ("mixed-keras", [2.0**15], [False]),
        ("graph-rewrite", [2.0**15], [False]),
        ("article", [1.0], None),
    ],
)
def test_log_has_the_columns_of_the_mode(mode, scale, overflow, jit):
    step = make_step(mode, jit)
    step()
    log, empty = step.read_log(), step.read_log()
    assert (len(log), len(empty)) == (1, 0)
    assert np.isfinite(log.loss).all()
    for name, expected in (("scale", scale), ("overflow", overflow)):
        found = [None if column is None else column.tolist() for column in (getattr(log, name), getattr(empty, name))]
        assert found == ([None, None] if expected is None else [expected, []])


@pytest.mark.parametrize("mode", ["mixed-dynamic", "mixed-keras"])
def test_a_dynamic_scale_starts_and_grows_as_the_settings_say(mode):
    step = make_step(mode, initial=2.0**10, growth_interval=3)
    for _ in range(7):
        step()
    assert step.read_log().scale.tolist() == [2.0**10] * 3 + [2.0**11] * 3 + [2.0**12]


def test_overflow_of_keras_is_seen_when_its_scale_cannot_fall_any_further():
    step = make_step("mixed-keras")
    for scale, overflow in ((2.0**15, 0.0), (np.inf, 1.0), (2.0**15, 0.0)):
        step.update.scaler.optimizer.dynamic_scale.assign(scale)
        step()
        assert step.read_log().overflow == [overflow]


def test_statistics_that_are_not_trained_count_as_weights():
    normalization = keras.layers.BatchNormalization()
    step = make_step("fp32", jit=False, layer=lambda: normalization)
    assert step.weights_finite()
    normalization.moving_mean.assign([np.nan, 0.0])
    assert not step.weights_finite()


def test_log_is_read_in_pieces_and_in_order():
    step = make_step(jit=False, growth_interval=1, initial=1.0, growth_factor=1.001)
    pieces = []
    for count in (1, MOST_UNREAD, 0, 30):
        for _ in range(count):
            step()
        pieces.append(step.read_log())
        assert len(pieces[-1]) == count
    scales = Log.joined(pieces).scale
    np.testing.assert_allclose(scales, 1.001 ** np.arange(MOST_UNREAD + 31), rtol=1e-3)
    assert (np.diff(scales) > 0).all()


@pytest.mark.parametrize(("examples", "batch"), [(1, 10), (7, 10), (10, 10), (11, 10), (25, 10), (3, 1)])
def test_evaluation_sees_every_example_once(examples, batch):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    x = np.arange(examples, dtype=np.float32)[:, None]
    seen = []

    def metric(labels, outputs, mask):
        assert mask is None
        seen.append((labels, outputs))
        return 1.0

    assert Evaluator(model, metric, jit=True, batch=batch)(x, x[:, 0]) == 1.0
    ((labels, outputs),) = seen
    np.testing.assert_array_equal(outputs[:, 0], labels)
    assert len(outputs) == examples


def workload(**options):
    return Workload("x", "", *[lambda: None] * 3, **{"evaluate_every": 10, **options})


def test_training_notes_when_the_target_was_reached():
    step = make_step(jit=False)
    metrics = iter([0.1, 0.5, 0.95, 0.2, 0.99])
    step()
    done = train(step, 50, workload(target=0.9), lambda: next(metrics), lambda taken: None)
    assert done.steps_to_target == 30
    assert 0 < done.time_to_target_s < done.wall_time_s
    assert len(done.log) == 50
    assert next(metrics) == 0.2  # Nothing is evaluated once the target has been reached.


@pytest.mark.parametrize("lost", [False, True], ids=["to the end", "until the weights are lost"])
@pytest.mark.parametrize(
    ("evaluate_every", "steps"),
    [
        (1, 30),
        pytest.param(2, 30, marks=pytest.mark.slow),  # as 8, also a divisor
        (3, 3),
        (8, 30),
        pytest.param(10, 30, marks=pytest.mark.slow),  # as 8, above the steps that open a training
        (5000, MOST_UNREAD + 60),
    ],
)
def test_training_does_not_depend_on_how_many_steps_opened_it(evaluate_every, steps, lost):
    """The steps before the first evaluation may be taken beforehand."""
    found = []
    for opening in {1, min(8, first_pause(evaluate_every, steps))}:
        layers = []
        step = make_step("mixed-unscaled", False, lambda layers=layers: layers.append(hidden()) or layers[0])
        step()
        if lost:
            layers[0].kernel.assign(np.full((2, 4), np.nan))
        for _ in range(opening - 1):
            step()
        metrics, seen = iter(np.arange(40) / 4), []
        given = workload(target=0.5, evaluate_every=evaluate_every)
        done = train(step, steps, given, lambda metrics=metrics: next(metrics), seen.append)
        found.append((str(done.log.loss.tolist()), done.steps_to_target, done.weights_finite, seen))
    assert len(found) == 2
    assert found[0] == found[1]


def test_training_ends_when_the_weights_are_lost():
    layer = hidden()
    step = make_step("mixed-unscaled", layer=lambda: layer)
    step()
    layer.kernel.assign(np.full((2, 4), np.nan))
    done = train(step, 500, workload(), lambda: 0.0, lambda taken: None)
    assert len(done.log) == 10
    assert done.status == ("diverged", "the weights were not finite after 10 steps")


def log(*columns):
    return Log(*map(np.array, columns))


@pytest.mark.parametrize(
    ("rows", "finite", "status"),
    [
        (log([1.0] * 100), True, "ok"),
        (log([1.0] * 100), False, "diverged"),
        (log([np.nan] * 100), True, "diverged"),
        (log([np.nan] * 50 + [1.0] * 50), True, "ok"),
        (log([1.0] * 100, [8.0] * 100, [1] * 95 + [0] * 5), True, "stalled"),
        (log([1.0] * 100, [8.0] * 100, [1] * 94 + [0] * 6), True, "ok"),
        (log([np.inf] * 100, [8.0] * 100, [1] * 100), True, "stalled"),
    ],
)
def test_status_follows_from_losses_overflow_and_weights(rows, finite, status):
    assert Training(rows, 1.0, finite).status[0] == status


def test_counts_follow_from_the_log():
    training = Training(log([2.0, np.inf, 1.0, 1.0, 1.0], [8, 8, 4, 2, 4], [1, 1, 0, 1, 0]), 3.0, True)
    values = training.values()
    expected = {
        "attempted_steps": 5,
        "applied_steps": 2,
        "skipped_steps": 3,
        "overflow_steps": 3,
        "longest_skip_run": 2,
        "first_overflow_step": 0,
        "last_overflow_step": 3,
        "nonfinite_loss_steps": 1,
        "loss_scale_initial": 8.0,
        "loss_scale_final": 4.0,
        "loss_scale_min": 2.0,
        "loss_scale_max": 8.0,
    }
    assert values.items() >= expected.items()


def test_log_and_ledger_count_alike():
    step = make_step(initial=2.0**126, maximum=2.0**126, growth_interval=3)
    step()
    done = train(step, 200, workload(), lambda: 0.0, lambda taken: None)
    counters = step.update.scaler.optimizer.counters()
    values = done.values()
    for name in ("attempted", "applied", "skipped", "overflow"):
        assert values[f"{name}_steps"] == counters[name]
    assert values["longest_skip_run"] == counters["longest_skip_run"]
    assert counters["overflow"] > 3


def test_hysteresis_reaches_the_rule():
    step = make_step(initial=2.0**126, maximum=2.0**126, hysteresis=2)
    for _ in range(4):
        step()
    log = step.read_log()
    assert log.scale.tolist() == [2.0**power for power in (126, 126, 125, 124)]
    assert log.overflow.all()


def test_timing_is_made_of_blocks():
    timing = Timing(np.array([0.02, 0.04, 0.03]), 10, 6)
    values = timing.values(batch_size=50, empty_call_s=0.0009)
    assert values["step_time_ms_median"] == pytest.approx(3.0)
    assert values["examples_per_s"] == pytest.approx(50 / 3e-3)
    assert values["step_time_ms_per_applied"] == pytest.approx(90 / 24)
    assert values["timed_steps"] == 30
    assert values["dispatch_share"] == pytest.approx(0.3)
    assert values["dispatch_bound"] is False
    assert Timing(np.array([0.01]), 10, 10).values(1, 0.0)["step_time_ms_per_applied"] is None
    assert "timed_overflow_steps" not in Timing(np.array([0.01]), 10, None).values(1, 0.0)


def test_timing_has_its_blocks_and_counts_its_overflows_apart():
    step = make_step("mixed-static")
    step()
    timing = time_steps(step, warm_up(step), seconds=0.05, min_blocks=5)
    assert len(timing.block_s) >= 5
    assert timing.overflow_steps == 0
    assert (timing.block_s > 0).all()
    assert 0 < time_empty_call(step) < 1


def overflowing():
    return make_step(initial=2.0**126, maximum=2.0**126, minimum=2.0**126)


def overflowing_in_keras():
    step = make_step("mixed-keras")
    step.update.scaler.optimizer.dynamic_scale.assign(np.inf)
    return step


@pytest.mark.parametrize(
    ("make", "overflows"),
    [
        (overflowing, 20),
        (lambda: make_step(initial=2.0**24, growth_interval=3), "some"),
        (overflowing_in_keras, 20),
        (lambda: make_step("mixed-keras", jit=False), 0),
        (lambda: make_step("mixed-static", jit=False), 0),
        (lambda: make_step("fp32", jit=False), None),
        (lambda: make_step("article", jit=False), None),
    ],
)
def test_overflows_of_a_block_are_counted_without_its_log(make, overflows):
    step, logged = make(), make()
    for steps in (7, 13):
        step.block(steps)
        for _ in range(steps):
            logged()
    assert len(step.read_log()) == 0
    overflow = logged.read_log().overflow
    in_log = 0 if overflow is None else int(overflow.sum())
    if overflows == "some":
        assert 2 < in_log < 18
        overflows = in_log
    assert in_log == (overflows or 0)
    assert step.overflow_steps() == logged.overflow_steps() == overflows


def test_only_overflows_of_timed_steps_are_counted():
    step = overflowing()
    for _ in range(3):
        step()
    assert time_steps(step, about_s=1e-6 / 300, seconds=1e-6, min_blocks=1).overflow_steps == 300
    timing = time_steps(step, about_s=1e-6 / 20, seconds=5e-6, min_blocks=5)
    assert timing.overflow_steps == timing.steps >= 100
    assert len(step.read_log()) == 3


def test_extra_steps_for_energy_count_their_overflows():
    step = overflowing()
    step()
    steps, overflows = keep_going(step, 4, seconds=0.05)
    assert steps == overflows > 0
    assert steps % 4 == 0
    step = make_step("fp32")
    assert keep_going(step, 4, seconds=0.05)[1] is None
    assert keep_going(overflowing(), 4, seconds=-1.0) == (0, 0)


def fifty_losses(mode):
    """The losses of a small problem that half precision can represent."""
    step = make_step(mode)
    for _ in range(50):
        step()
    return step.read_log().loss


@pytest.fixture(scope="module")
def float32():
    return fifty_losses("fp32")


@pytest.mark.parametrize("mode", [name for name in MODES if name != "article"])
def test_every_mode_but_the_articles_follows_float32(float32, mode):
    np.testing.assert_allclose(fifty_losses(mode), float32, rtol=0.01)


def test_articles_rule_multiplies_the_updates():
    """It cannot follow float32 with SGD, for which scaled gradients mean longer steps."""
    step = make_step("article")
    for _ in range(300):
        step()
    log = step.read_log()
    expected = [1.0]
    for value in log.loss[:-1]:
        scaled = np.float32(value * np.float32(expected[-1]))
        factor = 0.9 if scaled > expected[-1] else 1.1 if scaled < np.float32(expected[-1] / 2) else 1.0
        expected.append(np.float32(expected[-1] * np.float32(factor)))
    np.testing.assert_allclose(log.scale, expected, rtol=1e-4)
