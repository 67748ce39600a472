"""A train_step of the model's own, with one optimizer or several, trains as it does by itself, or is refused."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.compiled_models import BATCH, CLASSES, STEPS, OwnStep, X, dense, logged, logits, own_step, workload
from support.one_case import train

from mpscale.core.mode import MODES
from mpscale.core.processes.events import Looked, Remarked
from mpscale.worker.training import batches


def test_overflow_is_logged_and_skips_the_step(tmp_path):
    outcome, steps = logged(
        tmp_path, workload(own_step, (X, CLASSES)), "mixed-dynamic", dynamic_scale={"initial": 2.0**24}
    )
    skipped = int(steps["overflow"].sum())
    assert 0 < skipped < STEPS
    assert steps["loss_scale"][skipped] == 2.0 ** (24 - skipped)
    assert np.all(np.diff(steps["loss"][: skipped + 1]) != 0) or skipped == 1
    assert outcome.row["overflow_steps"] == skipped


class Bare(OwnStep):
    """A train_step that does not scale its loss, as most tutorials have it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = logits()(y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def bare():
    model = Bare()
    model.compile(keras.optimizers.Adam(0.01), jit_compile=False)
    return model


@pytest.mark.parametrize("mode", ["fp32", "mixed-bf16", "mixed-dynamic", "mixed-keras", "article"])
def test_a_train_step_that_does_not_scale_its_loss_runs_in_modes_that_need_no_scale(mode):
    outcome = train(workload(bare, (X, CLASSES)), mode)
    if MODES[mode].scaling is None:
        assert outcome.status == "ok"
        assert outcome.row["train_loss_first"] == pytest.approx(1.05, abs=0.3)
    else:
        assert outcome.status == "unsupported"
        assert "loss = self.optimizer.scale_loss(loss)" in outcome.reason


class TwoNames(OwnStep):
    """The optimizer that it is compiled with has another name, too."""

    def compile(self, optimizer, **options):
        super().compile(optimizer, **options)
        self.another_name = optimizer

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            scaled = self.another_name.scale_loss(logits()(y, self(x, training=True)))
        self.another_name.apply(tape.gradient(scaled, self.trainable_variables), self.trainable_variables)
        return {}


def test_an_optimizer_may_have_two_names():
    def build():
        model = TwoNames()
        model.compile(keras.optimizers.Adam(0.01), jit_compile=False)
        return model

    outcome = train(workload(build, (X, CLASSES)), "mixed-dynamic")
    assert (outcome.status, outcome.row["optimizer"]) == ("ok", "Adam")
    assert outcome.row["train_loss_final"] < outcome.row["train_loss_first"]


class Gan(keras.Model):
    """Two optimizers, no call, and a train_step that begins with noise."""

    def __init__(self, discriminator_steps=1):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((4,)), dense(8, activation="relu"), dense(6, dtype="float32")])
        self.judge = keras.Sequential([keras.Input((6,)), dense(8, activation="relu"), dense(1, dtype="float32")])
        self.discriminator_steps = discriminator_steps

    def compile(self, judge_optimizer, generator_optimizer, **options):
        super().compile(jit_compile=False, **options)
        self.judge_optimizer, self.generator_optimizer = judge_optimizer, generator_optimizer
        self.loss_function = keras.losses.BinaryCrossentropy(from_logits=True)

    def train_step(self, real):
        def step(part, optimizer, loss_of):
            with tf.GradientTape() as tape:
                loss = loss_of()
                scaled = optimizer.scale_loss(loss)
            weights = part.trainable_weights
            optimizer.apply(tape.gradient(scaled, weights), weights)
            return loss

        noise = tf.ones((BATCH, 4))
        real_or_not = tf.concat([tf.ones((BATCH, 1)), tf.zeros((BATCH, 1))], 0)

        def judged():
            return self.loss_function(real_or_not, self.judge(tf.concat([real, self.generator(noise)], 0)))

        def fooled():
            return self.loss_function(tf.ones((BATCH, 1)), self.judge(self.generator(noise)))

        losses = [step(self.judge, self.judge_optimizer, judged) for _ in range(self.discriminator_steps)]
        return {"d": losses[-1], "g": step(self.generator, self.generator_optimizer, fooled), "all": sum(losses)}


