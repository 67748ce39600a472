"""Workloads of the size that mixed precision is bought for. Their inputs are synthetic.

:data:`SIZES` has two sizes of each network: ``full``, as it was published, and ``tiny``, which trains within seconds on
two cores. docs/workloads.md says where each network is from, and what it does and does not show.

Images are uint8 and are rescaled in the network, as in practice, so the training has nearly all of the device's memory.
Tokens are int64, since TensorFlow keeps int32 tensors of a GPU program in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mpscale.workloads.data import Data
from mpscale.workloads.workload import Workload

if TYPE_CHECKING:
    import keras

_SEED = 20


@dataclass(frozen=True, slots=True)
class Size:
    """A size of a network.

    Args:
        network: arguments of its function in :mod:`mpscale.workloads.architectures`.
        examples: in the training set; also the largest batch.
        batch: examples per step.
        steps: of a training.
    """

    network: Mapping[str, Any]
    examples: int
    batch: int
    steps: int = 100


def _sizes(full: Size, tiny: Size) -> Mapping[str, Size]:
    return MappingProxyType({"full": full, "tiny": tiny})


_BERT_BASE = {"vocabulary": 30_522, "positions": 512, "tokens": 128, "masked": (0, 120, 6)}
_GPT2_SMALL = {"vocabulary": 50_257, "positions": 1024, "tokens": 512}
_BASE = {"blocks": 12, "width": 768, "heads": 12}
_TINY = {"blocks": 1, "width": 32, "heads": 2}

SIZES: Mapping[str, Mapping[str, Size]] = MappingProxyType(
    {
        "resnet50": _sizes(
            full=Size({"side": 224, "classes": 1000}, examples=1024, batch=192),
            tiny=Size({"side": 32, "classes": 10, "through": "conv2_block1_out"}, examples=32, batch=8, steps=8),
        ),
        "efficientnet-b0": _sizes(
            full=Size({"side": 224, "classes": 1000}, examples=1024, batch=320),
            tiny=Size({"side": 32, "classes": 10, "through": "block1a_project_bn"}, examples=32, batch=8, steps=8),
        ),
        "bert-base": _sizes(
            full=Size({**_BERT_BASE, **_BASE}, examples=4096, batch=320),
            tiny=Size(
                {"vocabulary": 128, "positions": 32, "tokens": 16, "masked": (0, 15, 5), **_TINY},
                examples=32,
                batch=8,
                steps=8,
            ),
        ),
        "gpt2-small": _sizes(
            full=Size({**_GPT2_SMALL, **_BASE}, examples=1024, batch=32),
            tiny=Size(
                {"vocabulary": 128, "positions": 32, "tokens": 16, **_TINY},
                examples=32,
                batch=8,
                steps=8,
            ),
        ),
        "unet": _sizes(
            full=Size({"side": 512, "channels": 64, "levels": 4, "classes": 2}, examples=128, batch=16),
            tiny=Size({"side": 16, "channels": 4, "levels": 1, "classes": 2}, examples=32, batch=8, steps=8),
        ),
        "wide-mlp": _sizes(
            full=Size({"inputs": 784, "hidden": 4, "units": 8192, "classes": 10}, examples=65_536, batch=8192),
            tiny=Size({"inputs": 784, "hidden": 4, "units": 64, "classes": 10}, examples=256, batch=64, steps=8),
        ),
        "lstm-lm": _sizes(
            full=Size({"vocabulary": 10_000, "tokens": 35, "recurrent": 2, "units": 1500}, examples=4096, batch=2048),
            tiny=Size({"vocabulary": 64, "tokens": 6, "recurrent": 2, "units": 16}, examples=32, batch=8, steps=8),
        ),
    }
)
"""The sizes of each network."""


def images(size: Size) -> Data:
    """Images uint8 (examples, side, side, 3) and their classes, all at random."""
    random, network = np.random.default_rng(_SEED), size.network
    x = random.integers(0, 256, (size.examples, network["side"], network["side"], 3), np.uint8)
    return Data(x, random.integers(0, network["classes"], size.examples))


def pixels(size: Size) -> Data:
    """Images uint8 (examples, side, side, 1) and the classes of their pixels, all at random."""
    random, network = np.random.default_rng(_SEED), size.network
    shape = (size.examples, network["side"], network["side"])
    x = random.integers(0, 256, (*shape, 1), np.uint8)
    return Data(x, random.integers(0, network["classes"], shape, np.uint8))


def features(size: Size) -> Data:
    """Features uint8 (examples, inputs) and classes, all at random."""
    random, network = np.random.default_rng(_SEED), size.network
    x = random.integers(0, 256, (size.examples, network["inputs"]), np.uint8)
    return Data(x, random.integers(0, network["classes"], size.examples))


def next_tokens(size: Size) -> Data:
    """Tokens at random, int64 (examples, tokens), and the token after each."""
    text = _text(size, size.network["tokens"] + 1)
    return Data(text[:, :-1], text[:, 1:])


def masked_tokens(size: Size) -> Data:
    """Tokens at random, int64 (examples, tokens), some of which are replaced by a mask and are the labels."""
    text, masked = _text(size, size.network["tokens"]), slice(*size.network["masked"])
    x = text.copy()
    x[:, masked] = _MASK
    return Data(x, text[:, masked])


_MASK = 103
"""BERT's token for a masked one."""


