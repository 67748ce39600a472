"""The small workloads that come with mpscale. Their data is in the package, so nothing is downloaded.

MNIST-1D (Greydanus and Kobak 2020, arXiv:2011.14439) is forty samples of a distorted digit, in ten classes. The
published set has 4,000 examples to train on and 1,000 to test. The same recipe with another seed gives 10,000 more test
examples, standardised with the published mean and deviation.

The article that mpscale began with trains a dense network for ten epochs on MNIST, which would need a download. Here it
gets real handwritten digits (Alpaydin and Kaynak 1998): 1,797 images of 8 x 8, scaled up to 28 x 28; 500 are the test
set.

Three workloads leave float16's range and show what a loss scale is for; docs/workloads.md explains them. One reads the
same digits row by row, in padded sequences. One predicts the strain of a loaded steel beam, as a surrogate of a
simulation. One predicts how far diabetes has progressed in 442 patients (Efron, Hastie, Johnstone and Tibshirani 2004);
142 are the test set.

data/README.md says where the data is from.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpscale.workloads.data import Data
from mpscale.workloads.workload import Workload

if TYPE_CHECKING:
    import keras


class OtherData(RuntimeError):
    """The data of a workload is not what it was when mpscale was released, so its figures would be of other data."""


def _checked(digest: str, **arrays: Any) -> Data:
    """Return the data if it has this digest.

    It could have another if a file were damaged, or if another version of NumPy drew other numbers or rounded in
    another way.
    """
    data = Data(**arrays)
    if data.digest() != digest:
        raise OtherData(
            f"the data of this workload has the digest {data.digest()}, not {digest}, so a figure on it could not be "
            f"compared with any other; install mpscale again, and if that does not help, report this with the versions "
            f"of mpscale and of NumPy ({np.__version__})"
        )
    return data


def _stored(name: str) -> dict[str, Any]:
    with np.load(Path(__file__).with_name("data") / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def load_mnist1d() -> Data:
    """The 4,000 and 1,000 published examples and 10,000 more to test; float32 (examples, 40), int64 labels."""
    stored = _stored("mnist1d")
    x, y = stored["x"], stored["y"].astype(np.int64)
    return _checked(
        "183d348b4bd27449",
        train_x=x[:4000],
        train_y=y[:4000],
        test_x=stored["test_x"],
        test_y=stored["test_y"].astype(np.int64),
        published_x=x[4000:],
        published_y=y[4000:],
    )


def _digits() -> tuple[dict[str, Any], dict[str, Any]]:
    """Images of 1,297 digits to train on and 500 to test, (examples, 8, 8), from 0 to 1; their labels by part."""
    stored = _stored("digits")
    images = {part: stored[f"{part}_x"] / 16.0 for part in ("train", "test")}
    return images, {f"{part}_y": stored[f"{part}_y"].astype(np.int64) for part in images}


def load_digits28() -> Data:
    """1,297 digits to train on and 500 to test; float32 (examples, 784) from 0 to 1, int64 labels."""
    images, labels = _digits()
    x = {f"{part}_x": _enlarged(each, 28).reshape(len(each), -1) for part, each in images.items()}
    return _checked("4803ff114760e282", **x, **labels)


def _enlarged(images: Any, size: int) -> Any:
    """Scale (n, pixels, pixels) up to (n, size, size), by linear interpolation between the centres of pixels."""
    pixels = images.shape[1]
    place = np.arange(size) * (pixels - 1) / (size - 1)
    low = np.minimum(place.astype(int), pixels - 2)
    share = place - low
    rows = images[:, low] * (1 - share)[:, None] + images[:, low + 1] * share[:, None]
    return (rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share).astype(np.float32)


_PADDED = 28
"""Steps of a padded sequence, of which the eight rows of a digit are the first."""


def load_digit_rows() -> Data:
    """The same digits, a row a step, and then zeros; float32 (examples, 28, 8) from 0 to 1, int64 labels."""
    images, labels = _digits()
    padding = ((0, 0), (0, _PADDED - 8), (0, 0))
    x = {f"{part}_x": np.pad(each.astype(np.float32), padding) for part, each in images.items()}
    return _checked("783751173fcba3f3", **x, **labels)


_SPAN_M, _STEEL_PA, _SECOND_MOMENT_M4, _HALF_DEPTH_M = 4.0, 210e9, 869e-8, 0.08
"""Span, elastic modulus, second moment of area and half the depth of a simply supported steel beam, an IPE 160."""
_MOST_LOAD_N, _LOADS, _GAUGES = 10_000.0, 3, 16


def load_beam() -> Data:
    """8,192 loaded beams to train on and 1,024 to test: loads to bending strain, which has no unit.

    Examples are float32 (examples, 6), the places of three point loads and their forces, both standardised. Labels are
    float32 (examples, 16), the strain of the lower edge at as many gauges: at most about 1e-3, where steel yields.
    """
    (train_x, train_y), (test_x, test_y) = _beams(8192, seed=1), _beams(1024, seed=2)
    return _checked("a049537dd36e3e09", train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)


def _beams(examples: int, seed: int) -> tuple[Any, Any]:
    draw = np.random.default_rng(seed)
    places = draw.uniform(0.05, 0.95, (examples, _LOADS))
    forces = draw.uniform(-1.0, 1.0, (examples, _LOADS))
    gauge = np.linspace(0.0, 1.0, _GAUGES + 2)[1:-1]
    at, load = places[:, :, None], forces[:, :, None] * _MOST_LOAD_N
    # The bending moment of a point load rises from one support to the load and falls to the other.
    moment = (load * _SPAN_M * np.where(gauge <= at, (1 - at) * gauge, at * (1 - gauge))).sum(axis=1)
    strain = moment * _HALF_DEPTH_M / (_STEEL_PA * _SECOND_MOMENT_M4)
    # The mean and deviation of uniform numbers are known.
    x = np.concatenate([(places - 0.5) / (0.9 / 12**0.5), forces / (2.0 / 12**0.5)], axis=1)
    return x.astype(np.float32), strain.astype(np.float32)


def load_diabetes() -> Data:
    """300 patients to train on and 142 to test; float32 (examples, 10), standardised, and (examples, 1), 25 to 346."""
    stored = _stored("diabetes")
    mean, deviation = stored["train_x"].mean(axis=0), stored["train_x"].std(axis=0)
    x = {f"{part}_x": (stored[f"{part}_x"] - mean) / deviation for part in ("train", "test")}
    return _checked("e1828dba66eba38a", **x, train_y=stored["train_y"][:, None], test_y=stored["test_y"][:, None])


def _adam(learning_rate: float) -> keras.optimizers.Optimizer:
    import keras

    return keras.optimizers.Adam(learning_rate)


def _decayed_adam(learning_rate: float, steps: int) -> keras.optimizers.Optimizer:
    import keras

    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps))


def _decayed_lion(learning_rate: float, steps: int) -> keras.optimizers.Optimizer:
    import keras

    return keras.optimizers.Lion(keras.optimizers.schedules.CosineDecay(learning_rate, steps))


def _mlp(inputs: int, *hidden: int) -> keras.Model:
    import keras

    layers = [keras.layers.Dense(units, activation="relu") for units in hidden]
    return keras.Sequential([keras.Input((inputs,)), *layers, keras.layers.Dense(10, dtype="float32")])


def _cnn() -> keras.Model:
    from keras import Input, Sequential, layers

    convolution = partial(layers.Conv1D, 25, strides=2, padding="same", activation="relu")
    convolutions = [convolution(5), convolution(3), convolution(3)]
    head = [layers.Flatten(), layers.Dense(10, dtype="float32")]
    return Sequential([Input((40,)), layers.Reshape((40, 1)), *convolutions, *head])


def _gru() -> keras.Model:
    from keras import Input, Sequential, layers

    return Sequential([Input((40,)), layers.Reshape((40, 1)), layers.GRU(64), layers.Dense(10, dtype="float32")])


def _padded_gru() -> keras.Model:
    from keras import Input, Sequential, layers

    return Sequential([Input((_PADDED, 8)), layers.GRU(32), layers.Dense(10, dtype="float32")])


def _surrogate() -> keras.Model:
    from keras import Input, Sequential, layers

    hidden = [layers.Dense(64, activation="gelu") for _ in range(3)]
    variance = float(load_beam().train_y.var(dtype=np.float64))
    # The network predicts standardised strain; the last layer makes strain of it.
    physical = layers.Normalization(axis=None, mean=0.0, variance=variance, invert=True, dtype="float32")
    return Sequential([Input((2 * _LOADS,)), *hidden, layers.Dense(_GAUGES, dtype="float32"), physical])


def _regression() -> keras.Model:
    from keras import Input, Sequential, layers

    hidden = [layers.Dense(64, activation="relu") for _ in range(2)]
    return Sequential([Input((10,)), *hidden, layers.Dense(1, dtype="float32")])


def _sum_of_squares(labels: Any, outputs: Any) -> Any:
    import keras

    return keras.ops.sum(keras.ops.square(labels - outputs))


# These trainings are complete and short. With the usual growth interval of 2,000 steps a dynamic scale could only fall.
_mnist1d = partial(Workload, data=load_mnist1d, optimizer=partial(_adam, 1e-2), growth_interval=200)

WORKLOADS = (
    _mnist1d(
        name="mnist1d-mlp",
        summary="MNIST-1D, dense 40-100-100-10, Adam 1e-2; 68 % is published",
        model=partial(_mlp, 40, 100, 100),
        target=0.63,
        margin=0.02,
    ),
    _mnist1d(
        name="mnist1d-cnn",
        summary="MNIST-1D, three Conv1D of 25 channels with stride 2, Adam 1e-2; 94 % is published",
        model=_cnn,
        target=0.90,
        margin=0.01,
    ),
    _mnist1d(
        name="mnist1d-gru",
        summary="MNIST-1D, a GRU of 64 units over the forty samples, Adam 1e-2; 91 % is published",
        model=_gru,
        target=0.90,
        margin=0.01,
    ),
    Workload(
        name="article-mlp",
        summary="the article's dense 784-128-10, Adam 1e-3, ten epochs of handwritten digits at 28 x 28",
        model=partial(_mlp, 784, 128),
        data=load_digits28,
        optimizer=partial(_adam, 1e-3),
        batch_size=32,
        train_steps=10 * (1297 // 32),
        growth_interval=40,
        evaluate_every=40,
        target=0.95,
        margin=0.01,
    ),
    Workload(
        name="padded-gru",
        summary="digits row by row, padded to 28 steps; a GRU of 32 units, Adam 2e-2: float16 needs a loss scale",
        model=_padded_gru,
        data=load_digit_rows,
        optimizer=partial(_decayed_adam, 2e-2, 400),
        batch_size=256,
        train_steps=400,
        growth_interval=40,
        evaluate_every=50,
        target=0.9,
        margin=0.05,
    ),
    Workload(
        name="beam-strain",
        summary="loads on a steel beam to its strain; dense 6-64-64-64-16, Lion 2e-3: a loss scale of 128 is too small",
        model=_surrogate,
        data=load_beam,
        optimizer=partial(_decayed_lion, 2e-3, 400),
        loss="mean_squared_error",
        metric="r2_score",
        batch_size=256,
        train_steps=400,
        growth_interval=40,
        evaluate_every=50,
        target=0.95,
        margin=0.02,
    ),
    Workload(
        name="diabetes-sum",
        summary="progress of diabetes, sum of squares; dense 10-64-64-1, Adam 3e-3: a scale of 128 is too large",
        model=_regression,
        data=load_diabetes,
        optimizer=partial(_adam, 3e-3),
        loss=_sum_of_squares,
        metric="mean_absolute_error",
        batch_size=50,
        train_steps=300,
        growth_interval=30,
        evaluate_every=50,
        target=50.0,
        margin=2.0,
    ),
)
"""mpscale's own workloads, in the order in which they are listed."""
