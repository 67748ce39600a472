"""What a script sends to the processes of the cases: by name, by value, in files of its own, or not at all."""

from __future__ import annotations

import functools
import io
import pickle
import subprocess
import sys
import threading
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpscale
from mpscale.script import sending

LARGE = np.arange(1 << 19, dtype="float32").reshape(1024, 512)
SMALL = np.arange(6.0)
LOCK = threading.Lock()
MODEL = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
BUILT, UNBUILT = MODEL.layers[0], keras.layers.Dense(2)
NUMBERS = (number for number in range(3))
RANGE = tf.data.Dataset.range(6)
PYTHON = {"Tout": tf.int64}


def loaded(thing, folder):
    """What another process would get."""
    path = folder / "thing.pickle"
    sending.send(thing, path, {"thing": thing})
    with path.open("rb") as file:
        return pickle.load(file)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, place):
        return LARGE[place], SMALL


@pytest.mark.parametrize(
    ("thing", "value"),
    [
        pytest.param(lambda: LARGE.sum() + SMALL.sum(), LARGE.sum() + SMALL.sum(), id="a lambda that uses arrays"),
        pytest.param(functools.partial(np.add, SMALL, 1), SMALL + 1, id="a partial function"),
        pytest.param(Batches().__getitem__, None, id="a method"),
        pytest.param((lambda scale: lambda: scale * SMALL)(3), 3 * SMALL, id="a closure"),
        pytest.param(lambda: tf.constant(LARGE), LARGE, id="a tensor"),
    ],
)
def test_a_function_is_sent_with_what_it_uses(thing, value, tmp_path):
    found = loaded(thing, tmp_path)
    assert found is not thing
    if value is None:
        assert np.array_equal(found(1)[0], LARGE[1])
    else:
        assert np.array_equal(found(), value)


@pytest.mark.parametrize("wrap", [tuple, list, lambda pair: {"x": pair[0], "y": {"deep": pair[1]}}])
def test_large_arrays_are_written_once_and_mapped(wrap, tmp_path):
    thing = wrap([LARGE, LARGE])
    found = loaded((thing, thing), tmp_path)
    flat = keras.tree.flatten(found)
    assert [np.array_equal(array, LARGE) for array in flat] == [True] * 4
    assert [path.stat().st_size // LARGE.nbytes for path in tmp_path.glob("*.npy")] == [1]
    assert (tmp_path / "thing.pickle").stat().st_size < 4000
    flat[0][0, 0] = 7  # as an augmentation in place would
    assert np.array_equal(np.load(next(tmp_path.glob("*.npy"))), LARGE)
    assert {type(array) for array in flat} == {np.ndarray}


def test_an_array_that_is_mapped_from_a_file_is_not_copied(tmp_path):
    np.save(tmp_path / "own", LARGE)
    own = np.load(tmp_path / "own.npy", mmap_mode="r")
    (tmp_path / "sent").mkdir()
    whole, part = loaded([own, own[5:]], tmp_path / "sent")
    assert np.array_equal(whole, LARGE)
    assert np.array_equal(part, LARGE[5:])
    assert len(list((tmp_path / "sent").glob("*.npy"))) == 1


@pytest.mark.parametrize(
    "dataset",
    [
        tf.data.Dataset.from_tensor_slices((LARGE, {"y": LARGE[:, 0]})).batch(512).prefetch(1),
        RANGE.map(lambda each: (each * 2, tf.cast(each, tf.float32))).batch(4),
        RANGE.map(lambda each: tf.random.stateless_uniform((), [each, 1])),
        tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1], [2, 3], [4, 5, 6]])).batch(2),
    ],
)
def test_a_pipeline_is_sent_as_its_graph(dataset, tmp_path):
    found = loaded((dataset,), tmp_path)[0]
    assert found.element_spec == dataset.element_spec
    for theirs, ours in zip(found, dataset, strict=True):
        for there, here in zip(tf.nest.flatten(theirs), tf.nest.flatten(ours), strict=True):
            assert tf.reduce_all(there == here)


