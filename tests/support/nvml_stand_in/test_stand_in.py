"""The stand-in for NVIDIA's driver library, called by the real nvidia-ml-py in a separate process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.nvml_stand_in import CALLS, NAME, UUID, Script, build

MIB = 2**20

# Evaluates the lines that it is sent, and answers each with a line: the value, or the code of an NVMLError.
ASKED = """
import ctypes, faulthandler, json, sys, threading
from pynvml import *
faulthandler.enable()
def code(call, *arguments):
    try:
        call(*arguments)
    except NVMLError as error:
        return error.value
    return 0
def gpu(index=0):
    return nvmlDeviceGetHandleByIndex(index)
def used(version=None):
    memory = nvmlDeviceGetMemoryInfo(gpu(), version)
    return [value // 2**20 for value in (memory.total, memory.used, memory.free)]
def pids(kind="Compute_v3", handle=None):
    call = globals()["nvmlDeviceGet" + kind.replace("_", "RunningProcesses_")]
    return [[each.pid, each.usedGpuMemory and each.usedGpuMemory / 2**20] for each in call(handle or gpu())]
def ask_with_room_for(count):
    count = c_uint(count)
    call = CDLL("libnvidia-ml.so.1").nvmlDeviceGetComputeRunningProcesses_v3
    return [call(gpu(), byref(count), None), count.value]
started = code(nvmlInit)
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Child:
    """A process that uses NVML."""

    def __init__(self, environ: dict[str, str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASKED], env={**os.environ, **environ}, text=True, **pipes
        )

    def ask(self, expression: str) -> Any:
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"{expression}: {self.close()}"
        return json.loads(answer)

    def close(self) -> str:
        """End it and return what it wrote to standard error."""
        return self.process.communicate(timeout=20)[1]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "nvml.txt")


@pytest.fixture
def child(script: Script, stand_in_nvml: Path) -> Iterator[Child]:
    child = Child(script.environ(stand_in_nvml))
    yield child
    child.close()


def test_a_device_says_what_the_script_says(child):
    assert {
        expression: child.ask(f"nvml{expression}")
        for expression in (
            "SystemGetDriverVersion()",
            "SystemGetNVMLVersion()",
            "SystemGetCudaDriverVersion()",
            "DeviceGetCount()",
            "DeviceGetName(gpu())",
            "DeviceGetUUID(gpu())",
            "DeviceGetIndex(nvmlDeviceGetHandleByPciBusId('0000:07:00.0'))",
            "DeviceGetPciInfo(gpu()).busId",
            "DeviceGetCudaComputeCapability(gpu())",
            "DeviceGetVbiosVersion(gpu())",
            "DeviceGetPowerUsage(gpu())",
            "DeviceGetPowerManagementLimitConstraints(gpu())",
            "DeviceGetTemperature(gpu(), 0)",
            "DeviceGetTemperatureV(gpu(), 0)",
            "DeviceGetTemperatureThreshold(gpu(), 1)",
            "DeviceGetClockInfo(gpu(), NVML_CLOCK_GRAPHICS)",
            "DeviceGetMaxClockInfo(gpu(), NVML_CLOCK_MEM)",
            "DeviceGetCurrentClocksEventReasons(gpu())",
            "DeviceGetEccMode(gpu())",
            "DeviceGetPowerState(gpu())",
            "DeviceGetCurrPcieLinkWidth(gpu())",
            "DeviceGetMigMode(gpu())",
        )
    } == {
        "SystemGetDriverVersion()": "570.86.15",
        "SystemGetNVMLVersion()": "12.570.86.15",
        "SystemGetCudaDriverVersion()": 12080,
        "DeviceGetCount()": 1,
        "DeviceGetName(gpu())": NAME,
        "DeviceGetUUID(gpu())": UUID,
        "DeviceGetIndex(nvmlDeviceGetHandleByPciBusId('0000:07:00.0'))": 0,
        "DeviceGetPciInfo(gpu()).busId": "00000000:07:00.0",
        "DeviceGetCudaComputeCapability(gpu())": [8, 0],
        "DeviceGetVbiosVersion(gpu())": "92.00.45.00.03",
        "DeviceGetPowerUsage(gpu())": 60_000,
        "DeviceGetPowerManagementLimitConstraints(gpu())": [100_000, 400_000],
        "DeviceGetTemperature(gpu(), 0)": 35,
        "DeviceGetTemperatureV(gpu(), 0)": 35,
        "DeviceGetTemperatureThreshold(gpu(), 1)": 92,
        "DeviceGetClockInfo(gpu(), NVML_CLOCK_GRAPHICS)": 1410,
        "DeviceGetMaxClockInfo(gpu(), NVML_CLOCK_MEM)": 1215,
        "DeviceGetCurrentClocksEventReasons(gpu())": 0,
        "DeviceGetEccMode(gpu())": [1, 1],
        "DeviceGetPowerState(gpu())": 0,
        "DeviceGetCurrPcieLinkWidth(gpu())": 16,
        "DeviceGetMigMode(gpu())": [0, 0],
    }


