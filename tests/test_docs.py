"""The code in docs/scaling.md and README.md runs as printed and trains correctly; pages fit a terminal."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import train

import mpscale
from mpscale.scaling import DynamicLossScale

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
X, Y = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32), np.arange(200) % 3


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


GUIDE = blocks((ROOT / "docs/scaling.md").read_text())
README = blocks((ROOT / "README.md").read_text().split("## The loss scale alone")[1].split("\n## ")[0])
OWN_MODEL = blocks((ROOT / "README.md").read_text().split("## Your own model")[1].split("\n## ")[0])


@pytest.fixture
def names(tmp_path):
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    given = {"x": X, "y": Y, "loss_function": loss_function, "folder": tmp_path, "batches": [(X, Y)] * 2}
    yield {"tf": tf, "keras": keras, "mpscale": mpscale} | given
    keras.config.set_dtype_policy("float32")


def test_guide_to_loss_scaling_runs_from_top_to_bottom(names):
    fit, loop, two_functions, testing = GUIDE
    exec(fit, names)
    optimizer = names["optimizer"]
    assert optimizer.counters()["applied"] == 7
    exec(loop, names)
    assert np.isfinite(names["step"](X, Y))
    assert optimizer.counters()["applied"] == 8
    exec(two_functions, names)
    assert optimizer.counters()["applied"] == 10
    exec(testing, names)
    assert optimizer.counters()["overflow"] == 1


def test_readme_runs_from_top_to_bottom(names):
    fit, loop = README
    names["model"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    names |= {"y": X[:, :3], "loss_function": keras.losses.MeanSquaredError()}
    exec(fit, names)
    exec(loop, names)
    names["step"](X, X[:, :3])
    assert names["optimizer"].counters()["applied"] == 8


def one_function(names, block):
    exec(block, names)
    return names["step"]


def two_functions(names, block):
    exec(block.split("checkpoint =")[0], names)
    return lambda x, y: names["update"](names["gradients"](x, y))


@pytest.mark.parametrize(
    ("block", "loop"),
    [
        pytest.param(GUIDE[1], one_function, id="the guide's loop"),
        pytest.param(GUIDE[2], two_functions, id="the guide's two functions"),
        pytest.param(README[1], one_function, id="the README's loop"),
    ],
)
def test_a_printed_loop_continues_correctly_after_an_overflow(names, block, loop):
    """Expect the weights of the same loop with an optimizer that does not scale."""

    def weights(optimizer, batches):
        keras.utils.set_random_seed(0)
        names["model"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
        names["optimizer"] = optimizer
        step = loop(names, block)
        for batch in batches:
            step(batch, Y)
        return names["model"].get_weights()

    class Plain(keras.optimizers.SGD):
        """An optimizer without scaling, with the methods that the loop calls."""

        def unscale(self, grads):
            return grads, None

        def apply(self, grads, variables=None, finite=None):
            super().apply(grads, variables)

    expected = weights(Plain(0.1), [X, X])
    optimizer = mpscale.LossScaleOptimizer(keras.optimizers.SGD(0.1), DynamicLossScale(2.0**10))
    for ours, right in zip(weights(optimizer, [X, X * np.inf, X]), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-7)
    assert optimizer.counters()["skipped"] == 1


def test_the_printed_checkpoint_restores_the_scale(names):
    def optimizer():
        return mpscale.LossScaleOptimizer(keras.optimizers.SGD(0.1), DynamicLossScale(2.0**10))

    names["model"], names["optimizer"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), optimizer()
    names["batches"] = [(X * np.inf, Y), (X, Y)]
    exec(GUIDE[2], names)
    names["model"], names["optimizer"] = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), optimizer()
    names["batches"] = [(X, Y)]
    exec(GUIDE[2], names)
    assert float(names["optimizer"].loss_scale_value) == 2.0**9
    assert names["optimizer"].counters()["attempted"] == 3


def test_the_readmes_own_models_train():
    module = {}
    for block in OWN_MODEL[:2]:
        exec(block, module)
    accuracy = train(module["signs"]).row["final_accuracy"]
    assert accuracy > 0.9
    error = train(module["product"]).row["metric_value"]
    error_of_zero = float(np.mean(np.abs(module["products"]().test_y)))
    assert error < 0.7 * error_of_zero


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *PAGES])
def test_no_line_of_prose_is_longer_than_120_characters(page):
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    "))]
    assert [line for line in prose if len(line) > 120] == []
