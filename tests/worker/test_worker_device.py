"""The device as TensorFlow and CUDA see it: settings, allocator, and whether CUDA uses the GPU that is monitored."""

import json
import shutil
import subprocess

import pytest
import tensorflow as tf
from support.forked import run_forked

from mpscale.core.case import Settings
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.reason import Code
from mpscale.worker.device import AllocatorPeak, held_by_this_process, require, touch

STAND_IN = Device("gpu", "mpscale stand-in A100", "GPU-1", (8, 0))

LIBCUDA = """
#include <string.h>
int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
#ifdef UUID
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { (void)device; memset(uuid, 0xab, 16); return 0; }
#endif
int cuDeviceGetPCIBusId(char *id, int length, int device) {
    (void)device; strncpy(id, "0000:0A:00.0", length); return 0;
}
"""
CODE = """
import ctypes, json
for library in {libraries!r}:
    ctypes.CDLL(library)  # found by its name from now on, as in a folder on LD_LIBRARY_PATH
print(json.dumps([mismatch(*asked) for asked in {asked!r}]))
"""
SAME = "GPU-abababab-abab-abab-abab-abababababab"


@pytest.fixture
def arithmetic():
    """What TensorFlow is allowed to do about precision: (TF32, graph rewrite); restored afterwards."""

    def read():
        rewrites = tf.config.optimizer.get_experimental_options().get("auto_mixed_precision", False)
        return tf.config.experimental.tensor_float_32_execution_enabled(), rewrites

    tf32, rewrite = read()
    yield read
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": rewrite})


@pytest.mark.parametrize(
    ("mode", "expected"), [("fp32", (False, False)), ("mixed-dynamic", (True, False)), ("graph-rewrite", (True, True))]
)
def test_mode_sets_what_tensorflow_is_allowed_to_do(arithmetic, mode, expected):
    touch(Device("cpu", "Some CPU"), MODES[mode], Settings())
    assert arithmetic() == expected


@pytest.mark.parametrize(
    ("mapped", "opened", "held"),
    [
        ("/usr/lib/libc.so.6", "/dev/null", None),
        ("/site-packages/nvidia/cuda_runtime/lib/libcudart.so.12", "/tmp/libcuda.so.1", None),
        ("/usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04", "/dev/null", "libcuda.so.580"),
        ("/dev/nvidia-uvm", "/dev/null", "nvidia-uvm"),
        ("/usr/lib/libc.so.6", "/dev/nvidiactl", "nvidiactl"),
        ("/usr/lib/libc.so.6", "/dev/dxg", "dxg"),
        (None, "/dev/null", "does not show"),
    ],
)
def test_what_a_process_holds_of_a_gpu(tmp_path, mapped, opened, held):
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "3").symlink_to(opened)
    if mapped is not None:
        line = "7f0000000000-7f0000001000 r-xp 00000000 fe:00 {} \t{}\n"
        (tmp_path / "maps").write_text(line.format(1, mapped) + line.format(0, "").rstrip() + "\n")
    found = held_by_this_process(tmp_path)
    if held is None:
        assert found is None
    else:
        assert found.code is Code.FORK_UNSAFE
        assert held in found.text


def test_a_process_that_trains_on_a_cpu_holds_nothing_of_a_gpu():
    tf.constant(0.0).numpy()
    assert held_by_this_process() is None


@pytest.mark.parametrize("device", [Device("cpu", "Some CPU"), STAND_IN])
def test_allocator_of_a_cpu_has_no_peak(device):
    peak = AllocatorPeak(device)
    peak.begin_window()
    found = peak.columns()
    assert found.values == {}
    assert [reason.code for reason in found.unavailable.values()] == [Code.NO_GPU] * 2


def test_stand_in_for_a_gpu_trains_on_the_cpu():
    found = touch(STAND_IN, MODES["tf32"], Settings())
    assert found.values == {"gpu_allocator": "bfc", "tf32": True}
    assert found.unavailable == {}


def test_gpu_that_tensorflow_does_not_see_is_an_error():
    with pytest.raises(RuntimeError, match=r"tensorflow\[and-cuda\]"):
        require(Device("gpu", "NVIDIA A100", "GPU-1", (8, 0)))
    require(STAND_IN)
    require(Device("cpu", "Some CPU"))


SOME = "00000000:07:00.0"
"""A place on the bus where the GPU is not."""
LIBRARIES = {"full": ["-DINIT=0", "-DUUID"], "old": ["-DINIT=0"], "broken": ["-DINIT=100"], "none": None}
GPUS = {
    "full": {
        (SAME, "00000000:0A:00.0"): None,
        (SAME.upper().replace("GPU", "MIG"), None): None,
        ("GPU-5b0c4a1e-0000-1111-2222-333344445555", "00000000:0A:00.0"): "mpscale monitors GPU-5b0c4a1e",
    },
    "old": {(SAME, "00000000:0A:00.0"): None, (SAME, SOME): "at PCI bus 0000:0A:00.0", (SAME, None): None},
    "broken": {(SAME, SOME): None},
    "none": {(SAME, SOME): None},
}
"""For each of CUDA's libraries: GPUs that are monitored, and what is wrong if CUDA has the one of the library."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each library leads to, in a process of its own."""
    programs = {}
    for name, options in LIBRARIES.items():
        libraries = []
        if options is not None:
            folder = tmp_path_factory.mktemp(name)
            (folder / "cuda.c").write_text(LIBCUDA)
            libraries = [str(folder / "libcuda.so.1")]
            command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *options, "-o", *libraries]
            subprocess.run([*command, str(folder / "cuda.c")], check=True)
        programs[name] = CODE.format(libraries=libraries, asked=list(GPUS[name]))
    return run_forked("from mpscale.worker.device import mismatch", programs)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("library", GPUS)
def test_cuda_must_use_the_gpu_that_is_monitored(told, library):
    assert told[library].code == 0, told[library].stderr
    for said, words in zip(json.loads(told[library].stdout), GPUS[library].values(), strict=True):
        assert (said is None) if words is None else (words in said)
