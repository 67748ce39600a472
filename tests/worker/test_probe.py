"""What a probe counts is what NumPy's float16 makes of the same gradients, and these are those of Keras' training."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import blobs, dense, split, train, workload

from mpscale.analysis.probe import HEADROOM, Probe, advise
from mpscale.core.device import Device
from mpscale.core.magnitudes import Magnitudes, power_of_two
from mpscale.core.processes.events import Looked
from mpscale.harness.probe import LOOKS, STEPS, note
from mpscale.report.probe_tables import sentences
from mpscale.worker.probe import count, looks_at
from mpscale.workloads import large, registry
from mpscale.workloads.builtin import WORKLOADS

SCALES = [2.0**power for power in (-30, -3, 0, 1, 7, 24, 60)]
BORDERS = [
    2.0**-25,
    2.0**-24,
    2.0**-14,
    2.0**-14 - 2.0**-25,
    2.0**-14 - 2.0**-24,
    2.0**-15,
    65504.0,
    65519.99,
    65520.0,
    65536.0,
]


def numbers():
    """Borders of float16 at every scale, their neighbours in float32, and numbers of all magnitudes and both signs."""
    random = np.random.default_rng(3)
    wide = (random.normal(size=20_000) * 2.0 ** random.integers(-120, 100, 20_000)).astype(np.float32)
    at = np.array([border / scale for border in BORDERS for scale in SCALES], np.float32)
    near = [np.nextafter(at, np.float32(side)) for side in (0, np.inf)]
    tiny = np.array([0.0, 1e-45, 1e-40, 2.0**-126, 2.0**-127], np.float32)
    some = np.concatenate([wide, at, *near, tiny])
    return np.concatenate([some, -some])


def counted(values, jit):
    counts, largest = tf.function(count, jit_compile=jit)(tf.constant(values))
    return Magnitudes.from_json({"counts": dict(enumerate(counts.numpy().tolist())), "largest": float(largest)})


@pytest.mark.parametrize("jit", [False, True])
def test_counts_are_those_of_numpys_float16(jit):
    values = numbers()
    found = counted(values, jit)
    assert (found.total, found.zero, found.not_finite) == (len(values), np.sum(values == 0), 0)
    assert found.largest == np.abs(values).max()
    for scale in SCALES:
        with np.errstate(over="ignore", under="ignore"):
            rounded = np.abs((values * np.float32(scale)).astype(np.float16))
        own = values != 0
        expected = (rounded[own] == 0, (rounded[own] > 0) & (rounded[own] < 2.0**-14), np.isinf(rounded[own]))
        found_here = found.in_float16(scale)
        assert (found_here.vanished, found_here.subnormal, found_here.overflowed) == tuple(map(np.sum, expected)), scale
        assert found_here.of == np.sum(own)


def test_numbers_are_counted_by_power_of_two_and_odd_ones_apart():
    values = np.array([0.0, -0.0, 1.0, 1.99, -2.0, 0.75, 1e-40, np.inf, -np.inf, np.nan], np.float32)
    found = counted(values, jit=False)
    assert found.by_power() == {-127: 1, -1: 1, 0: 2, 1: 1}
    assert (found.zero, found.not_finite, found.largest) == (2, 3, 2.0)
    assert found.in_float16(1.0).of == 5


@pytest.mark.parametrize("scale", [0.0, -2.0, 100.0, 2.0**101, float("inf"), float("nan")])
def test_a_scale_that_is_no_power_of_two_is_refused(scale):
    with pytest.raises(ValueError, match="power of two"):
        power_of_two(scale)


@pytest.mark.parametrize(
    ("steps", "looks", "expected"),
    [(200, 3, [0, 100, 199]), (200, 1, [0]), (5, 8, [0, 1, 2, 3, 4]), (1, 8, [0]), (10, 4, [0, 3, 6, 9])],
)
def test_the_first_step_the_last_and_some_between_are_looked_at(steps, looks, expected):
    assert looks_at(steps, looks) == expected


def probe(model, data=None, looks=2, **options):
    keras.utils.clear_session()  # Keras numbers the names of layers by what the process has made before.
    given = workload(model, lambda: data or split(*blobs()), train_steps=12, **options)
    return train(given, looks=looks)


def places(outcome):
    return {(row["layer"], row["of"]): row for row in outcome.sent[0].gradients}


def test_gradients_are_those_of_a_tape_by_hand():
    data = split(*blobs())
    outcome = probe(dense(), data)
    assert (outcome.status, [event.step for event in outcome.sent]) == ("ok", [1, 12])
    keras.utils.set_random_seed(0)
    model = dense()()
    order = np.random.default_rng(0).permutation(len(data.train_x))[:20]
    with tf.GradientTape() as tape:
        hidden = model.layers[0](data.train_x[order])
        outputs = model.layers[1](hidden)
        losses = keras.losses.sparse_categorical_crossentropy(data.train_y[order], outputs, from_logits=True)
        loss = tf.reduce_mean(losses)
    by_hand = tape.gradient(loss, [hidden, outputs, *model.trainable_variables])
    found = places(outcome)
    for number, layer in enumerate(dict.fromkeys(layer for layer, _ in found)):
        for of, grads in (("activations", by_hand[number : number + 1]), ("weights", by_hand[2 + 2 * number :][:2])):
            flat = np.concatenate([np.ravel(grad) for grad in grads])
            assert found[layer, of]["largest"] == pytest.approx(np.abs(flat).max(), rel=1e-5)
            assert sum(found[layer, of]["counts"].values()) == flat.size
    assert outcome.sent[0].loss == pytest.approx(float(loss), rel=1e-5)


def test_a_training_that_is_looked_at_goes_the_same_way():
    looked = [probe(dense(), looks=looks).sent[-1].loss for looks in (2, 12)]
    run = train(workload(dense(), lambda: split(*blobs()), train_steps=12))
    assert looked[0] == pytest.approx(looked[1], rel=1e-6)
    assert run.row["train_loss_final"] == pytest.approx(np.mean(every_loss()), rel=1e-6)


def every_loss():
    return [event.loss for event in probe(dense(), looks=12).sent]


class Parts(keras.layers.Layer):
    """Several outputs, one of them of integers."""

    def __init__(self):
        super().__init__(name="parts")
        self.inner = keras.layers.Dense(4, name="inner")

    def build(self, shape):
        self.own = self.add_weight(shape=(4,), name="own")
        self.inner.build(shape)

    def call(self, x):
        y = self.inner(x) * self.own
        return {"y": y, "which": tf.argmax(y, -1), "sum": tf.reduce_sum(y, -1, keepdims=True)}


class Own(keras.Model):
    """A model of the user's own, without any layer."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(2, 3), name="kernel")

    def call(self, x):
        return x @ self.kernel


