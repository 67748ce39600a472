"""Loss scaling for Keras and TensorFlow, usable without the rest of mpscale.

Importing this package, or anything in it, registers its classes with Keras, which ``keras.saving.load_model`` needs.
It imports neither Keras nor TensorFlow: the names below are loaded on first use, and if Keras is not imported yet, the
classes are registered once it is.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpscale.scaling.callback import LossScaleMonitor
    from mpscale.scaling.gradients import all_finite
    from mpscale.scaling.guard import UnscaledLossWarning
    from mpscale.scaling.inner import SettingTooLateWarning
    from mpscale.scaling.ledger import FloorOverflowError, FloorOverflowWarning
    from mpscale.scaling.loss_scale import (
        ArticleLossScale,
        DynamicLossScale,
        LogMaxLossScale,
        LossScale,
        NoLossScale,
        StaticLossScale,
    )
    from mpscale.scaling.optimizer import LossScaleOptimizer

__all__ = [
    "ArticleLossScale",
    "DynamicLossScale",
    "FloorOverflowError",
    "FloorOverflowWarning",
    "LogMaxLossScale",
    "LossScale",
    "LossScaleMonitor",
    "LossScaleOptimizer",
    "NoLossScale",
    "SettingTooLateWarning",
    "StaticLossScale",
    "UnscaledLossWarning",
    "all_finite",
]

_MODULES = {
    "FloorOverflowError": "ledger",
    "FloorOverflowWarning": "ledger",
    "LossScaleMonitor": "callback",
    "LossScaleOptimizer": "optimizer",
    "SettingTooLateWarning": "inner",
    "UnscaledLossWarning": "guard",
    "all_finite": "gradients",
}
"""Where the names are; the others are in loss_scale."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'loss_scale')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Import the optimizer, which registers the classes, if Keras runs on TensorFlow here."""
    # Keras with another backend must not import TensorFlow, nor may a broken TensorFlow break the import of Keras:
    # whoever uses a class of this package gets the error.
    if "tensorflow" in sys.modules:
        with contextlib.suppress(Exception):
            importlib.import_module(f"{__name__}.optimizer")


class _AfterKeras(MetaPathFinder):
    """Registers the classes when Keras has been imported, whoever imports it.

    Nothing less works: a program that loads a model calls nothing of this package between the two imports.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "keras":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == "keras":  # The loader may be one for several modules.
                    _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "keras" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterKeras())
