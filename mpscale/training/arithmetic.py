"""Global settings that decide what is computed: made as the mode has them, and looked at for changes behind its back.

A workload's module and its data function run before the model is built, so what they set is simply set anew. After
that a change can no longer be undone: part of the model may have been made under it.
"""

from __future__ import annotations

import os
import re
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework.config import is_op_determinism_enabled

from mpscale.modes import Mode
from mpscale.telemetry.device import Device
from mpscale.training import accelerator

_REWRITES = ("auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16", "auto_mixed_precision_mkl")
_FPMATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE")
_XLA = ("XLA_FLAGS", "TF_XLA_FLAGS")
_PRECISION_FLAG = re.compile(r"precision|fast_math|fast_min_max|tf32|b?f16|f8|denormal|algorithm|auto_jit|determinis")
_AT_START = {name: os.environ.get(name, "") for name in _XLA}
"""As the process was started: this is imported before the user's module is."""


class Arithmetic:
    """The settings of one case.

    Args:
        mode: what they should be.
        device: where it trains.
        jit: whether train steps are compiled by XLA.
    """

    def __init__(self, mode: Mode, device: Device, jit: bool) -> None:
        self._mode, self._device, self._jit = mode, device, jit
        self._objection: str | None = None

    def settle(self) -> None:
        """Sets everything as the mode has it; call it last before the model is built."""
        # Asked first, since it cannot be put right: objects of the user's module may have been made under it.
        self.look("the import of the workload or its data function", ("floatx",))
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(self._mode.policy)
        accelerator.set_arithmetic(self._mode)
        options = tf.config.optimizer.get_experimental_options()
        unwanted = [name for name in (*_REWRITES, "disable_meta_optimizer") if options.get(name)]
        if self._mode.graph_rewrite:
            unwanted = [name for name in unwanted if name != "auto_mixed_precision"]
        if unwanted:
            tf.config.optimizer.set_experimental_options(dict.fromkeys(unwanted, False))
        if tf.config.optimizer.get_jit():
            tf.config.optimizer.set_jit(False)
        if tf.config.functions_run_eagerly():
            tf.config.run_functions_eagerly(False)

    def look(self, after: str, names: tuple[str, ...] | None = None) -> None:
        """Notes the first settings that are not as the mode has them.

        Args:
            after: what ran last, in words.
            names: the settings to look at; None looks at all.
        """
        if self._objection is not None:
            return
        wrong = [
            f"{name} is {found}, not {wanted}"
            for name, (found, wanted) in self._settings().items()
            if found != wanted and (names is None or name in names)
        ]
        if wrong:
            self._objection = (
                f"after {after}, {'; '.join(wrong)}: a setting of the whole process that decides the precision of "
                f"{self._mode.name}; take what changes it out of the workload or the environment"
            )

    @property
    def objection(self) -> str | None:
        """What was found, what the mode promises and what to do; None where all is as it should be."""
        return self._objection

    def column(self) -> str:
        """Settings beyond the mode's that move a figure: they have to be the same in every mode."""
        parts = ["deterministic operations"] if is_op_determinism_enabled() else []
        parts += [f"{name}={os.environ[name]}" for name in _XLA if os.environ.get(name)]
        return "; ".join(parts) or "none"

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        """{setting: (as it is, as the mode has it)}."""
        options = tf.config.optimizer.get_experimental_options()
        tf32 = tf.config.experimental.tensor_float_32_execution_enabled
        settings: dict[str, tuple[Any, Any]] = {
            "Keras' dtype policy": (keras.config.dtype_policy().name, self._mode.policy),
            "floatx": (keras.config.floatx(), "float32"),
            "TF32": (_on(tf32()), _on(self._mode.tf32)),
            "tf.config.run_functions_eagerly": (_on(tf.config.functions_run_eagerly()), "off"),
        }
        for name in _REWRITES:
            wanted = self._mode.graph_rewrite and name == "auto_mixed_precision"
            settings[f"the graph optimizer's {name}"] = (_on(options.get(name, False)), _on(wanted))
        if self._mode.graph_rewrite:
            settings["the graph optimizer's disable_meta_optimizer"] = (_on(options["disable_meta_optimizer"]), "off")
        if not self._jit:
            settings["tf.config.optimizer.set_jit"] = (tf.config.optimizer.get_jit() or "off", "off")
        for name in _FPMATH:
            settings[name] = (os.environ.get(name, "").upper() or "STRICT", "STRICT")
        override = os.environ.get("NVIDIA_TF32_OVERRIDE")
        if self._device.has_tf32 and override in ("0", "1") and self._mode.name in ("fp32", "tf32"):
            settings["NVIDIA_TF32_OVERRIDE"] = (override, str(int(self._mode.tf32)))
        for name in _XLA:
            settings[name] = tuple(map(_precision_flags, (os.environ.get(name, ""), _AT_START[name])))  # type: ignore[assignment]
        return settings


def _on(value: Any) -> str:
    return "on" if value else "off"


def _precision_flags(flags: str) -> str:
    """Those of XLA's flags that decide precision, or what is compiled."""
    return " ".join(sorted(flag for flag in flags.split() if _PRECISION_FLAG.search(flag))) or "without such flags"
