"""[tool.mpscale] of pyproject.toml: each option is a key, which value wins, and what is refused."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.no_training import replace_trainings

import mpscale.report.files  # a pytest within a test would unload what this imports, and NumPy cannot be loaded twice
import mpscale.suite
from mpscale import pytest_plugin
from mpscale.config import SettingsError, results_folder
from mpscale.pytest_plugin import project
from mpscale.pytest_plugin.options import add_options

OF_ONE_RUN = {"resume", "name", "note", "shard"}


def registered():
    """The names of mpscale's options as pytest gets them."""
    found = []
    group = SimpleNamespace(addoption=lambda option, **how: found.append(option))
    pytest_plugin.pytest_addoption(SimpleNamespace(getgroup=lambda *_: group))
    return found


@pytest.fixture
def read(tmp_path):
    """Read a table; return its options as values by key."""

    def read(table):
        (tmp_path / "pyproject.toml").write_text(f"[tool.mpscale]\n{table}\n")
        return {key: value for key, (_, value) in project.read(tmp_path)[1].items()}

    return read


def test_every_option_is_a_key_unless_it_is_about_one_run():
    assert {option.removeprefix("--mp-") for option in registered()} == project.settings().keys() | OF_ONE_RUN


@pytest.mark.parametrize(
    ("table", "typed"),
    [
        ('workloads = ["my:a", "article-mlp"]', "--mp-workloads=my:a,article-mlp"),
        ('modes = "fp32,mixed-bf16"', "--mp-modes=fp32,mixed-bf16"),
        ('preset = "smoke"', "--mp-preset=smoke"),
        ("seeds = 5", "--mp-seeds=5"),
        ("repeats = 0", "--mp-repeats=0"),
        ("batch-size = [256, 64]", "--mp-batch-size=256,64"),
        ("batch-size = 64", "--mp-batch-size=64"),
        ('static-scale = [8, 16.5, "2**24"]', "--mp-static-scale=8,16.5,2**24"),
        ("dynamic-scale = { hysteresis = 2, initial = 1024.0 }", "--mp-dynamic-scale=hysteresis=2,initial=1024"),
        ('dynamic-scale = "hysteresis=2"', "--mp-dynamic-scale=hysteresis=2"),
        ("timeout = 1.5e3", "--mp-timeout=1500"),
        ('timing = "2**2"', "--mp-timing=4"),
        ("keep-suspect = true", "--mp-keep-suspect"),
        ("keep-suspect = false", "--no-mp-keep-suspect"),
        ('jit = "off"', "--mp-jit=off"),
        ("cores = [0]", "--mp-cores=0"),
    ],
)
def test_a_value_in_the_file_is_what_the_command_line_makes_of_it(read, table, typed):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser.add_argument)
    key = table.partition(" ")[0]
    assert read(table) == {key: getattr(parser.parse_args([typed]), f"mp_{key.replace('-', '_')}")}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("seed = 3", "has no setting 'seed'; did you mean seeds?"),
        ("mp_batch_size = 3", "has no setting 'mp_batch_size'; did you mean batch-size?"),
        ("xyz = 3", "has no setting 'xyz', only autotune, baseline, batch-size,"),
        ('name = "before"', "name of [tool.mpscale] would be that of every run: give it on the command line"),
        ("seeds = true", "seeds of [tool.mpscale]: expected an integer of at least 1 and at most 1000, not 'true'"),
        ("seeds = [3]", "expected an integer of at least 1 and at most 1000"),
        ("seeds = 0", "expected an integer of at least 1 and at most 1000, not '0'"),
        ("seeds = 2.5", "expected an integer of at least 1 and at most 1000, not '2.5'"),
        ("seeds = 2024-01-01", "expected an integer of at least 1"),
        (f"seeds = {'9' * 5000}", "cannot be read"),
        ("timeout = nan", "expected a number of seconds above 0 and at most 604800, a week, not 'nan'"),
        ("workloads = 3", "workloads of [tool.mpscale]: expected a list of strings, not 3"),
        ("workloads = []", "expected at least one name"),
        ("workloads = [1]", "expected a list of strings, not [1]"),
        ("workloads = { a = 1 }", "expected a list of strings"),
        ("jit = true", "jit of [tool.mpscale]: expected one of 'auto', 'on', 'off', not true"),
        ('jit = "yes"', "expected one of 'auto', 'on', 'off', not 'yes'"),
        ('keep-suspect = "yes"', "expected true or false, not 'yes'"),
        ("results = 3", "expected a string, the name of a folder, not 3"),
        ('results = ""', "expected a folder, and nothing was given"),
        ("dynamic-scale = { start = 1 }", "'start' is not one of initial"),
        ("dynamic-scale = { initial = [1] }", "expected a table such as { initial = 1024 }"),
        ("batch-size = [64, true]", "expected a number or a list of numbers"),
    ],
    ids=lambda text: text[:30],
)
def test_what_cannot_be_meant_is_refused_with_what_can(read, table, message):
    with pytest.raises(SettingsError) as refused:
        read(table)
    assert message in str(refused.value)
    assert "pyproject.toml: " in str(refused.value)
    assert len(str(refused.value)) < 800


