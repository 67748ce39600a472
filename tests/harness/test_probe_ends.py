"""However the training of a probe ends, the probe keeps its looks and says why there are not more."""

import contextlib

import pytest

from mpscale.analysis.probe import Probe
from mpscale.core.cause import Cause
from mpscale.core.device import Device
from mpscale.core.processes.events import Looked
from mpscale.core.reason import Code
from mpscale.harness.probe import note, run, settings


class Machine:
    """Runs a case without a process: three looks, and then an end."""

    def __init__(self, probe, end, again=None):
        self.probe, self.end, self.again, self.attempts, self.closed = probe, end, again, 0, False

    def run(self, case, steps_path, gpu_path, outcome, attempt=1):
        assert (case.mode, case.trains, case.settings.looks, case.settings.timing_s) == ("fp32", False, 3, 0.0)
        self.attempts = attempt
        for step in (1, 5, 9):
            row = {"layer": "dense", "of": "weights", "optimizer": "optimizer", "largest": 1.0, "counts": {"508": 10}}
            note(self.probe, Looked(step, 0.5, [row], []))
        if self.end == "interrupt":
            raise KeyboardInterrupt
        outcome.again = self.again if attempt == 1 else None
        outcome.record.update({"status": self.end, "status_reason": "why", "workload_digest": "sha256:1"})

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("ok", None),
        ("diverged", Code.NOT_FINITE),
        ("oom", Code.OUT_OF_MEMORY),
        ("crashed", Code.OTHER),
        ("interrupt", Code.NOT_REACHED),
    ],
)
def test_looks_are_kept_and_the_end_is_told(end, code):
    probe = Probe("toy", Device("cpu", "Test CPU"), 9)
    machine = Machine(probe, end)
    with contextlib.suppress(KeyboardInterrupt):
        run(probe, settings(9, 3, None, jit=True), 0, machine)
    assert machine.closed
    assert [look.step for look in probe.looks] == [1, 5, 9]
    assert (probe.problem and probe.problem.code) == code
    assert probe.digest == (None if end == "interrupt" else "sha256:1")


def test_a_second_attempt_with_another_allocator_begins_anew():
    probe = Probe("toy", Device("cpu", "Test CPU"), 9)
    machine = Machine(probe, "ok", again="allocator")
    run(probe, settings(9, 3, None, jit=True), 0, machine)
    assert (machine.attempts, [look.step for look in probe.looks]) == (2, [1, 5, 9])
    assert probe.all("weights").total == 30


def test_what_xla_refuses_is_probed_without_it_unless_xla_was_demanded():
    class Refusing(Machine):
        def run(self, case, steps_path, gpu_path, outcome, attempt=1):
            super().run(case, steps_path, gpu_path, outcome, attempt)
            if case.settings.jit:
                outcome.record.end("error", "XLA cannot compile Lu", Cause.XLA_REFUSED)
                outcome.record.update({"xla_refused": "Lu"})

    probe, said = Probe("toy", Device("cpu", "Test CPU"), 9), []
    machine = Refusing(probe, "ok")
    run(probe, settings(9, 3, None, jit=True), 0, machine, said.append)
    assert (machine.attempts, said, probe.problem) == (2, ["Lu"], None)
    assert [look.step for look in probe.looks] == [1, 5, 9]
    run(probe, settings(9, 3, None, jit=True), 0, machine)
    assert "--jit auto" in str(probe.problem)
