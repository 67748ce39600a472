"""A function that returns a compiled model, named on the command line, with the data that options name."""

from __future__ import annotations

import pytest
from support import small_suite

from mpscale.cli import running
from mpscale.config import SettingsError
from mpscale.core.given import Given, take
from mpscale.workloads import registry

MODELS = """
import numpy as np
import mpscale

def build_net():
    raise AssertionError("the session builds no model")

def train_data():
    raise AssertionError("the session loads no data")

numbers = np.ones((8, 3), "float32"), np.zeros(8, int)
class Sets:
    held_out = numbers
a_workload = mpscale.Workload("a", "", build_net, train_data, "adam")
"""


@pytest.fixture
def folder(tmp_path):
    yield small_suite.write(tmp_path, own_models=MODELS, test_suite=small_suite.SUITE)
    take(Given())
    small_suite.forget(tmp_path)


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train_data", None),
        ("own_models:train_data", "numbers"),
        ("numbers", "Sets.held_out"),
        ("own_models:numbers", "own_models:Sets.held_out"),
    ],
)
def test_a_function_becomes_a_workload_with_the_data_of_the_options(train, validation, folder):
    take(Given(train, validation))
    workload = registry.get("own_models:build_net", [folder])
    assert workload.name == "build-net"
    assert registry.takes_data("own_models:build_net")
    if train.endswith("numbers"):
        data = workload.data()
        assert data.train_x.shape == data.test_x.shape == (8, 3)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("own_models:build_net", Given(), "name its data, such as --train own_models:train_data"),
        ("own_models:build_net", Given(validation="numbers"), "name its data, such as --train"),
        ("own_models:build_net", Given("nothing"), "no data at 'nothing' (--mp-train): the module own_models in"),
        ("own_models:build_net", Given("nowhere:x"), "no data at 'nowhere:x' (--mp-train): ModuleNotFoundError"),
        ("own_models:build_net", Given("numbers", "Sets.none"), "no data at 'Sets.none' (--mp-validation)"),
        ("own_models:numbers", Given("numbers"), "is a tuple, not an mpscale.Workload"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(name, given, said, folder):
    take(given)
    with pytest.raises(registry.UnknownWorkload) as refused:
        registry.get(name, [folder])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mp-workloads=own_models:a_workload", "--mp-train=numbers"], "a Workload has its own data"),
        (["--mp-workloads=own_models:a_workload", "--mp-validation=numbers"], "a Workload has its own data"),
        (["--mp-workloads=own_models:build_net", "--mp-train=a b"], "expected module:attribute, such as"),
        (["--mp-workloads=own_models:build_net", "--mp-train=a.py:b"], "no data at 'a.py:b'"),
        (["--mp-workloads=own_models:build_net", "--mp-train=a:b:c"], "expected module:attribute, such as"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code, output = small_suite.pytest_here(folder, f"--rootdir={folder}", folder, *options)
    assert code == 4
    assert said in output


def test_the_plan_has_functions_and_workloads_side_by_side(folder, monkeypatch):
    monkeypatch.chdir(folder)
    both = "--mp-workloads=own_models:build_net,own_models:a_workload"
    code, output = small_suite.pytest_here(
        folder, f"--rootdir={folder}", folder, both, "--mp-train=train_data", "--collect-only", "-q"
    )
    assert code == 0
    assert "[own_models:build_net-fp32-seed0]" in output
    assert "[own_models:a_workload-fp32-seed0]" in output


@pytest.mark.parametrize(
    ("typed", "full"),
    [
        (["m:build", "--train", "t", "--modes=fp32"], ["--mp-workloads=m:build", "--mp-train", "t", "--mp-modes=fp32"]),
        (["m:a", "mnist1d-mlp", "--seeds", "2"], ["--mp-workloads=m:a,mnist1d-mlp", "--mp-seeds", "2"]),
        (["--mp-workloads", "m:a", "-k", "fp32"], ["--mp-workloads", "m:a", "-k", "fp32"]),
        (["tests/test_x.py::test_y", "m:a"], ["tests/test_x.py::test_y", "m:a"]),
        (["a-folder", "--timeout=5"], ["a-folder", "--timeout=5"]),
        (["--steps=3", "--", "--steps"], ["--mp-steps=3", "--", "--steps"]),
        ([], []),
    ],
)
def test_the_command_writes_short_names_in_full(typed, full, tmp_path, monkeypatch):
    (tmp_path / "a-folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert running.in_full(typed) == full


@pytest.mark.parametrize("other", [["--mp-workloads=b"], ["--mp-workloads", "b"]])
def test_workloads_are_named_in_one_way(other):
    with pytest.raises(SettingsError, match="named twice"):
        running.in_full(["m:a", *other])


def test_no_short_name_is_an_option_of_pytest(pytestconfig):
    taken = [name for name in running._SHORT if pytestconfig.getoption(f"--{name}", None) is not None]
    assert taken == []
    for name in running._SHORT:
        pytestconfig.getoption(f"--mp-{name}")
