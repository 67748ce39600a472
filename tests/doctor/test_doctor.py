"""`mpscale doctor` as a user runs it, on this machine and on scripted GPUs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from support.imports import run_and_list_imports
from support.nvml_stand_in import UUID, Script, build

import mpscale.report.files  # noqa: F401  # a pytest within a test would unload what this imports
from mpscale.cli import main
from mpscale.core.device import NVIDIA, Device
from mpscale.core.reason import Code
from mpscale.core.variables import VARIABLES
from mpscale.doctor import device, software
from mpscale.doctor.examine import Examination, examine
from mpscale.doctor.page import render
from mpscale.doctor.presets import advice
from mpscale.doctor.software import build_info
from mpscale.pytest_plugin import sources
from mpscale.telemetry.client import NoDriver

CALM = dict.fromkeys(VARIABLES)
needs_cuda_build = pytest.mark.skipif(not build_info().get("is_cuda_build"), reason="TensorFlow is built without CUDA")
ENERGY = ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues")


def calm(**environ):
    """The environment without the variables that affect figures, plus ``environ``; None leaves one out."""
    changed = {**os.environ, **CALM, **environ}
    return {name: value for name, value in changed.items() if value is not None}


def in_a_process(*arguments, **environ):
    command = [sys.executable, "-m", "mpscale.cli", "doctor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=calm(**environ), timeout=300)
    return done.returncode, done.stdout, done.stderr


def here(*arguments, **environ):
    """The command in this process; the driver is asked in one of its own all the same."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, calm(**environ), clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(["doctor", *arguments])
    return code, out.getvalue(), err.getvalue()


def facts(*arguments, run=here, **environ):
    code, out, err = run("--json", *arguments, **environ)
    assert err == ""
    found = json.loads(out)
    assert found["verdict"] == code == (1 if found["problems"] else 0)
    return found


def answers(found):
    return {each["figure"]: each["answer"] for each in found["measured"]}


def problems(found):
    return " | ".join(f"{each['problem']} -> {each['do']}" for each in found["problems"])


def codes(found):
    return [each["code"] for each in found["problems"]]


@pytest.fixture
def gpu_here(stand_in_nvml, tmp_path):
    """A scripted GPU, and what the command finds with it."""
    script = Script(tmp_path / "script.txt")

    def find(*arguments, library=stand_in_nvml, **environ):
        return facts(*arguments, **script.environ(library), **environ)

    find.script = script
    return find


def test_a_machine_without_gpu_is_complete_for_a_cpu_and_examined_without_tensorflow():
    done, imported = run_and_list_imports("doctor", environ=calm(CUDA_VISIBLE_DEVICES="-1"))
    assert not imported & {"tensorflow", "keras", "matplotlib"}
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mpscale doctor: a run here is complete for a CPU\n")
    for words in ("what is measured", "mixed precision", "no GPU: ", "tensorflow 2.", "--mp-preset "):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 130


def test_json_has_the_same_facts():
    found = facts("--mp-seeds=3", run=in_a_process, CUDA_VISIBLE_DEVICES="-1")
    assert list(found) == [
        "schema_version", "command", "verdict", "device", "measured", "precision", "problems", "cautions", "notes",
        "presets", "software", "options", "about_options", "trained",
    ]  # fmt: skip
    assert (found["device"]["kind"], found["trained"]) == ("cpu", None)
    assert [(each["option"], each["where"]) for each in found["options"]] == [("--mp-seeds", "command line")]
    assert answers(found)["step time"] == answers(found)["overflow"] == "yes"
    assert {row["answer"] for row in found["measured"]} == {"yes", "no"}
    assert all((row["reason"] is None) == (row["answer"] == "yes") for row in found["measured"])


def test_training_without_a_gpu_is_a_problem():
    found = facts("--gpu", CUDA_VISIBLE_DEVICES="-1")
    assert codes(found) == [Code.NO_GPU]
    assert found["trained"] is None