def gan(discriminator_steps=1):
    def build():
        model = Gan(discriminator_steps)
        model.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01))
        return model

    return build


def test_several_optimizers_each_have_a_loss_scale(tmp_path):
    """Also if one is applied twice in a step."""
    build = gan(discriminator_steps=2)
    keras.utils.set_random_seed(0)
    model = build()
    order = batches(len(X), BATCH, STEPS, 0)
    step = tf.function(model.train_step)
    expected = [float(found["all"] + found["g"]) for found in (step(tf.constant(X[batch])) for batch in order)]
    outcome, steps = logged(tmp_path, workload(build, X, name="gan"))
    np.testing.assert_allclose(steps["loss"], expected, rtol=2e-4)
    assert outcome.row["optimizer"] == "SGD"
    assert set(json.loads(outcome.row["optimizer_config"])) == {"judge_optimizer", "generator_optimizer"}
    settings = {"dynamic_scale": {"initial": 2.0**20}, "timing_s": 0.02, "timing_blocks": 2}
    outcome, steps = logged(tmp_path, workload(build, X, name="gan"), "mixed-dynamic", **settings)
    assert steps["overflow"][0] == 1.0
    assert steps["loss_scale"][0] == 2.0**19  # that of the second update, after the first was skipped
    assert 0 < outcome.row["overflow_steps"] == steps["overflow"].sum() < STEPS
    assert steps["loss_scale"][-1] < 2.0**20
    assert outcome.row["timed_overflow_steps"] == 0


