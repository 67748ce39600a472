"""Whole runs on a machine with a GPU, whose driver is a stand-in: its figures, and states that spoil them."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.gpu_case import kept_samples
from support.gpu_machine import FINE, QUICK, Machine
from support.small_suite import SUITE

import mpscale
from mpscale.analysis.summary import summary_of
from mpscale.core.processes.events import Phase
from mpscale.telemetry.samples import known

PEAKS = {"fp32": 3000.0, "mixed-static": 1800.0}


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
        FINE,
        "--mp-modes=fp32,mixed-static",
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
    kept = machine.path() / "gpu" / "suite_workloads+fine--fp32--s0--r0--a1.jsonl.gz"
    samples = kept_samples(kept)
    assert max(known(samples.rows, "process_memory_mib")) == 3000.0
    assert {*Phase} - {"energy-end"} <= {row.phase for row in samples.rows}


@pytest.fixture(scope="module")
def energy(tmp_path_factory, stand_in_nvml, write_suite):
    """A run of one case, with energy, on a GPU that is throttled all the time.

    Its steps mostly sleep, so it goes on beside another test.
    """
    machine = Machine(write_suite(tmp_path_factory.mktemp("energy")), stand_in_nvml)
    machine.script.set(power_w=200, event_reasons=0x40)
    with ThreadPoolExecutor(1) as pool:
        yield machine, pool.submit(
            machine.run, SUITE, *QUICK, "--mp-workloads=suite_workloads:laboured", "--mp-modes=mixed-dynamic",
            "--mp-energy=10", "--mp-keep-suspect", "--mp-steps-per-call=4",
            SUITE_LOG=str(machine.folder / "cases.log"), SUITE_SLOW_CASES="1",
            MPSCALE_NOTES=str(tmp_path_factory.mktemp("notes")),
        )  # fmt: skip


@pytest.fixture
def with_energy(energy):
    machine, run = energy
    done = run.result()
    assert done.returncode == 0, done.stdout
    return machine


@pytest.mark.usefixtures("energy")
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
        threading.Timer(0.5, script, ("temperature_c .*", "temperature_c 40\\nlost 0")).start()
    mp_case.measure(benchmark)
""",
        *QUICK,
        FINE,
        "--mp-gpu-retries=1",
        "--mp-cool-down=1",
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


@pytest.mark.slow  # the first as in test_presets, the second as in test_main_job
@pytest.mark.parametrize(("visible", "tf32"), [(None, True), ("-1", False)])
def test_ampere_adds_tf32_to_the_plan(machine, visible, tf32):
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = machine.run(SUITE, "--collect-only", "-q", **variables)
    assert ("mnist1d-mlp-tf32-seed0" in done.stdout) == tf32


def test_gpu_that_does_not_exist_is_a_usage_error(machine):
    done = machine.run(SUITE, "--collect-only", "-q", CUDA_VISIBLE_DEVICES="3")
    assert done.returncode == 4
    assert "mpscale stand-in A100" in done.stdout
