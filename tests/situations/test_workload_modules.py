"""Workload modules as people write and install them: broken ones, and ones in all sorts of places."""

from __future__ import annotations

import importlib
import os

import pytest
from support.small_suite import SUITE, WORKLOAD, forget, pytest_here, write

from mpscale.cli import main
from mpscale.workloads import registry

BROKEN = {
    "sys.exit": ("import sys\nsys.exit(3)\n", r"importing it called sys.exit\(3\)"),
    "exit with a text": ("raise SystemExit('no data here')\n", r"sys.exit\('no data here'\)"),
    "argparse": (
        "import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])\n",
        r"sys.exit\(2\), as argparse",
    ),
    "pytest.skip": ("import pytest\npytest.importorskip('no_such_thing')\n", "could not import 'no_such_thing'"),
    "missing package": ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
    "exception": ("raise KeyError('DATA_DIR')\n", "KeyError: 'DATA_DIR'"),
    "exception of its own": ("class Stop(BaseException): pass\nraise Stop('enough')\n", "Stop: enough"),
    "exception without a message": ("raise MemoryError\n", "MemoryError$"),
    "exception whose message cannot be had": (
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E\n",
        "E: its message cannot be read: ValueError",
    ),
    "answers for everything": ("def __getattr__(name): raise ValueError(name)\n", "ValueError: w"),
    "syntax": ("w = (\n", "SyntaxError: .*broken.py"),
    "no workload": ("w = 3\n", "is an int, not an mpscale.Workload"),
    "no attribute": ("v = 3\n", "has no attribute 'w'"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which pytest runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Install a package with one module and its entry points into a folder on Python's path."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(folder)

    def install(module, text, **offers):
        write(folder, **{module: text})
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in offers.items())
        (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{lines}")

    install.folder = folder
    folder.mkdir()
    yield install
    forget(folder)


def good(name="good", module="good"):
    return WORKLOAD.replace('"mine"', f'"{name}"'), {name: f"{module}:w"}


@pytest.mark.parametrize(("text", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_package_takes_nothing_else_down(site, capsys, text, reason):
    site("broken", text, fine="broken:w")
    module, offers = good()
    site("good", module, **offers)
    assert registry.get("mnist1d-mlp").name == "mnist1d-mlp"
    assert registry.get("good").name == "good"
    assert list(registry.offered().workloads)[-1] == "good"
    with pytest.raises(
        registry.UnknownWorkload, match=f"(?s)'fine' cannot be loaded: .*of the package broken.*{reason}"
    ):
        registry.get("fine")
    with pytest.raises(registry.UnknownWorkload, match=f"(?s){reason}"):
        registry.get("broken:w")
    capsys.readouterr()
    assert main(["workloads"]) == 0
    said = capsys.readouterr()
    assert "\ngood " in said.out and "\nmnist1d-mlp " in said.out
    assert "mpscale: broken: fine: the entry point 'broken:w' of the package broken" in said.err
    assert main(["workloads", "fine"]) == 2


def test_a_misspelt_name_has_what_is_broken_in_its_message(site):
    site("broken", "raise KeyError('x')\n", fine="broken:w")
    with pytest.raises(registry.UnknownWorkload, match=r"did you mean fine\?.*broken: fine"):
        registry.get("fien")


@pytest.mark.parametrize(
    "text", ["raise KeyboardInterrupt\n", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"]
)
def test_the_users_interrupt_is_passed_on(site, text):
    site("stopped", text, fine="stopped:w")
    with pytest.raises(KeyboardInterrupt):
        registry.offered()
    with pytest.raises(KeyboardInterrupt):
        registry.get("stopped:w")
    assert main(["workloads"]) == 130


def test_a_built_in_name_cannot_be_replaced(site):
    module, _ = good("mnist1d-mlp")
    site("good", module, theirs="good:w")
    assert registry.get("mnist1d-mlp").data is not None
    assert registry.get("mnist1d-mlp").optimizer is not registry.get("good:w").optimizer
    assert "mpscale has a workload of that name" in registry.offered().broken["theirs"]


def test_a_name_that_two_packages_offer_is_refused(site):
    for package in ("one", "two"):
        module, offers = good("shared", package)
        site(package, module, **offers)
    with pytest.raises(
        registry.UnknownWorkload, match=r"both .*'one:w' of the package one and .*'two:w' of the package t"
    ):
        registry.get("shared")
    assert registry.get("two:w").name == "shared"


def test_one_workload_that_is_offered_twice_is_one(site):
    module, _ = good("shared")
    site("good", module, a="good:w", b="good:w")
    assert registry.get("shared") is registry.get("good:w")
    assert registry.offered().broken == {}


def test_an_entry_point_that_names_no_object_is_broken(site):
    site("odd", "w = 3\n", fine="not a module")
    assert "fine" in registry.offered().broken


PLACES = {
    "beside the suite": ({"suite___test_it": SUITE, "suite___mine_w": WORKLOAD}, "suite", "mine_w:w"),
    "beside the suite, in a sub-folder of it": (
        {"suite___deep___test_it": SUITE, "suite___deep___mine_w": WORKLOAD}, "suite", "mine_w:w"),
    "beside a suite that is a package": (
        {"suite___test_it": SUITE, "suite_____init__": "", "suite___mine_w": WORKLOAD}, "suite", "mine_w:w"),
    "in a suite that is a package, by its name": (
        {"suite___test_it": SUITE, "suite_____init__": "", "suite___mine_w": WORKLOAD}, "suite", "suite.mine_w:w"),
    "in the folder of the call": ({"suite___test_it": SUITE, "called___mine_w": WORKLOAD}, "../suite", "mine_w:w"),
    "in pytest's root": ({"suite___test_it": SUITE, "mine_w": WORKLOAD}, "../suite", "mine_w:w"),
    "in a package": ({"suite___test_it": SUITE, "mine_p_____init__": WORKLOAD}, "suite", "mine_p:w"),
    "in a package without __init__.py": ({"suite___test_it": SUITE, "mine_n___b": WORKLOAD}, "suite", "mine_n.b:w"),
    "in a class": (
        {"suite___test_it": SUITE, "mine_w": WORKLOAD + "\nclass Zoo:\n    first = w\n"}, "suite", "mine_w:Zoo.first"),
    "with one file named": ({"suite___test_it": SUITE, "suite___mine_w": WORKLOAD}, "suite/test_it.py", "mine_w:w"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "where", "name"), PLACES.values(), ids=PLACES)
def test_a_workload_of_ones_own_is_found(here, monkeypatch, files, where, name):
    folder = write(here, **files)
    (folder / "called").mkdir(exist_ok=True)
    if where.startswith(".."):
        monkeypatch.chdir(folder / "called")
    code, said = collect(folder, where, f"--rootdir={folder}", "--import-mode=importlib", "--mp-workloads", name)
    assert code == 0, said
    assert name in said


def collect(folder, *options):
    return pytest_here(folder, "--co", "-q", *options)


def test_the_message_for_a_missing_module_lists_where_it_was_looked_for(here, monkeypatch):
    folder = write(here, suite___test_it=SUITE, called___other="")
    monkeypatch.chdir(folder / "called")
    code, said = collect(here, "../suite", "--rootdir", folder, "--mp-workloads", "nowhere:w")
    assert code == 4
    assert f"mpscale looked on Python's path, then in {folder}/suite, then in {folder}/called, then in {folder}" in said


def test_the_module_beside_the_suite_wins(here):
    folder = write(here, suite___test_it=SUITE, suite___mine_w=WORKLOAD, mine_w="w = 3\n")
    code, said = collect(here, "suite", "--import-mode=importlib", "--mp-workloads", "mine_w:w")
    assert code == 0, said
    (folder / "suite" / "mine_w.py").write_text("w = 3\n")
    (folder / "mine_w.py").write_text(WORKLOAD)
    code, said = collect(here, "suite", "--import-mode=importlib", "--mp-workloads", "mine_w:w")
    assert code == 4
    assert f"not an mpscale.Workload, in {folder}/suite/mine_w.py" in said


@pytest.mark.parametrize("module", ["code", "tabulate", "this_is_installed"])
def test_a_module_hidden_by_an_installed_one_is_named(here, site, module):
    site("this_is_installed", "")
    installed = importlib.import_module(module)
    folder = write(here, suite___test_it=SUITE, **{f"suite___{module}": WORKLOAD})
    code, said = collect(here, "suite", "--import-mode=importlib", "--mp-workloads", f"{module}:w")
    assert code == 4
    assert f"{folder}/suite/{module}.py is hidden by {installed.__file__}; rename it" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_w.py:w", "write module:attribute with the name of the module, such as mine_w:w"),
        ("suite/mine_w.py:w", "such as mine_w:w"),
        ("mine_w:", "write module:attribute"),
        (":w", "write module:attribute"),
        ("mine_w:x", "has no attribute 'x'; its workloads are w"),
        ("mine_w.part:w", "No module named 'mine_w.part'"),
    ],
)
def test_a_mistake_in_the_name_is_explained(here, name, message):
    write(here, suite___test_it=SUITE, suite___mine_w=WORKLOAD)
    code, said = collect(here, "suite", "--mp-workloads", name)
    assert code == 4
    assert message in said


def test_a_suite_that_trains_nothing_imports_no_workload(here):
    write(here, suite___test_it="def test_it():\n    pass\n", suite___broken="import sys\nsys.exit(1)\n")
    code, said = pytest_here(here, "suite", "--mp-workloads", "broken:w")
    assert code == 0
    assert "1 passed" in said


def test_a_broken_module_is_a_usage_error_if_it_is_asked_for(here):
    write(here, suite___test_it=SUITE, suite___broken="import sys\nsys.exit(1)\n")
    code, said = collect(here, "suite", "--mp-workloads", "broken:w")
    assert code == 4
    assert "ERROR: --mp-workloads: no workload at 'broken:w': importing it called sys.exit(1)" in said


def test_the_command_shows_a_workload_of_ones_own_and_where_it_is(site, tmp_path, monkeypatch, capsys):
    write(tmp_path, mine_w=WORKLOAD)
    monkeypatch.chdir(tmp_path)
    assert main(["workloads", "mine_w:w", "mnist1d-mlp"]) == 0
    said = capsys.readouterr().out
    assert "\nmine_w:w " in said and "\nmnist1d-mlp " in said and "\narticle-mlp " not in said
    assert f"mine_w:w is in {tmp_path}/mine_w.py" in said
    assert main(["workloads", "nowhere:w"]) == 2
    assert f"mpscale looked on Python's path, then in {tmp_path}" in capsys.readouterr().err


def test_a_module_that_uses_tensorflow_at_import_takes_no_gpu_if_nothing_is_trained(here, monkeypatch, capsys):
    """A metric at the top of a module would make pytest hold the GPU's memory, and leave none for the worker."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    noted = 'import os\nfrom pathlib import Path\nPath("seen.txt").write_text(os.environ["CUDA_VISIBLE_DEVICES"])\n'
    write(here, looks_at_gpus=noted + WORKLOAD)
    forget("looks_at_gpus")
    assert main(["workloads", "looks_at_gpus:w"]) == 0, capsys.readouterr().err
    assert (here / "seen.txt").read_text() == "-1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
