"""Compiled models whose step time is compared with that of Keras' own ``fit``."""

from __future__ import annotations

from typing import Any

from mpscale import Workload
from mpscale.workloads import registry


def _compiled(name: str) -> Workload:
    """A built-in workload as a user would compile it."""
    base = registry.get(name)

    def build() -> Any:
        import keras

        model = base.model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(base.optimizer(), loss=loss, metrics=["accuracy"])
        return model

    def train() -> Any:
        data = base.data()
        return data.train_x, data.train_y

    return Workload.from_compiled(build, train=train, name=f"compiled-{name}", batch_size=base.batch_size)


mlp = _compiled("mnist1d-mlp")
cnn = _compiled("mnist1d-cnn")