def test_memory_of_both_versions(script, child):
    script.set(memory_mib=10_000, reserved_mib=500, used_mib=400)
    script.process("compute", 11, "n/a(300)").process("graphics", 11, 200).process("compute", 12, "0(50)")
    v2 = "used(nvmlMemory_v2)"
    assert child.ask("used()") == [10_000, 1250, 8750]
    assert child.ask(v2) == [10_000, 750, 8750]
    assert child.ask("nvmlDeviceGetMemoryInfo(gpu(), nvmlMemory_v2).reserved") == 500 * MIB
    script.set(v1_used="excludes_reserved", v2_used="includes_reserved")
    assert (child.ask("used()")[1], child.ask(v2)[1]) == (750, 1250)
    assert child.ask("code(used, nvmlMemory_v2 + 1)") == 25
    script.set(used_mib=None)
    assert child.ask("code(used)") == 3


def test_a_timeline_holds_each_value_from_its_time_on(script, child):
    script.set(power_w="10:60 1000:300 2000:- 3000:0", event_reasons="0x24")
    answers = {}
    for seconds in (0, 500, 1500, 2500, 3500):
        script.jump_to(seconds)
        answers[seconds] = child.ask("code(nvmlDeviceGetPowerUsage, gpu()) or nvmlDeviceGetPowerUsage(gpu())")
    assert answers == {0: 60_000, 500: 60_000, 1500: 300_000, 2500: 3, 3500: 0}
    assert child.ask("nvmlDeviceGetCurrentClocksThrottleReasons(gpu())") == 0x24


def test_lists_of_processes(script, child):
    assert child.ask("pids()") == []
    script.process("compute", 11, 300).process("compute", 12, "n/a(7)").process("compute", 13, "0(7)")
    script.process("compute", 14, "0:- 1000:5").process("graphics", 11, 300).process("mps", 15, 1)
    assert child.ask("pids()") == child.ask("pids('Compute_v2')") == [[11, 300], [12, None], [13, 0]]
    assert child.ask("pids('Graphics_v3')") == [[11, 300]]
    assert child.ask("pids('MPSCompute_v3')") == [[15, 1]]
    script.jump_to(1500)
    assert [14, 5] in child.ask("pids()")
    script.general(offset_pid=1000)
    assert [pid for pid, _ in child.ask("pids()")] == [1011, 1012, 1013, 1014]
    assert child.ask("ask_with_room_for(3)") == [7, 4]


def test_wide_entries_are_garbage_to_readers_of_narrow_ones(script, child):
    script.process("compute", 11, 300).process("compute", 12, 200)
    script.general(entry_bytes=32)
    first, second = child.ask("pids()")
    assert first == [11, 300] and second != [12, 200]
    assert child.ask("pids('Compute_v2')") == [[11, 300], [12, 200]]


