"""MNIST-1D (Greydanus and Kobak 2020, arXiv:2011.14439): forty samples of a distorted digit, ten classes.

The package mnist1d generates it, so nothing is downloaded. The published set is 4,000 examples to train on and
1,000 to test; beside those, 10,000 further test examples are generated from another seed by the same recipe and
standardised with the published set's own mean and deviation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpscale.workloads.workload import Data, Workload

if TYPE_CHECKING:
    import keras
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

_PUBLISHED_EXAMPLES = 5000
_PUBLISHED_SEED = 42
_TEST_EXAMPLES = 10_000
_TEST_SEED = 2011_14439


def load() -> Data:
    """The published 4,000 and 1,000 examples and 10,000 more to test; float32 (examples, 40), int64 labels."""
    loaded = arrays("mnist1d-v1", _generate)
    return Data(**{name: loaded[name] for name in Data.__slots__})


def _generate() -> dict[str, Any]:
    x, y = _raw(_PUBLISHED_EXAMPLES, _PUBLISHED_SEED)
    mean, deviation = x.mean(), x.std()
    test_x, test_y = _raw(_TEST_EXAMPLES, _TEST_SEED)
    split = int(_PUBLISHED_EXAMPLES * 0.8)

    def standard(samples: Any) -> Any:
        return ((samples - mean) / deviation).astype(np.float32)

    return {
        "train_x": standard(x[:split]),
        "train_y": y[:split].astype(np.int64),
        "test_x": standard(test_x),
        "test_y": test_y.astype(np.int64),
        "published_x": standard(x[split:]),
        "published_y": y[split:].astype(np.int64),
    }


def _raw(examples: int, seed: int) -> tuple[Any, Any]:
    """Examples before standardisation, the same that ``mnist1d.make_dataset`` draws before it standardises them."""
    from mnist1d.data import get_dataset_args, get_templates, set_seed
    from mnist1d.transform import transform

    args, templates = get_dataset_args(), get_templates()
    # The package draws from NumPy's global generator; what was there before is put back.
    state = np.random.get_state()
    try:
        set_seed(seed)
        labels = np.repeat(templates["y"], examples // len(templates["y"]))
        samples = np.stack([transform(templates["x"][label], templates["t"], args)[0] for label in labels])
        shuffle = np.random.permutation(len(labels))
    finally:
        np.random.set_state(state)
    return samples[shuffle], labels[shuffle]


def _adam() -> keras.optimizers.Optimizer:
    import keras

    return keras.optimizers.Adam(1e-2)


def _mlp() -> keras.Model:
    import keras

    return keras.Sequential(
        [
            keras.Input((40,)),
            keras.layers.Dense(100, activation="relu"),
            keras.layers.Dense(100, activation="relu"),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def _cnn() -> keras.Model:
    import keras

    convolution = partial(keras.layers.Conv1D, 25, strides=2, padding="same", activation="relu")
    return keras.Sequential(
        [
            keras.Input((40,)),
            keras.layers.Reshape((40, 1)),
            convolution(5),
            convolution(3),
            convolution(3),
            keras.layers.Flatten(),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def _gru() -> keras.Model:
    import keras

    return keras.Sequential(
        [
            keras.Input((40,)),
            keras.layers.Reshape((40, 1)),
            keras.layers.GRU(64),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


MLP = Workload(
    name="mnist1d-mlp",
    summary="MNIST-1D, dense 40-100-100-10, Adam 1e-2; 68 % is published",
    model=_mlp,
    data=load,
    optimizer=_adam,
    target=0.63,
    margin=0.02,
)
CNN = Workload(
    name="mnist1d-cnn",
    summary="MNIST-1D, three Conv1D of 25 channels with stride 2, Adam 1e-2; 94 % is published",
    model=_cnn,
    data=load,
    optimizer=_adam,
    target=0.90,
    margin=0.01,
)
GRU = Workload(
    name="mnist1d-gru",
    summary="MNIST-1D, a GRU of 64 units over the forty samples, Adam 1e-2; 91 % is published",
    model=_gru,
    data=load,
    optimizer=_adam,
    target=0.90,
    margin=0.01,
)


# The network of the article that mpscale began with: 784-128-10 with Adam, ten epochs. The article trains it on
# MNIST, which would need a download. Here it sees real handwritten digits that come with scikit-learn: 1,797 images
# of 8 x 8, scaled up to 28 x 28, of which 1,297 are trained on and 500 tested.

_BATCH = 32
_EPOCHS = 10
_TEST = 500


def load_article_data() -> Data:
    """1,297 and 500 digits; float32 (examples, 784) between 0 and 1, int64 labels."""
    loaded = arrays("digits28-v1", _resize)
    return Data(**{name: loaded[name] for name in ("train_x", "train_y", "test_x", "test_y")})


def _resize() -> dict[str, Any]:
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.clip(zoom(digits.images / 16.0, (1, 3.5, 3.5), order=1), 0, 1).astype(np.float32)
    parts = train_test_split(
        images.reshape(len(images), -1),
        digits.target.astype(np.int64),
        test_size=_TEST,
        stratify=digits.target,
        random_state=0,
    )
    return dict(zip(("train_x", "test_x", "train_y", "test_y"), parts, strict=True))


def _model() -> keras.Model:
    import keras

    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def _optimizer() -> keras.optimizers.Optimizer:
    import keras

    return keras.optimizers.Adam(1e-3)


ARTICLE = Workload(
    name="article-mlp",
    summary="the article's dense 784-128-10, Adam 1e-3, ten epochs of scikit-learn's digits at 28 x 28",
    model=_model,
    data=load_article_data,
    optimizer=_optimizer,
    batch_size=_BATCH,
    train_steps=_EPOCHS * (1297 // _BATCH),
    evaluate_every=40,
    target=0.95,
    margin=0.01,
)


# Generated data on disk, so that generating it is not part of every process of a run.


def directory() -> Path:
    """``$MPSCALE_CACHE``, else ``$XDG_CACHE_HOME/mpscale``, else ``~/.cache/mpscale``."""
    named = os.environ.get("MPSCALE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mpscale"


def arrays(name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays that ``make`` returns, read back from the cache where an earlier process left them.

    A file that cannot be read is made again, and a cache that cannot be written is done without: the data is only
    slower to come by. What was trained on is in the record by its digest, whichever way it came.
    """
    path = directory() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        made = dict(make())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A whole file under another name first: a second process must never read half of one.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as temporary:
            np.savez(temporary, **made)
        Path(temporary.name).replace(path)
    except OSError:
        pass
    return made