class Shared(OwnStep):
    """An optimizer for each part of the model, and one loss. ``calls``: of tape.gradient."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def compile(self, first, second):
        super().compile(jit_compile=False)
        self.first, self.second = first, second

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = logits()(y, self(x, training=True))
            scaled = [each.scale_loss(loss) if self.calls == 2 else loss for each in (self.first, self.second)]
        first, second = self.hidden.trainable_weights, self.out.trainable_weights
        if self.calls == 2:
            gradients = [tape.gradient(scaled[0], first), tape.gradient(scaled[1], second)]
        else:
            both = tape.gradient(loss, first + second)
            gradients = [both[: len(first)], both[len(first) :]]
        self.first.apply(gradients[0], first)
        self.second.apply(gradients[1], second)
        return {"loss": loss}


@pytest.mark.parametrize("calls", [1, 2])
def test_one_loss_for_two_optimizers_counts_once(calls, tmp_path):
    def build():
        model = Shared(calls)
        model.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01))
        return model

    keras.utils.set_random_seed(0)
    model, order = build(), batches(len(X), BATCH, STEPS, 0)
    step = tf.function(model.train_step)
    expected = [float(step((tf.constant(X[batch]), tf.constant(CLASSES[batch])))["loss"]) for batch in order]
    _, steps = logged(tmp_path, workload(build, (X, CLASSES), name="shared"))
    np.testing.assert_allclose(steps["loss"], expected, rtol=2e-4)
    scaled = train(workload(build, (X, CLASSES), name="shared", train_steps=2), "mixed-dynamic")
    assert scaled.status == ("unsupported" if calls == 1 else "ok")
    assert calls == 2 or "of one call of tape.gradient with second and with another" in scaled.reason


def clipping():
    class Clips(OwnStep):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                scaled = self.optimizer.scale_loss(logits()(y, self(x, training=True)))
            gradients, _ = tf.clip_by_global_norm(tape.gradient(scaled, self.trainable_variables), 1.0)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {}

    model = Clips()
    model.compile("adam", jit_compile=False)
    return model


@pytest.mark.parametrize("mode", ["fp32", "mixed-dynamic"])
def test_gradients_that_are_clipped_while_they_are_scaled_are_remarked_upon(mode):
    outcome = train(workload(clipping, (X, CLASSES)), mode)
    assert outcome.status == "ok"
    said = [event.text for event in outcome.sent if isinstance(event, Remarked)]
    assert [("global_clipnorm" in text) for text in said] == [True] * (mode != "fp32")


def outside():
    """An optimizer that the model does not hold."""
    optimizer = keras.optimizers.SGD(0.1)

    class Outside(OwnStep):
        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = logits()(data[1], self(data[0], training=True))
            optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {}

    model = Outside()
    model.compile("adam", jit_compile=False)
    return model


def branching():
    class Branches(OwnStep):
        def train_step(self, data):
            def update():
                with tf.GradientTape() as tape:
                    loss = logits()(data[1], self(data[0], training=True))
                self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
                return loss

            return {"loss": tf.cond(tf.reduce_sum(data[0]) > 0, update, lambda: 0.0)}

    model = Branches()
    model.compile("adam", jit_compile=False)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (outside, "applied no gradients with an optimizer that the model holds"),
        (branching, "inside of a loop, a branch or a function"),
    ],
)
def test_a_train_step_whose_updates_cannot_be_seen_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        train(workload(build, (X, CLASSES)))


def test_gradients_of_a_compiled_model_can_be_looked_at():
    """Those of its own train_step, too."""
    outcome = train(workload(own_step, (X, CLASSES)), looks=2)
    looks = [event for event in outcome.sent if isinstance(event, Looked)]
    assert [look.step for look in looks] == [1, STEPS]
    found = {(row["layer"].partition("_")[0], row["of"]) for row in looks[0].gradients}
    assert found == {("dense", "weights"), ("dense", "activations")}


def test_gradients_of_several_optimizers_are_looked_at_apart():
    """As the train_step applies them by itself.

    None are looked at that it does not compute, such as those of the discriminator's loss for what the generator
    returns, although a tape has recorded them.
    """
    keras.utils.set_random_seed(0)
    model, largest = gan(discriminator_steps=2)(), {}
    for name in ("judge_optimizer", "generator_optimizer"):
        optimizer = getattr(model, name)

        def applied(grads, weights, apply=optimizer.apply, name=name):
            largest.setdefault(name, []).extend(float(tf.reduce_max(tf.abs(grad))) for grad in grads)
            apply(grads, weights)

        optimizer.apply = applied
    (first, *_), *_ = [batches(len(X), BATCH, STEPS, 0)]
    losses = model.train_step(tf.constant(X[first]))
    keras.utils.clear_session()
    outcome = train(workload(gan(discriminator_steps=2), X, name="gan"), looks=2)
    looks = [event for event in outcome.sent if isinstance(event, Looked)]
    assert [look.step for look in looks] == [1, STEPS]
    assert looks[0].loss == pytest.approx(float(losses["all"] + losses["g"]), rel=1e-5)
    rows = {(row["layer"], row["of"], row["optimizer"]): row for row in looks[0].gradients}
    judge, generator = ({f"{part}/{name}" for name in names} for part, names in (
        ("sequential_1", ("dense_2", "dense_3")), ("sequential", ("dense", "dense_1"))
    ))  # fmt: skip
    assert set(rows) == {
        *((layer, of, "judge_optimizer") for layer in judge for of in ("weights", "activations")),
        *((layer, of, "generator_optimizer") for layer in generator for of in ("weights", "activations")),
        *((layer, "activations", "generator_optimizer") for layer in judge),
    }
    for name, numbers in largest.items():
        found = [row["largest"] for (_, of, optimizer), row in rows.items() if (of, optimizer) == ("weights", name)]
        assert max(found) == pytest.approx(max(numbers), rel=1e-5)
    counts = {place: sum(row["counts"].values()) for place, row in rows.items()}
    # Twice, and 2 * BATCH examples, real and generated; then once, and BATCH examples.
    assert counts["sequential_1/dense_2", "activations", "judge_optimizer"] == 2 * 2 * BATCH * 8
    assert counts["sequential_1/dense_2", "activations", "generator_optimizer"] == BATCH * 8
    assert looks[0].in_float32 == ["sequential/dense_1", "sequential_1/dense_3"]
