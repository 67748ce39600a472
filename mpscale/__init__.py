"""What mixed precision buys, what it costs, and whether it can be trusted.

The names below are loaded on first use, so that ``import mpscale`` is fast and imports no TensorFlow. A program that
loads saved models needs ``import mpscale.scaling``, which registers the classes with Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

_NAMES = {
    "mpscale.core.mode": ("MODES", "Mode"),
    "mpscale.core.runs": ("Run", "read_run"),
    "mpscale.scaling": ("DynamicLossScale", "LossScaleMonitor", "LossScaleOptimizer", "NoLossScale", "StaticLossScale"),
    "mpscale.workloads": ("Data", "Pipeline", "Workload", "workload"),
}

__all__ = [
    "MODES",
    "Data",
    "DynamicLossScale",
    "LossScaleMonitor",
    "LossScaleOptimizer",
    "Mode",
    "NoLossScale",
    "Pipeline",
    "Run",
    "StaticLossScale",
    "Workload",
    "__version__",
    "read_run",
    "workload",
]

if TYPE_CHECKING:
    from mpscale.core.mode import MODES, Mode
    from mpscale.core.runs import Run, read_run
    from mpscale.scaling import DynamicLossScale, LossScaleMonitor, LossScaleOptimizer, NoLossScale, StaticLossScale
    from mpscale.workloads import Data, Pipeline, Workload, workload


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(module), name)
            return globals()[name]
    raise AttributeError(f"module 'mpscale' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
