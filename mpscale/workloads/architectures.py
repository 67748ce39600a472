"""Networks of the large workloads, as functions of their sizes. Importing this imports Keras.

All of them are built without dropout: a mask is drawn in the precision of its layer, so modes would not train the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
from keras import layers


def _normal() -> keras.initializers.Initializer:
    """How BERT and GPT-2 initialise a matrix. One object for each matrix: the same draws the same numbers again."""
    return keras.initializers.RandomNormal(stddev=0.02)


def _uniform() -> keras.initializers.Initializer:
    """How Zaremba et al. initialise their large LSTM."""
    return keras.initializers.RandomUniform(-0.04, 0.04)


def resnet50(side: int, classes: int, through: str | None = None) -> keras.Model:
    """ResNet-50 of ``keras.applications`` on images uint8 (batch, side, side, 3); logits (batch, classes).

    ``through`` names the layer after which the network is cut off; None for all of it.
    """
    images = keras.Input((side, side, 3), dtype="uint8")
    scaled = layers.Rescaling(1 / 127.5, offset=-1)(images)
    return _classifier(keras.applications.ResNet50, images, scaled, classes, through)


def efficientnet_b0(side: int, classes: int, through: str | None = None) -> keras.Model:
    """EfficientNet-B0 of ``keras.applications``, which rescales images itself; otherwise as :func:`resnet50`."""
    images = keras.Input((side, side, 3), dtype="uint8")
    return _classifier(keras.applications.EfficientNetB0, images, images, classes, through)


def _classifier(make: Callable[..., keras.Model], images: Any, inputs: Any, classes: int, through: str | None) -> Any:
    whole = make(include_top=False, weights=None, input_tensor=inputs)
    for layer in whole.layers:
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
    features = whole.output if through is None else whole.get_layer(through).output
    pooled = layers.GlobalAveragePooling2D()(features)
    return keras.Model(images, layers.Dense(classes, dtype="float32")(pooled))


def bert(
    vocabulary: int, positions: int, tokens: int, masked: Sequence[int], blocks: int, width: int, heads: int
) -> keras.Model:
    """A BERT encoder that predicts masked tokens: int64 (batch, tokens) to logits (batch, masked, vocabulary).

    As in BERT's own pre-training, only the masked places reach the vocabulary. ``masked`` is the first of them, the end
    and the step: real masks are drawn at random, but the work is the same. The product with the vocabulary shares the
    embedding's matrix.

    It has no embedding of segments and no pooler, which only the prediction of the next sentence needs.
    """
    inputs = keras.Input((tokens,), dtype="int64")
    embedding = layers.ReversibleEmbedding(vocabulary, width, embeddings_initializer=_normal())
    x = layers.LayerNormalization(epsilon=1e-12)(Positions(positions)(embedding(inputs)))
    for _ in range(blocks):
        attended = _attention(width, heads)(x, x)
        x = layers.LayerNormalization(epsilon=1e-12)(x + attended)
        x = layers.LayerNormalization(epsilon=1e-12)(x + _feed_forward(x, width, approximate=False))
    x = _dense(width)(x[:, slice(*masked)])
    x = layers.LayerNormalization(epsilon=1e-12)(keras.ops.gelu(x, approximate=False))
    return keras.Model(inputs, _float32(Bias()(embedding(x, reverse=True))))


def gpt2(vocabulary: int, positions: int, tokens: int, blocks: int, width: int, heads: int) -> keras.Model:
    """A GPT-2 decoder that predicts the next token: int64 (batch, tokens) to logits (batch, tokens, vocabulary).

    The product with the vocabulary shares the embedding's matrix.
    """
    inputs = keras.Input((tokens,), dtype="int64")
    embedding = layers.ReversibleEmbedding(vocabulary, width, embeddings_initializer=_normal())
    x = Positions(positions)(embedding(inputs))
    for _ in range(blocks):
        normed = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + _attention(width, heads)(normed, normed, use_causal_mask=True)
        x = x + _feed_forward(layers.LayerNormalization(epsilon=1e-5)(x), width, approximate=True)
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model(inputs, _float32(embedding(x, reverse=True)))


def unet(side: int, channels: int, levels: int, classes: int) -> keras.Model:
    """A U-Net on images uint8 (batch, side, side, 1); logits of every pixel (batch, side, side, classes).

    Convolutions are padded, so that every pixel has a prediction.
    """
    convolution = partial(layers.Conv2D, padding="same", activation="relu", kernel_initializer="he_normal")
    images = keras.Input((side, side, 1), dtype="uint8")
    x, skipped = layers.Rescaling(1 / 255)(images), []
    for level in range(levels):
        x = convolution(channels << level, 3)(convolution(channels << level, 3)(x))
        skipped.append(x)
        x = layers.MaxPooling2D()(x)
    x = convolution(channels << levels, 3)(convolution(channels << levels, 3)(x))
    for level in reversed(range(levels)):
        x = layers.Conv2DTranspose(channels << level, 2, strides=2)(x)
        x = layers.Concatenate()([skipped[level], x])
        x = convolution(channels << level, 3)(convolution(channels << level, 3)(x))
    return keras.Model(images, layers.Conv2D(classes, 1, dtype="float32")(x))


def mlp(inputs: int, hidden: int, units: int, classes: int) -> keras.Model:
    """A dense network of ``hidden`` layers on uint8 (batch, inputs); logits (batch, classes)."""
    dense = [layers.Dense(units, activation="relu", kernel_initializer="he_normal") for _ in range(hidden)]
    first = [keras.Input((inputs,), dtype="uint8"), layers.Rescaling(1 / 255)]
    return keras.Sequential([*first, *dense, layers.Dense(classes, dtype="float32")])


def lstm(vocabulary: int, tokens: int, recurrent: int, units: int) -> keras.Model:
    """A language model of LSTM layers: int64 (batch, tokens) to logits of the next (batch, tokens, vocabulary)."""
    inputs = keras.Input((tokens,), dtype="int64")
    x = layers.Embedding(vocabulary, units, embeddings_initializer=_uniform())(inputs)
    for _ in range(recurrent):
        # XLA cannot compile cuDNN's kernels, and each precision has to run the same operations.
        x = layers.LSTM(
            units,
            return_sequences=True,
            kernel_initializer=_uniform(),
            recurrent_initializer=_uniform(),
            use_cudnn=False,
        )(x)
    return keras.Model(inputs, _float32(layers.Dense(vocabulary, kernel_initializer=_uniform())(x)))


class Positions(layers.Layer):
    """Adds an embedding of each place to a sequence (batch, places, width). Its table may have more places."""

    def __init__(self, places: int, **options: Any) -> None:
        super().__init__(**options)
        self.places = places

    def build(self, shape: Any) -> None:
        """Make the table."""
        self.table = self.add_weight(shape=(self.places, shape[-1]), initializer=_normal(), name="table")

    def call(self, x: Any) -> Any:
        """Return the sum, of the same shape."""
        return x + self.table[: x.shape[1]]

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "places": self.places}


class Bias(layers.Layer):
    """Adds a bias to the last axis."""

    def build(self, shape: Any) -> None:
        """Make the bias."""
        self.bias = self.add_weight(shape=(shape[-1],), initializer="zeros", name="bias")

    def call(self, x: Any) -> Any:
        """Return the sum, of the same shape."""
        return x + self.bias


def _attention(width: int, heads: int) -> layers.Layer:
    return layers.MultiHeadAttention(heads, width // heads, kernel_initializer=_normal())


def _feed_forward(x: Any, width: int, approximate: bool) -> Any:
    """The dense part of a block. BERT's activation is exact; GPT-2 approximates it by a tanh."""
    return _dense(width)(keras.ops.gelu(_dense(4 * width)(x), approximate=approximate))


def _dense(units: int) -> layers.Layer:
    return layers.Dense(units, kernel_initializer=_normal())


def _float32(logits: Any) -> Any:
    """Logits for the loss. As in practice, only their product is computed in the mode's precision."""
    return layers.Activation("linear", dtype="float32")(logits)
