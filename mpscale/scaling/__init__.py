"""Loss scaling for Keras and TensorFlow, usable alone.

Importing this package registers its classes with Keras, which is what ``keras.saving.load_model`` needs.
"""

from mpscale.scaling.alarm import FloorOverflowError, FloorOverflowWarning
from mpscale.scaling.article import ArticleLossScale
from mpscale.scaling.finite import all_finite
from mpscale.scaling.guard import UnscaledLossWarning
from mpscale.scaling.logmax import LogMaxLossScale
from mpscale.scaling.loss_scale import DynamicLossScale, LossScale, NoLossScale, StaticLossScale
from mpscale.scaling.monitor import LossScaleMonitor
from mpscale.scaling.optimizer import LossScaleOptimizer
from mpscale.scaling.settings import SettingTooLateWarning

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
