"""The models of runs on an H200 in this folder (docs/hardware.md). A GPU notices their steps."""

import numpy as np

import mpscale


def _adam():
    import keras

    return keras.optimizers.Adam(1e-4)


def _images():
    r = np.random.default_rng(0)
    y = r.integers(0, 10, 1024)
    x = (r.normal(size=(1024, 128, 128, 3)) + y[:, None, None, None] / 10).astype(np.float32)
    return mpscale.Data(x[:768], y[:768], x[768:], y[768:])


@mpscale.workload("convnet", data=_images, optimizer=_adam, batch_size=128, train_steps=40, evaluate_every=40)
def convnet():
    """Six 3 x 3 convolutions with BatchNormalization, 128 x 128 pixels."""
    import keras

    layers = [keras.Input((128, 128, 3))]
    for filters, strides in ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2)):
        layers += [
            keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, dtype="float32")])


def _numbers():
    r = np.random.default_rng(0)
    y = r.integers(0, 10, 17_408)
    x = (r.normal(size=(len(y), 2048)) + y[:, None] / 40).astype(np.float32)
    return mpscale.Data(x[:16_384], y[:16_384], x[16_384:], y[16_384:])


@mpscale.workload("wide", data=_numbers, optimizer=_adam, batch_size=4096, train_steps=100, evaluate_every=100)
def wide():
    """A wide MLP: 2048 - 4 x 8192 - 10, 218 million parameters."""
    import keras

    hidden = [keras.layers.Dense(8192, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((2048,)), *hidden, keras.layers.Dense(10, dtype="float32")])
