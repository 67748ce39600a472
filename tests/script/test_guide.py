"""README's program runs as printed: as a script, by the command that the docs name, and in parts in a notebook."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import mpscale

ROOT = Path(__file__).parents[2]
(PROGRAM,) = [
    block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if "mpscale.compare(" in block
]
PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
(COMMAND,) = re.findall(r"^    mpscale (run my_project:build .*)$", PAGE, re.MULTILINE)


def run(folder, *command, **variables):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    (folder / "my_project.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Started(Exception):
    """A session would start now."""


def test_readme_asks_for_what_can_be_compared(tmp_path, monkeypatch):
    """Its model and data are found fit for the session, and are packed for it; the next test runs all of it."""

    def start(command, **_):
        raise Started(command)

    (tmp_path / "my_project.py").write_text(PROGRAM)
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(Started) as started:
        runpy.run_path(str(tmp_path / "my_project.py"), run_name="__main__")
    (command,) = started.value.args
    assert {"--mp-workloads=build", "--mp-batch-size=64", "--mp-steps=1000"} <= {*command}


@pytest.mark.slow
def test_a_newcomer_gets_a_report_from_readme_alone(tmp_path):
    output = run(tmp_path, "my_project.py")
    assert output.count("Is mixed precision worth it here?") == 1
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert f"report: results/runs/{path.name}/report.html" in output
    assert (path / "report.html").is_file()
    records = mpscale.read_run(path).records
    assert [(record["workload"], record["status"]) for record in records] == [("build", "ok")] * 12
    assert all(record["final_accuracy"] > 0.8 for record in records)


@pytest.mark.slow
def test_script_and_command_train_the_same(tmp_path):
    quick = 'steps=150, modes=["fp32", "mixed-dynamic"], seeds=1, timing=0.05, jit=False)'
    script = PROGRAM.replace("steps=1000)", quick)
    assert script != PROGRAM
    (tmp_path / "quick.py").write_text(script)
    run(tmp_path, "quick.py")
    options = ["--batch-size=64", "--steps=150", "--modes=fp32,mixed-dynamic", "--seeds", "1", "--mp-timing=0.05"]
    run(tmp_path, "-m", "mpscale", *COMMAND.split(), *options, "--mp-jit=off")
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