REFUSED = {
    "a model": (lambda: MODEL, "thing uses MODEL, which cannot be sent", "Keras model"),
    "a layer with weights": (lambda: BUILT, "thing uses BUILT, which", "Keras layer"),
    "a layer that would get weights": (lambda: UNBUILT, "thing uses UNBUILT, which", "Keras layer"),
    "an open file": ({"log": [sys.__stderr__]}, "thing['log'][0] cannot be sent", "an open file; open it"),
    "a file for bytes": (io.BufferedReader(io.FileIO(__file__)).read, "thing cannot be sent", "open it"),
    "a lock": (lambda: (lambda: LOCK)(), "thing uses LOCK, which", "_thread.lock"),
    "a lock in an argument": (functools.partial(print, LOCK), "thing cannot be sent", "_thread.lock"),
    "a generator": ((LARGE, NUMBERS), "thing[1] cannot be sent", "of type generator"),
    "a pipeline from a generator": (
        tf.data.Dataset.from_generator(lambda: iter([1]), output_signature=tf.TensorSpec((), tf.int32)),
        "thing cannot be sent",
        "pass a function that returns it",
    ),
    "Python in a pipeline": (
        (RANGE.map(lambda each: tf.numpy_function(abs, [each], tf.int64, stateful=False)), 1),
        "thing[0] cannot be sent",
        "it calls a Python function of this process",
    ),
    "chance in a pipeline": (RANGE.map(lambda each: tf.random.uniform(())), "thing cannot", "RandomUniform"),
    "an order by chance": ((lambda: RANGE.shuffle(6))(), "thing cannot be sent", "shuffles without a seed"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_exists_here_only_is_refused_by_its_name_and_with_a_cure(which, tmp_path):
    thing, where, what = REFUSED[which]
    with pytest.raises(sending.CannotSend) as refused:
        loaded(thing, tmp_path)
    said = str(refused.value)
    assert said.startswith(where)
    assert what in said
    assert "; " in said
    assert "function_node" not in said


def test_a_session_gets_only_the_outline_of_a_workload(tmp_path):
    """A session must not import what a workload uses, and must not use the GPU."""
    losses = {"loss": keras.losses.MeanSquaredError(), "metric": keras.metrics.MeanAbsoluteError(), "margin": 0.1}
    ordinary = mpscale.Workload("a", "", lambda: MODEL, lambda: LOCK, "adam", growth_interval=7, **losses)
    compiled = mpscale.Workload.from_compiled(lambda: 0, train=(SMALL, LARGE), name="b", callbacks=lambda: LOCK)
    for workload in (ordinary, compiled):
        path = tmp_path / f"{workload.name}.outline.pickle"
        sending.send_outline(workload, path)
        code = "import sys; from pathlib import Path; from mpscale.workloads import sent\n"
        code += "w = sent.load(Path(sys.argv[1]))\n"
        code += "print(w.name, w.growth_interval, w.margin, 'keras' in sys.modules); w.data()"
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert done.stdout == f"{workload.name} {workload.growth_interval} {workload.margin} False\n", done.stderr
        assert "in the processes of the cases only" in done.stderr


def test_a_function_of_a_module_without_a_file_is_sent_by_value(tmp_path):
    module = types.ModuleType("made_by_hand")
    exec("FACTOR = 3\ndef triple(value):\n    return FACTOR * value", vars(module))
    sys.modules["made_by_hand"] = module
    try:
        path = tmp_path / "thing.pickle"
        sending.send(module.triple, path, {})
    finally:
        del sys.modules["made_by_hand"]
    assert pickle.loads(path.read_bytes())(4) == 12


def test_the_script_is_not_run_again_and_needs_no_guard(tmp_path):
    (tmp_path / "helpers.py").write_text("def double(value):\n    return 2 * value\n")
    (tmp_path / "script.py").write_text(
        "import sys, helpers\nfrom pathlib import Path\nfrom mpscale.script import sending\n"
        "print('the script runs')\nnumbers = [1, 2]\n"
        "def of_the_script():\n    from helpers import double\n"
        "    return __name__, double(sum(numbers)), helpers.double(1)\n"
        "sending.send(of_the_script, Path(sys.argv[1]), {})\n"
    )
    path = tmp_path / "thing.pickle"
    done = subprocess.run([sys.executable, "script.py", path], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "the script runs\n"
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))())"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "('__main__', 6, 2)\n"
