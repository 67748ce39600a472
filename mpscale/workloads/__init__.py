"""What is trained: a model, its data, its optimizer and its metric. Importing this imports no TensorFlow."""

from mpscale.workloads.data import Data
from mpscale.workloads.metric import accuracy
from mpscale.workloads.pipeline import Pipeline
from mpscale.workloads.workload import Workload, workload

__all__ = ["Data", "Pipeline", "Workload", "accuracy", "workload"]