class Hidden(keras.layers.Layer):
    """Its inner layer is called where no gradient can be taken at it."""

    def __init__(self):
        super().__init__(name="hidden")
        self.inner = keras.layers.Dense(4, name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return tf.map_fn(lambda row: self.inner(row[None])[0], x, fn_output_signature=tf.float32)


def functional(make):
    def model():
        inputs = keras.Input((2,))
        return keras.Model(inputs, make(inputs), name="model")

    return model


def head(x):
    return keras.layers.Dense(3, name="head")(x)


def shared(x):
    layer = keras.layers.Dense(2, name="twice")
    return head(layer(keras.layers.Dropout(0.0)(layer(x))))


def nested(x):
    layers = [keras.layers.Dense(4, name="a"), keras.layers.Dropout(0.5, name="b")]
    inner = keras.Sequential([keras.Input((2,)), *layers], name="block")
    return head(inner(x))


def parts(x):
    found = Parts()(x)
    return head(keras.layers.Concatenate(name="both")([found["y"], found["sum"]]))


def recurrent(x):
    inside = keras.layers.Bidirectional(keras.layers.GRU(3, name="gru"), name="both")
    return head(inside(keras.layers.Reshape((2, 1), name="reshape")(x)))


HEAD = {("head", "activations"): 60, ("head", "weights"): None}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (functional(shared), {("twice", "activations"): 80, ("twice", "weights"): 6, **HEAD}),
        (
            functional(nested),
            {("block/a", "activations"): 80, ("block/a", "weights"): 12, ("block/b", "activations"): 80, **HEAD},
        ),
        (
            functional(parts),
            {
                ("parts/inner", "activations"): 80, ("parts/inner", "weights"): 12, ("parts", "weights"): 4,
                ("both", "activations"): 100, **HEAD,
            },
        ),
        (
            functional(recurrent),
            {
                ("both/forward_gru", "activations"): 60, ("both/backward_gru", "activations"): 60,
                ("both/forward_gru", "weights"): 54, ("both/backward_gru", "weights"): 54, **HEAD,
            },
        ),
        (functional(lambda x: head(Hidden()(x))), {("hidden", "activations"): 80, ("hidden", "weights"): 12, **HEAD}),
        (Own, {("own", "activations"): 60, ("own", "weights"): 6}),
    ],
    ids=["called twice", "nested", "several outputs", "recurrent", "in a loop", "no layers"],
)  # fmt: skip
def test_gradients_belong_to_the_innermost_layer_that_one_reaches(model, expected):
    original = keras.layers.Layer.__call__
    outcome = probe(model)
    assert (outcome.status, outcome.reason) == ("ok", None)
    found = {place: sum(row["counts"].values()) for place, row in places(outcome).items()}
    assert set(found) == set(expected)
    assert {place: size for place, size in found.items() if expected[place] is not None} == {
        place: size for place, size in expected.items() if size is not None
    }
    assert outcome.sent[0].in_float32 == []
    assert keras.layers.Layer.__call__ is original
    assert keras.config.dtype_policy().name == "float32"