TABLE = """
[tool.mpscale]
seeds = 3
seed = 4
modes = ["fp32", "mixed-bf16"]
batch-size = 64
fail-on = ["step_time>5%"]
strict = 3
workloads = ["my:a", "article-mpl"]
threshold = "5"
baseline = "nowhere"
"""


def test_options_are_shown_with_their_place_and_what_a_run_makes_of_them(tmp_path, monkeypatch):
    table, settings = tmp_path / "pyproject.toml", tmp_path / "pytest.ini"
    table.write_text(TABLE)
    settings.write_text("[pytest]\naddopts = --mp-sedes 3 --mp-modes=fp32 --of-a-conftest --mp-resume latest\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-q --mp-seeds 2 --mp-timeout=soon")
    arguments = ["--mp-modes=fp32,mixed_bf16", "--mp-fail-on", "metric"]
    found = examine(False, *sources.look(tmp_path, arguments, os.environ)).to_json()
    ini, typed = f"addopts of {settings}", "command line"
    assert [(each["option"], each["value"], each["where"], each["overridden_by"]) for each in found["options"]] == [
        ("seeds", "3", str(table), "PYTEST_ADDOPTS"),
        ("seed", "4", str(table), None),
        ("modes", "fp32,mixed-bf16", str(table), typed),
        ("batch-size", "64", str(table), None),
        ("fail-on", "step_time>5%", str(table), typed),
        ("strict", "3", str(table), None),
        ("workloads", "my:a,article-mpl", str(table), None),
        ("threshold", "5", str(table), None),
        ("baseline", "nowhere", str(table), None),
        ("--mp-modes", "fp32", ini, typed),
        ("--mp-resume", "latest", ini, None),
        ("--mp-sedes", "", ini, None),
        ("--mp-seeds", "2", "PYTEST_ADDOPTS", None),
        ("--mp-timeout", "soon", "PYTEST_ADDOPTS", None),
        ("--mp-modes", "fp32,mixed_bf16", typed, None),
        ("--mp-fail-on", "metric", typed, None),
    ]
    said = {each["option"]: each["problem"] for each in found["options"] if each["problem"]}
    for option, words in {
        "seed": "did you mean seeds?",
        "strict": "must be true or false, not 3",
        "workloads": "did you mean article-mlp?",
        "threshold": "the threshold is a percentage",
        "baseline": "no run is called 'nowhere'",
        "--mp-sedes": "did you mean --mp-seeds?",
        "--mp-resume": "is for one session",
        "--mp-timeout": "expected a number of seconds",
        "--mp-modes": "did you mean mixed-bf16?",
    }.items():
        assert words in said.pop(option)
    assert not said
    assert codes(found).count(Code.REFUSED_OPTION) == 9
    assert f"{ini} has --mp-sedes" in problems(found)
    assert "`mpscale run` does not read the settings of pytest" in " ".join(found["about_options"])


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("--mp-modes=fp32, mixed-bf16", None),
        ("--mp-workloads=article-mlp , diabetes-sum", None),
        ("--mp-baseline=", None),
        ("--mp-baseline=latest", "no run"),
        ("--mp-modes=fp32, mixedbf16", "did you mean mixed-bf16?"),
    ],
)
def test_a_value_is_read_as_a_session_reads_it(tmp_path, monkeypatch, argument, problem):
    monkeypatch.chdir(tmp_path)
    (one,) = examine(False, *sources.look(tmp_path, [argument], {})).to_json()["options"]
    assert (one["problem"] is None) == (problem is None)
    assert problem is None or problem in one["problem"]


