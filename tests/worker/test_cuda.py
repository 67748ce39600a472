"""Is CUDA's first device the GPU that NVML watches? Asked of a stand-in for CUDA's driver library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

SOURCE = """
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
CODE = "import sys; from mpscale.worker.device import mismatch; print(mismatch(*[a or None for a in sys.argv[1:]]))"
SAME = "GPU-abababab-abab-abab-abab-abababababab"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    made = {}
    for name, options in {"full": ["-DINIT=0", "-DUUID"], "old": ["-DINIT=0"], "broken": ["-DINIT=100"]}.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "cuda.c").write_text(SOURCE)
        library = folder / "libcuda.so.1"
        command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *options, "-o", str(library)]
        subprocess.run([*command, str(folder / "cuda.c")], check=True)
        made[name] = str(folder)
    made["none"] = str(tmp_path_factory.mktemp("none"))
    return made


@pytest.mark.parametrize(
    ("library", "uuid", "bus", "words"),
    [
        ("full", SAME, "00000000:0A:00.0", None),
        ("full", SAME.upper().replace("GPU", "MIG"), "", None),
        ("full", "GPU-5b0c4a1e-0000-1111-2222-333344445555", "00000000:0A:00.0", "NVML watches GPU-5b0c4a1e"),
        ("old", SAME, "00000000:0A:00.0", None),
        ("old", SAME, "00000000:07:00.0", "at PCI bus 0000:0A:00.0"),
        ("old", SAME, "", None),
        ("broken", SAME, "00000000:07:00.0", None),
        ("none", SAME, "00000000:07:00.0", None),
    ],
)
def test_cuda_and_nvml_mean_the_same_gpu(libraries, library, uuid, bus, words):
    done = subprocess.run(
        [sys.executable, "-c", CODE, uuid, bus],
        env={**os.environ, "LD_LIBRARY_PATH": libraries[library]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (words or "None") in done.stdout
