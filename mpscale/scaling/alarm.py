"""What happens when the scale sits at its floor and steps still overflow: no rule can help that training any more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

Alarm = Literal["warn", "stop", "ignore"]

_NAMED = 5
"""Variables that a message names."""


class FloorOverflowWarning(UserWarning):
    """Steps overflow although the loss scale is at its floor."""


class FloorOverflowError(RuntimeError):
    """Steps overflow although the loss scale is at its floor, and the policy is to stop."""


def check_policy(policy: str) -> None:
    """Raises ValueError where ``policy`` is no alarm policy."""
    if policy not in get_args(Alarm):
        raise ValueError(f"alarm must be one of {', '.join(map(repr, get_args(Alarm)))}, not {policy!r}")


def raise_alarm(policy: Alarm, counters: Mapping[str, Any], scale: float) -> None:
    """Does what ``policy`` says about overflow at the floor.

    Args:
        policy: ``"warn"``, ``"stop"`` or ``"ignore"``.
        counters: of the optimizer; ``floor_overflow`` above 0.
        scale: the loss scale.

    Raises:
        FloorOverflowError: the policy is ``"stop"``.
    """
    if policy == "ignore":
        return
    message = (
        f"{counters['floor_overflow']} of {counters['attempted']} steps had gradients that were not finite although "
        f"the loss scale was at its floor ({scale:g}); the last one was step {counters['last_overflow']}. "
        f"{_culprits(counters['by_variable'])} "
        "A lower scale cannot help: look for a learning rate that is too high, bad inputs, or a layer that "
        "overflows by itself and should compute in float32"
    )
    if policy == "stop":
        raise FloorOverflowError(message)
    warnings.warn(message, FloorOverflowWarning, stacklevel=3)


def _culprits(by_variable: Mapping[str, int] | None) -> str:
    if by_variable is None:
        return "LossScaleOptimizer(..., blame=True) would tell which variables they belong to."
    worst = sorted(by_variable.items(), key=lambda item: -item[1])
    named = ", ".join(f"{path} ({count} steps)" for path, count in worst[:_NAMED])
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return f"Not finite were the gradients of {named}{more}."