@pytest.mark.parametrize(
    ("files", "variable", "words"),
    [
        ({}, "", ["None is given: no pyproject.toml here or above"]),
        ({"pyproject.toml": "[tool.ruff]"}, "-q", ["None is given: no [tool.mpscale] in ", "/pyproject.toml"]),
        ({"pyproject.toml": "[tool.mpscale"}, "", ["has [tool.mpscale], which a run refuses: cannot be"]),
        ({"pytest.ini": "[pytest]\naddopts = --mp-seeds"}, "", ["refused, see below", "expected one argument"]),
        ({"pytest.ini": "addopts"}, "--mp-steps 3", ["pytest has addopts or other settings", "--mp-steps", "used"]),
        ({"pytest.ini": "[pytest]\nrequired_plugins = pytest-benchmark"}, "", ["None is given"]),
        ({}, "-p no_such_plugin", ["No module named 'no_such_plugin'"]),
        ({}, "--mp-steps '3", ["No closing quotation"]),
        ({"pytest.ini": "", "in/pyproject.toml": ""}, "", ["takes [tool.mpscale] of no file; `mpscale run` takes"]),
    ],
)  # fmt: skip
def test_where_options_were_looked_for(tmp_path, monkeypatch, files, variable, words):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir((tmp_path / name).parent if files else tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", variable)
    page = render(examine(False, *sources.look(Path.cwd(), [], os.environ)), as_json=False)
    for each in words:
        assert each in " ".join(page.split()) or each in page


def test_wrong_use():
    code, out, _ = in_a_process("--gpus")
    assert (code, out) == (2, "")
    with pytest.raises(ValueError, match="unrecognized arguments: results"):
        sources.look(Path.cwd(), ["--mp-seeds", "2", "results"], {})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TF_ENABLE_XLA_JIT", "1", "does nothing"),
        ("TF_ENABLE_AUTO_MIXED_PRECISION", "1", "does nothing"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "no newer instructions"),
        ("TF_ENABLE_ONEDNN_OPTS", "0", "bfloat16"),
        ("CUDA_LAUNCH_BLOCKING", "1", "is set"),
    ],
)
def test_variables_are_noted_and_not_a_problem_on_a_cpu(variable, value, words):
    found = facts(CUDA_VISIBLE_DEVICES="-1", **{variable: value})
    (note,) = [note for note in found["notes"] if note.startswith(variable)]
    assert words in note
    assert found["verdict"] == 0


@pytest.mark.parametrize(
    ("loaded", "visible", "problem"), [(False, None, False), (True, None, True), (True, "0", True), (True, "-1", False)]
)
def test_a_broken_driver_library_is_a_problem_unless_the_gpu_is_hidden(tmp_path, loaded, visible, problem):
    sign = tmp_path / "nvidiactl"
    if loaded:
        sign.touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    why = device.why_no_gpu(NoDriver(NVIDIA.no_library), environ)
    assert why.code is Code.NO_LIBRARY
    found = list(device.check_absence(why, environ, [sign]))
    assert [each.code for each in found] == [Code.NO_LIBRARY] * problem
    assert all(NVIDIA.library in each.cure for each in found)


@pytest.mark.parametrize(
    ("flags", "float16", "bfloat16", "words"),
    [
        (["avx2"], "no", "no", "saves no time"),
        (["avx512_bf16"], "no", "in part", "--mp-jit off"),
        (["avx512_bf16", "avx512_fp16", "amx_bf16"], "in part", "yes", "bfloat16 and float16"),
        (["amx_fp16"], "yes", "no", "instructions for float16."),
        (None, None, None, "does not report"),
    ],
)
def test_what_a_cpu_computes_fast(flags, float16, bfloat16, words):
    found = device.precision_of_cpu(flags)
    assert (found.float16, found.bfloat16, found.tf32, found.float8) == (float16, bfloat16, False, "no")
    assert words in " ".join(found.words)