def _text(size: Size, tokens: int) -> Any:
    return np.random.default_rng(_SEED).integers(0, size.network["vocabulary"], (size.examples, tokens))


def _network(function: str, size: Size) -> keras.Model:
    from mpscale.workloads import architectures

    model: keras.Model = getattr(architectures, function)(**size.network)
    return model


def _optimizer(kind: str, learning_rate: float, options: Mapping[str, Any]) -> keras.optimizers.Optimizer:
    import keras

    return getattr(keras.optimizers, kind)(learning_rate, **options)


_Optimizer = Callable[[], "keras.optimizers.Optimizer"]


def _with(kind: str, learning_rate: float, **options: Any) -> _Optimizer:
    return partial(_optimizer, kind, learning_rate, options)


def _both(
    name: str, function: str, data: Callable[[Size], Data], optimizer: _Optimizer, summary: str
) -> dict[str, Workload]:
    """The workload in both sizes."""
    found = {}
    for which, size in SIZES[name].items():
        full = which == "full"
        found[which] = Workload(
            name=name if full else f"{name}-{which}",
            summary=summary if full else f"{name} in small, for tests",
            model=partial(_network, function, size),
            data=partial(data, size),
            optimizer=optimizer,
            metric=None,
            synthetic=True,
            batch_size=size.batch,
            train_steps=size.steps,
        )
    return found


_LARGE = (
    _both(
        "resnet50",
        "resnet50",
        images,
        _with("SGD", 0.1, momentum=0.9, weight_decay=1e-4),
        "ResNet-50, images of 224 x 224, 25.6 M parameters, SGD with momentum",
    ),
    _both(
        "efficientnet-b0",
        "efficientnet_b0",
        images,
        _with("RMSprop", 0.016, rho=0.9, momentum=0.9, epsilon=1e-3, weight_decay=1e-5),
        "EfficientNet-B0, images of 224 x 224, 5.3 M parameters, RMSprop",
    ),
    _both(
        "bert-base",
        "bert",
        masked_tokens,
        _with("AdamW", 1e-4, weight_decay=0.01, epsilon=1e-6, global_clipnorm=1.0),
        "BERT base, masked tokens, sequences of 128, 110 M parameters, AdamW",
    ),
    _both(
        "gpt2-small",
        "gpt2",
        next_tokens,
        _with("AdamW", 6e-4, weight_decay=0.1, beta_2=0.95, epsilon=1e-8, global_clipnorm=1.0),
        "GPT-2 small, next token, sequences of 512, 124 M parameters, AdamW",
    ),
    _both(
        "unet",
        "unet",
        pixels,
        _with("Adam", 1e-4),
        "U-Net, every pixel of 512 x 512, 31 M parameters, Adam",
    ),
    _both(
        "wide-mlp",
        "mlp",
        features,
        _with("RMSprop", 1e-5),
        "dense 784 - 4 x 8192 - 10, 208 M parameters, RMSprop",
    ),
    _both(
        "lstm-lm",
        "lstm",
        next_tokens,
        _with("SGD", 1.0, global_clipnorm=10.0),
        "language model of two LSTM layers of 1,500 units, 66 M parameters, SGD",
    ),
)

FULL = tuple(sizes["full"] for sizes in _LARGE)
"""The large workloads, in the order in which they are listed."""

TINY = tuple(sizes["tiny"] for sizes in _LARGE)
"""The same in small."""
