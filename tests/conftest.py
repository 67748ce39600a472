"""What all tests share."""

import os
import shutil

import pytest
from support.nvml_stand_in import build

# Before anything imports TensorFlow: no GPU is looked for, and its start-up notes stay out of the output.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A worker of pytest-xdist knows by now that it is one. A pytest that a test starts is none, and pytest-benchmark would
# time nothing in it.
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[name]

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def stand_in_nvml(tmp_path_factory):
    """The folder of a stand-in for NVIDIA's driver library, which ``nvml_stand_in.Script`` says what to answer."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    return build(tmp_path_factory.mktemp("nvml"))
