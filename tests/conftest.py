"""What all tests share."""

import os

# Before anything imports TensorFlow: no GPU is looked for, and its start-up notes stay out of the output.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

pytest_plugins = ["pytester"]