def test_a_baseline_of_any_length_is_left_to_whoever_looks_for_the_run(read):
    assert read(f'baseline = "{"x" * 5000}"') == {}


@pytest.fixture
def session(pytester, monkeypatch):
    """Run pytest in a project whose suite is the two lines of the guide; return its exit code and output."""
    replace_trainings(monkeypatch)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("mpscale.report.files._page", lambda run, report: "a page")
    monkeypatch.setattr("sys.argv", ["pytest"])
    pytester.makepyfile(test_it="from mpscale.suite import test_training")

    def run(table, *options):
        Path("pyproject.toml").write_text(f"[tool.pytest.ini_options]\n[tool.mpscale]\n{table}\n")
        plugins = ("no:cacheprovider", "no:hypothesispytest", "no:unraisableexception")
        result = pytester.runpytest_inprocess(*(f"-p{name}" for name in plugins), *options, no_reraise_ctrlc=True)
        return int(result.ret), result.stdout.str() + result.stderr.str()

    return run


def collected(said):
    return sorted(line.partition("[")[2].rstrip("]") for line in said.splitlines() if line.startswith("test_it.py::"))


TABLE = 'workloads = ["mnist1d-mlp"]\nmodes = ["fp32", "mixed-bf16"]\nseeds = 1\npreset = "smoke"'


def test_a_suite_trains_what_the_project_names_and_nothing_else(session):
    code, said = session(TABLE, "--collect-only", "-q")
    assert code == 0, said
    assert collected(said) == ["mnist1d-mlp-fp32-seed0", "mnist1d-mlp-mixed-bf16-seed0"]


def test_the_command_line_wins_over_the_file_which_wins_over_the_preset(session):
    code, said = session(f"{TABLE}\nrepeats = 1", "--collect-only", "--mp-modes=fp32", "--mp-preset=small", "-vv")
    assert code == 0, said
    assert "preset small: as asked for" in said
    assert "pyproject.toml sets workloads, seeds, repeats; the command line overrides modes, preset of pyproj" in said
    assert said.count("<Function test_training[") == 2, said  # three seeds by the preset, and no repeat
    code, said = session("keep-suspect = true", "--collect-only", "--no-mp-keep-suspect", "--mp-workloads=article-mlp")
    assert "the command line overrides keep-suspect" in said


def test_a_run_tells_where_its_options_came_from_and_goes_on_with_them(session):
    code, said = session(f'{TABLE}\nresults = "out"\ntimeout = 77', "--mp-timing=0.05")
    assert code == 0, said
    (path,) = Path("out/runs").iterdir()
    info = json.loads((path / "run.json").read_text())
    keys = ("workloads", "modes", "seeds", "preset", "results", "timeout")
    by_file = {f"--mp-{key}": "pyproject.toml" for key in keys}
    assert info["settings"]["given_by"] == {"--mp-timing": "command line", **by_file}
    assert info["settings"]["timeout_s"] == 77
    # The file has changed since. What decides on figures is the run's, and where it lies is the file's.
    changed = f'{TABLE}\nresults = "out"\nrepeats = 3'.replace("seeds = 1", "seeds = 5")
    code, said = session(changed, "--mp-resume=latest")
    assert code == 0, said
    assert "nothing to run, every case has its result" in said
    code, said = session('results = "out"', "--mp-resume=latest", "--mp-seeds=2")
    assert code == 4
    assert "--mp-seeds is 2, and was 1" in said


def test_a_suite_that_names_no_workload_says_whose_it_trains(session):
    _, said = session('preset = "smoke"', "--collect-only")
    assert "no workloads are named, so mpscale's own are trained, those of the preset smoke" in said
    assert "mnist1d-mlp-fp32-seed0" in said
    assert "no workloads are named" not in session(TABLE, "--collect-only")[1]
    code, said = session('preset = "smoke"', "--collect-only", mpscale.suite.__file__)
    assert code == 0
    assert "no workloads are named" not in said


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('cores = "100000"', "cores of [tool.mpscale]: expected cores such as 0,2-3 out of"),
        ('workloads = ["nothing-like-it"]', "pyproject.toml: workloads of [tool.mpscale]: "),
        ('workloads = ["no_such_module:a"]', "pyproject.toml: workloads of [tool.mpscale]: "),
    ],
)
def test_what_this_machine_lacks_stops_only_sessions_that_measure(session, table, message):
    code, said = session(table)
    assert code == 4
    assert message in said
    assert not Path("results").exists()
    Path("test_it.py").write_text("def test_plain():\n    pass\n")
    code, said = session(table)
    assert code == 0, said


def test_a_mode_that_does_not_exist_is_told_with_its_file(session):
    code, said = session('modes = ["fp33"]')
    assert code == 4
    assert "pyproject.toml: modes of [tool.mpscale]: " in said


def test_commands_look_for_results_where_the_project_has_them(tmp_path):
    assert results_folder(tmp_path) == Path("results")
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nresults = "build/out"\n')
    assert results_folder(tmp_path) == Path("build/out")
    assert results_folder(tmp_path / "below") == tmp_path / "build/out"
    (tmp_path / "pyproject.toml").write_text("[tool.mpscale]\nresults = 3\n")
    with pytest.raises(SettingsError, match="expected a string, the name of a folder"):
        results_folder(tmp_path)
