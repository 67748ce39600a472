"""Whole runs on a machine with a GPU, whose driver is a stand-in and whose training runs on the CPU."""

import json
import os
import re
import subprocess

import pytest
from support.gpu_case import kept_samples
from support.nvml_stand_in import UUID, Script
from support.small_suite import SUITE, pytest_in, write

import mpscale
from mpscale.analysis.summary import summary_of
from mpscale.core.reason import Code
from mpscale.core.wire import Phase
from mpscale.telemetry.samples import known

PEAKS = {"fp32": 3000.0, "tf32": 3100.0, "mixed-static": 1800.0}
CHANGE = """
import os, re
from pathlib import Path

PATH = Path(os.environ["MPSCALE_STAND_IN_NVML"])

def script(pattern, line):
    text = re.sub(pattern, line, PATH.read_text())
    fresh = PATH.with_name("suite.new")
    fresh.write_text(text)
    fresh.replace(PATH)

def worker(*steps):
    script("process compute @worker .*", "process compute @worker " + " ".join(steps))
"""


class Machine:
    """A machine with one GPU, and a suite to run on it.

    Args:
        folder: where the suite and its results are.
        library: the folder of the stand-in.
    """

    def __init__(self, folder, library):
        self.folder, self.library = folder, library
        self.script = Script(folder / "nvml.txt")
        self.script.process("compute", "@worker", 300)

    def run(self, suite, *options, **variables):
        write(self.folder, test_suite=CHANGE + suite)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            environ = {**self.script.environ(self.library), **variables}
            return pytest_in(self.folder, "--mp-workloads=mnist1d-mlp", *options, **environ)

    def path(self):
        (path,) = (self.folder / "results" / "runs").iterdir()
        return path

    def events(self, name):
        lines = (self.path() / "journal.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture
def machine(tmp_path, stand_in_nvml):
    return Machine(tmp_path, stand_in_nvml)


QUICK = ("--mp-preset", "smoke", "--mp-seeds", "1", "--mp-start-method", "fork")


def test_main_job_reports_the_peaks_of_the_script(machine):
    machine.script.process("graphics", 4242, 120)
    done = machine.run(
        f"PEAKS = {PEAKS}\n"
        """
def test_training(mp_case, benchmark):
    worker("0:400", f"0.05:{PEAKS[mp_case.case.mode]:.0f}", "0.11:900")
    mp_case.measure(benchmark)
""",
        *QUICK,
        "--mp-modes=fp32,tf32,mixed-static",
    )
    assert done.returncode == 0, done.stdout
    run = mpscale.read_run(machine.path())
    cases = run.cases.set_index("mode")
    assert set(cases.index) == set(PEAKS)
    assert (cases["status"] == "ok").all()
    assert cases["gpu_memory_nvml_peak_mib"].to_dict() == PEAKS
    assert cases["gpu_memory_queued_peak_mib"].to_dict() == PEAKS
    assert all("needed no more" in reasons["gpu_memory_evaluation_peak_mib"] for reasons in cases["unavailable"])
    assert set(cases["gpu_memory_method"]) == {"process"}
    assert set(cases["gpu_memory_idle_mib"]) == {570.0}
    assert set(cases["gpu_memory_reserved_mib"]) == {500.0}
    assert set(cases["gpu_graphics_processes"]) == {1}
    assert set(cases["gpu_other_processes"]) == {0}
    assert set(cases["gpu_allocator"]) == {"cuda_malloc_async"}
    assert set(cases["tf32"].astype(bool) == (cases.index != "fp32")) == {True}
    assert cases["gpu_energy_j_per_step"].isna().all()
    assert all("energy was off" in reasons["gpu_energy_j_per_step"] for reasons in cases["unavailable"])
    assert all("in place of the stand-in" in reasons["device_busy_share"] for reasons in cases["unavailable"])
    summary = {row["mode"]: row for row in summary_of(run)}
    assert summary["mixed-static"]["gpu_memory_ratio"] == pytest.approx(0.6)
    environment = json.loads((machine.path() / "run.json").read_text())["environment"]
    facts = environment["gpu"]["facts"]
    assert (facts["power_limit_w"], facts["ecc"], facts["vbios"]) == (400.0, True, "92.00.45.00.03")
    assert environment["gpu"]["ways"]["power_w"] == "instant"
    report = (machine.path() / "report.md").read_text()
    assert "mpscale stand-in A100" in report
    # The samples that the peaks were taken from are kept.
    kept = machine.path() / "gpu" / "mnist1d-mlp--fp32--s0--r0--a1.jsonl.gz"
    samples = kept_samples(kept)
    assert max(known(samples.rows, "process_memory_mib")) == 3000.0
    assert {*Phase} - {"energy-end"} <= {row.phase for row in samples.rows}


def test_states_of_the_gpu_that_invalidate_a_case(machine):
    """In turn: throttled, then not; another process that stays; a changed power limit; a lost GPU; one after that."""
    done = machine.run(
        """
import itertools, threading, time
number = itertools.count()

def cool_when_a_case_has_finished():
    while not any("case_finished" in path.read_text() for path in Path("results/runs").glob("*/journal.jsonl")):
        time.sleep(0.05)
    script("event_reasons .*", "event_reasons 0")

def test_training(mp_case, benchmark):
    turn = next(number)
    if turn == 0:
        script("event_reasons .*", "event_reasons 0x40")
        threading.Thread(target=cool_when_a_case_has_finished).start()
    if turn == 1:
        script("(process compute @worker .*)", r"\\1\\nprocess compute 4242 100")
    if turn == 2:
        script("process compute 4242 100\\n", "")
        script("power_limit_w .*", "power_limit_w 300")
    if turn == 3:
        script("power_limit_w .*", "power_limit_w 400")
        threading.Timer(1.5, script, ("temperature_c .*", "temperature_c 40\\nlost 0")).start()
    mp_case.measure(benchmark)
""",
        *QUICK,
        "--mp-gpu-retries=1",
        "--mp-cool-down=3",
    )
    assert done.returncode == 1
    finished = [event["record"] for event in machine.events("case_finished")]
    seen = [(record["status"], record["attempts"]) for record in finished]
    assert seen == [
        ("invalid", 1),
        ("ok", 2),
        ("invalid", 1),
        ("invalid", 2),
        ("invalid", 1),
        ("crashed", 1),
        ("error", 1),
    ], done.stdout
    reasons = [record.get("status_reason") or "" for record in finished]
    assert "throttled" in reasons[0] and "hardware thermal slowdown" in reasons[0]
    assert "4242" in reasons[2]
    assert "the power limit (W) was changed since the first case: 400 to 300" in reasons[4]
    assert "GPU was lost" in reasons[5]
    assert "not started: the GPU was lost in" in reasons[6]
    assert finished[6]["device_name"] == "mpscale stand-in A100"
    assert all(record["step_time_ms_median"] > 0 for record in finished[:6])  # what was measured is kept
    assert "run again" in done.stdout
    assert len(list((machine.path() / "gpu").iterdir())) == 6


@pytest.fixture(scope="module")
def with_energy(tmp_path_factory, stand_in_nvml, write_suite):
    """A run of one case, with energy, on a GPU that is throttled all the time. Its steps mostly sleep."""
    machine = Machine(write_suite(tmp_path_factory.mktemp("energy")), stand_in_nvml)
    machine.script.set(power_w=200, event_reasons=0x40)
    done = machine.run(
        SUITE, *QUICK, "--mp-workloads=suite_workloads:laboured", "--mp-modes=mixed-dynamic", "--mp-jit=off",
        "--mp-energy=10", "--mp-keep-suspect", "--mp-steps-per-call=4",
        SUITE_LOG=str(machine.folder / "cases.log"), SUITE_SLOW_CASES="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return machine


def test_suspect_figures_are_kept_if_the_user_wants_them(with_energy):
    (record,) = [event["record"] for event in with_energy.events("case_finished")]
    assert record["status"] == "ok"
    assert "throttled" in record["gpu_suspicion"]


def test_energy_of_steps_that_go_on_for_ten_seconds(with_energy):
    (record,) = [event["record"] for event in with_energy.events("case_finished")]
    assert record["gpu_energy_window_s"] >= 10
    assert record["gpu_energy_steps"] > record["timed_steps"]
    assert record["gpu_energy_steps"] % 4 == record["timed_steps"] % 4 == 0
    assert record["step_time_ms_one_per_call"] > 0
    assert record["gpu_energy_counter_j"] == pytest.approx(200 * record["gpu_energy_window_s"], rel=0.01)
    assert record["gpu_energy_j_per_step"] * record["gpu_energy_steps"] == pytest.approx(record["gpu_energy_counter_j"])
    assert "energy-end" in with_energy.events("case_finished")[0]["phases"]
    (file,) = (with_energy.path() / "gpu").iterdir()
    assert kept_samples(file).at("energy-end") is not None


CUSTOMIZE = """
import importlib.abc, importlib.util, json, os, re, sys

NAMES = ("CUDA_VISIBLE_DEVICES", "TF_GPU_ALLOCATOR", "XLA_FLAGS")
"""
"""A sitecustomize.py that logs who is started with which environment. It may fail with TensorFlow's allocator."""

HOOK = """
def log(what):
    with open(os.environ["WATCH_LOG"], "a") as file:
        file.write(json.dumps([what, os.getppid(), *map(os.environ.get, NAMES)]) + "\\n")

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "mpscale.worker.device":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            log("import")
            constant, require = module.tf.constant, module.require

            def required(device):
                log("worker")
                file = re.search("dump_autotune_results_to='(.*?)'", os.environ.get("XLA_FLAGS", ""))
                if os.environ.get("SAVES") and file:
                    open(file[1], "w").write("results")
                require(device)

            def touched(*arguments, **options):
                if os.environ.get("PICKY") and os.environ.get("TF_GPU_ALLOCATOR") == "cuda_malloc_async":
                    os._exit(3)
                module.tf.constant = constant
                return constant(*arguments, **options)

            module.tf.constant, module.require = touched, required

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())
"""
"""Logs environments: when ``mpscale.worker.device`` is imported, and when a worker is about to touch the GPU. If
``PICKY`` is set, a worker ends when it then touches it with the default allocator. If ``SAVES`` is set, it saves
autotuning results, as XLA does on a real GPU."""


class Watched:
    """The environments that the processes of a machine's runs have.

    Args:
        machine: where they run.
        code: goes into sitecustomize.py, above the hook that logs.
    """

    def __init__(self, machine, code=""):
        (machine.folder / "sitecustomize.py").write_text(CUSTOMIZE + code + HOOK)
        path = os.pathsep.join([str(machine.folder), os.environ.get("PYTHONPATH", "")])
        self._log = machine.folder / "watch.log"
        self.variables = {"PYTHONPATH": path, "WATCH_LOG": str(self._log)}

    def seen(self, what):
        """For each process that got there: its parent, and the values of ``NAMES``."""
        lines = map(json.loads, self._log.read_text().splitlines())
        return [(parent, *values) for name, parent, *values in lines if name == what]


def test_allocator_that_does_not_work_is_replaced_once_and_for_all(machine):
    watched = Watched(machine)
    done = machine.run(SUITE, *QUICK, "--mp-modes", "fp32,mixed-static", **watched.variables, PICKY="1")
    assert done.returncode == 0, done.stdout
    finished = [event["record"] for event in machine.events("case_finished")]
    assert [(record["status"], record["attempts"]) for record in finished] == [
        ("error", 1),
        ("error", 2),
        ("ok", 3),
        ("ok", 1),
    ]
    assert [record.get("gpu_allocator") for record in finished] == [None, None, "bfc", "bfc"]
    assert "failed on touching the GPU" in done.stdout
    assert "failed with cuda_malloc_async" in done.stdout
    # One parent has forked them all, and each got its own environment.
    assert len(watched.seen("import")) == 1
    (parent,) = {parent for parent, *_ in watched.seen("worker")}
    pools = ["cuda_malloc_async", "cuda_malloc_async", None, None]
    assert watched.seen("worker") == [(parent, "-1", pool, None) for pool in pools]


def test_later_processes_reuse_what_the_first_good_one_has_tuned(machine):
    watched = Watched(machine)
    shared = ("--mp-modes=fp32", "--mp-seeds=2", "--mp-repeats=1", "--mp-autotune=shared")
    done = machine.run(SUITE, *QUICK, *shared, **watched.variables, PICKY="1", SAVES="1")
    assert done.returncode == 0, done.stdout
    records = [event["record"] for event in machine.events("case_finished")]
    assert [(record["status"], record.get("autotuning")) for record in records] == [
        ("error", None),  # saved something and failed before its first step
        ("error", None),
        ("ok", "tuned"),
        ("ok", "reused"),
        ("ok", "reused"),
    ]
    assert ["load" in str(flags) for *_, flags in watched.seen("worker")] == [False, False, False, True, True]
    assert {record["process_settings"] for record in records[2:]} == {"none"}
    assert json.loads((machine.path() / "run.json").read_text())["settings"]["autotune"] == "shared"
    (row,) = re.findall(r"^\| mnist1d-mlp .*reused.*$", (machine.path() / "report.md").read_text(), re.MULTILINE)
    assert len(re.findall(r"[\d.]+ \(2 reused: [\d.]+\)", row)) == 2


@pytest.mark.slow
def test_on_a_cpu_flags_reach_the_worker_and_nothing_is_tuned(machine):
    watched = Watched(machine)
    users = "--xla_cpu_enable_fast_min_max=false"
    done = machine.run(
        SUITE, *QUICK, "--mp-modes=fp32", "--mp-autotune=shared", **watched.variables,
        CUDA_VISIBLE_DEVICES="-1", XLA_FLAGS=users,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (record,) = [event["record"] for event in machine.events("case_finished")]
    ((*_, flags),) = watched.seen("worker")
    assert re.fullmatch(rf"{users} --xla_gpu_dump_autotune_results_to='.+'", flags)
    assert record["unavailable"]["autotuning"]["code"] == Code.NO_GPU
    assert record["process_settings"] == f"XLA_FLAGS={users}"
    assert "autotune=shared" in record["series_key"]


@pytest.mark.parametrize(("visible", "tf32"), [(None, True), ("-1", False)])
def test_ampere_adds_tf32_to_the_plan(machine, visible, tf32):
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = machine.run(SUITE, "--collect-only", "-q", **variables)
    assert ("mnist1d-mlp-tf32-seed0" in done.stdout) == tf32


def test_gpu_that_does_not_exist_is_a_usage_error(machine):
    done = machine.run(SUITE, "--collect-only", "-q", CUDA_VISIBLE_DEVICES="3")
    assert done.returncode == 4
    assert "mpscale stand-in A100" in done.stdout


def test_workers_are_fresh_if_the_parent_has_touched_the_gpu(machine):
    library = machine.folder / "libcuda.so.1"
    # Under a name of its own, or TensorFlow would use it.
    command = ["cc", "-shared", "-Wl,-soname,libtouched.so", "-o", str(library), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    watched = Watched(machine, f"import ctypes; ctypes.CDLL({str(library)!r})\n")
    done = machine.run(SUITE, *QUICK, "--mp-modes", "fp32", "--benchmark-disable", **watched.variables)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("has touched the GPU") == 1
    assert [event["record"]["start_method"] for event in machine.events("case_finished")] == ["fresh"]
    environment = json.loads((machine.path() / "run.json").read_text())["environment"]
    assert environment["why_not_forked"]["code"] == Code.FORK_UNSAFE
    assert len(watched.seen("import")) == 2


def test_cpu_figures_never_pass_for_those_of_the_gpu(machine):
    """TensorFlow without CUDA beside a real GPU: the case is an error that says what to install."""
    machine.script.set(name="NVIDIA A100-SXM4-40GB")
    watched = Watched(machine)
    done = machine.run(SUITE, "--mp-modes", "fp32", "--mp-seeds", "1", "--benchmark-disable", **watched.variables)
    assert done.returncode == 1
    # Only the forked worker saw the GPU, not its parent.
    assert [visible for _, visible, _, _ in watched.seen("import")] == ["-1"]
    assert [values for _, *values in watched.seen("worker")] == [[UUID, "cuda_malloc_async", None]]
    assert "-nvidia-a100-sxm4-40gb-" in machine.path().name
    info = json.loads((machine.path() / "run.json").read_text())
    assert info["environment"]["device"]["compute_capability"] == [8, 0]
    assert info["environment"]["nvidia_driver"] == "570.86.15"
    assert info["settings"]["start_method"] == "fork"
    (record,) = [event["record"] for event in machine.events("case_finished")]
    assert record["status"] == "error"
    assert "tensorflow[and-cuda]" in record["status_reason"]
