"""What all tests share."""

import gc
import os
import shutil

import pytest
from support.nvml_stand_in import build

# Before anything imports TensorFlow, so that it looks for no GPU and prints no start-up messages.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A worker of pytest-xdist has read these by now. A pytest that a test starts is not a worker, but with these variables
# pytest-benchmark would take it for one and time nothing.
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[name]

pytest_plugins = ["pytester"]

LONG = ("system", "torture", "workloads", "worker", "situations", "scaling")
"""Folders whose files take longest, which `make test` must not begin last: the other worker would wait for them."""


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.parent.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def own_notes(tmp_path_factory):
    """Keep runs on the stand-in's GPU apart from those of other tests that go on at the same time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPSCALE_NOTES", str(tmp_path_factory.mktemp("notes")))
        yield


@pytest.fixture(scope="module", autouse=True)
def garbage_of_this_file_alone():
    """Keep what is there by now out of later collections: each would look at all of TensorFlow and at every graph.

    Keras' ``clear_session`` makes a collection.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def stand_in_nvml(tmp_path_factory):
    """The folder of a stand-in for NVIDIA's driver library, which answers what an ``nvml_stand_in.Script`` contains."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def mixed_float16():
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)