@pytest.mark.parametrize(
    ("capability", "name", "float16", "bfloat16", "tf32", "float8"),
    [
        ((12, 0), "NVIDIA GeForce RTX 5090", "yes", "yes", True, "yes"),
        ((9, 0), "NVIDIA H100", "yes", "yes", True, "yes"),
        ((8, 9), "NVIDIA L4", "yes", "yes", True, "yes"),
        ((8, 0), "NVIDIA A100", "yes", "yes", True, "no"),
        ((7, 0), "Tesla V100", "yes", "no", False, "no"),
        ((7, 5), "NVIDIA GeForce GTX 1660", "in part", "no", False, "no"),
        ((7, 5), "Tesla T4", "yes", "no", False, "no"),
        ((6, 0), "Tesla P100", "in part", "no", False, "no"),
        ((6, 1), "NVIDIA GeForce GTX 1080", "no", "no", False, "no"),
        ((5, 2), "Tesla M40", "no", "no", False, "no"),
        (None, "a GPU", None, None, False, None),
    ],
)
def test_what_a_gpu_computes_fast(capability, name, float16, bfloat16, tf32, float8):
    found = device.precision_of_gpu(Device("gpu", name, "GPU-1", capability))
    assert (found.float16, found.bfloat16, found.tf32, found.float8) == (float16, bfloat16, tf32, float8)
    assert ("float8 run on Tensor Cores" in " ".join(found.words)) == (float8 == "yes")


def test_a_busy_machine_is_noted(monkeypatch):
    monkeypatch.setattr("mpscale.telemetry.host.load_average", lambda: [1000.0, 0.0, 0.0])
    assert any("the load average is 1000.0 on" in note for note in examine(train=False).notes)


def test_an_exception_is_one_problem_among_the_others(monkeypatch):
    monkeypatch.setattr("mpscale.doctor.device.precision_of_cpu", lambda flags: 1 / 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    found = examine(train=False)
    assert "ZeroDivisionError" in found.problems[-1].text
    assert (found.verdict, found.device["kind"]) == (1, "cpu")


def test_an_examination_that_found_nothing_can_be_shown():
    assert "none: no run can begin" in render(Examination(), as_json=False)
    assert json.loads(render(Examination(), as_json=True))["verdict"] == 0


def test_a_healthy_gpu_is_complete(stand_in_nvml, tmp_path):
    script = Script(tmp_path / "script.txt")
    code, out, err = here(**script.environ(stand_in_nvml))
    assert (code, err) == (0, ""), out
    assert out.startswith("mpscale doctor: a run here is complete for a GPU\n")
    for words in ("compute capability 8.0", "driver 570.86.15", "ECC on", "process: ", "counter", "TF32: yes"):
        assert words in out


def test_a_healthy_gpu_gives_every_figure(gpu_here):
    found = gpu_here()
    assert set(answers(found).values()) == {"yes"}
    assert {each["figure"]: each["way"] for each in found["measured"]}["power"] == "instant"
    assert (found["device"]["uuid"], found["device"]["now"]["temperature_c"]) == (UUID, 35)
    assert found["verdict"] == 0


def test_other_processes_on_the_gpu(gpu_here):
    gpu_here.script.process("graphics", 4321, 100)
    found = gpu_here()
    assert found["verdict"] == 0
    assert any(note.startswith("1 other process drew") for note in found["notes"])
    gpu_here.script.process("compute", 1234, 800)
    found = gpu_here()
    assert codes(found) == [Code.BUSY]


def test_settings_and_heat_are_noted(gpu_here):
    gpu_here.script.set(persistence=0, power_limit_w=250, temperature_c=85, event_reasons=0x20)
    found = gpu_here()
    notes = "\n".join(found["notes"])
    for words in ("nvidia-smi -pm 1", "85 °C and slows down at 92 °C", "thermal"):
        assert words in notes
    (slowed,) = [each for each in found["cautions"] if each["code"] == Code.SLOWED]
    assert "250 W, below the default of 400 W" in slowed["caution"]
    assert "-pl 400" in slowed["do"]
    assert found["verdict"] == 0


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({}, []),
        ({"sm_clock_mhz": 1200}, []),  # 85 %
        ({"sm_clock_mhz": 1000}, ["1000 of 1410 MHz"]),
        ({"sm_clock_mhz": 210, "event_reasons": 0x1}, []),  # an idle GPU
        ({"sm_clock_mhz": 1000, "event_reasons": 0x2}, ["application clocks"]),
        ({"mem_clock_mhz": 405}, ["memory runs at 405 of 1215 MHz"]),
        ({"sm_clock_mhz": None, "max_mem_clock_mhz": None}, []),
        ({"power_limit_w": 400, "power_limits_w": (100, 700, 700)}, ["400 W, below the default of 700 W"]),
    ],
)
def test_a_gpu_far_below_its_clocks_or_power_is_a_caution(gpu_here, lines, words):
    gpu_here.script.set(**lines)
    found = gpu_here()
    slowed = [each["caution"] for each in found["cautions"] if each["code"] == Code.SLOWED]
    assert len(slowed) == len(words)
    assert all(word in text for word, text in zip(words, slowed, strict=True))
    assert found["verdict"] == 0


