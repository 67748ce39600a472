"""The model of two runs on an H200 in this folder (docs/hardware.md): one whose steps a GPU notices."""

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
