"""Whether a train step draws the same random numbers in every mode.

Keras' dropout draws in the dtype of its inputs, and TensorFlow makes a float16 of other bits than a float32. So one
seed gives other masks in another precision. mpscale does not change this, since it would change what is measured: to
draw in float32 takes twice the random bits, and users do not do it. It is recorded instead.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mpscale.core.reason import Code, Reason
from mpscale.scaling.skip import all_nodes

_DRAW = re.compile(r"Random|Multinomial|TruncatedNormal|^Rng|^Stateful(?:Uniform|StandardNormal|TruncatedNormal)")
_NO_DRAW = re.compile(r"^StatelessRandomGet|^RandomShuffle.*Dataset|Dataset|^RngSkip")
_NUMBERS = 4096

_REPLAYED: dict[str, tuple[Callable[..., Any], float]] = {
    "StatelessRandomUniform": (tf.random.stateless_uniform, 0.5),
    "StatelessRandomNormal": (tf.random.stateless_normal, 0.0),
    "StatelessTruncatedNormal": (tf.random.stateless_truncated_normal, 0.0),
}
"""Draws that depend on the dtype: the function, and the median of its numbers."""


def draws_of(graph: Any, jit: bool) -> str | Reason:
    """A digest of the random numbers of a train step, the same for two modes that draw the same up to rounding.

    Every kind of draw of the step is repeated with a seed of its own, compiled as the step is. Two precisions draw the
    same if the same numbers are above the median. The seeds of the step itself are among the initial weights.

    Args:
        graph: the traced graph of the step.
        jit: whether XLA compiles it.

    Returns:
        SHA-256, first 16 hex digits; or the reason why there is none: the step draws nothing, or with operations whose
        numbers depend on more than a seed.
    """
    found = Counter(
        (re.sub(r"V\d$", "", node.op), _dtype(node))
        for node in all_nodes(graph.as_graph_def())
        if _DRAW.search(node.op) and not _NO_DRAW.search(node.op)
    )
    if not found:
        return Reason(Code.NOT_IN_WORKLOAD, "the train step draws no random numbers")
    if stateful := sorted({op for op, _ in found if not op.startswith("Stateless")}):
        return Reason(
            Code.NOT_COMPARABLE,
            f"the train step draws with {', '.join(stateful)}, whose numbers may differ from process to process",
            "draw with keras.random and a SeedGenerator",
        )
    total = hashlib.sha256()
    for (op, dtype), count in sorted(found.items()):
        drawn = _replayed(op, dtype, jit) if op in _REPLAYED else dtype.encode()
        total.update(f"{op} {count} ".encode() + drawn)
    return f"sha256:{total.hexdigest()[:16]}"


def _dtype(node: Any) -> str:
    number = node.attr["dtype"].type
    return tf.as_dtype(number).name if number else ""


def _replayed(op: str, dtype: str, jit: bool) -> bytes:
    draw, median = _REPLAYED[op]
    function = tf.function(lambda: draw([_NUMBERS], seed=[7, 11], dtype=dtype), jit_compile=jit, autograph=False)
    return np.packbits(tf.cast(function(), tf.float32).numpy() >= median).tobytes()