@pytest.mark.parametrize(
    ("clock", "most", "number"), [(1680.0, 1980.0, 0), (1200.0, 1980.0, 1), (None, 1980.0, 0), (1200.0, None, 0)]
)
def test_a_clock_that_stays_low_under_load_is_a_caution(clock, most, number):
    found = list(device.check_clock(clock, {"max_sm_clock_mhz": most}, "during the short training"))
    assert [each.code for each in found] == [Code.SLOWED] * number


@pytest.mark.parametrize(
    ("own", "pids", "words"),
    [
        (False, [1], None),
        (True, [], "shows only when one uses the GPU"),
        (True, [1], "shows only when one uses the GPU"),
        (True, [1, 3_999_999], "do not exist here (3999999)"),
    ],
)
def test_a_container_that_may_hide_processes_is_a_caution(tmp_path, own, pids, words):
    (tmp_path / "1").mkdir()
    found = list(device.check_namespace({"pids": pids}, own, tmp_path))
    assert [each.code for each in found] == ([] if words is None else [Code.PROCESSES_HIDDEN])
    assert all(words in each.text and "--pid=host" in each.cure for each in found)


@pytest.fixture
def ptxas(tmp_path):
    """Make a ptxas of a version; return the folder of its CUDA."""

    def make(version, name="cuda"):
        file = tmp_path / name / "bin" / "ptxas"
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n")
        file.chmod(0o755)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("12.5.82", True),
        ("12.6.77", True),
        ("12.6.85", False),
        ("12.9.86", False),
        ("13.0.88", False),
        ("11.8.89", True),
    ],
)
def test_a_ptxas_that_miscompiles_is_a_caution(ptxas, version, old):
    found = list(software.check_ptxas({"PATH": str(ptxas(version) / "bin")}))
    assert [each.code for each in found] == [Code.MISCOMPILES] * old
    assert all(f"ptxas {version}" in each.text and "12.6.85" in each.cure for each in found)


def test_the_ptxas_that_xla_finds_first_is_the_one_that_counts(ptxas):
    old, new = ptxas("12.5.82", "old dir"), ptxas("12.9.86", "new")
    flags = f"--xla_a=1 --xla_gpu_cuda_data_dir='{old}'"
    (found,) = software.check_ptxas({"XLA_FLAGS": flags, "PATH": str(new / "bin")})
    assert found.code is Code.MISCOMPILES
    assert list(software.check_ptxas({"XLA_FLAGS": "--xla_gpu_cuda_data_dir=nowhere", "PATH": str(new / "bin")})) == []


def test_ptxas_is_checked_for_a_real_gpu(gpu_here, ptxas):
    gpu_here.script.set(name="NVIDIA H200")
    found = gpu_here(XLA_FLAGS=f"--xla_gpu_cuda_data_dir={ptxas('12.5.82')}")
    assert Code.MISCOMPILES in [each["code"] for each in found["cautions"]]


