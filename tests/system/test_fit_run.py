"""`mpscale fit` on this machine's CPU, with a limit that leaves little beyond TensorFlow itself."""

import json
import subprocess
import sys

from support.processes import processes_in

# The training set has one example. Each example of a batch takes 64 MiB and more in a step.
WORKLOAD = """
import mpscale
import numpy as np


def data():
    x, y = np.zeros((1, 4, 1), "float32"), np.zeros(1, "int64")
    return mpscale.Data(train_x=x, train_y=y, test_x=x, test_y=y)


@mpscale.workload("greedy", data=data, optimizer="sgd", batch_size=1)
def greedy():
    from keras import Input, Sequential, layers

    wide = [layers.UpSampling1D(2**18), layers.Conv1D(16, 1, activation="relu"), layers.GlobalAveragePooling1D()]
    return Sequential([Input((4, 1)), *wide, layers.Dense(2, dtype="float32")])
"""


def test_the_largest_batch_is_the_last_one_below_the_memory_limit(tmp_path):
    (tmp_path / "greedy.py").write_text(WORKLOAD)
    done = subprocess.run(
        [sys.executable, "-m", "mpscale.cli", "fit", "greedy:greedy", "--mode", "fp32", "--memory-limit", "850MiB",
         "--format", "json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["modes"]
    assert 1 <= row["largest_batch"] < row["ran_out_at"] <= 8
    assert 300 < row["peak_memory_mib"] <= 850
    assert row["unavailable"] is None
    (folder,) = (tmp_path / "results" / "fit").iterdir()
    kept = json.loads((folder / "fit.json").read_text())
    assert kept["finished"]
    assert len(kept["tries"]) == sum("fp32, batch" in line for line in done.stderr.splitlines())
    assert (folder / "report.md").is_file()
    assert processes_in(tmp_path) == []
