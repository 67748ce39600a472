"""The modes: all that differs between two trainings of one model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mpscale.core.device import Device

Scaling = Literal["none", "static", "dynamic", "logmax", "keras", "article"]


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of training a model.

    Args:
        name: what the user types and every table shows.
        policy: the Keras dtype policy the model is built under.
        scaling: which loss scaling the train step uses; ``"none"`` is the bare optimizer.
        tf32: whether float32 matrix products may be rounded to TF32 on devices that can. Only ``fp32`` says no:
            everywhere else the setting is the one TensorFlow has by default.
        on_trial: the mode exists to show what a rule does, so a training that diverges or stalls under it is a
            result and not a failure.
        summary: one line for ``mpscale workloads`` and the reports.
        colour: of its line in every picture, as ``#RRGGBB``; contrast with white is at least 3.
        marker: of its points in every picture, as matplotlib names it.
        graph_rewrite: whether TensorFlow rewrites its graphs to float16 by itself, whatever the policy says.
    """

    name: str
    policy: Literal["float32", "mixed_float16", "mixed_bfloat16"]
    scaling: Scaling
    tf32: bool
    on_trial: bool
    summary: str
    colour: str
    marker: str
    graph_rewrite: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether part of the training is computed in less than float32."""
        return self.policy != "float32" or self.graph_rewrite

    @property
    def sees_overflow(self) -> bool:
        """Whether each step's overflow is known: without a finite check, or Keras' own rule, it is not."""
        return self.scaling in ("static", "dynamic", "logmax", "keras")

    def unsupported_reason(self, device: Device, jit: bool) -> str | None:
        """Why this mode cannot run as what it claims to be, or None if it can.

        Args:
            device: where it would run.
            jit: whether train steps are compiled with XLA.
        """
        if self.name == "tf32" and not device.has_tf32:
            return f"TF32 needs an NVIDIA GPU of compute capability 8.0 or newer; this is {_described(device)}"
        if self.graph_rewrite and not _rewrites_graphs(device):
            return (
                "TensorFlow's rewrite to float16 needs an NVIDIA GPU of compute capability 7.0 or newer"
                f"{' and --mp-jit off' if jit else ''}; this is {_described(device)}"
            )
        if self.graph_rewrite and jit:
            return (
                "TensorFlow's rewrite to float16 does nothing to what XLA compiles; run this mode, and those it is "
                "compared with, with --mp-jit off"
            )
        return None


def _described(device: Device) -> str:
    capability = device.compute_capability
    return f"{device.name} ({'.'.join(map(str, capability))})" if capability else device.name


def _rewrites_graphs(device: Device) -> bool:
    """Whether TensorFlow's rewrite finds units for float16: from NVIDIA's Volta (7.0) on."""
    return device.compute_capability is not None and device.compute_capability >= (7, 0)


# Okabe and Ito, "Color Universal Design" (2008), without its colours that are too light for lines on white. Others from
# IBM's and Paul Tol's palettes, chosen to stay apart under protanopia and deuteranopia; markers tell apart the rest.
_ALL = (
    Mode("fp32", "float32", "none", False, False, "float32 throughout, TF32 off: the baseline", "#000000", "o"),
    Mode(
        "tf32",
        "float32",
        "none",
        True,
        False,
        "float32 with TF32 products, TensorFlow's default on Ampere and newer",
        "#661100",
        "s",
    ),
    Mode(
        "mixed-static",
        "mixed_float16",
        "static",
        True,
        True,
        "float16 with a constant loss scale, overflow steps skipped",
        "#D55E00",
        "D",
    ),
    Mode(
        "mixed-dynamic",
        "mixed_float16",
        "dynamic",
        True,
        False,
        "float16 with a loss scale that follows overflow",
        "#0072B2",
        "^",
    ),
    Mode(
        "mixed-bf16",
        "mixed_bfloat16",
        "none",
        True,
        False,
        "bfloat16, which has float32's range and needs no loss scale",
        "#009E73",
        "v",
    ),
    Mode(
        "mixed-unscaled",
        "mixed_float16",
        "none",
        True,
        True,
        "float16 without a loss scale: shows what scaling is for",
        "#CC79A7",
        "P",
    ),
    Mode(
        "mixed-logmax",
        "mixed_float16",
        "logmax",
        True,
        True,
        "float16 with a loss scale that follows the largest gradients",
        "#785EF0",
        "h",
    ),
    Mode(
        "mixed-keras",
        "mixed_float16",
        "keras",
        True,
        True,
        "float16 with Keras' own LossScaleOptimizer, side by side",
        "#882255",
        "<",
    ),
    Mode(
        "graph-rewrite",
        "float32",
        "dynamic",
        True,
        False,
        "TensorFlow's own rewrite of float32 graphs to float16, with mixed-dynamic's scale; GPU, without XLA",
        "#117733",
        ">",
        graph_rewrite=True,
    ),
    Mode(
        "article",
        "mixed_float16",
        "article",
        True,
        True,
        "float16 with the rule of the article mpscale began with",
        "#4B0092",
        "p",
    ),
)

MODES: MappingProxyType[str, Mode] = MappingProxyType({mode.name: mode for mode in _ALL})
"""Every mode by name, in the order in which tables show them."""

DEFAULT_MODES = ("fp32", "mixed-static", "mixed-dynamic", "mixed-bf16")
"""What runs where no modes are named; ``tf32`` joins it on devices that have TF32."""


def is_mixed(mode: str) -> bool:
    """Whether a mode computes in less than float32. One that is not known here is taken to."""
    return mode not in MODES or MODES[mode].is_mixed


def default_modes(device: Device) -> tuple[Mode, ...]:
    """The modes that run on ``device`` where none are named."""
    names = set(DEFAULT_MODES) | ({"tf32"} if device.has_tf32 else set())
    return tuple(mode for mode in _ALL if mode.name in names)


def select_modes(names: Iterable[str]) -> tuple[Mode, ...]:
    """The modes called ``names``, in the order of :data:`MODES` and each once.

    Raises:
        ValueError: a name is not a mode; the message lists those that are.
    """
    wanted = list(names)
    for name in wanted:
        if name not in MODES:
            close = difflib.get_close_matches(name, MODES, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"no mode is called {name!r}{hint}; the modes are {', '.join(MODES)}")
    return tuple(mode for mode in _ALL if mode.name in wanted)
