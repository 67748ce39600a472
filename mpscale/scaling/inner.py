"""What LossScaleOptimizer asks of the optimizer inside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras


def check_inner(inner: Any) -> None:
    """Raises TypeError where ``inner`` is no Keras optimizer, ValueError where it scales the loss itself."""
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ValueError(f"inner_optimizer is a {type(inner).__name__} already; wrap the optimizer inside it instead")
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(f"inner_optimizer must be a Keras optimizer such as keras.optimizers.Adam(), not {inner!r}")
    if inner.loss_scale_factor is not None:
        raise ValueError(
            f"inner_optimizer has loss_scale_factor={inner.loss_scale_factor}, so gradients would be unscaled twice; "
            f"leave that out and pass loss_scale=StaticLossScale({inner.loss_scale_factor})"
        )


def window(inner: Any) -> int:
    """Micro-batches per update, 0 where gradients are not accumulated."""
    return getattr(inner, "gradient_accumulation_steps", None) or 0


def unlisted_variables(inner: Any) -> Iterator[keras.Variable]:
    """Variables that ``inner`` keeps and does not list, as Keras' Nadam does."""
    listed = {id(variable) for variable in inner.variables}
    for variable in vars(inner).values():
        if isinstance(variable, keras.Variable) and id(variable) not in listed:
            yield variable
