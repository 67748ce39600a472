"""Loss scaling for Keras and TensorFlow, usable without the rest of mpscale.

Importing this package registers its classes with Keras, which ``keras.saving.load_model`` needs.
"""

from mpscale.core.loss_scale import (
    ArticleLossScale,
    DynamicLossScale,
    LogMaxLossScale,
    LossScale,
    NoLossScale,
    StaticLossScale,
)
from mpscale.scaling.gradients import all_finite
from mpscale.scaling.guard import UnscaledLossWarning
from mpscale.scaling.inner import SettingTooLateWarning
from mpscale.scaling.ledger import FloorOverflowError, FloorOverflowWarning, LossScaleMonitor
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
