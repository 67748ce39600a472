"""The workloads that come with mpscale, and the cache of their data.

MNIST-1D (Greydanus and Kobak 2020, arXiv:2011.14439) is forty samples of a distorted digit, in ten classes. The package
mnist1d generates it, so nothing is downloaded. The published set has 4,000 examples to train on and 1,000 to test. The
same recipe with another seed gives 10,000 more test examples, standardised with the published mean and deviation.

The article that mpscale began with trains a dense network for ten epochs on MNIST, which would need a download. Here it
gets the real handwritten digits of scikit-learn: 1,797 images of 8 x 8, scaled up to 28 x 28; 500 are the test set.

Three workloads leave float16's range and show what a loss scale is for; docs/workloads.md explains them. One reads the
same digits row by row, in padded sequences. One predicts the strain of a loaded steel beam, as a surrogate of a
simulation. One predicts how far diabetes has progressed in scikit-learn's 442 patients (Efron, Hastie, Johnstone and
Tibshirani 2004); 142 are the test set.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpscale.workloads.workload import Data, Workload

if TYPE_CHECKING:
    import keras


def load_mnist1d() -> Data:
    """The 4,000 and 1,000 published examples and 10,000 more to test; float32 (examples, 40), int64 labels."""
    return Data(**arrays("mnist1d-v1", _make_mnist1d))


def _make_mnist1d() -> dict[str, Any]:
    x, y = _raw_mnist1d(5000, seed=42)
    test_x, test_y = _raw_mnist1d(10_000, seed=2011_14439)
    mean, deviation = x.mean(), x.std()
    x, test_x = (((samples - mean) / deviation).astype(np.float32) for samples in (x, test_x))
    y, test_y = y.astype(np.int64), test_y.astype(np.int64)
    return {
        "train_x": x[:4000],
        "train_y": y[:4000],
        "test_x": test_x,
        "test_y": test_y,
        "published_x": x[4000:],
        "published_y": y[4000:],
    }


def _raw_mnist1d(examples: int, seed: int) -> tuple[Any, Any]:
    """The examples of ``mnist1d.make_dataset`` before it standardises them."""
    from mnist1d.data import get_dataset_args, get_templates, set_seed
    from mnist1d.transform import transform

    args, templates = get_dataset_args(), get_templates()
    # The package draws from NumPy's global generator, so restore its state.
    state = np.random.get_state()
    try:
        set_seed(seed)
        labels = np.repeat(templates["y"], examples // len(templates["y"]))
        samples = np.stack([transform(templates["x"][label], templates["t"], args)[0] for label in labels])
        shuffle = np.random.permutation(len(labels))
    finally:
        np.random.set_state(state)
    return samples[shuffle], labels[shuffle]


def load_digits28() -> Data:
    """1,297 digits to train on and 500 to test; float32 (examples, 784) from 0 to 1, int64 labels."""
    return Data(**arrays("digits28-v1", _make_digits28))


def _make_digits28() -> dict[str, Any]:
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.clip(zoom(digits.images / 16.0, (1, 3.5, 3.5), order=1), 0, 1).astype(np.float32)
    x, y = images.reshape(len(images), -1), digits.target.astype(np.int64)
    parts = train_test_split(x, y, test_size=500, stratify=digits.target, random_state=0)
    return dict(zip(("train_x", "test_x", "train_y", "test_y"), parts, strict=True))


_PADDED = 28
"""Steps of a padded sequence, of which the eight rows of a digit are the first."""


def load_digit_rows() -> Data:
    """The same digits, a row a step, and then zeros; float32 (examples, 28, 8) from 0 to 1, int64 labels."""
    return Data(**arrays("digit-rows-v1", _make_digit_rows))


def _make_digit_rows() -> dict[str, Any]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = (digits.images / 16.0).astype(np.float32)
    x = np.pad(rows, ((0, 0), (0, _PADDED - rows.shape[1]), (0, 0)))
    parts = train_test_split(x, digits.target.astype(np.int64), test_size=500, stratify=digits.target, random_state=0)
    return dict(zip(("train_x", "test_x", "train_y", "test_y"), parts, strict=True))


_SPAN_M, _STEEL_PA, _SECOND_MOMENT_M4, _HALF_DEPTH_M = 4.0, 210e9, 869e-8, 0.08
"""Span, elastic modulus, second moment of area and half the depth of a simply supported steel beam, an IPE 160."""
_MOST_LOAD_N, _LOADS, _GAUGES = 10_000.0, 3, 16


def load_beam() -> Data:
    """8,192 loaded beams to train on and 1,024 to test: loads to bending strain, which has no unit.

    Examples are float32 (examples, 6), the places of three point loads and their forces, both standardised. Labels are
    float32 (examples, 16), the strain of the lower edge at as many gauges: at most about 1e-3, where steel yields.
    """
    return Data(**arrays("beam-v1", _make_beam))


def _make_beam() -> dict[str, Any]:
    (train_x, train_y), (test_x, test_y) = _beams(8192, seed=1), _beams(1024, seed=2)
    return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}


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
    return Data(**arrays("diabetes-v1", _make_diabetes))


def _make_diabetes() -> dict[str, Any]:
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    diabetes = datasets.load_diabetes(scaled=False)
    split = train_test_split(diabetes.data, diabetes.target, test_size=142, random_state=0)
    train_x, test_x, train_y, test_y = (part.astype(np.float32) for part in split)
    mean, deviation = train_x.mean(axis=0), train_x.std(axis=0)
    return {
        "train_x": (train_x - mean) / deviation,
        "train_y": train_y[:, None],
        "test_x": (test_x - mean) / deviation,
        "test_y": test_y[:, None],
    }


def cache_directory() -> Path:
    """``$MPSCALE_CACHE``, else ``$XDG_CACHE_HOME/mpscale``, else ``~/.cache/mpscale``."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MPSCALE_CACHE") or Path(caches, "mpscale"))


def arrays(name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays that ``make`` returns, or their copy in the cache, since generating them takes long.

    A file that cannot be read is made again, and a cache that cannot be written is ignored: loading just takes longer.
    Either way, the record has the digest of the data.
    """
    path = cache_directory() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        made = dict(make())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write a whole file under another name first: a second process must never read half a file.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as temporary:
            np.savez(temporary, **made)
        Path(temporary.name).replace(path)
    except OSError:
        pass
    return made


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
        summary="the article's dense 784-128-10, Adam 1e-3, ten epochs of scikit-learn's digits at 28 x 28",
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
        summary="scikit-learn's diabetes, sum of squares; dense 10-64-64-1, Adam 3e-3: a scale of 128 is too large",
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
