"""Loss scaling for Keras and TensorFlow, usable alone.

Importing this package registers its classes with Keras, which is what ``keras.saving.load_model`` needs.
"""

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
