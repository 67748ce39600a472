"""The code in docs/scaling.md runs as it is printed."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpscale

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/scaling.md").read_text(), re.DOTALL)
X, Y = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32), np.arange(200) % 3


@pytest.fixture
def names():
    yield {"tf": tf, "keras": keras, "mpscale": mpscale, "x": X, "y": Y}
    keras.config.set_dtype_policy("float32")


def test_guide_to_loss_scaling_runs_from_top_to_bottom(names):
    names["loss_function"] = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    fit, loop, testing = BLOCKS
    exec(fit, names)
    optimizer = names["optimizer"]
    assert optimizer.counters()["applied"] == 7
    exec(loop, names)
    assert np.isfinite(names["step"](X, Y))
    assert optimizer.counters()["applied"] == 8
    exec(testing, names)
    assert optimizer.counters()["overflow"] == 1
