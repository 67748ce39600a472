"""A run leaves its results on the machine and nothing else, whatever becomes of its processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.small_suite import ASCII, SUITE, pytest_in, write

import mpscale

WORKLOADS = '''
import atexit
import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

import mpscale

CACHE = Path(tempfile.gettempdir()) / "cache.npy"
AWAY = tempfile.TemporaryDirectory(prefix="user-")


def log(text):
    with open(os.environ["SUITE_LOG"], "a") as file:
        print(text, file=file)


def data():
    """Two linearly separable classes, cached for the next case in the folder for temporary files."""
    log(f"{'found' if CACHE.exists() else 'made'} with the arguments {sys.argv[1:]}")
    if not CACHE.exists():
        np.save(CACHE, np.random.default_rng(7).normal(size=(600, 4)))
    print("größe", flush=True)
    atexit.register(log, "ended")
    labels = np.arange(600) % 2
    x = (np.load(CACHE) + 2.0 * labels[:, None]).astype("float32")
    return mpscale.Data(x[:400], labels[:400], x[400:], labels[400:])


def sgd():
    import keras

    return keras.optimizers.SGD(0.3)


def line():
    import keras

    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="float32")])


def dies(labels, outputs):
    os.kill(os.getpid(), signal.SIGKILL)


def make(name, **options):
    return mpscale.workload(name, data=data, optimizer=sgd, batch_size=20, train_steps=30, **options)(line)


größe = make("größe")
killed = make("killed", metric=dies, metric_name="m", metric_higher_is_better=True)
'''


def suite(folder):
    write(folder, suite___part___test_it=SUITE, suite___part___beside=WORKLOADS)
    (folder / "called").mkdir()
    (folder / "tmp").mkdir()
    return {"TMPDIR": str(folder / "tmp"), "SUITE_LOG": str(folder / "log")}


QUICK = (
    "../suite", "--rootdir=..", "--import-mode=importlib", "--mp-timing=0.05", "--mp-modes=fp32", "--mp-retries=0",
    "--mp-jit=off",
)  # fmt: skip


@pytest.fixture(scope="module", params=["fork", pytest.param("fresh", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """Two workloads, one of which kills its process, on a terminal that only knows ASCII or Latin-1."""
    folder = tmp_path_factory.mktemp(request.param)
    variables = suite(folder) | (ASCII if request.param == "fork" else {"PYTHONIOENCODING": "latin-1"})
    options = ["--mp-workloads=beside:größe,beside:killed", f"--mp-start-method={request.param}"]
    done = pytest_in(
        folder / "called", *QUICK, *options, f"--mp-seeds={2 if request.param == 'fork' else 1}", **variables
    )
    (path,) = (folder / "results" / "runs").iterdir()
    return SimpleNamespace(folder=folder, output=done.stdout, run=mpscale.read_run(path), method=request.param)


def test_a_workload_beside_the_suite_is_found_when_pytest_is_called_elsewhere(run):
    statuses = run.run.cases.groupby("workload")["status"].unique().explode().to_dict()
    assert statuses == {"beside:größe": "ok", "beside:killed": "crashed"}
    assert set(run.run.cases["start_method"]) == {run.method}
    assert f"is in {run.folder}/suite/part/beside.py" in run.output


def test_generated_files_go_and_the_users_cache_stays(run):
    # The killed case could not clean up after itself.
    left = {path.name for path in (run.folder / "tmp").rglob("*")}
    assert {name for name in left if not name.startswith("user-")} == {"cache.npy"}
    assert len([name for name in left if name.startswith("user-")]) == run.output.count("crashed, killed by SIGKILL")


def test_a_worker_runs_the_exit_handlers_of_its_case_and_has_no_arguments(run):
    said = (run.folder / "log").read_text().splitlines()
    assert said.count("ended") == (run.run.cases["status"] == "ok").sum()
    assert said.count("made with the arguments []") == 1
    assert said.count("found with the arguments []") == len(run.run.cases) - 1


def test_a_terminal_that_lacks_a_character_shows_a_substitute_and_every_line(run):
    shown = {"fork": r"beside:gr\xf6\xdfe", "fresh": "beside:größe"}[run.method]
    lines = run.output.splitlines()
    assert any(line.split("]")[1].split()[:5] == [shown, "fp32", "seed", "0", "ok,"] for line in lines if "]" in line)
    row = next(line.split() for line in lines if line.startswith(f"{shown} ") and " MiB (host)" in line)
    assert row[1] == "fp32"
    assert ("–" not in run.output) and ("?" not in row)  # noqa: RUF001
    assert [line for line in lines if "\\n" in line] == []


def test_files_are_utf8_on_any_terminal(run):
    folder = run.run.path
    for name in ("report.md", "report.html", "cases.csv", "summary.csv"):
        assert "beside:größe" in (folder / name).read_text(encoding="utf-8")
    assert len(run.run.steps("beside+größe--fp32--s0--r0")) == 30