def test_the_energy_counter_integrates_power_in_ticks(script, child):
    script.set(power_w="0:100 100:300 200:- 300:100", energy_tick=1000, energy_start_j=5)
    energy = "nvmlDeviceGetTotalEnergyConsumption(gpu())"
    answers = []
    for seconds in (-500, 500, 1500):
        script.jump_to(seconds)
        answers.append(child.ask(energy))
    assert answers == [5000, 5000, 5000 + 1000 * (100 * 100 + 100 * 300 + 700 * 100)]
    fields = "[[each.nvmlReturn, each.value.ullVal] for each in nvmlDeviceGetFieldValues(gpu(), [83, 185, 186, 1])]"
    script.set(power_instant_w=7)
    assert child.ask(fields) == [[0, answers[-1]], [0, 100_000], [0, 7000], [3, 0]]
    script.set(energy=None)
    assert child.ask("code(nvmlDeviceGetTotalEnergyConsumption, gpu())") == 3
    assert child.ask(fields)[0][0] == 3


def test_older_drivers_lack_symbols(script, tmp_path):
    library = build(tmp_path / "old", without=["nvmlDeviceGetMemoryInfo_v2"])
    child = Child(script.environ(library))
    assert child.ask("code(used, nvmlMemory_v2)") == 13
    assert child.ask("used()[0]") == 40960
    child.close()
    with pytest.raises(ValueError, match="nvmlDeviceGetMemoryInfo_v3 is none of"):
        build(tmp_path / "odd", without=["nvmlDeviceGetMemoryInfo_v3"])


def test_every_call_that_a_script_may_name_exists(child):
    assert child.ask(f"[name for name in {sorted(CALLS)} if not hasattr(CDLL('libnvidia-ml.so.1'), name)]") == []


def test_a_call_fails_when_its_turn_comes(script, child):
    asked = "[code(nvmlDeviceGetPowerUsage, gpu()) for _ in range(5)]"
    script.fail("nvmlDeviceGetPowerUsage", 15, after=1, times=2).fail("nvmlDeviceGetPowerUsage", 999, after=4)
    assert child.ask(asked) == [0, 15, 15, 0, 999]
    assert child.ask("code(nvmlDeviceGetTemperature, gpu(), 0)") == 0
    assert child.ask(asked) == [999] * 5
    script.heal()
    assert child.ask(asked) == [0] * 5


def test_a_call_that_hangs_holds_up_no_other_thread(script, child):
    script.latency("nvmlDeviceGetPowerUsage", 1e9, after=1).latency("nvmlDeviceGetName", 0.05)
    hang = "threading.Thread(target=nvmlDeviceGetPowerUsage, args=[gpu()], daemon=True)"
    assert child.ask("nvmlDeviceGetPowerUsage(gpu())") == 60_000
    child.ask(f"globals().update(hanging={hang}) or hanging.start()")
    started = time.monotonic()
    assert child.ask("nvmlDeviceGetName(gpu())") == NAME
    assert time.monotonic() - started >= 0.05
    assert child.ask("hanging.is_alive()")


def test_a_crash_ends_the_process(script, child):
    script.crash("nvmlDeviceGetName", after=1)
    assert child.ask("nvmlDeviceGetName(gpu())") == NAME
    child.process.stdin.write("nvmlDeviceGetName(gpu())\n")
    child.close()
    assert child.process.returncode == -11