@pytest.mark.parametrize(
    ("where", "cores", "fits", "words"),
    [
        (Device("cpu", "CPU"), 2, "small", "trains as well as fp32"),
        (Device("cpu", "CPU"), 1, "smoke", "Begin with"),
        (Device("gpu", "NVIDIA H200", "GPU-1", (9, 0), 143771.0), 16, "gpu", "synthetic inputs"),
        (Device("gpu", "Quadro RTX 3000", "GPU-1", (7, 5), 6144.0), 16, "small", "the GPU has 6.0 GiB"),
    ],
)
def test_the_preset_that_fits(where, cores, fits, words):
    found = advice(where, cores)
    assert found.preset == fits
    assert words in " ".join(found.words)
    seconds = {each.preset: each.seconds for each in found.durations}
    assert list(seconds) == ["smoke", "small", "full", *(["gpu"] if where.kind == "gpu" else [])]
    assert seconds["smoke"] < seconds["small"] < seconds["full"]
    assert 120 < seconds[fits if fits != "smoke" else "small"] <= 1800  # minutes, at most half an hour


def test_a_driver_without_energy_readings_should_be_updated(gpu_here, tmp_path_factory):
    old = build(tmp_path_factory.mktemp("old"), without=ENERGY)
    found = gpu_here(library=old)
    assert answers(found)["energy"] == "in part"
    assert codes(found) == [Code.DRIVER_TOO_OLD]
    assert "energy: no counter: " in problems(found)
    assert "-> update the NVIDIA driver" in problems(found)


def test_a_gpu_without_an_energy_counter_is_complete(gpu_here):
    gpu_here.script.set(energy=None)
    found = gpu_here()
    assert (answers(found)["energy"], found["verdict"]) == ("in part", 0)
    gpu_here.script.set(power_w=None)
    found = gpu_here()
    assert (answers(found)["energy"], answers(found)["power"], found["verdict"]) == ("no", "no", 0)


def test_a_missing_permission_is_a_problem(gpu_here):
    gpu_here.script.fail("nvmlDeviceGetTemperatureV", 4).fail("nvmlDeviceGetTemperature", 4)
    found = gpu_here()
    assert answers(found)["temperature"] == "no"
    assert codes(found) == [Code.NO_PERMISSION]
    assert "-> give this user access" in problems(found)


def test_a_mig_instance_lacks_figures_but_needs_no_change(gpu_here):
    gpu_here.script.mig()
    found = gpu_here()
    assert found["verdict"] == 0
    assert (answers(found)["peak GPU memory"], answers(found)["energy"]) == ("yes", "no")
    assert any(note.startswith("a MIG instance") for note in found["notes"])


def test_a_garbled_list_of_processes(gpu_here):
    gpu_here.script.general(driver="535.54.03", entry_bytes=32)
    found = gpu_here()
    assert answers(found)["peak GPU memory"] == "in part"
    assert codes(found) == [Code.GARBLED]
    assert "-> update the NVIDIA driver" in problems(found)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_the_cpu_is_examined_if_the_gpu_is_hidden(gpu_here, visible):
    found = gpu_here(CUDA_VISIBLE_DEVICES=visible)
    assert (found["device"]["kind"], found["verdict"]) == ("cpu", 0)
    assert any("hides mpscale stand-in A100" in note for note in found["notes"])


def test_selecting_a_gpu_that_does_not_exist_is_a_problem(gpu_here):
    found = gpu_here("--gpu", CUDA_VISIBLE_DEVICES="7")
    assert (found["device"], found["measured"], found["trained"]) == (None, [], None)
    assert codes(found) == [Code.NO_DEVICE, Code.NO_GPU]
    problem = found["problems"][0]
    assert problem["problem"] == "CUDA_VISIBLE_DEVICES='7' matches no GPU"
    assert f"0: mpscale stand-in A100, {UUID}" in problem["do"]


@pytest.mark.parametrize(
    ("variable", "value", "verdict"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", 1),
        ("CUDA_LAUNCH_BLOCKING", "0", 0),
        ("NVIDIA_TF32_OVERRIDE", "0", 1),
        ("TF_FORCE_GPU_ALLOW_GROWTH", "false", 1),
        ("TF_FORCE_GPU_ALLOW_GROWTH", "true", 0),
        ("TF_GPU_ALLOCATOR", "cuda_malloc_async", 0),
        ("XLA_FLAGS", "--xla_dump_to=x", 0),
    ],
)
def test_variables_that_falsify_figures_of_a_gpu_are_problems(gpu_here, variable, value, verdict):
    found = gpu_here(**{variable: value})
    assert found["verdict"] == verdict, problems(found)
    said = found["notes"] if verdict == 0 else [each["problem"] for each in found["problems"]]
    assert any(line.startswith(f"{variable}={value}") for line in said)
    assert verdict == 0 or f"unset {variable}" in problems(found)


