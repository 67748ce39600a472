"""`mpscale probe` on this machine's CPU, in processes of its own."""

import csv
import json
import subprocess
import sys

from support.processes import processes_in

# The metric fails: a probe evaluates nothing.
WORKLOAD = """
import mpscale
import numpy as np


def data():
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    return mpscale.Data(train_x=x, train_y=y, test_x=x, test_y=y)


def broken(labels, outputs):
    raise ValueError("nobody should ask")


@mpscale.workload("tiny", data=data, optimizer="sgd", batch_size=16, train_steps=12, metric=broken,
                  metric_name="broken", metric_higher_is_better=True)
def tiny():
    from keras import Input, Sequential, layers

    return Sequential([Input((4,)), layers.Dense(8, activation="relu"), layers.Dense(2, dtype="float32")])
"""


def test_a_probe_leaves_its_table_and_a_folder(tmp_path):
    (tmp_path / "tiny.py").write_text(WORKLOAD)
    done = subprocess.run(
        [sys.executable, "-m", "mpscale.cli", "probe", "tiny:tiny", "--looks", "3", "--batch-size", "8", "--scale",
         "2**10", "--format", "json", "-o", "out.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines() if line.startswith("step")] == [
        "step 1", "step 7", "step 12",
    ]  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["workload"], found["looks"], found["problem"]) == ("tiny:tiny", 3, None)
    rows = {(row["layer"], row["of"]): row for row in found["gradients"]}
    assert rows["dense", "activations"]["gradients"] == 3 * 8 * 8
    assert rows["dense", "weights"]["gradients"] == 3 * (4 * 8 + 8)
    assert {row["dtype"] for row in rows.values()} == {"float16", "float32"}
    assert {row["scale"] for row in rows.values()} == {1024.0}
    (folder,) = (tmp_path / "results" / "probe").iterdir()
    kept = json.loads((folder / "probe.json").read_text())
    assert kept["finished"] and kept["workload_digest"].startswith("sha256:")
    assert (kept["settings"]["steps"], kept["settings"]["batch_size"]) == (12, 8)
    counts = csv.DictReader((folder / "gradients.csv").open())
    total = sum(int(row["count"]) for row in counts)
    assert total == sum(row["gradients"] for (layer, _), row in rows.items() if layer != "all")
    assert "bars-activations-1" in (folder / "report.html").read_text()
    assert processes_in(tmp_path) == []
