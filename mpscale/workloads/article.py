"""The network of the article that mpscale began with: 784-128-10 with Adam, ten epochs.

The article trains it on MNIST, which would need a download. Here it sees real handwritten digits that come with
scikit-learn: 1,797 images of 8 x 8, scaled up to 28 x 28, of which 1,297 are trained on and 500 tested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpscale.workloads import cache
from mpscale.workloads.data import Data
from mpscale.workloads.workload import Workload

if TYPE_CHECKING:
    import keras

_BATCH = 32
_EPOCHS = 10
_TEST = 500


def load() -> Data:
    """1,297 and 500 digits; float32 (examples, 784) between 0 and 1, int64 labels."""
    arrays = cache.arrays("digits28-v1", _resize)
    return Data(**{name: arrays[name] for name in ("train_x", "train_y", "test_x", "test_y")})


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


MLP = Workload(
    name="article-mlp",
    summary="the article's dense 784-128-10, Adam 1e-3, ten epochs of scikit-learn's digits at 28 x 28",
    model=_model,
    data=load,
    optimizer=_optimizer,
    batch_size=_BATCH,
    train_steps=_EPOCHS * (1297 // _BATCH),
    evaluate_every=40,
    target=0.95,
    margin=0.01,
)
