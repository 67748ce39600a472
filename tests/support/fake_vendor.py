"""A GPU vendor that does not exist, as a real one would be added: a backend in one module and an entry in VENDORS."""

from __future__ import annotations

from mpscale.core.device import Device, Vendor
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.backend import Call, Gpu, GpuBackend, Implausible, Memory
from mpscale.telemetry.samples import ClockEvent, Reading

VENDOR = Vendor(
    name="ACME",
    backend="support.fake_vendor",
    library="libacme-smi.so.1",
    visible="ACME_VISIBLE_DEVICES",
    hiding=("", "none"),
    cure="install acme-smi",
)


class AcmeError(Exception):
    """An error of the vendor's library, with its number."""


class Acme(GpuBackend):
    """Two GPUs. ``state`` is what the library answers, in the vendor's units; an exception is raised."""

    vendor = VENDOR
    count = 2

    def __init__(self):
        self.state = {"vram": 1_000_000_000, "microwatt": 60_000_000, "celsius": 40, "throttle": 0, "pids": []}

    def ask_library(self, name):
        answer = self.state[name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def devices(self):
        return [
            Device("gpu", f"ACME Ray {n}", f"GPU-acme-{n}", memory_mib=16_384.0, vendor="ACME")
            for n in range(self.count)
        ]

    def driver_version(self):
        return "7.1"

    def runtime_version(self):
        return None

    def gpu(self, device):
        return AcmeGpu(self, device)

    def explain(self, error):
        if error.args == (7,):
            return Reason(Code.GPU_LOST, "the GPU is lost", "acme-smi --reset")
        return Reason(Code.OTHER, f"acme-smi failed: {error}")


class AcmeGpu(Gpu):
    """One of them. It has no clocks, no energy counter and no settings, so these have no calls."""

    def __init__(self, backend, device):
        def new_power():
            raise Implausible("this firmware has no momentary power")

        ask = backend.ask_library
        calls = {
            Reading.MEMORY: [Call("vram", lambda: Memory(ask("vram") / 2**20, None))],
            Reading.PROCESSES: [Call("pids", lambda: [(pid, vram / 2**20) for pid, vram in ask("pids")])],
            Reading.POWER: [Call("momentary", new_power), Call("mean", lambda: ask("microwatt") / 1e6)],
            Reading.TEMPERATURE: [Call("edge", lambda: ask("celsius"))],
            Reading.CLOCK_EVENTS: [Call("throttle", lambda: (ClockEvent.HARDWARE_THERMAL,) * bool(ask("throttle")))],
        }
        super().__init__(backend, device, calls)

    def vendor_facts(self):
        return {"slowdown_c": 95, "firmware": Reason(Code.NOT_TOLD, "no call for that")}


def open_backend():
    return Acme()
