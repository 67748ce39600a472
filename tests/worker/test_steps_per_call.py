"""Several steps in one call of the compiled program: the same training, with everything still recorded per step."""

import gzip
from collections import Counter

import keras
import numpy as np
import pytest
from support.one_case import blobs, dense, split, workload
from support.one_case import train as train_case

from mpscale import testing
from mpscale.core.case import Settings
from mpscale.core.mode import MODES
from mpscale.core.reason import Code
from mpscale.worker.batches import Batches
from mpscale.worker.scaler import scaler_for
from mpscale.worker.step import TrainStep
from mpscale.worker.timing import Timing, keep_going, time_one_per_call, time_steps, warm_up
from mpscale.worker.training import batches, train
from mpscale.worker.update import Update
from mpscale.workloads import registry

K = 20
BLOBS = split(*blobs())


@pytest.fixture(autouse=True)
def restored_policy():
    yield
    keras.config.set_dtype_policy("float32")


def make_step(steps_per_call, mode="mixed-dynamic", jit=False, name=None, **dynamic):
    """A step of a shipped workload, or of a small model without a name."""
    shown = workload(dense(), lambda: BLOBS) if name is None else registry.get(name)
    data = shown.data()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(MODES[mode].policy)
    scaler = scaler_for(MODES[mode], shown.optimizer(), Settings(dynamic_scale=dynamic))
    order = batches(len(data.train_x), 20, 300, seed=0)
    return TrainStep(
        Update(shown.model(), scaler, shown.loss), Batches((data.train_x, data.train_y), order), jit, steps_per_call
    )


def trained(step, steps=65, evaluate_every=100):
    """Train to the end; return the result and the final weights."""
    step()
    progress = []
    result = train(
        step, steps, workload(dense(), lambda: BLOBS, evaluate_every=evaluate_every), lambda: 0.0, progress.append
    )
    return result, progress, [v.numpy() for v in step.update.model.variables]


def assert_same_training(one, other):
    logs = [vars(result.log) for result, _, _ in (one, other)]
    for name, column in logs[0].items():
        np.testing.assert_array_equal(column, logs[1][name], strict=column is not None)
    assert one[1] == other[1]
    for ours, theirs in zip(one[2], other[2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "mode", "jit"),
    [
        (None, "fp32", False),
        (None, "mixed-static", False),
        (None, "mixed-bf16", False),
        (None, "mixed-logmax", False),
        (None, "mixed-keras", False),
        (None, "article", False),
        (None, "mixed-dynamic", True),
        ("mnist1d-mlp", "mixed-dynamic", False),
        # As the small network, with a program that takes twice as long to compile.
        pytest.param("mnist1d-mlp", "mixed-dynamic", True, marks=pytest.mark.slow),
        ("mnist1d-cnn", "fp32", False),
    ],
)
def test_training_is_that_of_single_steps_to_the_last_bit(name, mode, jit):
    assert_same_training(*(trained(make_step(k, mode, jit, name)) for k in (1, K)))


@pytest.mark.slow  # about TensorFlow; mnist1d-cnn above is about ours
def test_convolutions_compiled_by_xla_on_a_cpu_are_summed_in_another_order():
    """XLA brings convolutions outside of loops only into the layout of its fast kernels; see docs/method.md."""
    one, other = (trained(make_step(k, "fp32", True, "mnist1d-cnn"), 41)[0].log.loss for k in (1, K))
    assert one[0] == other[0]
    np.testing.assert_allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize("jit", [False, True])
def test_overflow_inside_a_call_is_logged_and_counted_at_its_own_step(jit):
    def overflowing(k):
        step = make_step(k, "mixed-dynamic", jit)
        apply, inject = step.update.scaler.apply, testing.inject_overflow(step=[7, 30])
        step.update.scaler.apply = lambda grads, variables, loss: apply(inject(grads, variables), variables, loss)
        return step

    steps = [overflowing(k) for k in (1, K)]
    results = [trained(step) for step in steps]
    assert_same_training(*results)
    log = results[1][0].log
    assert np.flatnonzero(log.overflow).tolist() == [7, 30]
    assert log.scale[[7, 8, 30, 31]].tolist() == [2.0**15, 2.0**14, 2.0**14, 2.0**13]
    values = results[1][0].values()
    assert [values[name] for name in ("first_overflow_step", "last_overflow_step", "applied_steps")] == [7, 30, 63]
    assert steps[1].overflow_steps() == steps[1].update.scaler.optimizer.counters()["overflow"] == 2


