"""What mixed precision buys, what it costs, and whether it can be trusted.

The names below are loaded on first use, so that ``import mpscale`` is fast and imports no TensorFlow. A program that
loads saved models needs ``import mpscale.scaling``, which registers the classes with Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "StaticLossScale": "mpscale.scaling",
    "DynamicLossScale": "mpscale.scaling",
    "NoLossScale": "mpscale.scaling",
    "LossScaleOptimizer": "mpscale.scaling",
    "LossScaleMonitor": "mpscale.scaling",
    "MODES": "mpscale.core.mode",
    "Mode": "mpscale.core.mode",
    "Workload": "mpscale.workloads",
    "workload": "mpscale.workloads",
    "Data": "mpscale.workloads",
    "Run": "mpscale.core.runs",
    "read_run": "mpscale.core.runs",
}

__all__ = [
    "MODES",
    "Data",
    "DynamicLossScale",
    "LossScaleMonitor",
    "LossScaleOptimizer",
    "Mode",
    "NoLossScale",
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
    from mpscale.workloads import Data, Workload, workload


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'mpscale' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