@needs_cuda_build
@pytest.mark.parametrize(
    ("capability", "cuda", "code"), [((5, 2), 12080, Code.SOFTWARE_MISFIT), ((8, 0), 11040, Code.DRIVER_TOO_OLD)]
)
def test_a_gpu_that_tensorflow_cannot_use(gpu_here, capability, cuda, code):
    gpu_here.script.general(cuda=cuda).set(capability=capability)
    assert codes(gpu_here()) == [code]


@needs_cuda_build
def test_a_gpu_newer_than_tensorflow_is_noted(gpu_here):
    gpu_here.script.set(capability=(12, 0))
    found = gpu_here()
    assert found["verdict"] == 0
    assert any("no machine code for compute capability 12.0" in note for note in found["notes"])


def test_a_driver_that_crashes_its_process_is_a_problem(gpu_here):
    gpu_here.script.crash("nvmlDeviceGetMemoryInfo_v2")
    found = gpu_here()
    assert codes(found) == [Code.MONITOR_DIED]
    assert "SIGSEGV" in problems(found)
    assert answers(found)["peak GPU memory"] == "no"


@pytest.mark.parametrize(
    ("error", "found_codes"),
    [(9, []), (18, [Code.DRIVER_MISMATCH]), (4, [Code.NO_PERMISSION]), (999, [Code.OTHER])],
)
def test_a_driver_that_does_not_start_is_a_problem_if_there_must_be_a_gpu(gpu_here, error, found_codes):
    gpu_here.script.general(init_error=error)
    found = gpu_here()
    assert (found["device"]["kind"], codes(found)) == ("cpu", found_codes)
    assert all(each["do"] for each in found["problems"])


def test_a_short_training_on_a_simulated_gpu(gpu_here):
    gpu_here.script.process("compute", "@worker", "0:300 1:700")
    found = gpu_here("--gpu", run=in_a_process)
    trained = found["trained"]
    assert found["verdict"] == 0, problems(found)
    assert (trained["status"], trained["device_name"]) == ("ok", "mpscale stand-in A100")
    assert trained["step_time_ms"] > 0
    assert (trained["gpu_memory_mib"] or 0) >= 300, trained["empty"]
    assert trained["gpu_memory_method"] == "process"
    assert trained["gpu_allocator"] == "cuda_malloc_async"
    assert "the CPU trained in place of the stand-in" in trained["empty"].values()
    assert not [name for name in trained["empty"] if "energy" in name]
    # It was listed under its own number, so this container hides nothing.
    assert Code.PROCESSES_HIDDEN not in [each["code"] for each in found["cautions"]]


@pytest.mark.slow
def test_a_short_training_that_the_driver_does_not_list(gpu_here):
    gpu_here.script.general(offset_pid=1_000_000).process("compute", "@worker", "0:300 1:700")
    found = gpu_here("--gpu")
    assert (found["trained"]["status"], found["trained"]["gpu_memory_method"]) == ("ok", "device-minus-idle")
    assert Code.PROCESSES_HIDDEN in [each["code"] for each in found["cautions"]]


def test_what_a_run_requires_is_checked_in_the_base_and_in_the_extra_bench(monkeypatch):
    lines = ["keras>=99", 'nvidia-ml-py>=99; extra == "bench"', 'keras>=999; extra == "dev"', "numpy>=99"]
    monkeypatch.setattr(software.metadata, "requires", lambda distribution: lines)
    found = list(software.check_versions())
    assert [reason.code for reason in found] == [Code.SOFTWARE_MISFIT] * 2
    assert [reason.cure for reason in found] == ["pip install 'keras>=99'", "pip install 'nvidia-ml-py>=99'"]