@pytest.mark.parametrize(
    ("k", "steps", "evaluate_every", "calls", "single"),
    [
        (K, 65, 100, 3, 5),
        (K, 61, 100, 3, 1),
        (K, 45, 30, 1, 25),
        (K, 65, 10, 0, 65),
        (100, 65, 1000, 0, 65),
        (1, 65, 30, 0, 65),
    ],
    ids=["remainder", "no remainder", "evaluation between", "evaluation within", "longer than training", "one"],
)
def test_calls_fit_between_evaluations_and_single_steps_fill_up(k, steps, evaluate_every, calls, single):
    step, taken = make_step(k), Counter()
    for name in ("_several", "_function"):
        setattr(step, name, counted(getattr(step, name), name, taken))
    result = trained(step, steps, evaluate_every)
    assert (taken["_several"], taken["_function"]) == (calls, single)
    assert (step.first_call_s is None) is (calls == 0)
    assert len(result[0].log) == steps
    assert_same_training(result, trained(make_step(1), steps, evaluate_every))


def counted(function, name, counts):
    def call():
        counts[name] += 1
        return function()

    return call


@pytest.mark.parametrize(("k", "about", "per_block"), [(4, 1, 4), (4, 9, 8), (4, 11, 12), (1, 9, 9)])
def test_timed_blocks_are_whole_calls_and_count_steps(k, about, per_block):
    step = make_step(k, initial=2.0**126, maximum=2.0**126, minimum=2.0**126)
    step()
    timing = time_steps(step, about_s=1e-3 / about, seconds=3e-3, min_blocks=3)
    assert (timing.steps_per_block, timing.steps_per_call) == (per_block, k)
    assert timing.overflow_steps == timing.steps == len(timing.block_s) * per_block
    steps, overflows = keep_going(step, per_block, seconds=0.01)
    assert steps == overflows > 0
    assert (step.overflow_steps(), int(step.batches.position)) == (1 + timing.steps + steps,) * 2
    assert time_steps(step, 1e-3 / about, 3e-3, 3, one_per_call=True).steps_per_block == about


def test_dispatch_is_shared_by_the_steps_of_a_call():
    values = Timing(np.array([0.04]), 40, None, steps_per_call=20).values(batch_size=1, empty_call_s=0.001)
    assert values["dispatch_share"] == pytest.approx(0.05)


def test_single_steps_are_timed_in_the_same_process():
    step, taken = make_step(4), Counter()
    step()
    warm_up(step)
    for name in ("_several", "_function"):
        setattr(step, name, counted(getattr(step, name), name, taken))
    assert 0 < time_one_per_call(step, 0.05, 2) < 1000
    assert set(taken) == {"_function"}


def outcome_of(path, **settings):
    shown = workload(dense(), lambda: BLOBS, optimizer=lambda: keras.optimizers.SGD(0.1))
    found = train_case(shown, "mixed-dynamic", steps_path=path, timing_blocks=4, **settings)
    assert found.status == "ok"
    return found, gzip.decompress(path.read_bytes())


def test_case_has_the_same_figures_and_steps_and_its_own_columns(tmp_path):
    one, ours = outcome_of(tmp_path / "one", timing_s=0.05)
    other, theirs = outcome_of(tmp_path / "several", timing_s=0.05, steps_per_call=K)
    assert ours == theirs
    timed = {"build_time_s", "trace_time_s", "first_step_s", "train_wall_time_s", "examples_per_s"}
    own = {"first_call_s", "step_time_ms_one_per_call"}
    # Keras numbers the layers of a process, which lint names.
    for name in one.row.keys() - timed - {"series_key", "lint"}:
        assert name.startswith(("step_time", "timed_", "dispatch_")) or one.row[name] == other.row[name], name
    assert all(other.row[name] > 0 for name in own)
    assert {name: reason.code for name, reason in one.missed.items() if name in own} == dict.fromkeys(
        own, Code.NOT_ASKED_FOR
    )
    assert other.row["timed_steps"] % K == 0
    assert (
        one.row["series_key"] == other.row["series_key"].replace(f",steps_per_call={K}", "") != other.row["series_key"]
    )


def test_call_that_was_never_made_has_no_first_time(tmp_path):
    found, _ = outcome_of(tmp_path / "steps", steps_per_call=1000)
    assert found.missed["first_call_s"].code == Code.NEVER_HAPPENED
    assert found.row["attempted_steps"] == 60
