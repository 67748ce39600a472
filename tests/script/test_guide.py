"""The guide to scripts and notebooks: its programs run as printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpscale

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "scripts-and-notebooks.md").read_text(encoding="utf-8")
COMPARE, PROJECT = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
(COMMAND,) = re.findall(r"^    mpscale (run my_project:build .*)$", GUIDE, re.MULTILINE)


def run(folder, *command, **variables):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    (folder / "my_project.py").write_text(PROJECT)
    (folder / "compares.py").write_text(COMPARE)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow  # test_comparing has the same in parts
def test_a_newcomer_gets_a_report(tmp_path):
    output = run(tmp_path, "compares.py", PYTEST_ADDOPTS="-p support.untrained")
    assert output.count("Is mixed precision worth it here?") == 2  # what the session says, and the result
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert (path / "report.html").is_file()
    planned = json.loads((path / "run.json").read_text())["planned"]
    assert len(planned) == 6
    assert all(case.startswith("build--") for case in planned)


@pytest.mark.slow
def test_script_and_command_train_the_same(tmp_path):
    quick = '"mixed-dynamic"], seeds=1, steps=150, timing=0.05, jit=False)'
    script = COMPARE.replace('"mixed-dynamic"])', quick)
    assert script != COMPARE
    (tmp_path / "quick.py").write_text(script)
    run(tmp_path, "quick.py")
    options = ["--seeds", "1", "--steps=150", "--mp-timing=0.05", "--mp-jit=off"]
    run(tmp_path, "-m", "mpscale", *COMMAND.split(), *options)
    runs = [mpscale.read_run(path) for path in sorted((tmp_path / "results" / "runs").iterdir())]
    assert [len(each.records) for each in runs] == [2, 2]
    by_script, by_command = ({record["mode"]: record for record in each.records} for each in runs)
    for mode in ("fp32", "mixed-dynamic"):
        same = ("status", "metric_name", *(f"{what}_digest" for what in ("workload", "data", "data_order")))
        assert [by_script[mode][name] for name in same] == [by_command[mode][name] for name in same]
        assert by_script[mode]["metric_value"] == by_command[mode]["metric_value"] > 0.5
    assert {record["workload"] for record in runs[0].records} == {"build"}
    assert {record["workload"] for record in runs[1].records} == {"my_project:build"}


NOTEBOOK = """
import keras, numpy as np, mpscale

x = np.random.default_rng(0).normal(size=(600_000, 4)).astype("float32")  # large enough for a file of its own
x, wide = x[:4000], x
factor = 2.0

class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return factor * inputs

class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.hidden = Doubled(), keras.layers.Dense(8)
        self.last = keras.layers.Dense(1, dtype="float32")

    def call(self, inputs):
        return self.last(self.hidden(self.first(inputs)))

    def train_step(self, data):
        return super().train_step(data)

def own():
    assert wide.shape == (600_000, 4)
    model = Own()
    model.compile("sgd", loss="mse", metrics=["mae"])
    return model

y = x.sum(axis=1, keepdims=True)
result = mpscale.compare(lambda: own(), name="own-model", train=(x, y), validation=(x, y), modes="fp32,mixed-bf16",
                         seeds=1, steps=60, timing=0.05, jit=False)
print("ANSWER", result.cases["metric_value"].tolist())
"""


@pytest.mark.slow
def test_what_only_a_notebook_has_is_trained(tmp_path):
    """A program from standard input has no file, as a cell has none."""
    output = run(tmp_path, "-c", NOTEBOOK)
    first, second = json.loads(re.search(r"^ANSWER (.*)$", output, re.MULTILINE)[1])
    assert 0 < first < 0.5
    assert abs(first - second) < 0.1
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert {record["workload"] for record in mpscale.read_run(path).records} == {"own-model"}
