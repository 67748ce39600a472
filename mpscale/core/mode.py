"""Modes: ways to train a model. Two trainings of one model differ in the mode and in nothing else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mpscale.core.device import Device
from mpscale.core.loss_scale import DynamicLossScale

Products = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]
"""A precision of products, as tables of GPUs' peaks name it."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a mode scales its loss. This is data: the worker turns it into code.

    Args:
        rule: what sets the loss scale; ``worker/scaler.py`` has the class for each.
        setting: the field of :class:`~mpscale.core.case.Settings` with the arguments of the rule that the user chose;
            None if the user cannot choose any.
        argument: the argument that this field holds if it is a single number; None if it maps arguments to numbers.
        takes: the arguments of this field that the rule knows; empty for all.
        checks_gradients: whether it is known for each step if its gradients were finite.
    """

    rule: Literal["static", "dynamic", "logmax", "keras", "article"]
    setting: str | None = None
    argument: str | None = None
    takes: tuple[str, ...] = ()
    checks_gradients: bool = True


_DYNAMIC = Scaling("dynamic", setting="dynamic_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to train a model.

    Args:
        name: what the user types and every table shows.
        summary: one line for ``mpscale workloads`` and the reports.
        colour: of its line in every picture, as ``#RRGGBB``; its contrast with white is at least 3.
        on_dark: the same on a dark page, ``#0d1117``; its contrast with that is at least 3.
        marker: of its points in every picture, as matplotlib names it.
        policy: the Keras dtype policy under which the model is built.
        scaling: how the loss is scaled; None trains with the bare optimizer.
        tf32: whether devices with TF32 may round float32 matrix products to it. This is TensorFlow's default, which
            only ``fp32`` turns off.
        on_trial: the mode exists to show what a rule does, so a training that diverges or stalls is a result and not a
            failure.
        is_control: the mode is a control experiment, which shows what happens without a proper loss scale. What it
            costs is no cost of mixed precision, and nobody is advised to use it.
        graph_rewrite: whether TensorFlow rewrites its graphs to float16, whatever the policy is.
        float8: whether Keras rounds the factors of products to float8, in layers that compute in the policy's low
            precision and that it can quantize.
    """

    name: str
    summary: str
    colour: str
    on_dark: str
    marker: str
    policy: Literal["float32", "mixed_float16", "mixed_bfloat16"]
    scaling: Scaling | None = None
    tf32: bool = True
    on_trial: bool = False
    is_control: bool = False
    graph_rewrite: bool = False
    float8: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether part of the training is computed in less than float32."""
        return self.policy != "float32" or self.graph_rewrite

    @property
    def products(self) -> Products:
        """The precision of most products, the one that the mode is about; on a GPU without TF32, tf32 means fp32."""
        if self.float8:
            return "fp8"
        if self.graph_rewrite or self.policy == "mixed_float16":
            return "fp16"
        if self.policy == "mixed_bfloat16":
            return "bf16"
        return "tf32" if self.tf32 else "fp32"

    @property
    def sees_overflow(self) -> bool:
        """Whether it is known for each step if it overflowed."""
        return self.scaling is not None and self.scaling.checks_gradients

    def scale_arguments(self, settings: object) -> dict[str, float]:
        """The arguments of the mode's loss scale that the settings of a run choose.

        Args:
            settings: a :class:`~mpscale.core.case.Settings`.
        """
        if self.scaling is None or self.scaling.setting is None:
            return {}
        chosen = getattr(settings, self.scaling.setting)
        if self.scaling.argument is not None:
            return {self.scaling.argument: chosen}
        return {name: value for name, value in chosen.items() if name in (self.scaling.takes or chosen)}

    def growth_interval(self, settings: object) -> int | None:
        """Steps without overflow after which the mode's loss scale grows; None if it has none or never does so.

        Args:
            settings: a :class:`~mpscale.core.case.Settings`.
        """
        if self.scaling is None or self.scaling.rule not in ("dynamic", "keras"):
            return None
        return int(self.scale_arguments(settings).get("growth_interval", DynamicLossScale.growth_interval))

    def unsupported_reason(self, device: Device, jit: bool, replicated: bool = False) -> str | None:
        """Why the mode cannot run as what its name promises; None if it can.

        Args:
            device: where it would run.
            jit: whether train steps are compiled with XLA.
            replicated: whether a strategy of tf.distribute trains replicas.
        """
        if replicated and (self.graph_rewrite or self.float8):
            return f"{self.name} is not measured on replicas; leave the mode out, or run it without --mp-strategy"
        if self.name == "tf32" and not device.has_tf32:
            return f"TF32 needs an NVIDIA GPU of compute capability 8.0 or newer; this is {_described(device)}"
        # NVIDIA's Volta was the first to have units for float16 products.
        if self.graph_rewrite and (device.compute_capability or (0, 0)) < (7, 0):
            return (
                "TensorFlow's rewrite to float16 needs an NVIDIA GPU of compute capability 7.0 or newer"
                f"{' and --mp-jit off' if jit else ''}; this is {_described(device)}"
            )
        if self.graph_rewrite and jit:
            return (
                "TensorFlow's rewrite to float16 has no effect on functions compiled by XLA; run this mode, and those "
                "it is compared with, with --mp-jit off"
            )
        if self.float8 and device.kind == "gpu":
            if not device.has_float8:
                return (
                    "float8 products need an NVIDIA GPU of compute capability 8.9 (Ada), 9.0 (Hopper) or newer; this "
                    f"is {_described(device)}"
                )
            if not jit:
                return (
                    "without XLA, TensorFlow rounds to float8 and multiplies in bfloat16, which only costs time; run "
                    "this mode, and those it is compared with, with --mp-jit on"
                )
        return None


def _described(device: Device) -> str:
    capability = device.compute_capability
    return f"{device.name} ({'.'.join(map(str, capability))})" if capability else device.name


# Okabe and Ito, "Color Universal Design" (2008), without its colours that are too light for lines on white. Others are
# from IBM's and Paul Tol's palettes, chosen to stay apart under protanopia and deuteranopia; markers do the rest.
_ALL = (
    Mode(
        name="fp32",
        colour="#000000",
        on_dark="#e6edf3",
        marker="o",
        policy="float32",
        tf32=False,
        summary="float32 throughout, TF32 off: the baseline",
    ),
    Mode(
        name="tf32",
        colour="#661100",
        on_dark="#c98d6f",
        marker="s",
        policy="float32",
        summary="float32 with TF32 products, TensorFlow's default on Ampere and newer",
    ),
    Mode(
        name="mixed-static",
        colour="#D55E00",
        on_dark="#ff8a3d",
        marker="D",
        policy="mixed_float16",
        scaling=Scaling("static", setting="static_scale", argument="scale"),
        on_trial=True,
        summary="float16 with a constant loss scale, overflow steps skipped",
    ),
    Mode(
        name="mixed-dynamic",
        colour="#0072B2",
        on_dark="#56b4e9",
        marker="^",
        policy="mixed_float16",
        scaling=_DYNAMIC,
        summary="float16 with a loss scale that follows overflow",
    ),
    Mode(
        name="mixed-bf16",
        colour="#009E73",
        on_dark="#2fcf9f",
        marker="v",
        policy="mixed_bfloat16",
        summary="bfloat16, which has float32's range and needs no loss scale",
    ),
    Mode(
        name="mixed-fp8",
        colour="#999933",
        on_dark="#d9d76b",
        marker="X",
        policy="mixed_bfloat16",
        float8=True,
        on_trial=True,
        summary="mixed-bf16 with Dense and EinsumDense layers in Keras' float8, which scales each tensor",
    ),
    Mode(
        name="mixed-unscaled",
        colour="#CC79A7",
        on_dark="#f3a8d0",
        marker="P",
        policy="mixed_float16",
        on_trial=True,
        is_control=True,
        summary="float16 without a loss scale: shows what scaling is for",
    ),
    Mode(
        name="mixed-logmax",
        colour="#785EF0",
        on_dark="#a797ff",
        marker="h",
        policy="mixed_float16",
        scaling=Scaling("logmax"),
        on_trial=True,
        summary="float16 with a loss scale that follows the largest gradients",
    ),
    Mode(
        name="mixed-keras",
        colour="#882255",
        on_dark="#e5709f",
        marker="<",
        policy="mixed_float16",
        scaling=Scaling("keras", setting="dynamic_scale", takes=("initial", "growth_interval")),
        on_trial=True,
        summary="float16 with Keras' own LossScaleOptimizer, side by side",
    ),
    Mode(
        name="graph-rewrite",
        colour="#117733",
        on_dark="#62c073",
        marker=">",
        policy="float32",
        scaling=_DYNAMIC,
        graph_rewrite=True,
        summary="TensorFlow's own rewrite of float32 graphs to float16, with mixed-dynamic's scale; GPU, without XLA",
    ),
    Mode(
        name="article",
        colour="#4B0092",
        on_dark="#c78dff",
        marker="p",
        policy="mixed_float16",
        scaling=Scaling("article", checks_gradients=False),
        on_trial=True,
        is_control=True,
        summary="float16 with the rule of the article mpscale began with",
    ),
)

MODES: MappingProxyType[str, Mode] = MappingProxyType({mode.name: mode for mode in _ALL})
"""Every mode by name, in the order in which tables show them."""

SETTABLE = tuple(
    dict.fromkeys(
        mode.scaling
        for mode in _ALL
        if mode.scaling is not None and mode.scaling.setting is not None and not mode.scaling.takes
    )
)
"""The ways of scaling whose arguments the user can set, each with all its arguments."""

DEFAULT_MODES = ("fp32", "mixed-static", "mixed-dynamic", "mixed-bf16")
"""The modes that run by default; devices with TF32 run ``tf32`` too."""


def is_mixed(mode: str) -> bool:
    """Whether a mode computes in less than float32. An unknown mode is assumed to."""
    return mode not in MODES or MODES[mode].is_mixed


def default_modes(device: Device, names: Iterable[str] = DEFAULT_MODES) -> tuple[Mode, ...]:
    """The modes that run on ``device`` if the user names none: those in ``names``, and tf32 if the device has it."""
    wanted = set(names) | ({"tf32"} if device.has_tf32 else set())
    return tuple(mode for mode in _ALL if mode.name in wanted)


def select_modes(names: Iterable[str]) -> tuple[Mode, ...]:
    """The modes with these names, each once, in the order of :data:`MODES`.

    Raises:
        ValueError: there is no mode of that name; the message lists the modes.
    """
    wanted = list(names)
    for name in wanted:
        if name not in MODES:
            close = difflib.get_close_matches(name, MODES, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"no mode is called {name!r}{hint}; the modes are {', '.join(MODES)}")
    return tuple(mode for mode in _ALL if mode.name in wanted)