def test_layers_that_ask_for_float32_are_named():
    outcome = probe(dense())
    *_, last = dict.fromkeys(layer for layer, _ in places(outcome))
    assert outcome.sent[0].in_float32 == [last]


def test_zeros_of_a_relu_are_zeros_and_do_not_vanish():
    def off():
        return keras.Sequential(
            [
                keras.Input((2,)),
                keras.layers.Dense(4, bias_initializer=keras.initializers.Constant(-1e3), name="dead"),
                keras.layers.ReLU(name="relu"),
                keras.layers.Dense(3, name="logits"),
            ]
        )

    found = {place: Magnitudes.from_json(row) for place, row in places(probe(off)).items()}
    dead = found["dead", "activations"]
    assert (dead.total, dead.zero, dead.in_float16(1.0).of) == (80, 80, 0)
    assert dead.in_float16(1.0).share("vanished") is None


def test_a_training_that_diverges_ends_and_says_where():
    linear = functional(lambda x: keras.layers.Dense(1)(x))
    outcome = probe(linear, looks=12, loss="mse", metric="mae", optimizer=lambda: keras.optimizers.SGD(1e20))
    assert outcome.status == "diverged"
    assert "not finite in float32" in outcome.reason
    last = [Magnitudes.from_json(row) for row in outcome.sent[-1].gradients]
    assert sum(each.not_finite for each in last) > 0
    assert len(outcome.sent) < 12


def advice_on(given, looks, **settings):
    found = Probe("situation", Device("cpu", "CPU"), 60)
    for event in train(given, looks=looks, **settings).sent:
        note(found, event)
    return advise(found)


def test_the_recommended_scale_does_not_overflow_in_a_mixed_training():
    given = workload(dense(), lambda: split(*blobs()), train_steps=60)
    advice = advice_on(given, looks=6)
    assert advice.scale * advice.largest * HEADROOM < 65504 <= 2 * advice.scale * advice.largest * HEADROOM
    run = train(given, "mixed-static", static_scale=advice.scale)
    assert (run.status, run.row["overflow_steps"], run.row["attempted_steps"]) == ("ok", 0, 60)
    # The same training with a scale that is a little beyond the border, so that the check above can fail.
    beyond = 2.0 ** np.ceil(np.log2(65520 / advice.largest) + 1)
    assert train(given, "mixed-static", static_scale=beyond).row["overflow_steps"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [workload.name for workload in (*WORKLOADS, *large.TINY)])
def test_the_recommended_scale_does_not_overflow_in_the_whole_training_of_a_workload(name):
    given = registry.get(name)
    advice = advice_on(given, LOOKS, jit=True, train_steps=min(STEPS, given.train_steps))
    run = train(given, "mixed-static", jit=True, static_scale=advice.scale)
    found = {column: run.row.get(column) for column in ("overflow_steps", "attempted_steps", "metric_value")}
    print(name, advice, found)  # pytest -rP shows it
    assert (run.status, found["overflow_steps"], found["attempted_steps"]) == ("ok", 0, given.train_steps)


def test_a_model_that_cannot_be_made_again_counts_as_float16_and_says_so():
    made = []

    def once():
        made.append(1)
        if len(made) > 1:
            raise RuntimeError("only once")
        return dense()()

    outcome = probe(once)
    assert outcome.status == "ok"
    assert "only once" in outcome.sent[0].in_float32.text
    found = Probe("situation", Device("cpu", "CPU"), 12)
    again = [Looked.from_json(json.loads(json.dumps(event.to_json()))) for event in outcome.sent]
    assert again == outcome.sent
    note(found, again[0])
    assert found.unsure.text == outcome.sent[0].in_float32.text
    assert len(found.in_float16()) == len(found.by_layer()) == 4
    assert any("taken for float16" in sentence for sentence in sentences(found))