def test_devices_and_mig_instances(script, child):
    assert script.device(name="second", lost=1000) == 1
    assert script.mig(0, memory_mib=5000, reserved_mib=0, used_mib=10) == 0
    assert script.mig(0, uuid="MIG-other", gi=9, ci=1) == 1
    script.process("compute", 11, 300, instance=0).process("compute", 12, "0:5", device=1)
    assert child.ask("nvmlDeviceGetCount()") == 2
    assert child.ask("nvmlDeviceGetMigMode(gpu())") == [1, 1]
    assert child.ask("nvmlDeviceGetMaxMigDeviceCount(gpu())") == 7
    child.ask("globals().update(mig=nvmlDeviceGetMigDeviceHandleByIndex(gpu(), 0))")
    assert child.ask("nvmlDeviceGetMemoryInfo(mig).used") == 310 * MIB
    assert child.ask("pids(handle=mig)") == [[11, 300]] and child.ask("pids()") == []
    assert child.ask("nvmlDeviceGetAttributes(mig).memorySizeMB") == 5000
    assert child.ask("[nvmlDeviceIsMigDeviceHandle(each).value for each in (mig, gpu())]") == [1, 0]
    assert child.ask("nvmlDeviceGetUUID(nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig))") == UUID
    assert child.ask("nvmlDeviceGetGpuInstanceId(nvmlDeviceGetHandleByUUID('MIG-other'))") == 9
    assert child.ask("code(nvmlDeviceGetMigDeviceHandleByIndex, gpu(), 2)") == 6
    for call in ("PowerUsage", "TotalEnergyConsumption", "UtilizationRates", "CurrentClocksEventReasons"):
        assert child.ask(f"code(nvmlDeviceGet{call}, mig)") == 3
    child.ask("globals().update(second=gpu(1))")
    assert child.ask("[nvmlDeviceGetName(second), pids(handle=second)]") == ["second", [[12, 5]]]
    script.set(1, mig=None)
    assert child.ask("[code(nvmlDeviceGetMigMode, second), nvmlDeviceGetMaxMigDeviceCount(second)]") == [3, 0]
    script.jump_to(1500)
    assert child.ask("[code(nvmlDeviceGetName, second), code(gpu, 1), nvmlDeviceGetCount()]") == [15, 15, 2]


def test_a_changed_script_is_read_again(script, child):
    assert child.ask("nvmlDeviceGetTemperature(gpu(), 0)") == 35
    script.set(temperature_c=36)
    assert child.ask("nvmlDeviceGetTemperature(gpu(), 0)") == 36


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temprature_c 30", "unknown: temprature_c 30"),
        ("temperature_c 30 40", "a timeline is"),
        ("temperature_c 5:30 4:40", "a timeline is"),
        ("temperature_c warm", "not a value"),
        ("temperature_c n/a(3)", "not a value"),
        ("capability 8 0 1", "too much"),
        ("device 3", "in order"),
        ("fail nvmlDeviceGetPower 3", "no such call"),
        ("fail nvmlDeviceGetPowerUsage 3 before 1", "after N or for M"),
        ("process compute worker 3", "a process id or @worker"),
        ("v1_used reserved", "excludes_reserved was expected"),
        ("entry_bytes 28", "24 and of 32"),
    ],
)
def test_a_typo_does_not_pass_silently(line, message, script, stand_in_nvml):
    lines = script.text().splitlines()
    script.path.write_text("\n".join([*lines, "# a comment", line, ""]))
    child = Child(script.environ(stand_in_nvml))
    assert child.ask("[started, code(nvmlDeviceGetCount)]") == [999, 999]
    assert re.search(rf"nvml.txt, line {len(lines) + 2}: .*{message}", child.close())


def test_without_a_script_no_driver_is_loaded(script, stand_in_nvml):
    environ = script.environ(stand_in_nvml)
    script.general(init_error=18)
    for variables, code in (environ, 18), ({**environ, "MPSCALE_STAND_IN_NVML": "/nowhere"}, 9):
        child = Child(variables)
        assert child.ask("started") == code
        child.close()


def test_the_worker_is_listed_once_it_holds_a_context(script, child):
    script.process("compute", "@worker", "0:300 1000:3000")
    body = """
import sys, threading
sys.stdin.readline()
threading.Thread(target=sys.stdin.read, daemon=True).start()
name = next(each for each in threading.enumerate() if each.daemon).native_id
open(f"/proc/self/task/{name}/comm", "w").write("tf_Compute")
print("ready", flush=True)
threading.Event().wait()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", body, "mpscale.worker.__main__"], text=True, **pipes) as worker:
        assert child.ask("pids()") == []
        worker.stdin.write("\n")
        worker.stdin.flush()
        worker.stdout.readline()
        deadline = time.monotonic() + 10
        while not (listed := child.ask("pids()")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert listed == [[worker.pid, 300]]
        assert child.ask("used()")[1] == 500 + 450 + 300
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # ended, and still there as a zombie
        assert child.ask("pids()") == []
